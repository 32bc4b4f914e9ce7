"""Merge methods by name, and how any of them is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import getdoc
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from weightspace.configuration import Registry, function_options, validated
from weightspace.errors import ConfigError
from weightspace.merge._checks import check_stack, check_statistics
from weightspace.merge._stack import Stack
from weightspace.spec import Weights, WeightSpec

Rule = Callable[[str], Tensor]
"""Merges the tensors of one name."""

Score = Callable[[Mapping[str, Tensor]], float]
"""How good a network is; higher is better."""

_Function = TypeVar("_Function", bound=Callable[..., Weights])
_RESERVED = frozenset({"base", "spec", "statistics", "base_statistics", "score"})


@dataclass(frozen=True)
class Merger:
    """A registered merge method.

    Args:
        name: under which it is registered.
        function: the public function. Its keyword-only parameters, besides the base, the spec and the statistics,
            are the method's options.
        plan: ``(stack, **options) -> rule``: it checks and goes over whole networks where it must, and returns the
            function that merges the tensors of one name.
        paper: where it was published.
        base: whether it needs the network that the others were fine-tuned from.
        statistics: what it needs to know from data: ``"fisher"`` or ``"grams"``.
        score: whether it needs a function that tells how good a network is.
        everywhere: whether statistics such as running means are merged by the method; averaged otherwise.
        batched: whether networks may have batch axes.
        least: how few networks it takes.
        most: how many; None for any number.
    """

    name: str
    function: Callable[..., Weights]
    plan: Callable[..., Rule]
    paper: str = ""
    base: bool = False
    statistics: Literal["fisher", "grams"] | None = None
    score: bool = False
    everywhere: bool = False
    batched: bool = False
    least: int = 2
    most: int | None = None

    @property
    def effect(self) -> str:
        """The first line of its docstring."""
        return (getdoc(self.function) or "").partition("\n")[0]

    @property
    def options(self) -> Mapping[str, Any]:
        """Its options and their defaults; ``...`` for one that must be given."""
        fields = function_options(self.function, _RESERVED).model_fields
        return {name: ... if entry.is_required() else entry.get_default() for name, entry in fields.items()}


MERGERS: Registry[Merger] = Registry("merge method")
"""The methods that :func:`merge_networks` and ``--method`` name; :func:`merger` adds one."""


def merger(name: str, plan: Callable[..., Rule], **attributes: Any) -> Callable[[_Function], _Function]:
    """Register a public function and the plan behind it under ``name``; see :class:`Merger`.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: _Function) -> _Function:
        MERGERS.add(name, Merger(name, function, plan, **attributes))
        return function

    return add


def find_merger(name: str) -> Merger:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    return MERGERS.find(name, "method")


@dataclass(frozen=True, eq=False)
class LazyMerge(Mapping[str, Tensor]):
    """A merged network whose tensors are computed when they are asked for, each time anew.

    Args:
        stack: the networks.
        rule: merges the tensors of one name.
        everywhere: whether the rule merges statistics too; they are averaged otherwise.
    """

    stack: Stack = field(repr=False)
    rule: Rule = field(repr=False)
    everywhere: bool = False

    def __getitem__(self, name: str) -> Tensor:
        primary = self.stack.primaries[name]
        kind = self.stack.kind(primary)
        if kind == "fixed":
            return self.stack.fixed(name)
        return self.rule(primary) if self.everywhere or kind == "parameter" else self.stack.mean(primary)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stack.names)

    def __len__(self) -> int:
        return len(self.stack.names)

    def __contains__(self, name: object) -> bool:
        return name in self.stack.primaries  # Mapping's own would merge the tensor

    def meta(self, name: str) -> Tensor:
        """Shape and dtype of a tensor, as one on the meta device; nothing is read or computed."""
        return torch.empty_like(self.stack.meta(name), dtype=self.stack.dtype(name), device="meta")

    def tied(self, name: str) -> str:
        """The first name under which the same tensor is stored."""
        return self.stack.primaries[name]

    def gather(self) -> Weights:
        """All tensors in memory; tied ones are one tensor under several names."""
        found: Weights = {}
        for name in self:
            primary = self.tied(name)
            found[name] = found[primary] if primary in found else self[name]
        return found


