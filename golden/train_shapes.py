"""Train the bundled models, small PaliGemmas (1: `shapes`, 2: `shapes2`) that know drawn shapes.

python golden/train_masks.py --checkpoint MASKS --save npvlm/bundled/vae.safetensors \
    --save-whole golden/masks.pt
python golden/train_shapes.py --masks golden/masks.pt --minutes 100 --checkpoint RUN \
    --save npvlm/bundled/shapes
python golden/train_shapes.py --masks golden/masks.pt --family 2 --start npvlm/bundled/shapes \
    --minutes 60 --checkpoint RUN2 --save npvlm/bundled/shapes2

Stopped and started again with the same folder, it goes on where it was. With --steps in place of
--minutes the run does not depend on the machine's speed. A budget that is used up already trains
nothing and saves what the folder holds. --start begins with the weights of a finished model: all of
them, or where the families differ the image tower and the table of embeddings.

What comes out is a plain PaliGemma. Four things that help it learn leave no trace in the file:

- One pass of the image tower serves all questions about a picture.
- Linear heads on the tower's output must tell what lies under each patch, at first alone: the tower
  learns to see before it meets the language model.
- Location tokens are places on a ruler and no words: neighbours begin alike and share targets.
- Matrices are stepped by Muon, all else by AdamW.

Axis letters: N pictures · P patches · B questions · T tokens of a question · H query heads ·
d head_dim · D width · V vocabulary.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from golden import shapes, shapes_folder
from golden.mask_vae import MaskVae
from golden.muon import Muon
from golden.patch_heads import PatchHeads, patch_targets
from golden.shapes import SIZE, Question, Scene
from golden.train_masks import as_numbers
from npvlm.work.scenes import Thing, mask_of

LOCATIONS = 1024
LOC_WIDTH = (6.0, 1.5)  # standard deviation of a location's target in bins, at first and at last
JITTER = 4  # bins, less than a pixel of the drawn picture
CHECK_SEED = 10**6  # of the held-out pictures that the checks on the way use

Figures = dict[str, float]


# --- questions and pictures as numbers ----------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One question on picture `picture` of the batch, as ids, and each answer token's weight.

    given : the answer as the model reads it back: its locations may be a little off
    """

    picture: int
    task: str
    prompt: list[int]
    answer: list[int]
    given: list[int]
    weights: list[float]


def training_questions(
    scene: Scene, rng: Random, mask_tokens: Callable[[Thing], str]
) -> list[Question]:
    """Ask a handful: where, and in what order, takes longer to learn than how many."""
    if scene.digits:
        asked = [shapes.ocr(scene)]
        if rng.random() < 0.3:
            asked.append(shapes.caption(scene))
        if rng.random() < 0.15:
            asked.append(rng.choice([shapes.detect, shapes.count])(scene, rng))
        if rng.random() < 0.05:
            asked.append(shapes.segment(scene, rng, mask_tokens))
        return asked
    asked = [shapes.caption(scene), shapes.detect(scene, rng), shapes.count(scene, rng)]
    asked.append(shapes.colour(scene, rng) or shapes.count(scene, rng))
    asked.append(shapes.detect(scene, rng, 4) if rng.random() < 0.9 else shapes.ocr(scene))
    asked.append(shapes.segment(scene, rng, mask_tokens))
    return asked


def example(
    picture: int, question: Question, tokenizer: SentencePieceProcessor, rng: Random | None = None
) -> Example:
    """Lay a question out as PaliGemma does: bos, prompt, newline; then the answer and eos.

    With a generator half of the locations that are read back are up to JITTER off, as the model's
    own are: true ones are whole pixels, and it would not know what to do behind others.
    """
    prompt = [tokenizer.bos_id(), *tokenizer.encode(question.prompt), tokenizer.piece_to_id("\n")]
    answer = [*tokenizer.encode(question.answer), tokenizer.eos_id()]
    first = {"count": 4.0, "colour": 3.0, "ocr": 1.5}.get(question.task, 1.0)
    loc_id, given = tokenizer.piece_to_id("<loc0000>"), list(answer)
    for i, token in enumerate(answer):
        if rng and loc_id <= token < loc_id + LOCATIONS and rng.random() < 0.5:
            off = token - loc_id + rng.randint(-JITTER, JITTER)
            given[i] = loc_id + min(max(off, 0), LOCATIONS - 1)
    weights = [first, *[1.0] * (len(answer) - 1)]
    return Example(picture, question.task, prompt, answer, given, weights)


