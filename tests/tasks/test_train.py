"""Training runs: what they leave behind, how they resume, and that evaluation reads what was trained."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weightspace.datasets import ZooDataset
from weightspace.errors import ConfigError, OutputError, RunError, TaskError, ZooError
from weightspace.tasks import evaluate, load_run, train, train_config
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo

SMALL = {
    "dws": {"model.hidden": 4, "model.layers": 2, "model.head": 8},
    "mlp": {"model.hidden": [16]},
    "statistics": {"model.iterations": 3},
    "probe": {"model.probes": 8, "model.hidden": [16]},
    "nfn": {"model.hidden": 4, "model.layers": 2, "model.head": 8},
    "unf": {"model.hidden": 4, "model.layers": 2, "model.head": 8},
    "deepsets": {"model.features": 4, "model.hidden": [8]},
    "graph": {"model.hidden": 4, "model.layers": 2, "model.head": 8, "model.probes": 5},
}
FILES = {"config.yaml", "model.json", "model.safetensors", "report.json", "val.png", "zoo.json"}
CURVES = {"metrics.csv", "learning_curve.png", "checkpoints", "tensorboard"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def config_of(zoo, model="dws", *, epochs=2, changes=None, **values):
    values = {"zoo": str(zoo), "model": model, "epochs": epochs, "batch_size": 8, **values}
    return train_config(values, {**SMALL[model], **(changes or {})})


def fit(config, run, **options):
    return train(config, run, **{"device": "cpu", "progress": False, **options})


def epochs_of(run):
    with (run / "metrics.csv").open() as file:
        return [row["epoch"] for row in csv.DictReader(file) if row["val_accuracy"]]


def contents(run):
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("model", SMALL)
def test_a_run_leaves_its_files_and_can_be_scored(zoo, tmp_path, model):
    run = tmp_path / "run"
    report = fit(config_of(zoo, model), run)
    assert {path.name for path in run.iterdir()} == FILES | (
        {"trees.skops"} if model == "statistics" else CURVES
    )
    assert (report.model, report.task) == (model, "classification")
    assert set(report.metrics) == {"accuracy", "loss"}
    assert json.loads((run / "report.json").read_text())["metrics"] == pytest.approx(report.metrics)
    if model != "statistics":
        assert report.epochs == 2
        assert report.best_epoch in (1, 2)
        assert epochs_of(run) == ["0", "1"]
        assert report.parameters > 50
    validation = evaluate(run, split="val", device="cpu")
    assert validation.metrics == pytest.approx(report.metrics, rel=1e-5)
    test = evaluate(run, device="cpu")
    assert (test.split, test.networks, test.model, test.task) == ("test", 8, model, "classification")
    assert json.loads((run / "evaluation-test.json").read_text())["metrics"] == test.metrics
    assert (run / "test.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_by_hand(zoo, tmp_path):
    """The metrics of a run are those of its outputs, computed with numpy."""
    run = tmp_path / "run"
    fit(config_of(zoo), run)
    trained = load_run(run)
    dataset = ZooDataset(zoo, "test")
    weights, labels = dataset.read(range(len(dataset)))
    with torch.no_grad():
        logits = trained.network(weights).double().numpy()
    labels = labels.numpy()
    found = evaluate(run, device="cpu").metrics
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(8), labels]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-4)


def test_it_learns_what_can_be_learned(tmp_path):
    """The last layer's mean says the class; chance is a third."""
    zoo = tiny_zoo(networks=240).save(tmp_path / "zoo.h5")
    report = fit(config_of(zoo, epochs=20, changes={"batch_size": 24}), tmp_path / "run")
    assert report.metrics["accuracy"] > 0.6
    assert evaluate(tmp_path / "run", device="cpu").metrics["accuracy"] > 0.6


