"""Check the label of every value of a graph against what the graph computes: a wrong rule is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from weightspace.spec._elements import act, random_element
from weightspace.spec._types import Element
from weightspace.spec._verify import randomised
from weightspace.spec.tracing._derive import Derivation, derive
from weightspace.spec.tracing._labels import Box, Label
from weightspace.spec.tracing._program import Inputs, Program, export, operator_name, tensors_of
from weightspace.spec.tracing._trace import RULES


@dataclass(frozen=True)
class NodeChange:
    """How far a value is from what its label says it becomes under a permutation of the weights."""

    node: str
    operator: str
    change: float


def check_operators(
    module: nn.Module, inputs: Inputs, *, outputs: str | Sequence[str | int] | None = None, seed: int = 0
) -> list[NodeChange]:
    """Trace a module and compare every value of its graph, under permuted weights, with its own label.

    Args:
        module: the network; float64 copies of its weights are used.
        inputs: example inputs.
        outputs: which outputs count.
        seed: of the random weights and permutations.

    Returns:
        For each operator, in the order of the graph, the largest change relative to the value's largest entry:
        rounding alone (1e-12) if its rule, and all before it, are right.
    """
    program = export(module, inputs, outputs, RULES)
    return _node_changes(derive(module, [program]), module, program, inputs, seed)


def changed_nodes(
    derivation: Derivation, module: nn.Module, program: Program, inputs: Inputs, tolerance: float = 1e-8
) -> list[NodeChange]:
    """The operators whose values are not what their labels say, the first of them to blame."""
    changes = _node_changes(derivation, module, program, inputs, 0)
    return [change for change in changes if change.change > tolerance]


def _node_changes(
    derivation: Derivation, module: nn.Module, program: Program, inputs: Inputs, seed: int
) -> list[NodeChange]:
    spec, trace = derivation.spec, derivation.trace
    generator = torch.Generator().manual_seed(seed)
    state = {name: t for name, t in tensors_of(module).items() if name in spec.tensors}
    weights = randomised(state, generator, 1.0)
    element = random_element(spec, symmetries=("permutation",), generator=generator)
    wide = pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    before = program.run(weights, wide, everything=True)
    after = program.run(act(spec, element, weights), wide, everything=True)
    sources = _Sources(derivation, element)
    labels = trace.run(program)
    changes = []
    for node in program.nodes:
        if node.op != "call_function" or operator_name(node) == "getitem":
            continue
        label, old, new = (_read(node, values[node.name]) for values in (labels, before, after))
        change = _change(trace.resolve, label, old, new, sources)
        changes.append(NodeChange(node.name, operator_name(node), change))
    return changes


def _read(node: fx.Node, value: Any) -> Any:
    """A value, or those of several outputs that somebody reads."""
    if isinstance(value, Label) or not isinstance(value, list | tuple):
        return value
    read = {user.args[1] for user in node.users if operator_name(user) == "getitem"}
    return [part for place, part in enumerate(value) if place in read]


def _change(resolve: Any, label: Any, before: Any, after: Any, sources: _Sources) -> float:
    if isinstance(label, Label):
        if not isinstance(before, Tensor) or not before.numel():
            return 0.0
        expected = before.reshape(-1)[sources.of(resolve(label))].reshape(before.shape)
        if not (before.is_floating_point() or before.is_complex()):
            return float((expected != after).any())
        same = (expected == after) | (expected.isnan() & after.isnan())
        error = torch.where(same, 0.0, expected - after).abs().max().item()
        finite = before[before.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 1.0
        return error / (scale or 1.0)
    if isinstance(label, list | tuple):
        parts = zip(label, before, after, strict=False)
        return max((_change(resolve, *part, sources) for part in parts), default=0.0)
    return 0.0


class _Sources:
    """From which position each entry of a labelled value comes, under one element."""

    def __init__(self, derivation: Derivation, element: Element) -> None:
        self.atoms, self.namer, self.element = derivation.trace.atoms, derivation.namer, element

    def of(self, label: Label) -> Tensor:
        """Flat source positions of a resolved label, of its shape."""
        index = torch.arange(math.prod(label.shape)).reshape(label.shape)
        source = index.clone()
        for box in label.boxes:
            here, there = self._places(box)
            source[here] = index[there]
        return source.reshape(-1)

    def _places(self, box: Box) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        rank = len(box.indices)
        places = [
            torch.arange(self.atoms[index.atom].size).reshape([-1 if at == k else 1 for at in range(rank)])
            for k, index in enumerate(box.indices)
        ]
        moved = [self._moved(box, k, places) for k in range(rank)]
        return self._coordinates(box, places), self._coordinates(box, moved)

    def _coordinates(self, box: Box, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = []
        for axis, offset in enumerate(box.offsets):
            total = torch.tensor(offset)
            for index, value in zip(box.indices, values, strict=True):
                if index.axis == axis:
                    total = total + value * index.stride
            found.append(total)
        return tuple(torch.broadcast_tensors(*found)) if found else ()

    def _moved(self, box: Box, at: int, places: Sequence[Tensor]) -> Tensor:
        """The source index of one index of a box, as a function of the others' destinations."""
        number = box.indices[at].atom
        final = self.atoms.final(number)
        name = self.namer.names.get(final)
        if name is None:
            return places[at]
        chain = self._chain(box, at, final)
        joint = self._joint(chain, places)
        outer = [self._value(box, at, parent, places) for parent in self.namer.within(final)]
        table = self.element[name]
        source = table[(*outer, joint)]
        inner = 1
        for member in reversed(chain):
            size = self.atoms[box.indices[member].atom].size
            if member == at:
                return source // inner % size
            inner *= size
        raise AssertionError

    def _chain(self, box: Box, at: int, final: int) -> list[int]:
        """Positions of the indices that together are one fused index, outermost first, this one among them."""
        members = [k for k, index in enumerate(box.indices) if self.atoms.final(index.atom) == final]
        wanted = self.atoms.constituents(final)
        if len(wanted) == 1:
            return [at]
        chosen: dict[int, int] = {}
        for k in members:
            atom = box.indices[k].atom
            near = chosen.get(atom)
            if near is None or abs(k - at) < abs(near - at):
                chosen[atom] = k
        chosen[box.indices[at].atom] = at
        return [chosen[atom] for atom in wanted]

    def _joint(self, chain: Sequence[int], places: Sequence[Tensor]) -> Tensor:
        total = torch.tensor(0)
        for member in chain:
            total = total * places[member].numel() + places[member]
        return total

    def _value(self, box: Box, at: int, parent: int, places: Sequence[Tensor]) -> Tensor:
        own = box.indices[at].axis
        members = [k for k, index in enumerate(box.indices) if self.atoms.final(index.atom) == parent]
        near = [k for k in members if box.indices[k].axis == own] or members
        return self._joint(self._chain(box, near[0], parent), places)
