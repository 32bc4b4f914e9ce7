"""The straight-through estimator: weights are trained freely, and only their nearest permutation of B is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._data import Batches, Loss
from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch, finish
from weightspace.align._together import parameters_of
from weightspace.align._training import Losses, between, check_options, check_pair, training
from weightspace.align._weight_matching import weight_matching
from weightspace.spec import Element, Weights, WeightSpec

_SWEEPS = 2  # of a warm-started matching: what a step leaves undone, the next one does


@matcher("straight-through", paper="arXiv:2209.04836", needs=("module", "data", "loss"))
def straight_through(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    module: nn.Module,
    data: Batches,
    loss: Loss = F.cross_entropy,
    epochs: Annotated[int, Field(ge=1)] = 10,
    learning_rate: Annotated[float, Field(gt=0)] = 0.03,
    symmetries: Sequence[str] = ("permutation",),
    seed: int = 0,
) -> tuple[Weights, MatchReport]:
    """Train towards a low loss at the midpoint, through the nearest reordering of B.

    Free weights W begin at A. For every batch, B is matched onto them (weight matching, which goes on from where it
    was), and they are changed by Adam along the gradient of the loss at

        (A + g . B) / 2,   g = argmin over g of ||W - g . B||,

    which is taken as if ``g . B`` were W. Before the first batch, where g is what plain weight matching finds,
    and after each epoch the loss of the midpoint over all data is computed; the element for which it is lowest is
    returned. Layers with statistics take those of the batch.

    Args:
        spec: the weight space.
        reference: A, the network that stays.
        weights: B, the network that is reordered.
        module: that computes the networks' function.
        data: batches of inputs and targets.
        loss: of outputs and targets.
        epochs: how often the data are gone over.
        learning_rate: of Adam, in units of the root mean square of each tensor of A.
        symmetries: what may be done to units, as in :func:`weight_matching`.
        seed: of weight matching and of what data loaders draw.

    Returns:
        The aligned weights, in the dtypes of ``weights``, and a report whose ``sweeps`` are the batches that were used
        up to the element that is returned.

    Raises:
        SpecError: networks that do not fit the spec, are not finite or have batch axes.
        ConfigError: an option out of range.
        DataError: data that do not suit the module.

    Reference:
        Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv:2209.04836,
        section 3.3. Warm starts, Adam, and the choice among epochs are ours.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> inputs = torch.randn(32, 4)
        >>> data = [(inputs, (inputs[:, 0] > 0).long())]
        >>> spec = WeightSpec.trace(module, inputs)
        >>> a, b = ({name: torch.randn_like(w) for name, w in module.state_dict().items()} for _ in range(2))
        >>> aligned, report = straight_through(spec, a, b, module=module, data=data, epochs=2)
        >>> bool(report.distance_after < report.distance_before)
        True
    """
    stopwatch = Stopwatch()
    check_options(epochs=epochs, learning_rate=learning_rate, seed=seed)
    check_pair(spec, reference, weights)
    _, plain = weight_matching(spec, reference, weights, symmetries=symmetries, seed=seed)
    losses = Losses.of(spec, module, weights, data, loss)
    with training(seed, losses.device):
        search = _Search(
            spec, losses, parameters_of(spec, reference), weights, tuple(symmetries), plain.element, seed
        )
        search.judge()
        optimizer = torch.optim.Adam(_relative(search.free, learning_rate))
        for _ in range(epochs):
            for inputs, targets in losses.batches():
                search.step(optimizer, inputs, targets)
            search.judge()
    return finish(spec, "straight-through", reference, weights, search.best, search.best_steps, stopwatch)


@dataclass(eq=False)
class _Search:
    """Where the search stands.

    Args:
        spec: the weight space.
        losses: of networks on the data.
        reference: the parameters of A.
        weights: B.
        symmetries: what may be done to units.
        element: that brings B onto the free weights.
        seed: of weight matching.
        free: the weights that are trained.
        moved: B after the element.
        steps: batches so far.
        best: the element with the lowest loss at the midpoint so far.
        best_steps: batches up to it.
        lowest: that loss.
    """

    spec: WeightSpec
    losses: Losses
    reference: Weights
    weights: Mapping[str, Tensor]
    symmetries: tuple[str, ...]
    element: Element
    seed: int
    free: Weights = field(init=False)
    moved: Weights = field(init=False)
    steps: int = 0
    best: Element = field(default_factory=dict)
    best_steps: int = 0
    lowest: float = float("inf")

    def __post_init__(self) -> None:
        self.free = {name: value.clone().requires_grad_() for name, value in self.reference.items()}
        self.moved = self.spec.act(self.element, self.weights)

    def step(self, optimizer: torch.optim.Optimizer, inputs: Any, targets: Tensor) -> None:
        """Train on one batch, and bring B onto the free weights as they are then."""
        straight = {name: _straight(self.moved[name], value) for name, value in self.free.items()}
        optimizer.zero_grad()
        midpoint = between(self.reference, straight, 0.5, self.moved)
        self.losses.of_batch(midpoint, inputs, targets).backward()
        optimizer.step()
        self.steps += 1
        self.moved, report = weight_matching(
            self.spec,
            {name: value.detach() for name, value in self.free.items()},
            self.weights,
            symmetries=self.symmetries,
            restarts=1,
            start=self.element,
            max_sweeps=_SWEEPS,
            seed=self.seed + self.steps,
        )
        self.element = report.element

    def judge(self) -> None:
        """Keep the element if the loss at its midpoint, over all data, is the lowest so far."""
        value = self.losses.mean(
            between(self.reference, parameters_of(self.spec, self.moved), 0.5, self.moved)
        )
        if not self.best or value < self.lowest:
            self.best, self.best_steps, self.lowest = self.element, self.steps, value


def _relative(weights: Weights, rate: float) -> list[dict[str, Any]]:
    """Every tensor with its own learning rate: the wider a layer the smaller its weights, and so must its steps be."""
    sizes = {name: value.detach().square().mean().sqrt().item() for name, value in weights.items()}
    return [{"params": [value], "lr": rate * sizes[name]} for name, value in weights.items()]


def _straight(value: Tensor, free: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``free``."""
    return value.detach().to(free.dtype) + (free - free.detach())
