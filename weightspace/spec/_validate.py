"""Consistency of a spec, checked once when it is built."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np

from weightspace.errors import SpecError
from weightspace.spec._types import Cell, Exponent, Scaling, TensorSpec, WeightSpec, cell_index


def validate(spec: WeightSpec) -> None:
    """Raise SpecError for the first contradiction found in ``spec``."""
    _check_groups(spec)
    for name, tensor in spec.tensors.items():
        for cell in tensor.cells:
            _check_cell(spec, name, cell)
        _check_partition(name, tensor)
        _check_orientation(name, tensor)
    _check_names(spec)
    for name, scaling in spec.scalings.items():
        _check_scaling(spec, name, scaling)


def _check_orientation(name: str, tensor: TensorSpec) -> None:
    axes = [axis for axis in (tensor.units.output, tensor.units.input) if axis is not None]
    fits = all(type(axis) is int and 0 <= axis < len(tensor.shape) for axis in axes)
    if not fits or len(set(axes)) < len(axes) or not tensor.units.fan_in >= 1:
        raise SpecError(
            f"tensor {name!r}: expected an orientation with two axes of {list(tensor.shape)} and a fan_in of at least "
            f"1, found {tensor.orientation}"
        )


def _check_names(spec: WeightSpec) -> None:
    names = [*spec.tensors, *spec.constants, *chain(*(tensor.aliases for tensor in spec.tensors.values()))]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SpecError(f"tensor {twice[0]!r}: named twice among tensors, aliases and constants")


def _check_groups(spec: WeightSpec) -> None:
    for name, group in spec.groups.items():
        if group.name != name or group.size < 1:
            raise SpecError(f"group {name!r}: expected that name and a size of at least 1, found {group}")
        for outer in group.within:
            if outer not in spec.groups:
                raise SpecError(f"group {name!r}: lies within unknown group {outer!r}")
            beyond = set(spec.groups[outer].within) - set(group.within)
            if outer == name or name in spec.groups[outer].within or beyond:
                raise SpecError(
                    f"group {name!r}: 'within' must be acyclic and include all ancestors of {outer!r}"
                )


def _check_cell(spec: WeightSpec, tensor: str, cell: Cell) -> None:
    for dim in cell.dims:
        if dim.group is None:
            if dim.parents:
                raise SpecError(f"tensor {tensor!r}: a fixed dim has parents")
            continue
        group = spec.groups.get(dim.group)
        if group is None:
            raise SpecError(f"tensor {tensor!r}: unknown group {dim.group!r}")
        if dim.size != group.size:
            raise SpecError(
                f"tensor {tensor!r}: a dim of group {dim.group!r} should have size {group.size}, found {dim.size}"
            )
        if any(not 0 <= parent < len(cell.dims) for parent in dim.parents):
            raise SpecError(
                f"tensor {tensor!r}: parents {dim.parents} of {dim.group!r} are no dims of the cell"
            )
        bound = tuple(cell.dims[parent].group for parent in dim.parents)
        if bound != group.within:
            raise SpecError(
                f"tensor {tensor!r}: {dim.group!r} lies within {group.within}, its parents bind {bound}"
            )


def _check_partition(name: str, tensor: TensorSpec) -> None:
    if len(tensor.cells) == 1 and _is_dense(tensor, tensor.cells[0]):
        return
    count = np.zeros(tensor.numel, dtype=np.int64)
    for cell in tensor.cells:
        index = cell_index(cell).ravel()
        if index.size and (index.min() < 0 or index.max() >= tensor.numel):
            raise SpecError(f"tensor {name!r}: a cell reaches beyond shape {list(tensor.shape)}")
        np.add.at(count, index, 1)
    if (count != 1).any():
        where = int(np.flatnonzero(count != 1)[0])
        raise SpecError(
            f"tensor {name!r}: cells must partition it, but element {where} lies in {int(count[where])} cells"
        )


def _is_dense(tensor: TensorSpec, cell: Cell) -> bool:
    strides = [math.prod(cell.sizes[position + 1 :]) for position in range(len(cell.dims))]
    return (
        cell.offset == 0
        and cell.numel == tensor.numel
        and all(dim.stride == stride for dim, stride in zip(cell.dims, strides, strict=True))
    )


def _check_scaling(spec: WeightSpec, name: str, scaling: Scaling) -> None:
    if scaling.name != name or name in spec.groups:
        raise SpecError(f"scaling {name!r}: names of groups and scalings must be unique")
    if scaling.group not in spec.groups:
        raise SpecError(f"scaling {name!r}: unknown group {scaling.group!r}")
    if scaling.kind != "phase" and scaling.shifts:
        raise SpecError(f"scaling {name!r}: only a phase shifts, found kind {scaling.kind!r}")
    if scaling.kind == "phase":
        _check_shifts(spec, scaling)
    for place in chain(scaling.exponents, scaling.shifts):
        if _group_at(spec, place) != scaling.group:
            raise SpecError(f"scaling {name!r}: {place} is not a dim of group {scaling.group!r}")


def _check_shifts(spec: WeightSpec, phase: Scaling) -> None:
    shifted = {(place.tensor, place.cell) for place in phase.shifts}
    for name, scaling in spec.scalings.items():
        powers = Counter[Exponent]()
        for place in scaling.exponents if scaling.kind == "positive" else ():
            powers[replace(place, power=1)] += place.power
        if any(power and (place.tensor, place.cell) in shifted for place, power in powers.items()):
            raise SpecError(
                f"scaling {phase.name!r}: shifts by a fixed step what {name!r} multiplies, and no step stays fixed"
            )


def _group_at(spec: WeightSpec, place: Exponent) -> str | None:
    try:
        return spec.tensors[place.tensor].cells[place.cell].dims[place.dim].group
    except (KeyError, IndexError):
        return None
