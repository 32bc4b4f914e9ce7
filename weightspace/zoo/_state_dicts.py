"""A population from a user's own state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError, SpecError
from weightspace.nets import architecture_of
from weightspace.spec import WeightSpec
from weightspace.zoo._zoo import Population, split_items


def population_from_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    module: nn.Module | None,
    spec: WeightSpec,
    labels: Mapping[str, Any],
    metrics: Mapping[str, Any],
    source: Sequence[int] | np.ndarray | None,
    fractions: Sequence[float],
    seed: int,
) -> Population:
    """Stack state dicts into the arrays of a population; see ``Zoo.from_state_dicts``."""
    count = len(state_dicts)
    if count == 0:
        raise ConfigError("state_dicts: expected at least one, found none")
    flat = torch.stack([_flat(spec, state, row) for row, state in enumerate(state_dicts)])
    items = np.arange(count) if source is None else _values("source", source, count, np.int64)
    return Population(
        spec=spec,
        weights=flat.float().numpy(),
        network=np.arange(count, dtype=np.int64),
        step=np.zeros(count, dtype=np.int64),
        source=items.astype(np.int64),
        view=_views(items),
        split=split_items(items, fractions, seed),
        metrics={name: _values(f"metrics/{name}", v, count, np.float32) for name, v in metrics.items()},
        labels={name: _values(f"labels/{name}", v, count) for name, v in labels.items()},
        architecture=None if module is None else architecture_of(module),
    )


def _flat(spec: WeightSpec, state: Mapping[str, Tensor], row: int) -> Tensor:
    try:
        return spec.flatten({name: tensor.detach().cpu() for name, tensor in state.items()})
    except SpecError as error:
        raise SpecError(f"state_dicts[{row}]: {error}") from None


def _values(name: str, values: Any, count: int, dtype: Any = None) -> np.ndarray:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.shape != (count,) or array.dtype.kind not in "biuf":
        raise ConfigError(
            f"{name}: expected {count} numbers, found shape {list(array.shape)} of {array.dtype}"
        )
    return array.astype(dtype or (np.float32 if array.dtype.kind == "f" else np.int64))


def _views(items: np.ndarray) -> np.ndarray:
    """The how-manieth network of its item each one is."""
    order = np.argsort(items, kind="stable")
    ordered = items[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(items)])
    view = np.empty(len(items), dtype=np.int64)
    view[order] = np.arange(len(items)) - np.repeat(starts, lengths)
    return view
