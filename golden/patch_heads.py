"""Linear readings of the image tower, for training only: what lies under each patch.

Axis letters: N pictures · P patches of a picture · M patches that show something ·
D width of the tower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden.shapes import SIZE, Scene
from npvlm.work.scenes import COLOURS, SHAPES

KINDS = ("nothing", *SHAPES, *"0123456789")  # what a patch may show
MOST = 5  # things or digits on a picture


@dataclass(frozen=True)
class PatchTargets:
    """What is to be read, for all patches or for those that show something.

    at [M] : the number of each patch that shows something, through all pictures
    kinds [N * P] : what is shown
    colours [M] : its colour, -1 for digits
    orders [M] : how many stand left of it
    alike [M] : how many more of its shape (for digits: how many more digits) there are
    edges [M, 4] : its box x0, y0, x1, y1, from -1 to 1
    """

    at: Tensor
    kinds: Tensor
    colours: Tensor
    orders: Tensor
    alike: Tensor
    edges: Tensor


def patch_targets(scenes: Sequence[Scene], grid: int) -> PatchTargets:
    """Say for each patch in whose box its middle lies; a box without any has the patch nearest."""
    kinds = torch.zeros(len(scenes) * grid * grid, dtype=torch.long)
    rows: dict[int, tuple[int, int, int, tuple[float, ...]]] = {}
    for n, scene in enumerate(scenes):
        for order, item in enumerate([*scene.things, *scene.digits]):
            kind = item.shape if scene.things else item.character
            colour = list(COLOURS).index(item.colour) if scene.things else -1
            alike = sum(thing.shape == kind for thing in scene.things) or len(scene.digits)
            edges = tuple(2 * edge / SIZE - 1 for edge in item.box)
            x0, y0, x1, y1 = (edge * grid / SIZE - 0.5 for edge in item.box)  # middles are whole
            for y in _middles(y0, y1, grid):
                for x in _middles(x0, x1, grid):
                    at = (n * grid + y) * grid + x
                    kinds[at] = KINDS.index(kind)
                    rows[at] = (colour, order, alike - 1, edges)
    columns = [torch.tensor(column) for column in zip(*rows.values(), strict=True)]
    return PatchTargets(torch.tensor(list(rows)), kinds, *columns)


def _middles(low: float, high: float, grid: int) -> Sequence[int]:
    inside = range(max(0, math.ceil(low)), min(grid - 1, math.floor(high)) + 1)
    return inside or [min(grid - 1, max(0, round((low + high) / 2)))]


class PatchHeads(nn.Module):
    """One linear layer per reading."""

    def __init__(self, width: int):
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.order = nn.Linear(width, MOST)
        self.alike = nn.Linear(width, MOST)
        self.edges = nn.Linear(width, 4)

    def loss(self, features: Tensor, targets: PatchTargets) -> tuple[Tensor, dict[str, float]]:
        """Add up the losses of all readings; gives figures to print, too.

        What is shown counts twice, else the many empty patches drown it.

        features [N, P, D] -> []
        """
        flat = features.flatten(0, 1)
        shown = flat[targets.at]
        kinds, edges = self.kind(flat), self.edges(shown)
        losses = {
            "kind": F.cross_entropy(kinds, targets.kinds),
            "shown": F.cross_entropy(kinds[targets.at], targets.kinds[targets.at]),
            "colour": F.cross_entropy(self.colour(shown), targets.colours, ignore_index=-1),
            "order": F.cross_entropy(self.order(shown), targets.orders),
            "alike": F.cross_entropy(self.alike(shown), targets.alike),
            "edges": 4 * F.smooth_l1_loss(edges, targets.edges, beta=0.05),
        }
        right = (kinds.argmax(-1) == targets.kinds)[targets.at].float().mean()
        figures = {f"patch_{name}": value.item() for name, value in losses.items()}
        figures["patch_kind_right"] = right.item()
        figures["patch_edge_px"] = (edges - targets.edges).abs().mean().item() * SIZE / 2
        return torch.stack(list(losses.values())).sum(), figures
