"""The command: exit codes, one line per error, one JSON object per result, and what each subcommand does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from weightspace.cli import run
from weightspace.datagen import recipe_names
from weightspace.nets import MLP
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, verify_digest

COMMANDS = (
    "recipes",
    "generate",
    "info",
    "show",
    "canonicalize",
    "import",
    "export",
    "train",
    "evaluate",
    "predict",
    "edit",
    "spec",
    "align",
    "merge",
    "barrier",
    "check",
)
SMALL = ["--set", "source.size=8", "--set", "network.hidden=[8]", "--set", "protocol.steps=5"]
FIT = ["--model", "mlp", "--set", "model.hidden=[8]", "--epochs", "1", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    assert run(["train", str(zoo), "-o", str(path), *FIT]) == 0
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"Example: weightspace {command} " in " ".join(out.split())


def test_the_command_lists_its_subcommands_and_its_version(call):
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    code, out, _ = call("--version")
    assert (code, out.split()[0]) == (0, "weightspace")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["info"],
        ["info", "a.h5", "--speed"],
        ["generate", "digits-inr", "-o", "x.h5", "--count", "two"],
    ],
)
def test_wrong_usage_exits_with_2(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


# -- zoos --------------------------------------------------------------------------------------------------


def test_recipes_are_listed_and_printed(call, document):
    assert set(document("recipes")) == set(recipe_names()) >= {"digits-inr", "fashion-cnn-zoo"}
    assert document("recipes", "digits-inr")["source"] == {"kind": "digits", "size": 28}
    code, out, _ = call("recipes", "digits-inr")
    assert code == 0
    assert out.startswith("name: digits-inr\n")


def test_generate_then_info_then_show(call, document, tmp_path):
    output = tmp_path / "zoo.h5"
    made = document("generate", "digits-inr", "-o", output, "--count", 6, "--views", 2, "--seed", 3, *SMALL)
    assert {"output", "digest", "networks", "networks_per_second", "seconds"} <= set(made)
    assert (made["output"], made["networks"], made["trained"]) == (str(output), 12, 12)
    again = document("generate", "digits-inr", "-o", output, "--count", 6, "--views", 2, "--seed", 3, *SMALL)
    assert (again["trained"], again["digest"]) == (0, made["digest"])
    found = document("info", output, "--verify")
    assert (found["format_version"], found["digest"], found["verified"]) == (1, made["digest"], True)
    assert found["recipe"]["seed"] == 3
    inr = found["populations"]["inr"]
    assert (inr["networks"], inr["rows"], inr["parameters"]) == (12, 12, 33)
    assert inr["architecture"]["arguments"]["widths"] == [2, 8, 1]
    psnr = Zoo.open(output)["inr"].metrics["psnr"]
    assert inr["metrics"]["psnr"] == pytest.approx(
        {"min": psnr.min(), "median": np.median(psnr), "max": psnr.max(), "not_finite": 0}, rel=1e-6
    )
    code, out, _ = call("info", output)
    assert code == 0
    assert "population inr: 12 networks of 6 items" in out
    assert made["digest"] in out
    picture = tmp_path / "zoo.png"
    assert document("show", output, "-o", picture, "--count", 4) == {"output": str(picture)}
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_json_has_no_nan(document, tmp_path):
    inr = tiny_zoo(networks=4)["inr"]
    inr.metrics["psnr"][:] = np.nan
    path = Zoo({"inr": inr}).save(tmp_path / "zoo.h5")
    found = document("info", path)["populations"]["inr"]["metrics"]["psnr"]
    assert found == {"min": None, "median": None, "max": None, "not_finite": 4}


def test_quiet_is_quiet(call, tmp_path):
    arguments = ["generate", "digits-inr", "-o", tmp_path / "zoo.h5", "--count", 3, *SMALL, "--quiet"]
    assert call(*arguments) == (0, "", "")


def test_mistakes_in_generate_are_one_line(refuse, tmp_path):
    output = tmp_path / "zoo.h5"
    assert "neither a file nor a built-in recipe" in refuse("generate", "cifar", "-o", output)
    assert "count: " in refuse("generate", "digits-inr", "-o", output, "--count", 0)
    assert "has 1797 items, found 9999" in refuse("generate", "digits-inr", "-o", output, "--count", 9999)
    assert "unknown key" in refuse("generate", "digits-inr", "-o", output, "--set", "spede=1")
    assert "--set: expected KEY=VALUE" in refuse("generate", "digits-inr", "-o", output, "--set", "steps")
    assert "not a valid value" in refuse("generate", "digits-inr", "-o", output, "--set", "seed=[")
    assert "--data-root" in refuse("generate", "mnist-inr", "-o", output)
    assert "does not exist" in refuse("generate", "digits-inr", "-o", tmp_path / "no" / "zoo.h5")
    broken = tmp_path / "mine.yaml"
    broken.write_text("name: x\nsource: {kind: digits}\nprotocol: dws\ntypo: 1\n")
    assert ", line 4: typo: unknown key" in refuse("generate", broken, "-o", output)
    output.write_text("notes")
    assert "was not made by this recipe" in refuse("generate", "digits-inr", "-o", output)
    assert output.read_text() == "notes"


def test_damaged_zoos_are_one_line(refuse, zoo, tmp_path):
    assert "file not found" in refuse("info", tmp_path / "no.h5")
    cut = tmp_path / "cut.h5"
    cut.write_bytes(zoo.read_bytes()[:3000])
    for command in (
        ["info", cut],
        ["show", cut, "-o", tmp_path / "a.png"],
        ["train", cut, "-o", tmp_path / "r"],
    ):
        assert "cut.h5: file is truncated" in refuse(*command)
    flipped = bytearray(zoo.read_bytes())
    flipped[Zoo.open(zoo)["inr"].weights.offset] ^= 1
    cut.write_bytes(flipped)
    assert "content is damaged: digest should be" in refuse("info", cut, "--verify")
    bare = Zoo({"inr": tiny_zoo(networks=4)["inr"]}).save(tmp_path / "bare.h5")
    assert "stores no source signals" in refuse("show", bare, "-o", tmp_path / "a.png")
    (tmp_path / "a.png").write_text("x")
    assert "exists already" in refuse("show", zoo, "-o", tmp_path / "a.png")


INTERRUPT = """
import sys, time
from weightspace.cli import main
from weightspace.datagen import _generate
class Bar(_generate.tqdm):
    def update(self, n=1):
        super().update(n)
        if self.n >= 4:
            print("now", flush=True)
            time.sleep(30)
