"""The mask decoder's weights, from the published `vae-oid.npz` or a safetensors file like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from npvlm.errors import NpvlmError
from npvlm.files.npz import Npz
from npvlm.model.vqvae import CODEBOOK
from npvlm.model.weights import Weight, Weights, unpack

FILES = ("vae-oid.npz", "vae.safetensors")
ADDRESS = "https://storage.googleapis.com/big_vision/paligemma/vae-oid.npz"


def _shapes() -> dict[str, tuple[int, ...]]:
    """The tensors that decoding takes; the published file holds the encoder's, too."""
    kernels = {"0": (128, 512, 1, 1), "12": (1, 16, 1, 1)}
    for block in ("2", "3"):
        for layer, side in (("0", 3), ("2", 3), ("4", 1)):
            kernels[f"{block}.net.{layer}"] = (128, 128, side, side)
    shapes: dict[str, tuple[int, ...]] = {CODEBOOK: (128, 512)}
    for name, kernel in kernels.items():
        shapes |= {f"decoder.{name}.weight": kernel, f"decoder.{name}.bias": kernel[:1]}
    for layer, ins, outs in (("4", 128, 128), ("6", 128, 64), ("8", 64, 32), ("10", 32, 16)):
        shapes |= {f"decoder.{layer}.weight": (ins, outs, 4, 4), f"decoder.{layer}.bias": (outs,)}
    return shapes


def find_mask_decoder(folder: Path) -> Path:
    """The mask decoder that belongs to a model: in its folder, else in the folder around it.

    Raises
    ------
    NpvlmError
        There is none.
    """
    for place in (folder, folder.resolve().parent):
        for name in FILES:
            if (place / name).is_file():
                return place / name
    raise NpvlmError(
        f"{folder} has no mask decoder, expected {' or '.join(FILES)} in it or beside it; "
        f"get it once (8.5 MB): curl -o {folder / FILES[0]} {ADDRESS}"
    )


def open_mask_decoder(path: Path) -> Weights:
    """Read the codebook and the decoder, as float32.

    Raises
    ------
    NpvlmError
        No such file, a damaged one, or tensors that are missing, misshapen or not finite.
    """
    try:
        tensors = _read(path)
    except NpvlmError:
        raise
    except Exception as error:  # a damaged archive makes its readers raise nearly anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise NpvlmError(f"{path} is no mask decoder that can be read ({reason}).") from error
    for name, shape in _shapes().items():
        if name not in tensors:
            raise NpvlmError(f"{path}: {name} is missing; is it the VQ-VAE of PaliGemma's masks?")
        found = tensors[name].shape
        if found != shape:
            raise NpvlmError(f"{path}: {name} is {list(found)}, expected {list(shape)}.")
        if not np.isfinite(unpack(tensors[name], np.float32)).all():
            raise NpvlmError(f"{path}: {name} holds numbers that are not finite; is it damaged?")
    return Weights(tensors)


def _read(path: Path) -> dict[str, Weight]:
    """The tensors of either kind of file that decoding takes, as they are found."""
    wanted = _shapes()
    if path.suffix == ".npz":
        arrays = Npz(path)
        held = set(arrays.names)
        arrays.check(name for name in wanted if name in held)
        return {n: _floats(arrays.array(n), path, n) for n in wanted if n in held}
    with safe_open(path, framework="numpy") as file:
        held = set(file.keys())
        return {name: _floats(file.get_tensor(name), path, name) for name in wanted if name in held}


def _floats(array: Any, path: Path, name: str) -> Weight:
    """An array as float32, if it is one of fractions."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = getattr(array, "dtype", type(array).__name__)
        raise NpvlmError(f"{path}: {name} is {kind}, expected floating-point numbers.")
    return array.astype(np.float32)
