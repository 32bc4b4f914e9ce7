"""Accuracy prediction on zoos of small convolutional networks: every kind of metanetwork finds what was planted."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from weightspace.datasets import ZooDataset
from weightspace.errors import ConfigError
from weightspace.models import Probe
from weightspace.nets import CNN, RNN
from weightspace.tasks import evaluate, train, train_config
from weightspace.tasks._figures import draw_regression
from weightspace.zoo import Zoo

SMALL = {"model.hidden": 8, "model.layers": 2, "model.head": 16, "augment": ""}
MODELS = {
    "statistics": {"model.tree_learning_rate": 0.2},
    "dws": SMALL,
    "unf": SMALL,
    "nfn": SMALL,
    "graph": SMALL,
    "graph any": {**SMALL, "model.types": "role"},
    "graph probed": {**SMALL, "model.probes": 4},
    "probe": {"model.probes": 8, "model.hidden": [16], "model.dropout": 0.0},
    "deepsets": {"model.features": 16, "model.hidden": [16]},
}
ITEMS, VIEWS = 120, 2


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two networks per item; the target is the mean bias of the classifier, which weights and function tell."""
    torch.manual_seed(0)
    nets = [CNN((1, 8, 8), (4, 4), 3) for _ in range(ITEMS * VIEWS)]
    for net in nets:
        net.classifier.bias.data += torch.rand(())
    source = np.repeat(np.arange(ITEMS), VIEWS)
    zoo = Zoo.from_state_dicts(
        [net.state_dict() for net in nets],
        module=nets[0],
        metrics={"test_accuracy": [float(net.classifier.bias.detach().mean()) for net in nets]},
        source=source,
        fractions=(0.6, 0.1, 0.3),
        name="cnn",
    )
    return zoo.save(tmp_path_factory.mktemp("zoo") / "cnns.h5")


@pytest.mark.parametrize("name", MODELS)
def test_a_planted_target_is_found(zoo, tmp_path, name):
    values = {"zoo": str(zoo), "model": name.split()[0], "task": "regression", "target": "test_accuracy"}
    values |= {"epochs": 12, "batch_size": 16, "learning_rate": 1e-2}
    train(train_config(values, MODELS[name]), tmp_path / "run", device="cpu", progress=False)
    found = evaluate(tmp_path / "run", device="cpu")
    assert found.metrics["kendall_tau"] > 0.4
    assert found.metrics["r2"] > 0.3
    for score in ("r2", "kendall_tau", "mean_absolute_error"):
        low, high = found.intervals[score]
        assert low < found.metrics[score] < high
    assert found.intervals["kendall_tau"][0] > 0.1
    assert found.figure.read_bytes()[:4] == b"\x89PNG"


def test_probes_know_what_the_librarys_networks_read():
    spatial = Probe(CNN((1, 8, 8), (4, 4), 3), 2, probes=5)
    assert spatial.probes.shape == (5, 1, 8, 8)
    recurrent = RNN(2, 4, 3, sequence="floats", length=6)
    assert Probe(recurrent, 2, probes=5).probes.shape == (5, *recurrent.input_shape)
    with pytest.raises(ConfigError, match="network: a RNN of tokens has no inputs that could be learned"):
        Probe(RNN(10, 4, 3), 2)


def test_the_figure_shows_values_and_ranks_about_a_diagonal(zoo, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    true = ZooDataset(zoo, "test", target="test_accuracy").targets.numpy()
    found = true[::-1] ** 3
    draw_regression(found, true, tmp_path / "x.png", "title")
    values, ranks = drawn[0].axes
    assert (values.get_xlabel(), values.get_ylabel()) == ("true value", "predicted value")
    assert (ranks.get_xlabel(), ranks.get_ylabel()) == ("true rank", "predicted rank")
    np.testing.assert_allclose(values.collections[0].get_offsets(), np.stack([true, found], 1))
    order = np.stack([true.argsort().argsort(), found.argsort().argsort()], 1) + 1
    np.testing.assert_allclose(ranks.collections[0].get_offsets(), order)
    for axes in (values, ranks):
        assert axes.lines[0].get_slope() == 1
        assert axes.get_xlim() == axes.get_ylim()
