"""Where coordinates enter a network and where values leave it: read from the spec, without knowing any architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from weightspace.errors import ConfigError
from weightspace.spec import TensorSpec, WeightSpec

MOST_COORDINATES = 3

Place = tuple[int, tuple[tuple[int, int, str | None], ...]]
"""Entries along one axis: the first one, and stride, size and group of each dim."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Columns of a matrix that read the same inputs, and what is added to their outputs.

    Args:
        weight: name of the matrix, which has two axes.
        output: the axis of the units that it writes to.
        start: the first column.
        size: number of columns.
        reads: the groups that the columns run over; none for fixed inputs.
        writes: the groups among the outputs; none for fixed outputs.
        bias: the vector that is added to the outputs; None without one.
        plain: whether the columns are next to each other, run through all rows, and are not tied to others.
        whole: whether the matrix has no other columns.
    """

    weight: str
    output: int
    start: int
    size: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    bias: str | None
    plain: bool
    whole: bool


@lru_cache(maxsize=64)
def layers_of(spec: WeightSpec) -> tuple[Layer, ...]:
    """All matrices of a weight space by what their columns read, in order; kernels and tables are none.

    Example:
        >>> from weightspace import WeightSpec
        >>> [(layer.weight, layer.size, layer.reads) for layer in layers_of(WeightSpec.mlp([2, 4, 1]))]
        [('layers.0.weight', 2, ()), ('layers.1.weight', 4, ('hidden0',))]
    """
    return tuple(layer for name in spec.tensors for layer in _of_matrix(spec, name))


def _of_matrix(spec: WeightSpec, name: str) -> list[Layer]:
    tensor = spec.tensors[name]
    output, read = tensor.units.output, tensor.units.input
    if len(tensor.shape) != 2 or output is None or read is None or tensor.kind != "parameter":
        return []
    if tensor.units.fan_in != tensor.shape[read]:  # a table, of which one row is taken
        return []
    found: dict[Place, set[Place]] = {}
    for cell in range(len(tensor.cells)):
        found.setdefault(_along(tensor, cell, read), set()).add(_along(tensor, cell, output))
    return [_layer(spec, name, columns, rows, len(found) == 1) for columns, rows in found.items()]


def _layer(spec: WeightSpec, name: str, columns: Place, rows: set[Place], whole: bool) -> Layer:
    tensor = spec.tensors[name]
    output = tensor.units.output
    assert output is not None
    start, dims = columns
    size = math.prod(size for _, size, _ in dims)
    contiguous = len(dims) <= 1 and all(stride == 1 for stride, _, _ in dims)
    covered = sum(math.prod(size for _, size, _ in row) for _, row in rows) == tensor.shape[output]
    return Layer(
        name,
        output,
        start,
        size,
        _groups([columns]),
        _groups(rows),
        _bias(spec, name, rows),
        contiguous and covered and not tensor.aliases,
        whole,
    )


def _along(tensor: TensorSpec, cell: int, axis: int) -> Place:
    stride = math.prod(tensor.shape[axis + 1 :])
    start = tensor.cells[cell].offset // stride % tensor.shape[axis]
    dims = (dim for dim in tensor.cells[cell].dims if dim.axis == axis)
    return start, tuple((dim.stride // stride, dim.size, dim.group) for dim in dims)


def _groups(places: Sequence[Place] | set[Place]) -> tuple[str, ...]:
    return tuple(sorted({group for _, dims in places for *_, group in dims if group is not None}))


def _bias(spec: WeightSpec, weight: str, rows: set[Place]) -> str | None:
    """The vector over the same units in the same module: the weight's ``bias``, or else the only one."""
    module, _, own = weight.rpartition(".")
    beside = {
        name.rpartition(".")[2]: name
        for name, tensor in spec.tensors.items()
        if len(tensor.shape) == 1 and tensor.kind == "parameter" and not tensor.aliases
        if name.rpartition(".")[0] == module
        if rows == {_along(tensor, cell, 0) for cell in range(len(tensor.cells))}
    }
    if own == "weight" and "bias" in beside:
        return beside["bias"]
    return next(iter(beside.values())) if len(beside) == 1 else None


