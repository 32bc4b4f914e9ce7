"""In what checkpoints differ, from each other and from the spec of their weight space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec import WeightSpec
from weightspace.zoo.checkpoints._network import Network
from weightspace.zoo.checkpoints._stored import meta_of

Kind = Literal["missing", "unexpected", "shape", "transposed", "type", "narrow", "not finite", "not tied"]

_BLOCK = 2**20  # elements that are looked at together: masks of a whole tensor would take memory


@dataclass(frozen=True)
class Difference:
    """What keeps a network from being aligned or merged with others, or is worth knowing.

    Args:
        kind: of what is the matter.
        network: name of the checkpoint.
        tensor: name of the tensor.
        text: one sentence for people.
    """

    kind: Kind
    network: str
    tensor: str
    text: str

    @property
    def is_fatal(self) -> bool:
        """Whether they do not fit; tensors of other types are converted."""
        return self.kind != "type"


def differences(
    networks: Sequence[Network], spec: WeightSpec | None = None, *, values: bool = True
) -> list[Difference]:
    """Compare networks with the first of them, and with a spec if there is one.

    Args:
        networks: one or more.
        spec: the weight space; constants and tied names need not be stored.
        values: whether to read the tensors, one at a time, and look for what is NaN or infinite, and for tied tensors
            that are not equal.

    Returns:
        Differences in names first, then in shapes, types and values.
    """
    found = [*_names(networks, spec)]
    for network in networks:
        found += _shapes(network, networks[0], spec)
    for network in networks if values else ():
        found += _values(network, spec)
    return sorted(found, key=lambda difference: _ORDER.index(difference.kind))


_ORDER: list[Kind] = [
    "transposed",
    "shape",
    "missing",
    "unexpected",
    "narrow",
    "not finite",
    "not tied",
    "type",
]


def _names(networks: Sequence[Network], spec: WeightSpec | None) -> Iterator[Difference]:
    first = networks[0]
    for network in networks[1:]:
        prefix = _prefix(first.weights, network.weights)
        hint = f"; the names of {network.name} all begin with {prefix!r}" if prefix else ""
        for name in first.weights:
            if name not in network.weights:
                text = f"{network.name}: tensor {name!r} of {first.name} is missing{hint}"
                yield Difference("missing", network.name, name, text)
        for name in network.weights:
            if name not in first.weights:
                text = f"{network.name}: tensor {name!r} is not in {first.name}{hint}"
                yield Difference("unexpected", network.name, name, text)
    if spec is not None:
        for network in networks:
            yield from _names_in_spec(network, spec)


def _names_in_spec(network: Network, spec: WeightSpec) -> Iterator[Difference]:
    for name, tensor in spec.tensors.items():
        if not any(tied in network.weights for tied in (name, *tensor.aliases)):
            text = f"{network.name}: tensor {name!r} of the architecture is missing"
            yield Difference("missing", network.name, name, text)
    for name in network.weights:
        if not _is_known(spec, name):
            text = f"{network.name}: the architecture has no tensor {name!r}"
            yield Difference("unexpected", network.name, name, text)


def _is_known(spec: WeightSpec, name: str) -> bool:
    try:
        spec.shape_of(name)
    except SpecError:
        return False
    return True


def _prefix(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """``"module."`` where that is all that the names of the other have more."""
    name = next(iter(first), "")
    longer = next((candidate for candidate in other if candidate.endswith(f".{name}")), None)
    prefix = "" if longer is None else longer.removesuffix(name)
    return prefix if {f"{prefix}{own}" for own in first} == {*other} else ""


def _shapes(network: Network, first: Network, spec: WeightSpec | None) -> Iterator[Difference]:
    for name in network.weights:
        meta = meta_of(network.weights, name)
        if meta.is_floating_point() and meta.element_size() == 1:
            text = f"{network.name}: {name!r} should be of at least 16 bits, found {_text(meta)}, which needs its scales"
            yield Difference("narrow", network.name, name, text)
        if network is not first and name in first.weights:
            expected = meta_of(first.weights, name)
            yield from _shape(network, name, tuple(meta.shape), first.name, tuple(expected.shape))
            if meta.dtype != expected.dtype:
                types = f"{_text(expected)} in {first.name} and {_text(meta)} in {network.name}"
                yield Difference("type", network.name, name, f"{name!r} is of type {types}")
        elif network is first and spec is not None and _is_known(spec, name):
            yield from _shape(network, name, tuple(meta.shape), "the architecture", spec.shape_of(name))


def _shape(
    network: Network, name: str, found: tuple[int, ...], where: str, expected: tuple[int, ...]
) -> Iterator[Difference]:
    if found == expected:
        return
    sizes = f"{name!r} is {list(expected)} in {where} and {list(found)} in {network.name}"
    if found == expected[::-1] and len(found) == 2:
        yield Difference("transposed", network.name, name, f"{sizes}: transposed")
    elif sorted(found) == sorted(expected):
        yield Difference("transposed", network.name, name, f"{sizes}: its axes are in another order")
    else:
        yield Difference("shape", network.name, name, sizes)


def _text(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _values(network: Network, spec: WeightSpec | None) -> Iterator[Difference]:
    for name in network.weights:
        spoilt = _not_finite(network.weights[name])
        if spoilt:
            text = f"{network.name}: tensor {name!r} has {spoilt:,} values that are NaN or infinite"
            yield Difference("not finite", network.name, name, text)
    for first, tensor in spec.tensors.items() if spec is not None else ():
        stored = [name for name in (first, *tensor.aliases) if name in network.weights]
        for name in stored[1:]:
            a, b = network.weights[stored[0]], network.weights[name]
            if a.shape == b.shape and not bool((a == b).all()) and not _not_finite(a):
                text = (
                    f"{network.name}: {name!r} is tied to {stored[0]!r}, expected equal values, found others"
                )
                yield Difference("not tied", network.name, name, text)


def _not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return 0
    narrow = tensor.element_size() == 1  # eight bits are stored only, PyTorch computes nothing with them
    blocks = tensor.reshape(-1).split(_BLOCK)
    return sum(block.numel() - int((block.float() if narrow else block).isfinite().sum()) for block in blocks)