class MaskTokens:
    """Writes the mask of a thing as its sixteen `<seg...>` tokens."""

    def __init__(self, file: Path):
        self.vae = MaskVae()
        self.vae.load_state_dict(torch.load(file, weights_only=True)["vae"])
        self.known: dict[tuple[str, int, int], str] = {}

    def __call__(self, thing: Thing) -> str:
        kind = thing.shape, thing.x1 - thing.x0, thing.y1 - thing.y0  # the mask knows nothing more
        if kind not in self.known:
            codes = self.vae.encode(torch.tensor(as_numbers(mask_of(thing)))[None])[0]
            self.known[kind] = "".join(f"<seg{code:03d}>" for code in codes.tolist())
        return self.known[kind]


def pixels(scenes: Sequence[Scene], side: int) -> Tensor:
    """Shrink the pictures as the SigLIP processor does. -> [N, 3, side, side], from -1 to 1"""
    small = [scene.picture.resize((side, side), Image.Resampling.BICUBIC) for scene in scenes]
    stacked = torch.tensor(np.stack([np.asarray(picture) for picture in small]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


# --- the model ----------------------------------------------------------------------------------


def build_model(
    config: dict[str, Any], loc_id: int, seed: int
) -> PaliGemmaForConditionalGeneration:
    """Start from random weights in which places look like places.

    Patches get waves over the picture's two sides, location tokens waves over the ruler.
    """
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**config)).float()
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        D = table.shape[1]
        table.normal_(std=0.05)
        ruler = waves(torch.linspace(0, 1, LOCATIONS), D // 2, 40.0)
        table[loc_id : loc_id + LOCATIONS] = 0.05 * ruler @ nn.init.orthogonal_(torch.empty(D, D))
        places = model.model.vision_tower.embeddings.position_embedding.weight
        grid = math.isqrt(len(places))
        line = waves((torch.arange(grid) + 0.5) / grid, places.shape[1] // 4, grid / 2)
        both = torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, 0)], 1)
        places.copy_(0.3 * both)
    return model


def start_from(model: nn.Module, folder: Path) -> None:
    """Take over the weights of a finished model; of another family those outside of the layers."""
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    alike = config["text_config"]["model_type"] == model.config.text_config.model_type
    with torch.no_grad():
        for name, p in model.named_parameters():
            if alike or "language_model.layers" not in name:
                p.copy_(stored[shapes_folder.published_name(name)])


def waves(at: Tensor, count: int, highest: float) -> Tensor:
    """Give sines and cosines of unit power that turn a quarter to `highest` times from 0 to 1.

    at [N] -> [N, 2 count]
    """
    turns = torch.logspace(math.log10(0.25), math.log10(highest), count)
    angles = 2 * math.pi * at[:, None] * turns
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)


def answer_states(
    model: PaliGemmaForConditionalGeneration, images: Tensor, examples: Sequence[Example]
) -> Tensor:
    """Run the decoder over pictures, prompts and answers: what each answer token follows from.

    This is transformers' forward pass less what training can spare: its last layer runs over
    the text alone. Padding stands at the end, where no token looks.

    images [N, P, D] -> [answer tokens of all examples, D]
    """
    language = model.model.language_model
    B, P = len(examples), images.shape[1]
    width = max(len(e.prompt) + len(e.answer) for e in examples) - 1  # the last predicts nothing
    ids = torch.zeros(B, width, dtype=torch.long)
    prefix = torch.zeros(B, P + width, dtype=torch.bool)
    prefix[:, :P] = True
    answering = torch.zeros(B, width, dtype=torch.bool)
    for b, e in enumerate(examples):
        text = [*e.prompt, *e.given[:-1]]
        ids[b, : len(text)] = torch.tensor(text)
        prefix[b, P : P + len(e.prompt)] = True
        answering[b, len(e.prompt) - 1 : len(text)] = True
    x = torch.cat([images[[e.picture for e in examples]], language.embed_tokens(ids)], 1)
    T = P + width
    config, causal = language.config, torch.ones(T, T, dtype=torch.bool).tril()
    near = causal.triu(1 - (getattr(config, "sliding_window", None) or T))
    among = prefix[:, :, None] & prefix[:, None, :]
    visible = {"full_attention": causal | among, "sliding_attention": near | among}  # [B, T, T]
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(language.layers)
    cos, sin = language.rotary_emb(x, torch.arange(1, T + 1)[None])
    for layer, kind in zip(language.layers, kinds, strict=True):
        first = P if layer is language.layers[-1] else 0
        x = decoder_layer(layer, x, visible[kind][:, None], cos[:, None], sin[:, None], first)
    return language.norm(x[answering])


