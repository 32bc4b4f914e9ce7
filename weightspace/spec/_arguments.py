"""What users hand over: elements and weights, checked against a spec before anything is computed with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._cells import value_shape
from weightspace.spec._types import Scaling, WeightSpec


def check_element(spec: WeightSpec, element: object, *, what: str = "element") -> tuple[int, ...]:
    """The batch shape to which an element's values broadcast, if they are an element of the spec's group.

    Everything is looked at, also whether each row is a permutation: this takes a tenth of the time of
    :func:`act`. On an accelerator it waits for the values.

    Args:
        spec: the weight space.
        element: permutations per group and values per scaling.
        what: what messages call it.

    Raises:
        SpecError: a name that is neither a group nor a scaling; what is no tensor, of the wrong shape or type;
            batch shapes that do not broadcast; a row that is no permutation, a sign other than 1 and -1, a
            positive factor that is not.
    """
    batch: Sequence[int] = ()
    for name, value in _as_dict(what, element).items():
        if name not in spec.groups and name not in spec.scalings:
            raise SpecError(f"{what}: {name!r} is neither a group nor a scaling of this spec")
        scaling = spec.scalings.get(name)
        tensor = _as_tensor(f"{what}: {name!r}", value)
        expected = value_shape(spec, spec.groups[name if scaling is None else scaling.group])
        found = tuple(tensor.shape)
        split = len(found) - len(expected)
        if split < 0 or found[split:] != expected:
            raise SpecError(f"{what}: {name!r} should end in shape {list(expected)}, found {list(found)}")
        _check_values(f"{what}: {name!r}", scaling, tensor.detach())
        try:
            batch = torch.broadcast_shapes(batch, found[:split])
        except RuntimeError:
            raise SpecError(
                f"{what}: {name!r} has batch shape {list(found[:split])}, others {list(batch)}"
            ) from None
    return tuple(batch)


def check_weights(
    spec: WeightSpec, weights: object, *, scaled_by: Mapping[str, object] | None = None
) -> tuple[int, ...]:
    """The common leading batch axes of ``weights``, if they are tensors of the spec.

    Args:
        spec: the weight space.
        weights: some or all tensors and constants of the spec.
        scaled_by: an element; what its scalings multiply or shift must be of a floating type, where whole numbers
            would be cut off.

    Raises:
        SpecError: an unknown name, what is no tensor, of the wrong shape or type, batch shapes that differ, or
            tied tensors that differ.
    """
    batch = batch_of(spec, weights)
    named = _as_dict("weights", weights)
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_complex() and spec.primary(name) is not None:
            raise SpecError(f"weights: {name!r} should hold real numbers, found {_type(value)}")
    for name, tensor in spec.tensors.items():
        if tensor.aliases:
            _check_tied([at for at in (name, *tensor.aliases) if at in named], named)
    for name in scaled_by or ():
        scaling = spec.scalings.get(name)
        if scaling is not None:
            _check_scalable(spec, scaling, named)
    return batch


def batch_of(spec: WeightSpec, weights: object) -> tuple[int, ...]:
    """The common leading batch axes of ``weights``: names and shapes alone are looked at."""
    batch: tuple[int, ...] | None = None
    for name, value in _as_dict("weights", weights).items():
        shape = spec.shape_of(name)
        found = tuple(_as_tensor(f"weights: {name!r}", value).shape)
        split = len(found) - len(shape)
        if split < 0 or found[split:] != shape:
            raise SpecError(f"weights: {name!r} should end in shape {list(shape)}, found {list(found)}")
        if batch is not None and found[:split] != batch:
            raise SpecError(f"weights: {name!r} has batch shape {list(found[:split])}, others {list(batch)}")
        batch = found[:split]
    return batch or ()


def joint_batch(what: str, first: tuple[int, ...], other: str, second: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which two batch shapes broadcast.

    Raises:
        SpecError: they do not.
    """
    try:
        return tuple(torch.broadcast_shapes(first, second))
    except RuntimeError:
        raise SpecError(
            f"{what}: batch shape {list(first)} does not broadcast against {other} {list(second)}"
        ) from None


