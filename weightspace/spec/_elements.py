r"""Group elements and how they act.

Convention: for a permutation ``p``, unit ``p[i]`` of the original moves to place ``i``; a permutation nested
in an outer group is indexed by the *destination* outer unit, ``new[iH, i] = old[pH[iH], p[iH, i]]``. Scaling
values are indexed by destination too: an element first permutes, then multiplies, then shifts, so that

    (g . W)[i, j] = s_i \cdot W[p_i, q_j] \cdot t_j^{-1}

for the weight between a layer with element (p, s) and the layer before it with element (q, t).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._arguments import check_element, check_weights, joint_batch
from weightspace.spec._cells import cell_view, pull, row_major, source_index, strides, unit_cell, value_shape
from weightspace.spec._scaling import flips, multiply, shift
from weightspace.spec._types import SYMMETRIES, Cell, Element, Group, Scaling, TensorSpec, Weights, WeightSpec

PHASE_STEPS = (-4, 4)  # Shamsian et al. 2024 draw k from {-4, ..., 3}
LOG_SCALE = math.log(2.0)  # positive factors are log-uniform in [1/2, 2]


def identity(spec: WeightSpec, *, dtype: torch.dtype | None = None) -> Element:
    """The element that changes nothing, with every group and scaling written out.

    Args:
        spec: the weight space.
        dtype: of signs and positive factors, a floating type; PyTorch's default type by default.

    Raises:
        SpecError: ``dtype`` is not a floating type.
    """
    _check_dtype(dtype)
    element: Element = {}
    for name, group in spec.groups.items():
        shape = value_shape(spec, group)
        element[name] = torch.arange(group.size).expand(shape).clone()
    for name, scaling in spec.scalings.items():
        shape = value_shape(spec, spec.groups[scaling.group])
        phase = scaling.kind == "phase"
        element[name] = torch.zeros(shape, dtype=torch.long) if phase else torch.ones(shape, dtype=dtype)
    return element


def random_element(
    spec: WeightSpec,
    batch: Sequence[int] = (),
    *,
    symmetries: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Element:
    """Draw group elements, independently for every entry of ``batch``.

    Permutations and signs are uniform, positive factors log-uniform in [1/2, 2], phase steps uniform in
    {-4, ..., 3}.

    Args:
        spec: the weight space.
        batch: leading axes of the elements.
        symmetries: which kinds to draw; all that the spec has by default. Others are left out: identity.
        generator: source of randomness, on ``device``.
        device: where the element lives.
        dtype: of signs and positive factors, a floating type; PyTorch's default type by default. For float64
            weights take float64: in float32 a positive factor times its inverse is 1 to 6e-8 alone.

    Raises:
        SpecError: an unknown kind of symmetry, or ``dtype`` is not a floating type.

    Shapes:
        ``(*batch, *sizes of the outer groups, size)`` for every group and scaling.
    """
    _check_dtype(dtype)
    kinds = spec.symmetries if symmetries is None else tuple(symmetries)
    for kind in kinds:
        if kind not in SYMMETRIES:
            raise SpecError(f"symmetries: expected some of {', '.join(SYMMETRIES)}, found {kind!r}")
    element: Element = {}
    if "permutation" in kinds:
        for name, group in spec.groups.items():
            keys = torch.rand(*batch, *value_shape(spec, group), generator=generator, device=device)
            element[name] = argsort(keys)
    for name, scaling in spec.scalings.items():
        if scaling.kind in kinds:
            shape = (*batch, *value_shape(spec, spec.groups[scaling.group]))
            element[name] = _random_values(scaling, shape, generator, device, dtype)
    return element


def argsort(keys: Tensor) -> Tensor:
    """``argsort`` along the last axis; NumPy's is three times as fast for many short rows on a CPU."""
    return torch.from_numpy(keys.numpy().argsort(-1)) if keys.device.type == "cpu" else keys.argsort(-1)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise SpecError(f"dtype: expected a floating type, found {dtype}")