def decoder_layer(
    layer: nn.Module, x: Tensor, visible: Tensor, cos: Tensor, sin: Tensor, first: int
) -> Tensor:
    """Run one layer of Gemma 1 or 2 for the rows from `first` on; they see all rows.

    x [B, T, D], visible [B, 1, T, T], cos and sin [1, 1, T, d] -> [B, T - first, D]
    """
    (B, T, _), d = x.shape, cos.shape[-1]
    attention = layer.self_attn
    seen = layer.input_layernorm(x)
    q = attention.q_proj(seen[:, first:]).view(B, T - first, -1, d).transpose(1, 2)
    k = attention.k_proj(seen).view(B, T, -1, d).transpose(1, 2)
    v = attention.v_proj(seen).view(B, T, -1, d).transpose(1, 2)
    q, k = rotate(q, cos[:, :, first:], sin[:, :, first:]), rotate(k, cos, sin)
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    cap = getattr(attention, "attn_logit_softcapping", None)
    mixed = attend(q, k, v, visible[:, :, first:], attention.scaling, cap)
    gathered = attention.o_proj(mixed.transpose(1, 2).reshape(B, T - first, -1))
    if not hasattr(layer, "post_feedforward_layernorm"):
        x = x[:, first:] + gathered
        return x + layer.mlp(layer.post_attention_layernorm(x))
    x = x[:, first:] + layer.post_attention_layernorm(gathered)
    return x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, cap: float | None
) -> Tensor:
    """Mix values by scores, soft-capped if there is a cap. q, k and v [B, H, T, d] -> alike"""
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    scores = cap * torch.tanh(q @ k.mT * (scale / cap))
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of dimensions (j, j + d / 2) by the angle of its position.

    heads [B, H, T, d] -> [B, H, T, d]
    """
    one, other = heads.chunk(2, -1)
    return heads * cos + torch.cat([-other, one], -1) * sin


def token_losses(logits: Tensor, targets: Tensor, loc_id: int, width: float) -> Tensor:
    """Score each answer token by cross entropy; a location shares its target with its neighbours.

    Shared out too widely, no one location would outweigh a doubt whether to answer at all.

    logits [T, V], targets [T] -> [T]
    """
    chances = logits.log_softmax(-1)
    losses = -chances.gather(1, targets[:, None])[:, 0]
    places = is_location(targets, loc_id)
    off = torch.arange(LOCATIONS)[None] - (targets[places] - loc_id)[:, None]
    share = torch.softmax(-0.5 * (off / width) ** 2, -1)
    shared = -(share * chances[places, loc_id : loc_id + LOCATIONS]).sum(-1)
    return losses.masked_scatter(places, shared)


def is_location(ids: Tensor, loc_id: int) -> Tensor:
    """Tell location tokens from others. [T] -> bool [T]"""
    return (ids >= loc_id) & (ids < loc_id + LOCATIONS)


# --- the run ------------------------------------------------------------------------------------


class Trainer:
    """All that a run consists of; `state` and `restore` carry it over a stop."""

    def __init__(self, given: argparse.Namespace, rank: int = 0):
        self.given, self.rank = given, rank
        self.tokenizer = shapes_folder.train_tokenizer()
        self.loc_id = self.tokenizer.piece_to_id("<loc0000>")
        config = shapes_folder.published_config(self.tokenizer, given.family)
        self.model = build_model(config, self.loc_id, given.seed)
        if given.start:
            start_from(self.model, given.start)
        self.mask_tokens = MaskTokens(given.masks)
        vision = self.model.config.vision_config
        self.side, self.grid = vision.image_size, vision.image_size // vision.patch_size
        self.cap = getattr(self.model.config.text_config, "final_logit_softcapping", None)
        self.heads = PatchHeads(vision.hidden_size)
        matrices, others = [], []
        for name, p in self.model.named_parameters():
            (matrices if ".layers." in name and p.ndim == 2 else others).append(p)
        others += self.heads.parameters()
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=given.lr, weight_decay=0.05),
            torch.optim.AdamW(others, lr=given.lr, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.params = matrices + others
        self.step, self.next_picture, self.seconds = 0, 0, 0.0
        self.last = time.monotonic()

    def progress(self) -> float:
        """Say how much of the budget is used; 1 is all of it."""
        if self.given.steps:
            return self.step / self.given.steps
        return self.seconds / (60 * self.given.minutes)

    def train_step(self) -> Figures:
        """Take one step together with the other workers; gives figures to print."""
        used = self.progress()
        lr = self.given.lr * min(1.0, (self.step + 1) / 200) * max(0.0, 1 - used)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr
        scenes, rng = self.next_scenes()
        features = self.model.model.vision_tower(pixels(scenes, self.side)).last_hidden_state
        loss, figures = self.heads.loss(features, patch_targets(scenes, self.grid))
        if used >= self.given.dense:
            answers = self.answer_loss(features, scenes, rng)
            loss = answers + 0.5 * max(0.1, 1 - 2 * used) * loss
            figures["answers"] = answers.item()
        loss.backward()
        self.share_gradients()
        figures["norm"] = nn.utils.clip_grad_norm_(self.params, 1.0).item()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return figures

    def next_scenes(self) -> tuple[list[Scene], Random]:
        """Draw this worker's share of the next pictures; gives the questions' generator, too."""
        seed, share = self.given.seed, self.given.pictures // self.given.workers
        first = self.next_picture + self.rank * share
        self.next_picture += self.given.pictures
        scenes = [shapes.draw_scene("train", seed, i) for i in range(first, first + share)]
        return scenes, Random(f"questions {seed} {first}")

    def answer_loss(self, features: Tensor, scenes: Sequence[Scene], rng: Random) -> Tensor:
        """Ask the training questions and weigh the losses of all answer tokens."""
        examples = [
            example(n, question, self.tokenizer, rng)
            for n, scene in enumerate(scenes)
            for question in training_questions(scene, rng, self.mask_tokens)
        ]
        logits, examples = self.answer_logits(features, examples)
        targets = torch.tensor([token for e in examples for token in e.answer])
        weights = torch.tensor([weight for e in examples for weight in e.weights])
        wide, narrow = LOC_WIDTH
        width = wide + (narrow - wide) * self.progress()
        losses = token_losses(logits, targets, self.loc_id, width)
        return (losses * weights).sum() / weights.sum()

    def answer_logits(
        self, features: Tensor, examples: Sequence[Example]
    ) -> tuple[Tensor, list[Example]]:
        """Predict all answer tokens; questions of like length run together.

        features [N, P, D] -> [answer tokens of all examples, V], and the examples in their order
        """
        images = self.model.model.multi_modal_projector(features)
        ordered = sorted(examples, key=lambda e: len(e.prompt) + len(e.answer))
        size = self.given.chunk
        chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        states = torch.cat([answer_states(self.model, images, chunk) for chunk in chunks])
        logits, cap = self.model.lm_head(states), self.cap
        return logits if cap is None else cap * torch.tanh(logits / cap), ordered

    def share_gradients(self) -> None:
        """Give every worker the mean gradient, and one clock, since it sets the learning rate."""
        before, self.last = self.last, time.monotonic()
        elapsed = self.last - before
        if self.given.workers > 1:
            learned = [p for p in self.params if p.grad is not None]
            parts = [*(p.grad.flatten() for p in learned), torch.tensor([elapsed])]
            mean = torch.cat(parts)
            torch.distributed.all_reduce(mean)
            mean /= self.given.workers
            sizes = [p.numel() for p in learned]
            for p, grad in zip(learned, mean[:-1].split(sizes), strict=True):
                p.grad = grad.view_as(p)
            elapsed = mean[-1].item()
        self.seconds += elapsed

    @torch.no_grad()
    def check(self, count: int) -> Figures:
        """Measure on held-out pictures, each answer token given the true ones before it.

        A greedy answer is exactly right if and only if every such token is: for captions, counts,
        colours and numbers this is the true score. For detection it scores the words alone, and
        `loc_px` says how far locations are off in pixels of the drawn picture (20 at most each).
        """
        scenes = [shapes.draw_scene("held out", CHECK_SEED, i) for i in range(count)]
        rng = Random("check")
        asked = [(n, q) for n, scene in enumerate(scenes) for q in shapes.exam(scene, rng)]
        asked += [
            (n, shapes.segment(scene, rng, self.mask_tokens))
            for n, scene in enumerate(scenes)
            if scene.things
        ]
        examples = [example(n, question, self.tokenizer) for n, question in asked]
        features = self.model.model.vision_tower(pixels(scenes, self.side)).last_hidden_state
        logits, examples = self.answer_logits(features, examples)
        targets = torch.tensor([token for e in examples for token in e.answer])
        off = (logits.argmax(-1) - targets).abs()
        places = is_location(targets, self.loc_id)
        right = (off == 0) | places
        figures = {"loc_px": (off[places] * SIZE / LOCATIONS).clamp(max=20).mean().item()}
        marks: dict[str, list[bool]] = {}
        for e, tokens in zip(examples, right.split([len(e.answer) for e in examples]), strict=True):
            marks.setdefault(e.task, []).append(bool(tokens.all()))
        return figures | {task: sum(found) / len(found) for task, found in marks.items()}

    def save(self, folder: Path) -> None:
        """Write the model's folder, measure it through npvlm, and write down how it was made."""
        start = shapes_folder.origin(self.given.start) if self.given.start else None
        weights = self.model.state_dict()
        shapes_folder.write_folder(folder, weights, self.tokenizer, self.given.family)
        run = {
            "program": "golden/train_shapes.py",
            "options": {
                name: value
                for name, value in vars(self.given).items()
                if isinstance(value, int | float) and name != "port"
            },
            "steps": self.step,
            "pictures": self.next_picture,
            "minutes": round(self.seconds / 60, 1),
            "start": start,
        }
        marks = shapes.measure(folder, 1, self.given.measure)
        shapes_folder.write_provenance(
            folder, run, shapes.metrics(marks), self.given.family, self.given.measure
        )

    def state(self) -> dict[str, Any]:
        """Everything a run needs to go on; pictures and questions follow from their number."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "next_picture": self.next_picture,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.next_picture = state["step"], state["next_picture"]
        self.seconds = state["seconds"]


def train(rank: int, given: argparse.Namespace) -> None:
    """Train until the budget is used up; print checks and keep a checkpoint on the way."""
    torch.set_num_threads(1)
    torch.set_default_device(given.device)
    store = torch.distributed.TCPStore("127.0.0.1", given.port, given.workers, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=given.workers)
    trainer = Trainer(given, rank)
    given.checkpoint.mkdir(parents=True, exist_ok=True)
    kept = given.checkpoint / "checkpoint.pt"
    if kept.exists():
        trainer.restore(torch.load(kept, weights_only=True, map_location=given.device))
    torch.distributed.barrier()
    trainer.last = written = time.monotonic()
    while trainer.progress() < 1:
        figures = trainer.train_step()
        if rank > 0:
            continue
        done = trainer.progress() >= 1
        if done or trainer.step % given.every == 0:
            figures |= trainer.check(given.held_out)
            line = {"step": trainer.step, "minutes": trainer.seconds / 60} | figures
            print(json.dumps({k: round(value, 4) for k, value in line.items()}), flush=True)
        if done or time.monotonic() - written > 120:
            written = time.monotonic()
            torch.save(trainer.state(), kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
    if rank == 0 and given.save:
        trainer.save(given.save)


def main() -> None:
    """Read the command line and start the workers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="minutes of training")
    budget.add_argument("--steps", type=int, help="steps of training")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, kind, default, text in (
        ("--checkpoint", Path, None, "folder to keep the run in, and to go on from"),
        ("--masks", Path, None, "what train_masks.py keeps: it writes a mask as tokens"),
        ("--family", int, 1, "1 or 2: the graph of PaliGemma or of PaliGemma 2"),
        ("--start", Path, None, "folder of a finished model to begin with"),
        ("--save", Path, None, "folder for the finished model"),
        ("--seed", int, 0, "of the weights, the pictures and the questions"),
        ("--lr", float, 3e-3, "learning rate, from which it falls to 0 in a line"),
        ("--pictures", int, 32, "pictures per step"),
        ("--chunk", int, 24, "questions run together"),
        ("--dense", float, 0.1, "share of the budget in which the image tower learns alone"),
        ("--every", int, 200, "steps between checks"),
        ("--held-out", int, 150, "pictures of a check"),
        ("--measure", int, 1000, "pictures of the finished model's test"),
        ("--device", str, device, "cpu or cuda"),
        ("--workers", int, 2 if device == "cpu" else 1, "processes that share a step"),
        ("--port", int, 29511, "where the workers meet, on this machine"),
    ):
        required = name in ("--checkpoint", "--masks")
        parser.add_argument(name, type=kind, default=default, help=text, required=required)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end, too
    torch.multiprocessing.spawn(train, (given,), nprocs=given.workers, daemon=True)


if __name__ == "__main__":
    main()