_generate.tqdm = Bar
main()
"""


def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(call, document, tmp_path):
    arguments = [
        "generate",
        "digits-inr",
        "-o",
        str(tmp_path / "zoo.h5"),
        "--count",
        "6",
        *SMALL,
        "--set",
        "shard=2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.endswith(
        "weightspace: interrupted; what was finished is kept; the same command goes on from there\n"
    )
    assert "Traceback" not in err
    assert not (tmp_path / "zoo.h5").exists()
    assert document(*arguments)["trained"] == 4
    verify_digest(tmp_path / "zoo.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.h5"]


# -- metanetworks ------------------------------------------------------------------------------------------


def test_train_then_evaluate(document, zoo, tmp_path):
    path = tmp_path / "run"
    made = document("train", zoo, "-o", path, *FIT)
    assert (made["model"], made["task"], made["epochs"], made["run"]) == (
        "mlp",
        "classification",
        1,
        str(path),
    )
    assert document("train", zoo, "-o", path, *FIT) == made
    found = document("evaluate", path, "--split", "val", "--device", "cpu")
    assert {"task", "model", "split", "metrics"} <= set(found)
    assert (found["task"], found["model"], found["split"]) == ("classification", "mlp", "val")
    assert found["metrics"] == pytest.approx(made["metrics"], rel=1e-5)
    assert document("evaluate", path, zoo, "--device", "cpu")["networks"] == 8


def test_text_goes_to_standard_output(call, trained):
    code, out, err = call("evaluate", trained, "--device", "cpu")
    assert code == 0
    assert out.startswith("mlp on 8 test networks of ")
    assert err == ""


def test_mistakes_in_train_are_one_line(refuse, zoo, trained, tmp_path):
    train = ["train", zoo, "-o", tmp_path / "run", "--device", "cpu", "--quiet"]
    assert "no label or metric 'loss'" in refuse(*train, "--target", "loss")
    assert "model: expected one of dws" in refuse(*train, "--model", "cnn")
    assert "model.hiden: unknown option" in refuse(*train, "--set", "model.hiden=3")
    assert "epochs: " in refuse(*train, "--epochs", "0")
    assert "augment: expected some of" in refuse(*train, "--augment", "mixdown")
    assert "task: expected one of" in refuse(*train, "--task", "dance")
    assert "population: expected one of inr" in refuse(*train, "--population", "cnn")
    assert "device: expected auto, cpu or cuda" in refuse(*train, "--device", "tpu")
    assert "holds a run of another configuration (seed: 0 there, 5 now)" in refuse(
        "train", zoo, "-o", trained, *FIT, "--seed", 5
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_one_line(refuse, zoo, trained, tmp_path):
    message = "device: cuda was asked for, but PyTorch finds no CUDA device here; use --device cpu"
    assert refuse("train", zoo, "-o", tmp_path / "run", "--device", "cuda") == message
    assert refuse("evaluate", trained, "--device", "cuda") == message
    assert refuse("generate", "digits-inr", "-o", tmp_path / "zoo.h5", "--device", "cuda") == message
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_evaluate_are_one_line(refuse, trained, zoo, tmp_path):
    assert "not a run directory: config.yaml is missing" in refuse("evaluate", tmp_path)
    assert "split: expected one of" in refuse("evaluate", trained, "--split", "dev")
    nets = [MLP((2, 3, 1)) for _ in range(10)]
    small = Zoo.from_state_dicts([n.state_dict() for n in nets], module=nets[0], labels={"label": [0, 1] * 5})
    path = small.save(tmp_path / "small.h5")
    assert "trained on networks of 105 parameters" in refuse("evaluate", trained, path)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert "no trained model" in refuse("evaluate", unfinished)
    (unfinished / "config.yaml").write_text("model: [")
    assert "config.yaml is not valid YAML" in refuse("evaluate", unfinished)


# -- the program ----------------------------------------------------------------------------------------------


def test_the_installed_command_is_this_one(zoo):
    """Started as a user starts it, in a process of its own."""
    command = Path(sys.executable).with_name("weightspace")
    started = time.perf_counter()
    result = subprocess.run([command, "info", zoo, "--json"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["digest"] == Zoo.open(zoo).digest
    assert result.stderr == ""
    assert time.perf_counter() - started < 60
    missing = subprocess.run([command, "info", "no.h5"], capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "weightspace: zoo no.h5: file not found\n"
    assert os.path.exists(zoo)
