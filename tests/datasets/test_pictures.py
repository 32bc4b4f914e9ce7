"""Pictures of augmentations: what is drawn is what a data set reads, rendered."""

import itertools
import runpy
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from weightspace.datasets import (
    AUGMENTATIONS,
    Augmentation,
    Compose,
    GaussianNoise,
    LabelSmoothing,
    MixUp,
    Permutation,
    PositiveScaling,
    SignFlip,
    ZooDataset,
    call_text,
    draw_augmented,
    parse_augmentations,
)
from weightspace.datasets._pictures import Line, Pictured, Sheet, _figure, _shares
from weightspace.errors import ConfigError, OutputError, ZooError
from weightspace.nets import CNN, MLP, RNN, architecture_of, coordinate_grid, evaluate_batch
from weightspace.testing import tiny_zoo
from weightspace.zoo import Population, Source, Zoo, render, spec_of
from weightspace.zoo.pictures import drawn_shape, render_weights, some_rows

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "augmentation_gallery.py"


def inrs(net, shape, networks=12, **known):
    """Random networks whose stored signals are what they represent."""
    spec = spec_of(net)
    flat = torch.randn(networks, spec.num_parameters, generator=torch.Generator().manual_seed(0)) * 0.3
    numbers = np.arange(networks)
    with torch.no_grad():
        grid = coordinate_grid(shape[: net.widths[0]])
        items = evaluate_batch(net, spec.unflatten(flat), grid).view(networks, *shape).numpy()
    population = Population(
        spec=spec,
        weights=flat.numpy(),
        network=numbers,
        step=np.zeros(networks, np.int64),
        source=numbers,
        view=np.zeros(networks, np.int64),
        split=np.zeros(networks, np.uint8),
        architecture=architecture_of(net),
        **known,
    )
    return Zoo({"inr": population}, {"made": Source(items, numbers)})


def curves_zoo(**known):
    return inrs(MLP((1, 8, 1), w0=5.0), (50,), **known)


def colour_zoo():
    return inrs(MLP((2, 8, 3), w0=5.0, output_offset=0.5), (6, 7, 3))


def figure_of(zoo, *augments, count=4, draws=2, seed=0):
    return _figure(Pictured.of(zoo, None, count, seed), augments, draws)


def images_of(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def read(zoo, augment, rows, epoch, **options):
    """What a data set of its own gives for some rows."""
    dataset = ZooDataset(zoo, None, augment=augment, **options)
    dataset.epoch = epoch
    return dataset.read(np.flatnonzero(np.isin(dataset.rows, rows)))


# -- images --------------------------------------------------------------------------------------------------


def test_each_draw_is_what_a_data_set_reads_in_that_epoch():
    zoo, augment = tiny_zoo(), GaussianNoise(0.2)
    figure = figure_of(zoo, augment, count=3, draws=2, seed=5)
    rows = some_rows(zoo["inr"], 3, 5)
    images = images_of(figure)
    assert texts_of(figure) == ["target", "network", "draw 1", "draw 2"]
    assert_allclose(images[:3], zoo.sources["tiny"].items[zoo["inr"].source[rows]] / 255, atol=1e-6)
    assert_allclose(images[3:6], render(zoo["inr"], rows, (6, 6)), atol=1e-6)
    for epoch in (0, 1):
        weights, _ = read(zoo, augment, rows, epoch, seed=5)
        expected = render_weights(zoo["inr"], weights, (6, 6))
        assert_allclose(images[6 + 3 * epoch : 9 + 3 * epoch], expected, atol=1e-5)
    assert not np.allclose(images[6:9], images[9:12], atol=1e-3)


def test_a_symmetry_cannot_be_seen():
    images = images_of(figure_of(tiny_zoo(), Compose([Permutation(), SignFlip()]), count=4, draws=3))
    for draw in range(3):
        assert_allclose(images[8 + 4 * draw : 12 + 4 * draw], images[4:8], atol=1e-5)


def test_several_augmentations_are_named_with_what_they_keep():
    figure = figure_of(tiny_zoo(), Permutation(), GaussianNoise(0.1), MixUp("direct"), draws=2)
    assert texts_of(figure) == [
        *("target", "network"),
        *("permutation", "function kept exactly"),
        *("noise(0.1)", "function kept approximately"),
        *("mixup(direct)", MixUp.effect),
    ]
    assert len(figure.axes) == (2 + 3 * 2) * 4
    assert figure.texts[0].get_text() == "4 networks, and what augmentations make of them"


def test_colours_are_scaled_like_their_targets():
    zoo = colour_zoo()
    images = images_of(figure_of(zoo, SignFlip(), count=2, draws=1))
    items = zoo.sources["made"].items[some_rows(zoo["inr"], 2, 0)]
    low, high = min(0.0, items.min()), max(1.0, items.max())
    assert images[0].shape == (6, 7, 3)
    for line in range(3):
        assert_allclose(images[2 * line : 2 * line + 2], (items - low) / (high - low), atol=1e-4)


def test_networks_without_stored_signals_are_drawn_as_they_are():
    zoo = replace(tiny_zoo(), sources={})
    figure = figure_of(zoo, Permutation(), count=2, draws=1)
    assert texts_of(figure) == ["network", "draw 1"]
    assert images_of(figure)[0].shape == drawn_shape(zoo, zoo["inr"]) == (64, 64)
    for made, shape in ((curves_zoo(), (200,)), (colour_zoo(), (64, 64, 3))):
        assert drawn_shape(replace(made, sources={}), made["inr"]) == shape


def test_networks_that_diverged_are_not_chosen():
    zoo = tiny_zoo(networks=12)
    zoo["inr"].weights[:8] = np.nan
    pictured = Pictured.of(zoo, None, 30, 0)
    assert set(pictured.dataset.rows[pictured.members]) <= {8, 9, 10, 11}
    assert len(pictured.members) == 2  # of two views each


# -- labels --------------------------------------------------------------------------------------------------


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes]


