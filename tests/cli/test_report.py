"""The subcommands that draw: pages and pictures of zoos."""

import pytest

from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo


@pytest.fixture
def zoo(tmp_path):
    return tiny_zoo(networks=8).save(tmp_path / "zoo.h5")


def test_writes_a_page(call, document, zoo, tmp_path):
    page = tmp_path / "zoo.html"
    assert document("report", zoo, "-o", page) == {"output": str(page)}
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert Zoo.open(zoo).digest in page.read_text()
    code, out, err = call("report", zoo, "-o", page, "--overwrite")
    assert (code, out, err) == (0, f"{page}\n", "")


def test_mistakes_are_one_line(refuse, zoo, tmp_path):
    page = tmp_path / "zoo.html"
    page.write_text("mine")
    assert "exists already" in refuse("report", zoo, "-o", page)
    assert page.read_text() == "mine"
    assert "file not found" in refuse("report", tmp_path / "no.h5", "-o", tmp_path / "a.html")
    zoo.write_bytes(zoo.read_bytes()[:3000])
    assert "zoo.h5: file is truncated" in refuse("report", zoo, "-o", tmp_path / "a.html")


def test_help_has_an_example(call):
    code, out, _ = call("report", "--help")
    assert code == 0
    assert "Example: weightspace report" in out


def test_shows_other_networks_and_says_which_populations_there_are(document, refuse, tmp_path):
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    states = [net.state_dict()] * 4
    labelled = Zoo.from_state_dicts(states, module=net, labels={"y": [0, 1, 0, 1]}).save(tmp_path / "a.h5")
    picture = tmp_path / "a.png"
    assert document("show", labelled, "-o", picture) == {"output": str(picture)}
    assert "expected one of networks, found 'x'" in refuse(
        "show", labelled, "-o", tmp_path / "b.png", "--population", "x"
    )
    bare = Zoo.from_state_dicts(states, module=net).save(tmp_path / "b.h5")
    assert "stores neither metrics nor labels" in refuse("show", bare, "-o", tmp_path / "b.png")
