"""How alike the units of two networks behave on data: streamed second moments per group."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from jaxtyping import Bool, Float
from torch import Tensor, nn

from weightspace.align._data import Batches, Loss, batches, check_data
from weightspace.errors import DataError, SpecError
from weightspace.spec import Site, Watch, WeightSpec

Similarity = Literal["correlation", "inner"]
Key = tuple[str, str, int]

_CHUNK = 1 << 22  # numbers that are widened to float64 at a time: 32 MB
_DEAD = 1e-6  # a standard deviation below this share of the root mean square is rounding
_TIE = 1e-6  # weight of what decides between units that are all dead


@dataclass(frozen=True, eq=False)
class Similarities:
    """How alike the units of one group are: reference units by the other network's, flattened over outer units.

    Args:
        even: from values that a sign scaling leaves as they are; all values where none was asked for.
        odd: from values whose sign it flips; None where there is none.
        dead: the pairs of units that are both always the same.
    """

    even: Float[Tensor, "units units"]
    odd: Float[Tensor, "units units"] | None
    dead: Bool[Tensor, "units units"]

    @property
    def best(self) -> Float[Tensor, "units units"]:
        """With the better sign for each pair of units."""
        return self.even if self.odd is None else self.even + self.odd.abs()


def similarities(
    watch: Watch,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    data: Batches,
    similarity: Similarity,
    flipped: Collection[Key] = (),
) -> dict[str, Similarities]:
    """Compare every unit of one network with every unit of its group in another, on the same data.

    Values that show the same group (those of a residual stream) share one statistic: with a mean of its own for each,
    their covariances and variances are summed before the one is divided by the other. Units that never change are
    told apart, if a group has several in both networks, by all that is computed on the way to them, in a second pass.

    Args:
        watch: what runs both.
        reference: one network.
        weights: another.
        data: what they are given.
        similarity: Pearson's correlation, or the inner product.
        flipped: sites whose values count as odd.

    Returns:
        Per group that some value shows, in float64; correlations are 0 for units that never change.

    Raises:
        SpecError: the spec is none of the module.
        DataError: values that are not finite.
    """
    sides = (reference, weights)
    found = _measured(watch, sides, data, similarity, flipped)
    mute = [name for name, table in found.items() if int(table.dead.sum()) > 1]
    if mute:
        inside = _measured(watch.widened(mute), sides, data, "correlation", flipped, mute)
        found |= {name: _untied(found[name], inside[name].best) for name in mute}
    return found


def _measured(
    watch: Watch,
    sides: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    data: Batches,
    similarity: Similarity,
    flipped: Collection[Key],
    groups: Collection[str] | None = None,
) -> dict[str, Similarities]:
    moments: dict[str, Moments] = {}
    for inputs, _ in batches(data, next(iter(sides[1].values())).device):
        for (site, first), (_, second) in zip(*(watch.run(side, inputs) for side in sides), strict=True):
            if groups is None or site.group in groups:
                found = moments.setdefault(site.group, Moments(similarity == "correlation"))
                found.add(site, first, second, odd=site.key in flipped)
    return {group: found.similarities(group) for group, found in moments.items()}


def _untied(found: Similarities, inside: Float[Tensor, "units units"]) -> Similarities:
    """With the least preference, among dead units, for those that are alike on the way to what they answer."""
    scale = found.best.abs().amax().clamp_min(torch.finfo(found.even.dtype).tiny)
    return replace(found, even=found.even + _TIE * scale * torch.where(found.dead, inside, 0.0))


@dataclass
class Moments:
    """Second moments of the units of one group in two networks, float64; each site has a mean of its own.

    Args:
        centred: whether means are taken off.
    """

    centred: bool
    cross: dict[bool, Tensor] = field(default_factory=dict)
    squares: tuple[Tensor, Tensor] | None = None
    means: dict[Key, tuple[int, Tensor, Tensor]] = field(default_factory=dict)

    def add(self, site: Site, first: Tensor, second: Tensor, *, odd: bool = False) -> None:
        """Samples ``(*units, samples)`` of the same site in both networks."""
        first, second = (values.flatten(0, -2) for values in (first, second))
        units, samples = first.shape
        step = max(1, _CHUNK // max(units, 1))
        for start in range(0, samples, step):
            part = [values[:, start : start + step].double() for values in (first, second)]
            self._add(site.key, part[0], part[1], odd)

    def _add(self, key: Key, first: Tensor, second: Tensor, odd: bool) -> None:
        """Chan, Golub and LeVeque's update: exact however the samples are divided, and nothing cancels."""
        count = first.shape[-1]
        before, *means = self.means.get(key, (0, first.new_zeros(len(first)), first.new_zeros(len(first))))
        parts = [values.mean(-1) for values in (first, second)]
        moved = [part - mean for part, mean in zip(parts, means, strict=True)]
        if self.centred:
            first, second = first - parts[0][:, None], second - parts[1][:, None]
        share = before * count / (before + count) if self.centred else 0.0
        product = (first @ second.mT).addr_(*moved, alpha=share)
        self.cross[odd] = self.cross[odd].add_(product) if odd in self.cross else product
        squares = [
            values.square().sum(-1) + share * gap.square()
            for values, gap in zip((first, second), moved, strict=True)
        ]
        old = self.squares or (0.0, 0.0)
        self.squares = (old[0] + squares[0], old[1] + squares[1])
        new = [mean + gap * (count / (before + count)) for mean, gap in zip(means, moved, strict=True)]
        self.means[key] = (before + count, new[0], new[1])

    def similarities(self, group: str) -> Similarities:
        """What was found so far.

        Raises:
            DataError: it is not finite.
        """
        for value in self.cross.values():
            if not bool(value.isfinite().all()):
                raise DataError(
                    f"data: expected finite values of the units of {group!r}, found infinite ones or NaN"
                )
        alive = [self._alive(side) for side in (0, 1)]
        tables = {
            odd: self._normalised(product, alive) if self.centred else product
            for odd, product in self.cross.items()
        }
        some = next(iter(tables.values()))
        dead = ~alive[0][:, None] & ~alive[1]
        return Similarities(tables.get(False, torch.zeros_like(some)), tables.get(True), dead)

    def _alive(self, side: int) -> Bool[Tensor, " units"]:
        assert self.squares is not None
        squares, whole = self.squares[side], self.squares[side]
        if not self.centred:
            return squares > 0
        for count, *means in self.means.values():
            whole = whole + count * means[side].square()
        return squares > _DEAD**2 * whole

    def _normalised(self, product: Tensor, alive: list[Tensor]) -> Tensor:
        assert self.squares is not None
        inverse = [
            torch.where(lives, squares, 1.0).rsqrt() * lives
            for lives, squares in zip(alive, self.squares, strict=True)
        ]
        return inverse[0][:, None] * product * inverse[1]


