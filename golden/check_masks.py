"""Hold npvlm's mask decoder against the same network in PyTorch, on random weights."""

from __future__ import annotations

import numpy as np
import torch

from golden.mask_vae import CODES, GRID, MaskVae
from golden.ours import rms
from npvlm import kernels
from npvlm.model import ops
from npvlm.model.vqvae import decode_masks
from npvlm.model.weights import Weights

COUNT = 20  # masks
LIMIT = 1e-13  # of float64, relative; measured: 1.5e-15


@torch.no_grad()
def check_masks(seed: int = 0) -> list[str]:
    """Compare and print; every difference in words.

    float64 has to be the same but for rounding; float32 as near to it as torch's.
    """
    torch.manual_seed(seed)
    vae = MaskVae()
    for tensor in vae.decoder.parameters():
        # Lively all the way: each layer keeps the size of what it reads, and no bias is zero.
        inputs = tensor[0].numel() if tensor.ndim > 1 else 1
        tensor.copy_(torch.randn_like(tensor) * ((2 / inputs) ** 0.5 if tensor.ndim > 1 else 0.1))
        if tensor.ndim > 1 and tensor.shape[-1] == 4:  # a transposed one sums 4 of 16 places
            tensor *= 2 * (tensor.shape[1] / tensor.shape[0]) ** 0.5
    stored = {name: tensor.numpy() for name, tensor in vae.published().items()}
    codes = np.random.default_rng(seed).integers(0, CODES, (COUNT, GRID * GRID))
    given = torch.tensor(codes)
    torchs = vae.decode(given).numpy()
    truth = vae.double().decode(given).numpy()

    def missed(found: np.ndarray) -> float:
        return rms(found - truth) / rms(truth)

    wide = missed(decode_masks(codes, Weights(dict(stored)), np.float64, ops=ops))
    own = {
        name: missed(decode_masks(codes, Weights(dict(stored)), np.float32, ops=namespace))
        for name, namespace in (("definitions", ops), ("kernels", kernels))
    }
    print(
        f"\nmask decoder, {COUNT} masks, rms {rms(truth):.2g}: float64 {wide:.1e}, torch float32 "
        f"{missed(torchs):.1e}, " + ", ".join(f"{name} {error:.1e}" for name, error in own.items())
    )
    differences = []
    if not wide <= LIMIT:
        differences.append(f"mask decoder: float64 is off by {wide:.1e}, limit {LIMIT}")
    for name, error in own.items():
        if not error <= missed(torchs):
            differences.append(f"mask decoder: {name} are off by {error:.1e}, more than torch")
    return differences
