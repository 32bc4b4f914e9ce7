"""Figures of zoos: INRs of images and curves, networks of which only metrics are known."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from weightspace.errors import OutputError, ZooError
from weightspace.nets import MLP, architecture_of, coordinate_grid, evaluate_batch
from weightspace.testing import tiny_zoo
from weightspace.zoo import Population, Source, Zoo, draw_zoo, render, spec_of
from weightspace.zoo.pictures._inrs import inr_figure, some_rows


def inrs(net, shape, networks=12):
    """Random networks whose stored signals are what they represent."""
    spec = spec_of(net)
    flat = torch.randn(networks, spec.num_parameters, generator=torch.Generator().manual_seed(0)) * 0.2
    numbers = np.arange(networks)
    grid = coordinate_grid(shape[: net.widths[0]])
    with torch.no_grad():
        items = evaluate_batch(net, spec.unflatten(flat), grid).view(networks, *shape).numpy()
    population = Population(
        spec=spec,
        weights=flat.numpy(),
        network=numbers,
        step=np.zeros(networks, np.int64),
        source=numbers,
        view=np.zeros(networks, np.int64),
        split=np.zeros(networks, np.uint8),
        metrics={"psnr": np.linspace(20, 31, networks, dtype=np.float32)},
        architecture=architecture_of(net),
    )
    return Zoo({"inr": population}, {"made": Source(items, numbers)})


def curves_zoo():
    return inrs(MLP((1, 8, 1), w0=5.0), (50,))


def colour_zoo():
    return inrs(MLP((2, 8, 3), w0=5.0, output_offset=0.5), (6, 7, 3))


def drawn(zoo, rows):
    return inr_figure(zoo["inr"], next(iter(zoo.sources.values())), np.asarray(rows))


def shape_of(png):
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png.read_bytes()[16:24])


def test_curves_of_target_and_network_lie_on_each_other():
    zoo = curves_zoo()
    figure = drawn(zoo, range(7))
    panels = [axes for axes in figure.axes if len(axes.lines) == 2]
    assert len(panels) == 7
    for at, axes in enumerate(panels):
        target, network = axes.lines
        np.testing.assert_allclose(target.get_xdata(), np.linspace(-1, 1, 50), atol=1e-6)
        np.testing.assert_array_equal(target.get_ydata(), zoo.sources["made"].items[at])
        np.testing.assert_allclose(network.get_ydata(), target.get_ydata(), atol=1e-5)
        assert axes.get_title() == f"{20 + at}.0 dB"
    assert [line.get_label() for line in panels[0].lines] == ["target", "network"]


def test_colours_are_drawn_as_they_are():
    zoo = colour_zoo()
    figure = drawn(zoo, [3, 4])
    images = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    items = zoo.sources["made"].items
    low, high = min(0.0, items[3:5].min()), max(1.0, items[3:5].max())
    assert len(images) == 4
    for at, image in enumerate(images):
        # targets on the first line, networks on the second
        np.testing.assert_allclose(image, (items[3 + at % 2] - low) / (high - low), atol=1e-4)


def test_bytes_are_colours_between_zero_and_one():
    zoo = colour_zoo()
    items = np.arange(12 * 6 * 7 * 3).reshape(12, 6, 7, 3).astype(np.uint8)
    figure = drawn(replace(zoo, sources={"made": Source(items, np.arange(12))}), [0])
    target = next(axes.images[0] for axes in figure.axes if axes.images)
    np.testing.assert_allclose(target.get_array(), items[0] / 255, atol=1e-6)


def test_grey_images_below_one_another():
    zoo = tiny_zoo(networks=8, views=1)
    figure = drawn(zoo, [0, 1, 2])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 6
    assert all(image.get_clim() == (0, 1) and image.get_cmap().name == "gray" for image in images)
    np.testing.assert_allclose(images[0].get_array(), zoo.sources["tiny"].items[0] / 255, atol=1e-6)
    np.testing.assert_allclose(images[3].get_array(), render(zoo["inr"], np.array([0]), (6, 6))[0], atol=1e-6)


def test_histogram_counts_networks_once(rich_zoo):
    # two checkpoints per network; the NaN is that of the last checkpoint of network 1
    figure = drawn(rich_zoo, [1])
    histogram = figure.axes[-1]
    assert histogram.get_title() == "10 networks, median 21.6 dB, 1 diverged"
    assert sum(bar.get_height() for bar in histogram.patches) == 9


def test_one_network_per_item_at_its_last_checkpoint(rich_zoo):
    rows = some_rows(rich_zoo["inr"], 30, 0)
    assert len(rows) == 5  # two views of each item
    assert set(rich_zoo["inr"].step[rows]) == {9}


def test_renders_the_shape_that_is_asked_for():
    zoo = colour_zoo()
    assert render(zoo["inr"], np.array([1, 2]), (4, 5, 3)).shape == (2, 4, 5, 3)
    assert render(curves_zoo()["inr"], np.array([1]), (9,)).shape == (1, 9)
    for shape in ((4, 5), (4, 5, 2), (4, 5, 3, 1), (9,)):
        with pytest.raises(ZooError, match=r"networks map inputs of shape \[2\] to 3 outputs; expected"):
            render(zoo["inr"], np.array([0]), shape)


@pytest.mark.parametrize("make", [tiny_zoo, curves_zoo, colour_zoo])
def test_draws_png(make, tmp_path):
    path = draw_zoo(make(), tmp_path / "zoo.png", count=12)
    width, height = shape_of(path)
    assert width > 1000
    assert height > 400


def test_signals_that_cannot_be_seen():
    zoo = colour_zoo()
    solid = replace(zoo, sources={"made": Source(np.zeros((12, 4, 4, 4), np.float32), np.arange(12))})
    with pytest.raises(
        ZooError, match=r"expected curves \(items, samples\) or images .*, found \(12, 4, 4, 4\)"
    ):
        draw_zoo(solid, "never.png")
    with pytest.raises(ZooError, match="stores no source signals"):
        draw_zoo(replace(zoo, sources={}), "never.png")


def foreign(**known):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    return Zoo.from_state_dicts([net.state_dict()] * 40, module=net, **known)


def test_metrics_and_labels_of_other_networks(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **how: figures.append(self) or save(self, *args, **how)
    )
    classes, f1 = np.arange(40) % 3, np.linspace(0.2, 0.9, 40)
    f1[7] = np.nan
    zoo = foreign(labels={"$class$": classes}, metrics={"f1": f1})
    draw_zoo(zoo, tmp_path / "zoo.png")
    histogram, bars = figures[0].axes
    assert [histogram.get_xlabel(), bars.get_xlabel()] == ["f1", "$class$"]
    assert sum(bar.get_height() for bar in histogram.patches) == 39
    assert [bar.get_height() for bar in bars.patches] == [14, 13, 13]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["0", "1", "2"]
    assert figures[0].get_suptitle() == "zoo, networks: 40 networks"


def test_a_users_coordinates_need_no_signals(tmp_path):
    net = MLP((2, 8, 1), activation="tanh")
    zoo = Zoo.from_state_dicts([net.state_dict()] * 3, module=net, labels={"y": [0, 1, 0]})
    assert shape_of(draw_zoo(zoo, tmp_path / "zoo.png"))[0] == 1540


def test_nothing_known_is_said(tmp_path):
    with pytest.raises(ZooError, match="stores neither metrics nor labels of its networks"):
        draw_zoo(foreign(), tmp_path / "zoo.png")
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_kept(tmp_path):
    path = tmp_path / "zoo.png"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        draw_zoo(tiny_zoo(), path)
    assert path.read_text() == "mine"
    assert shape_of(draw_zoo(tiny_zoo(), path, overwrite=True))[1] > 400
    with pytest.raises(ZooError, match="expected one of inr, found 'other'"):
        draw_zoo(tiny_zoo(), path, population="other", overwrite=True)
