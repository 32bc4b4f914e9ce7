"""Figures of zoos of classifiers: what is drawn is what is stored."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from weightspace.nets import CNN, MLP
from weightspace.zoo import Zoo, draw_zoo
from weightspace.zoo.pictures._classifiers import (
    classifier_figure,
    filter_rows,
    filter_shape,
    first_filters,
    median_curve,
    mosaic,
)
from weightspace.zoo.pictures._panels import running_median
from weightspace.zoo.pictures._style import powers
from weightspace.zoo.pictures._summary import Summary

BAD = (0xD6 / 255, 0x45 / 255, 0x5D / 255)


def figure_of(zoo, **how):
    return classifier_figure(Summary.of(zoo.populations), "zoo", **how)


def points(axes, only=None):
    """All points of a panel, in order of x, or only those of a colour."""
    chosen = [part for part in axes.collections if hasattr(part, "get_sizes") and len(part.get_offsets())]
    if only is not None:
        chosen = [part for part in chosen if np.allclose(part.get_facecolor()[0, :3], only, atol=0.01)]
    found = np.concatenate([np.empty((0, 2)), *(part.get_offsets() for part in chosen)])
    return found[np.argsort(found[:, 0], kind="stable")]


def final(zoo):
    return zoo["cnn"].metrics["test_accuracy"][3::4]


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_every_panel_is_there(made):
    figure = figure_of(made.zoo(diverged=[1, 2]))
    panels = made.panels(figure)
    drawn = [
        "final test accuracy",
        "epoch",
        "learning_rate",
        "dropout",
        "weight_decay",
        "optimizer",
        "batch_size",
    ]
    assert set(panels) == set(drawn)  # neither `epochs`, which is constant, nor `seed`
    median = np.median(final(made.zoo()))
    assert figure.get_suptitle() == f"zoo: 60 networks (2 diverged, red), median test accuracy {median:.3f}"
    titles = [part.get_suptitle() for part in figure.subfigs]
    assert titles[2].startswith("first-layer filters")
    assert sum(bool(axes.images) for axes in figure.axes) == 8


def test_histogram_is_of_the_last_checkpoints(made):
    zoo = made.zoo()
    bars = made.panels(figure_of(zoo))["final test accuracy"].patches
    edges = [bar.get_x() for bar in bars] + [bars[-1].get_x() + bars[-1].get_width()]
    counts, expected = np.histogram(final(zoo), bins=len(bars))
    assert [bar.get_height() for bar in bars] == counts.tolist()
    np.testing.assert_allclose(edges, expected, rtol=1e-5)


def test_curves_are_those_of_the_networks(made):
    zoo = made.zoo(networks=10)
    accuracy, loss = (axes for axes in figure_of(zoo).axes if axes.get_xlabel() == "epoch")
    assert (accuracy.get_ylabel(), loss.get_ylabel()) == ("test_accuracy", "test_loss")
    assert (accuracy.get_yscale(), loss.get_yscale()) == ("linear", "log")
    for axes in (accuracy, loss):
        stored = zoo["cnn"].metrics[axes.get_ylabel()].reshape(10, 4)
        lines = axes.collections[0].get_segments()
        np.testing.assert_allclose(lines, np.stack([np.tile(made.epochs, (10, 1)), stored], -1), rtol=1e-6)
        (median,) = axes.lines
        np.testing.assert_allclose(median.get_ydata(), np.median(stored, 0), rtol=1e-6)
    # the best network has the last colour of the map, the worst the first
    colours = accuracy.collections[0].get_edgecolor()[:, :3]
    order = np.argsort(final(zoo))
    assert colours[order[-1]][1] > colours[order[0]][1] + 0.3


def test_numbers_are_points_on_axes_that_fit(made):
    zoo = made.zoo()
    panels = made.panels(figure_of(zoo))
    for name, scale in [("learning_rate", "log"), ("dropout", "linear"), ("weight_decay", "symlog")]:
        stored = zoo["cnn"].hyperparameters[name]
        expected = np.column_stack([stored, final(zoo)])[np.argsort(stored, kind="stable")]
        assert panels[name].get_xscale() == scale
        found = points(panels[name])
        np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=1e-6)
        np.testing.assert_allclose(sorted(found[:, 1]), sorted(expected[:, 1]), rtol=1e-6)
    shown = [float(text) for text in ticks(panels["learning_rate"])]
    assert shown == sorted(shown)
    assert {0.001, 0.01} <= set(shown)
    assert ticks(panels["weight_decay"])[0] == "0"
    rates = points(panels["learning_rate"])
    assert np.corrcoef(np.log(rates[:, 0]), rates[:, 1])[0, 1] > 0.999


def test_codes_are_boxes_with_their_names(made):
    zoo = made.zoo()
    panels = made.panels(figure_of(zoo))
    assert ticks(panels["optimizer"]) == made.optimizers
    assert ticks(panels["batch_size"]) == ["32", "128"]
    medians = [line for line in panels["optimizer"].lines if line.get_linewidth() == 2.0]
    for code, line in enumerate(medians):
        chosen = final(zoo)[zoo["cnn"].hyperparameters["optimizer"] == code]
        assert line.get_ydata()[0] == pytest.approx(np.median(chosen), rel=1e-5)
        strip = [y for x, y in points(panels["optimizer"]) if round(x - 0.15) == code]
        np.testing.assert_allclose(sorted(strip), sorted(chosen), rtol=1e-5)
    assert len(medians) == 3


def test_diverged_networks_are_red(made):
    zoo = made.zoo(diverged=[4, 9])
    red = points(made.panels(figure_of(zoo))["dropout"], only=BAD)
    np.testing.assert_allclose(sorted(red[:, 1]), sorted(final(zoo)[[4, 9]]), rtol=1e-6)


def test_labels_that_differ_are_drawn(made):
    population = replace(made.population(made.cnn()), labels={"sparsity": np.arange(60) % 5 / 10})
    panels = made.panels(figure_of(Zoo({"cnn": population})))
    assert ticks(panels["sparsity"]) == ["0", "0.1", "0.2", "0.3", "0.4"]


def test_few_populations_by_name_in_order_of_size(made):
    nets = {"wide": CNN((1, 8, 8), (16, 16), 3), "narrow": CNN((1, 8, 8), (2,), 3)}
    zoo = Zoo(
        {name: made.population(net, networks=20, seed=at) for at, (name, net) in enumerate(nets.items())}
    )
    figure = figure_of(zoo)
    panel = made.panels(figure)["population (parameters)"]
    assert ticks(panel) == ["narrow (29)", "wide (2,531)"]
    medians = [line.get_ydata()[0] for line in panel.lines if line.get_linewidth() == 2.0]
    expected = [np.median(zoo[name].metrics["test_accuracy"][3::4]) for name in ("narrow", "wide")]
    np.testing.assert_allclose(medians, expected, rtol=1e-5)
    assert figure.get_suptitle().startswith("zoo: 40 networks in 2 populations, median")


def test_many_populations_by_number_of_parameters(made):
    nets = [MLP((64, 4 + at, 3), activation="relu", input_shape=(1, 8, 8)) for at in range(10)]
    zoo = Zoo({f"mlp-{at:03d}": made.population(net, networks=4) for at, net in enumerate(nets)})
    panel = made.panels(figure_of(zoo))["parameters"]
    sizes = [population.spec.num_parameters for population in zoo.populations.values()]
    np.testing.assert_array_equal(points(panel)[:, 0], np.repeat(sorted(sizes), 4))


def test_one_population_of_several(made, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **how: figures.append(self) or save(self, *args, **how)
    )
    zoo = Zoo({"a": made.population(made.cnn()), "b": made.population(made.mlp(), networks=9)})
    png = draw_zoo(zoo, tmp_path / "b.png", population="b").read_bytes()
    assert figures[0].get_suptitle().startswith("zoo, b: 9 networks, median")
    assert struct.unpack(">I", png[16:20]) == (1540,)
    draw_zoo(zoo, tmp_path / "all.png")
    assert figures[1].get_suptitle().startswith("zoo: 69 networks in 2 populations")


def test_one_checkpoint_has_no_curves(made):
    zoo = made.zoo(epochs=np.array([3]), hyperparameters={})
    labels = {axes.get_xlabel() for axes in figure_of(zoo).axes}
    assert labels == {"test_accuracy", "test_loss", ""}


def test_networks_that_all_failed(made):
    population = made.population(made.cnn(), networks=4)
    population.metrics["test_accuracy"][:] = np.nan
    figure = figure_of(Zoo({"cnn": population}))
    assert figure.get_suptitle() == "zoo: 4 networks (4 diverged, red), median test accuracy nan"
    assert not any(axes.images for axes in figure.axes)


# -- filters -------------------------------------------------------------------------------------------------


def test_filters_are_the_first_weights(made):
    for net, name, shape in [
        (made.cnn(), "convolutions.0.weight", (4, 1, 3, 3)),
        (made.mlp(), "layers.0.weight", (16, 1, 8, 8)),
    ]:
        population = made.population(net, networks=5)
        assert filter_shape(population) == (name, shape)
        found = first_filters(Summary.of({"net": population}), 3)
        expected = population.weights_of([3 * 4 + 3])[name][0].numpy().reshape(shape)
        np.testing.assert_array_equal(found, expected)
    assert filter_shape(made.population(made.rnn(), networks=5)) is None


def test_recurrent_networks_show_none(made):
    zoo = made.zoo(made.rnn(), networks=12)
    figure = figure_of(zoo)
    assert not any(axes.images for axes in figure.axes)
    assert len(figure.subfigs) == 2
    mixed = Summary.of({"rnn": zoo["cnn"], "cnn": made.population(made.cnn(), networks=12)})
    assert set(mixed.population[filter_rows(mixed, 8)]) == {1}


def test_filters_from_the_worst_to_the_best(made):
    zoo = made.zoo(networks=50)
    summary = Summary.of(zoo.populations)
    rows = filter_rows(summary, 6)
    accuracy = final(zoo)[rows]
    assert len(rows) == 6
    assert (np.diff(accuracy) > 0).all()
    assert (accuracy[0], accuracy[-1]) == (final(zoo).min(), final(zoo).max())
    titles = [axes.get_title() for axes in figure_of(zoo, count=6).axes if axes.images]
    assert titles == [f"{value:.3f}" for value in accuracy]


def test_mosaic_tells_signs_apart_and_leaves_gaps_clear():
    filters = np.zeros((3, 1, 2, 2), np.float32)
    filters[0, 0, 0, 0], filters[1, 0, 1, 1] = 2.0, -2.0
    board = mosaic(filters)
    assert board.shape == (54, 54, 4)  # two by two tiles of 24 pixels, and gaps of 3
    red, blue, zero = board[0, 0], board[23, 50], board[0, 23]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    np.testing.assert_allclose(zero[:3], 0.97, atol=0.02)
    assert (board[24:27, :, 3] == 0).all()
    assert (board[27:, 27:, 3] == 0).all()  # there is no fourth filter


def test_mosaic_of_three_channels_is_their_colour():
    filters = torch.zeros(1, 3, 2, 2)
    filters[0, :, 0, 0] = torch.tensor([1.0, 0.0, -1.0])
    board = mosaic(filters.numpy())
    np.testing.assert_allclose(board[0, 0], [1.0, 0.5, 0.0, 1.0])
    np.testing.assert_allclose(board[23, 23], [0.5, 0.5, 0.5, 1.0])
    assert np.isfinite(mosaic(np.full((2, 1, 3, 3), np.nan))).all()


# -- numbers behind the panels -------------------------------------------------------------------------------


def test_median_curve_leaves_out_what_few_reached():
    time = np.arange(4.0)
    curves = [(time[:2], np.array([0.0, 1.0])), (time[:2], np.array([2.0, 3.0])), (time, time * 10)]
    found_time, median = median_curve(curves)
    np.testing.assert_array_equal(found_time, [0, 1])
    np.testing.assert_array_equal(median, [0, 3])
    with_gap = [(time, np.array([0.0, np.nan, 2.0, 3.0]))]
    np.testing.assert_array_equal(median_curve(with_gap)[1], [0, 1, 2, 3])


def test_running_median_needs_points():
    x = np.random.default_rng(0).permutation(100).astype(float)
    middle, median = running_median(x, 2 * x)
    np.testing.assert_array_equal(median, 2 * middle)
    assert len(middle) == 4
    assert len(running_median(x[:40], x[:40])[0]) == 0


@pytest.mark.parametrize("low", [1e-6, 0.02, 0.4, 0.9, 7.0])
@pytest.mark.parametrize("factor", [3.0, 31.0, 1e3, 1e9])
def test_ticks_lie_within_and_do_not_crowd(low, factor):
    found = powers(low, low * factor)
    assert 2 <= len(found) <= 9
    assert all(low * 0.999 <= tick <= low * factor * 1.001 for tick in found)
