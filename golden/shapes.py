"""The world of the bundled model `shapes`: pictures, questions about them, and the model's test.

python golden/shapes.py draw FOLDER [--seed S] [--count N]
    writes held-out pictures and their questions
python golden/shapes.py evaluate --seed S --count N [--model FOLDER] [--precision P]
    prints one JSON line per metric and exits 1 if one is missed
python golden/shapes.py evaluate --seed S --count N --precision bfloat16 int8 int4
    prints what each loses against float32 and exits 1 if one loses too much
python golden/shapes.py confidence --seed S --count N [--model FOLDER]
    prints how often boxes of a confidence fit

Picture i of seed S of a split is always the same. Training draws from the split "train", tests
from "held out": the split's name is part of what seeds the generator, so whatever the seeds, the
two share no stream of random numbers.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden.strokes import draw_digit
from npvlm.answers.detection import Detection
from npvlm.config import PRECISIONS
from npvlm.work.scenes import (
    COLOURS,
    SHAPES,
    STAR_HEIGHT,
    STAR_WIDTH,
    Colour,
    Thing,
    draw_things,
    mask_of,
)

SIZE = 224  # pictures are drawn at this size; the model shrinks them to its own
GAP = 6  # pixels at least between the boxes of two things
APART = 10  # pixels at least between their centres from left to right, so that their order is plain
CONTRAST = 130  # distance in RGB at least between a thing's colour and the background
LIMITS = {
    "caption_exact": 0.90,
    "counting": 0.95,
    "colour": 0.97,
    "ocr_exact": 0.92,
    "detection_mean_iou": 0.80,
    "detection_found_at_iou_0.5": 0.90,
    "segmentation_mean_mask_iou": 0.75,
}
# How far a precision may be from float32, on every metric.
APART_FROM_FLOAT32 = {"bfloat16": 0.005, "int8": 0.01, "int4": 0.03}

LABELLED_BOX = re.compile(r"<loc(\d{4})>" * 4 + r" ([^;<>]+)")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Digit:
    """One digit of a number picture and its box in pixels."""

    character: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it, from left to right: things, or the digits of one number."""

    picture: Image.Image
    things: tuple[Thing, ...]
    digits: tuple[Digit, ...]

    @property
    def number(self) -> str:
        """The digits as they are read."""
        return "".join(digit.character for digit in self.digits)


@dataclass(frozen=True)
class Question:
    """A prompt, its true answer, and for boxes and masks the things that the answer names."""

    task: str
    prompt: str
    answer: str
    things: tuple[Thing, ...] = ()


# --- pictures -----------------------------------------------------------------------------------


def draw_scene(split: str, seed: int, index: int) -> Scene:
    """Draw picture `index` of a seed: two in three show things, one in three a number."""
    rng = Random(f"shapes {split} {seed} {index}")
    palette = {name: _shade(rng, colour) for name, colour in COLOURS.items()}
    if rng.random() < 1 / 3:
        name = rng.choice(list(COLOURS))
        picture = _background(rng, [palette[name]])
        return Scene(picture, (), _draw_number(rng, picture, palette[name]))
    things = _place_things(rng)
    picture = _background(rng, [palette[thing.colour] for thing in things])
    draw_things(picture, things, palette)
    return Scene(picture, things, ())


def scenes(split: str, seed: int) -> Iterator[Scene]:
    """Draw the pictures of a seed one after the other, without end."""
    index = 0
    while True:
        yield draw_scene(split, seed, index)
        index += 1


def _shade(rng: Random, colour: Colour) -> Colour:
    red, green, blue = (min(255, max(0, level + rng.randint(-15, 15))) for level in colour)
    return red, green, blue


