"""One network to stand for all that symmetry makes equal: the canonical representative of an orbit.

Scales are fixed first, then signs and phases, then the order of the units. Every decision rests on statistics
that neither the order of any units nor a symmetry that is still undecided can change (a maximum, sorted
entries): they are exact, so equal networks meet in the same bits, and a canonical network is left as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._arguments import check_weights
from weightspace.spec._cells import cell_view, pull, spread, value_shape
from weightspace.spec._elements import act, argsort, compose, identity
from weightspace.spec._scaling import flipped, multiply, shift, stored_as, update
from weightspace.spec._types import Cell, Element, Exponent, Scaling, Weights, WeightSpec

_PHASE_ROUNDS = 8  # two suffice where a bias is below 10^7 shifts; beyond, each gains a mantissa of digits
_CHUNK = 2**22  # entries that are compared at once: 32 MB per array of ranks


def canonicalize(spec: WeightSpec, weights: Mapping[str, Tensor]) -> tuple[Weights, Element]:
    r"""The representative of a network's orbit: what remains of it when its symmetries are taken away.

    For networks whose units differ, ``canonicalize(g . W) == canonicalize(W)`` for every element g: in the same
    bits when g holds permutations and signs, to rounding when it holds positive factors and phases as well. The
    function that a network computes is kept, and canonical networks come back in the same bits.

    1. *Positive factors*: a unit is divided by its largest ``|w|`` among the entries that its factor multiplies
       with the smallest positive power (what enters a ReLU unit), so that this becomes exactly 1.
    2. *Signs*: the entry of the largest magnitude becomes positive, in the first tensor that a unit's sign flips
       (what enters it).
       *Phases*: a multiple of ``shift`` brings the shifted bias into ``(-shift/2, shift/2]``, both ends included
       where odd steps flip the bias as well.
    3. *Order*: units are sorted by their entries, compared position by position along fixed axes and groups
       whose units are told apart already, and as sorted values along others. The comparison is repeated with
       what it found until it tells no more units apart (colour refinement, Weisfeiler and Leman 1968); units
       that stay equal keep their order.

    In 1 and 2 scalings are decided one after the other, each from entries that no undecided one multiplies:
    in a network with fixed inputs, layer by layer. What is left undecided stays as it is: scalings of which each
    acts only where another one does (``W[a, b]`` alone, with factors for both), and for a unit whose deciding
    entries are all zero, its sign and its factor.

    Args:
        spec: the weight space.
        weights: every tensor of the spec, each under its own name or one that it is tied to. Constants come
            back unchanged. Each network is treated on its own, whatever others are in the batch.

    Returns:
        The canonical weights, and the element that leads there: ``spec.act(element, weights)`` gives them, up to
        the rounding of products. Gradients flow through the weights, for a fixed element.

    Raises:
        SpecError: a tensor is missing, unknown, of the wrong shape or type, or holds NaN or infinity, or tied
            ones differ.

    Shapes:
        Tensors ``(*batch, *shape in the spec)``; the element has the same batch axes.

    Reference:
        Positive factors and order are normalised similarly, against a reference network, by Pittorino et al.
        2022, "Deep Networks on Toroids: Removing Symmetries Reveals the Structure of Flat Regions in the
        Landscape Geometry", arXiv:2202.03038.

    Example:
        >>> spec = WeightSpec.mlp([1, 2, 1], activation="tanh", bias=False)
        >>> weights = {"layers.0.weight": torch.tensor([[-2.0], [1.0]]), "layers.1.weight": torch.tensor([[3.0, 4.0]])}
        >>> canonical, element = canonicalize(spec, weights)
        >>> canonical["layers.0.weight"].flatten(), canonical["layers.1.weight"].flatten()
        (tensor([1., 2.]), tensor([ 4., -3.]))
        >>> element
        {'hidden0': tensor([1, 0]), 'sign(hidden0)': tensor([ 1., -1.])}
    """
    batch = check_weights(spec, weights, scaled_by=spec.scalings)
    _check_comparable(spec, weights, batch)
    if not spec.tensors:
        return {name: w.clone() for name, w in weights.items()}, identity(spec)
    count = math.prod(batch)
    moved = {
        name: w.reshape(count, math.prod(spec.shape_of(name))).clone(memory_format=torch.contiguous_format)
        for name, w in weights.items()
        if spec.primary(name) is not None
    }
    scalings = {**_fix_positive(spec, moved), **_fix_signs_and_phases(spec, moved)}
    for flat in moved.values():
        if flat.is_floating_point():
            flat.add_(0.0)  # a flipped zero is -0.0: the same number, but other bits
    permutations = _permutations(spec, _colours(spec, _stored_flat(spec, moved)))
    element = compose(spec, permutations, scalings)
    shaped = {name: flat.view(count, *spec.shape_of(name)) for name, flat in moved.items()}
    ordered = {**weights, **act(spec, permutations, shaped)}
    return (
        {
            name: w.view(*batch, *spec.shape_of(name)) if name in moved else w.clone()
            for name, w in ordered.items()
        },
        {name: element[name].unflatten(0, batch) if batch else element[name][0] for name in identity(spec)},
    )


def _check_comparable(spec: WeightSpec, weights: Mapping[str, Tensor], batch: tuple[int, ...]) -> None:
    for name, tensor in spec.tensors.items():
        if not any(stored in weights for stored in (name, *tensor.aliases)):
            raise SpecError(f"weights: tensor {name!r} is missing")
    for name, w in weights.items():
        if spec.primary(name) is None or bool(w.isfinite().all()):
            continue
        where = [int(at) for at in w.isfinite().logical_not().nonzero()[0]]
        network = f"in network {where[: len(batch)]}, " if batch else ""
        raise SpecError(
            f"weights: a canonical form needs finite values, but {name!r} is {w[tuple(where)].item()} "
            f"{network}at {where[len(batch) :]}"
        )


def _stored_flat(
    spec: WeightSpec, moved: Mapping[str, Tensor], places: Sequence[Exponent] | None = None
) -> dict[str, Tensor]:
    """The tensors of ``places``, or all, as (networks, numel) in the one dtype that holds all exactly."""
    names = spec.tensors if places is None else {place.tensor: None for place in places}
    stored = {name: stored_as(spec, name, moved)[0].detach() for name in names}
    dtype = reduce(torch.promote_types, (flat.dtype for flat in stored.values()), torch.float32)
    return {name: flat.to(dtype) for name, flat in stored.items()}


# -- the entries of a unit ---------------------------------------------------------------------------------


class _Entries(NamedTuple):
    """What one cell holds for each unit, with codes that say which positions are told apart.

    Codes are the same for all units, or all networks, where their axis has size 1.
    """

    values: Float[Tensor, "networks units positions"]
    codes: Int[Tensor, "networks_or_1 units_or_1 positions"]


def _axes(cell: Cell, place: Exponent) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dims of a cell that together count the units at ``place``, and the other dims."""
    units = (*cell.dims[place.dim].parents, place.dim)
    return units, tuple(position for position in range(len(cell.dims)) if position not in units)


