"""What an augmentation is: its options, what it keeps, and how a text names it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any, ClassVar, Literal, TypeVar, cast

from pydantic import ConfigDict, ValidationError, validate_call

from weightspace.configuration import Registry
from weightspace.datasets.augment._batch import Batch, along
from weightspace.datasets.augment._draws import Draws
from weightspace.errors import ConfigError
from weightspace.spec import Element, Weights, WeightSpec, act_flat

Keeps = Literal["exactly", "approximately", "no"]


_Init = TypeVar("_Init", bound=Callable[..., None])


def options(init: _Init) -> _Init:
    """Make the signature of an ``__init__`` the options of its class: texts are converted, ranges checked.

    What is wrong is a ConfigError that names the option.
    """
    checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(init)

    @wraps(init)
    def build(self: Augmentation, *values: Any, **named: Any) -> None:
        try:
            checked(self, *values, **named)
        except ValidationError as error:
            raise ConfigError(_sentence(type(self), error)) from None

    return cast("_Init", build)


def option_names(kind: type[Augmentation]) -> list[str]:
    """The options of an augmentation, in their order."""
    return list(signature(kind).parameters)


def _sentence(kind: type[Augmentation], error: ValidationError) -> str:
    problem = error.errors()[0]
    place, known = kind.name or kind.__name__, option_names(kind)
    which = problem["loc"][0] if problem["loc"] else ""
    listed = f"the options {', '.join(known)}" if known else "no options"
    if problem["type"] == "unexpected_positional_argument":
        return f"{place}: expected {listed}, found {problem['input']!r} beside them"
    if problem["type"] in ("unexpected_keyword_argument", "missing_argument"):
        return f"{place}: expected {listed}, found {which!r}"
    if problem["type"] == "multiple_argument_values":
        return f"{place}: {which} is given twice"
    name = known[which - 1] if isinstance(which, int) else which
    return f"{place}: {name}: {problem['msg'].lower()}, found {problem['input']!r}"


class Augmentation(ABC):
    """A batch in, a batch out; nothing is changed in place.

    ``augment(batch, seed=0)`` draws from the seed alone; a data set gives one stream of random numbers per network and
    epoch. The arguments of ``__init__`` are its options, kept as attributes; decorated with :func:`options` they are
    checked, and can be given as texts.

    Attributes:
        name: under which it is registered.
        keeps: whether a network computes the same function afterwards: ``"exactly"``, ``"approximately"`` or ``"no"``.
        changes_signal: whether a coordinate network represents another signal afterwards, and is meant to.
        comes_first: whether it puts stored networks in place of those of a batch, and so undoes what came before.
        effect: what becomes of the function, in a few words.
        paper: where it is from.
    """

    name: ClassVar[str] = ""
    keeps: ClassVar[Keeps] = "no"
    changes_signal: ClassVar[bool] = False
    comes_first: ClassVar[bool] = False
    effect: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @options  # noqa: B027 (no options)
    def __init__(self) -> None:
        pass

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({given})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).items()))

    def __call__(self, batch: Batch, seed: int | Draws = 0) -> Batch:
        """Augment a batch.

        Args:
            batch: of networks.
            seed: or the random numbers to use.

        Raises:
            ConfigError: the augmentation does not suit the weight space or the targets.
        """
        self.check(batch)
        draws = seed if isinstance(seed, Draws) else Draws.of(seed, len(batch), device=batch.device)
        return self.apply(batch, draws)

    def check(self, batch: Batch) -> None:  # noqa: B027 (many suit every batch)
        """Raise ConfigError when this augmentation does not suit batches like this one."""

    @abstractmethod
    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """Augment a batch that suits."""


AUGMENTATIONS: Registry[type[Augmentation]] = Registry("augmentation", "name")
"""The augmentations that ``--augment`` names; ``@AUGMENTATIONS.register("name", keeps=...)`` adds one."""


class SymmetryAugmentation(Augmentation):
    """An augmentation that draws a group element: the function of each network stays exactly the same.

    All checkpoints of a trajectory get the same element, so that it stays the trajectory of one network. Targets that
    are weights move along.
    """

    keeps: ClassVar[Keeps] = "exactly"
    effect: ClassVar[str] = "the same"

    @abstractmethod
    def element(self, batch: Batch, draws: Draws) -> Element:
        """Draw one element per network, with one batch axis."""

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """Draw and act."""
        return moved(batch, self.element(batch, draws))


def moved(batch: Batch, element: Element) -> Batch:
    """The batch after one element per network has acted on it, and on targets that are weights."""
    targets = batch.targets
    if isinstance(targets, dict):
        targets = acted(batch, element, targets)
    if len(batch.shape) == 1:
        return batch.with_flat(act_flat(batch.spec, element, batch.flat()), targets=targets)
    return batch.with_(weights=acted(batch, element, batch.weights), targets=targets)


def acted(batch: Batch, element: Element, weights: Weights) -> Weights:
    """Weights of a batch after one element per network has acted on them, on all checkpoints alike."""
    shape = batch.spec.batch_shape(weights)
    if len(shape) == 1:
        return batch.spec.unflatten(act_flat(batch.spec, element, batch.spec.flatten(weights)))
    return batch.spec.act({name: along(values, shape) for name, values in element.items()}, weights)


class Compose(Augmentation):
    """Augmentations one after the other; neighbouring symmetries are composed and applied as one.

    Args:
        parts: in their order.

    Example:
        >>> import torch
        >>> from weightspace import Batch, Compose, GaussianNoise, Permutation, SignFlip, WeightSpec
        >>> spec = WeightSpec.mlp([2, 4, 1], activation="sine", w0=30.0)
        >>> batch = Batch(spec, spec.unflatten(torch.randn(64, spec.num_parameters)))
        >>> augment = Compose([Permutation(), SignFlip(), GaussianNoise(0.1)])
        >>> augment(batch, seed=0).weights["layers.0.weight"].shape
        torch.Size([64, 4, 2])
    """

    def __init__(self, parts: Sequence[Augmentation]) -> None:
        self.parts = tuple(parts)

    def check(self, batch: Batch) -> None:
        """Every part, and their order."""
        for place, part in enumerate(self.parts):
            part.check(batch)
            if part.comes_first and place:
                raise ConfigError(
                    f"{part.name}: expected it to come first, as it undoes what came before, found "
                    f"{self.parts[0].name or type(self.parts[0]).__name__} before it"
                )

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """One after the other."""
        pending: Element = {}
        for part in self.parts:
            if isinstance(part, SymmetryAugmentation):
                element = part.element(batch, draws)
                pending = _composed(batch.spec, element, pending)
                continue
            batch = moved(batch, pending) if pending else batch
            pending = {}
            batch = part.apply(batch, draws)
        return moved(batch, pending) if pending else batch


def _composed(spec: WeightSpec, second: Element, first: Element) -> Element:
    """The product; permutations followed by what moves no units need no arithmetic."""
    if not first:
        return second
    if not spec.groups.keys() & second.keys() and not first.keys() - spec.groups.keys():
        return {**first, **second}
    return spec.compose(second, first)


_CALL = re.compile(r"^\s*(\w+)\s*(?:\(([^()]*)\))?\s*$")
_BETWEEN = re.compile(r",(?![^()]*\))")


def parse_augmentations(text: str) -> Compose | None:
    """Read ``"permutation, sign(p=0.3), noise(0.1), mixup(aligned)"``; None for an empty text.

    Raises:
        ConfigError: an unknown name, or options that the augmentation does not have or that are out of range.
    """
    calls = [part for part in _BETWEEN.split(text) if part.strip()]
    return Compose([_parse(call) for call in calls]) if calls else None


def _parse(call: str) -> Augmentation:
    match = _CALL.match(call)
    if match is None or match[1] not in AUGMENTATIONS:
        raise ConfigError(f"augment: expected some of {', '.join(AUGMENTATIONS)}, found {call.strip()!r}")
    values, named = _options(match[2] or "", call)
    try:
        return AUGMENTATIONS[match[1]](*values, **named)
    except ConfigError as error:
        raise ConfigError(f"augment: {error}") from None


def _options(text: str, call: str) -> tuple[Sequence[str], dict[str, str]]:
    """The options between the brackets: by position, then by name."""
    values: list[str] = []
    named: dict[str, str] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and named:
            raise ConfigError(f"augment: {call.strip()!r}: an option by position follows one by name")
        if not equals:
            values.append(part)
        elif name in named:
            raise ConfigError(f"augment: {call.strip()!r}: {name} is given twice")
        else:
            named[name] = value
    return values, named
