"""The benchmark program runs at toy size and reports what it measured."""

import json

import pytest


def test_toy_run_writes_both_reports(tmp_path, load_program, capsys):
    program = load_program("inr_fitting")
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


def test_the_three_engines_fit_equally_well(load_program):
    program = load_program("inr_fitting")
    problem = program.make_problem(2)
    first, *others = [run(*problem) for run in program.engines(40).values()]
    for psnr in others:
        assert psnr == pytest.approx(first, abs=0.05)
