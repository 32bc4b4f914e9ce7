"""Fields of a recipe that differ between networks: a constant, or a distribution with one value per network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

_Value = TypeVar("_Value")

FORMS = {
    "choice": "{choice: [VALUE, ...]}",
    "uniform": "{uniform: [LOW, HIGH]}",
    "log_uniform": "{log_uniform: [LOW, HIGH]}",
    "integer": "{integer: [LOW, HIGH]}",
}
"""How each kind but a constant, which is just its value, is written in a recipe."""

_LARGEST = 2**52  # whole numbers up to here are exact in float64, and so is their number


class Distribution(Generic[_Value]):
    """What a field of a recipe is for every network: one constant, or a value drawn for each.

    As the type of a pydantic field, ``Distribution[float]`` reads and writes a plain value (a constant) or one of
    ``{choice: [...]}``, ``{uniform: [low, high]}``, ``{log_uniform: [low, high]}`` and ``{integer: [low, high]}``, ends
    included. Bounds hold for all that can be drawn, whether they stand in the field (``Field(..., gt=0)``) or
    in the type (``Distribution[PositiveFloat]``); the latter names the end that is out of range, and is the one
    for values that may be null. Defaults are distributions too: ``Field(Distribution.constant(5e-4), gt=0)``.

    Args:
        kind: ``"constant"`` or a key of ``FORMS``.
        values: the constant, the choices, or the two ends.

    Raises:
        ValueError: no choice, ends that are not two ordered finite numbers, ends of ``log_uniform`` that are not
            positive, ends of ``integer`` that are not whole.

    Example:
        >>> from pydantic import BaseModel, Field
        >>> class Protocol(BaseModel):
        ...     learning_rate: Distribution[float] = Field(Distribution.constant(5e-4), gt=0)
        >>> protocol = Protocol.model_validate({"learning_rate": {"log_uniform": [1e-4, 1e-1]}})
        >>> protocol.learning_rate.sample("learning_rate", seed=0, networks=3).shape
        (3,)
        >>> protocol.model_dump_json()
        '{"learning_rate":{"log_uniform":[0.0001,0.1]}}'
    """

    __slots__ = ("_kind", "_values")

    # no dataclass: pydantic would read the fields of one, not what stands in a recipe
    def __init__(self, kind: str, values: Sequence[_Value]) -> None:
        self._kind, self._values = kind, tuple(values)
        problem = _problem(self.kind, self.values)
        if problem is not None:
            raise ValueError(problem if kind == "constant" else f"{kind}: {problem}")

    @property
    def kind(self) -> str:
        """``"constant"`` or a key of ``FORMS``."""
        return self._kind

    @property
    def values(self) -> tuple[_Value, ...]:
        """The constant, the choices, or the two ends."""
        return self._values

    @classmethod
    def constant(cls, value: _Value) -> Distribution[_Value]:
        """The same value for every network."""
        return cls("constant", (value,))

    @property
    def is_constant(self) -> bool:
        """Whether the field was written as a plain value."""
        return self.kind == "constant"

    @property
    def low(self) -> _Value:
        """The smallest value that can be drawn."""
        return min(self.values)  # type: ignore[type-var]

    @property
    def high(self) -> _Value:
        """The largest value that can be drawn."""
        return max(self.values)  # type: ignore[type-var]

    def document(self) -> Any:
        """As it is written in a recipe: the plain value, or ``{kind: [...]}``."""
        return self.values[0] if self.is_constant else {self.kind: list(self.values)}

    def sample(self, name: str, seed: int, networks: int | np.ndarray) -> Shaped[np.ndarray, " networks"]:
        """One value per network, which depends on the seed, the name and the network's number alone.

        Args:
            name: of the field: two fields of one recipe are drawn independently.
            seed: of the recipe, in [0, 2**63).
            networks: how many, for networks 0, 1, ..., or their numbers (networks,), those of a shard for instance.

        Returns:
            (networks,) float64, int64, bool or text, as the values are; objects where they are of several types.
        """
        if self.kind in ("constant", "choice"):
            return _array(self.values)[self.places(name, seed, networks)]
        low, high = self.low, self.high
        return _RANGES[self.kind](keyed_uniform(name, seed, networks), low, high)

    def places(self, name: str, seed: int, networks: int | np.ndarray) -> Int[np.ndarray, " networks"]:
        """For constants and choices: which of ``values`` each network's is, (networks,) int64.

        Raises:
            ValueError: a distribution over a range.
        """
        if self.kind not in ("constant", "choice"):
            raise ValueError(f"{name}: expected a constant or a choice, found {self.kind}")
        return (keyed_uniform(name, seed, networks) * len(self.values)).astype(np.int64)

    # pydantic applies the bounds of a field by these comparisons: they speak of all that can be drawn

    def __gt__(self, bound: Any) -> bool:
        return bool(self.low > bound)

    def __ge__(self, bound: Any) -> bool:
        return bool(self.low >= bound)

    def __lt__(self, bound: Any) -> bool:
        return bool(self.high < bound)

    def __le__(self, bound: Any) -> bool:
        return bool(self.high <= bound)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Distribution):
            return NotImplemented
        return (self.kind, self.values) == (other.kind, other.values)

    def __hash__(self) -> int:
        return hash((self.kind, self.values))

    def __repr__(self) -> str:
        return f"Distribution({self.kind!r}, {self.values!r})"

    def __str__(self) -> str:
        return str(self.values[0]) if self.is_constant else f"{self.kind} {list(self.values)}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        item = (get_args(source) or (Any,))[0]
        return core_schema.no_info_plain_validator_function(
            _parser(item),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.document()),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"description": f"a value, or one of {', '.join(FORMS.values())}"}


def _parser(item: Any) -> Callable[[Any], Distribution[Any]]:
    """Reads a distribution over values of one type; errors within it are located by pydantic."""
    forms = _forms_of(item)
    constants: TypeAdapter[Any] = TypeAdapter(item)
    written: TypeAdapter[dict[str, list[Any]]] = TypeAdapter(dict[str, list[item]])
    expected = " or ".join(["a value", *(FORMS[form] for form in forms)])

    def parse(value: Any) -> Distribution[Any]:
        if isinstance(value, Distribution):
            value = value.document()
        if not isinstance(value, Mapping):
            return Distribution.constant(constants.validate_python(value))
        if len(value) != 1 or next(iter(value)) not in forms:
            raise ValueError(f"expected {expected}, found {dict(value)!r}")
        ((kind, values),) = written.validate_python(dict(value)).items()
        return Distribution(kind, tuple(values))

    return parse


def _forms_of(item: Any) -> tuple[str, ...]:
    """The kinds that make values of a type: no fractions for whole numbers, no ranges for names."""
    while get_origin(item) is Annotated:
        item = get_args(item)[0]
    if get_origin(item) in (Union, UnionType):
        found = {form for part in get_args(item) for form in _forms_of(part)}
    elif item is Any:
        found = set(FORMS)
    else:
        ranges = {float: {"uniform", "log_uniform"}, int: {"integer"}}
        found = {"choice"} | (ranges.get(item, set()) if isinstance(item, type) else set())
    return tuple(form for form in FORMS if form in found)


def _problem(kind: str, values: tuple[Any, ...]) -> str | None:
    """What is wrong with the values of a distribution, if anything."""
    if kind not in ("constant", *FORMS):
        return f"expected a kind of constant, {', '.join(FORMS)}"
    infinite = [value for value in values if isinstance(value, float) and not math.isfinite(value)]
    if infinite:
        return f"expected finite numbers, found {infinite[0]}"
    if kind in ("constant", "choice"):
        return None if values else "expected at least one value, found none"
    if len(values) != 2:
        return f"expected [low, high], found {len(values)} values"
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return f"expected numbers, found {list(values)}"
    low, high = values
    if low > high:
        return f"expected low <= high, found {list(values)}"
    if kind == "log_uniform" and low <= 0:
        return f"expected ends above 0, found {low}"
    if kind == "integer" and any(value != int(value) or abs(value) >= _LARGEST for value in values):
        return f"expected whole numbers below 2**52, found {list(values)}"
    return None


def keyed_uniform(name: str, seed: int, networks: int | np.ndarray) -> Float[np.ndarray, " networks"]:
    """Uniform numbers in [0, 1), one per network: number i is word i of the Philox stream of (seed, name).

    Philox counts, so that a shard reads its own part of the stream and nothing before it.

    Args:
        name: any text; it selects the stream.
        seed: in [0, 2**63).
        networks: how many, for networks 0, 1, ..., or their numbers (networks,), integers from 0.
    """
    if isinstance(networks, int):
        words = _words(name, seed, 0, networks)
    elif len(networks) == 0:
        words = np.empty(0, np.uint64)
    else:
        first, last = int(networks.min()), int(networks.max())
        words = _words(name, seed, first, last + 1)[networks - first]
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _words(name: str, seed: int, first: int, stop: int) -> UInt[np.ndarray, " words"]:
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    block, offset = divmod(first, 4)  # Philox makes four words per count
    philox = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=block)
    return philox.random_raw(offset + stop - first)[offset:]


def _uniform(share: np.ndarray, low: int | float, high: int | float) -> np.ndarray:
    # neither the difference of the ends, which may overflow, nor rounding may lead out of the range
    return np.clip((1.0 - share) * low + share * high, low, high)


def _log_uniform(share: np.ndarray, low: int | float, high: int | float) -> np.ndarray:
    return np.clip(np.exp(_uniform(share, math.log(low), math.log(high))), low, high)


def _integer(share: np.ndarray, low: int | float, high: int | float) -> np.ndarray:
    return int(low) + np.floor(share * (high - low + 1)).astype(np.int64)


_RANGES: dict[str, Callable[..., np.ndarray]] = {
    "uniform": _uniform,
    "log_uniform": _log_uniform,
    "integer": _integer,
}


def _array(values: tuple[Any, ...]) -> np.ndarray:
    """An array of one axis, of the type that all values share."""
    types = {type(value) for value in values}
    if types <= {bool} or types <= {int} or types <= {int, float} or types <= {str}:
        return np.array(values)
    array = np.empty(len(values), dtype=object)  # NumPy would make two axes of tuples
    array[:] = values
    return array
