"""What a model's folder holds: each part is found out on its own, so that a broken one tells too.

Nothing is computed and no weight is read, only the headers of their files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from npvlm.api import open_model
from npvlm.config import PRECISIONS, Config, parse_config, read_config
from npvlm.errors import NpvlmError
from npvlm.files.big_vision import TOKENIZERS, BigVision, convert_command, open_big_vision
from npvlm.files.checkpoint import (
    Differences,
    Stored,
    by_name,
    checkpoint_files,
    find_differences,
    fit_rows,
    outside,
    read_header,
)
from npvlm.files.masks import find_mask_decoder, open_mask_decoder
from npvlm.files.memory import available_memory
from npvlm.files.names import EMBED_TOKENS, LM_HEAD, expected_shapes, spelling
from npvlm.files.needs import weight_bytes, working_bytes
from npvlm.files.pictures import read_preprocessor
from npvlm.files.tokenizer import IMAGE, load_tokenizer, piece_ids
from npvlm.opening import check_fits, find_place, read_vocabulary
from npvlm.work.kinds import Kind, likely_kind, raw_values

# Text type, width, layers, inner width, query heads, key/value heads, width of a head.
_SIZES = {
    ("gemma", 2048, 18, 16384, 8, 1, 256): "3B",
    ("gemma2", 2304, 26, 9216, 8, 4, 256): "3B",
    ("gemma2", 3584, 42, 14336, 16, 8, 256): "10B",
    ("gemma2", 4608, 46, 36864, 32, 16, 128): "28B",
}
_TOWER = (1152, 4304, 27, 16, 14)  # width, inner width, layers, heads and patches of all of them
# The ids that Gemma's vocabulary gives to what a PaliGemma needs.
GEMMA_IDS = {
    "<bos>": 2,
    "<eos>": 1,
    "\n": 108,
    "<loc0000>": 256000,
    "<seg000>": 257024,
    IMAGE: 257152,
}


@dataclass(frozen=True)
class Sizes:
    """What config.json says; `size` is that of a published model of these sizes, or None."""

    family: str
    size: str | None
    resolution: int
    image_tokens: int
    layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    window: int | None
    packed: str | None


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has; an output layer of its own counts to the total alone."""

    total: int
    tower: int
    projector: int
    decoder: int
    embedding: int


@dataclass(frozen=True)
class File:
    """A file of weights: its bytes, and why it cannot be read where it cannot."""

    name: str
    bytes: int | None
    problem: str | None


@dataclass(frozen=True)
class Type:
    """The tensors of one type."""

    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer: its pieces, and the ids of those that a PaliGemma needs."""

    file: str
    pieces: int
    ids: dict[str, int | None]
    published: bool


@dataclass(frozen=True)
class Need:
    """What a precision takes in memory; `fits` is None where the system does not say what is free.

    In float32 weights stay as they are stored.
    """

    precision: str
    weights: int
    working: int
    fits: bool | None


@dataclass(frozen=True)
class Inspection:
    """Everything found out; what could not be is None, and why stands in `problems`.

    refusal : the sentence with which `load` would refuse the folder, None where it would not
    masks : the file that `segment` takes its mask decoder from, or why there is none
    own_head : whether the files have an output layer beside the embedding table
    """

    model: str
    folder: str
    refusal: str | None
    problems: dict[str, str]
    sizes: Sizes | None
    parameters: Parameters | None
    files: list[File]
    layout: str | None
    types: list[Type]
    own_head: bool | None
    differences: Differences | None
    vocabulary: Vocabulary | None
    masks: str
    available: int | None
    needs: list[Need]
    kind: Kind

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


class _Problems(dict[str, str]):
    """What could not be found out: the part, and the sentence that says why."""

    def of(self, part: str, found: Any, *arguments: Any) -> Any:
        """Call `found`; where it refuses, note why and give None."""
        try:
            return found(*arguments)
        except NpvlmError as error:
            self.setdefault(part, str(error))
            return None


def _masks(folder: Path, config: Config | None) -> str:
    """The mask decoder's file, or the sentence that refuses it."""
    if config is not None and config.embedding_dim is not None:
        return "a ColPali paints none"
    try:
        file = find_mask_decoder(folder)
        open_mask_decoder(file)
    except NpvlmError as error:
        return str(error)
    return str(file)


