"""The ways in which a port's array may hold a stage: other axes, other conventions, equally right.

Nothing here makes a wrong port right: tokens and patches keep their order, and no factor is undone
but the scale that some ports give their queries beforehand.

Axis letters: N pictures · c colours · y, x rows and columns of pixels or patches · P patches ·
T tokens · D width of a row · H heads · K key/value heads · G = H // K · d width of a head ·
n stages side by side · m heads of all of them · F intermediate_size · V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from npvlm.config import Config
from npvlm.errors import NpvlmError
from npvlm.model import ops
from npvlm.model.weights import Array
from npvlm.porting.stages import TOWER

# Columns that a vocabulary may be padded by: tables are rounded up to a multiple of some block.
MOST_PADDING = 1024
HEADS = ("q_proj", "k_proj", "v_proj", "attend", "q_rope", "k_rope")
GROUPED = ("k_proj", "v_proj", "k_rope")

# Conventions that queries and keys of a correct port share.
FROM_ZERO = "positions counted from 0"
PAIRS = "RoPE pairs instead of halves"


@dataclass(frozen=True, eq=False)
class Layout:
    """A stage read in one way: the way, "" if it needed none, and the stage in its own shape."""

    how: str
    value: Array


@dataclass(frozen=True)
class Axes:
    """The axes of an array, as finely as ports tell them apart.

    names : in the stage's own order
    sizes : by name
    orders : how else they may come, and what that is called
    growing : the axis that may be longer, by padding
    by_columns : whether an array in column-major order can be told from a mistake
    """

    names: str
    sizes: dict[str, int]
    orders: tuple[tuple[str, str], ...] = ()
    growing: str | None = None
    by_columns: bool = True


def layouts(
    value: Array,
    stage: str,
    shape: tuple[int, ...],
    config: Config,
    part: tuple[str, ...] | None = None,
) -> Iterator[Layout]:
    """Every way to read an array as a stage, the plainest first; no two give the same numbers.

    Parameters
    ----------
    value : the port's array
    stage : full name
    shape : of the stage in the reference
    part : the stages that lie side by side in the array, where it is fused

    Yields
    ------
    Layout, whose value has the given shape.
    """
    found = _conventional(value, stage, shape, config, part)
    try:
        first = next(found, None)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise NpvlmError(
            f"the reference says that {stage} is {list(shape)[:9]}, expected sides of a model with "
            "its config; write the trace anew."
        ) from error
    if first is None:
        return
    yield first
    seen = {_digest(first.value)}
    for layout in found:
        digest = _digest(layout.value)
        if digest not in seen:
            seen.add(digest)
            yield layout


def _digest(value: Array) -> bytes:
    """The same for equal numbers: of whatever type, and for both zeros."""
    wide = np.result_type(value.dtype, np.float32)
    return hashlib.sha256(np.ascontiguousarray(value, wide) + wide.type(0)).digest()


def _said(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


# Conventions: the same thing in other numbers


def _conventional(
    value: Array,
    stage: str,
    shape: tuple[int, ...],
    config: Config,
    part: tuple[str, ...] | None,
) -> Iterator[Layout]:
    """Layouts of the axes alone, then the same with each convention undone."""
    plain = []
    for how, arranged in _arranged(value, stage, config, shape, part):
        plain.append(Layout(how, arranged))
        yield plain[-1]
    if stage == "positions":
        for one in plain:
            yield Layout(_said(one.how, "counted from 0"), one.value + 1)
    if not stage.endswith(("q_proj", "k_proj", "q_rope", "k_rope")):
        return
    for one in plain:
        yield from _turned(one, stage, config)


def _turned(one: Layout, stage: str, config: Config) -> Iterator[Layout]:
    """Queries and keys under other conventions of RoPE and of the scale, and all of them at once.

    In the tower, which has no RoPE, the scale alone.
    """
    tower, text = stage.startswith(TOWER), config.text_config
    own = config.vision_config if tower else text
    scale = own.head_dim**-0.5 if tower else text.attention_scale
    T, d = len(one.value), own.head_dim
    wide = one.value.dtype if one.value.dtype.itemsize >= 4 else np.dtype(np.float32)
    heads = one.value.astype(wide if wide.kind == "f" else np.float32, copy=False)
    heads = heads.reshape(T, -1, d)

    # What to turn each token back by, in positions.
    turns: list[tuple[str, Array | None]] = [("", None)]
    if stage.endswith("_rope"):
        turns.append((FROM_ZERO, np.ones(T, np.int64)))
    elif not tower:
        turns.append(("taken after RoPE", -np.arange(1, T + 1)))
        turns.append((f"taken after RoPE, {FROM_ZERO}", -np.arange(T)))
    scales = [("", 1.0)]
    if "q_" in stage.rpartition(".")[2]:
        scales.append(("times the attention scale already: attend must agree", scale))
    pairs = ["", *(() if tower else (PAIRS,))]

    for scaled, factor in scales:
        for turned, turn in turns:
            for paired in pairs:
                how = _said(paired, turned, scaled)
                if not how:
                    continue  # as it is
                x = np.concatenate([heads[..., ::2], heads[..., 1::2]], -1) if paired else heads
                with np.errstate(over="ignore", invalid="ignore"):  # any array may be tried
                    x = x if turn is None else ops.rope(x, turn, text.rope_theta)
                    x = x if factor == 1.0 else x / x.dtype.type(factor)
                yield Layout(_said(one.how, how), x.reshape(one.value.shape))


# Axes: the same numbers in another arrangement


def _arranged(
    value: Array,
    stage: str,
    config: Config,
    shape: tuple[int, ...],
    part: tuple[str, ...] | None,
) -> Iterator[tuple[str, Array]]:
    """The stage in its own shape out of each arrangement that the array's sides allow."""
    if part is not None:
        for how, cut in _unfused(value, stage, config, shape, part):
            yield how, cut.reshape(shape)
        return
    if stage == "language_model.logits":
        yield from _last_row(value, shape)
        return
    axes = _axes(stage, shape, config)
    for how, read in _readings(value, axes, stage, shape):
        yield how, read.reshape(shape)
    text = config.text_config
    K, G = text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads
    if G > 1 and stage.endswith(GROUPED) and not stage.startswith(TOWER):
        wider = Axes(axes.names, axes.sizes | {"H": K * G}, axes.orders, axes.growing)
        for how, read in _readings(value, wider, stage, None):
            groups = read.reshape(len(read), K, G, -1)
            if (groups == groups[:, :, :1]).all():
                said = _said(how, "keys repeated for every query head")
                yield said, groups[:, :, 0].reshape(shape)


