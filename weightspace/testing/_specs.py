"""Specs to test with, from the plain to the contrived, and random weights for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from weightspace.spec import (
    Cell,
    Dim,
    Exponent,
    Frozen,
    Group,
    Scaling,
    TensorSpec,
    Weights,
    WeightSpec,
)
from weightspace.spec._types import ScalingKind


def tiny_specs() -> dict[str, WeightSpec]:
    """Feed-forward specs small enough for brute force, by name."""
    return {
        "2-4-1 sine": WeightSpec.mlp([2, 4, 1], activation="sine", w0=30.0),
        "2-4-4-1 tanh": WeightSpec.mlp([2, 4, 4, 1], activation="tanh"),
        "2-4-4-4-1 relu": WeightSpec.mlp([2, 4, 4, 4, 1], activation="relu"),
        "3-5-2 gaussian": WeightSpec.mlp([3, 5, 2], activation="gaussian", w0=2.0),
        "2-3-2 without bias": WeightSpec.mlp([2, 3, 2], activation="relu", bias=False),
        "linear": WeightSpec.mlp([3, 2]),
    }


def mixed_spec() -> WeightSpec:
    """What feed-forward networks lack: nested and repeated groups, two cells in one tensor, a statistic.

    ``heads`` own ``features`` each; ``recurrent`` maps the stream onto itself; ``fused`` holds a cell of
    heads-by-features rows and a cell of fixed rows.
    """
    heads, features, stream = 3, 2, 4
    query = Cell(
        (
            Dim(0, features * stream, heads, "heads"),
            Dim(0, stream, features, "features", (0,)),
            Dim(1, 1, stream, "stream"),
        )
    )
    rows = heads * features
    fixed_rows = Cell((Dim(0, stream, 2), Dim(1, 1, stream, "stream")), rows * stream)
    return WeightSpec(
        Frozen(
            {
                "stream": Group("stream", stream),
                "heads": Group("heads", heads),
                "features": Group("features", features, ("heads",)),
            }
        ),
        Frozen(
            {
                "query": TensorSpec((rows, stream), (query,)),
                "fused": TensorSpec((rows + 2, stream), (query, fixed_rows)),
                "recurrent": TensorSpec.dense((stream, stream), ["stream", "stream"]),
                "running_mean": TensorSpec.dense((stream,), ["stream"], kind="statistic"),
            }
        ),
    )


def sine_specs() -> dict[str, WeightSpec]:
    """Sine layers whose shifted bias several scalings flip, by name.

    ``gained`` is ``up(a * sin(layer(x)))`` with signs of (a, up) and of (layer, up); ``turned`` has odd steps that
    flip what enters instead of what leaves, so that they flip the bias as well; ``nested`` has units within heads,
    and signs of both.
    """
    units = Group("units", 4)
    tensors = {
        "gain": TensorSpec.dense((4,), ["units"]),
        "layer.weight": TensorSpec.dense((4, 3), ["units", None]),
        "layer.bias": TensorSpec.dense((4,), ["units"]),
        "up.weight": TensorSpec.dense((2, 4), [None, "units"]),
    }
    entering = (Exponent("layer.weight", 0, 0), Exponent("layer.bias", 0, 0))
    gain, up, bias = Exponent("gain", 0, 0), Exponent("up.weight", 0, 1), Exponent("layer.bias", 0, 0)
    factor = _scaling("positive", units, gain, Exponent("up.weight", 0, 1, -1))
    signs = [
        _scaling("sign", units, gain, up, name="sign of the gain"),
        _scaling("sign", units, *entering, up, name="sign of the layer"),
    ]
    leaving = _scaling("phase", units, up, shifts=(bias,))
    turning = _scaling("phase", units, *entering, shifts=(bias,))
    return {
        "gained": WeightSpec.build([units], tensors, [factor, *signs, leaving]),
        "turned": WeightSpec.build([units], tensors, [factor, *signs, turning]),
        "nested": _nested_sine(),
    }


def _nested_sine() -> WeightSpec:
    heads, units = Group("heads", 3), Group("units", 2, ("heads",))
    rows = (Dim(0, 2, 3, "heads"), Dim(0, 1, 2, "units", (0,)))
    weight = (Dim(0, 4, 3, "heads"), Dim(0, 2, 2, "units", (0,)), Dim(1, 1, 2))
    tensors = {
        "weight": TensorSpec((6, 2), (Cell(weight),)),
        "bias": TensorSpec((6,), (Cell(rows),)),
        "up": TensorSpec((6,), (Cell(rows),)),
        "out": TensorSpec.dense((3,), ["heads"]),
    }
    entering = ("weight", "bias")
    signs = [
        _scaling("sign", heads, *(Exponent(name, 0, 0) for name in (*entering, "out"))),
        _scaling("sign", units, *(Exponent(name, 0, 1) for name in (*entering, "up"))),
    ]
    phase = _scaling("phase", units, Exponent("up", 0, 1), shifts=(Exponent("bias", 0, 1),))
    return WeightSpec.build([heads, units], tensors, [*signs, phase])


def _scaling(
    kind: ScalingKind, group: Group, *places: Exponent, shifts: tuple[Exponent, ...] = (), name: str = ""
) -> Scaling:
    step = math.pi / 3 if shifts else 0.0
    return Scaling(name or f"{kind}({group.name})", group.name, kind, places, shifts, step)


def random_weights(
    spec: WeightSpec, batch: Sequence[int] = (), seed: int = 0, dtype: torch.dtype = torch.float32
) -> Weights:
    """Standard normal weights with the given leading axes."""
    generator = torch.Generator().manual_seed(seed)
    return spec.unflatten(torch.randn(*batch, spec.num_parameters, generator=generator, dtype=dtype))


def random_spec(seed: int, largest: int = 14) -> WeightSpec:
    """A spec of at most ``largest`` parameters that no network need have: for proofs by brute force.

    Groups of 1 to 3 units, one of them perhaps within another; tensors that concatenate cells in which groups
    repeat, nest and meet fixed indices, their dims in any order of strides.
    """
    rng = np.random.default_rng(seed)
    outer, other = (Group(name, int(rng.integers(1, 4))) for name in ("outer", "other"))
    inner = Group("inner", int(rng.integers(1, 3)), ("outer",) if rng.random() < 0.7 else ())
    groups = [outer, other, inner]
    tensors: dict[str, TensorSpec] = {}
    left = largest
    for name in ("first", "second", "third"):
        cells: list[Cell] = []
        offset = 0
        for _ in range(int(rng.integers(1, 3))):
            names = _random_indices(rng, inner)
            sizes = [2 if at is None else {g.name: g.size for g in groups}[at] for at in names]
            if math.prod(sizes) <= left - offset:
                cells.append(_packed(rng, names, sizes, inner, offset))
                offset += cells[-1].numel
        if cells:
            tensors[name] = TensorSpec((offset,), tuple(cells))
            left -= offset
    used = {dim.group for tensor in tensors.values() for cell in tensor.cells for dim in cell.dims}
    return WeightSpec.build([group for group in groups if group.name in used], tensors)


def _random_indices(rng: np.random.Generator, inner: Group) -> list[str | None]:
    """Names of groups, None for a fixed index; with an inner group, what it is within."""
    names: list[str | None] = list(rng.choice(["outer", "other", "inner"], int(rng.integers(0, 4))).tolist())
    if inner.within and "inner" in names and "outer" not in names:
        names[-1:] = ["outer"] if names.count("inner") == len(names) > 1 else [*names[-1:], "outer"]
    return [*names, None] if rng.random() < 0.3 else names


def _packed(
    rng: np.random.Generator, names: list[str | None], sizes: list[int], inner: Group, offset: int
) -> Cell:
    """One cell that fills a stretch of a vector, with its dims in a random order of strides."""
    order = rng.permutation(len(names)).tolist()
    strides = dict.fromkeys(order, 1)
    step = 1
    for at in reversed(order):
        strides[at], step = step, step * sizes[at]
    kept = [at for at in order if names[at] is not None or sizes[at] > 1]
    parents = [place for place, at in enumerate(kept) if names[at] == "outer"]
    dims = [
        Dim(
            0,
            strides[at],
            sizes[at],
            names[at],
            (int(rng.choice(parents)),) if names[at] == inner.name and inner.within else (),
        )
        for at in kept
    ]
    return Cell(tuple(dims), offset)
