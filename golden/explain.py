"""Does the light of `npvlm explain` fall on the thing that a word names? Measured on `shapes`.

python golden/explain.py choose [--model FOLDER] [--seed S] [--count N]
    prints the share of every head, and of rules that take several together
python golden/explain.py evaluate [--model FOLDER] [--seed S] [--count N] [--method occlusion]
    prints one JSON line per kind of word and exits 1 if less than 85 % are lit

On held-out pictures of things whose caption the model gets right, each word of colour and of shape
names one thing. It is lit if the middle of the word's brightest patch lies in the thing's box.
Rules are chosen on one seed and measured on another.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import npvlm
from golden.shapes import SIZE, Scene, caption, scenes
from npvlm.answers.attention import AttentionTap
from npvlm.answers.explanation import METHODS
from npvlm.answers.reading import read_answer
from npvlm.files.pictures import open_picture, pixel_values
from npvlm.model import paligemma
from npvlm.model.tap import closed
from npvlm.work.scenes import Thing

LIMIT = 0.85
WORDS_OF_A_THING = 4  # "a red circle and"
Heat = NDArray[np.float64]


def things_of(scene: Scene) -> Iterator[tuple[int, str, Thing]]:
    """The words of a true caption that name a thing: which word, its kind and the thing."""
    for number, thing in enumerate(scene.things):
        yield WORDS_OF_A_THING * number + 1, "colour", thing
        yield WORDS_OF_A_THING * number + 2, "shape", thing


def pictures(seed: int, count: int) -> Iterator[Scene]:
    """The first held-out pictures of a seed that show things."""
    return islice((scene for scene in scenes("held out", seed) if scene.things), count)


def is_lit(peak: tuple[float, float], thing: Thing, margin: float) -> bool:
    """Whether a place, in shares of the picture, lies in a thing's box or `margin` pixels from it.

    peak: (across, down)
    """
    x, y = (share * SIZE for share in peak)
    across = thing.x0 - margin <= x <= thing.x1 + margin
    return across and thing.y0 - margin <= y <= thing.y1 + margin


def evaluate(name: str, seed: int, count: int, method: str) -> bool:
    """Explain captions and print the shares."""
    model = npvlm.load(name)
    patch = SIZE * model.config.vision_config.patch_size / model.config.vision_config.image_size
    lit: dict[str, list[bool]] = {"colour": [], "shape": []}
    near: dict[str, list[bool]] = {"colour": [], "shape": []}
    areas: dict[str, list[float]] = {"colour": [], "shape": []}
    right = 0
    for scene in pictures(seed, count):
        found = model.explain(scene.picture, "caption en", method=method)
        if found.answer != caption(scene).answer:
            continue
        right += 1
        for at, kind, thing in things_of(scene):
            peak = found.words[at].peak
            lit[kind].append(is_lit(peak, thing, 0))
            near[kind].append(is_lit(peak, thing, patch / 2))
            areas[kind].append((thing.x1 - thing.x0) * (thing.y1 - thing.y0) / SIZE**2)
    for marks in (lit, near, areas):
        marks["both"] = marks["colour"] + marks["shape"]
    print(json.dumps({"model": name, "method": method, "pictures": count, "right": right}))
    for kind, marks in lit.items():
        line = {
            "words": kind,
            "lit": _share(marks),
            "within_half_a_patch": _share(near[kind]),
            "by_chance": _share(areas[kind]),
            "n": len(marks),
        }
        print(json.dumps(line))
    return _share(lit["both"]) >= LIMIT


def _share(marks: list[bool] | list[float]) -> float:
    return round(float(np.mean(marks)), 4) if marks else 0.0


def weights_of(model: npvlm.Model, scene: Scene) -> Heat | None:
    """All attention of a true caption's tokens to the picture [L, H, A, P]; None if it is wrong."""
    answer = model.generate(scene.picture, "caption en")[0]
    if answer.text != caption(scene).answer:
        return None
    w, config = model.weights, model.config
    prompt, ids = np.array(answer.prompt_token_ids), np.array(answer.token_ids[:-1])
    pixels = pixel_values(open_picture(scene.picture), model.preprocessor)[None]
    features = paligemma.image_features(pixels, w, config, ops=model.ops, tap=closed)[0]
    watch = AttentionTap(config.text_config, len(prompt), len(ids), len(features))
    read_answer(prompt, ids, features, w, config, range(0), ops=model.ops, tap=watch)
    return np.stack(list(watch.layers.values())).astype(np.float64)


