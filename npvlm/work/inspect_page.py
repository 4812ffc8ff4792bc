"""An inspection as text: one fact a line, and what could not be found out in its place."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from npvlm.errors import shown
from npvlm.files.checkpoint import grouped
from npvlm.work.inspect import File, Inspection, Need, Parameters, Sizes, Vocabulary

_LABEL, _WIDTH = 12, 100
_WHOLE = ("model", "folder", "load")  # lines to copy from, which are left as long as they are


def page(found: Inspection) -> str:
    """Everything that was found out about a model's folder, for reading."""
    lines = [line for label, text in _facts(found) for line in _wrapped(label, shown(text))]
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    """A line, or several with the label before the first."""
    if label in _WHOLE:
        return [label.ljust(_LABEL) + text]
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    problems = found.problems
    yield "model", found.model
    yield "folder", found.folder
    if found.sizes is None:
        yield "config", problems["config"]
    else:
        yield from _config(found.sizes)
    if found.parameters is not None:
        yield "parameters", _parameters(found.parameters, found.own_head)
    if "weights" in problems:
        yield "weights", problems["weights"]
    yield from _files(found.files)
    if found.layout is not None:
        yield "names", found.layout
    for kind in found.types:
        yield "stored", f"{kind.dtype}: {kind.tensors} tensors, {kind.bytes:,} bytes"
    yield from _tensors(found)
    if found.vocabulary is not None:
        yield "tokenizer", _vocabulary(found.vocabulary)
    if "tokenizer" in problems:
        yield "tokenizer", problems["tokenizer"]
    if "pictures" in problems:
        yield "pictures", problems["pictures"]
    yield "masks", found.masks
    yield from _memory(found)
    yield from _kind(found)
    if found.refusal is None:
        yield "load", "would open it"
    else:
        yield "load", f"would refuse it: {found.refusal}"


def _config(sizes: Sizes) -> Iterator[tuple[str, str]]:
    size = sizes.size or "of no published size"
    yield "family", f"{sizes.family}, {size}"
    yield "pictures", f"{sizes.resolution} px, {sizes.image_tokens} image tokens"
    caps = [
        f"{what} capped at {cap:g}"
        for what, cap in (("scores", sizes.attention_soft_cap), ("logits", sizes.logit_soft_cap))
        if cap is not None
    ]
    window = f"a window of {sizes.window} tokens in every layer that slides"
    more = [*(caps or ["no soft-caps"]), window if sizes.window else "no window"]
    heads = f"{sizes.heads} query heads, {sizes.key_value_heads} of keys and values"
    layers = f"{sizes.layers} layers of {sizes.hidden_size}"
    yield "decoder", f"{layers}; {heads}, head_dim {sizes.head_dim}; {', '.join(more)}"
    if sizes.packed is not None:
        yield "packed", f"for {sizes.packed}, by npvlm convert"


def _parameters(counts: Parameters, own_head: bool | None) -> str:
    head = {
        True: "an output layer of its own",
        False: "the embedding serves as the output layer (tied)",
        None: "whether the output layer is tied is not known",
    }[own_head]
    return (
        f"{counts.total:,}: image tower {counts.tower:,}, projector {counts.projector:,}, decoder "
        f"{counts.decoder:,}, embedding {counts.embedding:,}; {head}"
    )


def _files(files: list[File]) -> Iterator[tuple[str, str]]:
    for file in files:
        size = "" if file.bytes is None else f", {file.bytes:,} bytes"
        yield "file", f"{file.name}{size}{'' if file.problem is None else f': {file.problem}'}"


def _tensors(found: Inspection) -> Iterator[tuple[str, str]]:
    if "tensors" in found.problems:
        yield "tensors", found.problems["tensors"]
    elif found.differences is not None:
        said = found.differences.said()
        if not said:
            yield "tensors", "those that config.json asks for, and no others"
        for kind, names in said:
            yield "tensors", f"{len(names)} {kind}:"
            yield from (("", name) for name in grouped(names))


def _vocabulary(found: Vocabulary) -> str:
    ids = [
        f"{'newline' if piece == chr(10) else piece} {'none' if token is None else token}"
        for piece, token in found.ids.items()
    ]
    whose = "as Gemma's published one" if found.published else "a vocabulary of its own"
    return f"{found.file} (SentencePiece), {found.pieces} pieces, {whose}: {', '.join(ids)}"


def _memory(found: Inspection) -> Iterator[tuple[str, str]]:
    if found.needs:
        free = "not known here" if found.available is None else _size(found.available)
        working = _size(found.needs[0].working)
        yield "memory", f"free: {free}; a run takes about {working} beside the weights"
    for need in found.needs:
        yield "", f"{need.precision}: {_size(need.weights)} of weights, {_fits(need)}"


def _fits(need: Need) -> str:
    return {
        True: "fits here",
        False: "does not fit into what is free",
        None: "may fit",
    }[need.fits]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def _kind(found: Inspection) -> Iterator[tuple[str, str]]:
    kind = found.kind
    if kind.kind is None:
        yield "kind", f"not known: {kind.because}"
        return
    if kind.kind == "toy":
        yield "kind", kind.because
        yield "prompts", "; ".join(kind.prompts)
        return
    yield "kind", f"likely {kind.kind}: {kind.because}"
    yield "prompts", f"it likely knows: {'; '.join(kind.prompts)}"
    if kind.warning is not None:
        yield "", kind.warning