def entries(spec: WeightSpec, name: str, dims: Sequence[int] = (1, 2, 3)) -> tuple[Layer, ...]:
    """Where coordinates enter a network: in its first layer, and wherever else they are read.

    Args:
        spec: the weight space.
        name: of the augmentation, for messages.
        dims: how many coordinates suit it.

    Raises:
        ConfigError: there are none, another number of them, several numbers, or they cannot be told from others.
    """
    found, expected = _entries(spec), f"{name}: expected a network of {_listed(dims)} coordinates"
    if not found:
        first = next((f" ({at} has shape {list(t.shape)})" for at, t in spec.tensors.items()), "")
        raise ConfigError(f"{expected}, found no layer of units that reads so few inputs{first}")
    sizes = sorted({layer.size for layer in found})
    if len(sizes) > 1 or sizes[0] not in dims:
        where = ", ".join(dict.fromkeys(layer.weight for layer in found))
        raise ConfigError(f"{expected}, found {_listed(sizes, 'and')} that {where} reads")
    for layer in found:
        if not layer.plain:
            raise ConfigError(
                f"{expected} in columns of their own, found columns of {layer.weight} that are tied, split or interleaved"
            )
        if not (layer.writes or _reads_units(spec, layer.weight)):
            raise ConfigError(
                f"{expected}, found {layer.weight}, which leads from fixed inputs to fixed outputs"
            )
    return found


@lru_cache(maxsize=64)
def _entries(spec: WeightSpec) -> tuple[Layer, ...]:
    few = tuple(layer for layer in layers_of(spec) if not layer.reads and layer.size <= MOST_COORDINATES)
    return few if any(layer.writes for layer in few) else ()


def _reads_units(spec: WeightSpec, weight: str) -> bool:
    return any(layer.reads for layer in layers_of(spec) if layer.weight == weight)


def last_layer(spec: WeightSpec, name: str) -> tuple[str, str]:
    """Weight and bias of the layer where the values of a coordinate network leave it.

    Raises:
        ConfigError: no coordinates, no such layer or several, one that is tied, or without a bias.
    """
    entries(spec, name)
    found = {layer.weight: layer for layer in layers_of(spec) if not layer.writes}
    if len(found) != 1:
        raise ConfigError(
            f"{name}: expected one layer that writes the outputs, found {', '.join(found) or 'none'}"
        )
    (last,) = found.values()
    if spec.tensors[last.weight].aliases:
        raise ConfigError(f"{name}: expected a last layer of its own, found {last.weight}, which is tied")
    return last.weight, bias_of(last, name)


def second_layer(spec: WeightSpec, name: str) -> tuple[Layer, Layer]:
    """The only layer that reads the coordinates, and the only one that reads its units.

    Raises:
        ConfigError: no coordinates, or not one layer after the other, or the second one without a bias.
    """
    first, *more = entries(spec, name)
    after = [layer for layer in layers_of(spec) if set(layer.reads) & set(first.writes)]
    stacked = not more and len(after) == 1 and all(layer.whole and layer.plain for layer in (first, *after))
    if not stacked or len(first.writes) != 1 or after[0].reads != first.writes:
        raise ConfigError(
            f"{name}: expected one layer that reads the coordinates and one that reads its units, found "
            f"{', '.join(dict.fromkeys(layer.weight for layer in (first, *more, *after)))}"
        )
    bias_of(after[0], name)
    return first, after[0]


def bias_of(layer: Layer, name: str) -> str:
    """The bias of a layer.

    Raises:
        ConfigError: it has none.
    """
    if layer.bias is None:
        raise ConfigError(f"{name}: expected a bias beside {layer.weight}, found none")
    return layer.bias


def _listed(numbers: Sequence[int], word: str = "or") -> str:
    *before, last = (str(number) for number in numbers)
    return f"{', '.join(before)} {word} {last}" if before else last
