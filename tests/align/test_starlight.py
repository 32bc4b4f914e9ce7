"""Starlight: a star whose paths to all networks, also to one that it was not trained with, are lower than theirs."""

from itertools import combinations

import pytest
import torch

from weightspace.align import starlight, weight_matching
from weightspace.errors import ConfigError, DataError, SpecError


@pytest.fixture(scope="module")
def found(trained):
    """The star of four of the networks: the last one is held out."""
    return starlight(
        trained.spec,
        trained.networks[:4],
        module=trained.module,
        data=trained.data,
        epochs=40,
        learning_rate=3e-3,
    )


def test_paths_to_the_star_are_lower_than_those_between_networks(trained, found):
    aligned, report = found
    between = max(trained.barrier(a, b) for a, b in combinations(aligned, 2))
    to_star = max(trained.barrier(report.center, network) for network in aligned)
    assert to_star < 0.3 * between
    assert trained.loss(report.center) < 0.1  # it is a solution itself


def test_so_is_the_path_to_a_network_that_was_held_out(trained, found):
    aligned, report = found
    held_out = trained.networks[4]
    onto_star, _ = weight_matching(trained.spec, report.center, held_out)
    onto_each = [weight_matching(trained.spec, network, held_out)[0] for network in aligned]
    barriers = [trained.barrier(a, b, trained.test) for a, b in zip(aligned, onto_each, strict=True)]
    assert trained.barrier(report.center, onto_star, trained.test) < min(barriers)


def test_networks_are_aligned_onto_the_star(trained, found):
    """From where they end, weight matching onto the star has nothing left to do."""
    aligned, report = found
    for network in aligned:
        _, left = weight_matching(trained.spec, report.center, network, restarts=1)
        assert left.distance_after == left.distance_before


def test_the_star_of_networks_with_batch_norm_is_whole(trained_with_norm):
    """With statistics of its own, estimated in evaluation mode from the data."""
    module, networks = trained_with_norm.module, trained_with_norm.networks
    _, report = starlight(
        trained_with_norm.spec, networks, module=module, data=trained_with_norm.data, epochs=5
    )
    star = report.center
    assert list(star) == list(networks[0])
    inputs = torch.cat([inputs for inputs, _ in trained_with_norm.data])
    expected = torch.nn.functional.linear(inputs, star["0.weight"], star["0.bias"]).mean(0)
    torch.testing.assert_close(star["1.running_mean"], expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_is_refused(trained):
    given = {"module": trained.module, "data": trained.data}
    with pytest.raises(ConfigError, match="networks: expected at least two to align, found 1"):
        starlight(trained.spec, trained.networks[:1], **given)
    with pytest.raises(ConfigError, match="rematch: expected more than 0, found 0"):
        starlight(trained.spec, trained.networks, **given, rematch=0)
    with pytest.raises(DataError, match="data: expected at least one batch, found none"):
        starlight(trained.spec, trained.networks, module=trained.module, data=[])
    wrong = {**trained.networks[1], "0.bias": torch.full((24,), float("nan"))}
    with pytest.raises(
        SpecError, match=r"network 1: expected finite values, but tensor '0\.bias' has others"
    ):
        starlight(trained.spec, [trained.networks[0], wrong], **given)
