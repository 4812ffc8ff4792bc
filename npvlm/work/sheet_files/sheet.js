"use strict";

// Everything in the records is only ever put into the page as text or as an attribute's value.
const { colours, views } = JSON.parse(document.getElementById("data").textContent);
const GAP = 14, NARROWEST = 218; // pixels
const BARS = 20;
const NARROW = 20; // a picture so much longer than wide is framed, or it would not be seen
const GONE = "The picture is not there any more.";
const LEGEND = 12; // labels to choose from

const at = (id) => document.getElementById(id);
const filter = at("filter"), sheet = at("sheet"), dialog = at("open");
const stage = dialog.querySelector(".stage"), facts = dialog.querySelector(".facts");

function make(tag, properties = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}

function draw(tag, attributes, ...inside) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

// What is known of each view once and for all. A prompt that all share would make its words fit all.
const counts = new Map();
const prompts = distinct("prompt");
const unsaid = ["stop", "model", "precision", "polygons"].concat(prompts.length > 1 ? [] : "prompt");
for (const view of views) {
  const record = view.record, boxes = record.boxes || [];
  view.sure = boxes.length ? Math.min(...boxes.map((box) => box.confidence)) : view.confidence;
  view.words = text(record).toLowerCase();
  for (const box of boxes) counts.set(box.label, (counts.get(box.label) || 0) + 1);
}
const SAID = prompts.length > 1 ? 106 : 86; // pixels of a card below its picture
const colour = new Map([...counts.keys()].map((label, i) => [label, colours[i % colours.length]]));

function text(value) {
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map(text).filter(Boolean).join("\n");
  if (value === null || typeof value !== "object") return "";
  return Object.keys(value).filter((key) => !unsaid.includes(key)).map((key) => text(value[key])).join("\n");
}

function distinct(key) {
  return [...new Set(views.map((view) => view.record[key]).filter((value) => typeof value === "string"))];
}

function about() {
  const errors = views.filter((view) => view.record.error !== undefined).length;
  return [
    `${views.length.toLocaleString("en")} ${views.length === 1 ? "picture" : "pictures"}`,
    prompts.length === 1 ? `“${prompts[0]}”` : `${prompts.length.toLocaleString("en")} prompts`,
    [...distinct("model"), ...distinct("precision")].join(", "),
    errors ? `${errors.toLocaleString("en")} ${errors === 1 ? "error" : "errors"}` : "",
  ].filter(Boolean).join(" · ");
}

// ---- A picture with its boxes

function picture(view, labelled) {
  const record = view.record;
  if (!view.thumbnail) {
    return make("div", { className: "absent", textContent: view.reason || GONE });
  }
  const width = record.width || view.width, height = record.height || view.height;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(draw("image", { href: view.thumbnail, width, height, preserveAspectRatio: "none", class: view.tiny ? "tiny" : "" }));
  if (Math.max(width / height, height / width) > NARROW) svg.append(draw("rect", { class: "frame", width, height }));
  const size = Math.max(width, height) / 36;
  for (const box of record.boxes || []) {
    const [x0, y0, x1, y1] = box.box, tone = colour.get(box.label);
    const place = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
    const thing = draw("g", { class: "thing" });
    for (const ring of box.polygons || []) thing.append(draw("polygon", { class: "mask", points: ring.join(" "), fill: tone, stroke: tone }));
    thing.append(draw("rect", { class: "edge", ...place }), draw("rect", { class: "box", ...place, stroke: tone }));
    if (labelled) {
      const y = y0 > 1.4 * size ? y0 - 0.35 * size : Math.min(y1 + size, height - 0.3 * size);
      thing.append(draw("text", { x: x0, y, "font-size": size, "stroke-width": size / 6, fill: "#fff" }, `${box.label} ${box.confidence.toFixed(2)}`.trim()));
    }
    svg.append(thing);
  }
  return svg;
}

