"""Train the mask decoder of the bundled models: a VQ-VAE of the published layout, on drawn masks.

python golden/train_masks.py --minutes 12 --checkpoint FOLDER \
    --save npvlm/bundled/vae.safetensors --save-whole golden/masks.pt

Stopped and started again with the same folder, it goes on where it was. The file
that is bundled has no encoder; `train_shapes.py --masks golden/masks.pt` asks the whole one for the
tokens of a mask, so that they are codes which the bundled decoder knows.

Each code is the running mean of what the encoder gave where it was nearest; one that nothing comes
near starts anew from something that the encoder gave just now.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden.mask_vae import CODES, SIDE, MaskVae, reconstruction_loss
from golden.strokes import draw_digit
from npvlm.work.scenes import SHAPES, STAR_HEIGHT, STAR_WIDTH, Thing, mask_of

DECAY = 0.99  # of the running means
DEAD = 0.02  # uses per step, on a running mean, below which a code starts anew


def shape_mask(rng: Random) -> Image.Image:
    """Draw the mask of a thing as the model's pictures have them, its own box and nothing else."""
    shape, size = rng.choice(SHAPES), rng.randint(32, 88)
    height = round(size * STAR_HEIGHT / STAR_WIDTH) if shape == "star" else size
    return mask_of(Thing("red", shape, 0, 0, size, height))


def other_mask(rng: Random) -> Image.Image:
    """Draw something else: a turned polygon or star, an ellipse cut off, or a digit."""
    canvas = Image.new("L", (192, 192))
    kind = rng.choice(["polygon", "star", "ellipse", "digit"])
    if kind == "digit":
        colour = Image.new("RGB", canvas.size)
        thick, slant = rng.uniform(0.1, 0.25), rng.uniform(-0.1, 0.2)
        draw_digit(colour, rng.choice("0123456789"), 40, 30, 120, thick, slant, (255,) * 3)
        canvas = colour.getchannel(0)
    else:
        pen, turn = ImageDraw.Draw(canvas), rng.uniform(0, 2 * math.pi)
        wide, high = rng.uniform(30, 90), rng.uniform(30, 90)
        corners = rng.randint(3, 6) if kind == "polygon" else 60 if kind == "ellipse" else 10
        inner = rng.uniform(0.35, 0.7)
        points = []
        for corner in range(corners):
            reach = inner if kind == "star" and corner % 2 else 1.0
            angle = turn + 2 * math.pi * corner / corners
            x, y = reach * wide * math.cos(angle), reach * high * math.sin(angle)
            points.append((96 + x, 96 + y))
        pen.polygon(points, fill=255)
    x0, y0, x1, y1 = canvas.getbbox() or (0, 0, 192, 192)
    if rng.random() < 0.3:  # what a box that is off cuts out
        dx, dy = (x1 - x0) * rng.uniform(-0.2, 0.2), (y1 - y0) * rng.uniform(-0.2, 0.2)
        x0, x1, y0, y1 = x0 + dx, x1 + dx, y0 + dy, y1 + dy
    return canvas.crop((round(x0), round(y0), round(x1), round(y1)))


def as_numbers(mask: Image.Image) -> np.ndarray:
    """Squeeze a mask to the encoder's size. -> [64, 64] float32, -1 to 1"""
    small = mask.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32) / 127.5 - 1


def draw_masks(seed: str, count: int) -> torch.Tensor:
    """Draw masks, half of them the model's own shapes. -> [N, 64, 64]"""
    rng = Random(f"masks {seed}")
    drawn = [rng.choice([shape_mask, other_mask])(rng) for _ in range(count)]
    return torch.tensor(np.stack([as_numbers(mask) for mask in drawn]))