def _random_values(
    scaling: Scaling,
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Tensor:
    if scaling.kind == "phase":
        return torch.randint(*PHASE_STEPS, tuple(shape), generator=generator, device=device)
    uniform = torch.rand(*shape, generator=generator, device=device, dtype=dtype)
    if scaling.kind == "sign":
        return (uniform < 0.5).to(uniform.dtype).mul_(2.0).sub_(1.0)
    return torch.exp((2.0 * uniform - 1.0) * LOG_SCALE)


def act(spec: WeightSpec, element: Element, weights: Mapping[str, Tensor]) -> Weights:
    """Reorder and rescale the units of networks; the functions that they compute stay the same.

    One gather per tensor, and one broadcast product per cell that is scaled.

    Args:
        spec: the weight space.
        element: permutations per group and values per scaling, missing names act as identity; its batch axes
            broadcast against those of the weights.
        weights: tensors of the spec, all or some; constants come back unchanged.

    Returns:
        New tensors of the weights' types, computed in the wider of their type and the element's; nothing is
        changed in place.

    Raises:
        SpecError: the element or the weights are not of this spec (see :func:`check_element` and
            :func:`check_weights`), or their batch axes do not broadcast.

    Example:
        >>> from weightspace import WeightSpec
        >>> spec = WeightSpec.mlp([1, 2, 1], activation="relu")
        >>> weights = {"layers.0.weight": torch.tensor([[1.0], [2.0]]), "layers.0.bias": torch.tensor([3.0, 4.0])}
        >>> spec.act({"hidden0": torch.tensor([1, 0])}, weights)["layers.0.bias"]
        tensor([4., 3.])
    """
    element_batch = check_element(spec, element)
    batch = check_weights(spec, weights, scaled_by=element)
    joint = joint_batch("element", element_batch, "that of the weights,", batch)
    primary = {name: spec.primary(name) for name in weights}
    moved = {
        name: _permute(spec.tensors[first], element, weights[name], batch, joint)
        for name, first in primary.items()
        if first is not None
    }
    # every product before every shift: what a phase adds is not itself flipped
    scalings = [(scaling, element[name]) for name, scaling in spec.scalings.items() if name in element]
    for scaling, values in scalings:
        multiply(spec, scaling, values, moved)
    for scaling, values in scalings:
        shift(spec, scaling, values, moved)
    return {
        name: moved[name].view((*joint, *spec.shape_of(name)))
        if name in moved
        else w.expand((*joint, *spec.shape_of(name))).clone()
        for name, w in weights.items()
    }


def compose(spec: WeightSpec, second: Element, first: Element) -> Element:
    """The element whose action is that of ``first``, followed by that of ``second``.

    ``act(compose(g, f), W) == act(g, act(f, W))``. Permutations compose as ``f[g]``; nested ones are carried
    along by the outer permutation of ``second`` (wreath product). The steps of a phase are flipped by whatever in
    ``second`` flips the shifted bias: any number of signs, of its own or of outer groups, and odd phases.

    Raises:
        SpecError: an element is not of this spec (see :func:`check_element`), batch axes do not broadcast, or a
            sign of ``second`` flips a shifted bias along other units than the phase's (``b[h, c]`` with a phase
            per h and a sign per c): what results is no step per unit.
    """
    joint_batch(
        "second",
        check_element(spec, second, what="second"),
        "that of first,",
        check_element(spec, first, what="first"),
    )
    result = dict(second)
    for name, value in first.items():
        pulled = pull(spec, name if name in spec.groups else spec.scalings[name].group, second, value)
        if name in spec.groups:
            result[name] = pulled
        elif spec.scalings[name].kind == "phase":
            carried = _carried(spec, spec.scalings[name], second, pulled)
            result[name] = carried + second[name] if name in second else carried
        else:
            result[name] = pulled * second[name] if name in second else pulled
    return result


def invert(spec: WeightSpec, element: Element) -> Element:
    """The element with ``act(invert(g), act(g, W)) == W``.

    Raises:
        SpecError: it is no element of this spec (see :func:`check_element`), or it has no inverse: one of its
            signs flips a shifted bias along other units than the phase's (see :func:`compose`).
    """
    check_element(spec, element)
    permutations = {
        name: _inverse_permutation(spec, group, element)
        for name, group in spec.groups.items()
        if _moves(group, element)
    }
    result = dict(permutations)
    for name, value in element.items():
        if name in spec.groups:
            continue
        scaling = spec.scalings[name]
        if scaling.kind == "phase":
            result[name] = pull(spec, scaling.group, permutations, -_carried(spec, scaling, element, value))
        else:
            result[name] = 1.0 / pull(spec, scaling.group, permutations, value)
    return result


def _carried(spec: WeightSpec, phase: Scaling, element: Element, steps: Tensor) -> Tensor:
    """Steps of a phase as they stand after ``element`` has flipped what they shift."""
    if not bool(steps.any()):
        return steps
    signs = flips(spec, phase, element)
    return steps if signs is None else steps * signs.to(steps)


# -- permuting ---------------------------------------------------------------------------------------------


def _permute(
    tensor: TensorSpec, element: Element, weights: Tensor, batch: tuple[int, ...], joint: Sequence[int]
) -> Tensor:
    """The permuted tensor, flattened to (*joint, numel), always newly allocated."""
    flat = weights.reshape(*batch, tensor.numel)
    index = _tensor_index(tensor, element)
    if index is None:
        return flat.expand(*joint, -1).clone(memory_format=torch.contiguous_format)
    index = index.to(flat.device)
    if index.ndim == 1:
        return flat.expand(*joint, -1).index_select(-1, index)
    return torch.gather(flat.expand(*joint, -1), -1, index.expand(*joint, -1))


def _tensor_index(tensor: TensorSpec, element: Element) -> Tensor | None:
    indices = [source_index(cell, element) for cell in tensor.cells]
    found = [index for index in indices if index is not None]
    if not found:
        return None
    if len(tensor.cells) == 1 and strides(tensor.cells[0]) == row_major(tensor.cells[0].sizes):
        cell = tensor.cells[0]
        batch = found[0].shape[: found[0].ndim - len(cell.dims)]
        return found[0].expand(*batch, *cell.sizes).reshape(*batch, tensor.numel)
    batch = torch.broadcast_shapes(
        *(index.shape[: index.ndim - len(cell.dims)] for index, cell in _pairs(indices, tensor))
    )
    whole = torch.arange(tensor.numel).expand(*batch, -1).clone()
    for index, cell in _pairs(indices, tensor):
        cell_view(whole, cell).copy_(index)
    return whole


def _pairs(indices: Sequence[Tensor | None], tensor: TensorSpec) -> list[tuple[Tensor, Cell]]:
    return [(index, cell) for index, cell in zip(indices, tensor.cells, strict=True) if index is not None]


# -- the group's own structure -----------------------------------------------------------------------------


def _moves(group: Group, element: Element) -> bool:
    return any(name in element for name in (group.name, *group.within))


def _inverse_permutation(spec: WeightSpec, group: Group, element: Element) -> Tensor:
    cell = unit_cell(spec, group.name)
    index = source_index(cell, element)
    assert index is not None
    batch = index.shape[: index.ndim - len(cell.dims)]
    inverse = index.expand(*batch, *cell.sizes).reshape(*batch, cell.numel).argsort(-1)
    return (inverse % group.size).view(*batch, *cell.sizes)