def _as_dict(what: str, values: object) -> Mapping[str, object]:
    if not isinstance(values, Mapping):
        raise SpecError(f"{what}: expected a dict of tensors, found {type(values).__name__}")
    return values


def _as_tensor(what: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise SpecError(f"{what} should be a torch.Tensor, found {type(value).__name__}")
    return value


# -- elements ----------------------------------------------------------------------------------------------


def _check_values(what: str, scaling: Scaling | None, value: Tensor) -> None:
    whole = scaling is None or scaling.kind == "phase"
    fits = _is_whole(value) if whole else _is_whole(value) or value.is_floating_point()
    if not fits:
        wanted = "whole numbers (int64)" if whole else "numbers of a floating type"
        raise SpecError(f"{what} should hold {wanted}, found {_type(value)}")
    if not value.numel() or value.is_meta:
        return
    if scaling is None:
        _check_permutations(what, value)
    elif scaling.kind == "sign":
        low, high = value.abs().aminmax()
        if not low == 1 == high:
            raise _outlier(f"{what} should hold 1 and -1", value, value.abs() == 1)
    elif scaling.kind == "positive":
        low, high = value.aminmax()
        if not (low > 0 and high < math.inf):
            raise _outlier(
                f"{what} should hold finite factors above 0", value, (value > 0) & value.isfinite()
            )


def _is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _outlier(what: str, value: Tensor, fits: Tensor) -> SpecError:
    where = fits.logical_not().nonzero()[0].tolist()
    return SpecError(f"{what}, found {value[tuple(where)].item()} at {where}")


def _check_permutations(what: str, value: Tensor) -> None:
    size = value.shape[-1]
    if value.device.type == "cpu":  # where NumPy sorts short rows several times as fast
        rows = value.numpy()
        wrong = np.sort(rows, axis=-1) != np.arange(size)
    else:
        ordered = value.sort(dim=-1).values != torch.arange(size, device=value.device)
        if not bool(ordered.any()):
            return
        wrong = ordered.cpu().numpy()
    if not wrong.any():
        return
    where = np.argwhere(wrong)[0][:-1].tolist()
    row = value[tuple(where)].tolist()
    stray = next((unit for unit in row if not 0 <= unit < size), None)
    twice = next((unit for unit in row if row.count(unit) > 1), None)
    found = f"{twice} more than once" if stray is None else f"{stray}"
    place = f" in row {where}" if where else ""
    raise SpecError(f"{what} should be a permutation of 0 to {size - 1}, found {found}{place}")


# -- weights -----------------------------------------------------------------------------------------------


def _check_tied(names: Sequence[str], weights: Mapping[str, object]) -> None:
    for name in names[1:]:
        first, other = weights[names[0]], weights[name]
        assert isinstance(first, Tensor)
        assert isinstance(other, Tensor)
        shared = first is other or (
            first.data_ptr() == other.data_ptr() != 0
            and (first.stride(), first.dtype) == (other.stride(), other.dtype)
        )
        if not shared and not bool(torch.isclose(first, other.to(first), 0, 0, equal_nan=True).all()):
            raise SpecError(f"weights: {name!r} is tied to {names[0]!r}, expected equal values, found others")


def _check_scalable(spec: WeightSpec, scaling: Scaling, weights: Mapping[str, object]) -> None:
    for place in (*scaling.exponents, *scaling.shifts):
        for name in (place.tensor, *spec.tensors[place.tensor].aliases):
            value = weights.get(name)
            if isinstance(value, Tensor) and not value.is_floating_point():
                raise SpecError(
                    f"weights: {scaling.name!r} scales {name!r}, expected a floating type, found {_type(value)}"
                )
