"""Group elements acting on flattened networks, all tensors at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._arguments import check_element
from weightspace.spec._types import Cell, Element, WeightSpec, cell_index

_LARGEST = 2**20  # parameters of a network for which tables are made


def act_flat(
    spec: WeightSpec, element: Element, flat: Float[Tensor, "batch parameters"]
) -> Float[Tensor, "batch parameters"]:
    """What :func:`weightspace.spec.act` does, for flattened networks and one element for each.

    On a CPU all tensors are moved in one pass of compiled code, several times as fast as tensor by tensor for batches of
    small networks; elsewhere, in other types than float32, and where gradients flow, ``act`` does it.

    Args:
        spec: the weight space.
        element: values with one batch axis.
        flat: networks in spec order.

    Raises:
        SpecError: the element is not of this spec, or of another number of networks.
    """
    if not _compiled(element, flat):
        return spec.flatten(spec.act(element, spec.unflatten(flat)))
    if not element:
        return flat.clone()
    from weightspace.spec._kernels import act

    tables = _tables(spec, frozenset(element))
    arguments = tables.values_of(element, len(flat))
    out = np.empty(flat.shape, np.float32)
    if not act(np.ascontiguousarray(flat.detach().numpy()), *arguments, out):
        check_element(spec, element)  # which says what is wrong
        raise SpecError("element: a permutation holds other numbers than those of its group's units")
    return torch.from_numpy(out)


def _compiled(element: Element, flat: Tensor) -> bool:
    """Whether compiled code does it."""
    if flat.device.type != "cpu" or flat.dtype != torch.float32 or flat.shape[-1] > _LARGEST:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (flat, *element.values())))


@dataclass(frozen=True)
class _Columns:
    """Where the values of each group or scaling stand in a table with one column per unit."""

    start: dict[str, int]
    shape: dict[str, tuple[int, ...]]
    total: int

    @classmethod
    def of(cls, shapes: dict[str, tuple[int, ...]]) -> _Columns:
        counts = [math.prod(shape) for shape in shapes.values()]
        starts = [0, *accumulate(counts)]
        return cls(dict(zip(shapes, starts, strict=False)), shapes, starts[-1])

    def fill(self, table: np.ndarray, name: str, values: Tensor) -> None:
        networks, shape = len(table), self.shape[name]
        if tuple(values.shape) != (networks, *shape):
            raise SpecError(
                f"element: {name!r} should have shape {[networks, *shape]}, found {list(values.shape)}"
            )
        start = self.start[name]
        table[:, start : start + math.prod(shape)] = values.detach().cpu().numpy().reshape(networks, -1)


@dataclass(frozen=True)
class _Tables:
    """What :func:`weightspace.spec._kernels.act` reads, of one spec."""

    spec: WeightSpec
    groups: _Columns
    scalings: _Columns
    identity: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    base: np.ndarray
    unit: np.ndarray
    stride: np.ndarray
    factor: np.ndarray
    shift: np.ndarray

    def values_of(self, element: Element, networks: int) -> tuple[np.ndarray, ...]:
        """The arguments of the kernel between the networks and the output."""
        units = np.empty((networks, len(self.identity)), np.int32)
        units[:] = self.identity
        values = np.ones((networks, 2 * self.scalings.total + 1), np.float32)
        steps = np.zeros((networks, 2 * self.scalings.total + 1), np.float32)
        for name, given in element.items():
            self._check(name, given)
            if name in self.spec.groups:
                self.groups.fill(units, name, given)
            else:
                self._fill_scaling(name, given, values, steps)
        lists = self.base, self.unit, self.stride, values, self.factor, steps, self.shift
        return units, self.sizes, self.first, *lists

    def _check(self, name: str, given: Tensor) -> None:
        """Refuse what the kernel does not look at: names, types, and values of scalings."""
        scaling = self.spec.scalings.get(name)
        kind = "permutation" if name in self.spec.groups else scaling and scaling.kind
        fits = kind in ("permutation", "phase") and given.dtype == torch.int64
        if kind in ("sign", "positive"):
            numbers = given.detach().cpu().numpy()
            good = np.abs(numbers) == 1 if kind == "sign" else (numbers > 0) & (numbers < np.inf)
            fits = bool(good.all())
        if not fits:
            check_element(self.spec, {name: given})  # which says what is wrong

    def _fill_scaling(self, name: str, given: Tensor, values: np.ndarray, steps: np.ndarray) -> None:
        """A scaling, in the second half its inverse; a phase as the sign that it multiplies by, and what it adds."""
        scaling, start = self.spec.scalings[name], self.scalings.start[name]
        inverse = slice(self.scalings.total + start, self.scalings.total + start + given[0].numel())
        if scaling.kind == "phase":
            self.scalings.fill(steps, name, given * scaling.shift)
            steps[:, inverse] = -steps[:, start : start + given[0].numel()]
            given = 1 - 2 * (given % 2)
        self.scalings.fill(values, name, given)
        values[:, inverse] = 1.0 / values[:, start : start + given[0].numel()]


@lru_cache(maxsize=32)
def _tables(spec: WeightSpec, moved: frozenset[str]) -> _Tables:
    """For elements that have these groups and scalings."""
    groups = _Columns.of({name: spec.unit_shape(name) for name in spec.groups})
    scalings = _Columns.of({name: spec.unit_shape(scaling.group) for name, scaling in spec.scalings.items()})
    base = np.empty(spec.num_parameters, np.int64)
    moves, factors, shifts = (
        _Lists(spec.num_parameters, total) for total in (groups.total, 2 * scalings.total, 2 * scalings.total)
    )
    for cell, at in _cells(spec).values():
        grouped = [place for place, dim in enumerate(cell.dims) if dim.group in moved]
        base[at] = at - sum(_numbers(cell, place) * cell.dims[place].stride for place in grouped)
        for place in grouped:
            dim = cell.dims[place]
            moves.add(at, groups.start[str(dim.group)] + _units(cell, place), dim.stride)
    for name, scaling in spec.scalings.items():
        used = ((scaling.exponents, factors), (scaling.shifts, shifts)) if name in moved else ()
        for places, lists in used:
            for found in places:
                cell, at = _cells(spec)[found.tensor, found.cell]
                half = scalings.total if found.power < 0 else 0
                for _ in range(abs(found.power)):
                    lists.add(at, half + scalings.start[name] + _units(cell, found.dim))
    shapes = groups.shape.values()
    identity = np.concatenate([*(np.broadcast_to(np.arange(s[-1]), s).ravel() for s in shapes), [0]])
    sizes = np.concatenate([*(np.full(math.prod(s), s[-1]) for s in shapes), [1]])
    unit, stride = moves.arrays()
    return _Tables(
        spec,
        groups,
        scalings,
        identity,
        sizes,
        np.arange(len(identity)) - identity,
        base.astype(np.int32),
        unit,
        stride,
        factors.arrays()[0],
        shifts.arrays()[0],
    )


@lru_cache(maxsize=32)
def _cells(spec: WeightSpec) -> dict[tuple[str, int], tuple[Cell, np.ndarray]]:
    """Every cell, and where its elements stand in a flattened network."""
    starts = accumulate((tensor.numel for tensor in spec.tensors.values()), initial=0)
    return {
        (name, number): (cell, np.asarray(start + cell_index(cell)))
        for (name, tensor), start in zip(spec.tensors.items(), starts, strict=False)
        for number, cell in enumerate(tensor.cells)
    }


def _numbers(cell: Cell, place: int) -> np.ndarray:
    """The index along one dim, such that it broadcasts over the cell."""
    shape = [1] * len(cell.dims)
    shape[place] = cell.dims[place].size
    return np.arange(cell.dims[place].size).reshape(shape)


def _units(cell: Cell, place: int) -> np.ndarray:
    """The number of a dim's unit among all units of its group, the outer groups' first; it broadcasts over the cell."""
    number = np.zeros([1] * len(cell.dims), np.int64)
    for at in (*cell.dims[place].parents, place):
        number = number * cell.dims[at].size + _numbers(cell, at)
    return number


class _Lists:
    """A list of columns for every parameter, and a number for each; short lists are filled with ``nothing`` and 0."""

    def __init__(self, parameters: int, nothing: int) -> None:
        self.used = np.zeros(parameters, np.int64)
        self.nothing = nothing
        self.layers: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, at: np.ndarray, columns: np.ndarray, number: int = 0) -> None:
        """One more column for each of the parameters ``at``, which are all different."""
        places, columns = at.ravel(), np.broadcast_to(columns, at.shape).ravel()
        depth = self.used[places]
        for layer in np.unique(depth):
            if layer == len(self.layers):
                self.layers.append(
                    (np.full(len(self.used), self.nothing), np.zeros(len(self.used), np.int64))
                )
            chosen = depth == layer
            self.layers[layer][0][places[chosen]] = columns[chosen]
            self.layers[layer][1][places[chosen]] = number
        self.used[places] += 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Columns and numbers, (longest list, parameters)."""
        if not self.layers:
            return np.empty((0, len(self.used)), np.int32), np.empty((0, len(self.used)), np.int32)
        columns, numbers = (np.stack(part).astype(np.int32) for part in zip(*self.layers, strict=True))
        return columns, numbers
