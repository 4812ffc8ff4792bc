"""The mask decoder's weights, from the published `vae-oid.npz` or a safetensors file like it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from npvlm.errors import NpvlmError, why
from npvlm.files.checkpoint import Stored, read_header
from npvlm.files.npz import Head, Npz
from npvlm.model.vqvae import CODEBOOK
from npvlm.model.weights import Array, Weights, unpack

FILES = ("vae-oid.npz", "vae.safetensors")
ADDRESS = "https://storage.googleapis.com/big_vision/paligemma/vae-oid.npz"
LARGEST = 2**25  # bytes; the published file has 8.5 million
_FLOATS = ("float16", "float32", "float64", "F16", "BF16", "F32")


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
        raise NpvlmError(f"{path} is no mask decoder that can be read ({why(error)}).") from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise NpvlmError(f"{path}: {name} holds numbers that are not finite; is it damaged?")
    return Weights(dict(tensors))


def _read(path: Path) -> dict[str, Array]:
    """The tensors of either kind of file that decoding takes, each checked before it is read."""
    size = path.stat().st_size
    if size > LARGEST:
        raise NpvlmError(f"{path} has {size:,} bytes, expected at most {LARGEST:,}.")
    if path.suffix == ".npz":
        return _read_npz(Npz(path))
    stored = {tensor.name: tensor for tensor in read_header(path)}
    _check(path, stored)
    return {name: unpack(stored[name].weight(), np.float32) for name in _shapes()}


def _read_npz(npz: Npz) -> dict[str, Array]:
    held = set(npz.names)
    _check(npz.path, {name: npz.head(name) for name in _shapes() if name in held})
    npz.check(_shapes())
    with np.errstate(over="ignore"):  # what becomes infinite is refused as that
        return {name: npz.array(name).astype(np.float32) for name in _shapes()}


def _check(path: Path, found: Mapping[str, Head | Stored]) -> None:
    """Hold what headers say against what decoding takes."""
    for name, shape in _shapes().items():
        if name not in found:
            raise NpvlmError(f"{path}: {name} is missing; is it the VQ-VAE of PaliGemma's masks?")
        sides, kind = found[name].shape, str(found[name].dtype)
        if sides != shape:
            raise NpvlmError(f"{path}: {name} is {list(sides)[:9]}, expected {list(shape)}.")
        if kind not in _FLOATS:
            raise NpvlmError(f"{path}: {name} is {kind}, expected floating-point numbers.")
