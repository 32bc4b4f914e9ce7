"""Statistics of a merged network's channels, put right: batch norms estimated anew, and REPAIR for all others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from weightspace.align._activations import check_runs, single
from weightspace.align._data import Batches, batches, call, runner
from weightspace.errors import ConfigError, DataError, SpecError
from weightspace.spec import Weights

TOLERANCE = 1e-4  # how far, in standard deviations, a channel may stay from what it should be
_DEAD = 1e-6  # a standard deviation below this share of the root mean square is rounding
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Mean and standard deviation of every channel that a network's layers compute, before any activation.

    Args:
        mean: per layer, by the path of its module, float64, in the order of the forward pass.
        std: likewise; that of the data, not an estimate for more.
        final: the layers that make the outputs: those whose value is returned, and the last one.
        skipped: layers that cannot be corrected, and why.
    """

    mean: Mapping[str, Float[Tensor, " channels"]]
    std: Mapping[str, Float[Tensor, " channels"]]
    final: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)


def reset_batch_norm(module: nn.Module, weights: Mapping[str, Tensor], data: Batches) -> Weights:
    """The weights with the running statistics of all batch norms estimated anew on some data.

    One pass in which every batch norm normalises by the statistics of the batch, as in training, and nothing else
    does what it does in training. The new running mean and variance (unbiased) are those of all that entered the norm:
    for the first layer exactly those of the data, however it is divided into batches.

    Args:
        module: that computes the network; it is not changed.
        weights: one network; a copy is returned, with the same tensors but for the statistics.
        data: batches of inputs and targets, of which the inputs are used. Larger batches are better.

    Returns:
        All tensors of ``weights``; as they are where there is no ``nn.BatchNorm`` with running statistics.

    Raises:
        DataError: data that the module refuses, or one value per channel in the first batch.

    Reference:
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
        arXiv:1803.05407, section 3.2; Jordan et al. 2023, arXiv:2211.08403, section 3.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
        >>> data = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2)), (torch.tensor([[5.0], [7.0]]), torch.zeros(2))]
        >>> reset_batch_norm(net, net.state_dict(), data)["0.running_mean"]
        tensor([4.])
    """
    network = _Network(module, weights)
    if not network.norms:
        return dict(weights)
    check_runs(module, weights, data)
    return _reset(network, weights, data)


def layer_statistics(module: nn.Module, weights: Mapping[str, Tensor], data: Batches) -> LayerStatistics:
    """Mean and standard deviation of what every linear layer and convolution computes on some data.

    In evaluation mode, over items and positions, streamed in float64. Layers whose value a batch norm reads are left
    out, and so are those that :func:`repair` cannot correct: ``skipped`` says why.

    Args:
        module: that computes the network; it is not changed.
        weights: one network.
        data: batches of inputs and targets, of which the inputs are used.

    Raises:
        DataError: data that the module refuses.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        >>> weights = {**net.state_dict(), "0.weight": torch.tensor([[2.0]]), "0.bias": torch.tensor([1.0])}
        >>> found = layer_statistics(net, weights, [(torch.tensor([[1.0], [3.0]]), torch.zeros(2))])
        >>> found.mean["0"].item(), found.std["0"].item(), found.final
        (5.0, 2.0, ('2',))
    """
    check_runs(module, weights, data)
    return _measure(_Network(module, weights), weights, data)


