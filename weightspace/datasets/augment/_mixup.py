"""MixUp in weight space: networks half way between two, and targets half way with them."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from weightspace.align import MATCHED
from weightspace.align._weight_matching import match_units
from weightspace.datasets.augment._augmentation import AUGMENTATIONS, Augmentation, acted, options
from weightspace.datasets.augment._batch import Batch, Targets, kind_of
from weightspace.datasets.augment._draws import Draws
from weightspace.datasets.augment._symmetries import SHAMSIAN, random_permutations
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import Element, Weights, WeightSpec


@AUGMENTATIONS.register("mixup", changes_signal=True, effect="between those of two networks", paper=SHAMSIAN)
class MixUp(Augmentation):
    """Each network becomes ``lambda W + (1 - lambda) W'``, with a partner W' from the batch, and so do the targets.

    Class numbers become shares of classes; numbers, and weights, are mixed as they are. A batch of one network has
    nobody to be mixed with and stays.

    Args:
        kind: ``"direct"``: the partner as it is; ``"permuted"``: with its units in random order; ``"aligned"``: brought
            close by weight matching, with signs and phases where the weight space has one of each per group;
            ``"self"``: the partner is the network itself with its units in random order, and the target stays.
        beta: lambda is drawn from Beta(beta, beta); uniformly in [0, 1) by default.
        targets: ``"mix"`` with the same lambda, or ``"larger"``: the target of whoever has the larger share.

    Reference:
        Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412; for weights Shamsian et al.
        2024, "Improved Generalization of Weight Space Networks via Augmentations", arXiv:2402.04081.

    Example:
        >>> from weightspace import Batch, MixUp, WeightSpec
        >>> spec = WeightSpec.mlp([2, 4, 1], activation="sine", w0=30.0)
        >>> weights = spec.unflatten(torch.randn(8, spec.num_parameters))
        >>> mixed = MixUp("aligned")(Batch(spec, weights, torch.arange(8) % 3, classes=3), seed=0)
        >>> mixed.targets.shape
        torch.Size([8, 3])
    """

    @options
    def __init__(
        self,
        kind: Annotated[
            Literal["aligned", "direct", "permuted", "self"], Field(description="who the partner is")
        ] = "aligned",
        beta: Annotated[
            float | None,
            Field(gt=0, allow_inf_nan=False, description="lambda ~ Beta(beta, beta); else uniform"),
        ] = None,
        targets: Annotated[
            Literal["mix", "larger"], Field(description="mixed, or those of the larger share")
        ] = "mix",
    ) -> None:
        self.kind = kind
        self.beta = beta
        self.targets = targets

    def check(self, batch: Batch) -> None:
        """Targets can be mixed, and weights of the space matched."""
        if self.kind == "self":
            return
        numbers = isinstance(batch.targets, Tensor) and not batch.targets.is_floating_point()
        if self.targets == "mix" and numbers and batch.classes is None:
            raise ConfigError(
                "mixup: expected class numbers with a known number of classes, numbers, or weights as targets, found "
                f"{kind_of(batch.targets)}; mixup({self.kind}, targets=larger) mixes the weights alone"
            )
        if self.kind == "aligned":
            one = {name: w[:1] for name, w in _last(batch).items()}
            try:
                self._matching(batch, one, one, max_sweeps=1)
            except SpecError as error:
                raise ConfigError(f"mixup: {error}; mixup(direct) needs no matching") from None

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """Draw partners and shares, align, and mix."""
        share = self._shares(draws)
        if self.kind == "self":
            others = acted(batch, random_permutations(batch.spec, draws), batch.weights)
            return batch.with_(weights=_mixed(batch.weights, others, share))
        partner = _partners(draws)
        element = self._element(batch, partner, draws)
        others = _of_partners(batch, batch.weights, partner, element)
        mixed = batch.with_(weights=_mixed(batch.weights, others, share))
        return (
            mixed
            if batch.targets is None
            else mixed.with_(targets=self._targets(batch, partner, element, share))
        )

    def _shares(self, draws: Draws) -> Tensor:
        """Lambda of each network, (batch,)."""
        uniform = draws.uniform()
        if self.beta is None:
            return uniform
        from scipy.stats import beta

        values = beta.ppf(uniform.double().cpu().numpy(), self.beta, self.beta)
        return torch.from_numpy(np.asarray(values, np.float32)).to(uniform.device)

    def _element(self, batch: Batch, partner: Tensor, draws: Draws) -> Element:
        """What acts on each partner."""
        if self.kind == "direct" or len(batch) == 1:
            return {}
        if self.kind == "permuted":
            return random_permutations(batch.spec, draws)
        own = _last(batch)
        return self._matching(batch, own, {name: w[partner] for name, w in own.items()})

    def _matching(self, batch: Batch, reference: Weights, weights: Weights, max_sweeps: int = 100) -> Element:
        kinds = _matched(batch.spec)
        if not kinds:
            return {}
        # layer by layer first: one run then finds planted elements, and ends closer than one from the order as it is
        return match_units(
            batch.spec,
            reference,
            weights,
            symmetries=kinds,
            restarts=1,
            first="layers",
            max_sweeps=max_sweeps,
        ).element

    def _targets(self, batch: Batch, partner: Tensor, element: Element, share: Tensor) -> Targets:
        own = batch.targets
        assert own is not None
        if isinstance(own, dict):
            others = _of_partners(batch, own, partner, element)
            return _chosen(own, others, share) if self.targets == "larger" else _mixed(own, others, share)
        if self.targets == "larger":
            return _chosen({"": own}, {"": own[partner]}, share)[""]
        numbers = own if own.is_floating_point() else batch.shares()
        return _mixed({"": numbers}, {"": numbers[partner]}, share)[""]


@lru_cache(maxsize=32)
def _matched(spec: WeightSpec) -> tuple[str, ...]:
    """The symmetries that partners are matched by: those of the space, if no group has two of a kind."""
    counts = Counter((scaling.group, scaling.kind) for scaling in spec.scalings.values())
    twice = {kind for (_, kind), count in counts.items() if count > 1}
    return tuple(kind for kind in MATCHED if kind in spec.symmetries and kind not in twice)


def _last(batch: Batch) -> Weights:
    """Weights with one batch axis: of trajectories the last checkpoints."""
    later = len(batch.shape) - 1
    return {
        name: w.flatten(1, later)[:, -1] if later > 1 else w[:, -1] if later else w
        for name, w in batch.weights.items()
    }


def _partners(draws: Draws) -> Tensor:
    """Another network of the batch for each, (batch,): all of them in one random circle."""
    order = draws.together(len(draws)).argsort()
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def _of_partners(batch: Batch, weights: Weights, partner: Tensor, element: Element) -> Weights:
    others = {name: w[partner] for name, w in weights.items()}
    return acted(batch, element, others) if element else others


def _mixed(own: Weights, others: Weights, share: Tensor) -> Weights:
    return {name: torch.lerp(others[name], w, _broad(share, w).to(w.dtype)) for name, w in own.items()}


def _chosen(own: Weights, others: Weights, share: Tensor) -> Weights:
    return {name: torch.where(_broad(share, w) >= 0.5, w, others[name]) for name, w in own.items()}


def _broad(share: Tensor, values: Tensor) -> Tensor:
    return share.view(-1, *[1] * (values.ndim - 1))
