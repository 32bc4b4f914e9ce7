"""What a reader is told about a spec, before it becomes text or a figure: rows of tensors, notes on groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from weightspace.spec._types import Cell, Dim, Scaling, TensorSpec, WeightSpec

MOST_TERMS = 8  # of a sum of cells that are written out
# Okabe and Ito's colours (2008) without black and yellow, and two of Tol's: told apart by the colour-blind
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
_MEANING = {"positive": "positive scaling", "sign": "sign flip", "phase": "phase shift"}


class Piece(NamedTuple):
    """A part of a label; ``group`` is the group that it names."""

    text: str
    group: str | None = None


class Edge(NamedTuple):
    """An axis of a tensor that runs over a group."""

    axis: int
    group: str


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor, or the tensors of one module that follow each other and have the same axes.

    Args:
        module: what the names have in common: the path of the module, ``""`` at the top.
        leaves: what follows it, one per tensor.
        lines: the cells as text, one line each.
        edges: every axis that runs over a group, once per group.
        tied: other names under which they are stored.
    """

    module: str
    leaves: tuple[str, ...]
    lines: tuple[tuple[Piece, ...], ...]
    edges: tuple[Edge, ...]
    tied: tuple[str, ...]

    @property
    def label(self) -> str:
        """The names of its tensors: ``norm.weight``, or ``norm: weight, bias``."""
        if len(self.leaves) == 1:
            return ".".join(filter(None, (self.module, self.leaves[0])))
        return ": ".join(filter(None, (self.module, ", ".join(self.leaves))))

    @property
    def text(self) -> str:
        """The cells as plain text."""
        return " ".join("".join(piece.text for piece in line) for line in self.lines)


def rows_of(spec: WeightSpec) -> list[Row]:
    """The tensors in their order; neighbours of one module with equal axes share a row."""

    def alike(entry: tuple[str, TensorSpec]) -> tuple[str, tuple[int, ...], tuple[Cell, ...]]:
        return entry[0].rpartition(".")[0], entry[1].shape, entry[1].cells

    return [
        _row(module, list(members)) for (module, _, _), members in groupby(spec.tensors.items(), key=alike)
    ]


def _row(module: str, members: Sequence[tuple[str, TensorSpec]]) -> Row:
    tensor = members[0][1]
    dims = sorted((dim for cell in tensor.cells for dim in cell.dims), key=lambda dim: dim.axis)
    return Row(
        module,
        tuple(name.rpartition(".")[2] for name, _ in members),
        tuple(tuple(line) for line in cell_lines(tensor)),
        tuple(dict.fromkeys(Edge(dim.axis, dim.group) for dim in dims if dim.group is not None)),
        tuple(alias for _, member in members for alias in member.aliases),
    )


# -- cells as text -----------------------------------------------------------------------------------------


def cell_lines(tensor: TensorSpec) -> list[list[Piece]]:
    """The cells of a tensor, one entry per axis: ``[heads × features, stream]``.

    Cells that differ on one axis alone are its sum: ``[out, left + right]``, ``[heads × (query + key), in]``.
    """
    cells = sorted(tensor.cells, key=lambda cell: cell.offset)
    axes = range(len(tensor.shape))
    differing = [axis for axis in axes if len({_place(tensor, cell, axis) for cell in cells}) > 1]
    if len(differing) < 2:
        return [
            _bracketed(
                [
                    _sum(cells, axis) if axis in differing else _product(_factors(cells[0], axis))
                    for axis in axes
                ]
            )
        ]
    entries = [[_product(_factors(cell, axis)) for axis in axes] for cell in cells]
    return _capped([_bracketed(line) for line in entries])


def _place(tensor: TensorSpec, cell: Cell, axis: int) -> tuple[int, tuple[Dim, ...]]:
    """Where a cell starts on an axis, and its dims there."""
    start = cell.offset // math.prod(tensor.shape[axis + 1 :]) % tensor.shape[axis]
    return start, tuple(_factors(cell, axis))


