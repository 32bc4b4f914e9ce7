r"""Group elements and how they act.

Convention: for a permutation ``p``, unit ``p[i]`` of the original moves to place ``i``; a permutation nested
in an outer group is indexed by the *destination* outer unit, ``new[iH, i] = old[pH[iH], p[iH, i]]``. Scaling
values are indexed by destination too: an element first permutes, then scales, then shifts, so that

    (g . W)[i, j] = s_i \cdot W[p_i, q_j] \cdot t_j^{-1}

for the weight between a layer with element (p, s) and the layer before it with element (q, t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._types import (
    SYMMETRIES,
    Cell,
    Dim,
    Element,
    Exponent,
    Group,
    Scaling,
    TensorSpec,
    Weights,
    WeightSpec,
)

PHASE_STEPS = (-4, 4)  # Shamsian et al. 2024 draw k from {-4, ..., 3}
LOG_SCALE = math.log(2.0)  # positive factors are log-uniform in [1/2, 2]


def identity(spec: WeightSpec) -> Element:
    """The element that changes nothing, with every group and scaling written out."""
    element: Element = {}
    for name, group in spec.groups.items():
        shape = _value_shape(spec, group)
        element[name] = torch.arange(group.size).expand(shape).clone()
    for name, scaling in spec.scalings.items():
        shape = _value_shape(spec, spec.groups[scaling.group])
        element[name] = torch.zeros(shape, dtype=torch.long) if scaling.kind == "phase" else torch.ones(shape)
    return element


def random_element(
    spec: WeightSpec,
    batch: Sequence[int] = (),
    *,
    symmetries: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
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

    Raises:
        SpecError: an unknown kind of symmetry.

    Shapes:
        ``(*batch, *sizes of the outer groups, size)`` for every group and scaling.
    """
    kinds = spec.symmetries if symmetries is None else tuple(symmetries)
    for kind in kinds:
        if kind not in SYMMETRIES:
            raise SpecError(f"symmetries: expected some of {', '.join(SYMMETRIES)}, found {kind!r}")
    element: Element = {}
    if "permutation" in kinds:
        for name, group in spec.groups.items():
            keys = torch.rand(*batch, *_value_shape(spec, group), generator=generator, device=device)
            element[name] = _order(keys)
    for name, scaling in spec.scalings.items():
        if scaling.kind in kinds:
            shape = (*batch, *_value_shape(spec, spec.groups[scaling.group]))
            element[name] = _random_values(scaling, shape, generator, device)
    return element


def _order(keys: Tensor) -> Tensor:
    """``argsort`` along the last axis; NumPy's is three times as fast for many short rows on a CPU."""
    return torch.from_numpy(keys.numpy().argsort(-1)) if keys.device.type == "cpu" else keys.argsort(-1)


