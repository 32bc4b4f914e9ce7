"""Permutations made soft: one matrix per group acts on weights, linearly in each, so that gradients reach both."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, reduce
from string import ascii_letters

import numpy as np
import torch
from torch import Tensor

from weightspace.align._assignment import assign
from weightspace.errors import SpecError
from weightspace.spec import Cell, Element, TensorSpec, Weights, WeightSpec, check_weights
from weightspace.spec._arguments import joint_batch
from weightspace.spec._types import cell_index

Matrices = dict[str, Tensor]
"""A matrix per group, ``(*batch, *sizes of the outer groups, size, size)``; a missing group stays as it is."""


def act_soft(spec: WeightSpec, matrices: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Weights:
    """Let a matrix per group act on weights: along every dim that runs over a group, its matrix is multiplied.

    For a weight between groups with matrices P and Q

        (P, Q) . W = P W Q^T,

    and likewise for any number of dims, a group that repeats in a tensor acting on each of them. Row i of a matrix
    says what comes to place i: for the matrices of permutations (:func:`matrices_of`) the result is that of
    ``spec.act``, exactly. Doubly stochastic matrices are the convex hull of those; other matrices are allowed too.
    The matrices of a group within others are indexed by the destination's outer units, as its permutations are.
    Parameters and statistics move alike, constants stay. Differentiable in matrices and weights.

    Args:
        spec: the weight space.
        matrices: of some or all groups, of a floating type.
        weights: some or all tensors of the spec.

    Shapes:
        Each matrix is ``(*batch, *sizes of the outer groups, size, size)``; its batch axes broadcast against those
        of the weights. Results have the joint batch shape.

    Returns:
        New tensors in the types of ``weights``, computed in the wider of theirs and the matrices', float32 at least.

    Raises:
        SpecError: a name that is no group, a matrix of another shape or type, weights that do not fit the spec, or
            batch axes that do not broadcast.

    Example:
        >>> spec = WeightSpec.mlp([1, 2, 1], bias=False)
        >>> weights = {"layers.0.weight": torch.tensor([[1.0], [3.0]]), "layers.1.weight": torch.tensor([[2.0, 4.0]])}
        >>> mixed = act_soft(spec, {"hidden0": torch.tensor([[0.75, 0.25], [0.25, 0.75]])}, weights)
        >>> mixed["layers.0.weight"].flatten().tolist(), mixed["layers.1.weight"].flatten().tolist()
        ([1.5, 2.5], [2.5, 3.5])
    """
    batch = check_weights(spec, weights)
    joint = joint_batch("matrices", _check_matrices(spec, matrices), "that of the weights,", batch)
    return {
        name: _act_tensor(spec, spec.primary(name), matrices, value).expand((*joint, *spec.shape_of(name)))
        for name, value in weights.items()
    }


def matrices_of(spec: WeightSpec, element: Element, dtype: torch.dtype | None = None) -> Matrices:
    """The permutations of an element as matrices, ``P[i, p[i]] = 1``; its scalings are left out.

    Example:
        >>> spec = WeightSpec.mlp([1, 3, 1])
        >>> matrices_of(spec, {"hidden0": torch.tensor([2, 0, 1])})["hidden0"].tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    chosen = torch.get_default_dtype() if dtype is None else dtype
    return {
        name: torch.nn.functional.one_hot(value.long(), spec.groups[name].size).to(chosen)
        for name, value in element.items()
        if name in spec.groups
    }


def round_matrices(spec: WeightSpec, matrices: Mapping[str, Tensor]) -> Element:
    """The permutations nearest to matrices: for each the one with the largest inner product, by linear assignment.

    Raises:
        SpecError: a name that is no group, or a matrix of another shape or type.

    Example:
        >>> spec = WeightSpec.mlp([1, 2, 1])
        >>> round_matrices(spec, {"hidden0": torch.tensor([[0.4, 0.6], [0.5, 0.5]])})["hidden0"].tolist()
        [1, 0]
    """
    _check_matrices(spec, matrices)
    return {
        name: assign(value.detach().reshape(-1, *value.shape[-2:])).view(value.shape[:-1])
        for name, value in matrices.items()
    }


