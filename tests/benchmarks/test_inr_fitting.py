"""The benchmark program runs at toy size and reports what it measured."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "inr_fitting.py"


def load_program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("inr_fitting", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "inr_fitting", module)  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_toy_run_writes_both_reports(tmp_path, monkeypatch, capsys):
    program = load_program(monkeypatch)
    assert program.main(["--toy", "-o", str(tmp_path)]) == 0
    table = (tmp_path / "inr_fitting.md").read_text()
    assert capsys.readouterr().out == table
    report = json.loads((tmp_path / "inr_fitting.json").read_text())
    assert report["setting"]["steps"] == 3
    assert report["setting"]["command"].startswith("python benchmarks/inr_fitting.py --toy")
    loop, batched, kernel = report["rows"]
    assert loop["ratio"] == 1.0
    for row in (batched, kernel):
        assert row["ratio"] == pytest.approx(row["networks_per_second"] / loop["networks_per_second"])
        assert f"| {row['engine']} |" in table


def test_the_three_engines_fit_equally_well(monkeypatch):
    program = load_program(monkeypatch)
    problem = program.make_problem(2)
    first, *others = [run(*problem) for run in program.engines(40).values()]
    for psnr in others:
        assert psnr == pytest.approx(first, abs=0.05)