def _by_unit(
    spec: WeightSpec, flats: Mapping[str, Tensor], place: Exponent
) -> Float[Tensor, "networks units positions"]:
    cell = spec.tensors[place.tensor].cells[place.cell]
    return _gathered(cell_view(flats[place.tensor], cell), *_axes(cell, place))


def _gathered(values: Tensor, units: Sequence[int], others: Sequence[int]) -> Tensor:
    """Dims of (networks, *sizes of a cell) as (networks, units, positions)."""
    sizes = values.shape[1:]
    ordered = values.permute(0, *(1 + position for position in (*units, *others)))
    counts = (math.prod(sizes[position] for position in part) for part in (units, others))
    return ordered.reshape(values.shape[0], *counts)


def _codes(
    spec: WeightSpec, place: Exponent, colours: Mapping[str, Tensor]
) -> Int[Tensor, "networks_or_1 units_or_1 positions"]:
    """A number per position of a unit's entries; equal numbers cannot be told apart.

    It counts fixed indices and the colours of other units, and marks where a unit meets itself.
    """
    cell = spec.tensors[place.tensor].cells[place.cell]
    units, others = _axes(cell, place)
    ndim, device = len(cell.dims), next(iter(colours.values())).device
    code = torch.zeros((1,) * (1 + ndim), dtype=torch.long, device=device)
    for position in others:
        dim = cell.dims[position]
        if dim.group is None:
            code = code * dim.size + spread(torch.arange(dim.size, device=device), (position,), ndim)
            continue
        shape, at = value_shape(spec, spec.groups[dim.group]), (*dim.parents, position)
        colour = colours[dim.group]
        code = code * colour.shape[-1] + spread(colour.view(-1, *shape), at, ndim)
        if dim.group == cell.dims[place.dim].group:
            code = 2 * code + _meets(cell, units, at, device)
    shared = all(code.shape[1 + position] == 1 for position in units)
    sizes = [1 if shared and position in units else size for position, size in enumerate(cell.sizes)]
    return _gathered(code.expand(-1, *sizes), units, others)