function sureness(value) {
  const level = value < 0.5 ? "low" : value < 0.8 ? "middle" : "high";
  const bar = make("i");
  bar.style.setProperty("--part", `${Math.round(100 * value)}%`);
  return make("span", { className: `sure ${level}`, title: "confidence" }, bar, value.toFixed(2));
}

function swatch(label) {
  const spot = make("span", { className: "swatch" });
  spot.style.setProperty("--colour", colour.get(label));
  return spot;
}

// What a card says: things found are counted, for nobody reads location tokens.
function said(record) {
  if (record.error !== undefined) return make("p", { className: "text", textContent: "no answer" });
  if (!record.boxes || !record.boxes.length) {
    const empty = record.boxes && !record.text ? "nothing found" : record.text ? "" : "(no words)";
    return make("p", { className: empty ? "text nothing" : "text", textContent: empty || record.text });
  }
  const found = new Map();
  for (const box of record.boxes) found.set(box.label, (found.get(box.label) || 0) + 1);
  const words = [...found].map(([label, n]) => (n > 1 ? `${n} × ${label || "?"}` : label || "?"));
  return make("p", { className: "text", textContent: words.join(", ") });
}

const baseName = (image) => (image || "").split(/[\\/]/).pop() || image || "";

function card(index) {
  const view = shown[index], record = view.record;
  const foot = make("div", { className: "foot" }, make("span", { className: "name", textContent: baseName(record.image), title: record.image || "" }));
  if (view.sure !== undefined) foot.append(sureness(view.sure));
  const button = make("button", { className: record.error === undefined ? "card" : "card failed", type: "button" },
    make("div", { className: "stage" }, picture(view, false)),
    make("div", { className: "said" }, ...(prompts.length > 1 ? [make("p", { className: "asked", textContent: record.prompt || "" })] : []), said(record), foot));
  button.lastChild.style.height = `${SAID}px`;
  button.setAttribute("role", "listitem");
  button.dataset.index = record.index;
  button.addEventListener("click", () => show(index));
  button.addEventListener("focus", () => { selected = index; });
  return button;
}

// ---- The sheet: only cards near the window are in the page

let shown = views, selected = 0, columns = 1, cardWidth = NARROWEST, cardHeight = NARROWEST;
const present = new Map();

function measure() {
  const width = sheet.clientWidth;
  columns = Math.max(1, Math.floor((width + GAP) / (NARROWEST + GAP)));
  cardWidth = (width - (columns - 1) * GAP) / columns;
  cardHeight = Math.round(0.78 * cardWidth) + SAID;
  sheet.style.height = `${Math.max(0, Math.ceil(shown.length / columns) * (cardHeight + GAP) - GAP)}px`;
  document.documentElement.style.setProperty("--head", `${document.querySelector("header").offsetHeight}px`);
}

function place(element, index) {
  Object.assign(element.style, {
    left: `${(index % columns) * (cardWidth + GAP)}px`,
    top: `${Math.floor(index / columns) * (cardHeight + GAP)}px`,
    width: `${cardWidth}px`, height: `${cardHeight}px`,
  });
  element.tabIndex = index === selected ? 0 : -1;
}

function paint() {
  const top = -sheet.getBoundingClientRect().top, row = cardHeight + GAP;
  const first = Math.max(0, Math.floor(top / row) - 2) * columns;
  const last = Math.min(shown.length, (Math.ceil((top + innerHeight) / row) + 2) * columns);
  for (const [index, element] of present) {
    if (index >= first && index < last) continue;
    element.remove();
    present.delete(index);
  }
  for (let index = first; index < last; index++) {
    if (!present.has(index)) {
      present.set(index, card(index));
      sheet.append(present.get(index));
    }
    place(present.get(index), index);
  }
}

