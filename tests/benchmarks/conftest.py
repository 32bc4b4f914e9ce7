"""Benchmark programs, loaded as if they were run."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load_program(monkeypatch):
    """A function from a program's name to its module; what it imports beside itself is found."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # its dataclasses look it up
        spec.loader.exec_module(module)
        return module

    yield load
    for name in ("_report", "_inrs", "_endpoints", "_alignment_tables", "_alignment_figures"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def same_threads():
    """The programs set the number of threads; sums of later tests would round otherwise than in a fresh process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
