"""From a module to its spec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from weightspace.errors import SpecError
from weightspace.spec._types import WeightSpec
from weightspace.spec._verify import measure, program_runner
from weightspace.spec.tracing import _rules  # noqa: F401  registers the rules
from weightspace.spec.tracing._atoms import Atoms
from weightspace.spec.tracing._groups import Namer, build_spec, settle
from weightspace.spec.tracing._labels import Labels
from weightspace.spec.tracing._program import Inputs, Program, beside, export
from weightspace.spec.tracing._scalings import find_scalings
from weightspace.spec.tracing._trace import RULES, Trace

TOLERANCE = 1e-8  # relative change in float64 above which a spec is wrong; rounding alone stays below 1e-12


def trace(
    module: nn.Module,
    example_inputs: Inputs,
    *,
    more_inputs: Sequence[Inputs] = (),
    outputs: Sequence[str] | None = None,
    verify: bool = True,
) -> WeightSpec:
    """Derive the spec of any module from the operators that it really applies, and check it.

    The module is exported (``torch.export``), and the largest conceivable group, in which every axis of every
    parameter moves freely, is restricted operator by operator until each is equivariant. Scalings are the null
    spaces of what the operators demand of exponents. Inputs and outputs never move. An operator without a rule
    fixes all units that it reads and is named in a :class:`~weightspace.errors.SpecWarning`: the spec is then
    smaller than it could be, never wrong.

    Args:
        module: the network, in any mode, on any device; it is not changed. On the meta device nothing is
            allocated and nothing verified.
        example_inputs: one tensor, a tuple of positional arguments, or a dict of keyword arguments. A spec
            holds for the sizes that were traced: give every axis that may vary a size of at least 2.
        more_inputs: further example inputs, of other sizes: the spec is the one on which all agree.
        outputs: which outputs count, by key or position as text (``("logits",)``); all by default. What the
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
    calls = [beside(module, inputs) for inputs in (example_inputs, *more_inputs)]
    programs = [export(module, inputs, outputs, RULES) for inputs in calls]
    derivation = derive(module, programs)
    spec = derivation.spec
    state = {
        name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name in spec.tensors
    }
    if not verify or not all(_is_real(tensor) for tensor in state.values()):
        return spec
    worst = 0.0
    for program, inputs in zip(programs, calls, strict=True):
        report = measure(spec, state, program_runner(program, inputs), draws=1, each=False)
        if not report.max_relative_change <= TOLERANCE:
            _blame(derivation, module, program, inputs, report.max_relative_change)
        worst = max(worst, report.max_relative_change)
    return replace(spec, provenance=replace(spec.provenance, verified_change=worst))


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def _blame(
    derivation: Derivation, module: nn.Module, program: Program, inputs: Inputs, change: float
) -> None:
    from weightspace.spec.tracing._check import changed_nodes

    wrong = changed_nodes(derivation, module, program, inputs)
    first = (
        f"the rule of {wrong[0].operator} ({wrong[0].node}) is wrong" if wrong else "no operator is to blame"
    )
    raise SpecError(
        f"spec: the output of {type(module).__name__} changes by {change:.1e} under the spec that was found; {first}; "
        "please report this"
    )


@dataclass(frozen=True)
class Derivation:
    """A spec, and the settled trace and names from which it was built."""

    spec: WeightSpec
    trace: Trace
    namer: Namer


def derive(module: nn.Module, programs: Sequence[Program]) -> Derivation:
    """The spec on which all programs agree.

    Raises:
        SpecError: a parameter of a complex type.
    """
    stored = dict(module.state_dict(keep_vars=True))
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
        if name in trainable and stored[name].is_floating_point()
    }
    trace = Trace(atoms, parameters)
    for program in programs:
        trace.run(program)
    settle(trace)
    solutions = find_scalings(trace, programs)
    aliases = _aliases(module)
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
    return Derivation(spec, trace, namer)


def _used(program: Program) -> Iterator[str]:
    return (program.names[node.name] for node in program.nodes if node.name in program.names)


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """Further names of each tensor of the state dict, by its first name."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            found.setdefault(known, []).append(name)
    return found


def _owner(aliases: dict[str, list[str]], name: str) -> str:
    return next(first for first, names in aliases.items() if name in names)