def test_the_best_epoch_is_kept(zoo, tmp_path):
    run = tmp_path / "run"
    report = fit(config_of(zoo, epochs=4), run)
    with (run / "metrics.csv").open() as file:
        scores = [float(row["val_accuracy"]) for row in csv.DictReader(file) if row["val_accuracy"]]
    assert len(scores) == 4
    assert report.best_epoch == scores.index(max(scores)) + 1
    assert report.metrics["accuracy"] == pytest.approx(max(scores), abs=1e-6)


def test_the_same_configuration_gives_the_same_parameters(zoo, tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for run, seed in zip(runs, (0, 0, 1), strict=True):
        fit(config_of(zoo, seed=seed), run)
    first, same, other = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_same_command_again_does_nothing(zoo, tmp_path):
    run = tmp_path / "run"
    first = fit(config_of(zoo), run)
    before = contents(run)
    assert fit(config_of(zoo), run) == first
    assert contents(run) == before


def test_a_run_of_another_configuration_is_refused(zoo, tmp_path):
    run = tmp_path / "run"
    fit(config_of(zoo), run)
    before = contents(run)
    with pytest.raises(
        OutputError, match=r"run holds a run of another configuration \(seed: 0 there, 1 now\); choose"
    ):
        fit(config_of(zoo, seed=1), run)
    assert contents(run) == before
    fit(config_of(zoo, epochs=3), run, overwrite=True)
    assert epochs_of(run) == ["0", "1", "2"]


def test_a_strangers_folder_is_left_alone(zoo, tmp_path):
    run = tmp_path / "thesis"
    run.mkdir()
    (run / "chapter.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="thesis exists already and is not a run directory"):
            fit(config_of(zoo), run, overwrite=overwrite)
    (run / "config.yaml").write_text("title: thesis")
    with pytest.raises(OutputError, match="thesis exists already and is not a run directory"):
        fit(config_of(zoo), run, overwrite=True)
    assert (run / "chapter.txt").read_text() == "precious"
    with pytest.raises(OutputError, match="is not a run"):
        fit(config_of(zoo), run / "chapter.txt")
    with pytest.raises(OutputError, match="cannot be written"):
        fit(config_of(zoo), run / "chapter.txt" / "run")


INTERRUPTED = """
import os, signal, sys
from weightspace.tasks import train, train_config
from weightspace.tasks._module import MetanetworkModule
MetanetworkModule.on_train_batch_start = lambda self, batch, index: (
    os.kill(os.getpid(), getattr(signal, sys.argv[3])) if (self.current_epoch, index) == (1, 1) else None
)
values = {"zoo": sys.argv[1], "model": "dws", "epochs": 3, "batch_size": 8}
config = train_config(values, {"model.hidden": 4, "model.layers": 2, "model.head": 8})
train(config, sys.argv[2], device="cpu", progress=False)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_run_goes_on_where_it_stopped(zoo, tmp_path, name):
    """A signal in the middle of the second epoch of three; then the same command again."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = [sys.executable, "-c", INTERRUPTED, str(zoo), str(run), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0
    assert epochs_of(run) == ["0"]
    assert not (run / "model.json").exists()
    with pytest.raises(
        RunError, match=r"no trained model: model\.json is missing; finish `weightspace train`"
    ):
        load_run(run)
    config = config_of(zoo, epochs=3)
    resumed, undisturbed = fit(config, run), fit(config, whole)
    assert resumed.epochs == undisturbed.epochs == 3
    assert epochs_of(run) == ["0", "1", "2"], "the first epochs' scores are kept"
    found, expected = (load_file(where / "model.safetensors") for where in (run, whole))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert evaluate(run, device="cpu").networks == 8
    if name == "SIGINT":
        assert result.stderr.rstrip().endswith("KeyboardInterrupt")


def test_a_run_that_lost_its_last_step_only_is_completed(zoo, tmp_path):
    """Killed after the last epoch, before the model was written."""
    run = tmp_path / "run"
    report = fit(config_of(zoo), run)
    parameters = load_file(run / "model.safetensors")
    for name in ("model.json", "model.safetensors", "report.json"):
        (run / name).unlink()
    again = fit(config_of(zoo), run)
    assert (again.metrics, again.epochs, again.best_epoch) == (report.metrics, 2, report.best_epoch)
    found = load_file(run / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in parameters.items())


def test_a_damaged_checkpoint_is_one_sentence(zoo, tmp_path):
    run = tmp_path / "run"
    fit(config_of(zoo), run)
    (run / "model.json").unlink()
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"last\.ckpt") as caught:
        fit(config_of(zoo), run)
    assert "\n" not in str(caught.value)


def test_patience_ends_a_run_early(zoo, tmp_path):
    config = config_of(zoo, epochs=30, patience=1, learning_rate=1e-12)
    assert fit(config, tmp_path / "run").epochs < 30


def test_training_reads_no_test_network(zoo, tmp_path):
    """Poison in the test split changes nothing that is trained."""
    opened = Zoo.open(zoo)
    weights = np.array(opened["inr"].weights)
    weights[opened["inr"].rows_of("test")] = np.nan
    poisoned = Zoo({"inr": replace(opened["inr"], weights=weights)}).save(tmp_path / "poisoned.h5")
    for name, path in (("clean", zoo), ("run", poisoned)):
        fit(config_of(path), tmp_path / name)
    clean, other = (load_file(tmp_path / name / "model.safetensors") for name in ("clean", "run"))
    assert all(torch.equal(clean[name], other[name]) for name in clean)


# -- refusals ----------------------------------------------------------------------------------------------


def test_targets_that_do_not_suit_are_named(zoo, tmp_path):
    for target, message in [
        ("loss", "target: the zoo has no label or metric 'loss'; it has labels label and metrics psnr"),
        (
            "psnr",
            r"task classification: target 'psnr' should hold class numbers 0, 1, \.\.\., found torch.float32",
        ),
    ]:
        with pytest.raises(TaskError, match=message):
            fit(config_of(zoo, target=target), tmp_path / "run")
    inr = Zoo.open(zoo)["inr"]
    for values, message in [
        (inr.labels["label"].astype(np.float32), r"found torch\.float32 from 0\.0; store them as integers$"),
        (inr.labels["label"].astype(np.float32) + 0.5, r"found torch\.float32 from 0\.5$"),
        (inr.labels["label"] - 1, r"found torch\.int64 from -1$"),
        (
            inr.labels["label"] + 10**12,
            r"'label' is out of range: expected class numbers below 1,240 for 24 networks",
        ),
    ]:
        other = Zoo({"inr": replace(inr, labels={"label": values})}).save(
            tmp_path / "other.h5", overwrite=True
        )
        with pytest.raises(TaskError, match=message):
            fit(config_of(other), tmp_path / "run")
    single = Zoo({"inr": replace(inr, labels={"label": np.zeros(40, np.int64)})}).save(tmp_path / "single.h5")
    with pytest.raises(TaskError, match="target 'label' has only one class"):
        fit(config_of(single), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_that_training_did_not_know_is_refused(zoo, tmp_path, trained_run):
    inr = Zoo.open(zoo)["inr"]
    odd = replace(inr, labels={"label": np.where(inr.split == 2, 7, inr.labels["label"])})
    path = Zoo({"inr": odd}).save(tmp_path / "odd.h5")
    with pytest.raises(TaskError, match=r"of split 'test' should be in 0 \.\. 2, .* found 7"):
        evaluate(trained_run(tmp_path), path, device="cpu")


def test_mistakes_are_found_before_the_run_directory_is_made(zoo, tmp_path):
    with pytest.raises(ConfigError, match="augment: expected some of permutation"):
        fit(config_of(zoo, augment="mixdown"), tmp_path / "run")
    with pytest.raises(ConfigError, match="positive: expected a weight space with the symmetry positive"):
        fit(config_of(zoo, augment="positive"), tmp_path / "run")
    with pytest.raises(ZooError, match="file not found"):
        fit(config_of(tmp_path / "no.h5"), tmp_path / "run")
    foreign = Zoo({"inr": replace(Zoo.open(zoo)["inr"], architecture=None)}).save(tmp_path / "foreign.h5")
    with pytest.raises(ConfigError, match="model probe: the zoo does not say how to rebuild"):
        fit(config_of(foreign, "probe"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_weight_space_is_refused(zoo, tmp_path):
    from weightspace.nets import MLP

    run = tmp_path / "run"
    fit(config_of(zoo), run)
    nets = [MLP((2, 5, 1)) for _ in range(10)]
    other = Zoo.from_state_dicts([n.state_dict() for n in nets], module=nets[0], labels={"label": [0, 1] * 5})
    path = Zoo({"inr": other["mlp"]}).save(tmp_path / "other.h5")
    with pytest.raises(RunError, match=r"trained on networks of 105 parameters, but those of .* have 21"):
        evaluate(run, path, device="cpu")
    assert evaluate(run, zoo, split="train", device="cpu").networks == 24


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\x00", b'{"spec": 3}', None])
def test_a_damaged_run_is_one_sentence(zoo, tmp_path, name, content, trained_run):
    run = trained_run(tmp_path)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    with pytest.raises(RunError, match=f"^run {run}: ") as caught:
        evaluate(run, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def trained_run(zoo, tmp_path_factory):
    """A copy of a run per test."""
    import shutil

    original = tmp_path_factory.mktemp("original") / "run"
    fit(config_of(zoo, epochs=1), original)
    return lambda folder: shutil.copytree(original, folder / "run")


def test_another_models_parameters_are_refused(zoo, tmp_path, trained_run):
    run = trained_run(tmp_path)
    fit(config_of(zoo, "mlp"), tmp_path / "mlp")
    (run / "model.safetensors").write_bytes((tmp_path / "mlp" / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match="its files are damaged") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def test_a_damaged_report_is_one_sentence(zoo, tmp_path, trained_run):
    run = trained_run(tmp_path)
    (run / "report.json").write_text("{")
    with pytest.raises(RunError, match=r"report\.json"):
        fit(config_of(zoo, epochs=1), run)


def test_a_zoo_that_changed_under_a_run_is_noticed(tmp_path):
    """Its splits may be others: what was trained on would count as unseen."""
    path, run = tmp_path / "zoo.h5", tmp_path / "run"
    tiny_zoo(networks=40).save(path)
    fit(config_of(path), run)
    tiny_zoo(networks=40, seed=1).save(path, overwrite=True)
    with pytest.raises(RunError, match="has changed since training began"):
        fit(config_of(path), run)
    with pytest.raises(RunError, match="has changed since training began"):
        evaluate(run, device="cpu")
    assert evaluate(run, path, device="cpu").networks == 8, "naming a zoo says that it is meant"


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_any_number_of_steps_has_a_schedule(zoo, tmp_path, steps):
    config = config_of(zoo, epochs=steps, batch_size=64)
    assert fit(config, tmp_path / "run").epochs == steps


def test_one_diverged_network_does_not_spoil_training(tmp_path):
    zoo = tiny_zoo(networks=40)
    weights = zoo["inr"].weights.copy()
    weights[np.flatnonzero(zoo["inr"].split == 0)[0], 0] = np.nan
    path = Zoo({"inr": replace(zoo["inr"], weights=weights)}).save(tmp_path / "zoo.h5")
    with pytest.raises(TaskError, match=r"NaN or infinite weights in 1 row of split train: \d+; --skip-bad"):
        fit(config_of(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    report = fit(config_of(path, skip_bad=True), tmp_path / "run")
    assert report.skipped == 1
    assert np.isfinite(report.metrics["loss"])