def _random_values(
    scaling: Scaling, shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    if scaling.kind == "phase":
        return torch.randint(*PHASE_STEPS, tuple(shape), generator=generator, device=device)
    uniform = torch.rand(*shape, generator=generator, device=device)
    if scaling.kind == "sign":
        return (uniform < 0.5).float().mul_(2.0).sub_(1.0)
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
        New tensors; nothing is changed in place.

    Raises:
        SpecError: unknown names, wrong shapes, or batch axes that do not broadcast.

    Example:
        >>> from weightspace import WeightSpec
        >>> spec = WeightSpec.mlp([1, 2, 1], activation="relu")
        >>> weights = {"layers.0.weight": torch.tensor([[1.0], [2.0]]), "layers.0.bias": torch.tensor([3.0, 4.0])}
        >>> spec.act({"hidden0": torch.tensor([1, 0])}, weights)["layers.0.bias"]
        tensor([4., 3.])
    """
    batch = spec.batch_shape(weights)
    element_batch = check_element(spec, element)
    try:
        joint = torch.broadcast_shapes(batch, element_batch)
    except RuntimeError:
        raise SpecError(
            f"element: batch shape {list(element_batch)} does not broadcast against the weights' {list(batch)}"
        ) from None
    primary = {name: spec.primary(name) for name in weights}
    moved = {
        name: _permute(spec.tensors[first], element, weights[name], batch, joint)
        for name, first in primary.items()
        if first is not None
    }
    # signs before phases: the shift that a phase adds is not itself flipped
    for kind in ("positive", "sign", "phase"):
        for name, scaling in spec.scalings.items():
            if scaling.kind == kind and name in element:
                _scale(spec, scaling, element[name], moved)
    return {
        name: moved[name].view((*joint, *spec.shape_of(name)))
        if name in moved
        else w.expand(*joint, *spec.shape_of(name)).clone()
        for name, w in weights.items()
    }


def check_element(spec: WeightSpec, element: Element) -> tuple[int, ...]:
    """The batch shape to which an element's values broadcast.

    Raises:
        SpecError: a name that is neither a group nor a scaling, or a value of the wrong shape.
    """
    batch: Sequence[int] = ()
    for name, value in element.items():
        if name not in spec.groups and name not in spec.scalings:
            raise SpecError(f"element: {name!r} is neither a group nor a scaling of this spec")
        group = spec.groups[name] if name in spec.groups else spec.groups[spec.scalings[name].group]
        expected = _value_shape(spec, group)
        split = value.ndim - len(expected)
        if split < 0 or tuple(value.shape[split:]) != expected:
            raise SpecError(
                f"element: {name!r} should end in shape {list(expected)}, found {list(value.shape)}"
            )
        try:
            batch = torch.broadcast_shapes(batch, value.shape[:split])
        except RuntimeError:
            raise SpecError(
                f"element: {name!r} has batch shape {list(value.shape[:split])}, others {list(batch)}"
            ) from None
    return tuple(batch)


def compose(spec: WeightSpec, second: Element, first: Element) -> Element:
    """The element whose action is that of ``first``, followed by that of ``second``.

    ``act(compose(g, f), W) == act(g, act(f, W))``. Permutations compose as ``f[g]``; nested ones are carried
    along by the outer permutation of ``second`` (wreath product); a phase is flipped by the signs of
    ``second``.
    """
    result = dict(second)
    for name, value in first.items():
        group = name if name in spec.groups else spec.scalings[name].group
        pulled = _pull(spec, group, second, value)
        if name in spec.groups:
            result[name] = pulled
        elif spec.scalings[name].kind == "phase":
            carried = pulled * _sign_of(spec, group, second).to(pulled)
            result[name] = carried + second[name] if name in second else carried
        else:
            result[name] = pulled * second[name] if name in second else pulled
    return result


def invert(spec: WeightSpec, element: Element) -> Element:
    """The element with ``act(invert(g), act(g, W)) == W``."""
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
        pulled = _pull(spec, scaling.group, permutations, value)
        if scaling.kind == "phase":
            signs = _sign_of(spec, scaling.group, element).to(pulled)
            result[name] = -pulled * _pull(spec, scaling.group, permutations, signs)
        else:
            result[name] = 1.0 / pulled
    return result


# -- permuting ---------------------------------------------------------------------------------------------


def source_index(cell: Cell, permutations: Mapping[str, Tensor]) -> Tensor | None:
    """Flat position from which each element of a cell is read, shape ``(*batch, *cell.sizes)``.

    None when no permutation touches the cell. ``permutations`` may hold other names as well.
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
            placed = _place(values, (position,), len(cell.dims))
        else:
            placed = _place(values, (*dim.parents, position), len(cell.dims))
        term = placed if dim.stride == 1 else placed * dim.stride
        index = term if index is None else index + term
    assert index is not None
    return index if cell.offset == 0 else index + cell.offset


def _place(values: Tensor, positions: tuple[int, ...], ndim: int) -> Tensor:
    """Reshape (*batch, *sizes) so that its sizes stand at ``positions`` of ``ndim`` cell dims, 1 elsewhere."""
    split = values.ndim - len(positions)
    order = sorted(range(len(positions)), key=lambda at: positions[at])
    if order != list(range(len(positions))):
        values = values.permute(*range(split), *(split + at for at in order))
    shape = [1] * ndim
    for at in order:
        shape[positions[at]] = values.shape[split + order.index(at)]
    return values.reshape(*values.shape[:split], *shape)


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
    if len(tensor.cells) == 1 and _strides(tensor.cells[0]) == _row_major(tensor.cells[0].sizes):
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


def _strides(cell: Cell) -> tuple[int, ...]:
    return tuple(dim.stride for dim in cell.dims)


def _row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[position + 1 :]) for position in range(len(sizes)))


