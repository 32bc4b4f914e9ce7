"""Precision, accumulation, compilation and several processes: what they change, and what they must not."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weightspace.datasets import ZooDataset
from weightspace.errors import DeviceError
from weightspace.tasks import Classification, Metanetwork, evaluate, train, train_config
from weightspace.tasks._compile import compile_or_fall_back
from weightspace.tasks._memory import step_memory
from weightspace.testing import tiny_zoo

SMALL = {"model.hidden": 4, "model.layers": 1, "model.head": 8}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def config_of(zoo, *, task="classification", **changes):
    values = {"zoo": str(zoo), "task": task, "epochs": 2, "batch_size": 8}
    options = {"model.hidden": [16], "model": "mlp", "model.dropout": 0.0} if task != "editing" else SMALL
    if "model" in options:
        values["model"] = "mlp"
        options = {name: value for name, value in options.items() if name != "model"}
    return train_config(values, {**options, **changes})


def fit(config, run):
    return train(config, run, device="cpu", progress=False)


def parameters(run):
    return load_file(run / "model.safetensors")


def test_accumulated_gradients_are_those_of_a_larger_batch(zoo, tmp_path):
    """Twenty-four networks, one step of 24 or three batches of 8 (no BatchNorm, no augmentation)."""
    changes = {"model.hidden": 4, "model.layers": 1, "model.norm": "none", "augment": "", "patience": None}
    found = []
    for name, batch, accumulate in [("whole", 24, 1), ("parts", 8, 3), ("less", 8, 1)]:
        values = {"zoo": str(zoo), "model": "dws", "epochs": 2, "batch_size": batch, "accumulate": accumulate}
        fit(train_config(values, changes), tmp_path / name)
        found.append(parameters(tmp_path / name))
    whole, parts, less = found
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(less[name], tensor, rtol=1e-3) for name, tensor in whole.items())


@pytest.mark.parametrize("task", ["classification", "editing"])
def test_mixed_precision_comes_close_and_saves_float32(zoo, tmp_path, task):
    losses = []
    for precision in ("32", "bf16-mixed"):
        report = fit(config_of(zoo, task=task, precision=precision), tmp_path / precision)
        losses.append(report.metrics["loss"])
        assert {tensor.dtype for tensor in parameters(tmp_path / precision).values()} <= {
            torch.float32,
            torch.int64,
        }
    assert losses[0] != losses[1], "bfloat16 rounds"
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_half_precision_needs_cuda(zoo, tmp_path):
    with pytest.raises(DeviceError, match="precision: 16-mixed needs CUDA; take bf16-mixed on a CPU"):
        fit(config_of(zoo, precision="16-mixed"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_costs_one_line(zoo, tmp_path, monkeypatch, capfd):
    """And nothing else: the numbers are those of plain PyTorch."""

    def broken(function):
        def call(*arguments, **keywords):
            raise RuntimeError("no C++ compiler\nanywhere")

        return call

    fit(config_of(zoo), tmp_path / "plain")
    capfd.readouterr()
    monkeypatch.setattr(torch, "compile", broken)
    fit(config_of(zoo, compile=True), tmp_path / "compiled")
    error = capfd.readouterr().err
    assert (
        error.count("torch.compile failed (RuntimeError: no C++ compiler anywhere); going on without it") == 1
    )
    assert error.count("\n") == 1
    expected = parameters(tmp_path / "plain")
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in parameters(tmp_path / "compiled").items()
    )


def test_compiled_modules_keep_their_names_and_errors_their_cause(monkeypatch):
    module = torch.nn.Linear(3, 2)
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: seen.append(1) or function(x))
    compile_or_fall_back(module)
    x = torch.ones(1, 3)
    assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))
    assert seen == [1]
    assert set(module.state_dict()) == {"weight", "bias"}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.ones(1, 4))


def test_the_memory_of_a_step_by_hand(zoo):
    """One linear layer: its input is kept, and the logits for the loss; nothing else grows with the batch."""
    dataset = ZooDataset(zoo)
    model = torch.nn.Sequential(Flat(dataset.spec), torch.nn.Linear(105, 3))
    network, task = Metanetwork(model, None), Classification(3)
    needed = [step_memory(network, task, dataset, size) for size in (2, 10, 100)]
    assert needed[2] - needed[0] == pytest.approx(98 / 8 * (needed[1] - needed[0]))
    each = (needed[1] - needed[0]) / 8
    assert 4 * (105 + 3) <= each <= 4 * (105 + 3) + 8 + 12, "the weights, the probabilities, a label"
    assert needed[0] - 2 * each == pytest.approx(4 * 4 * (105 * 3 + 3), abs=64)


class Flat(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def forward(self, weights):
        return self.spec.flatten(weights)


def test_a_batch_that_cannot_fit_is_refused_before_the_first_step(zoo, tmp_path, monkeypatch):
    import weightspace.tasks._train as room

    monkeypatch.setattr(room, "total_memory", lambda device: 1000)
    message = (
        r"batch_size: a step of 8 networks needs at least .* GB, but cpu has 0\.0 GB; lower it, and raise acc"
    )
    with pytest.raises(DeviceError, match=message):
        fit(config_of(zoo), tmp_path / "run")
    assert not (tmp_path / "run").exists()


KILLED = """
import os, sys
from weightspace.tasks import train, train_config
from weightspace.tasks._module import MetanetworkModule
MetanetworkModule.on_train_batch_start = lambda self, batch, index: (
    os._exit(9) if (self.current_epoch, index) == (1, 1) else None
)
settings = {"model.hidden": 4, "model.layers": 1, "accumulate": 2, "precision": "bf16-mixed"}
values = {"zoo": sys.argv[1], "model": "dws", "task": "editing", "epochs": 2, "batch_size": 8}
train(train_config(values, settings), sys.argv[2], device="cpu", progress=False)
"""


def test_an_interrupted_run_gives_the_same_numbers_whatever_the_options(zoo, tmp_path):
    """Editing, with gradients that are accumulated in bfloat16, killed in the middle of the second epoch."""
    command = [sys.executable, "-c", KILLED, str(zoo), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert killed.returncode == 9, killed.stderr
    settings = {"model.hidden": 4, "model.layers": 1, "accumulate": 2, "precision": "bf16-mixed"}
    values = {"zoo": str(zoo), "model": "dws", "task": "editing", "epochs": 2, "batch_size": 8}
    for name in ("run", "whole"):
        assert fit(train_config(values, settings), tmp_path / name).epochs == 2
    expected = parameters(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(tmp_path / "run").items())
    scores = [evaluate(tmp_path / name, device="cpu").metrics for name in ("run", "whole")]
    assert scores[0] == scores[1]
    assert np.isfinite(scores[0]["loss"])
