"""Text that means harm: prompts, labels, names and answers, from the shell and from Python."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import npvlm
from npvlm.answers.answer import Answer, Seconds
from npvlm.answers.formats import coco, csv_line, csv_lines, yolo_lines
from npvlm.answers.lines import harmless, json_line
from npvlm.cli.lines import HarmlessOutput
from npvlm.decoding.sampling import Sampling
from npvlm.errors import NpvlmError, UsageError
from npvlm.porting.trace import trace
from npvlm.work.demo import draw_picture
from tests.test_cli import CLI, one_line, run

MOST = 90  # tokens of picture, prompt and answer: the picture has 64
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\x00\x08\r\u202e\u2066\u2028"
PROMPTS = [
    "",
    " ",
    "\n",
    "\0",
    ESCAPES,
    "<eos>",
    "<bos><pad><unk><mask>",
    "<0x0A><0x00><0xFF>",
    "<loc0001>" * 5,
    "<seg001>" * 17,
    "<loc1024><seg128><loc><LOC0001>",
    "שלום \u202eabc",
    "e\u0301\u0301\u0301",
    "👩\u200d👩\u200d👧\u200d👦",
    "\ufeff\ufffd\U0010ffff",
    "\u2581\u2581",
    "--help",
    "%s {} $x \\",
]


@pytest.fixture(scope="module")
def whole() -> npvlm.Model:
    return npvlm.load("shapes")


@pytest.fixture(scope="module")
def model(whole: npvlm.Model) -> npvlm.Model:
    """The bundled model with a short memory."""
    text = replace(whole.config.text_config, max_position_embeddings=MOST)
    return replace(whole, config=replace(whole.config, text_config=text))


@pytest.fixture(scope="module")
def seen(whole: npvlm.Model) -> npvlm.Seen:
    return whole.look(draw_picture())


@pytest.mark.parametrize("prompt", PROMPTS, ids=ascii)
def test_any_text_is_asked_as_it_is(whole: npvlm.Model, seen: npvlm.Seen, prompt: str) -> None:
    [answer] = whole.generate(seen, prompt, max_tokens=2)
    image, bos, newline = (getattr(whole.tokenizer, f"{k}_id") for k in ("image", "bos", "newline"))
    ids = answer.prompt_token_ids
    patches = whole.config.vision_config.num_patches
    assert ids[: patches + 1] == [image] * patches + [bos]
    assert ids[-1] == newline
    said = ids[patches + 1 : -1]
    assert not {image, bos, whole.tokenizer.eos_id, whole.tokenizer.pad_id} & set(said)
    assert json.loads(answer.to_json())["prompt"] == prompt


@pytest.mark.parametrize("prompt", ["\ud800", "a\udcff", "detect \udcff"])
def test_what_is_no_character_is_refused_everywhere(
    whole: npvlm.Model, seen: npvlm.Seen, prompt: str
) -> None:
    asks: list[Callable[[], Any]] = [
        lambda: whole.generate(seen, prompt),
        lambda: whole.ask(seen, prompt),
        lambda: whole.detect(seen, prompt),
        lambda: whole.segment(seen, prompt),
        lambda: whole.score(seen, "caption en", prompt),
        lambda: whole.score(seen, prompt, "a"),
        lambda: whole.explain(seen, prompt),
        lambda: whole.explain(seen, "caption en", answer=prompt),
        lambda: trace(whole, draw_picture(), prompt),
    ]
    for ask in asks:
        with pytest.raises(UsageError, match="is no UTF-8 at character"):
            ask()
    [failed] = whole.batch(seen, prompt)
    assert "is no UTF-8" in failed.error and json.loads(failed.to_json())["prompt"] == prompt


def entrances(model: npvlm.Model, seen: npvlm.Seen) -> dict[str, Callable[[int, int], Any]]:
    """Ways to ask with a prompt of p tokens and an answer of at most a."""
    text = "x".__mul__  # a token each

    return {
        "generate": lambda p, a: model.generate(seen, text(p), max_tokens=a),
        "beams": lambda p, a: model.generate(seen, text(p), max_tokens=a, beams=2),
        "stream": lambda p, a: [*model.stream(seen, text(p), max_tokens=a)],
        "events": lambda p, a: [*model.events(seen, text(p), Sampling(), max_tokens=a)],
        "logits": lambda p, a: model.logits(seen, text(p), [5] * a),
        "score": lambda p, a: model.score(seen, text(p), ["x", text(a - 1)]),
        "explain": lambda p, a: model.explain(seen, text(p), answer="<loc0001>" * a),
        "trace": lambda p, a: trace(model, draw_picture(), text(p), step=a if a > 1 else 0),
    }


@pytest.mark.parametrize(
    "way", ["generate", "beams", "stream", "events", "logits", "score", "explain", "trace"]
)
def test_what_just_fits_is_answered_and_one_token_more_is_refused(
    model: npvlm.Model, seen: npvlm.Seen, way: str
) -> None:
    ask = entrances(model, seen)[way]
    frame = 64 + 2  # the picture, <bos> and the newline
    room = MOST - frame
    answer = 1 if way == "trace" else 4
    ask(room - answer, answer)
    for prompt, tokens in ((room - answer, answer + 1), (room - answer + 1, answer), (5000, 1)):
        with pytest.raises(UsageError, match="too many, expected at most 90 together"):
            ask(prompt, tokens)


def test_the_limit_is_said_before_the_picture_is_read(model: npvlm.Model) -> None:
    with pytest.raises(UsageError) as caught:
        model.generate("absent.png", "caption en", max_tokens=10**30)
    said = str(caught.value)
    assert f"{10**30} of the answer" in said and "max_position_embeddings" in said
    [failed] = model.batch("absent.png", "x" * 100_000)
    assert "tokens of pictures and prompt" in failed.error


def test_beams_without_number_are_refused(whole: npvlm.Model, seen: npvlm.Seen) -> None:
    for beams in (101, 10**30):
        with pytest.raises(UsageError, match=f"beams is {beams}, expected at most 100"):
            whole.generate(seen, "caption en", beams=beams)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, -(10**400), "1", [1], True])
def test_no_draw_is_made_by_numbers_that_mean_nothing(name: str, value: Any) -> None:
    with pytest.raises(UsageError):
        Sampling(**{name: value})


def test_any_text_survives_json_and_leaves_one_line() -> None:
    values = {"text": ESCAPES + "\n\t\x85\u2029\udcff</script>"}
    line = json_line(values)
    assert json.loads(line) == values
    assert line.splitlines() == [line]
    assert harmless(line) == line


def test_no_control_character_reaches_the_terminal() -> None:
    written = io.BytesIO()
    stream = HarmlessOutput(written, encoding="utf-8", errors="surrogateescape")
    every = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2070), 0xDC9B]))
    assert stream.write(every) == len(every)
    stream.flush()
    said = written.getvalue().decode("utf-8", "surrogateescape").replace("\n", "").replace("\t", "")
    bidirectional = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029]
    assert not {chr(c) for c in [*range(0x20), *range(0x7F, 0xA0), *bidirectional]} & set(said)
    assert r"\x1b" in said and r"\u202e" in said and "~\\x7f" in said and "é" in said
    assert said.endswith("\udc9b")  # a name that is no UTF-8 is its own bytes


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\r\n", '"', ",", "\n", "a\tb", " "])
def test_a_line_of_csv_reads_back_as_it_was(text: str) -> None:
    content = f"{csv_line([text, 'x'])}\n{csv_line(['y', text])}\n"
    assert [*csv.reader(io.StringIO(content, newline=""))] == [[text, "x"], ["y", text]]


def test_broken_answers_give_sound_boxes_or_none(whole: npvlm.Model) -> None:
    """Random runs of location, outline, byte and other tokens, whole and cut."""
    tokenizer, draw = whole.tokenizer, random.Random(11)
    places = [tokenizer.encode(f"<loc{i:04}>")[0] for i in range(1024)]
    outline = [tokenizer.encode(f"<seg{i:03}>")[0] for i in range(128)]
    words = [tokenizer.encode(w) for w in (" cat", " ; ", ";;", " \x1b[31m", "\n", " </script>")]
    found = 0
    for _ in range(600):
        ids: list[int] = []
        for _ in range(draw.randrange(9)):
            start, stop = sorted(draw.sample(range(1024), 2))
            box = [places[start], places[start], places[stop], places[stop]]
            ids += draw.choice(
                [
                    box,
                    box + draw.choices(outline, k=draw.choice([16, 16, 15, 17])),
                    draw.choices(places, k=draw.randrange(1, 6)),
                    draw.choice(words),
                    [draw.randrange(tokenizer.vocab_size)],
                ]
            )
        ids.append(tokenizer.eos_id if draw.random() < 0.7 else draw.choice(places))
        chances = [-3 * draw.random() for _ in ids]
        stop = "eos" if ids[-1] == tokenizer.eos_id else "length"
        size = draw.choice([(37, 1), (1, 37), (1, 1), (30, 20)])
        answer = Answer(
            image="a.png",
            prompt="detect cat",
            text=tokenizer.decode(ids),
            token_ids=ids,
            logprobs=chances,
            nearby=chances,
            prompt_token_ids=[],
            stop=stop,
            model="shapes",
            precision="float32",
            seed=None,
            seconds=Seconds(0, 0, 0),
        )
        detection = whole.detection(answer, whole.prepare(Image.new("RGB", size)))
        found += len(detection.boxes)
        for box in detection.boxes:
            assert 0 <= box.x0 < box.x1 <= size[0] and 0 <= box.y0 < box.y1 <= size[1]
            assert 0 <= box.confidence <= 1
            assert detection.mask(box).shape == size[::-1]
        assert len(json.loads(detection.to_json())["boxes"]) == len(detection.boxes)
        rows = csv.reader(io.StringIO("\n".join(csv_lines(detection)), newline=""))
        assert [row[1] for row in rows] == [box.label for box in detection.boxes]
        assert len(coco([detection])["annotations"]) == len(yolo_lines(detection, {}))
    assert found > 300


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture under names that mean harm, as bytes."""
    folder = tmp_path_factory.mktemp("names")
    draw_picture().resize((64, 64)).save(folder / "plain.png")
    content = (folder / "plain.png").read_bytes()
    for name in (b"\x1b[31mred.png", b"\x1b]0;own\x07.png", b"\xff\x9b.png", b"a\nb\tc\\.png"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(content)
    return folder


def raw(*arguments: str | bytes | Path, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a command with arguments of any bytes."""
    return subprocess.run([*CLI, *arguments], input=input, capture_output=True)


def test_names_are_printed_whole_and_cannot_drive_the_terminal(hostile: Path) -> None:
    found = raw("ask", hostile, "how many shapes?", "-q")
    assert found.returncode == 0 and found.stderr == b""
    names = [line.split(b"\t")[0][len(bytes(hostile)) + 1 :] for line in found.stdout.splitlines()]
    spelled = [rb"\x1b[31mred.png", rb"\x1b]0;own\x07.png", b"\xff\x9b.png", rb"a\nb\tc\\.png"]
    assert sorted(names) == sorted([b"plain.png", *spelled])


def test_errors_say_names_on_one_line(hostile: Path) -> None:
    for name in (b"\x1b[2J\n.png", b"\xff", b"x" * 5000, b""):
        failed = raw("caption", name, "-q")
        assert failed.returncode == 3
        assert failed.stderr.count(b"\n") == 1 and len(failed.stderr) < 1200
        assert b"\x1b" not in failed.stderr


def test_a_shell_that_gives_no_utf8_is_told(hostile: Path) -> None:
    failed = raw("ask", hostile / "plain.png", b"how \xff many?", "-q")
    assert failed.returncode == 2 and b"no UTF-8 at character 15" in failed.stderr
    tokens = raw("tokens", "\x9b\u202e".encode(), "--json", "-q")
    assert b"\x9b" not in tokens.stdout and json.loads(tokens.stdout)["ids"]


def test_a_typed_image_mark_is_said(hostile: Path, tmp_path: Path) -> None:
    picture = hostile / "plain.png"
    for command in (
        ["ask", picture, "what is <image>?"],
        ["batch", picture, "--prompt", "<image> ocr", "-o", tmp_path / "out.jsonl"],
    ):
        assert "1 <image> removed from the prompt" in run(*command).stderr


def test_garbage_on_stdin_is_one_line(hostile: Path) -> None:
    failed = run("caption", "-", "-q", input="garbage" * 1000)
    assert failed.returncode == 3
    assert one_line(failed).startswith("npvlm: - is no picture of a kind that npvlm reads")


def test_answers_that_fail_are_npvlm_errors(whole: npvlm.Model) -> None:
    """Whatever is given in a picture's place is refused in a sentence."""
    for source in ("", "\0", "a" * 5000, "\udcff", b"", b"x", io.BytesIO(), Path("absent\n.png")):
        with pytest.raises(NpvlmError) as caught:
            whole.generate(source, "caption en")
        assert "\n" not in str(caught.value)
    for source in (None, 5, {}, object(), [[]], iter([])):
        with pytest.raises((UsageError, StopIteration)):
            next(iter(whole.batch(source, "caption en")))