def prepare(
    method: str,
    networks: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
    spec: WeightSpec | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    base_statistics: Mapping[str, Tensor] | None = None,
    score: Score | None = None,
    **options: Any,
) -> LazyMerge:
    """Check everything that a merge needs, and return the merged network, whose tensors are computed when asked for.

    Args:
        method: name of the method, one of ``MERGERS``.
        networks: names to tensors; mappings that read from files are read one tensor at a time.
        base: the network that the others were fine-tuned from, for methods that need it.
        spec: the weight space; it tells statistics, constants and tied weights.
        statistics: one mapping per network, for methods that need them; see ``STATISTICS``.
        base_statistics: those of the base, where a method can use them.
        score: how good a network is, for methods that choose.
        options: of the method; texts are converted.

    Raises:
        ConfigError: an unknown method or option, one out of range, another number of networks, weights or
            statistics than the method takes, a base that is missing, not used, or one of the networks.
        SpecError: names, shapes or constants that differ, or do not fit the spec; NaN or infinite weights.

    Example:
        >>> a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
        >>> merged = prepare("slerp", [a, b], t="0.5")
        >>> merged.meta("w").shape, merged["w"]
        (torch.Size([2]), tensor([0.7071, 0.7071]))
    """
    found = find_merger(method)
    chosen = _options(found, options)
    check_count(found, len(networks))
    _check_given(found, base=base, statistics=statistics, score=score)
    if base_statistics is not None and not (found.base and found.statistics):
        raise ConfigError(f"{method}: it makes no use of base_statistics")
    stack = Stack(tuple(networks), base, spec, tuple(statistics or ()), base_statistics)
    check_stack(stack, batched=found.batched)
    if found.statistics is not None:
        check_statistics(stack, found.statistics)
    if not found.batched:
        _check_real(found, stack)
    given = {"score": score} if found.score else {}
    return LazyMerge(stack, found.plan(stack, **chosen, **given), found.everywhere)


def stream(
    method: str, networks: Sequence[Mapping[str, Tensor]], **arguments: Any
) -> Iterator[tuple[str, Tensor]]:
    """Names and merged tensors one after another; arguments, checks and errors as those of :func:`prepare`.

    Example:
        >>> a, b = {"w": torch.ones(2), "v": torch.ones(1)}, {"w": torch.zeros(2), "v": torch.ones(1)}
        >>> [(name, tensor.tolist()) for name, tensor in stream("average", [a, b])]
        [('w', [0.5, 0.5]), ('v', [1.0])]
    """
    return iter(prepare(method, networks, **arguments).items())


def merge_networks(method: str, networks: Sequence[Mapping[str, Tensor]], **arguments: Any) -> Weights:
    """Merge networks with any registered method; arguments, checks and errors as those of :func:`prepare`.

    Example:
        >>> base, a, b = ({"w": torch.tensor([value])} for value in (1.0, 2.0, 4.0))
        >>> merge_networks("task-arithmetic", [a, b], base=base, weights=[1.0, 0.5])["w"]
        tensor([3.5000])
    """
    return prepare(method, networks, **arguments).gather()


def _options(found: Merger, options: Mapping[str, Any]) -> dict[str, Any]:
    model = function_options(found.function, _RESERVED)
    chosen = validated(model, options, ConfigError, f"{found.name}: ", "no such option")
    values = {name: getattr(chosen, name) for name in model.model_fields}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{found.name}: {name}: expected a finite number, found {value}")
    return values


def check_count(found: Merger, count: int) -> None:
    """Refuse more or fewer networks than a method takes.

    Raises:
        ConfigError: another number of them.
    """
    if count < found.least or (found.most is not None and count > found.most):
        number = "at least" if found.most is None else "exactly"
        least = {1: "one", 2: "two"}[found.least]
        seen = "none" if not count else "one" if count == 1 else str(count)
        raise ConfigError(f"networks: expected {number} {least}, found {seen}, for {found.name}")


def _check_given(found: Merger, *, base: object, statistics: object, score: object) -> None:
    needed = {"base": found.base, "statistics": found.statistics is not None, "score": found.score}
    for name, given in {"base": base, "statistics": statistics, "score": score}.items():
        if needed[name] != (given is not None):
            raise ConfigError(
                f"{found.name}: it needs {name}, found none"
                if needed[name]
                else f"{found.name}: it makes no use of {name}"
            )


def _check_real(found: Merger, stack: Stack) -> None:
    for name in stack.parameters:
        if stack.dtype(name).is_complex:
            raise ConfigError(
                f"{found.name}: {name!r} should hold real numbers, found {stack.dtype(name)}".replace(
                    "torch.", ""
                )
            )
