"""Batches refuse what does not belong together."""

import re

import pytest
import torch

from weightspace.datasets.augment import Batch, Signal
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import WeightSpec
from weightspace.testing import random_weights

SPEC = WeightSpec.mlp([2, 4, 1])


def test_shapes_and_shares():
    batch = Batch(SPEC, random_weights(SPEC, (3, 5)), torch.tensor([2, 0, 1]), classes=3)
    assert (len(batch), batch.shape, batch.device.type, batch.signal) == (3, (3, 5), "cpu", Signal(0.0, 0.5))
    assert batch.has_classes
    assert batch.shares().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    shares = batch.with_(targets=torch.rand(3, 3))
    assert shares.has_classes
    assert shares.shares() is shares.targets
    assert not batch.with_(targets=torch.rand(3, 2)).has_classes
    assert not batch.with_(targets=None).has_classes
    with pytest.raises(
        ConfigError, match=r"expected class numbers as targets, found float32 of shape \[3, 2\]"
    ):
        batch.with_(targets=torch.rand(3, 2)).shares()


@pytest.mark.parametrize(
    ("shape", "targets", "error", "message"),
    [
        (
            (),
            None,
            ConfigError,
            "batch: expected weights with a leading batch axis, found those of one network",
        ),
        ((3,), torch.zeros(2), ConfigError, "batch: expected targets of 3 networks, found shape [2]"),
        ((3,), torch.tensor(1.0), ConfigError, "batch: expected targets of 3 networks, found shape []"),
        (
            (3,),
            random_weights(SPEC, (4,)),
            ConfigError,
            "batch: expected targets of 3 networks, found shape [4, 4, 2]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(shape, targets, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Batch(SPEC, random_weights(SPEC, shape), targets)


def test_weights_of_another_space_are_refused():
    with pytest.raises(SpecError, match=r"layers\.0\.weight"):
        Batch(SPEC, random_weights(WeightSpec.mlp([2, 5, 1]), (3,)))


def test_a_copy_has_no_other_fields():
    batch = Batch(SPEC, random_weights(SPEC, (2,)))
    with pytest.raises(TypeError, match="batch: it has no field weigths"):
        batch.with_(weigths=batch.weights)
