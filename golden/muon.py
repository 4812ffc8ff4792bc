"""Muon: an optimizer that steps matrices along the orthogonal matrix nearest to their momentum.

Source: K. Jordan and others, Muon, 2024; the scale that suits AdamW's learning rates is from
arXiv 2502.16982.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Step matrices; those of equal shape are made orthogonal together, which is faster."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take one step. A matrix taller than wide goes through transposed."""
        assert closure is None
        for group in self.param_groups:
            families: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    families.setdefault(tuple(sorted(p.shape)), []).append(p)
            for (low, high), members in families.items():
                pushes = [_wide(self._push(p, group["momentum"])) for p in members]
                rate = group["lr"]
                for p, turn in zip(members, orthogonal(torch.stack(pushes)), strict=True):
                    p.mul_(1 - rate * group["weight_decay"])
                    turn = turn if p.shape[0] == low else turn.T
                    p.add_(turn, alpha=-0.2 * math.sqrt(high) * rate)

    def _push(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Update a matrix's momentum and look one step ahead along it (Nesterov)."""
        speed = self.state[p].setdefault("momentum", torch.zeros_like(p))
        speed.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(speed, momentum)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonal(x: Tensor) -> Tensor:
    """Push all singular values of each matrix towards 1 by five Newton-Schulz steps.

    bfloat16 is exact enough: the steps need not converge.

    x [N, O, I] -> [N, O, I]
    """
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)
    return x.float()
