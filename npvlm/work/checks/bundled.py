"""Checks that the bundled files are those published, and the models' logits the goldens.

In float32, int8 and int4 the bits of logits are the same on every CPU that has fused multiply-add:
their checksums are goldens that fit in a line.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from npvlm.api import Model, load
from npvlm.config import read_json
from npvlm.kernels.vectors import features
from npvlm.opening import find_folder
from npvlm.work.checks.finding import NOTE, Finding, settle

NAME = "shapes"
PROVENANCE, MASKS = "PROVENANCE.json", "vae.json"
PROMPT, ANSWER = "detect blue square", [5, 6, 7]
# sha256 of the logits, as little-endian float32. A change that rounds differently changes them, and
# a bundled model that is trained anew; nothing else may.
LOGITS = {
    "shapes": {
        "float32": "963701f6e823d3fac7e0313b02549466c02f9cc9715c239cc5efd287ff1de0b0",
        "int8": "a5220299c13d07749c92dc6b4b67c8b74bc88494b6a30cb56d0cb47f5cf736a6",
        "int4": "dac294fbbda3e714ab5b9c18fcc5a44bb9cef446975ff1fd6901736641b01299",
    },
    "shapes2": {
        "float32": "308c50ef52cb5ab9c75cf938d0f062761ecd8599e543ea833758e79cce3eb8a0",
        "int8": "2f4c726cb84320b8aa527f488ab3208ffa4bbafe06fb765ce746d30de58ecc98",
        "int4": "605ad82fe207773c1fcb5c9bfa907a1688328317b36d859fd6405bc6baf9c330",
    },
}
# How far the kernels' logits may be from the definitions', relative, both in float32: a hundred
# roundings. A wrong operation is off by a thousand times as much.
APART = 100 * 2.0**-24


def drawn_picture(side: int) -> Image.Image:
    """A blue square and a shaded ground, drawn with whole numbers at the size that is read."""
    x, y = np.arange(side)[None, :, None], np.arange(side)[:, None, None]
    colours = (200 + x // 4 + y // 8 + np.array([0, 5, 10])) % 256
    colours[side // 4 : side // 2, side // 4 : side // 2] = (30, 60, 200)
    return Image.fromarray(colours.astype(np.uint8), "RGB")


def golden_logits(model: Model) -> np.ndarray:
    """What a model scores on the drawn picture.

    -> [T, V]
    """
    picture = drawn_picture(model.config.vision_config.image_size)
    return model.logits(picture, PROMPT, ANSWER)


def checksum(logits: np.ndarray) -> str:
    """The sha256 of logits, whatever the byte order of the machine."""
    return hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest()


def check_files() -> Finding:
    """Hold the bundled files against the checksums that were published with them."""
    records = [find_folder(name) / PROVENANCE for name in LOGITS]
    records.append(find_folder(NAME).parent / MASKS)
    count, changed = 0, []
    for record in records:
        published: dict[str, str] = read_json(record)["sha256"]
        files = {record.parent / name: digest for name, digest in published.items()}
        count += len(files)
        changed += [str(path) for path, digest in files.items() if _digest(path) != digest]
    said = f"{', '.join(LOGITS)}, mask decoder: {count} files"
    if changed:
        said = f"{', '.join(changed)} changed since publication; install npvlm again"
    return settle("bundled files", not changed, said)


def check_goldens() -> Finding:
    """Hold the bundled models' logits against the checksums, bit for bit."""
    goldens = {(name, p): bits for name, own in LOGITS.items() for p, bits in own.items()}
    wrong = [
        f"{name} in {precision}"
        for (name, precision), bits in goldens.items()
        if checksum(golden_logits(load(name, precision))) != bits
    ]
    check = "golden logits"
    if not wrong:
        precisions = dict.fromkeys(precision for _, precision in goldens)
        said = f"{', '.join(LOGITS)}: the bits published, in {', '.join(precisions)}"
        return settle(check, True, said)
    said = f"other bits than published: {', '.join(wrong)}"
    if "fma" not in features():
        return Finding(check, NOTE, f"{said}; they are promised for x86 CPUs with fma alone")
    return settle(check, False, said)


def check_definitions() -> Finding:
    """Hold the kernels' logits against those of the definitions, through the whole models."""
    errors = []
    for name in LOGITS:
        found = golden_logits(load(name))
        truth = golden_logits(load(name, ops="numpy")).astype(np.float64)
        errors.append(float(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2))))
    said = f"{', '.join(LOGITS)}: {max(errors):.1e} apart, expected at most {APART:.1e}"
    return settle("model = definitions", max(errors) <= APART, said)


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
