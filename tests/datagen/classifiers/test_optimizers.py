"""The optimizers of a population against those of torch.optim, one network at a time."""

import numpy as np
import pytest
import torch

from weightspace.datagen.classifiers._optimizers import OPTIMIZERS, PopulationOptimizer

STEPS, PARAMETERS = 60, 17
# (optimizer, learning rate, momentum, weight decay)
MIXED = [
    ("sgd", 0.1, 0.9, 0.0),
    ("adam", 3e-3, 0.9, 0.0),
    ("rmsprop", 1e-3, 0.9, 0.0),
    ("adamw", 3e-3, 0.0, 0.0),
    ("sgd", 0.02, 0.0, 0.05),
    ("adam", 1e-2, 0.5, 0.1),
    ("rmsprop", 5e-3, 0.5, 0.02),
    ("adamw", 1e-2, 0.5, 0.3),
    ("sgd", 0.05, 0.5, 1e-3),
]
MAKE = {
    "sgd": lambda p, rate, momentum, decay: torch.optim.SGD(p, rate, momentum=momentum, weight_decay=decay),
    "adam": lambda p, rate, _, decay: torch.optim.Adam(p, rate, weight_decay=decay),
    "rmsprop": lambda p, rate, _, decay: torch.optim.RMSprop(p, rate, weight_decay=decay),
    "adamw": lambda p, rate, _, decay: torch.optim.AdamW(p, rate, weight_decay=decay),
}


def problem(networks):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(networks, PARAMETERS, generator=generator)
    noise = torch.randn(STEPS, networks, PARAMETERS, generator=generator)
    curvature = torch.rand(networks, PARAMETERS, generator=generator) + 0.2
    return start, noise, curvature


def population_of(kinds):
    return PopulationOptimizer(
        np.array([OPTIMIZERS.index(name) for name, *_ in kinds]),
        np.array([momentum for _, _, momentum, _ in kinds]),
        np.array([decay for *_, decay in kinds]),
        torch.zeros(len(kinds), PARAMETERS),
        torch.zeros(len(kinds), PARAMETERS),
    )


def run(kinds, start, noise, curvature, optimizer=None, first=0, steps=STEPS):
    optimizer = optimizer or population_of(kinds)
    weights, rates = start.clone(), np.array([rate for _, rate, *_ in kinds])
    for step in range(first, first + steps):
        gradients = curvature * weights + noise[step]
        weights, finite = optimizer.step(weights, gradients, rates, np.full(len(kinds), step + 1.0))
        assert finite.all()
    return weights, optimizer


def alone(kind, start, noise, curvature):
    """float64 PyTorch: what is compared is then the population's rounding alone."""
    name, *settings = kind
    weights = start.double().requires_grad_()
    optimizer = MAKE[name]([weights], *settings)
    for step in range(STEPS):
        weights.grad = curvature.double() * weights.detach() + noise[step].double()
        optimizer.step()
    return weights.detach()


def test_a_mixed_population_moves_as_torch_optim_moves_each_network():
    start, noise, curvature = problem(len(MIXED))
    found, _ = run(MIXED, start, noise, curvature)
    for at, kind in enumerate(MIXED):
        expected = alone(kind, start[at], noise[:, at], curvature[at])
        assert (expected - start[at]).abs().max() > 0.02, "the network has not moved"
        torch.testing.assert_close(found[at].double(), expected, rtol=2e-5, atol=2e-6, msg=str(kind))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_kind_by_itself_gives_the_bits_that_it_has_among_others(name):
    start, noise, curvature = problem(len(MIXED))
    together, _ = run(MIXED, start, noise, curvature)
    at = [place for place, kind in enumerate(MIXED) if kind[0] == name]
    found, _ = run([MIXED[place] for place in at], start[at], noise[:, at], curvature[at])
    assert torch.equal(found, together[at])


def test_two_steps_by_hand():
    """SGD with momentum 0.5 and weight decay 0.1 from weight 1, gradients 1 and 2, rate 0.1."""
    optimizer = population_of([("sgd", 0.1, 0.5, 0.1)])
    weights = torch.ones(1, PARAMETERS)
    weights, _ = optimizer.step(weights, torch.full((1, PARAMETERS), 1.0), np.array([0.1]), np.array([1.0]))
    assert weights[0, 0].item() == pytest.approx(1 - 0.1 * 1.1)
    weights, _ = optimizer.step(weights, torch.full((1, PARAMETERS), 2.0), np.array([0.1]), np.array([2.0]))
    assert weights[0, 0].item() == pytest.approx(0.89 - 0.1 * (0.5 * 1.1 + 2.0 + 0.1 * 0.89))


def test_the_weights_of_before_stay_as_they_were():
    start, noise, curvature = problem(len(MIXED))
    before = start.clone()
    run(MIXED, start, noise, curvature, steps=3)
    rates = np.array([rate for _, rate, *_ in MIXED])
    population_of(MIXED).step(start, noise[0].clone(), rates, np.ones(len(MIXED)))
    assert torch.equal(start, before)


def test_those_who_are_left_go_on_as_if_the_others_were_still_there():
    start, noise, curvature = problem(len(MIXED))
    undisturbed, _ = run(MIXED, start, noise, curvature)
    half, optimizer = run(MIXED, start, noise, curvature, steps=20)
    rows = np.array([7, 1, 4])  # in another order, too
    kinds, optimizer = [MIXED[row] for row in rows], optimizer.take(rows)
    found, _ = run(kinds, half[rows], noise[:, rows], curvature[rows], optimizer, 20, STEPS - 20)
    assert torch.equal(found, undisturbed[rows])


def test_a_rate_of_0_moves_nothing():
    start, noise, curvature = problem(len(MIXED))
    still = [(name, 0.0, momentum, decay) for name, _, momentum, decay in MIXED]
    assert torch.equal(run(still, start, noise, curvature, steps=3)[0], start)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("at", range(len(MIXED)))
def test_what_leaves_the_finite_numbers_is_told_and_leaves_the_others_alone(at, wrong):
    start, noise, _ = problem(len(MIXED))
    rates, ones = np.array([rate for _, rate, *_ in MIXED]), np.ones(len(MIXED))
    expected, _ = population_of(MIXED).step(start, noise[0].clone(), rates, ones)
    gradients = noise[0].clone()
    gradients[at, 3] = wrong
    rates[at] = 1e30
    moved, finite = population_of(MIXED).step(start, gradients, rates, ones)
    assert finite.tolist() == moved.isfinite().all(1).tolist()
    others = np.arange(len(MIXED)) != at
    assert finite[others].all()
    assert torch.equal(moved[others], expected[others])
    assert not finite[at] or (wrong == 3e38 and MIXED[at][0] != "sgd")  # a square that overflows stops others


def test_pytorch_and_compiled_code_agree():
    """The former is for other devices; both on a CPU here."""
    start, noise, _ = problem(len(MIXED))
    rates, time = np.array([rate for _, rate, *_ in MIXED]), np.full(len(MIXED), 1.0)
    compiled, plain = population_of(MIXED), population_of(MIXED)
    one = other = start
    for step in range(20):
        one, _ = compiled.step(one, noise[step], rates, time + step)
        coefficients, adaptive = plain._coefficients(rates, time + step)
        other = plain._updated(other, noise[step], torch.from_numpy(coefficients), torch.from_numpy(adaptive))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