def _factors(cell: Cell, axis: int) -> list[Dim]:
    """The dims of a cell on one axis, the slowest first."""
    return sorted((dim for dim in cell.dims if dim.axis == axis), key=lambda dim: -dim.stride)


def _sum(cells: Sequence[Cell], axis: int) -> list[Piece]:
    """What the axis is a sum of; a slower dim inside which the terms lie side by side is written once."""
    terms = [_factors(cell, axis) for cell in cells]
    apart = cells[-1].offset - cells[0].offset
    shared = 0
    for level in zip(*terms, strict=False):
        if any(dim != level[0] for dim in level) or apart >= level[0].stride:
            break
        shared += 1
    inner = list(_joined(_capped([_product(term[shared:]) for term in terms]), " + "))
    return [*_product(terms[0][:shared]), Piece(" × ("), *inner, Piece(")")] if shared else inner


def _capped(parts: list[list[Piece]]) -> list[list[Piece]]:
    if len(parts) <= MOST_TERMS + 1:
        return parts
    return [*parts[:MOST_TERMS], [Piece(f"… {len(parts) - MOST_TERMS} more")]]


def _product(dims: Sequence[Dim]) -> list[Piece]:
    factors = [[Piece(dim.group, dim.group) if dim.group else Piece(str(dim.size))] for dim in dims]
    return list(_joined(factors or [[Piece("1")]], " × "))


def _bracketed(entries: Sequence[Sequence[Piece]]) -> list[Piece]:
    return [Piece("["), *_joined(entries, ", "), Piece("]")]


def _joined(parts: Iterable[Sequence[Piece]], separator: str) -> Iterator[Piece]:
    for index, part in enumerate(parts):
        if index:
            yield Piece(separator)
        yield from part


# -- groups ------------------------------------------------------------------------------------------------


def outer_of(spec: WeightSpec, group: str) -> str | None:
    """The innermost of the groups within which ``group`` lies; None when it lies in none."""
    within = spec.groups[group].within
    return max(within, key=lambda name: len(spec.groups[name].within), default=None)


def nested_order(spec: WeightSpec) -> list[tuple[str, int]]:
    """The groups in forward order, each followed by those within it; beside each how deep it lies."""
    inner: dict[str | None, list[str]] = {}
    for name in spec.groups:
        inner.setdefault(outer_of(spec, name), []).append(name)

    def below(outer: str | None, depth: int) -> Iterator[tuple[str, int]]:
        for name in inner.get(outer, ()):
            yield name, depth
            yield from below(name, depth + 1)

    return list(below(None, 0))


def size_text(spec: WeightSpec, group: str) -> str:
    """``64 units``; for a nested group how many each outer unit has."""
    size, outer = spec.groups[group].size, outer_of(spec, group)
    units = "1 unit" if size == 1 else f"{size:,} units"
    return units if outer is None else f"{units} in each of {' × '.join(spec.groups[group].within)}"


def notes_of(spec: WeightSpec, group: str) -> list[str]:
    """The activation of a group and how its units may be scaled."""
    activation = spec.groups[group].activation
    scalings = [_scaling_text(s) for s in spec.scalings.values() if s.group == group]
    return [*([activation] if activation else []), *dict.fromkeys(scalings)]


def _scaling_text(scaling: Scaling) -> str:
    step = f" (k × {scaling.shift:.4g})" if scaling.kind == "phase" else ""
    return _MEANING[scaling.kind] + step


def colours_of(spec: WeightSpec) -> dict[str, str]:
    """A colour per group, told apart by the colour-blind; groups that meet in a tensor differ while they can."""
    meets: dict[str, set[str]] = {name: set() for name in spec.groups}
    for row in rows_of(spec):
        met = {edge.group for edge in row.edges}
        for name in met:
            meets[name] |= met
    chosen: dict[str, str] = {}
    for index, name in enumerate(spec.groups):
        turned = PALETTE[index % len(PALETTE) :] + PALETTE[: index % len(PALETTE)]
        taken = [chosen[other] for other in meets[name] if other in chosen]
        chosen[name] = min(turned, key=taken.count)
    return chosen


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on ``colour``."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"