def _background(rng: Random, colours: Sequence[Colour]) -> Image.Image:
    """Paint a plain, graded or noisy ground that stands off from the colours to come."""

    def ground() -> Colour:
        while True:
            grey, tint = rng.randint(0, 255), rng.choice([0, 20, 60])
            red, green, blue = (min(255, max(0, grey + rng.randint(-tint, tint))) for _ in "rgb")
            here = (red, green, blue)
            if all(_distance(here, colour) >= CONTRAST**2 for colour in colours):
                return here

    kind = rng.choice(["plain", "graded", "noisy"])
    first = ground()
    picture = Image.new("RGB", (SIZE, SIZE), first)
    if kind == "graded":
        # Between two grounds far apart lie colours that may hide a thing: take a near one.
        second = min((ground() for _ in range(6)), key=lambda other: _distance(first, other))
        ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize((SIZE, SIZE))
        picture.paste(second, (0, 0), ramp)
    elif kind == "noisy":
        side = SIZE // rng.choice([1, 2, 4])
        noise = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        picture = Image.blend(picture, noise.resize((SIZE, SIZE)), rng.uniform(0.04, 0.16))
    return picture


def _distance(one: Colour, other: Colour) -> int:
    """Square of the straight line from one colour to another."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


def _place_things(rng: Random) -> tuple[Thing, ...]:
    """Choose one to four things apart from each other, often of few kinds, so that some repeat."""
    count = rng.randint(1, 4)
    shapes = rng.sample(SHAPES, rng.choice([1, 2, 4]))
    colours = rng.sample(list(COLOURS), rng.choice([1, 2, 8, 8]))
    things: list[Thing] = []
    while len(things) < count:
        shape, size = rng.choice(shapes), rng.randint(32, 88)
        width, height = size, size
        if shape == "star":
            height = round(size * STAR_HEIGHT / STAR_WIDTH)
        x0, y0 = rng.randint(0, SIZE - width), rng.randint(0, SIZE - height)
        thing = Thing(rng.choice(colours), shape, x0, y0, x0 + width, y0 + height)
        if all(_keeps_distance(thing, other) for other in things):
            things.append(thing)
        elif rng.random() < 0.02:
            things.clear()  # the first ones may leave no room
    return tuple(sorted(things, key=lambda thing: thing.x0 + thing.x1))


def _keeps_distance(one: Thing, other: Thing) -> bool:
    across = max(one.x0, other.x0) - min(one.x1, other.x1)
    down = max(one.y0, other.y0) - min(one.y1, other.y1)
    return max(across, down) >= GAP and abs(one.x0 + one.x1 - other.x0 - other.x1) >= 2 * APART


def _draw_number(rng: Random, picture: Image.Image, colour: Colour) -> tuple[Digit, ...]:
    """Write one to five digits in a row, in one hand."""
    number = [rng.choice("0123456789") for _ in range(rng.randint(1, 5))]
    thickness, slant, space = rng.uniform(0.09, 0.2), rng.uniform(-0.1, 0.2), rng.uniform(0.22, 0.4)
    width = 0.6 * len(number) + space * (len(number) - 1)  # all in heights of a digit
    margin = thickness / 2 + 0.03
    lean = abs(slant)
    height = rng.uniform(40, min(120, (SIZE - 2) / (width + lean + 2 * margin)))
    left = rng.uniform(margin, SIZE / height - width - lean - margin) + max(0.0, -slant)
    top = rng.uniform(margin, SIZE / height - 1 - margin)
    digits = []
    for character in number:
        at = (left * height, (top + rng.uniform(-0.02, 0.02)) * height)
        box = draw_digit(picture, character, *at, height, thickness, slant, colour)
        digits.append(Digit(character, box))
        left += 0.6 + space
    return tuple(digits)


# --- questions ----------------------------------------------------------------------------------


def caption(scene: Scene) -> Question:
    """Ask for all things from left to right, or for the number."""
    words = " and ".join(f"{_article(thing.colour)} {thing.label}" for thing in scene.things)
    return Question("caption", "caption en", words or f"the number {scene.number}")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def ocr(scene: Scene) -> Question:
    """Ask for the digits; a picture without any has an empty answer."""
    return Question("ocr", "ocr", scene.number)


def detect(scene: Scene, rng: Random, most: int | None = None) -> Question:
    """Ask where one to three labels are; one in five is (most often) not on the picture.

    With `most`, so many labels are drawn, and those that come up again are dropped.
    """
    labels = _labels(scene, rng, most or rng.choice([1, 1, 2, 3]))
    things = _named(scene, labels)
    answer = " ; ".join(f"{location(thing.box)} {thing.label}" for thing in things)
    return Question("detect", f"detect {' ; '.join(labels)}", answer, things)


def segment(scene: Scene, rng: Random, tokens: Callable[[Thing], str]) -> Question:
    """Ask for the outlines of one label, or of two; `tokens` writes the mask of a thing."""
    labels = _labels(scene, rng, rng.choice([1, 1, 2, 3]))
    things = _named(scene, labels)
    parts = (f"{location(thing.box)}{tokens(thing)} {thing.label}" for thing in things)
    return Question("segment", f"segment {' ; '.join(labels)}", " ; ".join(parts), things)


def _labels(scene: Scene, rng: Random, count: int) -> list[str]:
    """Choose labels, each once."""
    labels: list[str] = []
    for _ in range(count):
        if scene.things and rng.random() < 0.8:
            label = rng.choice(scene.things).label
        else:
            label = f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
        if label not in labels:
            labels.append(label)
    return labels


def _named(scene: Scene, labels: Sequence[str]) -> tuple[Thing, ...]:
    """The things with these labels, label by label, each time from left to right."""
    return tuple(thing for label in labels for thing in scene.things if thing.label == label)


def count(scene: Scene, rng: Random) -> Question:
    """Ask how many there are of one shape, or of all; one in four shapes is (most often) absent."""
    if rng.random() < 0.2:
        return Question("count", "answer en how many shapes?", str(len(scene.things)))
    shape = rng.choice(SHAPES)
    if scene.things and rng.random() < 0.75:
        shape = rng.choice(scene.things).shape
    number = sum(thing.shape == shape for thing in scene.things)
    return Question("count", f"answer en how many {shape}s?", str(number))


def colour(scene: Scene, rng: Random) -> Question | None:
    """Ask for the colour of a shape that is there once, if there is one."""
    shapes = [thing.shape for thing in scene.things]
    once = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not once:
        return None
    thing = rng.choice(once)
    return Question("colour", f"answer en what color is the {thing.shape}?", thing.colour)


def location(box: tuple[int, int, int, int]) -> str:
    """Write a pixel box as PaliGemma does: y0, x0, y1, x1 in 1024 steps."""
    x0, y0, x1, y1 = (min(1023, 1024 * edge // SIZE) for edge in box)
    return f"<loc{y0:04d}><loc{x0:04d}><loc{y1:04d}><loc{x1:04d}>"


# --- test ---------------------------------------------------------------------------------------


def exam(scene: Scene, rng: Random) -> list[Question]:
    """Ask what the test asks about one picture: all four questions of things, numbers are read."""
    if scene.digits:
        return [ocr(scene)]
    asked = [caption(scene), detect(scene, rng), count(scene, rng), colour(scene, rng)]
    return [question for question in asked if question is not None]


def boxes(answer: str) -> list[tuple[str, Box]]:
    """Read the labelled boxes of an answer, as (label, (x0, y0, x1, y1)) in pixels."""
    found = []
    for *steps, label in LABELLED_BOX.findall(answer):
        y0, x0, y1, x1 = (int(step) * SIZE / 1024 for step in steps)
        found.append((label.strip(), (x0, y0, x1, y1)))
    return found


def iou(one: Box, other: Box) -> float:
    """Divide what two boxes share by what they cover together."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, across) * max(0.0, down)
    cover = sum(max(0.0, x1 - x0) * max(0.0, y1 - y0) for x0, y0, x1, y1 in (one, other))
    return shared / (cover - shared) if shared else 0.0


