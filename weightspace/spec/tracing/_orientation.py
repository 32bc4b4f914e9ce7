"""Which axes of a tensor are its output and input units: what its first reader does with each of them.

A parameter is followed through what only rearranges or rescales it (views, transpositions, a weight norm) to the
first operator that applies it to data. Products, convolutions and tables tell their axes apart; what is added or
multiplied entry by entry has no input units, but for an axis of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from torch import Tensor, fx

from weightspace.spec._types import Frozen, Orientation, TensorSpec, WeightSpec
from weightspace.spec.tracing._program import Program, argument, operator_name

Axes = tuple[frozenset[int], ...]  # of a value: which axes of the parameter each of its own holds

_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}
_KEEPS = {
    *("alias", "clone", "detach", "_to_copy", "contiguous", "expand", "slice", "narrow", "flip", "roll"),
    *("split", "split_with_sizes", "chunk", "getitem", "neg", "abs", "exp", "sigmoid", "tanh", "softplus"),
}
_POINTWISE = {
    *("add", "sub", "rsub", "mul", "div", "where", "cat", "maximum", "minimum", "_weight_norm", "lerp"),
    *("layer_norm", "rms_norm", "index", "index_select", "add_", "mul_", "prelu"),
}


def with_orientations(spec: WeightSpec, programs: Sequence[Program]) -> WeightSpec:
    """The spec with the orientation of each tensor, as the first program that reads it shows it."""

    def oriented(name: str, tensor: TensorSpec) -> TensorSpec:
        found = (_orientation(program, name, tensor) for program in programs if len(tensor.shape) > 1)
        known = next((each for each in found if each is not None), None)
        return replace(tensor, orientation=known) if known != tensor.units else tensor

    tensors = {name: oriented(name, tensor) for name, tensor in spec.tensors.items()}
    return spec if tensors == dict(spec.tensors) else replace(spec, tensors=Frozen(tensors))


def _orientation(program: Program, name: str, tensor: TensorSpec) -> Orientation | None:
    """None where nothing is known."""
    moved = _moved(program)
    held: dict[fx.Node, Axes] = {
        node: tuple(frozenset((axis,)) for axis in range(len(tensor.shape)))
        for node in program.nodes
        if program.names.get(node.name) == name
    }
    for node in program.nodes:
        source = next((source for source in node.all_input_nodes if source in held), None)
        if source is None:
            continue
        operator, axes = operator_name(node), held[source]
        if operator in _READERS:
            units = _READERS[operator](node, source, moved)
            return None if units is None else _named(tensor, axes, *units)
        if operator in _POINTWISE and node in moved:
            return _table(tensor)
        passed = _passed(node, source, axes, operator)
        if passed is not None:
            held[node] = passed
    return None


def _moved(program: Program) -> set[fx.Node]:
    """Nodes whose values depend on the arguments of the call."""
    moved: set[fx.Node] = set()
    for node in program.nodes:
        if node.name in program.inputs or not moved.isdisjoint(node.all_input_nodes):
            moved.add(node)
    return moved


def _named(
    tensor: TensorSpec, axes: Axes, output: int, inputs: Sequence[int], summed: Sequence[int], groups: int
) -> Orientation:
    """Axes of a value as axes of the parameter behind it.

    Args:
        tensor: the parameter.
        axes: of the value that is read.
        output: axis of that value.
        inputs: the axis of input units, if there is one.
        summed: all axes over which is summed.
        groups: into which the summed axes fall.
    """
    units = [max(axes[at], default=None) for at in (output, *inputs)]
    if units[0] is None:  # it scales what is read, such as the norms of a weight's rows
        return _table(tensor)
    entries = math.prod(tensor.shape[axis] for axis in frozenset().union(*(axes[at] for at in summed)))
    return Orientation(units[0], units[1] if inputs else None, max(entries // groups, 1))


def _table(tensor: TensorSpec) -> Orientation:
    """What is added or multiplied: units on the last axis with a group, positions on the only other one."""
    wide = [axis for axis, size in enumerate(tensor.shape) if size > 1]
    moving = {dim.axis for cell in tensor.cells for dim in cell.dims if dim.group is not None}
    units = [axis for axis in wide if axis in moving] or wide
    others = [axis for axis in wide if axis != units[-1]]
    return Orientation(units[-1] if units else None, others[0] if len(others) == 1 else None, 1)


# -- what a tensor passes through --------------------------------------------------------------------------


def _passed(node: fx.Node, source: fx.Node, axes: Axes, operator: str) -> Axes | None:
    """The axes of an operator's value; None where they cannot be told."""
    value, given = node.meta.get("val"), source.meta.get("val")
    rank = len(axes)
    if operator in ("t", "numpy_T", "transpose", "permute"):
        return tuple(axes[at] for at in _order(node, operator, rank))
    if operator == "unsqueeze":
        at = int(argument(node, "dim")) % (rank + 1)
        return (*axes[:at], frozenset(), *axes[at:])
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(given, list | tuple) and given:
        given = given[0]
    if not isinstance(value, Tensor) or not isinstance(given, Tensor):
        return None
    if operator in ("squeeze", "select") or operator in _VIEWS:
        return _viewed(operator, node, axes, given.shape, value.shape)
    if operator not in _KEEPS and operator not in _POINTWISE:
        return None
    wider: Axes = (frozenset(),) * (len(value.shape) - rank)
    sizes = zip(axes, given.shape, value.shape[len(wider) :], strict=False)
    return (*wider, *(axis if size == new or size > 1 else frozenset() for axis, size, new in sizes))


