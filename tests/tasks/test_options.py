"""Precision, accumulation, compilation and several processes: what they change, and what they must not."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weightspace.datasets import ZooDataset
from weightspace.errors import DeviceError
from weightspace.models import MODELS
from weightspace.tasks import (
    Classification,
    Editing,
    Metanetwork,
    edit,
    evaluate,
    load_run,
    predict,
    train,
    train_config,
)
from weightspace.tasks import _memory as memory
from weightspace.tasks import _module as loop
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

    monkeypatch.setattr(room, "total_memory", lambda device: 30_000)
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


# -- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "editing"])
def test_no_batch_is_larger_than_that_of_training(zoo, tmp_path, monkeypatch, task):
    """In training, in validation, and whatever reads networks later; the numbers are those of one batch of all."""
    sizes = []
    forward = Metanetwork.forward

    def seen(self, weights):
        sizes.append(len(next(iter(weights.values()))))
        return forward(self, weights)

    config, run = config_of(zoo, task=task, batch_size=4), tmp_path / "run"
    monkeypatch.setattr(Metanetwork, "forward", seen)
    fit(config, run)
    report = evaluate(run, split="train", device="cpu")
    if task == "editing":
        edit(run, zoo, tmp_path / "edited.h5", device="cpu")
    else:
        predict(run, zoo, tmp_path / "predictions.csv", device="cpu")
    assert max(sizes) == 4
    loaded, dataset = load_run(run), ZooDataset(zoo, "train", target=config.target)
    weights, _ = dataset.read(range(len(dataset)))
    with torch.no_grad():
        readout = loaded.task.readout(loaded.network(weights))
    assert report.metrics == pytest.approx(
        loaded.task.scores(readout, loaded.task.targets(dataset)), rel=1e-4
    )


def test_gradients_of_a_step_are_means_however_few_batches_it_has(zoo, tmp_path, monkeypatch):
    """Twenty-four networks in batches of 8: with two for a step, the last step of an epoch has one."""
    seen = {}
    for accumulate in (1, 2, 4):
        gradients = seen[accumulate] = []

        def keep(module, optimiser, gradients=gradients):
            gradients.append(torch.cat([p.grad.flatten() for p in module.network.parameters()]))

        monkeypatch.setattr(loop.MetanetworkModule, "on_before_optimizer_step", keep)
        fit(config_of(zoo, accumulate=accumulate, epochs=1, learning_rate=1e-30), tmp_path / f"{accumulate}")
    assert [len(gradients) for gradients in seen.values()] == [3, 2, 1]
    first, second, third = seen[1]
    torch.testing.assert_close(seen[2][0], (first + second) / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen[2][1], third, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(seen[4][0], (first + second + third) / 3, rtol=1e-4, atol=1e-7)


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "numpy", "cpu"],
)
def test_too_little_memory_is_one_sentence(zoo, tmp_path, monkeypatch, error):
    runs = {}
    for task in ("classification", "editing"):
        runs[task] = tmp_path / task
        fit(config_of(zoo, task=task, epochs=1), runs[task])

    def full(self, weights):
        raise error

    monkeypatch.setattr(Metanetwork, "forward", full)
    output = tmp_path / "output"
    for attempt in (
        lambda: evaluate(runs["classification"], device="cpu"),
        lambda: predict(runs["classification"], zoo, output, device="cpu"),
        lambda: edit(runs["editing"], zoo, output, device="cpu"),
        lambda: fit(config_of(zoo), tmp_path / "new"),
    ):
        with pytest.raises(DeviceError, match=r"(too little memory for|a step of) .*8 networks") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not output.exists()
    assert not (tmp_path / "new").exists()


def test_other_failures_stay_what_they_are(zoo, tmp_path, monkeypatch):
    fit(config_of(zoo, epochs=1), tmp_path / "run")

    def broken(self, weights):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Metanetwork, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(tmp_path / "run", device="cpu")


@pytest.mark.parametrize(
    ("model", "hidden"), [("dws", 3_000_000), ("mlp", [10**11]), ("mlp", [10**20]), ("mlp", [3000, 3000])]
)
def test_a_model_that_cannot_fit_is_one_sentence(zoo, tmp_path, monkeypatch, model, hidden):
    if hidden == [3000, 3000]:  # fits, but not with gradients and moments
        monkeypatch.setattr("weightspace.tasks._train.total_memory", lambda device: 100_000_000)
    config = train_config({"zoo": str(zoo), "model": model}, {"model.hidden": hidden})
    with pytest.raises(DeviceError, match=r"^model: its parameters.* GB") as caught:
        fit(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    whole = memory.total_memory("cpu")
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    for content, expected in (("123456\n", 123456), ("max\n", None), (f"{10**18}\n", None)):
        (tmp_path / "memory.max").write_text(content)
        assert memory.total_memory("cpu") == (
            expected or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
    assert whole > 0


def test_every_process_and_all_targets_count(zoo, tmp_path, monkeypatch):
    """24 and 8 images of 6 x 6 pixels in float32 are held beside a step."""
    config = config_of(zoo, task="editing")
    splits = [ZooDataset(zoo, split, target=None) for split in ("train", "val")]
    for dataset in splits:
        dataset.targets = Editing.from_data(dataset, config.settings()).targets(dataset)
    assert memory.held_memory(*splits, device="cpu") == 32 * 36 * 4
    assert memory.held_memory(*splits, device="cuda") == 32 * (36 + 105) * 4
    needed = []
    for devices in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("weightspace.tasks._train.step_memory", lambda *_, **__: 3_000_000_000_000)
            with pytest.raises(DeviceError) as caught:
                fit(config_of(zoo, task="editing", devices=devices), tmp_path / "run")
        needed.append(str(caught.value))
    assert "a step of 8 networks needs at least 3,000.0 GB" in needed[0]
    assert "a step of 8 networks in 2 processes needs at least 6,000.0 GB" in needed[1]


# -- compilation and several processes ---------------------------------------------------------------------


COMPILED = """
import functools, sys
import torch
from torch._dynamo.utils import counters
from weightspace.tasks import train, train_config
torch.compile = functools.partial(torch.compile, backend="aot_eager")
for compiled in (False, True):
    values = {"zoo": sys.argv[1], "model": "mlp", "epochs": 2, "batch_size": 8, "compile": compiled}
    config = train_config(values, {"model.hidden": [16], "model.dropout": 0.0})
    train(config, f"{sys.argv[2]}/{compiled}", device="cpu", progress=False)
    print(counters["stats"]["unique_graphs"])
