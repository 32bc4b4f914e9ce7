"""Networks that are moved together: what they have to share, and how they are compared with their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.align._report import MatchReport, Stopwatch, compare
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import Element, Weights, WeightSpec


def check_together(
    spec: WeightSpec, networks: Sequence[Mapping[str, Tensor]], *, seed: int, tolerance: float, **counts: int
) -> None:
    """Refuse what no search for one common order can begin with.

    Args:
        spec: the weight space.
        networks: at least two.
        seed: at least 0.
        tolerance: at least 0.
        counts: options that are at least 1.

    Raises:
        ConfigError: fewer than two networks, or an option out of range.
        SpecError: a spec without parameters, or see :func:`check_networks`.
    """
    if len(networks) < 2:
        raise ConfigError(f"networks: expected at least two to align, found {len(networks)}")
    least = {"seed": (seed, 0), "tolerance": (tolerance, 0)} | {
        name: (value, 1) for name, value in counts.items()
    }
    for name, (value, lowest) in least.items():
        if not value >= lowest:
            raise ConfigError(f"{name}: expected at least {lowest}, found {value}")
    if not any(tensor.kind == "parameter" for tensor in spec.tensors.values()):
        raise SpecError("spec: it has no parameters to match")
    check_networks(spec, networks)


def check_networks(spec: WeightSpec, networks: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse networks that are not all of this spec: before any work, in one sentence that says which.

    Raises:
        SpecError: a tensor that is missing, unknown, of another shape (batch axes included), on another device than
            the first network's, or not finite; networks that do not have the same tensors.
    """
    for number, network in enumerate(networks):
        place = f"networks: network {number}: "
        try:
            batch = spec.batch_shape(network)
        except SpecError as error:
            raise SpecError(place + str(error).removeprefix("weights: ")) from None
        missing = next((name for name in (*spec.tensors, *networks[0]) if name not in network), None)
        if missing is not None:
            raise SpecError(f"{place}tensor {missing!r} is missing")
        extra = next((name for name in network if name not in networks[0]), None)
        if extra is not None:
            raise SpecError(f"networks: network 0: tensor {extra!r} of network {number} is missing")
        if batch:
            raise SpecError(f"{place}expected a single one, found batch shape {list(batch)}")
        _check_values(spec, place, network, networks[0])


def _check_values(
    spec: WeightSpec, place: str, network: Mapping[str, Tensor], first: Mapping[str, Tensor]
) -> None:
    for name, tensor in spec.tensors.items():
        value = network[name]
        if value.device != first[name].device:
            raise SpecError(
                f"{place}tensor {name!r} is on {value.device}, that of network 0 on {first[name].device}"
            )
        if tensor.kind == "parameter" and not bool(value.isfinite().all()):
            raise SpecError(f"{place}expected finite values, but tensor {name!r} has others")


def parameters_of(spec: WeightSpec, network: Mapping[str, Tensor]) -> Weights:
    """The parameters of one network; half precision becomes float32."""
    return {
        name: network[name].detach().to(torch.promote_types(network[name].dtype, torch.float32))
        for name, tensor in spec.tensors.items()
        if tensor.kind == "parameter"
    }


def average(networks: Sequence[Mapping[str, Tensor]]) -> Weights:
    """The mean of networks, tensor by tensor."""
    return {name: torch.stack([network[name] for network in networks]).mean(0) for name in networks[0]}


def total(networks: Sequence[Mapping[str, Tensor]]) -> float:
    """The sum over networks of their squared L2 distances to their mean."""
    parts = []
    for name in networks[0]:
        values = torch.stack([network[name].double() for network in networks])
        parts.append((values - values.mean(0)).square().sum())
    return torch.stack(parts).sum().item()


def joined(spec: WeightSpec, elements: Sequence[Element]) -> Element:
    """Elements along a leading axis; a name that one of them lacks is its identity.

    Raises:
        SpecError: a name of another spec.
    """
    identity = spec.identity()
    examples = {name: value for element in elements for name, value in element.items()}
    return {
        name: torch.stack([element.get(name, identity[name].to(example)) for element in elements])
        for name, example in examples.items()
    }


def finish_together(
    spec: WeightSpec,
    method: str,
    networks: Sequence[Mapping[str, Tensor]],
    element: Element,
    sweeps: int,
    stopwatch: Stopwatch,
) -> tuple[list[Weights], MatchReport]:
    """Let an element act on every network, and report how much closer they are to their mean for it.

    Args:
        spec: the weight space.
        method: name of the matcher.
        networks: as they were given.
        element: that was found, with a leading axis of networks.
        sweeps: over all networks, in the run that was kept.
        stopwatch: started when the matcher was called.
    """
    with torch.no_grad():
        aligned = [
            spec.act({name: value[row] for name, value in element.items()}, network)
            for row, network in enumerate(networks)
        ]
        objective, after = _against_mean(spec, aligned)
        _, before = _against_mean(spec, networks)
    counts = torch.full(after.shape, sweeps, device=after.device)
    return aligned, MatchReport(method, element, objective, before, after, counts, stopwatch.seconds)


def _against_mean(
    spec: WeightSpec, networks: Sequence[Mapping[str, Tensor]]
) -> tuple[Float[Tensor, " networks"], Float[Tensor, " networks"]]:
    """Inner products with the mean of all, and distances to it."""
    parameters = [
        {name: value.double() for name, value in parameters_of(spec, network).items()} for network in networks
    ]
    mean = average(parameters)
    products, distances = zip(*(compare(spec, mean, network) for network in parameters), strict=True)
    return torch.stack(products), torch.stack(distances)