def _meets(cell: Cell, first: Sequence[int], second: Sequence[int], device: torch.device) -> Tensor:
    """Where two occurrences of a group in a cell are the same unit."""
    ndim = len(cell.dims)
    same = torch.ones((1,) * ndim, dtype=torch.bool, device=device)
    for pair in zip(first, second, strict=True):
        left, right = (spread(torch.arange(cell.sizes[at], device=device), (at,), ndim) for at in pair)
        same = same & (left == right)
    return same


def _sorted(entries: _Entries) -> Float[Tensor, "networks units positions"]:
    """Entries in the order of their codes, and of descending values where these are equal."""
    codes = entries.codes.expand(entries.values.shape)
    by_value = entries.values.argsort(dim=-1, descending=True)
    order = by_value.gather(-1, codes.gather(-1, by_value).argsort(dim=-1, stable=True))
    return entries.values.gather(-1, order)


# -- scalings ----------------------------------------------------------------------------------------------


def _plan(spec: WeightSpec, kinds: Sequence[str]) -> Iterator[tuple[Scaling, list[Exponent]]]:
    """Scalings in the order in which they can be decided, with the places of the entries that decide them.

    No undecided scaling multiplies or shifts these entries, and none that is decided later will: a canonical
    network is found decided.
    """
    touched = {
        name: [*(_multiplied(scaling) if scaling.kind in kinds else ()), *scaling.shifts]
        for name, scaling in spec.scalings.items()
    }
    pending = [name for name, scaling in spec.scalings.items() if scaling.kind in kinds]
    while True:
        counts = Counter((place.tensor, place.cell) for places in touched.values() for place in places)
        ready = ((name, _deciding(spec, spec.scalings[name], counts)) for name in pending)
        name, places = next((found for found in ready if found[1]), ("", []))
        if not places:
            return
        yield spec.scalings[name], places
        pending.remove(name)
        del touched[name]


def _multiplied(scaling: Scaling) -> list[Exponent]:
    """Where a scaling changes what it multiplies: an even power of a sign does not."""
    powers = Counter[Exponent]()
    for place in scaling.exponents:
        powers[replace(place, power=1)] += place.power
    return [
        replace(place, power=power)
        for place, power in powers.items()
        if power and (scaling.kind == "positive" or power % 2)
    ]


def _deciding(spec: WeightSpec, scaling: Scaling, counts: Mapping[tuple[str, int], int]) -> list[Exponent]:
    """The places that can decide a scaling, where ``counts`` says how often undecided ones touch each cell."""
    if scaling.kind != "phase":
        return [place for place in _multiplied(scaling) if counts[place.tensor, place.cell] == 1]
    places = list(scaling.shifts)
    if scaling.shift == 0 or not all(_shifts_alone(spec, scaling, place, counts) for place in places):
        return []
    return sorted((place for place in places if place.power), key=lambda place: abs(place.power))[:1]


def _shifts_alone(
    spec: WeightSpec, phase: Scaling, place: Exponent, counts: Mapping[tuple[str, int], int]
) -> bool:
    """Whether an undecided phase only shifts what is at a place; or, where each unit has one bias, turns it too."""
    if not _turns(phase, place):
        return counts[place.tensor, place.cell] == 1
    cell = spec.tensors[place.tensor].cells[place.cell]
    single = len(phase.shifts) == 1 and not _axes(cell, place)[1]
    return single and counts[place.tensor, place.cell] == 2


def _turns(phase: Scaling, place: Exponent) -> bool:
    """Whether odd steps also flip what they shift: ``b -> shift - b``."""
    at = (place.tensor, place.cell, place.dim)
    return any((other.tensor, other.cell, other.dim) == at for other in _multiplied(phase))


def _fix_positive(spec: WeightSpec, moved: dict[str, Tensor]) -> Element:
    """Divide ``moved`` in place; the factors, which are 1 where nothing was decided."""
    values = _neutral(spec, moved, ("positive",))
    for scaling, places in _plan(spec, ("positive",)):
        undecided = torch.ones_like(values[scaling.name], dtype=torch.bool)
        for power in sorted({place.power for place in places}, key=lambda power: (power < 0, abs(power))):
            largest = _largest(spec, moved, [place for place in places if place.power == power])
            found = largest.view_as(undecided)
            divisor = torch.where(undecided & (found > 0), found, 1.0)
            undecided = undecided & (found == 0)
            _divide(spec, scaling, power, divisor, moved)
            values[scaling.name] = values[scaling.name] * divisor ** (-1 / power)
    return values


def _largest(
    spec: WeightSpec, moved: Mapping[str, Tensor], places: Sequence[Exponent]
) -> Float[Tensor, "networks units"]:
    flats = _stored_flat(spec, moved, places)
    return torch.stack([_by_unit(spec, flats, place).abs().amax(-1) for place in places]).amax(0)


