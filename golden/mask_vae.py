"""PyTorch's side of the mask decoder: the VQ-VAE behind PaliGemma's `<seg...>` tokens, whole.

The published file holds the encoder, too, which turns a mask into its sixteen tokens. npvlm has the
decoder alone; the encoder is needed to train.

Axis letters: N masks · E width of a code (512).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODES, CODE_WIDTH = 128, 512
GRID, SIDE = 4, 64  # a mask of SIDE x SIDE is GRID x GRID codes
CODEBOOK = "_vq_vae._embedding"


class Residual(nn.Module):
    """Three convolutions beside a straight line; nothing is cut off after the sum."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskVae(nn.Module):
    """The published VQ-VAE, module by module, so that its tensors have their published names.

    Source: big_vision, evaluators/proj/paligemma/transfers/segmentation.py; VQ-VAE, arXiv
    1711.00937.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(
                part
                for ins, outs in ((1, 16), (16, 32), (32, 64), (64, 128))
                for part in (nn.Conv2d(ins, outs, 4, stride=2, padding=1), nn.ReLU())
            ),
            Residual(128),
            Residual(128),
            nn.Conv2d(128, CODE_WIDTH, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_WIDTH, 128, 1),
            nn.ReLU(),
            Residual(128),
            Residual(128),
            *(
                part
                for ins, outs in ((128, 128), (128, 64), (64, 32), (32, 16))
                for part in (nn.ConvTranspose2d(ins, outs, 4, stride=2, padding=1), nn.ReLU())
            ),
            nn.Conv2d(16, 1, 1),
        )
        self.codebook = nn.Parameter(torch.randn(CODES, CODE_WIDTH), requires_grad=False)

    def decode(self, codes: Tensor) -> Tensor:
        """Paint masks: about -1 outside and 1 inside. codes [N, 16] -> [N, 64, 64]"""
        grid = self.codebook[codes].view(len(codes), GRID, GRID, CODE_WIDTH)
        return self.decoder(grid.permute(0, 3, 1, 2))[:, 0]

    def look(self, masks: Tensor) -> Tensor:
        """Run the encoder. masks [N, 64, 64], -1 to 1 -> [N, 16, E]"""
        return self.encoder(masks[:, None]).flatten(2).transpose(1, 2)

    def nearest(self, seen: Tensor) -> Tensor:
        """Find the row of the codebook that is nearest. [..., E] -> [...]"""
        return (
            torch.cdist(seen.reshape(1, -1, CODE_WIDTH), self.codebook[None])
            .argmin(-1)
            .view(seen.shape[:-1])
        )

    @torch.no_grad()
    def encode(self, masks: Tensor) -> Tensor:
        """Give the tokens of masks. masks [N, 64, 64], -1 to 1 -> [N, 16], 0 to 127"""
        return self.nearest(self.look(masks))

    def published(self) -> dict[str, Tensor]:
        """Give decoder and codebook under the names of the published file."""
        tensors = {f"decoder.{name}": t for name, t in self.decoder.state_dict().items()}
        return {CODEBOOK: self.codebook.detach(), **tensors}


def reconstruction_loss(vae: MaskVae, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Send masks through the codes and back; gradients pass the choice of a code unchanged.

    masks [N, 64, 64] -> [], and what the encoder gave [N, 16, E] with the codes chosen [N, 16]
    """
    seen = vae.look(masks)
    codes = vae.nearest(seen.detach())
    chosen = vae.codebook[codes]
    passed = seen + (chosen - seen).detach()
    grid = passed.transpose(1, 2).reshape(len(masks), CODE_WIDTH, GRID, GRID)
    painted = vae.decoder(grid)[:, 0]
    loss = F.mse_loss(painted, masks) + 0.25 * F.mse_loss(seen, chosen)
    return loss, seen.detach(), codes
