"""``canonicalize``: what it prints, what it refuses, and what is left when it is stopped."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, verify_digest

SLOW = """
import sys, time
from weightspace.cli import main
from weightspace.datasets import _canonicalize
_canonicalize._BLOCK = 1000
class Bar(_canonicalize.tqdm):
    def update(self, n=1):
        super().update(n)
        if self.n >= 18:
            print("now", flush=True)
            time.sleep(30)
_canonicalize.tqdm = Bar
main()
"""


@pytest.fixture
def zoo(tmp_path):
    return tiny_zoo(networks=40).save(tmp_path / "zoo.h5")


def test_help_has_an_example(call):
    code, out, _ = call("canonicalize", "--help")
    assert code == 0
    assert "Example: weightspace canonicalize digits.h5 -o sorted.h5 --method sort" in " ".join(out.split())


def test_text_says_what_was_done(call, zoo, tmp_path):
    path = tmp_path / "sorted.h5"
    code, out, _ = call("canonicalize", zoo, "-o", path)
    head, line, digest = out.splitlines()
    assert code == 0
    assert head.startswith(f"{path}: sort in ")
    assert line.startswith(
        "  inr: 40 of 40 rows moved by permutation, sign, phase; outputs of 16 networks changed"
    )
    assert digest == verify_digest(path)
    code, out, _ = call("canonicalize", path, "-o", tmp_path / "again.h5")
    assert out.splitlines()[1].startswith("  inr: 0 of 40 rows moved by ")
    assert "changed by at most 0.0e+00 of their largest value" in out
    assert out.splitlines()[2] == digest


def test_text_of_an_alignment_with_bad_rows_of_a_foreign_module(call, tmp_path):
    made = tiny_zoo(networks=10)["inr"]
    made.weights[3] = np.nan
    zoo = Zoo({"inr": made}).save(tmp_path / "zoo.h5")
    _, out, _ = call(
        "canonicalize", zoo, "-o", tmp_path / "a.h5", "--method", "align", "--symmetries", "sign, permutation"
    )
    line = out.splitlines()[1]
    assert line.startswith(
        "  inr: 8 of 10 rows moved, 1 left as stored (no canonical form), by permutation, sign; "
    )
    assert "; mean L2 distance to row 0 " in line
    assert "; outputs of 9 networks changed by at most " in line


def test_json_has_the_report(document, zoo, tmp_path):
    path = tmp_path / "aligned.h5"
    found = document("canonicalize", zoo, "-o", path, "--method", "align", "--reference", "4", "--seed", "2")
    assert (found["output"], found["method"], found["digest"]) == (str(path), "align", verify_digest(path))
    inr = found["populations"]["inr"]
    assert (inr["rows"], inr["networks"], inr["kept"], inr["reference"]) == (40, 40, 0, 4)
    assert inr["distance_after"] < inr["distance_before"]
    assert 0 < inr["max_relative_change"] < 1e-5
    record = Zoo.open(path)["inr"].protocol["canonical"]
    assert (record["method"], record["reference"]["row"], record["seed"]) == ("align", 4, 2)


def test_quiet_prints_nothing(call, zoo, tmp_path):
    assert call("canonicalize", zoo, "-o", tmp_path / "a.h5", "-q") == (0, "", "")


def test_mistakes_are_one_line(refuse, zoo, tmp_path):
    def found(*options, source=zoo, output=tmp_path / "out.h5"):
        return refuse("canonicalize", source, "-o", output, *options)

    align = ["--method", "align"]
    assert "method: expected one of sort, align, found 'mix'" in found("--method", "mix")
    assert "reference: expected a row of population 'inr', 0 .. 39, found 50" in found(
        *align, "--reference", "50"
    )
    assert "reference: only method 'align' has one" in found("--reference", "5")
    assert "can be aligned by permutation, sign, phase, found 'size'" in found(*align, "--symmetries", "size")
    assert "population: expected one of inr, found 'cnn'" in found("--population", "cnn")
    assert "is the zoo itself" in found("--overwrite", output=zoo)
    assert "file not found" in found(source=tmp_path / "no.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo.h5"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_goes_on_and_writes_the_same(document, refuse, zoo, tmp_path, number):
    whole = document("canonicalize", zoo, "-o", tmp_path / "whole.h5", "--method", "align", "-q")
    arguments = ["canonicalize", str(zoo), "-o", str(tmp_path / "out.h5"), "--method", "align"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "now\n"
    assert "is being written by process" in refuse(*arguments)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.endswith("interrupted; what was finished is kept; the same command goes on from there\n")
        assert "Traceback" not in err
    assert not (tmp_path / "out.h5").exists()
    assert 'method: "align" there, "sort" now' in refuse("canonicalize", zoo, "-o", tmp_path / "out.h5")
    found = document(*arguments, "-q")
    assert found["digest"] == whole["digest"] == verify_digest(tmp_path / "out.h5")
    assert found["populations"]["inr"]["moved"] == whole["populations"]["inr"]["moved"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "whole.h5", "zoo.h5"]