function arrange() {
  const chosen = fitting(filter.value);
  const order = at("sort").value;
  shown = views.filter((view) => chosen.every((fits) => fits(view)));
  if (order !== "order") {
    const sign = order === "unsure" ? 1 : -1; // an error is more unsure than any answer
    const key = (view) => sign * (view.sure === undefined ? -1 : view.sure);
    shown.sort((a, b) => key(a) - key(b) || a.record.index - b.record.index);
  }
  selected = 0;
  for (const element of present.values()) element.remove();
  present.clear();
  at("none").hidden = shown.length > 0;
  at("count").textContent = shown.length === views.length ? "" : `${shown.length.toLocaleString("en")} of ${views.length.toLocaleString("en")}`;
  for (const label of at("labels").children) label.setAttribute("aria-pressed", filter.value.includes(label.dataset.says));
  bars();
  measure();
  paint();
}

// Words that all must be somewhere in the record, "several words" in a row, conf<0.5, boxes>2; error
// means records without an answer, "error" the word.
function fitting(wanted) {
  const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };
  return (wanted.toLowerCase().match(/"[^"]*"?|\S+/g) || []).map((word) => {
    if (word === "error") return (view) => view.record.error !== undefined;
    const test = /^(conf|boxes)(<=|>=|<|>|=)(\d*\.?\d+)$/.exec(word);
    if (!test) {
      const plain = word.replace(/"/g, "");
      return (view) => view.words.includes(plain);
    }
    const [, key, sign, number] = test;
    const value = (view) => (key === "conf" ? view.sure : view.record.boxes && view.record.boxes.length);
    return (view) => value(view) !== undefined && compare[sign](value(view), Number(number));
  });
}

// ---- Confidences and labels, to choose by

function bars() {
  const tally = new Array(BARS).fill(0);
  for (const { sure } of shown) if (sure !== undefined) tally[Math.min(BARS - 1, Math.floor(sure * BARS))]++;
  const most = Math.max(1, ...tally);
  at("bars").replaceChildren(...tally.map((number, i) => {
    const from = i / BARS, to = (i + 1) / BARS;
    const bar = make("span");
    bar.style.height = number ? `${8 + 92 * (number / most)}%` : "0";
    const button = make("button", { type: "button", title: `${number} of confidence ${from.toFixed(2)} to ${to.toFixed(2)}` }, bar);
    button.addEventListener("click", () => {
      const others = filter.value.replace(/\s*conf(<=|>=|<|>|=)\S*/g, "").trim();
      const upper = i === BARS - 1 ? "" : ` conf<${to.toFixed(2)}`;
      filter.value = `${others} conf>=${from.toFixed(2)}${upper}`.trim();
      arrange();
    });
    return button;
  }));
}

function legend() {
  const common = [...counts].filter(([label]) => label).sort((a, b) => b[1] - a[1]).slice(0, LEGEND);
  at("labels").replaceChildren(...common.map(([label, number]) => {
    const button = make("button", { className: "label", type: "button" }, swatch(label), make("b", { textContent: label }), make("small", { textContent: number.toLocaleString("en") }));
    button.dataset.says = `"${label.replace(/"/g, "")}"`;
    button.addEventListener("click", () => {
      const says = button.dataset.says;
      filter.value = (filter.value.includes(says) ? filter.value.replace(says, "") : `${filter.value} ${says}`).replace(/\s+/g, " ").trim();
      arrange();
    });
    return button;
  }));
}

// ---- One card, opened

