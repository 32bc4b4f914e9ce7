"""What the hidden units of many networks answer to the same inputs, derived from the spec."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import SpecError
from weightspace.spec import TensorSpec, WeightSpec

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class _Reader:
    """A module whose input holds the units of a group.

    Args:
        module: its path in the network.
        axis: of its input, from the end, on which the units lie.
        start: where on that axis the part begins that they lie in, of what was concatenated.
        sizes: into which that part is split: a flattened image is (channels, pixels).
        place: which of them is the group.
    """

    module: str
    axis: int
    start: int
    sizes: tuple[int, ...]
    place: int

    def units(self, inputs: Float[Tensor, "probes ..."]) -> Float[Tensor, "size probes"]:
        """One row per unit; the mean over positions, where a unit has many."""
        part = inputs.movedim(self.axis, -1).narrow(-1, self.start, math.prod(self.sizes))
        split = part.unflatten(-1, self.sizes)
        last = split.movedim(split.ndim - len(self.sizes) + self.place, -1)
        return last.flatten(1, -2).mean(1).mT if last.ndim > 2 else last.mT


def unit_activations(
    network: nn.Module,
    spec: WeightSpec,
    weights: Mapping[str, Tensor],
    probes: Float[Tensor, "probes ..."],
    *,
    groups: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, "batch size probes"]]:
    """The activation of every hidden unit of many networks on the same inputs.

    A unit's activation is the number that the layers behind it read: what enters an ``nn.Linear`` or a convolution
    whose weight, by the spec, runs over the group along its input axis. Nothing else is known of the
    architecture. Behind convolutions it is the mean over positions.

    Permuting the units of the networks permutes the features in the same way. Where a scaling of the spec
    multiplies the reading weights by c, the activation is multiplied by 1 / c: under ``sign`` and an odd
    ``phase`` those of sine and tanh change their sign and those of Gaussians stay, under ``positive`` those of
    ReLU are scaled. Take absolute values where that must not be seen.

    Args:
        network: supplies the computation; in eval mode if it has norms with statistics, or dropout.
        spec: its weight space.
        weights: tensors with one leading batch axis, not normalised.
        probes: what every network is given; gradients flow to it and to the weights.
        groups: which groups; all by default.

    Returns:
        Per group of the spec, in its order, (batch, size, probes).

    Raises:
        SpecError: a group that does not exist, is nested within another, or that no linear layer or convolution
            reads.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> spec = WeightSpec.mlp([3, 8, 2], activation="tanh", layers=["0", "2"])
        >>> weights = spec.unflatten(torch.randn(5, spec.num_parameters))
        >>> unit_activations(net, spec, weights, torch.randn(7, 3))["hidden0"].shape
        torch.Size([5, 8, 7])
    """
    wanted = tuple(spec.groups) if groups is None else tuple(groups)
    for name in wanted:
        if name not in spec.groups:
            raise SpecError(f"groups: expected some of {', '.join(spec.groups)}, found {name!r}")
    _check_read(
        network, spec, wanted, {name for name, found in _readers(network, spec, wanted).items() if found}
    )
    features, _ = activations_and_outputs(network, spec, weights, probes, groups=wanted)
    _check_read(network, spec, wanted, features)
    return features


def _check_read(network: nn.Module, spec: WeightSpec, wanted: Sequence[str], read: Collection[str]) -> None:
    for name in wanted:
        if name not in read:
            raise SpecError(f"group {name!r}: its activations cannot be read: {_reason(network, spec, name)}")


def activations_and_outputs(
    network: nn.Module,
    spec: WeightSpec,
    weights: Mapping[str, Tensor],
    probes: Float[Tensor, "probes ..."],
    *,
    groups: Sequence[str],
) -> tuple[dict[str, Tensor], Float[Tensor, "batch probes ..."]]:
    """:func:`unit_activations` of those groups that can be read, and what the networks answer."""
    readers = _readers(network, spec, groups)

    def one(parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        with _recorded_inputs(network, readers) as inputs:
            outputs = torch.func.functional_call(network, parameters, (probes,))
        found = {group: _features(readers[group], inputs, len(probes)) for group in readers}
        return {group: values for group, values in found.items() if values is not None}, outputs

    found: tuple[dict[str, Tensor], Tensor] = torch.vmap(one)(dict(weights))
    return found


def _reason(network: nn.Module, spec: WeightSpec, group: str) -> str:
    """Why the activations of a group cannot be read."""
    if within := spec.groups[group].within:
        return f"it is nested within {', '.join(within)}"
    readers = _readers(network, spec, (group,))[group]
    names = ", ".join(reader.module or "the network" for reader in readers)
    if not names:
        return "no linear layer or convolution takes its units as input"
    return f"{names} was not called with one row per probe"


def _readers(network: nn.Module, spec: WeightSpec, groups: Sequence[str]) -> dict[str, list[_Reader]]:
    """Per group the modules that read it, those that read nothing beside it first."""
    tensors = {name: tensor for tensor in spec.tensors.values() for name in tensor.aliases}
    tensors.update(spec.tensors)
    found: dict[str, list[_Reader]] = {name: [] for name in groups}
    for path, module in network.named_modules():
        tensor = tensors.get(f"{path}.weight" if path else "weight")
        for group, reader in _read_by(path, module, tensor) if tensor is not None else ():
            if group in found:
                found[group].append(reader)
    for readers in found.values():
        readers.sort(key=lambda reader: len(reader.sizes))
    return found


def _read_by(path: str, module: nn.Module, tensor: TensorSpec) -> Iterator[tuple[str, _Reader]]:
    """The groups along the input axis of a module's weight."""
    if isinstance(module, nn.Linear):
        weight_axis, axis = 1, -1
    elif isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)) and module.groups == 1:
        weight_axis, axis = (
            1 if isinstance(module, _CONVOLUTIONS) else 0,
            -1 - len(module.kernel_size),
        )
    else:
        return
    step = math.prod(tensor.shape[weight_axis + 1 :])
    for cell in tensor.cells:
        dims = sorted((dim for dim in cell.dims if dim.axis == weight_axis), key=lambda dim: -dim.stride)
        sizes = tuple(dim.size for dim in dims)
        if any(dim.stride != step * math.prod(sizes[place + 1 :]) for place, dim in enumerate(dims)):
            continue  # it picks every second index, say
        start = cell.offset // step % tensor.shape[weight_axis]
        for place, dim in enumerate(dims):
            if dim.group is not None and not dim.parents:
                yield dim.group, _Reader(path, axis, start, sizes, place)


@contextmanager
def _recorded_inputs(
    network: nn.Module, readers: Mapping[str, Sequence[_Reader]]
) -> Iterator[dict[str, Tensor]]:
    """A dict that fills with the input of each reader, at its first call, while the network runs."""
    inputs: dict[str, Tensor] = {}

    def record(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            # all modules that are listened to call their argument so: module(input=x)
            inputs.setdefault(path, arguments[0] if arguments else named["input"])

        return hook

    paths = {reader.module for found in readers.values() for reader in found}
    handles = [
        network.get_submodule(path).register_forward_pre_hook(record(path), with_kwargs=True)
        for path in sorted(paths)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _features(
    readers: Sequence[_Reader], inputs: Mapping[str, Tensor], probes: int
) -> Float[Tensor, "size probes"] | None:
    """What the units of a group answered; None if nothing that was called with one row per probe reads them."""
    for reader in readers:
        found = inputs.get(reader.module)
        if found is not None and found.ndim > -reader.axis and len(found) == probes:
            return reader.units(found)
    return None
