"""What a spec has: whether one of its elements does what moves do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._elements import act
from weightspace.spec._types import Cell, Element, WeightSpec, cell_index
from weightspace.spec.maximality._graph_pass import Span
from weightspace.spec.maximality._moves import Change


def can_reorder(spec: WeightSpec, changes: Mapping[str, Change]) -> bool:
    """Whether an element of the spec reorders all tensors in this way."""
    element: Element = {}
    for name, change in changes.items():
        for cell in spec.tensors[name].cells:
            if not _note_units(element, cell, change):
                return False
    places = {name: torch.arange(tensor.numel).reshape(tensor.shape) for name, tensor in spec.tensors.items()}
    try:
        moved = act(spec, element, places)
    except (SpecError, IndexError, RuntimeError):  # what was read is no permutation of a group
        return False
    return all(np.array_equal(moved[name].reshape(-1), change) for name, change in changes.items())


def _note_units(element: Element, cell: Cell, change: Change) -> bool:
    """Read off a cell where its units come from; False if its entries come from another cell."""
    index = cell_index(cell)
    place = np.full(len(change), -1)
    place[index.reshape(-1)] = np.arange(cell.numel)
    source = place[change[index]]
    if (source < 0).any():
        return False
    digits = np.unravel_index(source, cell.sizes) if cell.dims else ()
    for at, dim in enumerate(cell.dims):
        if dim.group is not None:
            table = _along(digits[at], (*dim.parents, at))
            known = element.get(dim.group)
            if known is None or (known == torch.arange(known.shape[-1])).all():
                element[dim.group] = torch.from_numpy(table)
    return True


def _along(digits: Change, positions: Sequence[int]) -> Change:
    """A table over some dims of a cell, in their order, where the others are at 0."""
    first = digits[tuple(slice(None) if at in positions else 0 for at in range(digits.ndim))]
    kept = sorted(positions)
    return np.ascontiguousarray(np.transpose(first, [kept.index(at) for at in positions]))


class SignSpan:
    """The changes of sign of all tensors that a spec can make."""

    def __init__(self, spec: WeightSpec) -> None:
        self._span = Span()
        for pattern in patterns(spec, "sign") < 0:
            self._span.add(_bits(pattern.numpy()))

    def can_flip(self, changes: Mapping[str, Change]) -> bool:
        """Whether these are among them."""
        return _bits(np.concatenate(list(changes.values())) < 0) in self._span


def _bits(pattern: Change) -> int:
    return int.from_bytes(np.packbits(pattern).tobytes(), "big")


def patterns(spec: WeightSpec, kind: Literal["sign", "positive"]) -> Tensor:
    """What every unit of every scaling multiplies the parameters by: -1, or e: (scalings x units, parameters)."""
    ones = {name: torch.ones(tensor.shape, dtype=torch.float64) for name, tensor in spec.tensors.items()}
    found = [torch.empty(0, spec.num_parameters, dtype=torch.float64)]
    for name, scaling in spec.scalings.items():
        if scaling.kind == kind:
            sizes = [spec.groups[at].size for at in (*spec.groups[scaling.group].within, scaling.group)]
            eye = torch.eye(math.prod(sizes), dtype=torch.float64).reshape(-1, *sizes)
            values = eye.exp() if kind == "positive" else 1.0 - 2.0 * eye
            found.append(spec.flatten(act(spec, {name: values}, ones)))
    return torch.cat(found)
