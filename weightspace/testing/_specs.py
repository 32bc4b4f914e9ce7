"""Specs to test with, from the plain to the contrived, and random weights for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightspace.spec import Cell, Dim, Frozen, Group, TensorSpec, Weights, WeightSpec


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


def random_weights(
    spec: WeightSpec, batch: Sequence[int] = (), seed: int = 0, dtype: torch.dtype = torch.float32
) -> Weights:
    """Standard normal weights with the given leading axes."""
    generator = torch.Generator().manual_seed(seed)
    return spec.unflatten(torch.randn(*batch, spec.num_parameters, generator=generator, dtype=dtype))
