"""Interrupted, moved, diverged and foreign runs: what is kept, and what is refused."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessRaisedException

from weightspace.errors import OutputError, RunError, TaskError
from weightspace.tasks import Classification, evaluate, train, train_config
from weightspace.tasks._module import MetanetworkModule
from weightspace.tasks._train import _of_a_process
from weightspace.testing import tiny_zoo


class StopError(Exception):
    """An interruption."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def config_of(zoo, **values):
    values = {"zoo": str(zoo), "model": "mlp", "epochs": 6, "batch_size": 8, "learning_rate": 0.1, **values}
    return train_config(values, {"model.hidden": [16], "model.dropout": 0.0})


def fit(config, run, **options):
    return train(config, run, device="cpu", progress=False, **options)


@pytest.fixture
def epochs(monkeypatch):
    """Scores that fall from epoch to epoch, and the epochs that were trained; ``epochs.stop`` interrupts in one."""

    class Epochs(list):
        stop = None

    found = Epochs()

    def seen(module, batch, index):
        if index == 0:
            found.append(module.current_epoch)
        if (module.current_epoch, index) == (found.stop, 1):
            raise StopError

    def falling(self, readout, targets):
        return {"accuracy": -float(readout.square().mean()), "loss": 0.0}

    monkeypatch.setattr(MetanetworkModule, "on_train_batch_start", seen)
    monkeypatch.setattr(Classification, "scores", falling)
    return found


def interrupted(config, run, epochs, at):
    epochs.stop = at
    with pytest.raises(StopError):
        fit(config, run)
    epochs.stop = None
    epochs.clear()


def test_a_run_that_was_moved_goes_on_as_if_it_had_not_been(zoo, tmp_path, epochs):
    """The best epoch is the first, and it was written under the old name."""
    config = config_of(zoo)
    whole = fit(config, tmp_path / "whole")
    assert whole.best_epoch == 1
    interrupted(config, tmp_path / "run", epochs, 4)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = fit(config, tmp_path / "moved")
    assert (moved.metrics, moved.epochs, moved.best_epoch) == (whole.metrics, 6, 1)
    assert not (tmp_path / "run").exists()
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "moved"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_epochs_that_are_not_the_best_are_kept_too(zoo, tmp_path, epochs):
    interrupted(config_of(zoo), tmp_path / "run", epochs, 4)
    fit(config_of(zoo), tmp_path / "run")
    assert epochs == [4, 5]
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_run_that_ended_early_ends_where_it_did(zoo, tmp_path, epochs):
    config = config_of(zoo, patience=2, epochs=9)
    first = fit(config, tmp_path / "run")
    assert (first.epochs, first.best_epoch) == (3, 1)
    for name in ("model.json", "report.json"):
        (tmp_path / "run" / name).unlink()
    epochs.clear()
    again = fit(config, tmp_path / "run")
    assert epochs == []
    assert (again.epochs, again.best_epoch, again.metrics) == (3, 1, first.metrics)


def test_a_lost_best_epoch_is_one_sentence(zoo, tmp_path):
    run = tmp_path / "run"
    fit(config_of(zoo, epochs=1), run)
    (run / "model.json").unlink()
    (run / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(RunError, match=r"the checkpoint of its best epoch is missing .*; pass --overwrite$"):
        fit(config_of(zoo, epochs=1), run)


def test_scores_that_are_nan_are_worst_and_null(zoo, tmp_path, monkeypatch):
    """And they do not end a run that has patience."""
    values = iter([math.nan, 0.25, math.nan, 0.5])

    def scores(self, readout, targets):
        good = len(targets) == 8  # the validation split
        return {"accuracy": next(values, math.nan) if good else 0.0, "loss": 1.0}

    monkeypatch.setattr(Classification, "scores", scores)
    config = config_of(zoo, epochs=4, patience=3, learning_rate=1e-3)
    report = fit(config, tmp_path / "run")
    assert (report.epochs, report.best_epoch) == (4, 4)
    document = json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=pytest.fail)
    assert document["metrics"] == {"accuracy": None, "loss": 1.0}
    assert math.isnan(fit(config, tmp_path / "run").metrics["accuracy"]), "as it was"
    evaluate(tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "evaluation-test.json"
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["metrics"]["accuracy"] is None


def test_training_that_diverges_is_one_sentence(zoo, tmp_path):
    config = config_of(zoo, learning_rate=1e18, task="regression", target="psnr")
    message = (
        r"run: the training loss is NaN or infinite in epoch [12], at learning rate 1e\+18; take a lower"
    )
    with pytest.raises(TaskError, match=message) as caught:
        fit(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model.json").exists()


def test_failures_of_one_of_several_processes_are_those_of_the_library():
    trace = (
        "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  File\n"
    )
    found = _of_a_process(
        ProcessRaisedException(f"{trace}weightspace.errors.TaskError: run: it: diverged\n", 1, 7)
    )
    assert (type(found), str(found)) == (TaskError, "run: it: diverged")
    assert _of_a_process(ProcessRaisedException(f"{trace}ValueError: what\n", 1, 7)) is None


# -- other versions ----------------------------------------------------------------------------------------


def test_a_run_of_another_version_is_refused_finished_or_not(zoo, tmp_path, epochs):
    config = config_of(zoo)
    interrupted(config, tmp_path / "unfinished", epochs, 1)
    fit(config, tmp_path / "finished")
    for name, file in (("unfinished", "zoo.json"), ("finished", "model.json")):
        run = tmp_path / name
        document = json.loads((run / file).read_text())
        (run / file).write_text(json.dumps({**document, "run_version": 1}))
        (run / "zoo.json").write_text(
            json.dumps({**json.loads((run / "zoo.json").read_text()), "run_version": 1})
        )
        with pytest.raises(RunError, match="version should be 2, found 1; train again with --overwrite"):
            fit(config, run)
        assert fit(config, run, overwrite=True).epochs == 6
    description = tmp_path / "finished" / "model.json"
    content = description.read_text()
    description.write_text(json.dumps({**json.loads(content), "run_version": 3}))
    with pytest.raises(RunError, match="version should be 2, found 3"):
        fit(config, tmp_path / "finished")
    description.write_text(content)
    zoo_file = tmp_path / "finished" / "zoo.json"
    digest = json.loads(zoo_file.read_text())["digest"]
    zoo_file.write_text(json.dumps({"digest": digest}))
    assert fit(config, tmp_path / "finished").epochs == 6, "model.json says the version"


def test_a_run_with_a_field_that_is_not_known_can_be_replaced(zoo, tmp_path):
    run, config = tmp_path / "run", config_of(zoo, epochs=1)
    fit(config, run)
    values = {**yaml.safe_load((run / "config.yaml").read_text()), "warm_up": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    message = (
        r"of another version: config\.yaml has the field 'warm_up', which is not known here; train again with"
    )
    with pytest.raises(RunError, match=message):
        fit(config, run)
    with pytest.raises(RunError, match=message):
        evaluate(run, device="cpu")
    assert fit(config, run, overwrite=True).epochs == 1
    (run / "config.yaml").write_text("title: thesis")
    with pytest.raises(OutputError, match="is not a run directory"):
        fit(config, run, overwrite=True)