def _divide(
    spec: WeightSpec, scaling: Scaling, power: int, divisor: Tensor, moved: Mapping[str, Tensor]
) -> None:
    """Scale so that what has ``power`` is divided by ``divisor``."""
    for place in _multiplied(scaling):
        # w / w is 1 exactly, unlike w * (1 / w): the second time, all divisors are 1
        operation = Tensor.mul_ if place.power == -power else Tensor.div_
        factor = divisor if abs(place.power) == abs(power) else divisor ** (place.power / power)
        for flat in stored_as(spec, place.tensor, moved):
            update(spec, place, flat, factor.to(flat), operation)


def _fix_signs_and_phases(spec: WeightSpec, moved: dict[str, Tensor]) -> Element:
    """Flip and shift ``moved`` in place; the signs and steps, which change nothing where undecided."""
    values = _neutral(spec, moved, ("sign", "phase"))
    for scaling, places in _plan(spec, ("sign", "phase")):
        like = values[scaling.name]
        if scaling.kind == "sign":
            values[scaling.name] = _signs(spec, _stored_flat(spec, moved, places), places).view_as(like)
            multiply(spec, scaling, values[scaling.name], moved)
            continue
        for _ in range(_PHASE_ROUNDS):
            steps = _steps(spec, scaling, places[0], _stored_flat(spec, moved, places)).view_as(like).long()
            if not bool(steps.any()):
                break
            multiply(spec, scaling, steps, moved)
            shift(spec, scaling, steps, moved)
            kept = flipped(scaling, steps) if _turns(scaling, places[0]) else 1
            values[scaling.name] = values[scaling.name] * kept + steps
    return values


def _neutral(spec: WeightSpec, moved: Mapping[str, Tensor], kinds: Sequence[str]) -> Element:
    flat = next(iter(_stored_flat(spec, moved).values()))
    return {
        name: value.to(flat if value.is_floating_point() else flat.device).expand(len(flat), *value.shape)
        for name, value in identity(spec).items()
        if name in spec.scalings and spec.scalings[name].kind in kinds
    }


def _signs(
    spec: WeightSpec, flats: Mapping[str, Tensor], places: Sequence[Exponent]
) -> Float[Tensor, "networks units"]:
    """Signs that make positive the largest entry of each unit, in the first of ``places`` where it has any."""
    first = _by_unit(spec, flats, places[0])
    signs = torch.sign(first.amax(-1) + first.amin(-1))
    for place in places:
        rows = (signs == 0).any(-1).nonzero()[:, 0]
        if not len(rows):
            break
        found = _sign_of_order(spec, {name: flat[rows] for name, flat in flats.items()}, place)
        signs[rows] = torch.where(signs[rows] == 0, found, signs[rows])
    return torch.where(signs == 0, 1.0, signs)


def _sign_of_order(
    spec: WeightSpec, flats: Mapping[str, Tensor], place: Exponent
) -> Float[Tensor, "networks units"]:
    """Sign of each unit's largest entry; where both signs have it, of the first that makes a difference."""
    values = _by_unit(spec, flats, place)
    codes = _codes(spec, place, _uncoloured(spec, flats))
    ordered, negated = (_sorted(_Entries(part, codes)) for part in (values, -values))
    difference = torch.cat(
        [values.amax(-1, keepdim=True) + values.amin(-1, keepdim=True), ordered - negated], -1
    )
    first = (difference != 0).long().argmax(-1, keepdim=True)
    return difference.gather(-1, first)[..., 0].sign()


def _steps(
    spec: WeightSpec, scaling: Scaling, place: Exponent, flats: Mapping[str, Tensor]
) -> Float[Tensor, "networks units"]:
    """Steps that bring the largest of each unit's biases into (-1/2, 1/2] shifts, or a turned one to [-1/2, 1/2]."""
    turns = (_by_unit(spec, flats, place) / (scaling.shift * place.power)).amax(-1)
    nearest = turns.round()
    if _turns(scaling, place):  # at both ends, an odd step leads to the bias itself
        return torch.where(nearest % 2 == 1, nearest, -nearest)
    # halves are rounded to even; the lower one moves up, and away from it no step is left
    return torch.where(turns - nearest == -0.5, 1.0 - nearest, -nearest)


# -- order -------------------------------------------------------------------------------------------------


