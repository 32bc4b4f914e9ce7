"""Zoos to test with."""

from dataclasses import replace

import numpy as np
import pytest

from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo


@pytest.fixture
def rich_zoo() -> Zoo:
    """All that the format can hold: two populations, two checkpoints per network, a NaN, a recipe."""
    zoo = tiny_zoo(networks=10)
    inr = zoo["inr"]
    network = np.repeat(np.arange(10, dtype=np.int64), 2)
    metrics = {"psnr": np.linspace(10, 30, 20, dtype=np.float32), "loss": np.full(20, 0.5, np.float32)}
    metrics["psnr"][3] = np.nan
    twice = replace(
        inr,
        weights=np.concatenate([inr.weights, 2 * inr.weights])[np.argsort(np.r_[0:10, 0:10], kind="stable")],
        network=network,
        step=np.tile(np.array([5, 9], dtype=np.int64), 10),
        metrics=metrics,
        hyperparameters={"learning_rate": np.linspace(1e-4, 1e-3, 10, dtype=np.float32)},
    )
    return Zoo(
        {"inr": twice, "second": tiny_zoo(networks=4, seed=1)["inr"]},
        zoo.sources,
        {"name": "rich", "seed": 3},
    )
