"""Networks to be merged, looked at one tensor at a time, so that memory does not grow with their number of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec import WeightSpec

Kind = Literal["parameter", "statistic", "fixed"]
"""Of a tensor: merged by the method, averaged, or taken from the first network."""

BLOCK = 1 << 16
"""Elements that are merged at once: 256 kB in float32, so that what is computed in between stays in the cache."""


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of one tensor of every network, flat, in float32 or wider.

    Args:
        networks: one per network.
        base: that of the network they were fine-tuned from, if there is one.
        statistics: one per network, where they were asked for.
        base_statistics: that of the base, where there is one.
    """

    networks: list[Shaped[Tensor, "elements"]]
    base: Shaped[Tensor, "elements"] | None = None
    statistics: list[Shaped[Tensor, "elements"]] = field(default_factory=list)
    base_statistics: Shaped[Tensor, "elements"] | None = None

    @property
    def origin(self) -> Shaped[Tensor, "elements"]:
        """The base, for methods that need one."""
        assert self.base is not None
        return self.base

    @property
    def deltas(self) -> list[Shaped[Tensor, "elements"]]:
        """Task vectors: each network less the base."""
        return [network - self.origin for network in self.networks]


@dataclass(frozen=True, eq=False)
class Stack:
    """Networks of one architecture, side by side.

    Args:
        networks: names to tensors; a lazy one reads a tensor when it is asked for it, and says with ``meta(name)``
            what it is without reading.
        base: the network that they were fine-tuned from.
        spec: the weight space.
        statistics: one mapping per network, for methods that need them.
        base_statistics: those of the base.
    """

    networks: tuple[Mapping[str, Tensor], ...]
    base: Mapping[str, Tensor] | None = None
    spec: WeightSpec | None = None
    statistics: tuple[Mapping[str, Tensor], ...] = ()
    base_statistics: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.networks)

    # -- what there is -----------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """In the order of the first network."""
        return tuple(self.networks[0])

    @cached_property
    def primaries(self) -> dict[str, str]:
        """For every name the first one under which the same tensor is stored (tied weights): itself, mostly."""
        sides = [*self.networks, *([] if self.base is None else [self.base])]
        keys = [_storages(side) for side in sides]
        first: dict[object, str] = {}
        found = {}
        for name in self.names:
            tied = None if self.spec is None else self.spec.primary(name)
            key = ("spec", tied) if tied else tuple(of[name] for of in keys)
            found[name] = first.setdefault(key, name)
        return found

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """What the method merges; each tied tensor once."""
        return tuple(n for n in self.names if self.primaries[n] == n and self.kind(n) == "parameter")

    def kind(self, name: str) -> Kind:
        """Integers, booleans and constants are fixed; the spec says what else is no parameter.

        Without a spec, what torch.nn's norms estimate is told by the three buffers that they always store together.
        """
        dtype = self.dtype(name)
        if not (dtype.is_floating_point or dtype.is_complex):
            return "fixed"
        if self.spec is not None:
            primary = self.spec.primary(name)
            return "fixed" if primary is None else self.spec.tensors[primary].kind
        prefix, _, last = name.rpartition("running_")
        counter = f"{prefix}num_batches_tracked"
        counted = last in ("mean", "var") and counter in self.primaries and self.meta(counter).ndim == 0
        return "statistic" if counted else "parameter"

    def meta(self, name: str) -> Tensor:
        """A tensor with the shape and dtype of the first network's."""
        return describe(self.networks[0], name)

    def dtype(self, name: str) -> torch.dtype:
        """That of the merged tensor: the widest among the networks', or the first one's of integers and booleans."""
        dtypes = [describe(network, name).dtype for network in self.networks]
        if not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
            return dtypes[0]
        return reduce(torch.promote_types, dtypes)

    @cached_property
    def informed(self) -> dict[str, str]:
        """For tensors that have statistics the name of these, which may be another one of the same tied tensor."""
        found: dict[str, str] = {}
        for name in self.statistics[0] if self.statistics else ():
            primary = self.primaries[name]
            if name == primary or primary not in found:
                found[primary] = name
        return found

    # -- reading -----------------------------------------------------------------------------------------------

    def tensors(self, name: str) -> list[Tensor]:
        """One tensor of every network, on the first one's device."""
        first = self.networks[0][name]
        return [first, *(network[name].to(first.device) for network in self.networks[1:])]

    def blocks(self, name: str, *, statistics: bool = False, whole: bool = False) -> Iterator[Block]:
        """One tensor of every network and of the base, stretch by stretch.

        Args:
            name: of the tensor.
            statistics: whether those of the networks are read too.
            whole: as a single block.
        """
        wide = torch.promote_types(self.dtype(name), torch.float32)
        tensors = self.tensors(name)
        device, count = tensors[0].device, len(tensors)
        tensors += [] if self.base is None else [self.base[name].to(device)]
        for of in (*self.statistics, self.base_statistics) if statistics else ():
            tensors += [] if of is None else [of[self.informed[name]].to(device)]
        flat = [tensor.reshape(-1) for tensor in tensors]
        del tensors
        size = flat[0].numel() if whole else BLOCK
        for start in range(0, flat[0].numel(), max(size, 1)):
            parts = [tensor[start : start + size].to(wide) for tensor in flat]
            rest = iter(parts[count:])
            yield Block(
                parts[:count],
                None if self.base is None else next(rest),
                [next(rest) for _ in self.statistics] if statistics else [],
                next(rest, None),
            )

    # -- writing -----------------------------------------------------------------------------------------------

    def elementwise(
        self, name: str, function: Callable[[Block], Tensor], *, statistics: bool = False
    ) -> Tensor:
        """The tensor whose every stretch is what the function makes of that of the networks, in their dtype."""
        meta, dtype = self.meta(name), self.dtype(name)
        if not meta.numel():
            return self.fixed(name)
        whole = meta.numel() <= BLOCK or any(describe(side, name).requires_grad for side in self.networks)
        blocks = self.blocks(name, statistics=statistics, whole=whole)
        if whole:  # gradients would not pass an assignment to a part
            return function(next(blocks)).to(dtype).view(meta.shape)
        merged, start = None, 0
        for block in blocks:
            part = function(block)
            if merged is None:
                merged = torch.empty(meta.numel(), dtype=dtype, device=part.device)
            merged[start : start + len(part)] = part
            start += len(part)
        assert merged is not None
        return merged.view(meta.shape)

    def mean(self, name: str, coefficients: Sequence[float] | None = None) -> Tensor:
        """``sum_i coefficients[i] * tensor_i``; the plain mean by default."""
        shares = [1.0 / len(self)] * len(self) if coefficients is None else coefficients
        return self.elementwise(name, lambda block: linear(block.networks, shares))

    def fixed(self, name: str) -> Tensor:
        """A copy of the first network's."""
        return self.networks[0][name].to(self.dtype(name), copy=True)


def linear(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """``sum_i coefficients[i] * tensors[i]``."""
    total = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total = torch.add(total, tensor, alpha=coefficient)
    return total


def describe(network: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor with the shape and the dtype of a network's, which is not read if the network is lazy."""
    meta = getattr(network, "meta", None)
    found = network[name] if meta is None else meta(name)
    if not isinstance(found, Tensor):
        raise SpecError(f"networks: {name!r} should be a torch.Tensor, found {type(found).__name__}")
    return found


def _storages(network: Mapping[str, Tensor]) -> dict[str, object]:
    """For every name what tells its storage from others'; names of one storage are tied."""
    tied = getattr(network, "tied", None)
    if tied is not None or hasattr(network, "meta"):
        return {name: tied(name) if tied is not None else name for name in network}
    return {name: _storage(name, tensor) for name, tensor in network.items()}


def _storage(name: str, tensor: Tensor) -> object:
    if tensor.is_meta or not tensor.numel():
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
