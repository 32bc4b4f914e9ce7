"""Ends of a network as groups: input and output units, and other fixed indices that are too many to fold.

Nothing may permute these units without changing the function. A layer may all the same treat them alike, as it
does hidden units, when their positions are encoded in the features: fewer parameters, shared by all units, and
no limit to how many there are (NFN-NP of Zhou et al. 2023, arXiv:2302.14040, section 3).
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

from weightspace.spec import Cell, Dim, Frozen, Group, TensorSpec, WeightSpec


def free_ends(
    spec: WeightSpec, *, units: bool = True, wide: int | None = None
) -> tuple[WeightSpec, tuple[str, ...]]:
    """The spec with fixed indices as groups ``end0``, ``end1``, ...; and the names of these.

    Names that groups of the spec have already are passed over.

    Input and output units are the fixed indices that are the whole axis of inputs or outputs of a tensor. The
    tensors of one module share those of its outputs (weight and bias); all others have groups of their own.

    Args:
        spec: any weight space.
        units: whether input and output units become groups.
        wide: other fixed indices become groups if there are more than that many, and the widest of a cell as long
            as those that are left have more positions together than its square; None for none of them.

    Example:
        >>> freed, ends = free_ends(WeightSpec.mlp([2, 32, 10]))
        >>> ends
        ('end0', 'end1')
        >>> freed.tensors["layers.1.bias"].cells[0].dims[0].group
        'end1'
    """
    ends: dict[object, Group] = {}
    names = (name for name in (f"end{number}" for number in count()) if name not in spec.groups)

    def end(name: str, tensor: TensorSpec, place: int, at: int, dim: Dim) -> Dim:
        module = name.rpartition(".")[0]
        of_output = dim.axis == tensor.units.output and _is_unit(tensor, dim)
        key: object = (module, dim.size) if of_output else (name, place, at)
        if key not in ends:
            ends[key] = Group(next(names), dim.size)
        return replace(dim, group=ends[key].name)

    def opened(name: str, tensor: TensorSpec, place: int, cell: Cell) -> Cell:
        free = _freed(tensor, cell, units, wide)
        dims = (end(name, tensor, place, at, dim) if at in free else dim for at, dim in enumerate(cell.dims))
        return replace(cell, dims=tuple(dims))

    tensors = {
        name: replace(
            tensor, cells=tuple(opened(name, tensor, place, cell) for place, cell in enumerate(tensor.cells))
        )
        for name, tensor in spec.tensors.items()
    }
    groups = {**spec.groups, **{group.name: group for group in ends.values()}}
    freed = replace(spec, groups=Frozen(groups), tensors=Frozen(tensors), scalings=Frozen())
    return freed, tuple(group.name for group in ends.values())


def _is_unit(tensor: TensorSpec, dim: Dim) -> bool:
    return dim.axis in (tensor.units.output, tensor.units.input) and dim.size == tensor.shape[dim.axis]


def _freed(tensor: TensorSpec, cell: Cell, units: bool, wide: int | None) -> set[int]:
    """The dims of a cell that become groups."""
    fixed = [at for at, dim in enumerate(cell.dims) if dim.group is None]
    free = {at for at in fixed if units and _is_unit(tensor, cell.dims[at])}
    if wide is None:
        return free
    left = sorted(set(fixed) - free, key=lambda at: cell.dims[at].size)
    while left and (
        cell.dims[left[-1]].size > wide or math.prod(cell.dims[at].size for at in left) > wide**2
    ):
        free.add(left.pop())
    return free
