"""Tiny zoos to test with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weightspace.nets import MLP, coordinate_grid, evaluate_batch
from weightspace.zoo import Population, Source, Zoo, spec_of, split_items


def tiny_zoo(
    networks: int = 40, views: int = 2, seed: int = 0, classes: int = 3, hidden: Sequence[int] = (8, 8)
) -> Zoo:
    """A zoo of untrained SIRENs, 2-8-8-1, in memory; the stored signals are what the networks render.

    The label is the item's number modulo ``classes``; the last weight's mean depends on it, so that a model
    can learn something.
    """
    net = MLP((2, *hidden, 1), output_offset=0.5)
    spec = spec_of(net)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(networks, spec.num_parameters, generator=generator) * 0.1
    source = np.arange(networks, dtype=np.int64) // views
    label = source % classes
    weights = spec.unflatten(flat)
    weights[f"layers.{len(hidden)}.weight"] += 0.2 * torch.from_numpy(label)[:, None, None]
    with torch.no_grad():
        rendered = evaluate_batch(net, weights, coordinate_grid((6, 6)))
    items = (rendered[::views].clamp(0, 1) * 255).round().to(torch.uint8).view(-1, 6, 6).numpy()
    population = Population(
        spec=spec,
        weights=spec.flatten(weights).numpy(),
        network=np.arange(networks, dtype=np.int64),
        step=np.full(networks, 5, dtype=np.int64),
        source=source,
        view=np.arange(networks, dtype=np.int64) % views,
        split=split_items(source, (0.6, 0.2, 0.2), seed),
        metrics={"psnr": np.linspace(20, 40, networks, dtype=np.float32)},
        labels={"label": label},
        architecture={"kind": "mlp", "arguments": net.arguments()},
        protocol={"preset": "none", "w0": 30.0},
    )
    return Zoo({"inr": population}, {"tiny": Source(items, np.arange(len(items), dtype=np.int64))})