def cell_view(flat: Tensor, cell: Cell) -> Tensor:
    """The elements of one cell of a contiguous ``(*batch, numel)`` tensor as ``(*batch, *cell.sizes)``."""
    if _strides(cell) == _row_major(cell.sizes) and cell.numel == flat.shape[-1]:
        return flat.view(*flat.shape[:-1], *cell.sizes)
    batch_strides = flat.stride()[:-1]
    return flat.as_strided(
        (*flat.shape[:-1], *cell.sizes),
        (*batch_strides, *_strides(cell)),
        flat.storage_offset() + cell.offset,
    )


# -- scaling -----------------------------------------------------------------------------------------------


def _scale(spec: WeightSpec, scaling: Scaling, values: Tensor, moved: dict[str, Tensor]) -> None:
    """Multiply, and for a phase shift, the flattened tensors in place; they are ours alone."""
    for place in scaling.exponents:
        for flat in _stored(spec, place.tensor, moved):
            factor = _factor(scaling, values.to(flat), place.power)
            _apply(spec, place, flat, factor, Tensor.mul_)
    for place in scaling.shifts:
        for flat in _stored(spec, place.tensor, moved):
            _apply(spec, place, flat, values.to(flat) * (scaling.shift * place.power), Tensor.add_)


def _stored(spec: WeightSpec, tensor: str, moved: Mapping[str, Tensor]) -> list[Tensor]:
    """What ``moved`` holds of a tensor, under its own name and under those it is tied to."""
    return [moved[name] for name in (tensor, *spec.tensors[tensor].aliases) if name in moved]


def _apply(
    spec: WeightSpec,
    place: Exponent,
    flat: Tensor,
    values: Tensor,
    update: Callable[[Tensor, Tensor], Tensor],
) -> None:
    cell = spec.tensors[place.tensor].cells[place.cell]
    dim = cell.dims[place.dim]
    update(cell_view(flat, cell), _place(values, (*dim.parents, place.dim), len(cell.dims)))


def _factor(scaling: Scaling, values: Tensor, power: int) -> Tensor:
    if scaling.kind == "phase":
        return 1.0 - 2.0 * ((values * power) % 2)
    return values if power == 1 else values**power


# -- the group's own structure -----------------------------------------------------------------------------


def _value_shape(spec: WeightSpec, group: Group) -> tuple[int, ...]:
    return (*(spec.groups[outer].size for outer in group.within), group.size)


def _unit_cell(spec: WeightSpec, name: str) -> Cell:
    """The units of a group as a cell: its outer groups' dims, then its own."""
    group = spec.groups[name]
    names = (*group.within, name)
    strides = _row_major(_value_shape(spec, group))
    return Cell(
        tuple(
            Dim(
                position,
                stride,
                spec.groups[at].size,
                at,
                tuple(names.index(outer) for outer in spec.groups[at].within),
            )
            for position, (at, stride) in enumerate(zip(names, strides, strict=True))
        )
    )


def _pull(spec: WeightSpec, group: str, permutations: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """Values per unit of a group as they stand after ``permutations``: ``new[i] = values[p[i]]``."""
    cell = _unit_cell(spec, group)
    index = source_index(cell, permutations)
    if index is None:
        return values
    batch = torch.broadcast_shapes(
        values.shape[: values.ndim - len(cell.dims)], index.shape[: index.ndim - len(cell.dims)]
    )
    flat = values.expand(*batch, *cell.sizes).reshape(*batch, cell.numel)
    taken = torch.gather(flat, -1, index.expand(*batch, *cell.sizes).reshape(*batch, cell.numel))
    return taken.view(*batch, *cell.sizes)


def _moves(group: Group, element: Element) -> bool:
    return any(name in element for name in (group.name, *group.within))


def _inverse_permutation(spec: WeightSpec, group: Group, element: Element) -> Tensor:
    cell = _unit_cell(spec, group.name)
    index = source_index(cell, element)
    assert index is not None
    batch = index.shape[: index.ndim - len(cell.dims)]
    inverse = index.expand(*batch, *cell.sizes).reshape(*batch, cell.numel).argsort(-1)
    return (inverse % group.size).view(*batch, *cell.sizes)


def _sign_of(spec: WeightSpec, group: str, element: Element) -> Tensor:
    for name, scaling in spec.scalings.items():
        if scaling.group == group and scaling.kind == "sign" and name in element:
            return element[name]
    return torch.ones(_value_shape(spec, spec.groups[group]))