def flipped_sites(
    watch: Watch, weights: Mapping[str, Tensor], data: Batches
) -> tuple[dict[str, str], frozenset[Key]]:
    """The first sign scaling of every group that has one, and the sites whose values it flips.

    The network is run once with all signs flipped and once without; its function is the same.
    """
    spec = watch.spec
    signs = [name for name, scaling in spec.scalings.items() if scaling.kind == "sign"]
    scalings = {spec.scalings[name].group: name for name in reversed(signs)}
    device = next(iter(weights.values())).device
    element = {name: -torch.ones(spec.unit_shape(group), device=device) for group, name in scalings.items()}
    inputs, _ = next(iter(batches(data, device)))
    watch = watch.widened(spec.groups)  # dead units are told apart by any of them
    turned = watch.run(spec.act(element, weights), inputs)
    flipped = frozenset(
        site.key
        for (site, before), (_, after) in zip(watch.run(weights, inputs), turned, strict=True)
        if site.group in scalings and bool((before + after).abs().amax() < (before - after).abs().amax())
    )
    return scalings, flipped


def check_networks(spec: WeightSpec, **networks: Mapping[str, Tensor]) -> None:
    """Refuse what is no single network of the spec, or not finite, under the argument's name.

    Raises:
        SpecError: a tensor is missing, misshapen, on another device, or not finite, or there are batch axes.
    """
    for role, weights in networks.items():
        for name, tensor in _needed(spec, role, weights):
            if not bool(tensor.isfinite().all()):
                raise SpecError(f"{role}: expected finite values, found others in tensor {name!r}")
    devices = {tensor.device for weights in networks.values() for tensor in weights.values()}
    if len(devices) > 1:
        raise SpecError(
            f"weights: expected all tensors on one device, found {', '.join(sorted(map(str, devices)))}"
        )


def single(values: Any) -> Any:
    """The same tensors, of whatever they are part, with float32 in place of half precision."""

    def widened(leaf: Any) -> Any:
        halves = (torch.float16, torch.bfloat16)
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in halves else leaf

    return pytree.tree_map(widened, values)


def check_runs(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    data: Batches,
    loss: Loss | None = None,
    what: str = "data",
) -> None:
    """:func:`check_data` in float32 where weights or inputs are of half precision, as all that follows is.

    Raises:
        DataError: see there.
    """
    parts = [*weights.values(), *module.parameters(), *module.buffers()]
    if any(part.dtype in (torch.float16, torch.bfloat16) for part in parts):
        module = copy.deepcopy(module).float()
    wide = data if isinstance(data, Iterator) else _Single(data)
    check_data(module, single(dict(weights)), wide, loss, what)


class _Single:
    """Batches in float32 where they are of half precision."""

    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (single(batch) for batch in self.data)


def check_module(spec: WeightSpec, module: nn.Module) -> None:
    """Refuse a spec with other tensors than a module has.

    Raises:
        SpecError: a tensor that the module lacks, or has in another shape.
    """
    stored = module.state_dict()
    for name, tensor in spec.tensors.items():
        found = tuple(stored[name].shape) if name in stored else None
        if found != tensor.shape:
            known = "none" if found is None else f"shape {list(found)}"
            raise SpecError(
                f"module: expected a tensor {name!r} of shape {list(tensor.shape)} as in the spec, found {known} in "
                f"{type(module).__name__}"
            )


def _needed(spec: WeightSpec, role: str, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if batch := spec.batch_shape(weights):
        raise SpecError(f"{role}: expected one network, found batch shape {list(batch)}")
    for name, tensor in spec.tensors.items():
        found = next((weights[at] for at in (name, *tensor.aliases) if at in weights), None)
        if found is None:
            raise SpecError(f"{role}: {tensor.kind} {name!r} is missing")
        yield name, found
