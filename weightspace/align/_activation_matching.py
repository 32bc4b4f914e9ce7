"""Activation matching: units that answer alike on data are the same unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.align._activations import (
    Similarities,
    Similarity,
    check_module,
    check_networks,
    check_runs,
    flipped_sites,
    similarities,
)
from weightspace.align._assignment import assign
from weightspace.align._data import Batches
from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch, finish
from weightspace.errors import ConfigError
from weightspace.spec import Element, Watch, Weights, WeightSpec
from weightspace.spec._cells import source_index, unit_cell

_SWEEPS = 2  # over groups that no value shows: the second sees what the first moved


@matcher("activation-matching", paper="arXiv:2209.04836", needs=("module", "data"))
def activation_matching(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    module: nn.Module,
    data: Batches,
    similarity: Similarity = "correlation",
    signs: bool = False,
    seed: int = 0,
) -> tuple[Weights, MatchReport]:
    """Reorder the units of ``weights`` so that they answer to the data as those of ``reference`` do.

    Both networks run on the data once. Unit i of the reference and unit j of the other are as alike as their values
    are correlated over items and positions,

        C[i, j] = cov(a_i, b_j) / (std(a_i) std(b_j)),

    and the permutation of each group is the linear assignment with the largest sum of C, independently of all other
    groups. Which values are those of a group is derived from the spec, see :class:`weightspace.spec.Watch`: what
    follows the activation of a hidden layer; all values of a residual stream together, their covariances and
    variances summed; queries, keys and values per head. Two heads are as alike as their units are under the best
    permutation within them, which is the one that is taken. Units that never change correlate with none; among
    themselves they are told apart by what enters their activation. Groups that no value shows, as between the layers
    of one recurrent operator, are then matched by their weights.

    Correlations are float64 and streamed: memory is that of one batch and one matrix per group. BatchNorm's running
    statistics move with their group.

    Args:
        spec: the weight space.
        reference: the network that stays.
        weights: the network that is reordered.
        module: that computes both; it is run in evaluation mode and not changed.
        data: batches of inputs and targets, of which the inputs are used.
        similarity: ``"correlation"``, or ``"inner"`` for the inner product of values that are not centred.
        signs: whether a unit may be flipped too, where the spec has a sign scaling: the absolute value of C counts
            then for values that the scaling flips.
        seed: without effect, as nothing is drawn; all matchers take one.

    Returns:
        The aligned weights and a report; the statistics are exact, so that one sweep suffices.

    Raises:
        SpecError: weights that do not fit the spec or are not finite, or a spec that is none of the module.
        DataError: data that the module refuses, or that make values which are not finite.
        ConfigError: an unknown similarity.

    Reference:
        Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv:2209.04836,
        section 3.1; Li et al. 2016, "Convergent Learning: Do Different Neural Networks Learn the Same
        Representations?", arXiv:1511.07543, for the correlation.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> spec = WeightSpec.trace(net, torch.zeros(2, 3))
        >>> a = net.state_dict()
        >>> b = spec.act(spec.random_element(symmetries=["permutation"]), a)
        >>> data = [(torch.randn(64, 3), torch.zeros(64))]
        >>> aligned, _ = activation_matching(spec, a, b, module=net, data=data)
        >>> bool(torch.equal(aligned["0.weight"], a["0.weight"]))
        True
    """
    stopwatch = Stopwatch()
    if similarity not in get_args(Similarity):
        raise ConfigError(
            f"similarity: expected one of {', '.join(get_args(Similarity))}, found {similarity!r}"
        )
    check_networks(spec, reference=reference, weights=weights)
    check_module(spec, module)
    check_runs(module, reference, data)
    watch = Watch(spec, module)
    scalings, flipped = flipped_sites(watch, weights, data) if signs else ({}, frozenset())
    found = similarities(watch, reference, weights, data, similarity, flipped)
    element = match_units(spec, found, scalings)
    element = _match_unseen(spec, reference, weights, element, found)
    return finish(spec, "activation-matching", reference, weights, element, 1, stopwatch)


def match_units(
    spec: WeightSpec, found: Mapping[str, Similarities], scalings: Mapping[str, str] | None = None
) -> Element:
    """The permutations (and signs) under which the units of each group are most alike.

    Outer groups go first: a pair of outer units is as alike as it is itself, plus the best assignment of the units
    within. A group within several that are not within each other counts for none of them.

    Args:
        spec: the weight space.
        found: similarities of the groups that were seen; others stay as they are.
        scalings: per group the sign scaling that flips its odd part.
    """
    element: Element = {}
    for name, group in sorted(spec.groups.items(), key=lambda item: len(item[1].within)):
        total = _total(spec, name, found)
        if total is None:
            continue
        source = source_index(unit_cell(spec, name), element)
        order = torch.arange(len(total), device=total.device) if source is None else source.flatten()
        blocks = _diagonal(total[:, order], group.size)
        element[name] = assign(blocks).view(spec.unit_shape(name))
        scaling = (scalings or {}).get(name)
        odd = found[name].odd if name in found else None
        if scaling is not None and odd is not None:
            chosen = _diagonal(odd[:, order], group.size).gather(-1, element[name].view(-1, group.size, 1))
            element[scaling] = torch.where(chosen < 0, -1.0, 1.0).float().view(spec.unit_shape(name))
    return element


def _total(
    spec: WeightSpec, name: str, found: Mapping[str, Similarities]
) -> Float[Tensor, "units units"] | None:
    """How alike the units of a group are, with all that is nested in them; None if nothing of it was seen."""
    own = [found[name].best] if name in found else []
    within = (*spec.groups[name].within, name)
    inner = (inner for inner, group in spec.groups.items() if group.within == within)
    parts = [(table, spec.groups[at].size) for at in inner if (table := _total(spec, at, found)) is not None]
    return (
        sum([*own, *(_best_inner(*part) for part in parts)], start=torch.zeros(())) if own or parts else None
    )


def _best_inner(table: Float[Tensor, "units units"], size: int) -> Float[Tensor, "outer outer"]:
    """For every pair of outer units, the largest sum over pairs of inner ones."""
    outer = len(table) // size
    blocks = table.view(outer, size, outer, size).transpose(1, 2).reshape(-1, size, size)
    chosen = blocks.gather(-1, assign(blocks)[..., None])
    return chosen.sum((-1, -2)).view(outer, outer)


def _diagonal(table: Float[Tensor, "units units"], size: int) -> Float[Tensor, "outer size size"]:
    """The similarities within each outer unit and the one that takes its place."""
    outer = len(table) // size
    return table.reshape(outer, size, outer, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _match_unseen(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    element: Element,
    found: Mapping[str, Similarities],
) -> Element:
    """The element, with those families of groups that no value shows matched by their weights."""
    seen = {name for group in found for name in (group, *spec.groups[group].within)}
    unseen = [
        name
        for name, group in spec.groups.items()
        if not group.within and name not in seen and group.size > 1
    ]
    if not unseen:
        return element
    from weightspace.align._families import match_family

    for name in unseen * _SWEEPS:
        moved = spec.act(element, weights)
        element = spec.compose(match_family(spec, name, reference, moved), element)
    return element