def repair(
    module: nn.Module,
    merged: Mapping[str, Tensor],
    endpoints: Sequence[Mapping[str, Tensor]],
    data: Batches,
    *,
    coefficients: Sequence[float] | None = None,
    statistics: Sequence[LayerStatistics] | None = None,
    final: bool = False,
) -> Weights:
    """REPAIR: rescale and shift the channels of a merged network so that they vary as those of its endpoints do.

    Averaged units vary less than those of which they are the average, and the more so the deeper they are. For every
    channel of a linear layer or convolution, before the activation, let mu_k and s_k be its mean and standard
    deviation in endpoint k. The merged network's become

        mu = sum_k c_k mu_k / sum_k c_k,    s = sum_k c_k s_k / sum_k c_k

    by a factor and a shift of the channel's weights and bias: the architecture stays. Layers whose value a batch norm
    reads are left to the norm, whose running statistics are estimated anew.

    A first pass corrects batch by batch, each layer on what the corrected layers before it compute, as batch norms
    would. Further passes compare all channels with what they should be and correct what is left, until each mean and
    standard deviation is right within 1e-4 standard deviations on these data, in at most one pass per layer.

    Args:
        module: that computes the networks; it is not changed.
        merged: the network to be corrected.
        endpoints: those from which it was merged, aligned: channel i is the same in all.
        data: batches of inputs and targets, of which the inputs are used.
        coefficients: c_k, such as (1 - lambda, lambda); equal ones by default. Their sum must be positive.
        statistics: of the endpoints on the data, from :func:`layer_statistics`, if they are known: for several merged
            networks of the same endpoints they need to be measured only once.
        final: whether the layers that make the outputs are corrected too.

    Returns:
        All tensors of ``merged``, corrected, in their dtypes. It is unchanged where nothing is wrong.

    Raises:
        ConfigError: coefficients or statistics that do not fit the endpoints.
        DataError: data that the module refuses.
        SpecError: statistics of other layers than the module has.

    Reference:
        Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", arXiv:2211.08403,
        equations 2 and 3. Exactness beyond a single pass is an addition.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> ends = [{n: torch.randn_like(w) for n, w in net.state_dict().items()} for _ in range(2)]
        >>> data = [(torch.randn(100, 2), torch.zeros(100))]
        >>> merged = {name: (ends[0][name] + ends[1][name]) / 2 for name in ends[0]}
        >>> stds = [layer_statistics(net, end, data).std["0"] for end in ends]
        >>> after = layer_statistics(net, repair(net, merged, ends, data), data).std["0"]
        >>> bool(torch.allclose(after, (stds[0] + stds[1]) / 2, rtol=1e-3))
        True
    """
    known = len(endpoints) if statistics is None else len(statistics)
    shares = _shares(coefficients, known, len(endpoints))
    check_runs(module, merged, data)
    if statistics is None:
        statistics = [_measure(_Network(module, weights), weights, data) for weights in endpoints]
    network = _Network(module, merged)
    current = _reset(network, merged, data) if network.norms else dict(merged)
    wanted = _wanted(_measure(network, current, data), statistics, shares, final)
    for step in range(len(wanted.mean) + 1):
        found = _measure(network, current, data)
        if _deviation(found, wanted) <= TOLERANCE:
            break
        if step == 0:
            found = _corrected_pass(network, current, data, wanted)
        current = _folded(module, current, found, wanted)
        current = _reset(network, current, data) if network.norms else current
    return current


def _shares(coefficients: Sequence[float] | None, known: int, endpoints: int) -> list[float]:
    given = [1.0] * known if coefficients is None else [float(value) for value in coefficients]
    if not known:
        raise ConfigError("endpoints: expected at least one, found none")
    if endpoints and endpoints != known:
        raise ConfigError(f"statistics: expected one for each of {endpoints} endpoints, found {known}")
    if len(given) != known:
        raise ConfigError(f"coefficients: expected one for each of {known} endpoints, found {len(given)}")
    total = math.fsum(given)
    if not (math.isfinite(total) and total > 0):
        raise ConfigError(f"coefficients: expected a positive sum, found {total}")
    return [value / total for value in given]


def _wanted(
    found: LayerStatistics, statistics: Sequence[LayerStatistics], shares: Sequence[float], final: bool
) -> LayerStatistics:
    """What the channels should be, for the layers that are to be corrected.

    Raises:
        SpecError: the statistics are not of these layers.
        DataError: they are not finite.
    """
    layers = [name for name in found.mean if final or name not in found.final]
    for each in statistics:
        for name in layers:
            if name not in each.mean or each.mean[name].shape != found.mean[name].shape:
                raise SpecError(
                    f"statistics: expected those of {len(found.mean[name])} channels of layer {name!r}, found none"
                )
            if not bool((each.std[name] + found.std[name]).isfinite().all()):
                raise DataError(f"data: expected finite values of layer {name!r}, found infinite ones or NaN")

    def mixed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([share * part[name] for share, part in zip(shares, parts, strict=True)]).sum(0)
            for name in layers
        }

    return LayerStatistics(
        mixed([each.mean for each in statistics]), mixed([each.std for each in statistics])
    )


def _deviation(found: LayerStatistics, wanted: LayerStatistics) -> float:
    """The worst error of a mean or a standard deviation, in standard deviations."""
    worst = 0.0
    for name, mean in wanted.mean.items():
        std = wanted.std[name]
        scale = torch.maximum(std, _DEAD * std.amax()).clamp_min(torch.finfo(std.dtype).tiny)
        off = torch.maximum((found.mean[name] - mean).abs(), _reachable(found, wanted, name))
        worst = max(worst, (off / scale).amax().item())
    return worst


def _reachable(found: LayerStatistics, wanted: LayerStatistics, name: str) -> Tensor:
    """How far standard deviations are off, of channels that a factor can change."""
    return torch.where(_varies(found, name), (found.std[name] - wanted.std[name]).abs(), 0.0)


def _varies(found: LayerStatistics, name: str) -> Tensor:
    square = found.mean[name].square() + found.std[name].square()
    return found.std[name] > _DEAD * square.sqrt()


