"""What a case is, how one is registered, and the inputs that cases are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = tuple[Any, ...] | dict[str, Any]
Build: TypeAlias = Callable[[], nn.Module]

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """A network to trace, and how to call it.

    Args:
        name: what tables and tests call it.
        family: ``"core"``, ``"large"`` or ``"transformers"``.
        build: the network as its class initialises it, the same each time, in evaluation mode.
        inputs: example inputs, as positional or as keyword arguments; together they reach every token and
            every position of the network's embeddings.
        more_inputs: inputs of another size, for a second trace: where the architecture fixes all else, of
            another batch size.
        outputs: the outputs that count, by key, or by position (``"0"``); None when all do.
        note: what the case is there for, one line.
    """

    name: str
    family: str
    build: Build
    inputs: Callable[[], Inputs]
    more_inputs: Callable[[], Inputs]
    outputs: tuple[str, ...] | None = None
    note: str = ""


def case(
    inputs: Callable[[], Inputs],
    more_inputs: Callable[[], Inputs],
    *,
    family: str = "core",
    outputs: tuple[str, ...] | None = None,
) -> Callable[[Build], Build]:
    """A decorator that registers a case: its name is the function's, its note the first line of the docstring.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: Build) -> Build:
        name, note = function.__name__, (function.__doc__ or "").strip().splitlines()[0]
        if name in CASES:
            raise ValueError(f"case {name!r} is registered twice")
        CASES[name] = Case(name, family, lambda: _built(function), inputs, more_inputs, outputs, note)
        return function

    return add


def _built(function: Build) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function().eval()


def floats(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Positional arguments: a standard normal tensor per shape."""

    def draw() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return draw


def tokens(vocabulary: int, batch: int, length: int) -> Callable[[], tuple[Tensor]]:
    """Positional arguments: one tensor of token ids in which every id occurs; see :func:`token_ids`."""
    return lambda: (token_ids(vocabulary, batch, length),)


def token_ids(vocabulary: int, batch: int, length: int) -> Tensor:
    """Shuffled ids among which every one of the vocabulary occurs: an unused row of an embedding may be anything.

    Shapes:
        out: ``(batch, length)``, int64.
    """
    assert batch * length >= vocabulary, f"{batch} x {length} places are too few for {vocabulary} ids"
    order = torch.randperm(batch * length, generator=torch.Generator().manual_seed(0))
    return (order % vocabulary).reshape(batch, length)
