"""The programs in examples/ run at toy size, and find what they claim to find."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import weightspace as ws
from weightspace.zoo import load_network

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder; returns what it prints."""

    def call(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        state = torch.get_rng_state()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        torch.set_rng_state(state)
        return capsys.readouterr().out

    return call


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_plain_torch_makes_a_zoo_and_learns(run) -> None:
    out = run("plain_torch.py", "--count", "60", "--epochs", "6")
    losses = [float(value) for value in re.findall(r"batch (\S+)", out)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert "42 training networks" in out
    assert 0 <= number(r"test accuracy (\S+)", out) <= 1
    assert ws.Zoo.open("small-digits.h5")["inr"].networks == 60


def test_plain_torch_reads_a_given_zoo(run, tmp_path) -> None:
    quick = {"protocol.steps": 5}
    ws.generate("digits-inr", tmp_path / "given.h5", count=40, overrides=quick, device="cpu", progress=False)
    out = run("plain_torch.py", "given.h5", "--epochs", "1")
    assert "28 training networks" in out
    assert not Path("small-digits.h5").exists()


def test_own_networks_become_a_zoo_whose_weights_say_what_they_do(run) -> None:
    arguments = ["--networks", "180", "--steps", "250", "--model", "statistics", "--output", "own"]
    out = run("own_networks.py", *arguments)
    assert "180 networks" in out
    assert number(r"median loss (\S+)", out) < 0.1
    assert "hidden0: 12 units, tanh, sign" in out
    assert number(r"test accuracy (\S+) on 36", out) > 0.6  # three curves: chance is a third
    assert ws.Zoo.open("own/curves.h5")["curves"].labels["curve"][:4].tolist() == [0, 1, 2, 0]


def test_align_and_merge_brings_the_networks_closer_and_changes_no_function(run) -> None:
    out = run("align_and_merge.py", "--hidden", "32", "--steps", "150", "--output", "merged.safetensors")
    before, after = (number(rf"distance {part}", out) for part in (r"(\S+) ->", r"\S+ -> ([\d.]+)"))
    assert after < 0.9 * before
    assert number(r"changed by (\S+)", out) < 1e-12
    rows = {
        name: [float(value) for value in rest.split()]
        for name, rest in re.findall(r"^(A|B|average|aligned average) +([\d. ]+)$", out, re.MULTILINE)
    }
    assert list(rows) == ["A", "B", "average", "aligned average"]
    assert rows["B"][0] == pytest.approx(before, rel=1e-3)
    assert rows["average"][0] == pytest.approx(before / 2, rel=1e-2)
    assert rows["aligned average"][0] == pytest.approx(after / 2, rel=1e-2)
    assert min(rows["A"][2], rows["B"][2]) > 0.85
    assert rows["aligned average"][1] < rows["average"][1]
    assert set(load_network("merged.safetensors").weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