def _folded(module: nn.Module, weights: Weights, found: LayerStatistics, wanted: LayerStatistics) -> Weights:
    """The weights with ``(y - found mean) / found std * wanted std + wanted mean`` in place of each layer's y."""
    changed = dict(weights)
    for name, mean in wanted.mean.items():
        factor, shift = _affine(found, wanted, name)
        layer = module.get_submodule(name)
        weight, bias = (_key(name, part) for part in ("weight", "bias"))
        scaled = weights[weight].double() * _along_output(layer, factor)
        moved = weights[bias].double() * factor + shift
        changed[weight], changed[bias] = scaled.to(weights[weight]), moved.to(weights[bias])
        assert len(mean) == len(moved)
    return changed


def _affine(found: LayerStatistics, wanted: LayerStatistics, name: str) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel; a channel that never changes is only shifted."""
    varies = _varies(found, name)
    factor = torch.where(varies, wanted.std[name] / torch.where(varies, found.std[name], 1.0), 1.0)
    return factor, wanted.mean[name] - factor * found.mean[name]


def _along_output(layer: nn.Module, values: Tensor) -> Tensor:
    """Values per channel as they multiply the weight of a layer."""
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, *kernel), the groups side by side along in
        rows = values.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, 0)
        return rows.view(*rows.shape, *(1 for _ in layer.kernel_size))
    kernel = layer.kernel_size if isinstance(layer, _ConvNd) else ()
    return values.view(-1, 1, *(1 for _ in kernel))


# -- running -----------------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """Mean and summed squared deviations per channel of all that was added."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Add values whose channels lie along an axis; mean and variance of these alone."""
        flat = values.detach().movedim(axis, 0).flatten(1).double()
        count, mean = flat.shape[1], flat.mean(1)
        squares = (flat - mean[:, None]).square().sum(1)
        gap, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares + gap.square() * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total
        return mean, squares / count

    @property
    def std(self) -> Tensor:
        """Of all that was added."""
        assert isinstance(self.squares, Tensor)
        return (self.squares / self.count).sqrt()


def _is_batch_norm(part: nn.Module) -> bool:
    """Whether it is one of PyTorch's, or a class of somebody's own that keeps the same buffers."""
    kept = ("running_mean", "running_var")
    alike = hasattr(part, "eps") and all(name in dict(part.named_buffers(recurse=False)) for name in kept)
    return isinstance(part, _BatchNorm) or (alike and not isinstance(part, _InstanceNorm))


class _Network:
    """A copy of a module whose layers can be listened to, and its batch norms."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.module = runner(module)
        self.device = next(iter(weights.values())).device
        self.module.to(self.device)
        self.halves = any(tensor.dtype in _HALF for tensor in weights.values())
        if self.halves:
            self.module.float()
        self.norms = {
            path: part
            for path, part in self.module.named_modules()
            if _is_batch_norm(part) and _key(path, "running_mean") in weights
        }
        self.layers, self.skipped = _layers(module, weights)

    def run(self, weights: Mapping[str, Tensor], data: Batches) -> Iterator[tuple[Any, Tensor]]:
        """Outputs and inputs of each batch."""
        wide = single(dict(weights))
        for inputs, _ in batches(data, self.device):
            with torch.no_grad():
                outputs = call(self.module, wide, single(inputs) if self.halves else inputs)
            yield outputs, inputs

    def layer(self, path: str) -> nn.Module:
        return self.module.get_submodule(path)


def _key(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _layers(module: nn.Module, weights: Mapping[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """Paths of the layers that have a channel's weights and bias to themselves, and why others do not."""
    uses = Counter(id(part) for _, part in module.named_parameters(remove_duplicate=False))
    layers, skipped = [], {}
    for path, part in module.named_modules():
        if not isinstance(part, nn.Linear | _ConvNd):
            continue
        own = dict(part.named_parameters(recurse=False))
        if part.bias is None:
            skipped[path] = "it has no bias"
        elif not {"weight", "bias"} <= set(own):
            skipped[path] = "its weight is computed from other tensors"
        elif any(uses[id(own[name])] > 1 for name in ("weight", "bias")):
            skipped[path] = "its weight is tied to another's"
        elif any(_key(path, name) not in weights for name in ("weight", "bias")):
            skipped[path] = "the network has no tensors of that name"
        else:
            layers.append(path)
    return layers, skipped


