"""The fitting engines against a plain loop, and the promises about stopping, neighbours and interruption."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from weightspace.datagen import _fit, _kernels
from weightspace.datagen._fit import _tile, fit_networks
from weightspace.errors import ConfigError, DataError
from weightspace.nets import MLP

ENGINES = ["kernel", "batched"]


def initial_parameters(net: MLP, networks: int, seed: int = 0) -> np.ndarray:
    """SIREN-like: uniform, the first layer within 1 / fan_in."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(networks):
        parts = []
        for layer, (fan_in, fan_out) in enumerate(pairwise(net.widths)):
            bound = 1 / fan_in if layer == 0 else np.sqrt(6 / fan_in) / net.w0
            parts += [rng.uniform(-bound, bound, fan_in * fan_out), rng.uniform(-bound, bound, fan_out)]
        rows.append(np.concatenate(parts))
    return np.stack(rows).astype(np.float32)


def problem(net: MLP, networks: int, points: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Initial parameters, coordinates and smooth targets in [0, 1]."""
    rng = np.random.default_rng(seed + 1)
    coordinates = rng.uniform(-1, 1, (points, net.widths[0])).astype(np.float32)
    frequencies = rng.normal(0, 2, (networks, net.widths[0], net.widths[-1]))
    targets = 0.5 + 0.4 * np.sin(coordinates @ frequencies)
    return initial_parameters(net, networks, seed), coordinates, targets.astype(np.float32)


def load(net: MLP, flat: np.ndarray, dtype: torch.dtype = torch.float32) -> MLP:
    copy = MLP(**net.arguments()).to(dtype)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(flat.copy()).to(dtype), copy.parameters())
    return copy


def psnr_of(net: MLP, flat: np.ndarray, coordinates: np.ndarray, target: np.ndarray) -> float:
    with torch.no_grad():
        loss = mse_loss(load(net, flat)(torch.from_numpy(coordinates)), torch.from_numpy(target))
    return float(-10 * torch.log10(loss))


def plain_loop(
    net: MLP, flat: np.ndarray, coordinates: np.ndarray, target: np.ndarray, steps: int, rate: float
) -> np.ndarray:
    """What a user would write, in float64: the truth that both engines approximate."""
    trained = load(net, flat, torch.float64)
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate)
    points, goal = torch.from_numpy(coordinates).double(), torch.from_numpy(target).double()
    for _ in range(steps):
        optimizer.zero_grad()
        mse_loss(trained(points), goal).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(trained.parameters()).detach().numpy()


CASES = [
    ((2, 32, 32, 1), "sine", 30.0, 0.5, 784),
    ((2, 20, 1), "sine", 10.0, 0.0, 100),  # one hidden layer, width no multiple of a register block
    ((1, 13, 7, 9, 3), "sine", 8.0, 0.0, 37),  # three hidden layers, less than one tile
    ((3, 16, 16, 3), "tanh", 1.0, 0.0, 517),
    ((3, 17, 5, 2), "gaussian", 2.0, 0.1, 331),
    ((2, 24, 11, 1), "relu", 1.0, 0.0, 130),
    ((2, 3), "sine", 30.0, 0.0, 50),  # no hidden layer at all
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{'-'.join(map(str, case[0]))}")
def test_same_parameters_as_a_plain_adam_loop(case, engine):
    widths, activation, w0, offset, points = case
    net = MLP(widths, activation, w0, offset)
    initial, coordinates, targets = problem(net, 3, points)
    result = fit_networks(
        net, initial, coordinates, targets, steps=25, target_psnr=None, learning_rate=2e-3, engine=engine
    )
    assert result.steps.tolist() == [25] * 3
    for row in range(3):
        expected = plain_loop(net, initial[row], coordinates, targets[row], 25, 2e-3)
        moved = np.abs(expected - initial[row]).max()
        assert np.abs(result.parameters[row] - expected).max() < 1e-3 * moved
        assert result.psnr[row] == pytest.approx(
            psnr_of(net, result.parameters[row], coordinates, targets[row]), abs=1e-3
        )


def test_one_step_by_hand():
    """f(x) = a x + b at x = 1, a = b = 0, target 0.5: the gradient is (-1, -1), so Adam adds the rate."""
    net = MLP((1, 1))
    ones = np.ones((1, 1), np.float32)
    for engine in ENGINES:
        result = fit_networks(
            net,
            np.zeros((1, 2), np.float32),
            ones,
            0.5 * ones[None],
            steps=1,
            learning_rate=0.1,
            engine=engine,
        )
        np.testing.assert_allclose(result.parameters, [[0.1, 0.1]], rtol=1e-6)
        assert result.psnr[0] == pytest.approx(-20 * np.log10(0.3), abs=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_stops_before_the_update_that_the_target_makes_needless(engine):
    net = MLP((2, 16, 1), w0=10.0)
    initial, coordinates, targets = problem(net, 5, 90)
    settings = {"learning_rate": 1e-2, "engine": engine, "slots": 3}
    result = fit_networks(net, initial, coordinates, targets, steps=400, target_psnr=25.0, **settings)
    assert (result.steps < 400).all()
    assert len(set(result.steps.tolist())) > 1
    for row, steps in enumerate(result.steps.tolist()):
        exact = psnr_of(net, result.parameters[row], coordinates, targets[row])
        assert exact == pytest.approx(float(result.psnr[row]), abs=1e-3)
        assert result.psnr[row] >= 25.0
        one = slice(row, row + 1)
        before = fit_networks(
            net, initial[one], coordinates, targets[one], steps=steps - 1, target_psnr=None, **settings
        )
        assert before.psnr[0] < 25.0


@pytest.mark.parametrize("engine", ENGINES)
def test_no_steps_evaluates_the_initial_parameters(engine):
    net = MLP((2, 8, 3), "tanh")
    initial, coordinates, targets = problem(net, 2, 40)
    result = fit_networks(net, initial, coordinates, targets, steps=0, engine=engine)
    np.testing.assert_array_equal(result.parameters, initial)
    assert result.steps.tolist() == [0, 0]
    for row in range(2):
        assert result.psnr[row] == pytest.approx(
            psnr_of(net, initial[row], coordinates, targets[row]), abs=1e-4
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_neighbours_order_and_threads_never_change_a_bit(engine):
    net = MLP((2, 16, 16, 1))
    initial, coordinates, targets = problem(net, 11, 100)
    settings = {"steps": 60, "target_psnr": 22.0, "learning_rate": 3e-3, "engine": engine, "slots": 4}
    together = fit_networks(net, initial, coordinates, targets, **settings)
    assert len(set(together.steps.tolist())) > 2  # so that slots were refilled at different times

    order = np.random.default_rng(1).permutation(11)
    shuffled = fit_networks(net, initial[order], coordinates, targets[order], **settings)
    np.testing.assert_array_equal(shuffled.parameters, together.parameters[order])
    np.testing.assert_array_equal(shuffled.psnr, together.psnr[order])
    np.testing.assert_array_equal(shuffled.steps, together.steps[order])

    for row in (0, 7):
        one = slice(row, row + 1)
        alone = fit_networks(net, initial[one], coordinates, targets[one], **settings)
        np.testing.assert_array_equal(alone.parameters[0], together.parameters[row])

    if engine == "kernel":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            single = fit_networks(net, initial, coordinates, targets, **settings)
        finally:
            torch.set_num_threads(threads)
        np.testing.assert_array_equal(single.parameters, together.parameters)


def test_rare_looks_for_finished_slots_never_change_a_bit(monkeypatch):
    """What a GPU does: a finished network waits, frozen, until it is looked at."""
    net = MLP((2, 16, 1))
    initial, coordinates, targets = problem(net, 7, 60)
    targets[2] = np.nan
    settings = {"steps": 90, "target_psnr": 18.0, "learning_rate": 1e-2, "engine": "batched", "slots": 3}
    often = fit_networks(net, initial, coordinates, targets, **settings)
    assert len(set(often.steps.tolist())) > 2
    monkeypatch.setattr(_fit, "_check_every", lambda device: 7)
    rarely = fit_networks(net, initial, coordinates, targets, **settings)
    np.testing.assert_array_equal(rarely.parameters, often.parameters)
    np.testing.assert_array_equal(rarely.psnr, often.psnr)
    np.testing.assert_array_equal(rarely.steps, often.steps)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activation", ["sine", "relu", "tanh", "gaussian"])
@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_a_diverged_network_is_reported_and_leaves_its_neighbours_alone(activation, poison, engine):
    net = MLP((2, 12, 1), activation, 5.0)
    initial, coordinates, targets = problem(net, 4, 50)
    settings = {"steps": 20, "target_psnr": None, "engine": engine, "slots": 2}
    healthy = fit_networks(net, initial, coordinates, targets, **settings)
    initial[1, -2] = poison  # a weight of the last layer: NaN, or a loss beyond float32
    result = fit_networks(net, initial, coordinates, targets, **settings)
    assert np.isnan(result.psnr[1])
    assert result.steps[1] == 0
    for row in (0, 2, 3):
        np.testing.assert_array_equal(result.parameters[row], healthy.parameters[row])
        assert result.psnr[row] == healthy.psnr[row]


@pytest.mark.parametrize("activation", ["sine", "relu", "tanh", "gaussian"])
def test_kernel_lets_a_nan_in_the_first_layer_through(activation):
    net = MLP((2, 12, 1), activation, 5.0)
    initial, coordinates, targets = problem(net, 1, 50)
    initial[0, 0] = np.nan
    assert np.isnan(fit_networks(net, initial, coordinates, targets, steps=5).psnr[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_counts_the_finished_networks(engine):
    net = MLP((2, 4, 1))
    initial, coordinates, targets = problem(net, 5, 20)
    seen: list[int] = []
    fit_networks(net, initial, coordinates, targets, steps=3, engine=engine, slots=2, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_interruption_does_not_wait_for_running_networks():
    net = MLP((2, 16, 1), w0=10.0)
    initial, coordinates, targets = problem(net, 8, 50)
    targets[0] = np.nan  # this one stops at once; the others would run for hours

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_networks(
            net,
            initial,
            coordinates,
            targets,
            steps=10**9,
            target_psnr=None,
            engine="kernel",
            progress=interrupt,
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_no_networks_at_all(engine):
    net = MLP((2, 4, 1))
    initial, coordinates, targets = problem(net, 2, 20)
    result = fit_networks(net, initial[:0], coordinates, targets[:0], engine=engine)
    assert result.parameters.shape == (0, 17)
    assert result.psnr.shape == result.steps.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, found 0.0"),
        ({"steps": -1}, "steps: expected 0 or more, found -1"),
        ({"slots": 0}, "slots: expected 1 or more, found 0"),
        (
            {"engine": "kernel", "device": "meta"},
            "engine: 'kernel' runs on the CPU only, found device 'meta'",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    net = MLP((2, 4, 1))
    initial, coordinates, targets = problem(net, 2, 20)
    with pytest.raises(ConfigError, match=message):
        fit_networks(net, initial, coordinates, targets, **options)


def test_arrays_that_do_not_fit_the_network_are_refused():
    net = MLP((2, 4, 1))
    initial, coordinates, targets = problem(net, 2, 20)
    with pytest.raises(DataError, match=r"initial: expected shape \(networks, 17\), found \(2, 16\)"):
        fit_networks(net, initial[:, 1:], coordinates, targets)
    with pytest.raises(DataError, match=r"coordinates: expected shape \(points, 2\), found \(20, 1\)"):
        fit_networks(net, initial, coordinates[:, 1:], targets)
    with pytest.raises(DataError, match=r"targets: expected shape \(2, 20, 1\), found \(2, 20, 2\)"):
        fit_networks(net, initial, coordinates, np.repeat(targets, 2, axis=2))


# ------------------------------------------------------------------------------------ elementary functions


def test_sine_and_slope_over_a_wide_range():
    frequency = 30.0
    z = np.linspace(-15, 15, 200_001).astype(np.float32)  # arguments up to 450
    angle = frequency * z.astype(np.float64)
    high = np.float32(frequency / np.pi)
    low = np.float32(frequency / np.pi - float(high))
    value, slope = z.copy(), np.empty_like(z)
    _kernels.sine(value, slope, np.float32(frequency), high, low)
    assert np.abs(value - np.sin(angle)).max() < 3e-7
    assert np.abs(slope / frequency - np.cos(angle)).max() < 3e-7


def test_tanh_and_slope():
    z = np.linspace(-12, 12, 100_001).astype(np.float32)
    value, slope = z.copy(), np.empty_like(z)
    _kernels.tanh(value, slope)
    expected = np.tanh(z.astype(np.float64))
    assert np.abs(value - expected).max() < 3e-7
    assert np.abs(slope - (1 - expected**2)).max() < 6e-7


def test_gaussian_and_slope():
    z = np.linspace(-12, 12, 100_001).astype(np.float32)
    value, slope = z.copy(), np.empty_like(z)
    _kernels.gaussian(value, slope, np.float32(2.0))
    expected = np.exp(-4 * z.astype(np.float64) ** 2)
    assert np.abs(value - expected).max() < 3e-7
    assert np.abs(slope - -8 * z * expected).max() < 3e-6


@pytest.mark.parametrize("widths", [(2, 32, 32, 1), (2, 256, 256, 256, 3), (1, 4, 1)])
@pytest.mark.parametrize("points", [1, 37, 784, 1024, 65536])
def test_tiles_are_whole_vectors_and_waste_little(widths, points):
    tile = _tile(MLP(widths), points)
    assert tile % 16 == 0
    padded = -(-points // tile) * tile
    assert padded - points < max(16, 0.04 * points)
