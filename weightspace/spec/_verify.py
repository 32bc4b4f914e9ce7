"""Check a spec against the module that it describes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from weightspace.errors import SpecError
from weightspace.spec._elements import act, random_element
from weightspace.spec._types import Element, Weights, WeightSpec


@dataclass(frozen=True)
class VerifyReport:
    """How much the output of a module changes under the symmetries that its spec claims.

    Args:
        max_relative_change: worst change over all draws, relative to the largest absolute output.
        by_symmetry: worst change per group (``"permutation(hidden0)"``) and per scaling, each alone.
        illegal_change: change under a permutation of a single axis of a single tensor, which is no symmetry:
            near zero means that the check could not have found an error. None when no axis moves.
    """

    max_relative_change: float
    by_symmetry: dict[str, float]
    illegal_change: float | None

    @property
    def is_vacuous(self) -> bool:
        """Whether the check could not have found an error, as the outputs hardly depend on what was changed."""
        return self.illegal_change is not None and not self.illegal_change > VISIBLE

    def raise_if_wrong(self, tolerance: float = 1e-9) -> VerifyReport:
        """Raise unless every symmetry holds; returns the report itself.

        Raises:
            SpecError: names the symmetries whose change is above ``tolerance``; or the check is vacuous.
        """
        wrong = [
            f"{name} ({change:.1e})" for name, change in self.by_symmetry.items() if not change <= tolerance
        ]
        if wrong or not self.max_relative_change <= tolerance:
            names = ", ".join(wrong) or f"their combination ({self.max_relative_change:.1e})"
            raise SpecError(
                f"spec: the module's output changes under {names}; expected at most {tolerance:.0e}"
            )
        if self.is_vacuous:
            raise SpecError(
                f"spec: nothing was verified: what is no symmetry changes the output by {self.illegal_change:.0e} only"
            )
        return self


if TYPE_CHECKING:
    from weightspace.spec.tracing import Program

GAINS = (0.0, 1.0, 1.5, 2.0)  # of random weights, the first at which an illegal permutation shows
TELLING = 1e-2  # relative change that an illegal permutation should cause
VISIBLE = 1e-6  # below that, nothing has been checked
BROKEN = 6  # illegal permutations tried for each random network

Run = Callable[[Weights], list[Tensor]]


def verify(
    spec: WeightSpec,
    module: nn.Module,
    inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    *,
    outputs: str | Sequence[str | int] | None = None,
    draws: int = 4,
    each: bool = True,
    seed: int = 0,
) -> VerifyReport:
    """Draw group elements and measure how much the module's output changes: it should not.

    Runs in float64 on the exported graph, with casts to narrower types rewritten, so that true symmetries show
    as rounding alone; a module that cannot be exported runs as a float64 copy. All parameters and statistics
    are random first, because a fresh initialisation hides errors (biases of zero, running means of zero).
    ``module`` itself is not touched.

    Args:
        spec: what is claimed.
        module: the network.
        inputs: one input tensor, the tuple of all positional arguments, or a dict of keyword arguments.
        outputs: names of the outputs that count; all by default.
        draws: how many networks and elements to try.
        each: whether to try every group and scaling by itself too, so that a wrong one is named.
        seed: seed of everything that is drawn.

    Raises:
        SpecError: the spec names a tensor that the module lacks, or of another shape; the module does not accept
            the inputs, or gives no tensor; or ``draws`` is less than 1.
    """
    return measure(
        spec, stored(spec, module), runner(module, inputs, outputs), draws=draws, each=each, seed=seed
    )


def measure(
    spec: WeightSpec, state: Weights, run: Run, *, draws: int = 4, each: bool = True, seed: int = 0
) -> VerifyReport:
    """What :func:`verify` does, for any function from weights to outputs."""
    if draws < 1:
        raise SpecError(f"draws: expected at least 1, found {draws}")
    generator = torch.Generator().manual_seed(seed)
    gain = telling_gain(spec, state, run, seed)
    by_symmetry: dict[str, float] = {}
    worst = illegal = 0.0
    movable = bool(_movable(spec))
    for _ in range(draws):
        weights = randomised(state, generator, gain)
        reference = run(weights)
        for name, element in _single_symmetries(spec, generator) if each else ():
            change = relative_change(reference, run(act(spec, element, weights)))
            by_symmetry[name] = max(by_symmetry.get(name, 0.0), change)
        element = random_element(spec, generator=generator)
        worst = max(worst, relative_change(reference, run(act(spec, element, weights))))
        illegal = max(illegal, _illegal_change(spec, weights, reference, run, seed))
    return VerifyReport(max([worst, *by_symmetry.values()]), by_symmetry, illegal if movable else None)


def telling_gain(spec: WeightSpec, state: Weights, run: Run, seed: int) -> float:
    """The least gain of the random weights at which breaking a symmetry is seen in the output.

    Networks are tried at the scale at which they were initialised; where signals die out on their way, weights
    of variance 1 / fan-in let them through.
    """
    seen: dict[float, float] = {}
    for gain in GAINS:
        weights = randomised(state, torch.Generator().manual_seed(seed), gain)
        seen[gain] = _illegal_change(spec, weights, run(weights), run, seed)
        if seen[gain] > TELLING:
            return gain
    return max(seen, key=lambda gain: seen[gain])


def _illegal_change(
    spec: WeightSpec, weights: Weights, reference: list[Tensor], run: Run, seed: int
) -> float:
    """Largest change under what is no symmetry: the units of one axis of one tensor alone reversed."""
    broken = _broken(spec, weights, seed)
    return max((relative_change(reference, run(network)) for network in broken), default=0.0)


def stored(spec: WeightSpec, module: nn.Module) -> Weights:
    """The module's values of the tensors of a spec.

    Raises:
        SpecError: the spec names a tensor that the module lacks, or of another shape.
    """
    state = module.state_dict()
    missing = [name for name in spec.tensors if name not in state]
    if missing:
        raise SpecError(f"spec: the module has no tensor {missing[0]!r}")
    found = {name: state[name] for name in spec.tensors}
    spec.batch_shape(found)  # which raises where a shape differs
    return found


def runner(
    module: nn.Module,
    inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    outputs: str | Sequence[str | int] | None = None,
) -> Run:
    """A function from weights to the module's outputs, all in float64."""
    from weightspace.spec.tracing import as_call, export

    try:
        program = export(module, inputs, outputs)
    except SpecError as error:
        if outputs is not None:
            raise
        network = copy.deepcopy(module).double().eval()
        args, kwargs = pytree.tree_map(_double, as_call(inputs))
        try:
            network(*args, **kwargs)
        except Exception:
            raise error from None
        return lambda weights: _outputs(network, weights, args, kwargs)
    return program_runner(program, inputs)


