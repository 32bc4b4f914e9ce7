"""Which moves are tried: units of every number and size into which the axes of the tensors factor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from weightspace.spec._types import WeightSpec
from weightspace.spec.maximality._moves import Move
from weightspace.spec.tracing._program import Program, call, operator_name

MANY = 4  # windows of one axis that move by themselves; of more, the first and all others
CUTS = {"split", "split_with_sizes", "unsafe_split", "chunk", "slice", "narrow"}

Segments = dict[int, set[tuple[int, int]]]
"""Where axes are joined or cut: (start, length) by the size of the whole axis."""


class _Axis(NamedTuple):
    """An axis of a tensor, and the parts of it that units may fill."""

    tensor: str
    axis: int
    parts: frozenset[tuple[int, int]]

    def strides(self, count: int) -> set[int]:
        """Lengths of the unit blocks of which ``count`` fill a window of a part."""
        windows = {length // count for _, length in self.parts if length % count == 0}
        return {stride for window in windows for stride in range(1, window + 1) if window % stride == 0}

    def moves(self, count: int, stride: int, units: tuple[int, ...]) -> list[Move]:
        """The same units in every window; where the stride does not fit, those of the largest that does."""
        possible = self.strides(count)
        if not possible:
            return []
        step = stride if stride in possible else max(possible)
        window = count * step
        fitting = [(start, length) for start, length in self.parts if length % window == 0]
        starts = sorted({at for start, length in fitting for at in range(start, start + length, window)})
        if any(later - earlier < window for earlier, later in pairwise(starts)):
            starts = starts[:1]
        parts = [(start,) for start in starts] if len(starts) <= MANY else [(starts[0],), tuple(starts[1:])]
        return [Move(self.tensor, self.axis, part, step, units) for part in parts]


def families(spec: WeightSpec, program: Program, *, pairs: bool) -> Iterator[list[Move]]:
    """Moves that commute: of one number of units, one stride where an axis allows it, and the same units.

    Args:
        spec: whose tensors move.
        program: the graph, which shows where axes are joined and cut.
        pairs: whether two units are exchanged (the first two, the last two, the first and the last), or the
            first one is moved alone.
    """
    segments = _segments(program)
    axes = [
        _Axis(name, axis, frozenset({(0, size), *segments.get(size, ())}))
        for name, tensor in spec.tensors.items()
        if name in program.names.values()
        for axis, size in enumerate(tensor.shape)
        if size > 1
    ]
    lengths = {length for axis in axes for _, length in axis.parts}
    seen: set[frozenset[Move]] = set()
    for count in sorted({d for n in lengths for d in range(2, n + 1) if n % d == 0}, reverse=True):
        strides = sorted({stride for axis in axes for stride in axis.strides(count)})
        units = sorted({(0, 1), (count - 2, count - 1), (0, count - 1)}) if pairs else [(0,)]
        for stride, chosen in product(strides, units):
            family = [move for axis in axes for move in axis.moves(count, stride, chosen)]
            if frozenset(family) not in seen:
                seen.add(frozenset(family))
                yield family


def _segments(program: Program) -> Segments:
    found: Segments = {}
    for node in program.nodes:
        name = operator_name(node) if node.op == "call_function" else ""
        if name == "cat":
            _note_joined(node, found)
        elif name in CUTS:
            _note_cut(node, found)
    return found


def _note_joined(node: fx.Node, found: Segments) -> None:
    whole, parts = node.meta["val"].shape, [source.meta["val"].shape for source in node.all_input_nodes]
    for axis, size in enumerate(whole):
        lengths = [int(part[axis]) for part in parts if len(part) == len(whole)]
        if sum(lengths) == size:
            starts = [sum(lengths[:at]) for at in range(len(lengths))]
            found.setdefault(int(size), set()).update(zip(starts, lengths, strict=True))


def _note_cut(node: fx.Node, found: Segments) -> None:
    """Cut the positions of the entries instead of the entries."""
    source = node.all_input_nodes[0]
    shape = tuple(map(int, source.meta["val"].shape))
    cut = call(node, {source.name: torch.arange(int(np.prod(shape))).reshape(shape)})
    for part in [cut] if isinstance(cut, Tensor) else cut:
        if part.numel():
            starts = np.unravel_index(int(part.flatten()[0]), shape)
            for size, start, length in zip(shape, starts, part.shape, strict=True):
                found.setdefault(size, set()).add((int(start), int(length)))