def shared(weights: Heat) -> Heat:
    """Each head's attention to the picture, as shares of that alone."""
    return weights / weights.sum(-1, keepdims=True)


def spread(weights: Heat) -> Heat:
    """Entropy of each head's attention to the picture: low where it is on few patches."""
    shares = shared(weights)
    return -(shares * np.log(shares + 1e-12)).sum(-1)


def some_heads(weights: Heat, score: Heat, most: int) -> Heat:
    """The mean over the heads with the highest score for each token [A, P]."""
    L, H, A, P = weights.shape
    order = np.argsort(-score.reshape(L * H, A), axis=0)[:most]
    return np.take_along_axis(weights.reshape(L * H, A, P), order[..., None], axis=0).mean(0)


def middle(weights: Heat) -> Heat:
    """The middle third of the layers, one at least."""
    third = len(weights) // 3
    return weights[third : len(weights) - third]


# Each from [L, H, A, P] to [A, P].
RULES: dict[str, Callable[[Heat], Heat]] = {
    "all heads of all layers": lambda w: w.mean((0, 1)),
    "all heads of all layers, each on the picture alone": lambda w: shared(w).mean((0, 1)),
    "all heads of all layers, mean of logarithms": lambda w: np.log(w + 1e-9).mean((0, 1)),
    "all heads of the middle third of the layers": lambda w: middle(w).mean((0, 1)),
    "all heads of the last layer": lambda w: w[-1].mean(0),
    "the head with the highest peak": lambda w: some_heads(w, w.max(-1), 1),
    "the 4 heads with the highest peak": lambda w: some_heads(w, w.max(-1), 4),
    "the head with the lowest entropy": lambda w: some_heads(shared(w), -spread(w), 1),
    "the 4 heads with the lowest entropy": lambda w: some_heads(shared(w), -spread(w), 4),
}


def choose(name: str, seed: int, count: int) -> None:
    """Print the share of each head and of each rule."""
    model = npvlm.load(name)
    rules = dict(RULES)
    marks: dict[str, list[bool]] = {}
    for scene in pictures(seed, count):
        weights = weights_of(model, scene)
        if weights is None:
            continue
        L, H, _, P = weights.shape
        rules |= {
            f"layer {layer} of {L}, head {head}": lambda w, layer=layer, head=head: w[layer, head]
            for layer in range(L)
            for head in range(H)
        }
        for rule, heat_of in rules.items():
            brightest = heat_of(weights).argmax(-1)
            side = round(P**0.5)
            for at, _, thing in things_of(scene):  # a word is a token here
                row, column = divmod(int(brightest[at]), side)
                peak = ((column + 0.5) / side, (row + 0.5) / side)
                marks.setdefault(rule, []).append(is_lit(peak, thing, 0))
    for rule, found in marks.items():
        print(f"{np.mean(found):6.3f}  {rule}")
    print(f"{len(next(iter(marks.values())))} words")


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    choosing = commands.add_parser("choose", help="try heads and rules")
    testing = commands.add_parser("evaluate", help="measure what explain does")
    testing.add_argument("--method", choices=METHODS, default=METHODS[0])
    for command, seed in ((choosing, 11), (testing, 12)):
        command.add_argument("--model", default="shapes", help="name or folder of the model")
        command.add_argument("--seed", type=int, default=seed)
        command.add_argument("--count", type=int, default=300, help="how many pictures")
    given = parser.parse_args()
    if given.command == "choose":
        choose(given.model, given.seed, given.count)
        return 0
    return 0 if evaluate(given.model, given.seed, given.count, given.method) else 1


if __name__ == "__main__":
    sys.exit(main())