@torch.no_grad()
def check(vae: MaskVae, masks: torch.Tensor) -> dict[str, float]:
    """Send held-out masks through the codes and back: the mean IoU, and how many codes they use."""
    codes = vae.encode(masks)
    found, true = vae.decode(codes) > 0, masks > 0
    both, any_ = (found & true).sum((1, 2)), (found | true).sum((1, 2))
    return {"iou": (both / any_).mean().item(), "codes": float(len(codes.unique()))}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train(given: argparse.Namespace) -> None:
    """Train until the minutes are used up."""
    torch.manual_seed(given.seed)
    vae = MaskVae()
    learned = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=given.lr)
    uses, totals = torch.ones(CODES), vae.codebook.data.clone()
    step, seconds = 0, 0.0
    kept = given.checkpoint / "masks.pt"
    given.checkpoint.mkdir(parents=True, exist_ok=True)
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        uses, totals, step, seconds = (state[k] for k in ("uses", "totals", "step", "seconds"))
    held_out = draw_masks(f"held out {given.seed}", 512)
    last = written = time.monotonic()
    while (share := seconds / (60 * given.minutes)) < 1:
        masks = draw_masks(f"train {given.seed} {step}", given.batch)
        for group in optimizer.param_groups:
            falling = 0.5 * (1 + math.cos(math.pi * share))
            group["lr"] = given.lr * min(1.0, (step + 1) / 100) * falling
        loss, seen, codes = reconstruction_loss(vae, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        flat, chosen = seen.flatten(0, 1), codes.flatten()
        uses.mul_(DECAY).add_(torch.bincount(chosen, minlength=CODES), alpha=1 - DECAY)
        totals.mul_(DECAY).index_add_(0, chosen, flat, alpha=1 - DECAY)
        dead = (uses < DEAD * len(masks) / 64).nonzero().flatten()
        if share < 0.7 and len(dead):
            fresh = flat[torch.randint(len(flat), (len(dead),))]
            uses[dead], totals[dead] = 1.0, fresh
        vae.codebook.data = totals / uses[:, None].clamp(min=1e-6)
        step += 1
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        if step % given.every == 0 or seconds >= 60 * given.minutes:
            line = {"step": step, "minutes": seconds / 60, "loss": loss.item()}
            line |= check(vae, held_out)
            print(json.dumps({k: round(v, 4) for k, v in line.items()}), flush=True)
        if now - written > 60 or seconds >= 60 * given.minutes:
            written = now
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "uses": uses}
            state |= {"totals": totals, "step": step, "seconds": seconds}
            torch.save(state, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
    if given.save:
        tensors = {k: t.to(torch.float16).contiguous() for k, t in vae.published().items()}
        save_file(tensors, given.save, metadata={"format": "pt"})
        given.save.chmod(0o644)
        options = {k: v for k, v in vars(given).items() if isinstance(v, int | float)}
        if given.save_whole:
            halves = {k: t.to(torch.float16) for k, t in vae.state_dict().items()}
            torch.save({"vae": halves}, given.save_whole)
        provenance = {
            "program": "golden/train_masks.py",
            "options": options,
            "steps": step,
            "minutes": round(seconds / 60, 1),
            "held_out_masks": {"n": len(held_out), **check(vae, held_out)},
            "versions": {name: version(name) for name in ("torch", "pillow")},
            "sha256": {given.save.name: _digest(given.save)},
            "whole": _digest(given.save_whole) if given.save_whole else None,
        }
        text = json.dumps(provenance, indent=2) + "\n"
        given.save.with_suffix(".json").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind, default, text in (
        ("--minutes", float, 12.0, "minutes of training"),
        ("--checkpoint", Path, None, "folder to keep the run in, and to go on from"),
        ("--save", Path, None, "file for decoder and codebook, in 16 bits"),
        ("--save-whole", Path, None, "file for all of it, the encoder included, in 16 bits"),
        ("--seed", int, 0, "of the weights and the masks"),
        ("--lr", float, 1e-3, "learning rate"),
        ("--batch", int, 64, "masks per step"),
        ("--every", int, 50, "steps between checks"),
    ):
        required = name == "--checkpoint"
        parser.add_argument(name, type=kind, default=default, help=text, required=required)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
