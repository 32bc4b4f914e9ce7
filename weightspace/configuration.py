"""Mechanisms that every room's configuration uses: registries by name, options of functions, errors in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from weightspace.errors import ConfigError

__all__ = ["Registry", "function_options", "validated"]

_Thing = TypeVar("_Thing")
_Class = TypeVar("_Class", bound=type)
_Model = TypeVar("_Model", bound=BaseModel)


class Registry(dict[str, _Thing], Generic[_Thing]):
    """Things by name, filled by a decorator; the choices of the command and the tables of the docs come from it.

    Args:
        what: what is registered, for messages.
        attribute: name of the class attribute that is set to the registered name, if any.

    Example:
        >>> SHAPES = Registry("shape", "name")
        >>> @SHAPES.register("round")
        ... class Ball: ...
        >>> SHAPES["round"].name
        'round'
    """

    def __init__(self, what: str, attribute: str | None = None) -> None:
        super().__init__()
        self.what, self.attribute = what, attribute

    def register(self, name: str, **attributes: Any) -> Callable[[_Class], _Class]:
        """A class decorator that adds the class under ``name`` and sets further attributes on it.

        Raises:
            ValueError: the name is taken.
        """

        def add(cls: _Class) -> _Class:
            for key, value in {**({self.attribute: name} if self.attribute else {}), **attributes}.items():
                setattr(cls, key, value)
            self.add(name, cls)  # type: ignore[arg-type]
            return cls

        return add

    def add(self, name: str, thing: _Thing) -> None:
        """Register a thing.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"{self.what} {name!r} is registered twice")
        self[name] = thing

    def find(self, name: str, field: str) -> _Thing:
        """The thing of that name.

        Args:
            name: of the thing.
            field: what a message calls the option that names it.

        Raises:
            ConfigError: there is none.
        """
        if name not in self:
            raise ConfigError(f"{field}: expected one of {', '.join(self)}, found {name!r}")
        return self[name]


def validated(
    model: type[_Model], values: Mapping[str, Any], error_type: type[Exception], place: str, unknown: str
) -> _Model:
    """Build a configuration, or raise one sentence about its first problem.

    Args:
        model: the configuration.
        values: its fields.
        error_type: what to raise.
        place: what stands before the field's name, with its separator (``"model."``, ``"config.yaml: "``).
        unknown: what a key that the model does not have is called.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            raise error_type(f"{place}{field}: {unknown}; expected one of {known}") from None
        raise error_type(f"{place}{field}: {problem['msg'].lower()}, found {problem['input']!r}") from None


@lru_cache(maxsize=64)
def function_options(function: Callable[..., Any], reserved: frozenset[str] = frozenset()) -> type[BaseModel]:
    """The keyword-only parameters of a function as a configuration: its signature is where they are described.

    Args:
        function: with annotations that pydantic understands.
        reserved: parameters that are no options.

    Example:
        >>> def shrink(weights, *, by: float = 0.5, seed: int = 0): ...
        >>> function_options(shrink, frozenset({"seed"}))(by="0.25").by
        0.25
    """
    hints = get_type_hints(function, include_extras=True)
    fields = {
        name: (hints[name], ... if parameter.default is Parameter.empty else parameter.default)
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name not in reserved
    }
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(function.__name__, __config__=config, **fields)  # type: ignore[call-overload]
