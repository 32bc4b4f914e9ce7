"""Barriers: hand-worked ones, what restores networks between others, what reports say, and what is refused."""

import io
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightspace.align.judging import barrier, compare_barriers, draw_barriers
from weightspace.align.judging._barrier import _check_options
from weightspace.align.judging._path import combine
from weightspace.errors import ConfigError, DataError, SpecError
from weightspace.spec import WeightSpec

ONE = [(torch.ones(1, 1), torch.zeros(1, 1))]
CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # uncorrelated, of variance 1


def valleys(outputs, targets):
    """Lowest where outputs are 1 or -1."""
    return (1 - outputs.square()).square().mean()


def variance_gap(outputs, targets):
    """How far the mean square of the outputs is from 1."""
    return (outputs.square().mean() - 1).abs()


def weight(value):
    return {"weight": torch.tensor([[value]])}


def product_network():
    """Class 1 has the logit w1 w2 x, class 0 the logit 0."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.cat([torch.zeros_like(x), self.first * self.second * x], dim=1)

    pair = [{"first": torch.tensor(sign), "second": torch.tensor(sign)} for sign in (1.0, -1.0)]
    return Product(), *pair


def classifier(seed=0, width=12):
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )
    return module, {name: 4 * tensor for name, tensor in module.state_dict().items()}


def points_of(module, weights, count=60, batches=(60,)):
    """Inputs whose classes are what the network says."""
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(5))
    targets = torch.func.functional_call(module, weights, (inputs,)).argmax(-1)
    return list(zip(inputs.split(batches), targets.split(batches), strict=True))


def normed(width=4):
    """One layer with BatchNorm, and two networks that read different inputs of variance 1."""
    module = nn.Sequential(nn.Linear(2, width, bias=False), nn.BatchNorm1d(width, affine=False, eps=1e-9))
    networks = []
    for column in (0, 1):
        network = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        network["0.weight"] = torch.zeros(width, 2).index_fill_(1, torch.tensor([column]), 1.0)
        networks.append(network)
    return module, *networks


# -- the barrier -------------------------------------------------------------------------------------------


def test_a_barrier_is_the_height_above_the_line_between_the_ends():
    module = nn.Linear(1, 1, bias=False)
    report = barrier(module, weight(-1.0), weight(1.0), ONE, loss=valleys, repair="none")
    assert report.loss_barrier == 1.0
    assert report.train.loss_peak == (0.5, 1.0)
    assert report.lambdas == tuple(place / 24 for place in range(25))
    expected = [(1 - (2 * t - 1) ** 2) ** 2 for t in report.lambdas]
    assert report.train.loss == pytest.approx(expected, abs=1e-6)
    # the ends are 0 and 9, the middle is at -0.25: (1 - 0.0625)^2, less 2.25
    uneven = barrier(module, weight(-1.0), weight(2.0), ONE, loss=valleys, points=5, repair="none")
    assert uneven.loss_barrier == 0.0
    assert uneven.train.loss[1] == pytest.approx(0.9375**2)


def test_the_barrier_of_accuracy_is_the_depth_below_the_line():
    module, a, b = product_network()
    data = [(torch.ones(5, 1), torch.ones(5, dtype=torch.long))]
    wrong = [(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))]
    report = barrier(module, a, b, data, test=wrong, points=3, repair="none")
    assert report.train.accuracy == (1.0, 0.0, 1.0)
    assert report.train.accuracy_barrier == 1.0
    assert report.train.loss_barrier == pytest.approx(math.log(2) - math.log(1 + math.exp(-1)))
    assert report.test.accuracy == (0.0, 1.0, 0.0)
    assert report.accuracy_barrier == 0.0  # the test data decide
    assert report.loss_barrier == report.test.loss_barrier == 0.0


def test_curves_do_not_depend_on_how_samples_are_split():
    module, a = classifier()
    _, b = classifier(1)
    whole, split = (
        barrier(module, a, b, points_of(module, a, batches=batches), points=5, repair="none")
        for batches in ((60,), (50, 7, 3))
    )
    assert whole.train.loss == pytest.approx(split.train.loss, rel=1e-6)
    assert whole.train.accuracy == split.train.accuracy


def test_a_permuted_copy_has_no_barrier_once_it_is_matched():
    module, a = classifier()
    spec = WeightSpec.trace(module, torch.ones(2, 4))
    generator = torch.Generator().manual_seed(1)
    b = spec.act(spec.random_element(symmetries=["permutation"], generator=generator), a)
    data = points_of(module, a)
    options = {"weight-matching": {"restarts": 3}}
    reports = compare_barriers(
        spec, module, a, b, data, repairs=["batch-norm", "none"], test=data, options=options, points=5
    )
    assert list(reports) == [
        "naive",
        "naive, statistics averaged",
        "weight-matching",
        "weight-matching, statistics averaged",
    ]
    assert reports["naive"].loss_barrier > 0.1
    assert reports["naive"].accuracy_barrier > 0.1
    assert reports["weight-matching"].loss_barrier < 1e-6
    assert reports["weight-matching"].accuracy_barrier == 0.0


def test_data_without_classes_have_no_accuracy():
    module = nn.Linear(1, 1, bias=False)
    report = barrier(module, weight(0.0), weight(1.0), ONE, loss=F.mse_loss, points=3, repair="none")
    assert report.train.accuracy is None
    assert report.accuracy_barrier is None
    module, a, b = product_network()
    data = [(torch.ones(5, 1), torch.ones(5, dtype=torch.long))]
    assert barrier(module, a, b, data, points=3, repair="none", accuracy=False).accuracy_barrier is None


# -- statistics and repair ---------------------------------------------------------------------------------


def test_statistics_estimated_again_lift_a_collapse_of_variance():
    module, a, b = normed()
    data = [(CORNERS.repeat(250, 1), torch.zeros(1000))]
    averaged = barrier(module, a, b, data, loss=variance_gap, points=5, repair="none")
    # a variance of (1 - t)^2 + t^2 is taken for 1
    assert averaged.train.loss == pytest.approx([0.0, 0.375, 0.5, 0.375, 0.0], abs=1e-5)
    again = barrier(module, a, b, data, loss=variance_gap, points=5)
    assert again.loss_barrier == pytest.approx(0.0, abs=2e-3)


def test_the_ends_keep_their_statistics():
    module, a, b = normed()
    a["1.running_var"] = torch.full((4,), 4.0)
    data = [(CORNERS.repeat(250, 1), torch.zeros(1000))]
    report = barrier(module, a, b, data, loss=variance_gap, points=3)
    assert report.train.loss == pytest.approx([0.75, 0.0, 0.0], abs=2e-3)


def test_repair_lifts_a_collapse_without_batch_norm():
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in module.state_dict().items()}
    a["0.weight"] = torch.tensor([[2.0, 0.0]] * 3)
    b = a | {"0.weight": torch.tensor([[0.0, 2.0]] * 3)}
    hidden = {}
    module[0].register_forward_hook(lambda _, __, output: hidden.update(now=output))

    def spread(outputs, targets):
        return hidden["now"].std(0, correction=0).mean()

    data = [(CORNERS, torch.zeros(4))]
    collapsed = barrier(module, a, b, data, loss=spread, points=3, repair="none")
    assert collapsed.train.loss == pytest.approx([2.0, 2**0.5, 2.0], rel=1e-4)
    repaired = barrier(module, a, b, data, loss=spread, points=3, repair="repair")
    assert repaired.train.loss == pytest.approx([2.0, 2.0, 2.0], rel=1e-3)


def test_networks_between_others_are_combined_in_float32_and_keep_what_is_shared():
    a = {
        "w": torch.tensor([1.0, 3.0]).bfloat16(),
        "steps": torch.tensor(7),
        "table": torch.tensor([0.1, 1 / 3]),
    }
    b = {
        "w": torch.tensor([1.0078125, -3.0]).bfloat16(),
        "steps": torch.tensor(9),
        "table": a["table"].clone(),
    }
    found = combine((a, b), (0.7, 0.3))
    exact = a["w"].double() + 0.3 * (b["w"].double() - a["w"].double())
    assert torch.equal(found["w"], exact.bfloat16())
    assert found["steps"] == 7
    assert torch.equal(found["table"], a["table"])


def test_nothing_that_is_given_changes():
    module, a, b = normed()
    module.train()
    before = [{k: v.clone() for k, v in network.items()} for network in (a, b, module.state_dict())]
    barrier(module, a, b, [(CORNERS, torch.zeros(4))], loss=variance_gap, points=3)
    for old, new in zip(before, (a, b, module.state_dict()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())


# -- reports -----------------------------------------------------------------------------------------------


def test_json_holds_the_curves():
    module, a, b = product_network()
    data = [(torch.ones(5, 1), torch.ones(5, dtype=torch.long))]
    found = json.loads(barrier(module, a, b, data, points=3, repair="none").to_json())
    assert found["accuracy_barrier"] == 1.0
    assert [row["lambda"] for row in found["curve"]] == [0.0, 0.5, 1.0]
    assert found["curve"] == found["train"]["curve"]
    assert found["curve"][1] == {"lambda": 0.5, "loss": pytest.approx(math.log(2)), "accuracy": 0.0}
    assert found["test"] is None
    assert found["measured_on"] == "train"


def test_a_loss_that_is_not_finite_is_an_infinite_barrier():
    module = nn.Linear(1, 1, bias=False)
    report = barrier(
        module,
        weight(-1.0),
        weight(1.0),
        ONE,
        points=3,
        repair="none",
        loss=lambda y, _: (1 / y.abs()).mean(),
    )
    assert report.loss_barrier == math.inf
    assert json.loads(report.to_json())["loss_barrier"] is None
    report.draw(io.BytesIO())


@pytest.mark.parametrize("format", ["png", "pdf", "svg"])
def test_equal_reports_are_drawn_alike(format, tmp_path):
    module, a, b = product_network()
    data = [(torch.ones(5, 1), torch.ones(5, dtype=torch.long))]
    report = barrier(module, a, b, data, test=data, points=5, repair="none")
    memory = io.BytesIO()
    draw_barriers({"naive": report, "other": report}, memory, title="Two", format=format)
    draw_barriers({"naive": report, "other": report}, tmp_path / f"two.{format}", title="Two")
    assert (tmp_path / f"two.{format}").read_bytes() == memory.getvalue()
    with pytest.raises(ConfigError, match=r"draw: expected the format png, pdf, svg, found 'gif'"):
        report.draw(tmp_path / "two.gif")


# -- classes, half precision, odd batches ----------------------------------------------------------------------


class Sequences(nn.Module):
    """A logit per class for each position, on the last axis or on the second."""

    def __init__(self, last):
        super().__init__()
        self.weight, self.last = nn.Parameter(9 * torch.eye(4)), last

    def forward(self, x):
        return x @ self.weight if self.last else (x @ self.weight).mT


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("last", [True, False])
def test_the_accuracy_of_sequences_leaves_out_places_without_a_class(last, length):
    """Also where there are as many positions as classes."""
    module = Sequences(last)
    targets = torch.randint(4, (6, length), generator=torch.Generator().manual_seed(0))
    targets[0, 0] = -100
    inputs = F.one_hot(targets.clamp_min(0), 4).float()
    flat = lambda outputs, targets: F.cross_entropy(outputs.flatten(0, 1), targets.flatten())  # noqa: E731
    loss = flat if last else F.cross_entropy
    weights = dict(module.state_dict())
    report = barrier(module, weights, weights, [(inputs, targets)], loss=loss, points=3)
    assert report.train.accuracy == (1.0, 1.0, 1.0)


def test_one_output_is_no_choice_of_classes():
    loss = lambda outputs, targets: outputs.mean()  # noqa: E731
    data = [(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))]
    report = barrier(nn.Linear(1, 1, bias=False), weight(0.0), weight(1.0), data, loss=loss, points=3)
    assert report.accuracy_barrier is None


@pytest.mark.parametrize("inputs", [torch.float16, torch.float32])
def test_networks_of_half_precision_are_run_in_float32(inputs):
    module, a = classifier()
    a = {name: tensor.half() for name, tensor in a.items()}
    data = [(x.half(), y) for x, y in points_of(module, {n: t.float() for n, t in a.items()})]
    found = barrier(module, a, a, [(x.to(inputs), y) for x, y in data], points=3)
    wide = {name: tensor.float() for name, tensor in a.items()}
    assert found.train == barrier(module, wide, wide, [(x.float(), y) for x, y in data], points=3).train


def test_an_empty_batch_counts_nothing():
    empty = (torch.ones(0, 1), torch.zeros(0, 1))
    found = barrier(
        nn.Linear(1, 1, bias=False), weight(-1.0), weight(1.0), [*ONE, empty], loss=valleys, points=3
    )
    assert found.train.loss == (0.0, 1.0, 0.0)


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": 2}, ConfigError, "points: expected at least 3, found 2"),
        ({"b": {}}, SpecError, "network B: tensor 'weight' of network A is missing"),
        ({"a": {}}, SpecError, "network A: tensor 'weight' of network B is missing"),
        (
            {"b": {"weight": torch.ones(2, 1)}},
            SpecError,
            r"network B: 'weight' should have shape \[1, 1\] as in network A, found \[2, 1\]",
        ),
        ({"b": weight(math.nan)}, SpecError, "network B: expected finite values, found some in 'weight'"),
        ({"data": []}, DataError, "data: expected at least one batch, found none"),
        ({"data": [(torch.ones(0, 1), torch.ones(0, 1))]}, DataError, "data: expected at least one sample"),
        (
            {"data": [({"x": torch.ones(1, 1)}, torch.ones(1))]},
            DataError,
            "data: expected inputs .* found dict",
        ),
        (
            {"loss": lambda outputs, targets: outputs[:, 0]},
            DataError,
            r"loss: expected a scalar tensor",
        ),
        (
            {"a": {"v": torch.ones(1)}, "b": {"v": torch.ones(1)}},
            SpecError,
            "network: 'v' is no tensor of the",
        ),
        ({"b": {"weight": torch.ones(1, 1, dtype=torch.float64)}}, DataError, "the module cannot be called"),
        ({"test": [(torch.ones(1, 3), torch.ones(1, 1))]}, DataError, "test: the module cannot be called"),
        ({"accuracy": True}, DataError, r"data: accuracy needs targets that are classes, .* float32\[1, 1\]"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, error, message):
    given = {"a": weight(0.0), "b": weight(1.0), "data": ONE, "loss": F.mse_loss, "repair": "none"} | change
    arguments = [given.pop(name) for name in ("a", "b", "data")]
    with pytest.raises(error, match=message) as raised:
        barrier(nn.Linear(1, 1, bias=False), *arguments, **given)
    assert "\n" not in str(raised.value)


def test_an_unknown_repair_is_refused():
    with pytest.raises(ConfigError, match="repair: expected one of none, batch-norm, repair, found 'mend'"):
        _check_options(3, "mend")  # beartype would refuse it earlier, which users do not have


def test_unknown_matchers_and_stray_options_are_refused():
    module, a = classifier()
    spec = WeightSpec.trace(module, torch.ones(2, 4))
    with pytest.raises(ConfigError, match="method: expected one of"):
        compare_barriers(spec, module, a, a, points_of(module, a), methods=["magic"])
    with pytest.raises(
        ConfigError, match="options: expected some of the methods weight-matching, found 'magic'"
    ):
        compare_barriers(spec, module, a, a, points_of(module, a), options={"magic": {}})
    with pytest.raises(ConfigError, match="reports: expected at least one to draw"):
        draw_barriers({}, io.BytesIO())
