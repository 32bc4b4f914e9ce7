"""``weightspace export``: what it prints, for people and for programs."""

import pytest

from weightspace.testing import tiny_zoo
from weightspace.zoo import EXPORTERS, Zoo


@pytest.fixture
def zoo(tmp_path):
    return tiny_zoo(networks=12).save(tmp_path / "zoo.h5")


def test_the_document(document, zoo, tmp_path):
    found = document("export", zoo, "dwsnets", tmp_path / "out", "--where", "view == 0")
    assert found.pop("seconds") > 0
    assert found == {
        "output": str(tmp_path / "out"),
        "format": "dwsnets",
        "populations": {"inr": 6},
        "networks": 6,
        "rows": 6,
        "left_out": ["metrics/psnr", "step", "sources/tiny"],
    }
    assert len(list((tmp_path / "out").glob("inr_training_*/checkpoints/*.pth"))) == 6


def test_the_text(call, zoo, tmp_path):
    code, out, err = call("export", zoo, "folder", tmp_path / "out")
    assert code == 0
    assert (
        out == f"{tmp_path / 'out'}: 12 networks, 12 checkpoints\nthe layout has no place for sources/tiny\n"
    )
    assert "12/12" in err
    assert call("export", zoo, "folder", tmp_path / "out", "-q", "--overwrite") == (0, "", "")


def test_one_sentence(refuse, zoo, tmp_path):
    assert refuse("export", zoo, "x", tmp_path / "out").startswith("format: expected one of ")
    assert 'say --where "view == 0"' in refuse("export", zoo, "dwsnets", tmp_path / "out")
    assert "file not found" in refuse("export", tmp_path / "none.h5", "folder", tmp_path / "out")
    (tmp_path / "out").mkdir()
    assert "exists already" in refuse("export", zoo, "folder", tmp_path / "out")


def test_the_help_lists_the_formats(call):
    _, out, _ = call("export", "--help")
    assert all(name in out for name in EXPORTERS)


def test_there_and_back(document, zoo, tmp_path):
    document("export", zoo, "folder", tmp_path / "out")
    document("import", "folder", tmp_path / "out", "-o", tmp_path / "back.h5")
    one, other = Zoo.open(zoo)["inr"], Zoo.open(tmp_path / "back.h5")["inr"]
    assert one.weights.tobytes() == other.weights.tobytes()
