"""Carry labels through a graph, one rule per operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from weightspace.errors import SpecError, SpecWarning
from weightspace.spec.tracing._atoms import Atom, Atoms
from weightspace.spec.tracing._labels import Index, Label, Labels, Shift
from weightspace.spec.tracing._powers import plus, unknown
from weightspace.spec.tracing._program import Program, call, is_random, is_unsized, operator_name

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
UNIFORM: set[Rule] = (
    set()
)  # rules whose output may move although their operands are fixed: what fills or repeats

# what draws numbers whatever the values of its operands are: only their shape counts
_SHAPED = {
    "normal_functional",
    "uniform",
    "exponential",
    "cauchy",
    "log_normal",
    "geometric",
    "random",
    "bernoulli.p",
}
_JOINS = {"cat", "concat", "concatenate"}  # whose rules take no notice of empty operands
LARGEST_CONSTANT = 2**24  # elements; larger constants are taken to vary along every axis


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how labels pass through ATen operators, named without overload.

    The function takes the trace and then the operator's arguments in the order of its schema, defaults filled
    in, with a :class:`Label` for every tensor; it returns a label, or a tuple of them.

    Raises:
        SpecError: one of the operators has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise SpecError(f"rule: expected one for each operator, found a second one for {name!r}")
            RULES[name] = function
        return function

    return register


class Unsized:
    """What stands for the label of a value whose size depends on data: all that is fixed."""


class Trace(Labels):
    """One or several programs over the same parameters, and the restrictions found so far.

    Args:
        atoms: shared by all.
        parameters: the label of each parameter and statistic.
        distrusted: operators whose rules are not to be used.
    """

    def __init__(self, atoms: Atoms, parameters: dict[str, Label], distrusted: Collection[str] = ()) -> None:
        super().__init__(atoms)
        self.parameters = parameters
        self.distrusted = frozenset(distrusted)
        self.node: fx.Node | None = None
        self.order: dict[int, None] = {}
        self.warned: set[str] = set()
        self.unsized = False

    # -- what rules may ask --------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output of the operator."""
        return self.shapes[0]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all outputs of the operator."""
        assert self.node is not None
        value = self.node.meta["val"]
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(tuple(int(n) for n in v.shape) if isinstance(v, Tensor) else () for v in values)

    @property
    def name(self) -> str:
        """Name of the operator."""
        assert self.node is not None
        return operator_name(self.node)

    def is_used(self, place: int) -> bool:
        """Whether anybody reads one of several outputs."""
        assert self.node is not None
        return any(user.args[1] == place and user.users for user in self.node.users)

    def fraction(self, value: int | float) -> Fraction:
        """An exact coefficient."""
        return Fraction(value).limit_denominator(64)

    def flipped(self, label: Label, shift: Shift) -> Label:
        """A value whose units change sign when the named bias is shifted by half a period."""
        if self.powers != "sign":
            return label

        def flip(index: Index) -> Index:
            if not self.atoms.is_live(index.atom):
                return index
            key = (index.atom, shift)  # one bias in several programs is one bias
            if key not in self.flips:
                self.flips[key] = self.unknown_power()
            return index._replace(power=plus(index.power, unknown(self.flips[key])))

        boxes = tuple(box._replace(indices=tuple(map(flip, box.indices))) for box in label.boxes)
        return label._replace(boxes=boxes)

    def note_heads(self, label: Label, axis: int) -> None:
        """Remember that a softmax runs once for each index of the axes before the last two."""

        def note(atom: Atom) -> None:
            atom.heads = True

        resolved = self.resolve(label)
        batch = [at for at in range(len(label.shape)) if at < axis - 1]
        self.atoms.mark((n for n in self.numbers(resolved, batch) if self.atoms.is_live(n)), note)

    def see(self, value: Any) -> None:
        """Remember in which order the values of a forward pass show atoms."""
        if self.powers is not None:
            for label in _labels(value):
                self.order.update(dict.fromkeys(self.numbers(self.resolve(label))))

    def constant(self, value: Tensor) -> Label:
        """The label of a known value: axes along which it is uniform are free, the others fixed."""
        if value.device.type == "meta" or value.numel() > LARGEST_CONSTANT:
            return self.fixed(value.shape)
        varies = [
            bool((value != value.narrow(axis, 0, 1)).any()) if size > 1 else False
            for axis, size in enumerate(value.shape)
        ]
        label = self.fresh(value.shape, varies)
        return label._replace(zero=not any(varies) and not bool((value != 0).any()))

    def give_up(self, labels: Iterable[Label]) -> None:
        """Fix everything about some values."""
        for label in labels:
            self.pin(label)

    # -- running -------------------------------------------------------------------------------------------

    def run(self, program: Program) -> dict[str, Any]:
        """Labels by node name; constants are tensors."""
        env: dict[str, Any] = {}
        for node in program.nodes:
            self.node = node
            self.reason = self._place(node)
            if node.op == "placeholder":
                env[node.name] = self._placeholder(program, node)
            elif node.op == "get_attr":
                env[node.name] = getattr(program.graph_module, str(node.target), None)
            else:
                env[node.name] = _unshared(node, self._call(node, env))
                self.see(env[node.name])
        self.reason = "output"
        for name, node in program.outputs:
            self.reason = f"output {name}"
            if isinstance(env[node.name], Label):
                self.pin(env[node.name])
                self.vanish(i.power for box in env[node.name].boxes for i in box.indices)
        return env

    def _placeholder(self, program: Program, node: fx.Node) -> Any:
        name = program.names.get(node.name)
        if name is not None:
            label = self.parameters[name]
            return label._replace(shift=Shift(name, 1.0) if self._uses(program, name) == 1 else None)
        if node.name in program.values:
            value = program.values[node.name]
            known = type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta"
            return value if known else self.fixed(value.shape)
        self.reason = f"input {node.name}"
        given = node.meta.get("val")
        return self.fixed(given.shape) if isinstance(given, Tensor) else given

    def _uses(self, program: Program, name: str) -> int:
        return sum(len(node.users) for node in program.nodes if program.names.get(node.name) == name)

    def _place(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(path) for path, _ in stack.values() if path]
        path = paths[-1].removeprefix("L['self'].").removeprefix("L['self']") if paths else ""
        return f"{operator_name(node)} at {path}" if path else operator_name(node)

    def _call(self, node: fx.Node, env: Mapping[str, Any]) -> Any:
        sources = [env[source.name] for source in node.all_input_nodes]
        if is_unsized(node) or any(isinstance(source, Unsized) for source in sources):
            return self._unsized(node, sources)
        if operator_name(node) == "getitem":
            return sources[0][node.args[1]]
        if is_random(node):
            return self._random(node, sources)
        if all(isinstance(source, Tensor) for source in sources) and self._small(node):
            try:
                return call(node, env, "cpu")
            except (RuntimeError, TypeError, NotImplementedError):
                return self._fixed_outputs()
        arguments = [self._operand(argument, env) for argument in _in_order(node)]
        labels = [label for argument in arguments for label in _labels(argument)]
        name = operator_name(node)
        if any(0 in label.shape for label in labels) and name not in _JOINS:
            self.give_up(label for label in labels if not all(0 in shape for shape in self.shapes))
            return self._fixed_outputs()
        known = None if name in self.distrusted else RULES.get(name)
        if all(self.is_fixed(label) for label in labels) and known not in UNIFORM:
            return self._fixed_outputs()
        if known is None:
            return self._unknown(node, labels)
        return known(self, *arguments)

    def _small(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.numel() <= LARGEST_CONSTANT

    def _operand(self, argument: Any, env: Mapping[str, Any]) -> Any:
        if isinstance(argument, fx.Node):
            value = env[argument.name]
            if isinstance(value, Label):
                return self.resolve(value)
            return self.constant(value) if isinstance(value, Tensor) else value
        if isinstance(argument, list | tuple):
            return [self._operand(part, env) for part in argument]
        return argument

    def _fixed_outputs(self) -> Any:
        assert self.node is not None
        value = self.node.meta.get("val")
        if isinstance(value, tuple | list):
            return tuple(self.fixed(shape) for shape in self.shapes)
        return self.fixed(self.shape) if isinstance(value, Tensor) else value

    def _unknown(self, node: fx.Node, labels: Sequence[Label]) -> Any:
        place = self.reason
        if operator_name(node) in self.distrusted:
            self.reason = f"operator {place}, whose rule failed its check"
        else:
            lost = sum(
                self.atoms[n].size
                for n in {n for x in labels for n in self.numbers(x)}
                if self.atoms.is_live(n)
            )
            self._warn_once(
                f"no rule for operator {place}; the units that it reads are taken to be fixed, {lost} at most; add one "
                "with weightspace.spec.unary_rule or rule, see docs/tracing.md"
            )
            self.reason = f"unknown operator {place}"
        for label in labels:
            self.vanish(i.power for box in label.boxes for i in box.indices)
        self.give_up(labels)
        return self._fixed_outputs()

    def _random(self, node: fx.Node, sources: Sequence[Any]) -> Any:
        """Nothing permutes noise: what is drawn is fixed, and so is what the chances depend on."""
        place = self.reason
        self._warn_once(
            f"operator {place} draws random numbers; the units that meet them are taken to be fixed"
        )
        self.reason = f"random numbers of {place}"
        if not self._is_shaped(node):
            self.give_up(self.resolve(source) for source in sources if isinstance(source, Label))
        return self._fixed_outputs()

    def _is_shaped(self, node: fx.Node) -> bool:
        name, overload = operator_name(node), getattr(node.target, "_overloadname", "")
        return name.endswith("_like") or name in _SHAPED or f"{name}.{overload}" in _SHAPED

    def _unsized(self, node: fx.Node, sources: Sequence[Any]) -> Any:
        place = self.reason
        if not self.unsized:
            self._warn_once(
                f"operator {place} makes a tensor whose size depends on data; the units that it and others like it "
                "read or write are taken to be fixed"
            )
        self.unsized = True
        self.reason = f"size that depends on data, {place}"
        self.give_up(self.resolve(source) for source in sources if isinstance(source, Label))
        return Unsized() if is_unsized(node) else self._fixed_outputs()

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(f"trace: {message}", SpecWarning, stacklevel=2)


def _unshared(node: fx.Node, value: Any) -> Any:
    """What is read by more than sines has no bias to be shifted for one of them alone."""
    readers = {operator_name(user) for user in node.users}
    if isinstance(value, Label) and len(node.users) > 1 and not readers <= {"sin", "cos"}:
        return value._replace(shift=None)
    return value


def _in_order(node: fx.Node) -> list[Any]:
    """The arguments of a node in the order of the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *node.kwargs.values()]
    return [
        node.args[place]
        if place < len(node.args)
        else node.kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None)
        for place, argument in enumerate(schema.arguments)
    ]


def _labels(value: Any) -> list[Label]:
    if isinstance(value, Label):
        return [value]
    return [label for part in value for label in _labels(part)] if isinstance(value, list | tuple) else []