def _axis(layer: nn.Module) -> int:
    """Of a layer's output, on which its channels lie."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


@contextmanager
def _hooks(network: _Network, hook: Any, paths: Sequence[str]) -> Iterator[None]:
    """While the network runs, let ``hook(path, arguments, output)`` see, and perhaps replace, what layers compute."""

    def listening(path: str) -> Any:
        return lambda _, arguments, named, output: hook(path, (*arguments, *named.values()), output)

    handles = [network.layer(path).register_forward_hook(listening(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reset(network: _Network, weights: Mapping[str, Tensor], data: Batches) -> Weights:
    with _renormalising(network) as moments:
        for _ in network.run(weights, data):
            pass
    return {**weights, **_running(weights, moments)}


@contextmanager
def _renormalising(network: _Network) -> Iterator[dict[str, _Moments]]:
    """Let batch norms normalise by the batch; what entered each of them."""
    moments = {path: _Moments() for path in network.norms}

    def forward(path: str, norm: Any) -> Any:
        def normalised(input: Tensor) -> Tensor:  # named as in PyTorch
            seen = moments[path]
            if input.numel() > input.shape[1]:
                seen.add(input, 1)
                return F.batch_norm(input, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
            if not seen.count:
                raise DataError(
                    "data: a batch norm needs more than one value per channel, found a first batch of one item"
                )
            # a last batch of one item has no statistics of its own
            mean, variance = torch.as_tensor(seen.mean).to(input), seen.std.square().to(input)
            return F.batch_norm(input, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)

        return normalised

    # the copy's own forward, as SyncBatchNorm cannot run in training mode everywhere
    for path, norm in network.norms.items():
        norm.__dict__["forward"] = forward(path, norm)
    try:
        yield moments
    finally:
        for norm in network.norms.values():
            del norm.__dict__["forward"]


def _running(weights: Mapping[str, Tensor], moments: Mapping[str, _Moments]) -> Weights:
    """The running statistics that follow from what entered the norms that were called."""
    found: Weights = {}
    for path, seen in moments.items():
        if seen.count > 1:
            variance = seen.std.square() * (seen.count / (seen.count - 1))
            for name, value in (("running_mean", seen.mean), ("running_var", variance)):
                key = _key(path, name)
                found[key] = torch.as_tensor(value).to(weights[key])
    return found


def _measure(network: _Network, weights: Mapping[str, Tensor], data: Batches) -> LayerStatistics:
    moments: dict[str, _Moments] = {}
    order = _Order()

    def hook(path: str, arguments: tuple[Any, ...], output: Tensor) -> None:
        order.see(path, arguments, output, path in network.norms)
        if path in network.layers:
            moments.setdefault(path, _Moments()).add(output, _axis(network.layer(path)))

    with _hooks(network, hook, [*network.layers, *network.skipped, *network.norms]):
        for outputs, _ in network.run(weights, data):
            order.end(outputs)
    skipped = {**network.skipped, **dict.fromkeys(order.repeated, "it is called more than once")}
    skipped |= dict.fromkeys(order.normalised, "a batch norm reads it")
    kept = {path: seen for path, seen in moments.items() if path not in skipped}
    return LayerStatistics(
        {path: torch.as_tensor(seen.mean) for path, seen in kept.items()},
        {path: seen.std for path, seen in kept.items()},
        tuple(path for path in kept if path in order.final),
        skipped,
    )


@dataclass
class _Order:
    """Which layers are normalised, called more than once in a batch, or make the outputs."""

    outputs: list[tuple[str, Tensor]] = field(
        default_factory=list
    )  # kept: identities of freed tensors come again
    normalised: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    final: set[str] = field(default_factory=set)

    def see(self, path: str, arguments: tuple[Any, ...], output: Tensor, is_norm: bool) -> None:
        if is_norm:
            self.normalised |= {layer for layer, value in self.outputs if value is arguments[0]}
            return
        self.repeated |= {layer for layer, _ in self.outputs if layer == path}
        self.outputs.append((path, output))

    def end(self, outputs: Any) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        if self.outputs:
            self.final.add(self.outputs[-1][0])
        self.final |= {path for path, value in self.outputs if any(value is leaf for leaf in leaves)}
        self.outputs.clear()


def _corrected_pass(
    network: _Network, weights: Mapping[str, Tensor], data: Batches, wanted: LayerStatistics
) -> LayerStatistics:
    """What the layers compute when those before them are corrected batch by batch, as batch norms would."""
    moments = {path: _Moments() for path in wanted.mean}

    def hook(path: str, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        axis = _axis(network.layer(path))
        mean, variance = moments[path].add(output, axis)
        batch = LayerStatistics({path: mean}, {path: variance.sqrt()})
        shape = [-1 if at == axis else 1 for at in range(-output.ndim, 0)]
        factor, shift = (value.to(output).view(shape) for value in _affine(batch, wanted, path))
        return output * factor + shift

    with _renormalising(network), _hooks(network, hook, list(wanted.mean)):
        for _ in network.run(weights, data):
            pass
    return LayerStatistics(
        {path: torch.as_tensor(seen.mean) for path, seen in moments.items()},
        {path: seen.std for path, seen in moments.items()},
    )
