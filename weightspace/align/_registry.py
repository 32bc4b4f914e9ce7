"""Matchers by name, and one function that calls any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import getdoc
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._data import Batches, Loss
from weightspace.align._report import MatchReport, compare
from weightspace.align._together import check_networks
from weightspace.configuration import Registry, function_options, validated
from weightspace.errors import ConfigError
from weightspace.spec import Weights, WeightSpec

_Function = TypeVar("_Function", bound=Callable[..., Any])
_RESERVED = frozenset({"module", "data", "loss", "seed"})


@dataclass(frozen=True)
class Matcher:
    """A registered matcher.

    Args:
        name: under which it is registered.
        function: ``(spec, reference, weights, **options)``, or ``(spec, networks, **options)`` if ``together``;
            with ``module``, ``data`` and ``loss`` as far as it needs them. Returns what it aligned and a report.
        paper: where it was published.
        needs: some of ``"module"``, ``"data"`` and ``"loss"``.
        optional: others of these that it takes where they are given; an option decides whether it uses them.
        together: whether it moves all networks at once, none of them being the reference.
        batched: whether weights may have batch axes.
    """

    name: str
    function: Callable[..., tuple[Any, MatchReport]]
    paper: str
    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    together: bool = False
    batched: bool = False

    @property
    def effect(self) -> str:
        """The first line of its docstring."""
        return (getdoc(self.function) or "").partition("\n")[0]

    @property
    def options(self) -> Mapping[str, Any]:
        """Its options and their defaults."""
        model = function_options(self.function, _RESERVED)
        return {name: field.default for name, field in model.model_fields.items()}


MATCHERS: Registry[Matcher] = Registry("matcher")
"""The matchers that :func:`align_networks` and ``--method`` name; :func:`matcher` adds one."""


def matcher(
    name: str,
    *,
    paper: str,
    needs: Sequence[str] = (),
    optional: Sequence[str] = (),
    together: bool = False,
    batched: bool = False,
) -> Callable[[_Function], _Function]:
    """Register a function under ``name``; see :class:`Matcher`.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: _Function) -> _Function:
        MATCHERS.add(name, Matcher(name, function, paper, tuple(needs), tuple(optional), together, batched))
        return function

    return add


def find_matcher(name: str) -> Matcher:
    """The matcher of that name.

    Raises:
        ConfigError: there is none.
    """
    return MATCHERS.find(name, "method")


def align_networks(
    spec: WeightSpec,
    networks: Sequence[Mapping[str, Tensor]],
    method: str = "weight-matching",
    *,
    module: nn.Module | None = None,
    data: Batches | None = None,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    **options: Any,
) -> tuple[list[Weights], MatchReport]:
    """Bring networks onto the first of them, or onto each other, with any registered matcher.

    Args:
        spec: the weight space.
        networks: two or more, without batch axes.
        method: name of the matcher, one of ``MATCHERS``.
        module: that computes the networks' function, for matchers that run them.
        data: batches of inputs and targets, for matchers that need them.
        loss: of outputs and targets, for matchers that train.
        seed: of the search.
        options: of the matcher; texts are converted.

    Returns:
        The networks in their order, each computing what it computed, and a report whose entries have one axis, with
        an entry per network. Matchers of pairs leave the first network as it is.

    Raises:
        ConfigError: an unknown matcher or option, a negative seed, a matcher without the module or the data that it
            needs, or fewer than two networks.
        SpecError: networks that do not fit the spec, are not finite, or do not have the same tensors.

    Example:
        >>> spec = WeightSpec.mlp([2, 16, 1], activation="tanh")
        >>> a = spec.unflatten(torch.randn(spec.num_parameters))
        >>> b = spec.act(spec.random_element(symmetries=["permutation"]), a)
        >>> (_, aligned), report = align_networks(spec, [a, b])
        >>> bool(torch.equal(aligned["layers.0.weight"], a["layers.0.weight"]))
        True
    """
    found = find_matcher(method)
    if len(networks) < 2:
        raise ConfigError(f"networks: expected at least two to align, found {len(networks)}")
    if seed < 0:
        raise ConfigError(f"seed: expected at least 0, found {seed}")
    chosen = validated(
        function_options(found.function, _RESERVED), options, ConfigError, f"{method}: ", "no such option"
    )
    given = {**_needed(found, module=module, data=data, loss=loss), "seed": seed}
    given |= {name: getattr(chosen, name) for name in chosen.model_fields_set}
    check_networks(spec, networks)
    if found.together:
        aligned, report = found.function(spec, networks, **given)
        return list(aligned), report
    first, *others = networks
    if found.batched and _same_dtypes(others):
        stacked = {name: torch.stack([other[name] for other in others]) for name in others[0]}
        moved, report = found.function(spec, first, stacked, **given)
        rest = [{name: tensor[row] for name, tensor in moved.items()} for row in range(len(others))]
    else:
        pairs = [found.function(spec, first, other, **given) for other in others]
        rest, report = [aligned for aligned, _ in pairs], _joined([report for _, report in pairs])
    return [dict(first), *rest], _with_first(spec, first, report)


def _same_dtypes(networks: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether networks can be stacked without a change of type."""
    return len({tuple(network[name].dtype for name in networks[0]) for network in networks}) == 1


def _needed(found: Matcher, **given: Any) -> dict[str, Any]:
    for name in found.needs:
        if given[name] is None:
            raise ConfigError(f"{found.name}: it needs {name}, found none")
    return {name: given[name] for name in (*found.needs, *found.optional)}


def _joined(reports: Sequence[MatchReport]) -> MatchReport:
    """One report of several pairs."""
    first = reports[0]
    return replace(
        first,
        element={name: torch.stack([r.element[name] for r in reports]) for name in first.element},
        objective=torch.stack([r.objective for r in reports]),
        distance_before=torch.stack([r.distance_before for r in reports]),
        distance_after=torch.stack([r.distance_after for r in reports]),
        sweeps=torch.stack([r.sweeps for r in reports]),
        seconds=sum(r.seconds for r in reports),
    )


def _with_first(spec: WeightSpec, first: Mapping[str, Tensor], report: MatchReport) -> MatchReport:
    """The report with an entry for the network that stayed, in front."""
    identity = spec.identity()
    objective, distance = compare(spec, first, first)
    before = {
        name: torch.cat([identity[name].to(value)[None], value]) for name, value in report.element.items()
    }
    return replace(
        report,
        element=before,
        objective=torch.cat([objective[None], report.objective]),
        distance_before=torch.cat([distance[None], report.distance_before]),
        distance_after=torch.cat([distance[None], report.distance_after]),
        sweeps=torch.cat([torch.zeros_like(report.sweeps[:1]), report.sweeps]),
    )
