"""Whether networks of two populations still compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weightspace.nets import build
from weightspace.spec import output_change
from weightspace.zoo._zoo import Population

POINTS, IMAGES = 1024, 64  # random inputs per network; images cost more


def largest_change(
    before: Population, after: Population, rows: Sequence[int] | np.ndarray, *, seed: int = 0
) -> float | None:
    """The largest change of the output of some networks, relative to the largest absolute output of each.

    In float64 and on random inputs, so that what is left is the rounding of the weights themselves.

    Args:
        before: the networks.
        after: the same networks, of the same architecture, with other weights.
        rows: which of them; their weights are finite.
        seed: of the inputs.

    Returns:
        None where the population does not say how to rebuild its networks.

    Example:
        >>> from dataclasses import replace
        >>> from weightspace.testing import tiny_zoo
        >>> inr = tiny_zoo()["inr"]
        >>> weights = inr.weights_of(slice(None))
        >>> flipped = inr.spec.flatten(inr.spec.act({"sign(hidden0)": -torch.ones(8)}, weights))
        >>> largest_change(inr, replace(inr, weights=flipped.numpy()), [0, 1])
        0.0
        >>> largest_change(inr, replace(inr, weights=-inr.weights), [0, 1]) > 0.1
        True
    """
    if before.architecture is None:
        return None
    net = build(before.architecture)
    count = POINTS if len(net.input_shape) == 1 else IMAGES
    inputs = net.random_inputs(count, torch.Generator().manual_seed(seed))
    pairs = ((before.weights_of(int(row)), after.weights_of(int(row))) for row in rows)
    return max((output_change(net, old, new, inputs) for old, new in pairs), default=0.0)