def test_shares_of_classes_by_hand():
    shares = torch.tensor([[0.0, 0.62, 0.38], [1.0, 0.0, 0.0], [0.02, 0.949, 0.031], [0.004, 0.996, 0.0]])
    assert _shares(shares) == ["1: 62 %, 2: 38 %", "0", "1: 95 %, 2: 3 %", "1"]
    assert _shares(torch.tensor([1, 2])) == []
    assert _shares(torch.ones(2, 1)) == ["0", "0"]


def test_mixed_labels_stand_above_the_networks():
    zoo, augment = tiny_zoo(), MixUp("direct")
    figure = figure_of(zoo, augment, count=4, draws=1)
    rows = some_rows(zoo["inr"], 4, 0)
    labels = [f"{label}" for label in zoo["inr"].labels["label"][rows]]
    shares = read(zoo, augment, rows, 0)[1]
    assert titles_of(figure) == [*labels, *[""] * 4, *_shares(shares)]
    assert any("%" in title for title in titles_of(figure))


@pytest.mark.parametrize("augment", [GaussianNoise(), MixUp("self"), MixUp("direct", targets="larger")])
def test_labels_that_stay_classes_are_not_shown(augment):
    assert not any(titles_of(figure_of(tiny_zoo(), augment, draws=1)))


@pytest.mark.parametrize("labels", [{}, {"height": np.linspace(0, 1, 40)}])
def test_networks_without_classes_can_be_mixed(labels):
    population = replace(tiny_zoo()["inr"], labels=labels)
    zoo = Zoo({"inr": population}, tiny_zoo().sources)
    assert not any(titles_of(figure_of(zoo, MixUp("direct"), draws=1)))
    with pytest.raises(ConfigError, match="smoothing: expected class numbers as targets"):
        figure_of(zoo, LabelSmoothing())


# -- curves --------------------------------------------------------------------------------------------------


def test_curves_before_and_after_share_a_panel():
    zoo, augment = curves_zoo(), GaussianNoise(0.2)
    figure = figure_of(zoo, augment, count=3, draws=2)
    rows = some_rows(zoo["inr"], 3, 0)
    assert len(figure.axes) == 6
    before = render(zoo["inr"], rows, (50,))
    for epoch in (0, 1):
        after = render_weights(zoo["inr"], read(zoo, augment, rows, epoch, target=None)[0], (50,))
        for at, axes in enumerate(figure.axes[3 * epoch : 3 * epoch + 3]):
            old, new = axes.lines
            assert_allclose(old.get_xdata(), np.linspace(-1, 1, 50), atol=1e-6)
            assert_allclose(old.get_ydata(), before[at], atol=1e-6)
            assert_allclose(new.get_ydata(), after[at], atol=1e-5)
            spread = before[at].max() - before[at].min()
            assert_allclose(axes.get_ylim()[1], before[at].max() + 0.4 * spread, atol=1e-4)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["network", "augmented"]


# -- the sheet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50,), (28, 28), (10, 30, 3)])
@pytest.mark.parametrize("networks", [1, 8, 23])
def test_panels_stand_apart_on_the_sheet(shape, networks):
    signals = np.zeros((networks, *shape))
    lines = [Line(signals, "target", titles=["1"] * networks), Line(signals), Line(signals, "a", "note")]
    sheet = Sheet.of(lines, shape)
    boxes = [sheet.place(line, network) for line in range(3) for network in range(networks)]
    assert all(0 < x < x + w < 1 and 0 < y < y + h < 1 for x, y, w, h in boxes)
    for (x, y, w, h), (u, v, *_) in itertools.combinations(boxes, 2):
        assert abs(x - u) >= w or abs(y - v) >= h
    width, height = sheet.size
    for _, _, w, h in boxes:
        assert_allclose([w * width, h * height], sheet.panel)


