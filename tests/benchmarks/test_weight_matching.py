"""The benchmark program runs at toy size and reports what it measured."""

import importlib.util
import json
import sys
import types

import pytest
import torch

from weightspace.align import weight_matching


@pytest.fixture
def program(load_program):
    return load_program("weight_matching")


def test_toy_run_writes_both_reports(program, tmp_path, capsys):
    assert program.main(["--toy", "-o", str(tmp_path)]) == 0
    table = (tmp_path / "weight_matching.md").read_text()
    assert capsys.readouterr().out == table
    report = json.loads((tmp_path / "weight_matching.json").read_text())
    assert report["setting"]["pairs"] == 4
    assert report["setting"]["command"].startswith("python benchmarks/weight_matching.py --toy")
    single, *others = (row for row in report["rows"] if "pairs_per_second" in row)
    assert single["ratio"] == 1.0
    assert table.splitlines()[2].startswith("| method | ratio |")
    for row in others:
        assert row["ratio"] == pytest.approx(row["pairs_per_second"] / single["pairs_per_second"])
        assert row["distance_after"] < row["distance_before"]
        assert f"| {row['method']} |" in table
    perceptron, residual, *assignments = report["rows"][1 + len(others) :]
    assert perceptron["seconds"] > 0
    assert residual["ratio"] == "-", "no peer matches residual networks"
    for row in assignments:
        assert row["ratio"] == pytest.approx(row["scipy"] / row["ours"])


def test_a_single_pair_is_compared_with_the_peer(program):
    rows = [
        {"seconds": 0.2, "objective": 11.0, "peer_seconds": 0.9, "peer_objective": 10.0},
        {"seconds": 0.1, "objective": 9.0, "peer_seconds": 0.5, "peer_objective": 10.0},
    ]
    found = program.summarise("pair", rows)
    assert (found["ratio"], found["wins"], found["gain"]) == ("5.00x", "1 of 2", "+0.0%")


def test_one_by_one_and_together_find_the_same(program):
    spec = program.WeightSpec.mlp(program.WIDTHS, activation="sine", w0=program.W0)
    generator = torch.Generator().manual_seed(1)
    pairs = tuple(program.random_networks(6, generator) for _ in range(2))
    alone = program.align_one_by_one(spec, pairs)()
    torch.testing.assert_close(alone, program.align_together(spec, pairs)(), rtol=1e-6, atol=0)


def test_the_peer_is_measured_where_it_is_installed(program, monkeypatch, tmp_path):
    """A stand-in with the peer's interface, so that this path is tested everywhere."""

    class PermutationCoordinateDescent:
        def __init__(self, model_a, model_b, input_data_b):
            model_b(input_data_b)
            self.reference, self.other = model_a.state_dict(), model_b

        def rebasin(self):
            spec = program.WeightSpec.mlp(program.WIDTHS, activation="sine", w0=program.W0)
            self.other.load_state_dict(weight_matching(spec, self.reference, self.other.state_dict())[0])

    peer = types.ModuleType("rebasin")
    peer.PermutationCoordinateDescent = PermutationCoordinateDescent
    peer.__spec__ = importlib.util.spec_from_loader("rebasin", None)
    monkeypatch.setitem(sys.modules, "rebasin", peer)
    rows = program.measure(4, 1)
    assert rows[-1]["method"] == "rebasin"
    assert rows[-1]["distance_after"] == pytest.approx(rows[0]["distance_after"], rel=1e-5)