def inspect(model: str) -> Inspection:
    """Find out what a model's folder holds.

    Parameters
    ----------
    model : the name of a bundled model, a folder, whole or broken, or an .npz file of big_vision

    Raises
    ------
    NpvlmError
        Where there is no such folder; nothing else is refused.
    """
    folder, problems = find_place(model), _Problems()
    if folder.is_file():
        return _inspect_npz(model, folder)
    config: Config | None = problems.of("config", read_config, folder)
    files, tensors = _read_files(folder, problems)
    stored: dict[str, Stored] | None = problems.of("tensors", by_name, tensors)
    whole = all(file.problem is None for file in files) and "weights" not in problems
    if config and stored and not whole:
        problems["tensors"] = "not compared with config.json, for not all files can be read"
    compared = config is not None and stored is not None and whole
    if config is not None and stored:
        config = fit_rows(config, stored)
    if config is not None:
        problems.of("tokenizer", load_tokenizer, folder, config)
        problems.of("pictures", read_preprocessor, folder, config)
    types, available = _types((t.dtype, t.nbytes) for t in tensors), available_memory()
    return Inspection(
        model=model,
        folder=str(folder),
        refusal=_refusal(model),
        problems=problems,
        sizes=_sizes(config) if config else None,
        parameters=_parameters(config, stored or {}) if config else None,
        files=files,
        layout=problems.of("tensors", _layout, tensors) if tensors else None,
        types=types,
        own_head=_has_own_head(stored) if stored else None,
        differences=find_differences(stored or {}, config) if compared and config else None,
        vocabulary=problems.of("tokenizer", find_vocabulary, folder, config),
        masks=_masks(folder, config),
        available=available,
        needs=_needs(config, types, available) if config else [],
        kind=likely_kind(model, folder, raw_values(folder)),
    )


def _inspect_npz(model: str, file: Path) -> Inspection:
    """What a checkpoint of big_vision holds, and the command that makes a model of it."""
    problems, available = _Problems(), available_memory()
    found: BigVision | None = problems.of("weights", open_big_vision, file)
    config: Config | None = None
    if found is not None:
        config = problems.of("config", parse_config, found.config, None, f"{file}: ")
    else:
        problems["config"] = "an .npz has none, and these arrays do not tell what it would say"
    types = _types(found.stored()) if found else []
    beside = [name for name in TOKENIZERS if (file.parent / name).is_file()]
    if not beside:
        problems["tokenizer"] = (
            f"no {' or '.join(TOKENIZERS)} beside it; copy one there, or name it to convert"
        )
    name = beside[0] if beside else TOKENIZERS[0]
    layout = None
    if found is not None:
        others = [f"{what} ({count})" for what, count in found.others.items()]
        layout = "; ".join(["those of big_vision", *(f"beside them {o}" for o in others)])
        layout += f"; put in order at each start, or once for all: {convert_command(file)}"
    return Inspection(
        model=model,
        folder=str(file.parent),
        refusal=_refusal_of_npz(file),
        problems=problems,
        sizes=_sizes(config) if config else None,
        parameters=_parameters(config, {}) if config else None,
        files=[File(file.name, file.stat().st_size, problems.get("weights"))],
        layout=layout,
        types=types,
        own_head=False if found else None,
        differences=Differences([], [], {}, {}) if found else None,
        vocabulary=(
            problems.of("tokenizer", find_vocabulary, file.parent, config, name) if beside else None
        ),
        masks=_masks(file.parent, config),
        available=available,
        needs=_needs(config, types, available) if config else [],
        kind=likely_kind(model, file.parent, {}),
    )


def _refusal(model: str) -> str | None:
    """What `load` says, word for word; with the definitions, which need no compiled kernel."""
    try:
        open_model(model, None, "numpy")
    except NpvlmError as error:
        return str(error)
    return None


