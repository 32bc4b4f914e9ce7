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
) -> tuple[WeightSpec, dict[str, str]]:
    """The spec with fixed indices as groups ``end0``, ``end1``, ...; and what each of these is.

    Names that groups of the spec have already are passed over.

    Input and output units are the fixed indices that are alone, in their cell, on the axis of inputs or outputs of a
    tensor. The tensors of one module share those of their outputs (weight and bias), the cells of one tensor those of
    its inputs (gates). What a later layer reads beside hidden units is taken to be an input of the network that has as
    many units.

    Args:
        spec: any weight space.
        units: whether input and output units become groups.
        wide: other fixed indices become groups if there are more than that many, and the widest of a cell as long
            as those that are left have more positions together than its square; None for none of them.

    Returns:
        The freed spec, and ``"input"``, ``"output"`` or ``"wide"`` by the name of each new group.

    Example:
        >>> freed, ends = free_ends(WeightSpec.mlp([2, 32, 10]))
        >>> ends
        {'end0': 'input', 'end1': 'output'}
        >>> freed.tensors["layers.1.bias"].cells[0].dims[0].group
        'end1'
    """
    found = _Ends(spec)
    tensors = {}
    for name, tensor in spec.tensors.items():
        cells = []
        for place, cell in enumerate(tensor.cells):
            free = _freed(tensor, cell, units, wide)
            dims = (
                replace(dim, group=found.group(name, tensor, cell, (place, at))) if at in free else dim
                for at, dim in enumerate(cell.dims)
            )
            cells.append(replace(cell, dims=tuple(dims)))
        tensors[name] = replace(tensor, cells=tuple(cells))
    groups = {**spec.groups, **{group.name: group for group in found.groups.values()}}
    freed = replace(spec, groups=Frozen(groups), tensors=Frozen(tensors), scalings=Frozen())
    return freed, found.roles


class _Ends:
    """New groups as they are found: indices of one key share a group."""

    def __init__(self, spec: WeightSpec) -> None:
        self.names = (name for name in (f"end{number}" for number in count()) if name not in spec.groups)
        self.groups: dict[object, Group] = {}
        self.roles: dict[str, str] = {}
        self.inputs: dict[int, object] = {}

    def group(self, name: str, tensor: TensorSpec, cell: Cell, place: tuple[int, int]) -> str:
        """Name of the group of a fixed index: the ``place[1]``-th of the cell."""
        dim = cell.dims[place[1]]
        role = _role(tensor, cell, dim) or "wide"
        first = cell.offset // math.prod(tensor.shape[dim.axis + 1 :]) % tensor.shape[dim.axis]
        owner: object = {"output": name.rpartition(".")[0], "input": name, "wide": (name, *place)}[role]
        key: object = (role, owner, dim.size, first)
        if role == "input" and dim.size == tensor.shape[dim.axis]:
            self.inputs.setdefault(dim.size, key)
        elif role == "input":
            key = self.inputs.get(dim.size, key)
        if key not in self.groups:
            self.groups[key] = Group(next(self.names), dim.size)
            self.roles[self.groups[key].name] = role
        return self.groups[key].name


def _role(tensor: TensorSpec, cell: Cell, dim: Dim) -> str | None:
    """What a fixed index counts, if it counts units."""
    alone = sum(other.axis == dim.axis for other in cell.dims) == 1
    if alone and dim.axis == tensor.units.output:
        return "output"
    return "input" if alone and dim.axis == tensor.units.input else None


def _freed(tensor: TensorSpec, cell: Cell, units: bool, wide: int | None) -> set[int]:
    """The dims of a cell that become groups."""
    fixed = [at for at, dim in enumerate(cell.dims) if dim.group is None]
    free = {at for at in fixed if units and _role(tensor, cell, cell.dims[at])}
    if wide is None:
        return free
    left = sorted(set(fixed) - free, key=lambda at: cell.dims[at].size)
    while left and (
        cell.dims[left[-1]].size > wide or math.prod(cell.dims[at].size for at in left) > wide**2
    ):
        free.add(left.pop())
    return free