@pytest.mark.parametrize(
    ("make", "count", "lines"), [(tiny_zoo, 12, 5), (curves_zoo, 12, 3), (colour_zoo, 1, 5)]
)
def test_draws_png(make, count, lines, tmp_path):
    path = draw_augmented(make(), Permutation(), tmp_path / "a.png", count=count)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width > 150
    assert height > 80 * lines
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


# -- what is refused -----------------------------------------------------------------------------------------


def zoo_of(module, architecture=True, **known):
    states = [{name: w.clone() for name, w in module.state_dict().items()} for _ in range(4)]
    zoo = Zoo.from_state_dicts(states, module=module, **known)
    name = next(iter(zoo))
    if not architecture:
        zoo = Zoo({name: replace(zoo[name], architecture=None)})
    return zoo


def test_networks_that_represent_no_signal(tmp_path):
    accuracy = {"test_accuracy": np.linspace(0, 1, 4)}
    for zoo, found in (
        (zoo_of(CNN((1, 8, 8), (4,), 3)), "found classifiers"),
        (zoo_of(MLP((2, 4, 1)), metrics=accuracy), "found classifiers"),
        (zoo_of(MLP((3, 4, 1))), "found an MLP from 3 to 1 values"),
        (zoo_of(MLP((2, 4, 4))), "found an MLP from 2 to 4 values"),
        (zoo_of(RNN(2, 4, 3)), "found a network of kind rnn"),
    ):
        with pytest.raises(ZooError, match=rf"expected INRs of curves or images, .*, {found}"):
            draw_augmented(zoo, Permutation(), tmp_path / "a.png")
    with pytest.raises(ZooError, match="does not say how to rebuild its networks"):
        draw_augmented(zoo_of(MLP((2, 4, 1)), architecture=False), Permutation(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_write_nothing(tmp_path):
    path, zoo = tmp_path / "a.png", tiny_zoo()
    with pytest.raises(ConfigError, match="positive: expected a weight space with the symmetry positive"):
        draw_augmented(zoo, [Permutation(), PositiveScaling()], path)
    with pytest.raises(ConfigError, match="at least one network, draw and augmentation, found 0, 3 and 1"):
        draw_augmented(zoo, Permutation(), path, count=0)
    with pytest.raises(ConfigError, match="found 8, 3 and 0"):
        draw_augmented(zoo, [], path)
    with pytest.raises(ConfigError, match="seed: expected at least 0, found -1"):
        draw_augmented(zoo, Permutation(), path, seed=-1)
    with pytest.raises(ZooError, match="expected one of inr, found 'other'"):
        draw_augmented(zoo, Permutation(), path, population="other")
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        draw_augmented(zoo, Permutation(), path)
    assert path.read_text() == "mine"
    draw_augmented(zoo, Permutation(), path, overwrite=True, count=1)
    assert path.read_bytes()[:4] == b"\x89PNG"


# -- texts, and the gallery ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_text_is_read_back(name):
    augment = AUGMENTATIONS[name]()
    assert call_text(augment).startswith(name)
    assert parse_augmentations(call_text(augment)) == Compose([augment])


def test_texts_by_hand():
    parts = [Permutation(), GaussianNoise(0.25), MixUp("direct", targets="larger"), MixUp(beta=1)]
    text = "permutation, noise(0.25), mixup(direct, targets=larger), mixup(aligned, beta=1)"
    assert call_text(Compose(parts)) == text
    assert parse_augmentations(text) == Compose(parts)

    class Unnamed(Augmentation):
        def apply(self, batch, draws):
            return batch

    assert call_text(Unnamed()) == "Unnamed"


def test_the_gallery_shows_everything_that_acts_on_weights(tmp_path, monkeypatch, capsys):
    small = ["--count", "6", "--steps", "5", "--columns", "2", "-o", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *small])
    drawn = []
    names = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(
        names["draw"].__globals__,
        "draw_augmented",
        lambda zoo, augments, *rest, **how: (
            drawn.append(augments) or draw_augmented(zoo, augments, *rest, **how)
        ),
    )
    names["main"]()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "augmentations-sines.png",
        "augmentations.png",
    ]
    digits = {augment.name for augment in drawn[0]}
    assert digits == set(AUGMENTATIONS) - {"positive", "smoothing"}
    assert digits - {augment.name for augment in drawn[1]} == {"rotation"}
    assert {augment.kind for augment in drawn[0] if isinstance(augment, MixUp)} == {
        "aligned",
        "direct",
        "permuted",
        "self",
    }
    out = capsys.readouterr().out
    assert "not drawn: smoothing(0.1) acts on no weights" in out
    assert "not drawn: rotation: expected a network of 2 or 3 coordinates, found 1" in out
