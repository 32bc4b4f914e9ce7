"""Starlight: one network is trained from which straight paths of low loss lead to all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._data import Batches, Loss
from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch
from weightspace.align._together import average, check_networks, finish_together, joined, parameters_of
from weightspace.align._training import Losses, between, check_options, training
from weightspace.align._weight_matching import weight_matching
from weightspace.errors import ConfigError
from weightspace.spec import Element, Weights, WeightSpec


@matcher("starlight", paper="arXiv:2403.07968", needs=("module", "data", "loss"), together=True)
def starlight(
    spec: WeightSpec,
    networks: Sequence[Mapping[str, Tensor]],
    *,
    module: nn.Module,
    data: Batches,
    loss: Loss = F.cross_entropy,
    epochs: Annotated[int, Field(ge=1)] = 20,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3,
    rematch: Annotated[int, Field(ge=1)] = 50,
    symmetries: Sequence[str] = ("permutation",),
    seed: int = 0,
) -> tuple[list[Weights], MatchReport]:
    """Train a star: a network that low straight paths join to every one of the networks, and align them to it.

    The star theta begins at the mean of the networks, aligned to the first; Adam lowers

        E over anchors z and t of L((1 - t) theta + t z),

    with one anchor and one t, uniform in [0, 1], for each batch. An anchor is a network brought onto the star by weight
    matching, which is repeated now and then, going on from where it was. Layers with statistics take those of the
    batch; the star's own are estimated at the end.
    Other networks of the same kind are joined to the star as well, after weight matching onto it.

    Args:
        spec: the weight space.
        networks: two or more, without batch axes.
        module: that computes the networks' function.
        data: batches of inputs and targets.
        loss: of outputs and targets.
        epochs: how often the data are gone over.
        learning_rate: of Adam at the beginning; it falls to zero along a cosine.
        rematch: how many batches there are between two matchings of the anchors onto the star.
        symmetries: what may be done to units, as in :func:`weight_matching`.
        seed: of anchors, of t, of weight matching and of what data loaders draw.

    Returns:
        The networks in their order, aligned onto the star, and a report with an entry per network whose ``center`` is
        the star, with all that the first network has; its ``sweeps`` are batches.

    Raises:
        SpecError: networks that do not fit the spec or are not finite.
        ConfigError: fewer than two networks, or an option out of range.
        DataError: data that do not suit the module.

    Reference:
        Sonthalia et al. 2024, "Do Deep Neural Network Solutions Form a Star Domain?", arXiv:2403.07968. The start at
        the mean and the repeated matching are ours.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> inputs = torch.randn(32, 4)
        >>> data = [(inputs, (inputs[:, 0] > 0).long())]
        >>> spec = WeightSpec.trace(module, inputs)
        >>> networks = [{name: torch.randn_like(w) for name, w in module.state_dict().items()} for _ in range(3)]
        >>> aligned, report = starlight(spec, networks, module=module, data=data, epochs=2)
        >>> list(report.center) == list(networks[0])
        True
    """
    stopwatch = Stopwatch()
    check_options(epochs=epochs, learning_rate=learning_rate, rematch=rematch, seed=seed)
    if len(networks) < 2:
        raise ConfigError(f"networks: expected at least two to align, found {len(networks)}")
    check_networks(spec, networks)
    losses = Losses.of(spec, module, networks[0], data, loss)
    anchors = _Anchors.onto_first(spec, networks, tuple(symmetries), seed)
    with training(seed, losses.device):
        star = {
            name: value.requires_grad_()
            for name, value in average([parameters_of(spec, moved) for moved in anchors.moved]).items()
        }
        steps = _train(star, anchors, losses, epochs, learning_rate, rematch)
        anchors.match(star)
        center = _center(spec, star, anchors.moved[0], module, data)
    aligned, report = finish_together(
        spec, "starlight", networks, joined(spec, anchors.elements), steps, stopwatch
    )
    return aligned, replace(report, center=center)


def _train(
    star: Weights, anchors: _Anchors, losses: Losses, epochs: int, learning_rate: float, rematch: int
) -> int:
    """Lower the loss along the paths from the star to its anchors; returns the number of batches."""
    optimizer = torch.optim.Adam(star.values(), lr=learning_rate)
    # At a constant rate the star itself keeps moving about, and loses accuracy on wide networks.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    steps = 0
    for _ in range(epochs):
        for inputs, targets in losses.batches():
            if steps % rematch == 0:
                anchors.match(star)
            anchor, share = anchors.draw(generator)
            optimizer.zero_grad()
            losses.of_batch(between(star, anchor, share, anchor), inputs, targets).backward()
            optimizer.step()
            steps += 1
        schedule.step()
    return steps


def _center(
    spec: WeightSpec, star: Weights, like: Mapping[str, Tensor], module: nn.Module, data: Any
) -> Weights:
    """The star as a whole network, in the types of ``like``."""
    center = {
        name: (star[primary] if (primary := spec.primary(name)) in star else value)
        .detach()
        .to(value.dtype)
        .clone()
        for name, value in like.items()
    }
    if not any(tensor.kind == "statistic" for tensor in spec.tensors.values()):
        return center
    from weightspace.align._repair import reset_batch_norm

    return reset_batch_norm(module, center, data)


@dataclass(eq=False)
class _Anchors:
    """The networks, where they are now, and how they came there.

    Args:
        spec: the weight space.
        networks: as they were given.
        symmetries: what may be done to units.
        seed: of weight matching.
        elements: one per network.
        moved: the networks after them.
    """

    spec: WeightSpec
    networks: Sequence[Mapping[str, Tensor]]
    symmetries: tuple[str, ...]
    seed: int
    elements: list[Element] = field(default_factory=list)
    moved: list[Weights] = field(default_factory=list)

    @classmethod
    def onto_first(
        cls,
        spec: WeightSpec,
        networks: Sequence[Mapping[str, Tensor]],
        symmetries: tuple[str, ...],
        seed: int,
    ) -> _Anchors:
        anchors = cls(spec, networks, symmetries, seed, [{} for _ in networks], [dict(n) for n in networks])
        anchors.match(anchors.moved[0], restarts=2)
        return anchors

    @torch.no_grad()
    def match(self, star: Mapping[str, Tensor], restarts: int = 1) -> None:
        """Bring each onto the star, from where it is."""
        onto = parameters_of(self.spec, star)
        for row, network in enumerate(self.networks):
            self.moved[row], report = weight_matching(
                self.spec,
                onto,
                network,
                symmetries=self.symmetries,
                restarts=restarts,
                start=self.elements[row],
                seed=self.seed,
            )
            self.elements[row] = report.element

    def draw(self, generator: torch.Generator) -> tuple[Weights, float]:
        """One of them, and how far towards it."""
        row = int(torch.randint(len(self.moved), (), generator=generator))
        return self.moved[row], torch.rand((), generator=generator).item()