"""


def test_what_is_compiled_gives_the_same_numbers(zoo, tmp_path):
    """The real compiler without the slow part that makes machine code, and without the checks of types in tests."""
    command = [sys.executable, "-c", COMPILED, str(zoo), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    plain, compiled = map(int, result.stdout.split())
    assert plain == 0 < compiled
    assert "torch.compile failed" not in result.stderr
    expected = parameters(tmp_path / "False")
    for name, tensor in parameters(tmp_path / "True").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_every_process_compiles_for_itself(zoo, tmp_path, monkeypatch):
    """What is compiled is lost on the way into another process."""
    seen = []
    monkeypatch.setattr(
        torch, "compile", lambda function: lambda *a, **k: seen.append(1) or function(*a, **k)
    )
    dataset, config = ZooDataset(zoo), config_of(zoo, compile=True)
    network = Metanetwork(MODELS["mlp"](hidden=(4,)).build(dataset.spec, None, 3), None)
    module = loop.MetanetworkModule(network, Classification(3), config, dataset, tmp_path)
    module.configure_model()
    module.configure_model()
    other = pickle.loads(pickle.dumps(module))
    assert other.network._compiled_call_impl is None
    other.configure_model()
    other(dataset.read(range(4))[0])
    assert seen == [1]


def test_processes_draw_dropout_masks_of_their_own(zoo, tmp_path, monkeypatch):
    dataset = ZooDataset(zoo)
    network = Metanetwork(torch.nn.Identity(), None)
    module = loop.MetanetworkModule(network, Classification(3), config_of(zoo), dataset, tmp_path)
    drawn = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(loop, "_place", lambda rank=rank: (rank, 2))
        module.on_train_epoch_start()
        drawn.append(torch.rand(8))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


TWO = """
import sys
from weightspace.tasks import train, train_config
if __name__ == "__main__":
    values = {"zoo": sys.argv[1], "model": "mlp", "epochs": 2, "batch_size": 8, "devices": 2, "learning_rate": 1e-12}
    config = train_config(values, {"model.hidden": [4], "model.dropout": 0.0})
    report = train(config, sys.argv[2], device="cpu", progress=False)
    print(report.epochs, report.best_epoch)
"""


def test_two_processes_report_all_epochs(zoo, tmp_path):
    """The second epoch is no better than the first, and the last one."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(zoo), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "1"]
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "1"]
    assert evaluate(tmp_path / "run", device="cpu").networks == 8
