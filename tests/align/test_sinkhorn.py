"""Sinkhorn re-basin: its gradient, what it finds, and what it refuses."""

import math

import pytest
import torch

from weightspace.align import align_networks, doubly_stochastic, sinkhorn, weight_matching
from weightspace.errors import ConfigError, DataError, SpecError
from weightspace.spec import Group, TensorSpec, WeightSpec
from weightspace.testing import planted, random_weights

DOUBLE = torch.float64


def unrolled(scores, iterations=500):
    """The slow oracle: gradients through every iteration."""
    for _ in range(iterations):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()


def draw(*shape, scale=1.0, seed=0, dtype=DOUBLE):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_two_by_two_by_hand():
    """P[0, 0] = sigmoid((a + d - b - c) / 2), and so are its derivatives."""
    scores = torch.tensor([[0.5, -1.0], [0.25, 2.0]], dtype=DOUBLE, requires_grad=True)
    matrix = doubly_stochastic(scores, 300)
    share = 1 / (1 + math.exp(-(0.5 + 2.0 + 1.0 - 0.25) / 2))
    torch.testing.assert_close(
        matrix, torch.tensor([[share, 1 - share], [1 - share, share]], dtype=DOUBLE), rtol=1e-12, atol=0
    )
    matrix[0, 0].backward()
    slope = share * (1 - share) / 2
    expected = torch.tensor([[slope, -slope], [-slope, slope]], dtype=DOUBLE)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_implicit_gradients_are_those_through_all_iterations(scale):
    scores, weight = draw(3, 6, 6, scale=scale), draw(3, 6, 6, seed=1)
    gradients = []
    for function in (doubly_stochastic, unrolled):
        leaf = scores.clone().requires_grad_()
        (function(leaf, 500) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_gradients_are_those_of_finite_differences():
    scores = draw(4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: doubly_stochastic(leaf, 200), scores)


def test_gradients_vanish_and_stay_finite_at_a_permutation():
    """Where the system to be solved is singular, in the dtype in which weights are."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    scores = (200 * torch.eye(40)[order]).requires_grad_()
    (doubly_stochastic(scores) * draw(40, 40, dtype=torch.float32)).sum().backward()
    assert scores.grad.abs().max() < 1e-4


def test_a_permutation_of_recurrent_units_is_recovered():
    """A group on both dims of one tensor: the action is quadratic in its matrix."""
    tensors = {
        "input": TensorSpec.dense((12, 4), ["units", None]),
        "recurrent": TensorSpec.dense((12, 12), ["units", "units"]),
        "output": TensorSpec.dense((3, 12), [None, "units"]),
    }
    spec = WeightSpec.build([Group("units", 12)], tensors)
    generator = torch.Generator().manual_seed(0)
    a = random_weights(spec)
    noisy = {name: w + 0.03 * torch.randn(w.shape, generator=generator) for name, w in a.items()}
    element = spec.random_element(symmetries=["permutation"], generator=generator)
    _, report = sinkhorn(spec, a, spec.act(element, noisy))
    assert torch.equal(report.element["units"], element["units"].argsort())
    assert report.sweeps < 100  # it knows when it is done


def test_the_loss_is_lowered_where_it_is_asked_for(trained):
    """At the midpoint far below weight matching's, and along the path; both at the price of distance."""
    a, b = trained.networks[:2]
    plain, _ = weight_matching(trained.spec, a, b)
    near, report = sinkhorn(trained.spec, a, b)
    limit = trained.loss(trained.between(a, plain))
    for objective in ("midpoint", "random"):
        (_, moved), found = align_networks(
            trained.spec, [a, b], "sinkhorn", module=trained.module, data=trained.data, objective=objective
        )
        assert trained.loss(trained.between(a, moved)) < 0.9 * limit
        assert found.distance_after[1] > report.distance_after
    assert trained.loss(trained.between(a, near)) < 0.7 * trained.loss(trained.between(a, b))


def test_what_loaders_shuffle_depends_on_the_seed_alone(trained):
    a, b = trained.networks[:2]
    items = torch.utils.data.TensorDataset(*trained.test[0])
    loader = torch.utils.data.DataLoader(items, batch_size=200, shuffle=True)
    found = []
    for state, seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(state)
        with torch.no_grad():
            _, report = sinkhorn(
                trained.spec,
                a,
                b,
                module=trained.module,
                data=loader,
                objective="random",
                steps=30,
                seed=seed,
            )
        found.append(torch.cat(list(report.element.values())))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_half_precision_is_searched_in_single():
    case = planted("mlp", 2)
    half = [{name: w.half() for name, w in network.items()} for network in case.networks]
    aligned, report = sinkhorn(case.spec, *half)
    for name, value in case.spec.invert(case.elements[1]).items():
        assert torch.equal(report.element[name], value)
    assert {w.dtype for w in aligned.values()} == {torch.float16}


def test_what_cannot_be_done_is_refused():
    case = planted("mlp", 2)
    a, b = case.networks
    for options, message in (
        ({"objective": "midpoint"}, "objective: 'midpoint' needs a module and data, found no module"),
        ({"objective": "random", "module": case.module}, "'random' needs a module and data, found no data"),
        ({"temperature": 0.0}, "temperature: expected more than 0, found 0.0"),
        ({"steps": 0}, "steps: expected more than 0, found 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            sinkhorn(case.spec, a, b, **options)
    with pytest.raises(ConfigError, match="sinkhorn: temperature: input should be greater than 0, found -1"):
        align_networks(case.spec, [a, b], "sinkhorn", temperature=-1)
    with pytest.raises(ConfigError, match=r"sinkhorn: objective: .* 'midpoint' or 'random', found 'middle'"):
        align_networks(case.spec, [a, b], "sinkhorn", objective="middle")
    with pytest.raises(DataError, match="data: the module cannot be called with float32"):
        sinkhorn(
            case.spec,
            a,
            b,
            module=case.module,
            data=[(torch.zeros(3, 7), torch.zeros(3))],
            objective="random",
        )
    with pytest.raises(SpecError, match=r"reference: expected a single network, found batch shape \[1\]"):
        sinkhorn(case.spec, {name: w[None] for name, w in a.items()}, b)