def _refusal_of_npz(file: Path) -> str | None:
    """The same, without the weights: those of an .npz are read when it is loaded."""
    try:
        config, _ = read_vocabulary(file)
        check_fits(file, config, open_big_vision(file).weights, "float32")
    except NpvlmError as error:
        return str(error)
    return None


def _read_files(folder: Path, problems: _Problems) -> tuple[list[File], list[Stored]]:
    """The files of weights, and the tensors of those that can be read."""
    paths = problems.of("weights", checkpoint_files, folder)
    if paths is None:  # an index that names files which are not there: look at those that are
        paths = sorted(folder.glob("*.safetensors"))
    files, tensors = [], []
    for path in paths:
        problem = None
        try:
            tensors += read_header(path)
        except NpvlmError as error:
            problem = str(error)
        size = path.stat().st_size if path.is_file() else None
        files.append(File(path.name, size, problem))
    return files, tensors


def _types(tensors: Iterable[tuple[str, int]]) -> list[Type]:
    """Types from the type and the bytes of each tensor."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for dtype, nbytes in tensors:
        counts[dtype] += 1
        sizes[dtype] += nbytes
    return [Type(dtype, counts[dtype], size) for dtype, size in sizes.most_common()]


def _sizes(config: Config) -> Sizes:
    text, vision = config.text_config, config.vision_config
    decoder = (
        text.model_type,
        text.hidden_size,
        text.num_hidden_layers,
        text.intermediate_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.head_dim,
    )
    tower = (
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.patch_size,
    )
    role = "" if config.embedding_dim is None else "ColPali on "
    return Sizes(
        family=f"{role}PaliGemma {2 if text.model_type == 'gemma2' else 1}",
        size=_SIZES.get(decoder) if tower == _TOWER else None,
        resolution=vision.image_size,
        image_tokens=vision.num_patches,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        heads=text.num_attention_heads,
        key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        attention_soft_cap=text.attn_logit_softcapping,
        logit_soft_cap=text.final_logit_softcapping,
        window=text.sliding_window,
        packed=config.quantization,
    )


def _layout(tensors: list[Stored]) -> str:
    """Whose spelling the names have, and what stands around and beside them."""
    start, left = outside(tensors)
    words = [spelling(t.name[len(start) :] for t in tensors if t.name.startswith(start))]
    if start:
        words.append(f"under {start.removesuffix('.')}")
    if left:
        words.append(f"beside tensors that are no part of a PaliGemma ({len(left)})")
    return ", ".join(words)


def _has_own_head(stored: dict[str, Stored]) -> bool:
    return LM_HEAD in stored and EMBED_TOKENS in stored


def _parameters(config: Config, stored: dict[str, Stored]) -> Parameters:
    """Counted from config.json, and with the output layer that the files have of their own."""
    counts = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    if _has_own_head(stored):
        counts[LM_HEAD] = counts[EMBED_TOKENS]

    def part(start: str) -> int:
        return sum(count for name, count in counts.items() if name.startswith(start))

    embedding, head = counts[EMBED_TOKENS], counts.get(LM_HEAD, 0)
    return Parameters(
        total=sum(counts.values()),
        tower=part("vision_tower."),
        projector=part("multi_modal_projector."),
        decoder=part("language_model.") - embedding - head,
        embedding=embedding,
    )


def find_vocabulary(
    folder: Path, config: Config | None, name: str = "tokenizer.model"
) -> Vocabulary:
    """The ids as the files have them; `<image>` may stand in config.json alone."""
    count, ids = piece_ids(folder, GEMMA_IDS, name)
    if ids[IMAGE] is None and config is not None:
        ids[IMAGE] = config.image_token_index
    return Vocabulary(name, count, ids, ids == GEMMA_IDS)


def _needs(config: Config, types: list[Type], available: int | None) -> list[Need]:
    precisions = [config.quantization] if config.quantization else PRECISIONS
    number = 4 if types and types[0].dtype == "F32" else 2
    needs = []
    for precision in precisions:
        weights, working = weight_bytes(config, precision, number), working_bytes(config)
        fits = None if available is None else weights + working <= available
        needs.append(Need(precision, weights, working, fits))
    return needs