def program_runner(program: Program, inputs: Tensor | tuple[Any, ...] | dict[str, Any]) -> Run:
    """A function from weights to the outputs of an exported program, in float64."""
    names = [node.name for _, node in program.outputs]
    wide = pytree.tree_map(_double, inputs)

    def run(weights: Weights) -> list[Tensor]:
        values = program.run(weights, wide)
        return [_numbers(values[name]) for name in names if isinstance(values[name], Tensor)]

    return run


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _numbers(value: Tensor) -> Tensor:
    """Real numbers that differ where the values do: complex ones as pairs, indices and masks as floats."""
    return torch.view_as_real(value) if value.is_complex() else value.double()


def randomised(state: Weights, generator: torch.Generator, gain: float = 0.0) -> Weights:
    """Random values in float64, each tensor at its own scale or at ``gain / sqrt(fan-in)`` if that is larger.

    Vectors are drawn at ``0.3 gain`` at least: biases start at 0, the scales of deep residual branches near it.
    What was positive everywhere (variances, the scales of norms) stays so, between half and one and a half of
    that scale.
    """
    drawn = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            drawn[name] = tensor.clone()
            continue
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        size = tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0
        least = gain / math.sqrt(max(math.prod(tensor.shape[1:]), 1)) if tensor.ndim > 1 else 0.3 * gain
        scale = max(size or 0.1, least)
        positive = tensor.numel() > 0 and bool((tensor > 0).all())
        drawn[name] = scale * (0.5 + torch.special.ndtr(values) if positive else values)
    return drawn


def _outputs(
    network: nn.Module, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    with torch.no_grad():
        result = torch.func.functional_call(network, weights, args, kwargs)
    found = [_numbers(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    if not found:
        raise SpecError(f"module: expected a tensor as output, found {type(result).__name__}")
    return found


def output_change(
    module: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    inputs: Tensor | tuple[Any, ...] | dict[str, Any],
) -> float:
    """Largest change of the output between two sets of weights, relative to the largest absolute output.

    In float64, so that what is left is the rounding of the weights themselves.
    """
    from weightspace.spec.tracing import as_call

    network = copy.deepcopy(module).double().eval()
    args, kwargs = pytree.tree_map(_double, as_call(inputs))
    outputs = [
        _outputs(network, {name: _double(tensor) for name, tensor in weights.items()}, args, kwargs)
        for weights in (before, after)
    ]
    return relative_change(*outputs)


def relative_change(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """The worst change of several tensors, each relative to its largest finite entry."""
    return max((_change(*pair) for pair in zip(reference, outputs, strict=True)), default=0.0)


def _change(reference: Tensor, output: Tensor) -> float:
    finite = reference.isfinite()  # masked scores may be -inf
    if not reference.numel() or not finite.any():
        return 0.0
    scale = reference[finite].abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    change = torch.where(finite | output.isfinite(), output - reference, 0.0)
    return (change.abs().max() / scale).item()


def _single_symmetries(spec: WeightSpec, generator: torch.Generator) -> Iterator[tuple[str, Element]]:
    element = random_element(spec, generator=generator)
    for name in spec.groups:
        yield f"permutation({name})", {name: element[name]}
    for name in spec.scalings:
        yield name, {name: element[name]}


def _broken(spec: WeightSpec, weights: Weights, seed: int) -> list[Weights]:
    """Networks in which the units of one axis of one tensor alone are reversed, of different tensors."""
    movable = _movable(spec)
    names = [*movable]
    picked = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:BROKEN].tolist()
    return [{**weights, names[at]: weights[names[at]].flip(movable[names[at]])} for at in picked]


def _movable(spec: WeightSpec) -> dict[str, int]:
    """For every tensor with units that move, an axis along which they do."""
    return {
        name: dim.axis
        for name, tensor in spec.tensors.items()
        for cell in tensor.cells
        for dim in cell.dims
        if dim.group is not None and dim.size > 1
    }
