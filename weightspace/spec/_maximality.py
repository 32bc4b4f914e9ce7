r"""Search a small network for symmetries that its spec lacks: ``verify`` proves soundness, this maximality.

The search knows nothing of the rules by which specs are traced. A *move* exchanges two unit blocks of one axis
of one tensor, or changes the sign of one. With two fixed units the moves of one factorisation are involutions
that commute, so that sets of moves are vectors over GF(2), and those that preserve the network's function a
subspace. It is found in one pass over the exported graph: after every operator, only those sets of moves stay
under which the computed value is a reordering (a change of signs) of what it was. Sets of forty moves, as the
residual stream of a transformer has, are found as easily as the three of a hidden layer.

Positive scalings need no search. With one log-scale ``a`` for every index of every axis of every tensor,

    f(e^{a} w) = f(w) \text{ for all } w \iff \langle \nabla_w f(w), w \cdot a \rangle = 0 \text{ for all } w,

so that they are a null space, measured at random ``w``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from weightspace.errors import SpecError
from weightspace.spec._elements import act
from weightspace.spec._types import Element, Symmetry, Weights, WeightSpec, cell_index
from weightspace.spec._verify import GAINS, _changes, _counts, _double, _state, _telling_gain, randomised
from weightspace.spec.tracing import RULES, Program, as_call, export
from weightspace.spec.tracing._program import call, operator_name

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
REPLICATES = 2  # random networks compared at once: a ReLU that is off in one may be on in the other
CHECKS = 4  # further random networks on which what was found is confirmed
PRECISION = 1e-9  # relative: values closer than that are equal
TRIES = 4096  # sets of moves tried at one operator
MANY = 4  # windows of one axis that move by themselves; more move together
RECURRENT = {
    "gru",
    "lstm",
    "rnn_tanh",
    "rnn_relu",
}  # unrolled: one operator would be asked for too many moves
COTANGENTS = 4  # gradients taken per random network


@dataclass(frozen=True)
class Move:
    """A change of one axis of one tensor.

    Args:
        tensor: its name.
        axis: the axis.
        starts: where on the axis the windows begin in which the move happens.
        stride: length of one unit block.
        units: which blocks of a window: the two that change places, or the one that is rescaled.
        power: of a positive factor, with which it multiplies.
    """

    tensor: str
    axis: int
    starts: tuple[int, ...]
    stride: int
    units: tuple[int, ...]
    power: float = 1.0

    def indices(self, unit: int) -> list[int]:
        """The indices of one unit's blocks on the axis."""
        first = [start + unit * self.stride for start in self.starts]
        return [start + step for start in first for step in range(self.stride)]


@dataclass(frozen=True)
class MissedSymmetry:
    """A set of moves that together leave the network's function as it is, though the spec has no such element.

    Args:
        kind: ``"permutation"``, ``"sign"`` or ``"positive"``.
        moves: what is done, all at once.
        change: relative change of the outputs that was measured, rounding alone.
    """

    kind: Symmetry
    moves: tuple[Move, ...]
    change: float

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(map(self._place, self.moves))}"

    def _place(self, move: Move) -> str:
        units = ("<->" if self.kind == "permutation" else " ").join(map(str, move.units))
        size = f" of {move.stride}" if move.stride > 1 else ""
        start = f" from {', '.join(map(str, move.starts))}" if move.starts != (0,) else ""
        power = f" ^{move.power:g}" if self.kind == "positive" else ""
        return f"{move.tensor} axis {move.axis} units {units}{size}{start}{power}"