def overlaps(things: Sequence[Thing], answer: str) -> list[float]:
    """Give each thing's IoU with the predicted box that it is matched to, 0 without one.

    The best pair of one label goes first; each box and each thing is used once.
    """
    predicted = boxes(answer)
    pairs = sorted(
        (
            (iou(thing.box, box), i, j)
            for i, thing in enumerate(things)
            for j, (label, box) in enumerate(predicted)
            if label == thing.label
        ),
        reverse=True,
    )
    best: dict[int, float] = {}
    used: set[int] = set()
    for overlap, i, j in pairs:
        if i not in best and j not in used:
            best[i] = overlap
            used.add(j)
    return [best.get(i, 0.0) for i in range(len(things))]


def mask_overlaps(things: Sequence[Thing], found: Detection) -> list[float]:
    """Give the IoU of each thing's pixels with the mask of its label that fits best, 0 without."""
    masks = [(box.label, found.mask(box)) for box in found.boxes if box.painted is not None]
    best = []
    for thing in things:
        truth = np.zeros((found.height, found.width), bool)
        cover = np.asarray(mask_of(thing)) > 127
        truth[thing.y0 : thing.y1, thing.x0 : thing.x1] = cover
        fits = [(truth & m).sum() / (truth | m).sum() for label, m in masks if label == thing.label]
        best.append(float(max(fits, default=0.0)))
    return best


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[float]]:
    """Mark each answer: the marks of every metric, one per answer, in detection one per thing.

    Masks are marked by `mask_overlaps`: they take a mask decoder.
    """
    names = {
        "caption": "caption_exact",
        "count": "counting",
        "colour": "colour",
        "ocr": "ocr_exact",
    }
    marks: dict[str, list[float]] = {name: [] for name in LIMITS}
    for question, answer in zip(questions, answers, strict=True):
        if question.task == "detect":
            found = overlaps(question.things, answer)
            marks["detection_mean_iou"] += found
            marks["detection_found_at_iou_0.5"] += [float(overlap >= 0.5) for overlap in found]
        else:
            marks[names[question.task]].append(float(answer == question.answer))
    return marks