def _uncoloured(spec: WeightSpec, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = next(iter(flats.values()))
    return {
        name: flat.new_zeros((len(flat), math.prod(value_shape(spec, group))), dtype=torch.long)
        for name, group in spec.groups.items()
    }


def _colours(spec: WeightSpec, flats: Mapping[str, Tensor]) -> dict[str, Int[Tensor, "networks units"]]:
    """For every unit, how many of its group come before it; equal for units that nothing tells apart.

    Units of a nested group are counted across all outer units.
    """
    colours = _uncoloured(spec, flats)
    places = _occurrences(spec)
    chunk = max(1, _CHUNK // max(tensor.numel for tensor in spec.tensors.values()))
    changed = True
    while changed:
        changed = False
        for name in spec.groups:
            refined = _refine(colours[name], _keys(spec, flats, places[name], dict(colours)), chunk)
            changed = changed or not torch.equal(refined, colours[name])
            colours[name] = refined
    return colours


def _occurrences(spec: WeightSpec) -> dict[str, list[Exponent]]:
    """The places of every group, in the order of the spec."""
    places: dict[str, list[Exponent]] = {name: [] for name in spec.groups}
    for tensor, entry in spec.tensors.items():
        for at, cell in enumerate(entry.cells):
            for position, dim in enumerate(cell.dims):
                if dim.group is not None and cell.numel:
                    places[dim.group].append(Exponent(tensor, at, position))
    return places


def _refine(
    colour: Int[Tensor, "networks units"], keys: Iterator[Callable[[Tensor], Tensor]], chunk: int
) -> Int[Tensor, "networks units"]:
    """Tell apart units of one group that differ in a key, in the networks where some are equal so far."""
    refined = colour.clone()
    for key in keys:
        undecided = _undecided(refined)
        if not len(undecided):
            break
        for rows in undecided.split(chunk):
            refined[rows] = _rank(refined[rows] * refined.shape[-1] + _rank(key(rows)))
    return refined


def _keys(
    spec: WeightSpec, flats: Mapping[str, Tensor], places: Sequence[Exponent], colours: Mapping[str, Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """What may tell the units of a group apart: functions from networks' rows to (rows, units)."""
    for place in places:
        # nearly always the first position tells all units apart, and the others need no sorting
        for compare in (_first, _all):
            yield partial(_compared, compare, spec, flats, place, colours)


def _compared(
    compare: Callable[[_Entries], Tensor],
    spec: WeightSpec,
    flats: Mapping[str, Tensor],
    place: Exponent,
    colours: Mapping[str, Tensor],
    rows: Int[Tensor, " rows"],
) -> Tensor:
    codes = _codes(spec, place, {group: colour[rows] for group, colour in colours.items()})
    return compare(_Entries(_by_unit(spec, {place.tensor: flats[place.tensor][rows]}, place), codes))


def _undecided(colour: Int[Tensor, "networks units"]) -> Int[Tensor, " tied"]:
    """The networks in which some units have the same colour."""
    units = colour.shape[-1]
    return (colour.sum(-1) < units * (units - 1) // 2).nonzero()[:, 0]


def _first(entries: _Entries) -> Float[Tensor, "networks units"]:
    """The largest entry of each unit at the positions of the lowest code."""
    lowest = entries.codes == entries.codes.amin(-1, keepdim=True)
    return torch.where(lowest, entries.values, -torch.inf).amax(-1)


def _all(entries: _Entries) -> Int[Tensor, "networks units"]:
    """Ranks of the units by all their entries, compared in order: neighbouring columns are ranked together."""
    ranks = _rank(_sorted(entries).mT.contiguous())
    while ranks.shape[1] > 1:
        if ranks.shape[1] % 2:
            ranks = torch.cat([ranks, torch.zeros_like(ranks[:, :1])], dim=1)
        ranks = _rank(ranks[:, 0::2] * ranks.shape[-1] + ranks[:, 1::2])
    return ranks[:, 0]


def _rank(keys: Tensor) -> Tensor:
    """How many keys along the last axis are smaller; equal keys have equal ranks."""
    order = argsort(keys)
    ordered = keys.gather(-1, order)
    places = torch.arange(keys.shape[-1], device=keys.device).expand(keys.shape).clone()
    places[..., 1:].masked_fill_(ordered[..., 1:] == ordered[..., :-1], 0)
    return torch.empty_like(order).scatter_(-1, order, places.cummax(-1).values)


def _permutations(spec: WeightSpec, colours: Mapping[str, Tensor]) -> Element:
    """Permutations that sort the units by colour, and keep the order of equal ones."""
    found: Element = {}
    for name, group in sorted(spec.groups.items(), key=lambda item: len(item[1].within)):
        colour = colours[name].view(-1, *value_shape(spec, group))
        found[name] = pull(spec, name, found, colour).argsort(dim=-1, stable=True)
    return found
