"""Cells of tensors and units of groups: where permutations read them, and views of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._types import Cell, Dim, Group, WeightSpec


def value_shape(spec: WeightSpec, group: Group) -> tuple[int, ...]:
    """The shape of one value per unit of a group: the sizes of its outer groups, then its own."""
    return (*(spec.groups[outer].size for outer in group.within), group.size)


def source_index(cell: Cell, permutations: Mapping[str, Tensor]) -> Tensor | None:
    """Flat position from which each element of a cell is read, shape ``(*batch, *cell.sizes)``.

    None when no permutation touches the cell. ``permutations`` may hold other names as well; its values are not
    checked (:func:`weightspace.spec.check_element` does).
    """
    moved = (permutations.get(dim.group) for dim in cell.dims if dim.group is not None)
    device = next((values.device for values in moved if values is not None), None)
    if device is None:
        return None
    index: Tensor | None = None
    for position, dim in enumerate(cell.dims):
        values = permutations.get(dim.group) if dim.group else None
        if values is None:
            values = torch.arange(dim.size, device=device)
            placed = spread(values, (position,), len(cell.dims))
        else:
            placed = spread(values.long(), (*dim.parents, position), len(cell.dims))  # int8 would overflow
        term = placed if dim.stride == 1 else placed * dim.stride
        index = term if index is None else index + term
    assert index is not None
    return index if cell.offset == 0 else index + cell.offset


def spread(values: Tensor, positions: tuple[int, ...], ndim: int) -> Tensor:
    """Reshape (*batch, *sizes) so that its sizes stand at ``positions`` of ``ndim`` cell dims, 1 elsewhere."""
    split = values.ndim - len(positions)
    order = sorted(range(len(positions)), key=lambda at: positions[at])
    if order != list(range(len(positions))):
        values = values.permute(*range(split), *(split + at for at in order))
    shape = [1] * ndim
    for at in order:
        shape[positions[at]] = values.shape[split + order.index(at)]
    return values.reshape(*values.shape[:split], *shape)


def cell_view(flat: Tensor, cell: Cell) -> Tensor:
    """The elements of one cell of a ``(*batch, numel)`` tensor as a view ``(*batch, *cell.sizes)``.

    Raises:
        SpecError: the cell is part of the tensor, whose last axis is not contiguous: no view shows it.
    """
    if strides(cell) == row_major(cell.sizes) and cell.numel == flat.shape[-1]:
        return flat.view(*flat.shape[:-1], *cell.sizes)
    if flat.shape[-1] > 1 and flat.stride(-1) != 1:
        raise SpecError(
            f"cell_view: expected entries next to each other along the last axis, found stride {flat.stride(-1)}; "
            "call contiguous() first"
        )
    # its own offset in memory is the default; to ask for it would break the graph of torch.compile
    part = flat[..., cell.offset :] if cell.offset else flat
    return part.as_strided((*flat.shape[:-1], *cell.sizes), (*flat.stride()[:-1], *strides(cell)))


def strides(cell: Cell) -> tuple[int, ...]:
    """Distance between neighbours along each dim."""
    return tuple(dim.stride for dim in cell.dims)


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous array of these sizes."""
    return tuple(math.prod(sizes[position + 1 :]) for position in range(len(sizes)))


def unit_cell(spec: WeightSpec, name: str) -> Cell:
    """The units of a group as a cell: its outer groups' dims, then its own."""
    group = spec.groups[name]
    names = (*group.within, name)
    return Cell(
        tuple(
            Dim(
                position,
                stride,
                spec.groups[at].size,
                at,
                tuple(names.index(outer) for outer in spec.groups[at].within),
            )
            for position, (at, stride) in enumerate(
                zip(names, row_major(value_shape(spec, group)), strict=True)
            )
        )
    )


def pull(spec: WeightSpec, group: str, permutations: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """Values per unit of a group as they stand after ``permutations``: ``new[i] = values[p[i]]``."""
    cell = unit_cell(spec, group)
    index = source_index(cell, permutations)
    if index is None:
        return values
    batch = torch.broadcast_shapes(
        values.shape[: values.ndim - len(cell.dims)], index.shape[: index.ndim - len(cell.dims)]
    )
    flat = values.expand(*batch, *cell.sizes).reshape(*batch, cell.numel)
    taken = torch.gather(flat, -1, index.expand(*batch, *cell.sizes).reshape(*batch, cell.numel))
    return taken.view(*batch, *cell.sizes)
