"""The straight-through estimator: lower midpoints than weight matching, never higher ones, and what it refuses."""

import pytest
import torch

from weightspace.align import straight_through, weight_matching
from weightspace.align._straight_through import _relative, _straight
from weightspace.errors import ConfigError, DataError, SpecError


def search(trained, *networks, **options):
    return straight_through(trained.spec, *networks, module=trained.module, data=trained.data, **options)


def test_values_are_those_of_the_permuted_and_gradients_go_to_the_free():
    free, moved = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([5.0, 7.0], requires_grad=True)
    value = _straight(moved, free)
    value.square().sum().backward()
    assert value.tolist() == [5.0, 7.0]
    assert free.grad.tolist() == [10.0, 14.0]
    assert moved.grad is None


def test_steps_are_in_units_of_the_tensors():
    """3 and 4 have the root mean square 5 / sqrt(2)."""
    (group,) = _relative({"weight": torch.tensor([3.0, 4.0])}, 0.1)
    assert group["lr"] == pytest.approx(0.5 / 2**0.5)


@pytest.mark.parametrize("pair", [(0, 1), (2, 3)])
def test_midpoints_are_lower_than_those_of_weight_matching(trained, pair):
    a, b = (trained.networks[number] for number in pair)
    plain, near = weight_matching(trained.spec, a, b)
    aligned, report = search(trained, a, b)
    assert trained.loss(trained.between(a, aligned)) < 0.9 * trained.loss(trained.between(a, plain))
    assert report.distance_after > near.distance_after
    assert 0 < report.sweeps <= 10 * len(trained.data)


def test_midpoints_are_never_higher(trained):
    """Steps so wild that the free weights forget A: then what weight matching found is returned."""
    a, b = trained.networks[:2]
    _, plain = weight_matching(trained.spec, a, b)
    _, report = search(trained, a, b, learning_rate=1e4, epochs=2)
    assert report.sweeps == 0
    for name, value in plain.element.items():
        assert torch.equal(report.element[name], value)


def test_batch_norm_takes_the_statistics_of_the_batch(trained_with_norm):
    """Those that are stored would say nothing of a midpoint; they move with their units, and stay as they were."""
    spec, (a, b) = trained_with_norm.spec, trained_with_norm.networks
    plain, _ = weight_matching(spec, a, b)
    state = {name: w.clone() for name, w in trained_with_norm.module.state_dict().items()}
    aligned, report = search(trained_with_norm, a, b)
    for name, w in trained_with_norm.module.state_dict().items():
        assert torch.equal(w, state[name])
    losses = [trained_with_norm.loss(trained_with_norm.between(a, moved)) for moved in (aligned, plain)]
    assert losses[0] < losses[1]
    group = next(dim.group for cell in spec.tensors["1.running_mean"].cells for dim in cell.dims)
    assert torch.equal(aligned["1.running_mean"], b["1.running_mean"][report.element[group]])


def test_what_cannot_be_done_is_refused(trained, trained_with_norm):
    a, b = trained.networks[:2]
    with pytest.raises(ConfigError, match="epochs: expected more than 0, found 0"):
        search(trained, a, b, epochs=0)
    with pytest.raises(ConfigError, match=r"symmetries: expected some of .*, found 'rotation'"):
        search(trained, a, b, symmetries=("rotation",))
    with pytest.raises(SpecError, match=r"reference: tensor '0\.bias' is missing"):
        search(trained, {name: w for name, w in a.items() if name != "0.bias"}, b)
    single = [(inputs[:1], targets[:1]) for inputs, targets in trained.data]
    with pytest.raises(DataError, match="data: expected batches of several items"):
        straight_through(
            trained_with_norm.spec, *trained_with_norm.networks, module=trained_with_norm.module, data=single
        )