# -- one tensor --------------------------------------------------------------------------------------------


def _act_tensor(spec: WeightSpec, name: str | None, matrices: Mapping[str, Tensor], value: Tensor) -> Tensor:
    """What matrices make of one tensor, a new one; only the batch axes that they have are added."""
    tensor = None if name is None else spec.tensors[name]
    groups = {dim.group for cell in tensor.cells for dim in cell.dims} if tensor is not None else set()
    acting = [matrices[group] for group in spec.groups if group in groups and group in matrices]
    if tensor is None or not acting:
        return value.clone()
    dtype = reduce(torch.promote_types, (value.dtype, *(matrix.dtype for matrix in acting)), torch.float32)
    flat = value.reshape(*value.shape[: value.ndim - len(tensor.shape)], tensor.numel).to(dtype)
    cells, back = _orders(tensor, str(value.device))
    with torch.autocast(value.device.type, enabled=False):  # which would multiply in half precision
        parts = [
            _act_cell(cell, matrices, flat if cells is None else flat.index_select(-1, cells[number]))
            for number, cell in enumerate(tensor.cells)
        ]
    if back is None:
        moved = parts[0]
    else:
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        moved = torch.cat([part.expand(*batch, -1) for part in parts], -1).index_select(-1, back)
    return moved.reshape((*moved.shape[:-1], *tensor.shape)).to(value.dtype)


def _act_cell(cell: Cell, matrices: Mapping[str, Tensor], part: Tensor) -> Tensor:
    """Multiply along every dim: ``(*batch, numel)`` in the order of the dims, before and after."""
    moved = part.reshape((*part.shape[:-1], *cell.sizes))
    # outer units first: an inner matrix belongs to the place that its outer unit came to
    for position, dim in sorted(enumerate(cell.dims), key=lambda item: len(item[1].parents)):
        if dim.group is not None and dim.group in matrices:
            matrix = matrices[dim.group].to(moved.dtype)
            moved = torch.einsum(_equation(len(cell.dims), position, dim.parents), matrix, moved)
    return moved.flatten(moved.ndim - len(cell.dims)) if cell.dims else moved.unsqueeze(-1)


@lru_cache(maxsize=256)
def _equation(ndim: int, position: int, parents: tuple[int, ...]) -> str:
    letters = ascii_letters[:ndim]
    old, new = letters[position], ascii_letters[ndim]
    outer = "".join(letters[parent] for parent in parents)
    return f"...{outer}{new}{old},...{letters}->...{letters.replace(old, new)}"


@lru_cache(maxsize=256)
def _orders(tensor: TensorSpec, device: str) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
    """Where each cell's elements are in the flat tensor, and the tensor's in the cells one after the other.

    None where they are in order.
    """
    indices = [cell_index(cell).ravel() for cell in tensor.cells]
    joined = np.concatenate(indices)
    if len(indices) == 1 and (joined == np.arange(tensor.numel)).all():
        return None, None
    with torch.inference_mode(False):  # what is cached here serves callers that take gradients, too
        cells = tuple(torch.from_numpy(index).to(device) for index in indices)
        return cells, torch.from_numpy(joined.argsort()).to(device)


# -- what is asked -----------------------------------------------------------------------------------------


def _check_matrices(spec: WeightSpec, matrices: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The batch shape to which matrices broadcast."""
    batch: tuple[int, ...] = ()
    for name, matrix in matrices.items():
        if name not in spec.groups:
            raise SpecError(f"matrices: {name!r} is no group of this spec")
        units = spec.unit_shape(name)
        expected, found = (*units, units[-1]), tuple(matrix.shape)
        split = len(found) - len(expected)
        if split < 0 or found[split:] != expected:
            raise SpecError(f"matrices: {name!r} should end in shape {list(expected)}, found {list(found)}")
        if not matrix.is_floating_point():
            dtype = str(matrix.dtype).removeprefix("torch.")
            raise SpecError(f"matrices: {name!r} should hold numbers of a floating type, found {dtype}")
        batch = joint_batch(f"matrices: {name!r}", found[:split], "those before it,", batch)
    return batch
