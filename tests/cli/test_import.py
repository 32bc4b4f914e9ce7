"""``weightspace import``: what it prints, for people and for programs."""

import json
import subprocess
import sys

import pytest
import torch

from weightspace.nets import MLP
from weightspace.zoo import IMPORTERS, Zoo


@pytest.fixture
def source(tmp_path):
    """Twelve INRs as DWSNets lays them out."""
    for item in range(12):
        folder = tmp_path / "inrs" / f"mnist_png_training_{item % 3}_{item}" / "checkpoints"
        folder.mkdir(parents=True)
        state = MLP((2, 4, 1)).state_dict()
        torch.save(
            {name.replace("layers", "seq"): tensor for name, tensor in state.items()}, folder / "net.pth"
        )
    return tmp_path / "inrs"


def test_the_document(document, source, tmp_path):
    found = document("import", "dwsnets", source, "-o", tmp_path / "zoo.h5", "--set", "population=mnist")
    zoo = Zoo.open(tmp_path / "zoo.h5")
    assert found.pop("seconds") > 0
    assert found.pop("rows_per_second") > 0
    assert found == {
        "output": str(tmp_path / "zoo.h5"),
        "format": "dwsnets",
        "digest": zoo.digest,
        "populations": {"mnist": 12},
        "networks": 12,
        "rows": 12,
        "splits": {"train": 10, "val": 1, "test": 1},
        "skipped": 0,
        "skipped_first": [],
        "read": 12,
    }


def test_the_text_names_what_was_left_out(call, source, tmp_path):
    (source / "mnist_png_training_0_3" / "checkpoints" / "net.pth").write_text("x")
    code, out, err = call("import", "dwsnets", source, "-o", tmp_path / "zoo.h5", "--skip-bad")
    assert code == 0
    assert f"{tmp_path / 'zoo.h5'}: 11 networks; train 9, val 1, test 1; 12 read in" in out
    assert (
        "1 left out:\n  mnist_png_training_0_3/checkpoints/net.pth: not a file that torch.save wrote" in out
    )
    assert out.rstrip().endswith(Zoo.open(tmp_path / "zoo.h5").digest)
    assert "12/12" in err, "the bar"


def test_quiet_says_nothing(call, source, tmp_path):
    assert call("import", "dwsnets", source, "-o", tmp_path / "zoo.h5", "-q") == (0, "", "")


def test_one_sentence(refuse, source, tmp_path):
    assert refuse("import", "dws", source, "-o", tmp_path / "z.h5").startswith(
        "format: expected one of dwsnets, "
    )
    assert "unknown option of format dwsnets" in refuse(
        "import", "dwsnets", source, "-o", tmp_path / "z.h5", "--set", "x=1"
    )
    (source / "mnist_png_training_0_3" / "checkpoints" / "net.pth").write_text("x")
    message = refuse("import", "dwsnets", source, "-o", tmp_path / "z.h5", "-q")
    assert "mnist_png_training_0_3/checkpoints/net.pth: not a file that torch.save wrote" in message
    assert not (tmp_path / "z.h5").exists()


def test_the_help_lists_the_formats(call):
    _, out, _ = call("import", "--help")
    assert all(name in out for name in IMPORTERS)


def test_a_disk_that_is_really_full(source, tmp_path):
    """A file size limit of the system: the zoo does not fit."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from weightspace.cli import run; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)); "
        f"sys.exit(run(['import', 'dwsnets', {str(source)!r}, '-o', {str(tmp_path / 'z.h5')!r}, '-q']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("weightspace: output: ")
    assert ended.stderr.count("\n") == 1
    assert "could not be written (File too large)" in ended.stderr
    assert not (tmp_path / "z.h5").exists()


def test_what_it_wrote_can_be_read_by_the_other_commands(document, source, tmp_path):
    document("import", "dwsnets", source, "-o", tmp_path / "zoo.h5")
    info = document("info", tmp_path / "zoo.h5")
    assert info["recipe"]["name"] == "import dwsnets"
    assert json.dumps(info).count(str(tmp_path)) == 0, "no local path in a zoo"
