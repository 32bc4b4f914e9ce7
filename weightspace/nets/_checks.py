"""Checks of the networks' arguments: one sentence that names the argument, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightspace.errors import ConfigError


def whole(name: str, value: Any, least: int = 1) -> int:
    """``value``, if it is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number of at least {least}, found {value!r}")
    return value


def wholes(name: str, values: Any, least: int = 1, length: int | None = None) -> tuple[int, ...]:
    """``values``, if they are whole numbers of at least ``least``, as many as asked for (by default: any, not none)."""
    number = "some" if length is None else str(length)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"{name}: expected {number} whole numbers, found {values!r}")
    if len(values) != length if length is not None else not values:
        raise ConfigError(f"{name}: expected {number} whole numbers, found {list(values)}")
    return tuple(whole(f"{name}[{place}]", value, least) for place, value in enumerate(values))


def image_shape(name: str, values: Any) -> tuple[int, int, int]:
    """``values``, if they are channels, height and width."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
        raise ConfigError(f"{name}: expected channels, height and width, found {values!r}")
    channels, height, width = wholes(name, values)
    return channels, height, width


def per_layer(name: str, value: Any, layers: int) -> tuple[Any, ...]:
    """One value for each layer, from one for all or a list of them."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value,) * layers
    if len(value) != layers:
        raise ConfigError(f"{name}: expected one value or {layers}, one for each layer, found {list(value)}")
    return tuple(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """``value``, if it is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
    return str(value)


def positive(name: str, value: Any) -> float:
    """``value``, if it is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise ConfigError(f"{name}: expected a positive number, found {value!r}")
    return float(value)


def rate(name: str, value: Any) -> float:
    """``value``, if it is the rate of a dropout."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(f"{name}: expected a rate of at least 0 and below 1, found {value!r}")
    return float(value)
