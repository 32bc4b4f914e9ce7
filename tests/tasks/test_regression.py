"""Regression: scores by hand, a statistic that is recovered, and targets that do not suit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional import kendall_rank_corrcoef, r2_score

from weightspace.datasets import ZooDataset
from weightspace.errors import TaskError
from weightspace.tasks import Regression, RegressionOptions, evaluate, load_run, train, train_config
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo

SMALL = {
    "dws": {"model.hidden": 4, "model.layers": 1, "model.head": 16, "augment": ""},
    "mlp": {"model.hidden": [32], "model.dropout": 0.0},
    "statistics": {"model.iterations": 60, "model.tree_learning_rate": 0.2},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The target is the mean of the last weight: a linear statistic, invariant to permutations."""
    inr = tiny_zoo(networks=300, views=1)["inr"]
    value = inr.spec.unflatten(torch.from_numpy(inr.weights))["layers.2.weight"].mean((1, 2)).numpy()
    share = (value - value.min()) / (value.max() - value.min())
    inr = replace(
        inr,
        labels={
            **inr.labels,
            "mean": (100.0 + 7.0 * value).astype(np.float32),
            "constant": np.ones(300, np.int64),
        },
        hyperparameters={"share": share.astype(np.float32)},
    )
    return Zoo({"inr": inr}).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def config_of(zoo, model="dws", *, target="mean", epochs=8, changes=None):
    values = {"zoo": str(zoo), "model": model, "task": "regression", "target": target}
    values |= {"epochs": epochs, "batch_size": 16, "learning_rate": 1e-2}
    return train_config(values, {**SMALL[model], **(changes or {})})


def fit(config, run):
    return train(config, run, device="cpu", progress=False)


@pytest.mark.parametrize(("model", "least"), [("dws", 0.9), ("statistics", 0.9)])
def test_a_linear_statistic_of_the_weights_is_recovered(zoo, tmp_path, model, least):
    """Its mean is 100 and its deviation 0.7: without standardised targets nothing would come of it so soon."""
    fit(config_of(zoo, model), tmp_path / "run")
    metrics = evaluate(tmp_path / "run", device="cpu").metrics
    assert metrics["r2"] > least
    assert metrics["kendall_tau"] > 0.75
    assert metrics["mean_absolute_error"] < 0.4
    assert (tmp_path / "run" / "test.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("model", "least"), [("dws", 0.6), ("statistics", 0.8)])
def test_sigmoid_targets_are_hyperparameters_in_0_to_1(zoo, tmp_path, model, least):
    config = config_of(zoo, model, target="share", changes={"task.loss": "bce"})
    fit(config, tmp_path / "run")
    assert evaluate(tmp_path / "run", device="cpu").metrics["r2"] > least
    trained, dataset = load_run(tmp_path / "run"), ZooDataset(zoo, "test", target="share")
    with torch.no_grad():
        readout = trained.task.readout(trained.network(dataset.read(range(len(dataset)))[0]))
    values = trained.task.predictions(readout)["prediction"]
    torch.testing.assert_close(values, torch.sigmoid(readout[:, 0]))
    assert bool(((values >= 0) & (values <= 1)).all())


def test_standardisation_is_that_of_the_training_split_and_is_undone(zoo, tmp_path):
    fit(config_of(zoo, "mlp", epochs=1), tmp_path / "run")
    trained, training = load_run(tmp_path / "run"), ZooDataset(zoo, "train", target="mean")
    values = training.targets.double().numpy()
    assert (trained.task.mean, trained.task.std) == pytest.approx((values.mean(), values.std()))
    encoded = trained.task.targets(training)
    assert float(encoded.mean()) == pytest.approx(0.0, abs=1e-4)
    torch.testing.assert_close(trained.task.predictions(encoded[:, None])["prediction"], training.targets)


def test_scores_by_hand():
    """Against numpy, and for tau the definition: pairs in order minus pairs out of order."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(30, generator=generator)
    found = true + torch.randn(30, generator=generator)
    task = Regression(2.0, 3.0)
    scores = task.scores(found[:, None], true)
    x, y = (3.0 * values.double().numpy() + 2.0 for values in (found, true))
    assert scores["r2"] == pytest.approx(1 - ((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(), rel=1e-4)
    pairs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    assert scores["kendall_tau"] == pytest.approx(pairs.sum() / (30 * 29))
    assert scores["mean_absolute_error"] == pytest.approx(np.abs(x - y).mean(), rel=1e-5)
    assert scores["loss"] == pytest.approx(((x - y) ** 2).mean() / 9.0, rel=1e-5)
    ties = (found * 2).round()
    assert task.scores(ties[:, None], true)["kendall_tau"] == pytest.approx(
        float(kendall_rank_corrcoef(ties, true)), abs=1e-6
    )
    assert task.scores(ties[:, None], true)["r2"] == pytest.approx(float(r2_score(ties, true)), abs=1e-5)


def test_binary_cross_entropy_by_hand():
    task = Regression(0.0, 1.0, RegressionOptions(loss="bce"))
    logits, targets = torch.tensor([[0.3], [-1.2]]), torch.tensor([0.25, 1.0])
    p = 1 / (1 + np.exp(-np.array([0.3, -1.2])))
    t = targets.double().numpy()
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
    assert float(task.loss(logits, targets, training=True)) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.sigmoid(task.outputs_for(targets)), torch.tensor([0.25, 0.999]))


def test_targets_that_do_not_suit_are_named(zoo, tmp_path):
    for target, loss, message in [
        ("constant", "mse", "target 'constant' is 1 for all networks of split 'train'"),
        (
            "mean",
            "bce",
            r"the loss bce needs targets in \[0, 1\], found 9\d.* target 'mean' of split 'train'",
        ),
        ("loss", "mse", "no label or metric 'loss'; .* and hyperparameters share"),
    ]:
        with pytest.raises(TaskError, match=message):
            fit(config_of(zoo, "mlp", target=target, changes={"task.loss": loss}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_targets_are_refused_or_skipped(zoo, tmp_path):
    inr = Zoo.open(zoo)["inr"]
    psnr = inr.metrics["psnr"].copy()
    psnr[np.flatnonzero(inr.split == 0)[:2]] = np.nan
    path = Zoo({"inr": replace(inr, metrics={"psnr": psnr})}).save(tmp_path / "nan.h5")
    with pytest.raises(TaskError, match="NaN or infinite target 'psnr' in 2 rows of split train: "):
        fit(config_of(path, "mlp", target="psnr"), tmp_path / "run")
    report = fit(
        config_of(path, "mlp", target="psnr", epochs=1, changes={"skip_bad": True}), tmp_path / "run"
    )
    assert report.skipped == 2
    assert np.isfinite(report.metrics["mean_absolute_error"])


def test_scores_of_targets_with_a_large_mean():
    """Mean 10,000 and deviation 1: float32 would lose the differences in the squares."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(2000, generator=generator)
    found = true + 0.5 * torch.randn(2000, generator=generator)
    large = Regression(1e4, 1.0).scores(found[:, None], true)
    t, f = true.double(), found.double()
    expected = 1 - float((f - t).square().sum() / (t - t.mean()).square().sum())
    assert large["r2"] == pytest.approx(expected, rel=1e-6)
    assert large == pytest.approx(Regression(0.0, 1.0).scores(found[:, None], true), rel=1e-6)
    shares = Regression(0.0, 1.0, RegressionOptions(loss="bce")).scores(found[:, None], true.sigmoid())
    error = (f.sigmoid() - true.sigmoid().double()).abs().mean()
    assert shares["mean_absolute_error"] == pytest.approx(float(error), rel=1e-6)