def measure(
    model: str | Path, seed: int, count: int, precision: str | None = None
) -> dict[str, list[float]]:
    """Let npvlm answer the exam on `count` held-out pictures; gives the marks of every metric."""
    import npvlm

    loaded = npvlm.load(model, precision)
    rng, labels = Random(f"exam {seed}"), Random(f"segment {seed}")
    asked = []
    for scene in islice(scenes("held out", seed), count):
        asked += [(scene.picture, question) for question in exam(scene, rng)]
        if scene.things:
            asked.append((scene.picture, segment(scene, labels, lambda thing: "")))
    asked.sort(key=lambda item: item[1].task)  # answers of one length run together
    marks: dict[str, list[float]] = {name: [] for name in LIMITS}
    results = loaded.batch((p for p, _ in asked), (q.prompt for _, q in asked), max_tokens=128)
    for (_, question), found in zip(asked, results, strict=True):
        if question.task == "segment":
            marks["segmentation_mean_mask_iou"] += mask_overlaps(question.things, found)
            continue
        text = found.answer.text if question.task == "detect" else found.text
        for name, more in score([question], [text]).items():
            marks[name] += more
    return marks


def metrics(marks: dict[str, list[float]]) -> list[dict[str, str | float]]:
    """Sum the marks up: one line per metric, with its limit and the number of marks."""
    return [
        {
            "metric": name,
            "value": round(sum(marks[name]) / max(1, len(marks[name])), 4),
            "limit": limit,
            "n": len(marks[name]),
        }
        for name, limit in LIMITS.items()
    ]


def evaluate(model: str, seed: int, count: int, precision: str | None = None) -> bool:
    """Print one JSON line per metric of the exam and say whether every limit is met."""
    marks = measure(model, seed, count, precision=precision)
    for line in metrics(marks):
        print(json.dumps(line), flush=True)
    return all(sum(marks[name]) >= limit * len(marks[name]) for name, limit in LIMITS.items())