def _axes(stage: str, shape: tuple[int, ...], config: Config) -> Axes:
    """The axes of a stage and the orders in which ports have them."""
    tower = stage.startswith(TOWER)
    if stage.startswith("image."):
        sizes = dict(zip("yxc", shape, strict=True))
        return Axes("yxc", sizes, (("cyx", "channels first"),), by_columns=False)
    if stage == "pixel_values":
        sizes = dict(zip("Ncyx", shape, strict=True))
        return Axes("Ncyx", sizes, (("Nyxc", "channels last"),), by_columns=False)
    if tower and len(shape) == 3 and not stage.endswith(HEADS):
        # A port that forgets to bring the channels last reads this by columns.
        side = math.isqrt(shape[1])
        sizes = {"N": shape[0], "y": side, "x": side, "D": shape[2]}
        return Axes("NyxD", sizes, (("NDyx", "channels first"),), by_columns=False)
    if len(shape) == 1:
        return Axes("T", {"T": shape[0]}, growing="T")
    growing = None if tower or stage == "multi_modal_projector" else "T"
    if stage.endswith(HEADS):
        d = config.vision_config.head_dim if tower else config.text_config.head_dim
        sizes = {"T": shape[0], "H": math.prod(shape[1:]) // d, "d": d}
        orders = (("HTd", "heads first"), ("HdT", "tokens last"), ("dHT", "axes reversed"))
        return Axes("THd", sizes, orders, growing)
    return Axes("TD", {"T": shape[0], "D": shape[1]}, (("DT", "transposed"),), growing)


def _readings(
    value: Array, axes: Axes, stage: str, shape: tuple[int, ...] | None
) -> Iterator[tuple[str, Array]]:
    """An array read with each order of its axes, then with what else may be odd about it.

    The values have one side for each axis, in the stage's own order.
    """
    fits = False
    for order, how in ((axes.names, ""), *axes.orders):
        for cut, read in _read(value, order, axes, stage):
            if order == axes.names:
                fits = True
                how = _plainly(value.shape, shape, stage)
            yield _said(how, cut), read
    if sum(side > 1 for side in value.shape) < 2:
        return
    turned = value.reshape(value.shape[::-1])
    if not fits:
        for order, how in ((axes.names, ""), *axes.orders[:1]):
            for cut, read in _read(turned, order, axes, stage):
                yield _said(how, "its sides named from the inside out, as ggml does", cut), read
    elif axes.by_columns:
        for cut, read in _read(turned.T, axes.names, axes, stage):
            yield _said("stored by columns (Fortran order)", cut), read


def _plainly(sides: tuple[int, ...], shape: tuple[int, ...] | None, stage: str) -> str:
    """What to call an array whose numbers lie as they do in the stage."""
    if shape is None or sides == shape:
        return ""
    own, wanted = (sum(side > 1 for side in known) for known in (sides, shape))
    what = "heads" if stage.endswith(HEADS) else "axes"
    if own > wanted:
        return f"{what} apart"
    if own < wanted:
        return "flat" if own == 1 else f"{what} side by side"
    if len(sides) == len(shape):
        return ""  # but for padding
    return "with a batch axis" if len(sides) > len(shape) else "without an axis of 1"


def _read(value: Array, order: str, axes: Axes, stage: str) -> Iterator[tuple[str, Array]]:
    """An array whose axes come in this order; with padding, both ways to be without it."""
    sizes, flat = dict(axes.sizes), sum(side > 1 for side in value.shape) < 2
    wanted = sizes.get(axes.growing or "", 0)
    if axes.growing and (not flat or len(order) == 1):
        rest = math.prod(size for axis, size in sizes.items() if axis != axes.growing)
        sizes[axes.growing] = max(wanted, value.size // rest)
    if not _divides(value.shape, order, axes.names, sizes):
        return
    read = value.reshape([sizes[axis] for axis in order])
    read = read.transpose([order.index(axis) for axis in axes.names])
    padded = len(read) if axes.growing else 0
    if padded <= wanted:
        yield "", read
        return
    for which, kept, extra in (
        ("first", read[:wanted], read[wanted:]),
        ("last", read[-wanted:], read[:-wanted]),
    ):
        if stage != "input_ids" or not extra.any():  # what is no padding is a mistake
            yield f"the {which} {wanted} of {padded} tokens", kept


def _divides(sides: Sequence[int], order: str, names: str, sizes: dict[str, int]) -> bool:
    """Whether an array's sides are these axes in this order, neighbours taken together or not.

    Axes that are no neighbours in the stage may not be one side: a port that takes them together
    has mixed them up. A flat array says nothing of that.
    """
    left = [axis for axis in order if sizes[axis] != 1]
    own = [axis for axis in names if sizes[axis] != 1]
    sides = [side for side in sides if side != 1]
    for side in sides:
        run: list[str] = []
        while left and math.prod(sizes[axis] for axis in run) < side:
            run.append(left.pop(0))
        together = "".join(run) in "".join(own) or len(sides) == 1
        if math.prod(sizes[axis] for axis in run) != side or not together:
            return False
    return not left


def _last_row(value: Array, shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """Scores of the last token: alone or behind all others', with columns that mean nothing."""
    V, sides = shape[-1], [side for side in value.shape if side != 1]
    readings = [("", value)]
    if len(sides) == 2:
        readings.append(("transposed", value.reshape(sides).T))
        reverse = "its sides named from the inside out, as ggml does"
        readings.append((reverse, value.reshape(sides[::-1])))
    for how, read in readings:
        sides = [side for side in read.shape if side != 1] or [1]
        if len(sides) > 2 or not V <= sides[-1] <= V + MOST_PADDING:
            continue
        rows = read.reshape(-1, sides[-1])
        last = "the last row of [T, V]" if len(rows) > 1 else ""
        extra = f"the first {V} of {sides[-1]} columns" if sides[-1] > V else ""
        if not (how or last or extra):
            how = _plainly(value.shape, shape, "")
        yield _said(how, last, extra), rows[-1:, :V].reshape(shape)


# Arrays that hold several stages


def _unfused(
    value: Array, stage: str, config: Config, shape: tuple[int, ...], part: tuple[str, ...]
) -> Iterator[tuple[str, Array]]:
    """One stage out of an array that holds several: side by side, stacked, or head by head."""
    tower, word = stage.startswith(TOWER), stage.rpartition(".")[2]
    own, text = config.vision_config if tower else config.text_config, config.text_config
    growing, T, at = None if tower else "T", shape[0], part.index(word)
    said = f"{word} out of a fused {' + '.join(part)}"
    if word in ("gate_proj", "up_proj"):
        d, counts, group = text.intermediate_size, [1] * len(part), [1] * len(part)
    else:
        d, H = own.head_dim, own.num_attention_heads
        K = H if tower else text.num_key_value_heads
        counts = [H if name == "q_proj" else K for name in part]
        group = [count // K for count in counts]

    def columns(sizes: list[int]) -> slice:
        return slice(sum(sizes[:at]), sum(sizes[: at + 1]))

    side_by_side = Axes(
        "Tmd",
        {"T": T, "m": sum(counts), "d": d},
        (("mTd", "heads first"), ("mdT", "tokens last")),
        growing,
    )
    for how, read in _readings(value, side_by_side, stage, None):
        yield _said(said, how), read[:, columns(counts)]
    if len(set(counts)) == 1:
        sizes = {"T": T, "n": len(part), "H": counts[0], "d": d}
        stacked = Axes(
            "TnHd", sizes, (("nTHd", "stacked"), ("nHTd", "stacked, heads first")), growing
        )
        for order, how in stacked.orders:
            for cut, read in _read(value, order, stacked, stage):
                yield _said(said, how, cut), read[:, at]
    if word in ("gate_proj", "up_proj"):
        woven = Axes("TFn", {"T": T, "F": d, "n": len(part)}, growing=growing)
        for cut, read in _read(value, woven.names, woven, stage):
            yield _said(said, "column by column", cut), read[..., at]
        return
    sizes = {"T": T, "K": counts[-1], "G": sum(group), "d": d}
    woven = Axes("TKGd", sizes, growing=growing)
    for cut, read in _read(value, woven.names, woven, stage):
        yield _said(said, "head by head", cut), read[:, :, columns(group)]