function show(index) {
  selected = index;
  const view = shown[index], record = view.record, boxes = record.boxes || [];
  const drawn = picture(view, true);
  dialog.classList.toggle("bare", !view.thumbnail);
  stage.replaceChildren(...(view.thumbnail ? [drawn] : []));
  const name = baseName(record.image);
  at("open-name").replaceChildren(name || "no picture", make("small", { textContent: (record.image || "").slice(0, -name.length) }));
  const inside = [];
  const part = (title, ...elements) => inside.push(make("h3", { textContent: title }), ...elements);
  if (record.prompt !== null) part("Prompt", make("p", { textContent: record.prompt }));
  if (record.error !== undefined) part("Error", make("p", { className: "wrong", textContent: record.error }));
  else if (!view.thumbnail) part("Picture", make("p", { className: "wrong", textContent: GONE }));
  if (boxes.length) {
    part(`${boxes.length} ${boxes.length === 1 ? "box" : "boxes"}`, make("ul", {}, ...boxes.map((box, i) => {
      const entry = make("li", {}, swatch(box.label), make("b", { textContent: box.label || "(no label)" }), sureness(box.confidence));
      const things = drawn.querySelectorAll(".thing");
      entry.addEventListener("mouseenter", () => { if (things[i]) { drawn.classList.add("dimmed"); things[i].classList.add("lit"); } });
      entry.addEventListener("mouseleave", () => { if (things[i]) { drawn.classList.remove("dimmed"); things[i].classList.remove("lit"); } });
      return entry;
    })), make("p", { className: "hint", textContent: "The model's probability for a box as near as a hundredth of the picture's side, and for its label. The card shows the lowest." }));
  } else if (record.error === undefined) {
    const nothing = record.boxes && !record.text ? "nothing found" : "";
    part("Answer", make("p", { className: nothing ? "answer nothing" : "answer", textContent: nothing || record.text }));
    part("Confidence", make("p", {}, sureness(view.confidence)), make("p", { className: "hint", textContent: "The geometric mean of the probabilities that the model gave the answer's tokens." }));
  }
  if (record.unread && record.unread.length) part("Not read as boxes", make("p", { className: "wrong", textContent: record.unread.join("\n") }));
  if (record.stop === "length") part("Cut", make("p", { className: "wrong", textContent: `The answer reached ${record.max_tokens} tokens, the most there may be.` }));
  const rings = (key, value) => (key === "polygons" ? `${value.length} outlines` : value);
  inside.push(make("details", { open: opened }, make("summary", { textContent: "JSON" }),
    make("pre", { textContent: JSON.stringify(record, rings, 2) }),
    make("p", { className: "hint", textContent: "Token ids, their log-probabilities and the pixels of masks are in the records only." })));
  facts.replaceChildren(...inside);
  facts.scrollTop = 0;
  const details = facts.querySelector("details");
  details.addEventListener("toggle", () => { opened = details.open; });
  for (const button of dialog.querySelectorAll(".step")) button.disabled = !shown[index + Number(button.dataset.step)];
  if (!dialog.open) dialog.showModal();
}
let opened = false; // whether the JSON is, from card to card

function step(by) {
  if (shown[selected + by]) show(selected + by);
}

function focusOn(index) {
  selected = Math.max(0, Math.min(shown.length - 1, index));
  const row = cardHeight + GAP, head = document.querySelector("header").offsetHeight;
  const top = sheet.getBoundingClientRect().top + Math.floor(selected / columns) * row;
  if (top < head + GAP) scrollBy(0, top - head - GAP);
  else if (top + row > innerHeight) scrollBy(0, top + row - innerHeight);
  paint();
  const element = present.get(selected);
  if (element) element.focus({ preventScroll: true });
}

for (const button of dialog.querySelectorAll(".step")) button.addEventListener("click", () => step(Number(button.dataset.step)));
dialog.querySelector(".close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => focusOn(selected));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step_of = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (dialog.open) {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      step(step_of[event.key]);
    }
  } else if (event.target === filter || event.target === at("sort")) {
    if (event.target === filter && event.key === "ArrowDown") {
      event.preventDefault();
      focusOn(0);
    }
  } else if (event.key === "/") {
    event.preventDefault();
    filter.focus();
  } else if (event.key in step_of && shown.length) {
    event.preventDefault();
    focusOn(event.target.classList.contains("card") ? Math.max(0, selected + step_of[event.key]) : selected);
  }
});
filter.addEventListener("input", () => { arrange(); scrollTo(0, 0); });
at("sort").addEventListener("change", () => { arrange(); scrollTo(0, 0); });
addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
addEventListener("resize", () => { measure(); paint(); });

at("about").textContent = about();
legend();
arrange();