def compare(model: str, seed: int, count: int, precisions: Sequence[str]) -> bool:
    """Print the metrics of float32 and of other precisions, and say whether these are near it."""
    others = [precision for precision in precisions if precision in APART_FROM_FLOAT32]
    found = {
        precision: {
            name: 100 * sum(marks) / max(1, len(marks))
            for name, marks in measure(model, seed, count, precision=precision).items()
        }
        for precision in ["float32", *others]
    }
    print(f"{'percent':<28}{'float32':>8}" + "".join(f"{name:>20}" for name in others))
    for metric, exact in found["float32"].items():
        cells = (f"{found[o][metric]:>12.2f} ({found[o][metric] - exact:+.2f})" for o in others)
        print(f"{metric:<28}{exact:>8.2f}" + "".join(f"{cell:>20}" for cell in cells))
    fine = True
    for other in others:
        limit, exact = 100 * APART_FROM_FLOAT32[other], found["float32"]
        apart = max(abs(found[other][metric] - exact[metric]) for metric in exact)
        fine &= apart <= limit
        verdict = "near enough" if apart <= limit else "TOO FAR"
        print(f"{other}: {verdict}, at most {apart:.2f} points from float32, limit {limit:.1f}")
    return fine


def confidences(model: str, seed: int, count: int) -> list[tuple[float, bool]]:
    """For each box found on held-out pictures its confidence, and whether it fits at IoU 0.75."""
    import npvlm

    drawn = [scene for scene in islice(scenes("held out", seed), count) if scene.things]
    rng = Random(f"confidence {seed}")
    questions = [detect(scene, rng, 3) for scene in drawn]
    prompts = [question.prompt for question in questions]
    found = npvlm.load(model).batch([scene.picture for scene in drawn], prompts)
    marks = []
    for question, result in zip(questions, found, strict=True):
        for box in result.boxes:
            corners = (box.x0, box.y0, box.x1, box.y1)
            fits = [iou(t.box, corners) for t in question.things if t.label == box.label]
            marks.append((box.confidence, max(fits, default=0.0) >= 0.75))
    return marks


def calibrate(model: str, seed: int, count: int) -> None:
    """Print how often boxes of a confidence fit, and how well it tells those that do."""
    marks = confidences(model, seed, count)
    for least in (0.0, 0.2, 0.4, 0.6, 0.8):
        own = [fits for confidence, fits in marks if least <= confidence < least + 0.2]
        line = {"confidence": f"{least:.1f} to {least + 0.2:.1f}", "n": len(own)}
        print(json.dumps(line | {"fit": round(sum(own) / max(1, len(own)), 3)}))
    right, wrong = ([c for c, fits in marks if fits is verdict] for verdict in (True, False))
    above = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    print(json.dumps({"auc": round(above / max(1, len(right) * len(wrong)), 3), "n": len(marks)}))


def draw(folder: Path, seed: int, count: int) -> None:
    """Write some held-out pictures and, beside them, their questions with the true answers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(f"exam {seed}")
    for index, scene in enumerate(islice(scenes("held out", seed), count)):
        scene.picture.save(folder / f"{index:04d}.png")
        lines = [f"{question.prompt}\t{question.answer}\n" for question in exam(scene, rng)]
        (folder / f"{index:04d}.txt").write_text("".join(lines), encoding="utf-8")


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="write pictures and their questions")
    drawing.add_argument("folder", type=Path)
    testing = commands.add_parser("evaluate", help="measure a model on held-out pictures")
    testing.add_argument("--model", default="shapes", help="name or folder of the model")
    testing.add_argument(
        "--precision", choices=PRECISIONS, nargs="+", help="of products; several: against float32"
    )
    sure = commands.add_parser("confidence", help="how often boxes of a confidence fit")
    sure.add_argument("--model", default="shapes", help="name or folder of the model")
    for command, default in ((drawing, 12), (testing, 1000), (sure, 1000)):
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--count", type=int, default=default, help="how many pictures")
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.folder, given.seed, given.count)
        return 0
    if given.command == "confidence":
        calibrate(given.model, given.seed, given.count)
        return 0
    if given.precision and len(given.precision) > 1:
        return 0 if compare(given.model, given.seed, given.count, given.precision) else 1
    precision = given.precision[0] if given.precision else None
    return 0 if evaluate(given.model, given.seed, given.count, precision) else 1


if __name__ == "__main__":
    sys.exit(main())