def missed_symmetries(
    spec: WeightSpec,
    module: nn.Module,
    inputs: Inputs,
    *,
    outputs: Sequence[str] | None = None,
    symmetries: Sequence[Symmetry] = ("permutation", "positive", "sign"),
    largest: int = 14,
    seed: int = 0,
) -> list[MissedSymmetry]:
    """Symmetries of a small network that its spec lacks; an empty list for a maximal spec.

    For networks of a few thousand parameters, whose widths should differ: permutations take one pass over the
    graph for every number of units and every stride into which an axis factors. What is found is checked on the
    whole network, so nothing in the list is a false alarm about the *function*; whether the spec should have it
    is another question (an input that never varies frees the units that read it).

    Not found: permutations that no two unit blocks 0 and 1, or the last two, show; symmetries under which some
    value within the network is not merely reordered or rescaled (rotations); mixtures of both; units whose index
    is spread over two axes and which move for one outer unit only; phases. Left out on purpose: what no output
    depends on, and one factor common to all units of a group.

    Args:
        spec: what is claimed; sound, as :func:`weightspace.spec.verify` finds.
        module: the network; it must be exportable, and is not changed.
        inputs: example inputs, as for :func:`weightspace.spec.trace`.
        outputs: names of the outputs that count; all by default.
        symmetries: which kinds to look for.
        largest: how many moves may be needed at one operator to keep its value.
        seed: seed of the random weights.

    Raises:
        SpecError: the module cannot be exported, or the kind of symmetry cannot be searched for.

    Example:
        >>> from dataclasses import replace
        >>> from weightspace.spec import Frozen, WeightSpec
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> spec = WeightSpec.trace(net, torch.randn(5, 2))
        >>> missed_symmetries(spec, net, torch.randn(5, 2))
        []
        >>> poorer = replace(spec, scalings=Frozen())
        >>> print(missed_symmetries(poorer, net, torch.randn(5, 2), symmetries=["positive"])[0])
        positive: 0.weight axis 0 units 2 ^1, 0.bias axis 0 units 2 ^1, 2.weight axis 1 units 2 ^-1
    """
    for kind in symmetries:
        if kind not in ("permutation", "positive", "sign"):
            raise SpecError(f"symmetries: expected permutation, positive or sign, found {kind!r}")
    search = _Search.of(spec, module, inputs, outputs, seed)
    found: list[MissedSymmetry] = []
    for kind in symmetries:
        found += _scales(search) if kind == "positive" else _moves(search, kind, largest)
    return found


@dataclass(frozen=True)
class _Search:
    """One network, ready to run with other weights."""

    spec: WeightSpec
    program: Program
    inputs: Inputs
    networks: tuple[Weights, ...]
    fresh: tuple[Weights, ...]

    @classmethod
    def of(
        cls, spec: WeightSpec, module: nn.Module, inputs: Inputs, outputs: Sequence[str] | None, seed: int
    ) -> _Search:
        program = export(module, inputs, outputs, set(RULES) - RECURRENT)
        state = _state(spec, module)
        wide: Inputs = pytree.tree_map(_double, inputs)
        gain = max(GAINS[1], _telling_gain(spec, state, lambda w: _outputs(program, w, wide), seed))
        generator = torch.Generator().manual_seed(seed)
        drawn = [randomised(state, generator, gain) for _ in range(REPLICATES + CHECKS)]
        return cls(spec, program, wide, tuple(drawn[:REPLICATES]), tuple(drawn[REPLICATES:]))

    def redrawn(self, generator: torch.Generator) -> Weights:
        """Further random weights of the same scale."""
        return randomised(self.fresh[0], generator)

    def change(self, move: Callable[[Weights], Weights]) -> float:
        """Worst relative change of the outputs when a few random networks are changed."""
        worst = 0.0
        for network in self.fresh:
            before, after = (
                _outputs(self.program, w, self.inputs) for w in (network, network | move(network))
            )
            worst = max(worst, _changes(before, after))
        return worst

    def is_unused(self, places: Mapping[str, Tensor]) -> bool:
        """Whether some entries (masks by name) can be anything, so that no symmetry of theirs counts."""
        return (
            self.change(
                lambda w: {name: torch.where(at, w[name] * 1.7 + 0.3, w[name]) for name, at in places.items()}
            )
            <= PRECISION
        )


def _outputs(program: Program, weights: Weights, inputs: Inputs) -> list[Tensor]:
    values = program.run(weights, inputs)
    return [values[node.name] for _, node in program.outputs if _counts(values[node.name])]


# -- permutations and signs: one pass over the graph for each factorisation --------------------------------

Change = np.ndarray[Any, Any]


