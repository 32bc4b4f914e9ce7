"""Metanetworks that run the networks they read, on inputs that are learned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import ConfigError, SpecError
from weightspace.models._perceptron import perceptron
from weightspace.models._unit_activations import activations_and_outputs, unit_activations
from weightspace.nets import MLP, Network, evaluate_batch
from weightspace.spec import Weights, WeightSpec

GENERATORS = ("none", "linear")
UNIFORM_STD = 1.0 / math.sqrt(3.0)  # of numbers that are uniform in [-1, 1]
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class FreeProbes(nn.Module):
    """Inputs that are parameters themselves, uniform in [-1, 1] at first.

    Args:
        shape: of one input.
        probes: number of inputs.
    """

    def __init__(self, shape: Sequence[int], probes: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.rand(probes, *shape) * 2.0 - 1.0)

    def forward(self) -> Tensor:
        """The inputs, (probes, *shape)."""
        return self.values


class GeneratedProbes(nn.Module):
    """Inputs made from learned latent codes by a deep linear generator that they share.

    Without activations a deep generator makes nothing that a single linear map could not; its depth, and for
    images its convolutions, only favour some probes over others in training, and overfit less. Coordinates are
    made by linear layers, images ``(channels, *size)`` of 1 to 3 dimensions by transposed convolutions: one from
    the code to a small image, ``layers - 2`` that double its size, one that keeps it; what is too large is cut at
    the edges.

    At first the probes have the root mean square of numbers that are uniform in [-1, 1].

    Args:
        shape: of one input.
        probes: number of inputs.
        latent: size of a latent code.
        layers: of the generator, at least 1; None for 2 (coordinates) or 5 (images), as published.
        width: channels before the last convolution, doubled for each layer before it.
        bound: whether images go through tanh at the end, as in the authors' code; then they are not linear in
            the codes.

    Raises:
        ConfigError: a size below 1.

    Reference:
        Kahana et al. 2024, "Deep Linear Probe Generators for Weight Space Learning", arXiv:2410.10811, section 4;
        sizes as in the authors' code. The first scale of the probes is ours.

    Example:
        >>> GeneratedProbes((1, 28, 28), probes=4, latent=8)().shape
        torch.Size([4, 1, 28, 28])
    """

    def __init__(
        self,
        shape: Sequence[int],
        probes: int,
        *,
        latent: int = 32,
        layers: int | None = None,
        width: int = 16,
        bound: bool = False,
    ) -> None:
        super().__init__()
        depth = layers if layers is not None else (2 if len(shape) == 1 else 5)
        if min(probes, latent, depth, width) < 1:
            raise ConfigError(
                "generator: expected probes, latent, layers and width of at least 1, "
                f"found {probes}, {latent}, {depth}, {width}"
            )
        self.shape, self.bound = tuple(shape), bound and len(shape) > 1
        self.codes = nn.Parameter(torch.randn(probes, latent))
        self.generator = (
            _linear_layers(latent, shape[0], depth)
            if len(shape) == 1
            else _transposed_convolutions(latent, shape, depth, width)
        )
        self._scale()

    def _scale(self) -> None:
        *_, last = self.generator
        with torch.no_grad():
            for layer in self.generator:
                torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            spread = self.generate(self.codes).square().mean().sqrt()
            last.weight.mul_(UNIFORM_STD / spread)  # type: ignore[operator]

    def generate(self, codes: Float[Tensor, "probes latent"]) -> Float[Tensor, "probes ..."]:
        """What the generator makes of any codes, before the tanh: an affine function of them."""
        spatial = len(self.shape) - 1
        made: Tensor = self.generator(codes.reshape(*codes.shape, *[1] * spatial))
        for axis, size in enumerate(self.shape[1:], start=2):
            made = made.narrow(axis, (made.shape[axis] - size) // 2, size)
        return made

    def forward(self) -> Tensor:
        """The inputs, (probes, *shape)."""
        made = self.generate(self.codes)
        return made.tanh() if self.bound else made


def _linear_layers(latent: int, out_features: int, layers: int) -> nn.Sequential:
    hidden = [nn.Linear(latent, latent) for _ in range(layers - 1)]
    return nn.Sequential(*hidden, nn.Linear(latent, out_features))


def _transposed_convolutions(latent: int, shape: Sequence[int], layers: int, width: int) -> nn.Sequential:
    channels, *size = shape
    convolution = _TRANSPOSED[len(size) - 1]
    doublings = max(layers - 2, 0)
    first = tuple(math.ceil(length / 2**doublings) for length in size)
    if layers == 1:
        return nn.Sequential(convolution(latent, channels, first))
    widths = [width * 2 ** (doublings - step) for step in range(doublings + 1)]
    between = [
        convolution(wide, narrow, kernel_size=4, stride=2, padding=1) for wide, narrow in pairwise(widths)
    ]
    last = convolution(width, channels, kernel_size=3, padding=1)
    return nn.Sequential(convolution(latent, widths[0], first), *between, last)


def make_probes(
    shape: Sequence[int], probes: int, generator: str = "none", **options: Any
) -> FreeProbes | GeneratedProbes:
    """Probes by the name of their generator.

    Args:
        shape: of one input: ``(in_features,)`` for coordinates, ``(channels, *size)`` for images.
        probes: number of inputs, at least 1.
        generator: ``"none"`` for free probes, or ``"linear"``.
        options: of :class:`GeneratedProbes`; free probes have none and pass over them.

    Raises:
        ConfigError: an unknown generator, a size below 1, or a shape of more than three dimensions and channels.
    """
    if generator not in GENERATORS:
        raise ConfigError(f"generator: expected one of {', '.join(GENERATORS)}, found {generator!r}")
    if probes < 1 or not 1 <= len(shape) <= 4 or min(shape) < 1:
        raise ConfigError(
            "probes: expected at least one, of shape (features) or (channels, ...) with up to three sizes, "
            f"found {probes} of shape {tuple(shape)}"
        )
    return FreeProbes(shape, probes) if generator == "none" else GeneratedProbes(shape, probes, **options)


def input_shape_of(network: nn.Module) -> tuple[int, ...]:
    """The shape of one input, of networks that show it: the library's own, or a chain that begins with a linear layer.

    Raises:
        ConfigError: the network does not show it, or reads tokens, between which there is nothing to learn.

    Example:
        >>> input_shape_of(MLP((2, 8, 1)))
        (2,)
    """
    if isinstance(network, MLP):
        return (network.widths[0],)
    if isinstance(network, Network):
        if not network.example_inputs(1).is_floating_point():
            raise ConfigError(
                f"network: a {type(network).__name__} of tokens has no inputs that could be learned"
            )
        return tuple(network.input_shape)
    if isinstance(network, nn.Sequential) and len(network) and isinstance(network[0], nn.Linear):
        return (network[0].in_features,)
    raise ConfigError(
        f"input_shape: a {type(network).__name__} does not show the shape of its inputs; give it, "
        "as in input_shape=(3, 32, 32)"
    )


class _Tensor(NamedTuple):
    """A tensor of the network that is run: its names, more than one if it is tied, and whether others need it."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    needed: bool


