"""Features, hidden states and attention of many pictures in one safetensors file.

Axis letters: N pictures that could be read · P patches · D width of the decoder · T tokens ·
H heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from npvlm.api import Failed, Model, Seen
from npvlm.errors import NpvlmError
from npvlm.files.output import check_room, new_file, place_of
from npvlm.files.writer import Stack

FORMAT = "npvlm-features"
_OTHERWISE = "name fewer pictures or layers, or a place on another disk."


def save_features(
    model: Model,
    pictures: Sequence[Path | BinaryIO],
    output: Path,
    hidden: Sequence[int],
    attention: Sequence[int],
    prompt: str | None,
    tell_failed: Callable[[Failed], None],
    tell: Callable[[int], None],
) -> int:
    """Write what a model sees on pictures, a row for each that can be read; how many there are.

    The file has `features` [N, P, D], and of each of the layers `hidden.LAYER` [N, T, D] and
    `attention.LAYER` [N, H, T, T], in float32. Its metadata name the pictures (`images`, a JSON
    list in the order of the rows), the model, the precision, and the prompt where there is one. It
    appears whole or not at all, and no more than a few pictures are in memory.

    Parameters
    ----------
    hidden, attention : layers of `Model.hidden_states` and of `Model.attention`, with a prompt
    tell_failed : told of each picture that cannot be read
    tell : told how many pictures are done

    Raises
    ------
    UsageError
        For a layer that there is not, or too long a prompt.
    NpvlmError
        Where no picture can be read, or the file cannot be written.
    """
    kept: list[str] = []

    def metadata(names: Sequence[str]) -> dict[str, str]:
        about = {"format": FORMAT, "model": model.called, "precision": model.precision}
        about |= {"images": json.dumps(names)}
        return about if prompt is None else about | {"prompt": json.dumps(prompt)}

    with new_file(output) as draft, draft.open("w+b") as file:
        stack = None
        for done, found in enumerate(model.look_all(pictures), 1):
            if isinstance(found, Failed):
                tell_failed(found)
                continue
            arrays = _arrays(model, found, hidden, attention, prompt)
            if stack is None:
                needed = len(pictures) * sum(array.nbytes for array in arrays.values())
                check_room(place_of(output).parent, needed, _OTHERWISE)
                rows = {name: array.shape for name, array in arrays.items()}
                longest = metadata([_name(picture) for picture in pictures])
                stack = Stack(file, rows, len(pictures), longest)
            stack.add(arrays)
            kept.append(found.name)
            tell(done)
        if stack is None:
            raise NpvlmError(f"no picture could be read, so {output} is not written.")
        stack.close(metadata(kept))
    return len(kept)


def _arrays(
    model: Model, seen: Seen, hidden: Sequence[int], attention: Sequence[int], prompt: str | None
) -> dict[str, NDArray[np.float32]]:
    """What is kept of a picture, by the names of the tensors."""
    arrays = {"features": model.features(seen)}
    count = model.config.text_config.num_hidden_layers
    if prompt is not None and hidden:
        states = model.hidden_states(seen, prompt, hidden)
        arrays |= {f"hidden.{n % (count + 1)}": x for n, x in zip(hidden, states, strict=True)}
    if prompt is not None and attention:
        looks = model.attention(seen, prompt, attention)
        arrays |= {f"attention.{n % count}": x for n, x in zip(attention, looks, strict=True)}
    return arrays


def _name(picture: Path | BinaryIO) -> str:
    return str(picture if isinstance(picture, Path) else picture.name)
