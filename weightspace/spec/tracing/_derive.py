"""From a module to its spec."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from weightspace.errors import SpecError, SpecWarning
from weightspace.spec._types import WeightSpec
from weightspace.spec._verify import measure, program_runner
from weightspace.spec.tracing import rules  # noqa: F401  registers the rules
from weightspace.spec.tracing._atoms import Atoms
from weightspace.spec.tracing._groups import Namer, build_spec, settle
from weightspace.spec.tracing._labels import Labels
from weightspace.spec.tracing._orientation import with_orientations
from weightspace.spec.tracing._program import (
    Inputs,
    Program,
    as_call,
    beside,
    export,
    first_names,
    tensors_of,
)
from weightspace.spec.tracing._scalings import find_scalings
from weightspace.spec.tracing._trace import RULES, Trace

if TYPE_CHECKING:
    from weightspace.spec.tracing._check import NodeChange

TOLERANCE = 1e-8  # relative change in float64 above which a spec is wrong; rounding alone stays below 1e-12


def trace(
    module: nn.Module,
    example_inputs: Inputs,
    *,
    more_inputs: Sequence[Inputs] = (),
    outputs: str | Sequence[str | int] | None = None,
    verify: bool = True,
) -> WeightSpec:
    """Derive the spec of any module from the operators that it really applies, and check it.

    The module is exported (``torch.export``), and the largest conceivable group, in which every axis of every
    parameter moves freely, is restricted operator by operator until each is equivariant. Scalings are the null
    spaces of what the operators demand of exponents. Inputs and outputs never move. An operator without a rule
    fixes all units that it reads and is named in a :class:`~weightspace.errors.SpecWarning`: the spec is then
    smaller than it could be, never wrong. So does one that draws random numbers: the spec is one of equal noise.

    Args:
        module: the network, in any mode, on any device; it is not changed. On the meta device nothing is
            allocated and nothing verified.
        example_inputs: one tensor, a tuple of positional arguments, or a dict of keyword arguments. A spec
            holds for the sizes that were traced: give every axis that may vary a size of at least 2. A
            :class:`~weightspace.errors.SpecWarning` names an axis of size 1 where that matters.
        more_inputs: further example inputs, of other sizes: the spec is the one on which all agree.
        outputs: which outputs count, by key or position (``"logits"``, ``[0]``); all by default. What the
            others alone use is taken to be fixed.
        verify: whether to check the result in float64 with random weights, if the module holds real ones; see
            :func:`weightspace.spec.verify`.

    Returns:
        The spec; its ``provenance`` says what was traced, why each fixed axis is fixed, and the measured change.

    Raises:
        SpecError: the module cannot be exported with these inputs, has complex parameters, or its output
            changes under the spec that was found (the operator whose rule is wrong is named).

    Example:
        >>> import torch
        >>> from weightspace import WeightSpec
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
        >>> WeightSpec.trace(net, torch.zeros(2, 1, 4, 4))
        WeightSpec: 4 tensors, 210 parameters
          hidden0: 4 units, relu, positive
          0.weight [hidden0, 3, 3]
          0.bias   [hidden0]
          3.weight [10, hidden0, 4]
          3.bias   [10]
    """
    _check_arguments(module, more_inputs)
    calls = [beside(module, inputs) for inputs in (example_inputs, *more_inputs)]
    programs = [_exported(module, calls, place, outputs) for place in range(len(calls))]
    found = derive(module, programs)
    state = tensors_of(module)
    if verify and all(_is_real(state[name]) for name in found.spec.tensors):
        found = _verified(found, module, programs, calls)
    _warn_of_ones(found, module, programs, calls, outputs)
    return found.spec


def _check_arguments(module: object, more_inputs: object) -> None:
    if not isinstance(module, nn.Module):
        raise SpecError(f"module: expected a torch.nn.Module, found {type(module).__name__}")
    if not isinstance(more_inputs, list | tuple):
        raise SpecError(f"more_inputs: expected a list of inputs, found {type(more_inputs).__name__}")


def _exported(
    module: nn.Module, calls: Sequence[Inputs], place: int, outputs: str | Sequence[str | int] | None
) -> Program:
    try:
        return export(module, calls[place], outputs, RULES)
    except SpecError as error:
        where = f"more_inputs[{place - 1}]" if place else "inputs"
        raise SpecError(f"{where}: {error}" if len(calls) > 1 else str(error)) from error


def _verified(
    found: Derivation, module: nn.Module, programs: Sequence[Program], calls: Sequence[Inputs]
) -> Derivation:
    """Measure the change of the outputs; if a rule is wrong, fix all that its operator reads, and try once more."""
    wrong, worst = _measured(found, module, programs, calls)
    if wrong:
        warnings.warn(
            f"trace: the rule of operator {wrong[0].operator} does not hold at {wrong[0].node}; the units that it reads "
            "are taken to be fixed; please report this",
            SpecWarning,
            stacklevel=3,
        )
        found = derive(module, programs, {change.operator for change in wrong[:1]})
        wrong, worst = _measured(found, module, programs, calls)
    if worst is None:
        warnings.warn(
            f"trace: nothing was verified: the output of {type(module).__name__} hardly changes when units are permuted "
            "that may not be",
            SpecWarning,
            stacklevel=3,
        )
        return found
    if not worst <= TOLERANCE:
        first = (
            f"the rule of {wrong[0].operator} ({wrong[0].node}) is wrong"
            if wrong
            else "no operator is to blame"
        )
        raise SpecError(
            f"spec: the output of {type(module).__name__} changes by {worst:.1e} under the spec that was found; {first}; "
            "please report this"
        )
    provenance = replace(found.spec.provenance, verified_change=worst)
    return replace(found, spec=replace(found.spec, provenance=provenance))


def _measured(
    found: Derivation, module: nn.Module, programs: Sequence[Program], calls: Sequence[Inputs]
) -> tuple[list[NodeChange], float | None]:
    """The operators whose values are not what their labels say, looked for in a program that changes, and the change.

    None where the outputs hardly depend on the weights, so that no error could have been found.
    """
    from weightspace.spec.tracing._check import changed_nodes

    state = {name: t for name, t in tensors_of(module).items() if name in found.spec.tensors}
    worst = 0.0
    for program, inputs in zip(programs, calls, strict=True):
        report = measure(found.spec, state, program_runner(program, _varied(inputs)), draws=1, each=False)
        if not report.max_relative_change <= TOLERANCE:
            return changed_nodes(found, module, program, inputs), report.max_relative_change
        if report.is_vacuous:
            return [], None
        worst = max(worst, report.max_relative_change)
    return [], worst


def _varied(inputs: Inputs) -> Inputs:
    """The inputs, with numbers in [0.1, 1] for those that are the same everywhere: zeros would hide errors."""
    generator = torch.Generator().manual_seed(0)

    def varied(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
            return value
        if not bool((value == value.flatten()[0]).all()):
            return value
        return (0.1 + 0.9 * torch.rand(value.shape, generator=generator)).to(value)

    return cast(Inputs, pytree.tree_map(varied, inputs))


def _warn_of_ones(
    found: Derivation,
    module: nn.Module,
    programs: Sequence[Program],
    calls: Sequence[Inputs],
    outputs: str | Sequence[str | int] | None,
) -> None:
    """Warn where a larger size of an axis that has size 1 in all inputs shows that fewer units may move."""
    for text, inputs in _enlarged(calls, programs[0].inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpecWarning)
            try:
                larger = export(module, inputs, outputs, RULES)
                both = derive(module, [*programs, larger], found.trace.distrusted).spec
            except Exception:  # the size is part of the network, such as the number of channels
                continue
        if both != found.spec:
            warnings.warn(
                f"trace: fewer symmetries hold where {text} has size 2 instead of 1; add such an example to more_inputs "
                "if its size may vary",
                SpecWarning,
                stacklevel=3,
            )


def _enlarged(calls: Sequence[Inputs], names: Sequence[str]) -> Iterator[tuple[str, Inputs]]:
    """The first inputs with an axis of size 2 that has size 1 in all of ``calls``, in whichever of them have it."""
    leaves = [
        [leaf for leaf in pytree.tree_leaves(as_call(call)) if isinstance(leaf, Tensor)] for call in calls
    ]
    alike = [call for call in leaves if [x.ndim for x in call] == [x.ndim for x in leaves[0]]]
    ones = [
        (place, axis)
        for place, tensor in enumerate(leaves[0])
        for axis in range(tensor.ndim)
        if all(call[place].shape[axis] == 1 for call in alike)
    ]
    for axis in dict.fromkeys(axis for _, axis in ones):
        places = [place for place, at in ones if at == axis]
        ids = {id(leaves[0][place]) for place in places}
        which = " and ".join(names[place] for place in places)
        yield (
            f"axis {axis} of input {which}",
            pytree.tree_map(
                lambda x: x.repeat_interleave(2, axis) if id(x) in ids else x,  # noqa: B023
                calls[0],
            ),
        )


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


@dataclass(frozen=True)
class Derivation:
    """A spec, and the settled trace and names from which it was built."""

    spec: WeightSpec
    trace: Trace
    namer: Namer


def derive(module: nn.Module, programs: Sequence[Program], distrusted: Collection[str] = ()) -> Derivation:
    """The spec on which all programs agree, with all fixed that ``distrusted`` operators read.

    Raises:
        SpecError: a parameter of a complex type.
    """
    stored = tensors_of(module)
    for name, tensor in stored.items():
        if tensor.is_complex():
            raise SpecError(f"module: {name!r} is of type {str(tensor.dtype)[6:]}, expected a floating type")
    used = {name for program in programs for name in _used(program)}
    trainable = {name for program in programs for name in program.names.values()}
    atoms = Atoms()
    labels = Labels(atoms)
    parameters = {
        name: labels.fresh(stored[name].shape, name not in used, "not used by the outputs")
        for name in stored
        if name in trainable and stored[name].is_floating_point() and stored[name].numel()
    }
    trace = Trace(atoms, parameters, distrusted)
    for program in programs:
        trace.run(program)
    settle(trace)
    solutions = find_scalings(trace, programs)
    aliases = _aliases(module, stored)
    tied = {name for names in aliases.values() for name in names}
    spec, namer = build_spec(
        trace,
        solutions,
        statistics={name for program in programs for name in program.statistics},
        aliases={name: tuple(names) for name, names in aliases.items() if name in parameters},
        constants={
            name: tuple(t.shape)
            for name, t in stored.items()
            if name not in parameters and not (name in tied and _owner(aliases, name) in parameters)
        },
        inputs=[program.text for program in programs],
    )
    return Derivation(with_orientations(spec, programs), trace, namer)


def _used(program: Program) -> Iterator[str]:
    return (program.names[node.name] for node in program.nodes if node.name in program.names)


def _aliases(module: nn.Module, stored: Iterable[str]) -> dict[str, list[str]]:
    """Further names of each tensor of the state dict, by its first name."""
    first = first_names(module)
    found: dict[str, list[str]] = {}
    for name in stored:
        if first.get(name, name) != name:
            found.setdefault(first[name], []).append(name)
    return found


def _owner(aliases: dict[str, list[str]], name: str) -> str:
    return next(first for first, names in aliases.items() if name in names)