class _Kind(Protocol):
    """How the values of a network change under moves: by reordering, or by signs."""

    def of(self, move: Move, shape: Sequence[int]) -> Change: ...

    def apply(self, change: Change, value: Tensor) -> Tensor: ...

    def compose(self, first: Change, second: Change) -> Change: ...

    def read(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Change | None:
        """What turned ``before`` into ``after`` in all replicates; None if nothing of this kind did."""
        ...


class _Swaps:
    """A change is the position from which each entry is taken."""

    def of(self, move: Move, shape: Sequence[int]) -> Change:
        order = np.arange(shape[move.axis])
        first, second = (move.indices(unit) for unit in move.units)
        order[first], order[second] = second, first
        return np.arange(math.prod(shape)).reshape(tuple(shape)).take(order, move.axis).reshape(-1)

    def apply(self, change: Change, value: Tensor) -> Tensor:
        return value.reshape(-1)[torch.from_numpy(change)].reshape(value.shape)

    def compose(self, first: Change, second: Change) -> Change:
        return first[second]

    def read(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Change | None:
        keys = _keys([*before, *after])
        old, new = keys[: len(before)], keys[len(before) :]
        source = np.arange(old.shape[1])
        differ = np.flatnonzero((np.abs(old - new) > 1).any(0))
        if len(differ):
            by_old, by_new = (np.lexsort(side[:, differ]) for side in (old, new))
            source[differ[by_new]] = differ[by_old]
        return source if (np.abs(old[:, source] - new) <= 1).all() else None


class _Flips:
    """A change is a sign for each entry."""

    def of(self, move: Move, shape: Sequence[int]) -> Change:
        signs = np.ones(tuple(shape))
        np.moveaxis(signs, move.axis, 0)[move.indices(move.units[0])] = -1.0
        return signs.reshape(-1)

    def apply(self, change: Change, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value * torch.from_numpy(change).reshape(value.shape)

    def compose(self, first: Change, second: Change) -> Change:
        return first * second

    def read(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Change | None:
        keys = _keys([*before, *after])
        old, new = keys[: len(before)], keys[len(before) :]
        kept, turned = (np.abs(old - new) <= 1).all(0), (np.abs(old + new) <= 1).all(0)
        if not before[0].is_floating_point():
            turned = np.zeros_like(kept)
        return np.where(kept, 1.0, -1.0) if (kept | turned).all() else None


def _keys(values: Sequence[Tensor]) -> Change:
    """Entries as whole multiples of what rounding may change, one row per tensor; -inf and NaN as themselves."""
    flat = torch.stack([value.reshape(-1).double() for value in values])
    finite = flat[flat.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    keys: Change = (flat / ((scale or 1.0) * PRECISION)).round().nan_to_num(3e15, 2e15, -2e15).numpy()
    return keys


class _Generator(NamedTuple):
    """A set of moves, and what it does to each value of the graph so far: by node, one change per leaf."""

    moves: frozenset[Move]
    changes: dict[str, tuple[Change | None, ...]]


def _moves(search: _Search, kind: Literal["permutation", "sign"], largest: int) -> list[MissedSymmetry]:
    """Preserving sets of moves outside the spec."""
    algebra: _Kind = _Swaps() if kind == "permutation" else _Flips()
    within = _reorders if kind == "permutation" else _SignSpan(search.spec)
    values = [search.program.run(weights, search.inputs, everything=True) for weights in search.networks]
    missed: dict[frozenset[Move], MissedSymmetry] = {}
    for family in _families(search, kind):
        for moves in _preserving(search, algebra, values, family, largest):
            changes = _by_tensor(search.spec, algebra, moves)
            if moves in missed or within(search.spec, changes):
                continue
            effect = _effect(algebra, changes)
            touched = {name: new != search.fresh[0][name] for name, new in effect(search.fresh[0]).items()}
            change = search.change(effect)
            if change <= PRECISION and not search.is_unused(touched):
                order = list(search.spec.tensors)
                ordered = sorted(moves, key=lambda move: (order.index(move.tensor), move.axis, move.starts))
                missed[moves] = MissedSymmetry(kind, tuple(ordered), change)
    return list(missed.values())


def _effect(algebra: _Kind, changes: Mapping[str, Change]) -> Callable[[Weights], Weights]:
    return lambda network: {name: algebra.apply(change, network[name]) for name, change in changes.items()}


def _by_tensor(spec: WeightSpec, algebra: _Kind, moves: Iterable[Move]) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for move in moves:
        change = algebra.of(move, spec.tensors[move.tensor].shape)
        changes[move.tensor] = (
            algebra.compose(changes[move.tensor], change) if move.tensor in changes else change
        )
    return changes


def _preserving(
    search: _Search, algebra: _Kind, values: Sequence[Mapping[str, Any]], family: Sequence[Move], largest: int
) -> list[frozenset[Move]]:
    """Sets of moves of one family that span all that preserve the outputs."""
    placeholders = {name: node for node, name in search.program.names.items()}
    generators = []
    for move in family:
        change = algebra.of(move, search.spec.tensors[move.tensor].shape)
        generators.append(_Generator(frozenset([move]), {placeholders[move.tensor]: (change,)}))
    for node in search.program.nodes:
        if node.op == "call_function":
            generators = _equivariant(node, generators, algebra, values, largest)
    for _, node in search.program.outputs:
        generators = _fixing(node, generators, algebra, values, largest)
    return [generator.moves for generator in generators]


def _equivariant(
    node: fx.Node,
    generators: Sequence[_Generator],
    algebra: _Kind,
    values: Sequence[Mapping[str, Any]],
    largest: int,
) -> list[_Generator]:
    """Keep the sets of moves under which an operator's value is reordered (or changes signs)."""
    sources = [source.name for source in node.all_input_nodes]
    before = [_leaves(node, network[node.name]) for network in values]

    def read(subset: Sequence[_Generator]) -> tuple[Change | None, ...] | None:
        after: list[list[Any]] = []
        changes: list[Change | None] | None = None
        for network in values:
            moved = {name: _moved(algebra, subset, name, network[name]) for name in sources}
            after.append(_leaves(node, call(node, moved)))
            changes = _read_leaves(algebra, before[: len(after)], after)
            if changes is None:
                break  # most sets fail at the first network
        return None if changes is None else tuple(changes)

    return _kept(node, sources, generators, algebra, read, largest)


def _read_leaves(
    algebra: _Kind, before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]
) -> list[Change | None] | None:
    changes: list[Change | None] = []
    for old, new in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True):
        change = algebra.read(old, new) if isinstance(old[0], Tensor) else None
        if change is None and isinstance(old[0], Tensor):
            return None
        changes.append(change)
    return changes


def _fixing(
    node: fx.Node,
    generators: Sequence[_Generator],
    algebra: _Kind,
    values: Sequence[Mapping[str, Any]],
    largest: int,
) -> list[_Generator]:
    """Keep the sets of moves that leave an output as it is."""

    def read(subset: Sequence[_Generator]) -> tuple[Change | None, ...] | None:
        for network in values:
            value = network[node.name]
            if _changes([value], [_moved(algebra, subset, node.name, value)]) > PRECISION:
                return None
        return ()

    return _kept(node, [node.name], generators, algebra, read, largest)


def _kept(
    node: fx.Node,
    sources: Sequence[str],
    generators: Sequence[_Generator],
    algebra: _Kind,
    read: Any,
    largest: int,
) -> list[_Generator]:
    """A basis of the sums of generators that ``read`` accepts; the smallest sums first."""
    active = [generator for generator in generators if any(name in generator.changes for name in sources)]
    kept = [generator for generator in generators if generator not in active]
    if not active:
        return list(generators)
    span = _Span()
    for chosen in _subsets(len(active), largest):
        if len(span) == len(active):
            break
        if span.has(sum(1 << at for at in chosen)):
            continue
        subset = [active[at] for at in chosen]
        changes = read(subset)
        if changes is not None:
            span.add(sum(1 << at for at in chosen))
            kept.append(_sum(subset, algebra, node.name, changes))
    return kept


def _subsets(count: int, largest: int) -> Iterator[tuple[int, ...]]:
    tries = 0
    for size in range(1, min(count, largest) + 1):
        for chosen in combinations(range(count), size):
            yield chosen
            tries += 1
            if tries > TRIES:
                return


def _sum(
    subset: Sequence[_Generator], algebra: _Kind, name: str, changes: tuple[Change | None, ...]
) -> _Generator:
    moves: frozenset[Move] = frozenset()
    merged: dict[str, tuple[Change | None, ...]] = {}
    for generator in subset:
        moves = moves ^ generator.moves
        for node, change in generator.changes.items():
            merged[node] = _both(algebra, merged[node], change) if node in merged else change
    if any(change is not None and not _is_identity(change) for change in changes):
        merged[name] = changes
    return _Generator(moves, merged)


def _both(
    algebra: _Kind, first: tuple[Change | None, ...], second: tuple[Change | None, ...]
) -> tuple[Change | None, ...]:
    return tuple(
        b if a is None else a if b is None else algebra.compose(a, b)
        for a, b in zip(first, second, strict=True)
    )


def _is_identity(change: Change) -> bool:
    return bool((change == (1.0 if change.dtype.kind == "f" else np.arange(len(change)))).all())


def _leaves(node: fx.Node, value: Any) -> list[Any]:
    """The tensors of a value that somebody reads, None for the others."""
    if not isinstance(value, tuple | list):
        return [value]
    read = {user.args[1] for user in node.users if operator_name(user) == "getitem"}
    return [part if place in read else None for place, part in enumerate(value)]


def _moved(algebra: _Kind, subset: Sequence[_Generator], name: str, value: Any) -> Any:
    for generator in subset:
        changes = generator.changes.get(name)
        if changes is None:
            continue
        if not isinstance(value, tuple | list):
            value = value if changes[0] is None else algebra.apply(changes[0], value)
        else:
            value = [
                part if change is None else algebra.apply(change, part)
                for part, change in zip(value, changes, strict=True)
            ]
    return value


class _Span:
    """Vectors over GF(2), as the bits of integers."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def _reduced(self, vector: int) -> int:
        while vector and (row := self._rows.get(vector.bit_length())) is not None:
            vector ^= row
        return vector

    def has(self, vector: int) -> bool:
        """Whether it is a sum of those added."""
        return not self._reduced(vector)

    def add(self, vector: int) -> None:
        """One more vector."""
        vector = self._reduced(vector)
        if vector:
            self._rows[vector.bit_length()] = vector


# -- which moves there are ---------------------------------------------------------------------------------


def _families(search: _Search, kind: Literal["permutation", "sign"]) -> Iterator[list[Move]]:
    """Moves that commute: of one number of units, one stride where an axis allows it, and one pair of units."""
    axes = [
        (name, axis, size)
        for name, tensor in search.spec.tensors.items()
        for axis, size in enumerate(tensor.shape)
        if size > 1
    ]
    segments = _segments(search.program)
    lengths = {length for _, _, n in axes for _, length in (*segments.get(n, ()), (0, n))}
    seen: set[frozenset[Move]] = set()
    for count in sorted({d for n in lengths for d in range(2, n + 1) if n % d == 0}, reverse=True):
        strides = {s for _, _, n in axes for s in _strides(n, count, segments)}
        pairs = sorted({(0, 1), (count - 2, count - 1)}) if kind == "permutation" else [(0,)]
        for stride, units in ((stride, units) for stride in sorted(strides) for units in pairs):
            family = [move for at in axes for move in _windows(*at, count, stride, units, segments)]
            if frozenset(family) not in seen:
                seen.add(frozenset(family))
                yield family


def _strides(size: int, count: int, segments: Mapping[int, set[tuple[int, int]]]) -> set[int]:
    """Lengths of the unit blocks of which ``count`` fill a window of an axis, or of a segment of it."""
    windows = [length // count for _, length in (*segments.get(size, ()), (0, size)) if length % count == 0]
    return {stride for window in windows for stride in range(1, window + 1) if window % stride == 0}


def _windows(
    name: str,
    axis: int,
    size: int,
    count: int,
    stride: int,
    units: tuple[int, ...],
    segments: Mapping[int, set[tuple[int, int]]],
) -> list[Move]:
    """The moves of one axis; where the stride does not fit, those of its largest one."""
    possible = _strides(size, count, segments)
    if not possible:
        return []
    step = stride if stride in possible else max(possible)
    starts = sorted(
        {
            first + at
            for first, length in (*segments.get(size, ()), (0, size))
            if length % (count * step) == 0
            for at in range(0, length, count * step)
        }
    )
    if any(later - earlier < count * step for earlier, later in pairwise(starts)):
        starts = starts[:1]
    parts = [(start,) for start in starts] if len(starts) <= MANY else [(starts[0],), tuple(starts[1:])]
    return [Move(name, axis, part, step, units) for part in parts]


def _segments(program: Program) -> dict[int, set[tuple[int, int]]]:
    """Where the graph joins or cuts axes: (start, length) by the size of the whole axis."""
    found: dict[int, set[tuple[int, int]]] = {}
    for node in program.nodes:
        if node.op != "call_function":
            continue
        whole, parts = node.meta.get("val"), [source.meta.get("val") for source in node.all_input_nodes]
        if not isinstance(whole, Tensor):
            whole, parts = (parts[0] if len(parts) == 1 else None), list(whole or ())
        name = operator_name(node)
        if name not in ("cat", "split", "split_with_sizes", "chunk", "unsafe_split", "slice", "narrow"):
            continue
        if name in ("slice", "narrow"):
            _note_slice(node, found)
        elif isinstance(whole, Tensor):
            _note_parts(whole, [part for part in parts if isinstance(part, Tensor)], found)
    return found


def _note_parts(whole: Tensor, parts: Sequence[Tensor], found: dict[int, set[tuple[int, int]]]) -> None:
    for axis, size in enumerate(whole.shape):
        lengths = [int(part.shape[axis]) for part in parts if part.ndim == whole.ndim]
        if sum(lengths) == size and len(lengths) > 1:
            starts = [sum(lengths[:at]) for at in range(len(lengths))]
            found.setdefault(int(size), set()).update(zip(starts, lengths, strict=True))


def _note_slice(node: fx.Node, found: dict[int, set[tuple[int, int]]]) -> None:
    whole, axis = node.all_input_nodes[0].meta["val"], node.args[1] if len(node.args) > 1 else 0
    if len(node.args) < 4 or not all(isinstance(at, int) for at in node.args[1:4]):
        return
    size = int(whole.shape[axis])
    given = slice(node.args[2], node.args[3]) if operator_name(node) == "slice" else None
    start, stop, _ = given.indices(size) if given else (node.args[2], node.args[2] + node.args[3], 1)
    if stop > start:
        found.setdefault(size, set()).add((start, stop - start))


# -- what the spec has -------------------------------------------------------------------------------------


def _reorders(spec: WeightSpec, changes: Mapping[str, Change]) -> bool:
    """Whether an element of the spec reorders the tensors in this way."""
    marked = {
        name: torch.arange(tensor.numel, dtype=torch.float64).reshape(tensor.shape)
        for name, tensor in spec.tensors.items()
    }
    element: Element = {}
    for name, change in changes.items():
        for cell in spec.tensors[name].cells:
            if not cell.dims:
                continue
            place = np.full(len(change), -1)
            place[cell_index(cell).reshape(-1)] = np.arange(cell.numel)
            source = place[change[cell_index(cell)]]
            if (source < 0).any():
                return False
            digits = np.unravel_index(source, cell.sizes)
            for at, dim in enumerate(cell.dims):
                if dim.group is None:
                    continue
                _note_unit(element, dim.group, (*dim.parents, at), digits[at])
    try:
        moved = act(spec, element, marked)
    except (RuntimeError, IndexError):  # what was read is no permutation
        return False
    return all(
        (moved[name].reshape(-1).numpy() == changes.get(name, np.arange(tensor.numel))).all()
        for name, tensor in spec.tensors.items()
    )


def _note_unit(element: Element, group: str, positions: Sequence[int], digits: Change) -> None:
    """Read a permutation off where the units of one dim come from, unless a tensor has shown that it moves."""
    first = tuple(slice(None) if at in positions else 0 for at in range(digits.ndim))
    kept = sorted(positions)
    table = np.transpose(digits[first], [kept.index(at) for at in positions])
    if group not in element or (element[group].numpy() == np.arange(table.shape[-1])).all():
        element[group] = torch.from_numpy(np.ascontiguousarray(table))


class _SignSpan:
    """The changes of sign that a spec can make."""

    def __init__(self, spec: WeightSpec) -> None:
        self._span = _Span()
        for pattern in _patterns(spec, "sign") < 0:
            self._span.add(_bits(pattern.numpy()))

    def __call__(self, spec: WeightSpec, changes: Mapping[str, Change]) -> bool:
        """Whether these are among them."""
        signs = [changes.get(name, np.ones(tensor.numel)) for name, tensor in spec.tensors.items()]
        return self._span.has(_bits(np.concatenate(signs) < 0))


def _bits(pattern: Change) -> int:
    return int.from_bytes(np.packbits(pattern).tobytes(), "big")


def _patterns(spec: WeightSpec, kind: Literal["sign", "positive"]) -> Tensor:
    """What every unit of every scaling multiplies the parameters by: -1, or e: (scalings x units, parameters)."""
    ones = {name: torch.ones(tensor.shape, dtype=torch.float64) for name, tensor in spec.tensors.items()}
    found = [torch.empty(0, spec.num_parameters, dtype=torch.float64)]
    for name, scaling in spec.scalings.items():
        if scaling.kind != kind:
            continue
        shape = tuple(spec.groups[at].size for at in (*spec.groups[scaling.group].within, scaling.group))
        eye = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        values = eye.exp() if kind == "positive" else 1.0 - 2.0 * eye
        found.append(spec.flatten(act(spec, {name: values}, ones)))
    return torch.cat(found)


# -- positive scalings: a null space -----------------------------------------------------------------------


def _scales(search: _Search) -> list[MissedSymmetry]:
    """A basis of the positive scalings that preserve the outputs, less what the spec has."""
    spec = search.spec
    places, spread = _coordinates(spec)
    slopes = _gradients(search, 2 * COTANGENTS + len(spread))
    counts = (
        slopes.abs().amax(0) > PRECISION * slopes.abs().max()
    )  # a bias of keys, say, cancels in the softmax
    spread = spread * counts
    used = spread.any(1)
    places = [place for place, wanted in zip(places, used.tolist(), strict=True) if wanted]
    spread = spread[used]
    null = _null_space(slopes @ spread.T)
    whole = _per_cell(spec) * counts
    common = _null_space(slopes @ whole.T) @ whole  # scalings of groups of size 1, which a spec leaves out
    known = _orthonormal(torch.cat([_patterns(spec, "positive").log() * counts, common]))
    missed = []
    for direction in _reduced_rows(null):
        logs = direction @ spread
        rest = logs - (logs @ known.T) @ known
        if rest.norm() <= 1e-6 * max(1.0, direction.norm().item()):
            continue  # the spec has it, or all indices of one axis undo those of another
        factors = (0.5 * logs / logs.abs().max()).exp()
        change = search.change(_rescale(spec, factors))
        if change <= PRECISION:
            known = torch.cat([known, rest[None] / rest.norm()])
            missed.append(MissedSymmetry("positive", _factors(places, direction), change))
    return missed


def _rescale(spec: WeightSpec, factors: Tensor) -> Callable[[Weights], Weights]:
    return lambda network: spec.unflatten(spec.flatten(network) * factors)


def _factors(places: Sequence[tuple[str, int, int]], direction: Tensor) -> tuple[Move, ...]:
    """One move for all indices of an axis that have the same power."""
    units: dict[tuple[str, int, float], list[int]] = {}
    for (tensor, axis, at), power in zip(places, direction.tolist(), strict=True):
        if abs(power) > 1e-6:
            units.setdefault((tensor, axis, round(power, 6)), []).append(at)
    return tuple(Move(*key[:2], (0,), 1, tuple(found), key[2]) for key, found in units.items())


def _coordinates(spec: WeightSpec) -> tuple[list[tuple[str, int, int]], Tensor]:
    """A log-scale for every index of every axis, and which parameters each one multiplies, (scales, P)."""
    places, rows = [], []
    start = 0
    for name, tensor in spec.tensors.items():
        index = torch.arange(tensor.numel).reshape(tensor.shape or (1,))
        for axis, size in enumerate(index.shape):
            for at in range(size if size > 1 or (tensor.numel == 1 and axis == 0) else 0):
                places.append((name, axis, at))
                rows.append(start + index.select(axis, at).reshape(-1))
        start += tensor.numel
    spread = torch.zeros(len(places), start, dtype=torch.float64)
    for row, at in zip(spread, rows, strict=True):
        row[at] = 1.0
    return places, spread


def _per_cell(spec: WeightSpec) -> Tensor:
    """Which parameters each cell holds, (cells, P)."""
    tensors = list(spec.tensors.values())
    starts = np.cumsum([0, *(tensor.numel for tensor in tensors)])
    cells = [(start, cell) for start, tensor in zip(starts, tensors, strict=False) for cell in tensor.cells]
    held = torch.zeros(len(cells), spec.num_parameters, dtype=torch.float64)
    for row, (start, cell) in zip(held, cells, strict=True):
        row[torch.from_numpy(cell_index(cell) + start).reshape(-1)] = 1.0
    return held


def _gradients(search: _Search, count: int) -> Tensor:
    """Derivatives of random sums of the outputs by the parameters' logarithms, at random networks, (rows, P)."""
    generator = torch.Generator().manual_seed(1)
    rows: list[Tensor] = []
    while len(rows) < count:
        weights = {name: w.requires_grad_() for name, w in search.redrawn(generator).items()}
        leaves = list(weights.values())
        results = _differentiable(search, weights)
        for _ in range(COTANGENTS):
            total = sum((torch.randn(r.shape, generator=generator, dtype=r.dtype) * r).sum() for r in results)
            slopes = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
            parts = [
                torch.zeros(leaf.numel()) if slope is None else (slope * leaf).reshape(-1)
                for slope, leaf in zip(slopes, leaves, strict=True)
            ]
            row = torch.cat(parts).detach()
            rows.append(row / row.norm().clamp_min(1e-300))
    return torch.stack(rows)


def _differentiable(search: _Search, weights: Weights) -> list[Tensor]:
    """The outputs, with a graph for gradients; ``Program.run`` takes none."""
    program = search.program
    given = [leaf for leaf in pytree.tree_leaves(as_call(search.inputs)) if isinstance(leaf, Tensor)]
    env: dict[str, Any] = dict(zip(program.inputs, given, strict=True))
    known = program.run(search.fresh[0], search.inputs, everything=True)
    moving: set[str] = set()
    for node in program.nodes:
        if node.name in program.names:
            env[node.name] = weights[program.names[node.name]]
            moving.add(node.name)
        elif not moving.isdisjoint(source.name for source in node.all_input_nodes):
            env[node.name] = _wide_call(node, env)
            moving.add(node.name)
        else:
            env[node.name] = known[node.name]
    results = [env[node.name] for _, node in program.outputs if _counts(env[node.name])]
    return [torch.where(result.isfinite(), result, 0.0) for result in results]


def _wide_call(node: fx.Node, env: Mapping[str, Any]) -> Any:
    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return env[leaf.name]
        narrow = isinstance(leaf, torch.dtype) and leaf.is_floating_point
        return torch.float64 if narrow else leaf

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replaced)
    if operator_name(node) in ("batch_norm", "_native_batch_norm_legit_no_training"):
        normed = _batch_norm(*args[:5], eps=args[7 if operator_name(node) == "batch_norm" else 6])
        return normed if operator_name(node) == "batch_norm" else (normed,)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Tensor, variance: Tensor, *, eps: float) -> Tensor:
    """PyTorch's has no gradient by the running statistics."""
    shape = (-1, *[1] * (x.ndim - 2))
    normed = (x - mean.view(shape)) / (variance.view(shape) + eps).sqrt()
    scaled = normed if weight is None else normed * weight.view(shape)
    return scaled if bias is None else scaled + bias.view(shape)


def _null_space(rows: Tensor) -> Tensor:
    """An orthonormal basis of what all rows vanish on, (dimension, scales)."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=True)
    rank = int((sizes > PRECISION * sizes[0]).sum()) if len(sizes) else 0
    return basis[rank:]


def _orthonormal(rows: Tensor) -> Tensor:
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > PRECISION * sizes.max()] if len(sizes) else rows


def _reduced_rows(rows: Tensor) -> Tensor:
    """The reduced row echelon form, from the last column on: few entries, and those are ratios of powers."""
    rows = rows.clone()
    done = 0
    for column in reversed(range(rows.shape[1])):
        if done == len(rows):
            break
        best = done + int(rows[done:, column].abs().argmax())
        if rows[best, column].abs() < 1e-6:
            continue
        rows[[done, best]] = rows[[best, done]]
        rows[done] /= rows[done, column].clone()
        factors = rows[:, column].clone()
        factors[done] = 0.0
        rows -= factors[:, None] * rows[done]
        done += 1
    return torch.where(rows.abs() < 1e-7, 0.0, rows)