def _order(node: fx.Node, operator: str, rank: int) -> list[int]:
    if operator == "permute":
        return [int(at) % rank for at in argument(node, "dims")]
    order = list(range(rank))
    if rank < 2 or operator == "numpy_T":
        return order[::-1]
    one, other = (0, 1) if operator == "t" else (int(argument(node, "dim0")), int(argument(node, "dim1")))
    order[one], order[other] = order[other], order[one]
    return order


def _viewed(
    operator: str, node: fx.Node, axes: Axes, before: Sequence[int], after: Sequence[int]
) -> Axes | None:
    if operator == "select":
        at = int(argument(node, "dim")) % len(axes)
        return (*axes[:at], *axes[at + 1 :])
    if math.prod(before) != math.prod(after):
        return None
    spans = list(_spans(before))
    return tuple(
        frozenset().union(*(axis for axis, (low, high) in zip(axes, spans, strict=True) if low < end and start < high))
        for start, end in _spans(after)
    )  # fmt: skip


def _spans(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stride of each axis, and of the one before it: of a view, axes hold the same where these overlap."""
    ends = list(accumulate(reversed(shape), lambda x, y: x * y, initial=1))[::-1]
    return zip(ends[1:], ends[:-1], strict=True)


# -- what reads a tensor -----------------------------------------------------------------------------------

Units = tuple[int, Sequence[int], Sequence[int], int]
Reader = Callable[[fx.Node, fx.Node, set[fx.Node]], Units | None]


def _linear(node: fx.Node, source: fx.Node, moved: set[fx.Node]) -> Units | None:
    return (0, (1,), (1,), 1) if argument(node, "weight") is source else None


def _product(node: fx.Node, source: fx.Node, moved: set[fx.Node]) -> Units | None:
    """A matrix beside data; of two parameters nothing is known."""
    *_, left, right = [part for part in node.args if isinstance(part, fx.Node)]
    rank = len(source.meta["val"].shape)
    if node not in moved or left is right or source not in (left, right) or rank < 2:
        return None
    rows, columns = rank - 2, rank - 1
    output, contracted = (rows, columns) if source is left else (columns, rows)
    return output, (contracted,), (contracted,), 1


def _einsum(node: fx.Node, source: fx.Node, moved: set[fx.Node]) -> Units | None:
    """Letters that only this operand brings to the output, and those that it shares and that are summed."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if node not in moved or "." in equation or not isinstance(operands, list | tuple):
        return None
    terms, arrow, result = equation.partition("->")
    place = list(operands).index(source)
    letters = terms.split(",")[place]
    others = set("".join(term for at, term in enumerate(terms.split(",")) if at != place))
    outputs = [at for at, letter in enumerate(letters) if letter in result and letter not in others]
    summed = [at for at, letter in enumerate(letters) if letter not in result and letter in others]
    return (outputs[-1], summed[-1:], summed, 1) if arrow and outputs else None


def _convolution(node: fx.Node, source: fx.Node, moved: set[fx.Node]) -> Units | None:
    """Axes 0 and 1, exchanged if it is transposed; axis 1 of a depthwise one has no units."""
    if argument(node, "weight") is not source:
        return None
    transposed = bool(argument(node, "transposed")) or "transpose" in operator_name(node)
    groups = int(argument(node, "groups"))
    shape: Sequence[int] = source.meta["val"].shape
    kernel = range(2, len(shape))
    if groups > 1 and shape[1] == 1 and (not transposed or groups == shape[0]):
        return 0, (), kernel, 1
    if transposed:
        return 1, (0,), (0, *kernel), groups
    return 0, (1,), (1, *kernel), 1


def _embedding(node: fx.Node, source: fx.Node, moved: set[fx.Node]) -> Units | None:
    """Rows are looked up one at a time, so that nothing is summed."""
    return (1, (0,), (), 1) if argument(node, "weight") is source else None


_READERS: Mapping[str, Reader] = {
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "matmul", "addmm", "baddbmm", "mv"), _product),
    "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), _embedding),
}
