"""Augmentations of whole batches of weights, read from the spec's symmetries."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from weightspace.configuration import Registry
from weightspace.errors import ConfigError
from weightspace.spec import Element, Weights, WeightSpec


@runtime_checkable
class Augmentation(Protocol):
    """Batched weights in, batched weights out; nothing is changed in place."""

    def __call__(self, spec: WeightSpec, weights: Weights, generator: torch.Generator) -> Weights:
        """Augment weights with a leading batch axis, and one of checkpoints behind it for trajectories.

        ``generator`` lives on their device.
        """
        ...


AUGMENTATIONS: Registry[Callable[..., Augmentation]] = Registry("augmentation")
"""The augmentations that ``--augment`` names; ``@AUGMENTATIONS.register("name")`` adds one."""


class SymmetryAugmentation:
    """An augmentation that draws a group element: the function of each network stays exactly the same.

    All checkpoints of a trajectory get the same element, so that it stays the trajectory of one network.
    """

    def element(self, spec: WeightSpec, batch: Sequence[int], generator: torch.Generator) -> Element:
        """Draw one element per network."""
        raise AssertionError(f"{type(self).__name__} draws no element")

    def __call__(self, spec: WeightSpec, weights: Weights, generator: torch.Generator) -> Weights:
        """Draw and apply."""
        return spec.act(_drawn(self, spec, spec.batch_shape(weights), generator), weights)


def _drawn(
    augmentation: SymmetryAugmentation, spec: WeightSpec, batch: Sequence[int], generator: torch.Generator
) -> Element:
    """One element per network: axes behind the first are its checkpoints."""
    element = augmentation.element(spec, batch[:1], generator)
    later = [1] * (len(batch) - 1)
    if not later:
        return element
    return {
        name: tensor.reshape(*batch[:1], *later, *tensor.shape[1:]).expand(*batch, *tensor.shape[1:])
        for name, tensor in element.items()
    }


@AUGMENTATIONS.register("permutation")
class Permutation(SymmetryAugmentation):
    """Reorder the units of every group at random (exact)."""

    def element(self, spec: WeightSpec, batch: Sequence[int], generator: torch.Generator) -> Element:
        """Uniform permutations."""
        return spec.random_element(
            batch, symmetries=["permutation"], generator=generator, device=generator.device
        )


@AUGMENTATIONS.register("sign")
class SignFlip(SymmetryAugmentation):
    """Flip units of odd (or even) activations with probability ``p`` (exact).

    Args:
        p: probability of a flip, in [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        if not 0.0 <= p <= 1.0:
            raise ConfigError(f"sign: expected a probability in [0, 1], found {p}")
        self.p = p

    def element(self, spec: WeightSpec, batch: Sequence[int], generator: torch.Generator) -> Element:
        """Independent signs for every unit that has the symmetry."""
        element: Element = {}
        for name, scaling in spec.scalings.items():
            if scaling.kind == "sign":
                group = spec.groups[scaling.group]
                sizes = (*batch, *(spec.groups[outer].size for outer in group.within), group.size)
                uniform = torch.rand(sizes, generator=generator, device=generator.device)
                element[name] = (uniform >= self.p).float().mul_(2.0).sub_(1.0)
        return element


@AUGMENTATIONS.register("noise")
class GaussianNoise:
    """Add Gaussian noise relative to each tensor's spread over the batch (approximate).

    Args:
        scale: standard deviation of the noise in units of that of the tensor, at least 0.

    Reference:
        Shamsian et al. 2024, "Improved Generalization of Weight Space Networks via Augmentations",
        arXiv:2402.04081, section 4.
    """

    def __init__(self, scale: float = 0.1) -> None:
        if not scale >= 0.0:
            raise ConfigError(f"noise: expected a scale of at least 0, found {scale}")
        self.scale = scale

    def __call__(self, spec: WeightSpec, weights: Weights, generator: torch.Generator) -> Weights:
        """One normal draw and one fused multiply-add for all tensors together."""
        flat = spec.flatten(weights)
        noise = torch.randn(flat.shape, generator=generator, device=flat.device, dtype=flat.dtype)
        return spec.unflatten(torch.addcmul(flat, noise, self.scale * _spread(spec, flat)))


def _spread(spec: WeightSpec, flat: Tensor) -> Tensor:
    """Standard deviation of each tensor over batch and entries, repeated for each of its parameters: (P,)."""
    sizes = [tensor.numel for tensor in spec.tensors.values()]
    rows = flat.reshape(-1, flat.shape[-1])
    # moments per column first: one pass over the batch, whatever the number of tensors
    moments = torch.stack([rows.mean(0), rows.square().mean(0)])
    mean, second = torch.stack([part.mean(-1) for part in moments.split(sizes, dim=-1)], dim=-1)
    spread = (second - mean * mean).clamp_min(0.0).sqrt()
    repeats = torch.tensor(sizes, device=flat.device)
    return torch.repeat_interleave(spread, repeats, output_size=flat.shape[-1])


class Compose:
    """Augmentations one after the other; neighbouring symmetries are composed and applied as one.

    Example:
        >>> spec = WeightSpec.mlp([2, 4, 1], activation="sine", w0=30.0)
        >>> augment = Compose([Permutation(), SignFlip(), GaussianNoise(0.1)])
        >>> weights = spec.unflatten(torch.randn(64, spec.num_parameters))
        >>> augment(spec, weights, torch.Generator().manual_seed(0))["layers.0.weight"].shape
        torch.Size([64, 4, 2])
    """

    def __init__(self, augmentations: Sequence[Augmentation]) -> None:
        self.augmentations = list(augmentations)

    def __call__(self, spec: WeightSpec, weights: Weights, generator: torch.Generator) -> Weights:
        """Apply all of them."""
        batch = spec.batch_shape(weights)
        pending: Element = {}
        for augmentation in self.augmentations:
            if isinstance(augmentation, SymmetryAugmentation):
                element = _drawn(augmentation, spec, batch, generator)
                pending = spec.compose(element, pending) if pending else element
                continue
            weights = spec.act(pending, weights) if pending else weights
            pending = {}
            weights = augmentation(spec, weights, generator)
        return spec.act(pending, weights) if pending else weights


_CALL = re.compile(r"^\s*(\w+)\s*(?:\(\s*([^()]*)\s*\))?\s*$")


def parse_augmentations(text: str) -> Compose | None:
    """Read ``"permutation, sign, noise(0.1)"``; None for an empty text.

    Raises:
        ConfigError: an unknown name, or an argument that is not a number in range.
    """
    calls = [part for part in re.split(r",(?![^()]*\))", text) if part.strip()]
    return Compose([_parse(call) for call in calls]) if calls else None


def _parse(call: str) -> Augmentation:
    match = _CALL.match(call)
    if match is None or match[1] not in AUGMENTATIONS:
        raise ConfigError(f"augment: expected some of {', '.join(AUGMENTATIONS)}, found {call.strip()!r}")
    try:
        return AUGMENTATIONS[match[1]](
            *(float(value) for value in (match[2] or "").split(",") if value.strip())
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"augment: {call.strip()!r} has unsuitable arguments ({error})") from None
