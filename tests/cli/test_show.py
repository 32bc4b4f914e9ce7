"""`weightspace show --augment`."""

import pytest
import torch

from weightspace.datasets import AUGMENTATIONS, Compose, GaussianNoise, MixUp, draw_augmented
from weightspace.nets import CNN
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=20).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def test_draws_what_the_library_draws(document, zoo, tmp_path):
    picture, same = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--count", 3, "--seed", 7, "--population", "inr"]
    found = document("show", zoo, "--augment", "noise(0.2), mixup(direct)", "-o", picture, *options)
    assert found == {"output": str(picture)}
    augment = Compose([GaussianNoise(0.2), MixUp("direct")])
    draw_augmented(Zoo.open(zoo), augment, same, count=3, seed=7)
    assert picture.read_bytes() == same.read_bytes()


def test_eight_networks_by_default(document, zoo, tmp_path):
    document("show", zoo, "--augment", "permutation", "-o", tmp_path / "a.png")
    draw_augmented(Zoo.open(zoo), Compose([AUGMENTATIONS["permutation"]()]), tmp_path / "b.png", count=8)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_mistakes_are_one_line(refuse, zoo, tmp_path):
    def message(path, augment):
        return refuse("show", path, "--augment", augment, "-o", tmp_path / "a.png")

    known = ", ".join(AUGMENTATIONS)
    assert message(zoo, "blur(3)") == f"augment: expected some of {known}, found 'blur(3)'"
    assert message(zoo, "") == f"augment: expected some of {known}, found ''"
    assert message(zoo, "noise(size=3)") == "augment: noise: expected the options scale, found 'size'"
    assert message(zoo, "positive").startswith(
        "positive: expected a weight space with the symmetry positive, found "
    )
    net = CNN((1, 8, 8), (4,), 3)
    with torch.no_grad():
        states = [net.state_dict()] * 4
    images = Zoo.from_state_dicts(states, module=net).save(tmp_path / "cnns.h5")
    assert "expected INRs of curves or images" in message(images, "permutation")
    (tmp_path / "a.png").write_text("mine")
    assert "exists already" in message(zoo, "permutation")
    assert (tmp_path / "a.png").read_text() == "mine"