def _tensors_of(network: nn.Module) -> list[_Tensor]:
    """Parameters and statistics of norms, which are needed, and other buffers, which are the same in all networks."""
    statistics = {
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        if getattr(module, "track_running_stats", False)
        for name in ("running_mean", "running_var")
    }
    parameters = dict(network.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, tensor in (*parameters.items(), *network.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
        shapes[id(tensor)] = tuple(tensor.shape)
    needed = {*parameters, *statistics}
    return [_Tensor(tuple(found), shapes[at], not needed.isdisjoint(found)) for at, found in names.items()]


class _Runner(nn.Module):
    """A network to run with other networks' weights, and what it is run on: the base of models that probe."""

    def __init__(
        self,
        network: nn.Module,
        input_shape: Sequence[int] | None,
        probes: int,
        generator: str,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        # held in a tuple: its parameters are those of no network in the zoo, and are not to be trained or saved
        self._network = (copy.deepcopy(network).requires_grad_(False).eval(),)
        shape = input_shape_of(network) if input_shape is None else tuple(input_shape)
        self.source = make_probes(shape, probes, generator, **options)
        self.answers = _check_answers(self._network[0], self.probes)
        self._tensors = _tensors_of(self._network[0])

    @property
    def probes(self) -> Tensor:
        """The inputs, (probes, *input_shape)."""
        probes: Tensor = self.source()
        return probes

    def _check_complete(self, weights: Weights) -> None:
        """Raise SpecError unless the weights are those of networks like the one that is run.

        What was missing would be taken from that network, without a word.
        """
        known = {name: tensor for tensor in self._tensors for name in tensor.names}
        for name, value in weights.items():
            if name not in known:
                raise SpecError(f"weights: the network that is run has no tensor {name!r}")
            if value.ndim == 0 or value.shape[1:] != known[name].shape:
                expected = ", ".join(["batch", *map(str, known[name].shape)])
                raise SpecError(
                    f"weights: expected {name!r} of shape ({expected}), found {tuple(value.shape)}; "
                    "one batch axis comes first"
                )
        for tensor in self._tensors:
            if tensor.needed and weights.keys().isdisjoint(tensor.names):
                raise SpecError(f"weights: {tensor.names[0]!r} is missing, which the network that is run has")
        if len({len(value) for value in weights.values()}) > 1:
            raise SpecError("weights: expected the same number of networks in every tensor")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # what is no weight (tables of positions, counts of batches) has to follow to another device or dtype
        self._network[0]._apply(fn)
        return super()._apply(fn, recurse)


class Probe(_Runner):
    """Send learned inputs through the networks themselves and read what comes back.

    Invariant to every symmetry of the networks, since their function is all that it sees.

    Args:
        network: a network of the population's architecture; supplies the computation only, and in eval mode.
        out_features: size of the output.
        input_shape: of one input; None where the network shows it, see :func:`input_shape_of`.
        probes: number of learned inputs.
        generator: ``"none"``: the inputs are parameters; ``"linear"``: :class:`GeneratedProbes`.
        latent: size of a generated probe's latent code.
        generator_layers: see :class:`GeneratedProbes`.
        generator_width: see :class:`GeneratedProbes`.
        bound: see :class:`GeneratedProbes`.
        norm: ``"batch"`` for BatchNorm of the answers and in each hidden layer, or ``"none"``.
        hidden: units per hidden layer of the MLP that reads the answers.
        dropout: after each hidden layer.

    Shapes:
        Weights (not normalised) with one batch axis -> (batch, out_features). Training on batches of one network
        needs ``norm="none"``.

    Raises:
        ConfigError: an option out of range, or a network that cannot read inputs of that shape.

    Reference:
        Kahana et al. 2024, "Deep Linear Probe Generators for Weight Space Learning", arXiv:2410.10811: section 3
        (free probes), section 4 (generated).

    Example:
        >>> spec = WeightSpec.mlp([2, 8, 1], activation="sine", w0=30.0)
        >>> model = Probe(MLP((2, 8, 1)), 10, probes=16, generator="linear")
        >>> model(spec.unflatten(torch.randn(4, spec.num_parameters))).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        network: nn.Module,
        out_features: int,
        *,
        input_shape: Sequence[int] | None = None,
        probes: int = 64,
        generator: str = "none",
        latent: int = 32,
        generator_layers: int | None = None,
        generator_width: int = 16,
        bound: bool = False,
        norm: str = "batch",
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.2,
    ) -> None:
        if norm not in ("batch", "none"):
            raise ConfigError(f"norm: expected batch or none, found {norm!r}")
        options = {"latent": latent, "layers": generator_layers, "width": generator_width, "bound": bound}
        super().__init__(network, input_shape, probes, generator, options)
        answers = self.answers
        first: list[nn.Module] = [nn.BatchNorm1d(answers)] if norm == "batch" else []
        self.read = nn.Sequential(
            *first, *perceptron(answers, hidden, out_features, dropout=dropout, norm=norm)
        )

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks.

        Raises:
            SpecError: a tensor that the network has is missing or of another shape, or one that it has not is there.
        """
        self._check_complete(weights)
        if len(next(iter(weights.values()))) == 0:  # over which vmap does not run
            answers = self.probes.new_empty(0, self.answers)
        else:
            answers = evaluate_batch(self._network[0], weights, self.probes)
        out: Tensor = self.read(answers.flatten(1))
        return out


def _check_answers(network: nn.Module, probes: Tensor) -> int:
    """How many numbers a network answers to all probes, when it is run as it will be, in a batch.

    Raises:
        ConfigError: it cannot be run so, or gives something else than one tensor.
    """
    own = {name: parameter.detach()[None] for name, parameter in network.named_parameters()}
    try:
        with torch.no_grad():
            answers = evaluate_batch(network, own, probes)
    except Exception as error:  # any code may be in a network, and it fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"input_shape: the network cannot be run in a batch on inputs of shape {tuple(probes.shape[1:])}: "
            f"{reason}"
        ) from None
    if not isinstance(answers, Tensor):
        raise ConfigError(f"network: expected one tensor as output, found {type(answers).__name__}")
    return answers.numel()


class ProbeFeatures(_Runner):
    """Activations of every hidden unit on learned inputs: features of units for other metanetworks.

    Equivariant: ``model(g . W)[group] == g . model(W)[group]`` for all permutations g; see
    :func:`unit_activations` for signs, phases and scales.

    Args:
        network: a network of the population's architecture; supplies the computation only, and in eval mode.
        spec: its weight space.
        input_shape: of one input; None where the network shows it, see :func:`input_shape_of`.
        probes: number of learned inputs.
        generator: ``"none"`` or ``"linear"``, see :class:`Probe`.
        partial: whether groups that cannot be read are left out; they are refused otherwise.
        options: of :class:`GeneratedProbes`.

    Shapes:
        Weights (not normalised) with one batch axis -> per group (batch, size, probes).

    Raises:
        SpecError: a group whose activations cannot be read.
        ConfigError: an option out of range.

    Reference:
        Kofinas et al. 2024, "Graph Neural Networks for Learning Equivariant Representations of Neural Networks",
        arXiv:2403.12143, section 3.2 (probe features).

    Example:
        >>> spec = WeightSpec.mlp([2, 8, 1], activation="sine", w0=30.0)
        >>> features = ProbeFeatures(MLP((2, 8, 1)), spec, probes=16)
        >>> features(spec.unflatten(torch.randn(4, spec.num_parameters)))["hidden0"].shape
        torch.Size([4, 8, 16])
    """

    def __init__(
        self,
        network: nn.Module,
        spec: WeightSpec,
        *,
        input_shape: Sequence[int] | None = None,
        probes: int = 64,
        generator: str = "none",
        partial: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(network, input_shape, probes, generator, options)
        self.spec, self.partial = spec, partial
        if not partial:
            with torch.no_grad():  # a group that cannot be read is refused now, not in training
                own = self._network[0].state_dict()
                weights = {name: own[name][None] for name in spec.tensors if name in own}
                unit_activations(self._network[0], spec, weights, self.probes)

    def forward(self, weights: Weights) -> dict[str, Tensor]:
        """Features of the units of a batch of networks.

        Raises:
            SpecError: a tensor that the network has is missing or of another shape, or one that it has not is there.
        """
        if self.partial:
            return self.with_answers(weights)[0]
        self._check_complete(weights)
        return unit_activations(self._network[0], self.spec, weights, self.probes)

    def with_answers(self, weights: Weights) -> tuple[dict[str, Tensor], Float[Tensor, "batch probes ..."]]:
        """Features of hidden units as far as they can be read, and what the networks answer."""
        self._check_complete(weights)
        return activations_and_outputs(
            self._network[0], self.spec, weights, self.probes, groups=tuple(self.spec.groups)
        )


def by_channel(values: Tensor, axis: int) -> Float[Tensor, "... channels probes"]:
    """The mean over the positions behind the axis of channels, which is swapped with that of the probes before it."""
    channels = values.shape[axis : axis + 1].numel()
    mean = values.reshape(*values.shape[:axis], channels, -1).mean(-1)
    return mean.mT
