"""From a recipe to a zoo of classifiers: what it holds, that no interruption changes a bit, and what is refused."""

import re

import numpy as np
import pytest
import torch

from weightspace.datagen import generate, load_recipe
from weightspace.datagen.classifiers import _training
from weightspace.datagen.classifiers._training import METRICS
from weightspace.errors import RecipeError
from weightspace.zoo import Zoo, verify_digest

TINY = {
    "count": 6,
    "data.count": 200,
    "training.epochs": 2,
    "training.fraction": {"choice": [0.25, 0.5]},
    "shard": 2,
    "network.channels": 3,
    "network.layers": 2,
    "checkpoints": [0, 1],
}
# Restates what `load_recipe` does not know: a constant that all networks have.
FROM_BASE = {"training.initialiser": "pytorch", "training.initial_scale": 1.0}
BASE = {"optimizer": "adam", "learning_rate": 0.01, "epochs": 3}


def make(output, changes=None, **options):
    settings = {"progress": False, "device": "cpu", **options}
    return generate("digits-cnn", output, overrides={**TINY, **(changes or {})}, **settings)


def made(tmp_path, changes=None, **options):
    return Zoo.open(make(tmp_path / "zoo.h5", changes, **options).output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The zoo of the tiny recipe that nothing interrupted."""
    return make(tmp_path_factory.mktemp("undisturbed") / "zoo.h5")


def weights_of(population, rows=None):
    return np.asarray(population.weights[:] if rows is None else population.weights[rows])


# -- content -------------------------------------------------------------------------------------------------


def test_what_a_zoo_holds(undisturbed):
    zoo = Zoo.open(undisturbed.output)
    assert undisturbed.digest == zoo.digest == verify_digest(undisturbed.output)
    assert (undisturbed.networks, undisturbed.trained, undisturbed.diverged) == (6, 6, 0)
    assert list(zoo.populations) == ["cnn"]
    cnn = zoo["cnn"]
    assert (cnn.rows, cnn.networks) == (18, 6)
    assert cnn.network.tolist() == np.repeat(np.arange(6), 3).tolist()
    assert cnn.metrics["epoch"].tolist() == [0, 1, 2] * 6
    assert set(cnn.metrics) == set(METRICS)
    assert cnn.source.tolist() == list(range(6))
    assert not zoo.sources
    assert cnn.architecture["kind"] == "cnn"
    assert cnn.architecture["arguments"]["channels"] == [3, 3]
    assert zoo.recipe == load_recipe("digits-cnn", TINY).resolved()
    assert undisturbed.metric == "test_accuracy"
    last = cnn.metrics["test_accuracy"][2::3]
    assert undisturbed.median == pytest.approx(np.median(last))


def test_hyperparameters_are_those_that_the_design_names(undisturbed):
    cnn = Zoo.open(undisturbed.output)["cnn"]
    choices = cnn.protocol["choices"]
    for field, distribution in load_recipe("digits-cnn", TINY).document()["training"].items():
        values = cnn.hyperparameters[field]
        assert values.shape == (6,)
        assert values.dtype in (np.int64, np.float32)
        if field in choices:
            assert {choices[field][code] for code in values} <= set(
                distribution["choice"] if isinstance(distribution, dict) else [distribution]
            )
        elif isinstance(distribution, dict) and "choice" not in distribution:
            ((_, (low, high)),) = distribution.items()
            assert np.float32(low) <= values.min() < values.max() <= np.float32(high)
    per_epoch = np.round(cnn.hyperparameters["fraction"].astype(float) * cnn.protocol["items"]["train"]) // 32
    assert cnn.step[2::3].tolist() == (2 * np.maximum(per_epoch, 1)).tolist()


def test_metrics_are_those_of_the_stored_networks(undisturbed):
    """From the file alone: rebuild a network, prepare the digits as its protocol says, and test it."""
    from weightspace.datagen.classifiers._recipe import ClassifierRecipe
    from weightspace.datagen.sources import Digits
    from weightspace.nets import build

    zoo = Zoo.open(undisturbed.output)
    recipe = load_recipe("digits-cnn", TINY)
    assert isinstance(recipe, ClassifierRecipe)
    data = recipe.work(Digits(size=8).load(None), "cpu").data
    cnn = zoo["cnn"]
    net = build(cnn.architecture).eval()
    for row in (0, 5, 17):
        flat = torch.from_numpy(weights_of(cnn, [row]).copy())[0]
        parts = flat.split([tensor.numel() for tensor in net.state_dict().values()])
        net.load_state_dict(
            {
                name: part.view_as(net.state_dict()[name])
                for name, part in zip(net.state_dict(), parts, strict=True)
            }
        )
        with torch.no_grad():
            right = net(torch.from_numpy(data.inputs[data.test])).argmax(1).numpy() == data.labels[data.test]
        assert cnn.metrics["test_accuracy"][row] == pytest.approx(right.mean())


def test_splits_are_per_network(tmp_path):
    cnn = made(tmp_path, {"count": 20, "shard": 7, "checkpoints": []})["cnn"]
    assert np.bincount(cnn.split, minlength=3).tolist() == [14, 2, 4]


def test_equal_seeds_make_equal_networks(tmp_path):
    constant = {
        "training.optimizer": "adam",
        "training.learning_rate": 0.01,
        "training.weight_decay": 0.0,
        "training.dropout": 0.2,
        "training.initialiser": "he_normal",
        "training.initial_scale": 1.0,
        "training.fraction": 0.5,
        "training.label_noise": 0.2,
    }
    weights = weights_of(
        made(tmp_path, {**constant, "training.seed": {"choice": [3, 8]}, "checkpoints": []})["cnn"]
    )
    distinct = {row.tobytes() for row in weights}
    assert len(distinct) == 2


@pytest.mark.parametrize("kind", ["shared", "independent"])
def test_shared_and_independent_initialisation(tmp_path, kind):
    changes = {"initialisation": kind, "training.initialiser": "normal", "checkpoints": [0]}
    cnn = made(tmp_path, changes)["cnn"]
    scaled = weights_of(cnn)[::2] / cnn.hyperparameters["initial_scale"][:, None]
    same = np.allclose(scaled, scaled[:1], rtol=1e-4, atol=1e-7)
    assert same == (kind == "shared")
    assert (cnn.metrics["epoch"][::2] == 0).all()


def test_several_architectures_have_a_population_each(tmp_path):
    changes = {
        "architectures": 3,
        "network.channels": {"integer": [2, 9]},
        "network.kernel_size": {"choice": [1, 3, 5]},
        "network.per_layer": True,
    }
    zoo = made(tmp_path, changes)
    assert list(zoo.populations) == ["cnn-000", "cnn-001", "cnn-002"]
    assert [population.networks for population in zoo.populations.values()] == [2, 2, 2]
    assert sorted(np.concatenate([p.source for p in zoo.populations.values()])) == list(range(6))
    assert len({str(p.architecture) for p in zoo.populations.values()}) == 3
    # the split is one of all networks
    whole = made_split(changes)
    for population in zoo.populations.values():
        np.testing.assert_array_equal(population.split, whole[population.source])


def made_split(changes):
    from weightspace.datagen._work import divide
    from weightspace.datagen.sources import Digits

    return divide(load_recipe("digits-cnn", {**TINY, **changes}), Digits(size=8).load(None), np.arange(6))


def test_equal_draws_are_one_population(tmp_path):
    zoo = made(tmp_path, {"network.channels": {"choice": [2, 3]}, "count": 8})
    assert list(zoo.populations) == ["cnn-000", "cnn-001"]
    assert sum(population.networks for population in zoo.populations.values()) == 8
    for population in zoo.populations.values():
        assert population.source.tolist() == sorted(population.source)


def test_a_network_is_the_same_whatever_the_count(tmp_path):
    few = made(tmp_path, {"count": 3, "split.test": 0.0, "split.val": 0.0})["cnn"]
    many = Zoo.open(make(tmp_path / "many.h5").output)["cnn"]
    np.testing.assert_array_equal(weights_of(few), weights_of(many)[:9])


# -- derived populations -------------------------------------------------------------------------------------


def test_fine_tuned_networks_start_at_the_base(tmp_path):
    changes = {"base": BASE, **FROM_BASE, "checkpoints": [0, 1]}
    zoo = made(tmp_path, changes)
    assert set(zoo.populations) == {"base", "cnn"}
    base, cnn = zoo["base"], zoo["cnn"]
    assert (base.rows, base.networks) == (1, 1)
    assert base.metrics["epoch"].tolist() == [3]
    assert base.source.tolist() == [6]
    assert base.split.tolist() == [0]
    start = weights_of(cnn)[cnn.metrics["epoch"] == 0]
    np.testing.assert_array_equal(start, np.repeat(weights_of(base), 6, axis=0))
    end = weights_of(cnn)[cnn.metrics["epoch"] == 2]
    assert (np.abs(end - start).max(1) > 1e-4).all()
    assert base.hyperparameters["learning_rate"][0] == np.float32(0.01)
    assert cnn.protocol["initialisation"] == "base"


COPIES = [
    {"kind": "pruned", "sparsity": {"choice": [0.25, 0.5]}},
    {"kind": "quantised", "bits": 3},
    {"kind": "noised", "noise": 0.2},
]


def test_copies_are_of_the_networks_as_they_ended(tmp_path):
    zoo = made(tmp_path, {"copies": COPIES})
    assert set(zoo.populations) == {"cnn", "cnn-pruned", "cnn-quantised", "cnn-noised"}
    cnn = zoo["cnn"]
    ended = weights_of(cnn)[cnn.metrics["epoch"] == 2]
    last = cnn.metrics["epoch"] == 2
    for name in ("cnn-pruned", "cnn-quantised", "cnn-noised"):
        copy = zoo[name]
        assert (copy.rows, copy.networks) == (6, 6)
        np.testing.assert_array_equal(copy.source, cnn.source)
        np.testing.assert_array_equal(copy.split, cnn.split)
        np.testing.assert_array_equal(copy.step, cnn.step[last])
        np.testing.assert_array_equal(copy.metrics["epoch"], 2)
        assert (copy.metrics["train_loss"] != cnn.metrics["train_loss"][last]).all()
        assert copy.protocol["copies"]["kind"] == name.removeprefix("cnn-")
        for field, values in cnn.hyperparameters.items():
            np.testing.assert_array_equal(copy.hyperparameters[field], values)
    assert cnn.protocol["copies"] is None
    pruned = weights_of(zoo["cnn-pruned"])
    kept = pruned != 0
    np.testing.assert_array_equal(pruned[kept], ended[kept])
    names = {3: 0.25, 6: 0.5}
    assert set(zoo["cnn-pruned"].labels["sparsity"].tolist()) <= set(names.values())
    matrices = 3 * 9 + 3 * 3 * 9 + 30
    biases = 3 + 3 + 10
    assert pruned.shape[1] == matrices + biases
    fresh = ((pruned == 0) & (ended != 0)).sum(1)
    assert fresh.tolist() == np.round(zoo["cnn-pruned"].labels["sparsity"] * matrices).tolist()
    assert zoo["cnn-quantised"].labels["bits"].tolist() == [3] * 6
    assert all(len(np.unique(row[: 3 * 9])) <= 7 for row in weights_of(zoo["cnn-quantised"]))
    noise = weights_of(zoo["cnn-noised"]) - ended
    assert 0 < np.abs(noise).max() < 2


def test_copies_of_a_network_with_batch_norm_keep_its_statistics(tmp_path):
    zoo = made(tmp_path, {"copies": COPIES, "network.norm": "batch", "count": 2, "checkpoints": []})
    spec = zoo["cnn"].spec
    entries = spec.unflatten(torch.from_numpy(weights_of(zoo["cnn"]).copy()))
    names = [name for name, entry in spec.tensors.items() if entry.kind == "statistic"]
    assert len(names) == 4
    for kind in ("pruned", "quantised", "noised"):
        copied = spec.unflatten(torch.from_numpy(weights_of(zoo[f"cnn-{kind}"]).copy()))
        for name in names:
            assert torch.equal(copied[name], entries[name])
            assert entries[name].unique().numel() > 1, "they have not moved"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_types_of_weights(tmp_path, dtype, undisturbed):
    half = made(tmp_path, {"dtype": dtype})["cnn"]
    full = weights_of(Zoo.open(undisturbed.output)["cnn"])
    stored = weights_of(half)
    if dtype == "bfloat16":
        stored = (
            torch.from_numpy(stored.astype(np.uint16).view(np.int16)).view(torch.bfloat16).float().numpy()
        )
    np.testing.assert_allclose(stored.astype(np.float32), full, rtol=1e-2, atol=1e-4)


def test_diverged_networks_are_counted_and_finite(tmp_path):
    # the first two of six diverge, as a scale of 1e30 is drawn or not
    changes = {"training.initial_scale": {"choice": [1.0, 1e30]}, "copies": COPIES, "count": 8}
    report = make(tmp_path / "zoo.h5", changes)
    zoo = Zoo.open(report.output)
    large = zoo["cnn"].hyperparameters["initial_scale"] > 1e20
    assert 0 < large.sum() < 8
    for population in zoo.populations.values():
        assert np.isfinite(weights_of(population)).all()
        np.testing.assert_array_equal(population.metrics["diverged"] > 0, large[population.network])
    assert report.diverged == 4 * large.sum()


# -- other networks and data ---------------------------------------------------------------------------------


FILE = """\
name: small
kind: classifier
source: {source}
network: {network}
training: {{epochs: 2, batch_size: 16, optimizer: {{choice: [sgd, adam]}}, dropout: 0.1}}
data: {{count: 120}}
count: 3
shard: 2
"""
OTHERS = {
    "mlp": ("{kind: table, name: wine}", "{kind: mlp, hidden: [5]}"),
    "mlp_images": ("{kind: digits, size: 8}", "{kind: mlp, hidden: {choice: [[5], [6, 5]]}}"),
    "resnet": ("{kind: digits, size: 8}", "{kind: resnet, blocks: [1], channels: 3}"),
    "rnn": ("{kind: sequences, count: 150, digits: 2}", "{kind: rnn, hidden: 5, cell: lstm}"),
    "cnn_batch": ("{kind: digits, size: 8}", "{kind: cnn, layers: 2, channels: 3, norm: batch}"),
}


def written(path, source, network, **changes):
    text = FILE.format(source=source, network=network)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_and_data(tmp_path, name):
    report = generate(
        written(tmp_path / "recipe.yaml", *OTHERS[name]), tmp_path / "zoo.h5", progress=False, device="cpu"
    )
    zoo = Zoo.open(report.output)
    rows = sum(population.rows for population in zoo.populations.values())
    assert rows == report.networks == 3
    for population in zoo.populations.values():
        assert np.isfinite(weights_of(population)).all()
        assert (population.metrics["train_loss"] > 0).all()
        assert len({row.tobytes() for row in weights_of(population)}) == population.networks


# -- interruptions -------------------------------------------------------------------------------------------


class KilledError(Exception):
    """What a kill stands for."""


@pytest.mark.parametrize("after", [1, 2, 4, 5])
@pytest.mark.parametrize("name", ["plain", "base_and_copies"])
def test_an_interruption_at_any_step_ends_with_the_same_digest(
    tmp_path, monkeypatch, name, after, undisturbed
):
    changes = {} if name == "plain" else {"base": BASE, **FROM_BASE, "copies": COPIES}
    expected = undisturbed.digest if name == "plain" else make(tmp_path / "other.h5", changes).digest
    advance, steps = _training.PopulationTraining._advance, 0

    def killed(self):
        nonlocal steps
        steps += 1
        if steps > after:
            raise KilledError
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(_training.PopulationTraining, "_advance", killed)
        patch.setattr(
            "weightspace.datagen._shards.ShardState.is_due", property(lambda self: self.path is not None)
        )
        with pytest.raises(KilledError):
            make(tmp_path / "zoo.h5", changes)
    assert not (tmp_path / "zoo.h5").exists()
    steps = 0

    def counted(self):
        nonlocal steps
        steps += 1
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(_training.PopulationTraining, "_advance", counted)
        report = make(tmp_path / "zoo.h5", changes)
        resumed, steps = steps, 0
        assert report.digest == expected
        make(tmp_path / "again.h5", changes)
    if name == "plain":
        assert resumed == steps - after, "steps were made again"


@pytest.mark.parametrize("shard", [1, 4, 100])
def test_shards_of_any_size_give_the_same_digest(tmp_path, shard, undisturbed):
    assert make(tmp_path / "zoo.h5", {"shard": shard}).digest == undisturbed.digest


def test_the_same_command_again_trains_nothing(tmp_path):
    first, again = make(tmp_path / "zoo.h5"), make(tmp_path / "zoo.h5")
    assert (again.trained, again.digest) == (0, first.digest)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"data.count": 199}, {"training.epochs": 3}, {"order": "shared"}, {"evaluation": 20}],
)
def test_what_decides_the_content_changes_the_digest(tmp_path, changes, undisturbed):
    zoo = made(tmp_path, changes)
    assert any(
        not np.array_equal(values, Zoo.open(undisturbed.output)["cnn"].metrics[name])
        for name, values in zoo["cnn"].metrics.items()
    )


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints": [0, 3]}, "checkpoints: expected at most 2, the most epochs of training.epochs, found 3"),
        ({"checkpoints": [1, 1]}, r"checkpoints: expected each epoch once, found \[1, 1\]"),
        ({"checkpoints": [-1]}, "checkpoints.0: .*greater than or equal to 0"),
        ({"architectures": 7}, r"architectures: expected at most 6, the number of networks \(count\), found 7"),
        ({"network.padding": 0, "network.kernel_size": 9}, r"kernel_size\[0\]: expected at most 8, .* found 9"),
        ({"network.padding": 0, "network.layers": 5}, r"kernel_size\[3\]: expected at most 2, .*2x2.* found 3"),
        ({"network.kind": "transformer"}, "network: kind: expected one of mlp, cnn, .*, found 'transformer'"),
        ({"kind": "regression"}, "kind: expected one of inr, classifier, found 'regression'"),
        ({"network.depth": 3}, "network.depth: unknown key; expected one of kind, layers, channels"),
        ({"training.lr": 3}, "training.lr: unknown key; expected one of optimizer, learning_rate"),
        ({"data.items": 3}, "data.items: unknown key; expected one of .*count, size"),
        ({"nets": 3}, "nets: unknown key; expected one of kind, name"),
        ({"training.learning_rate": {"log_uniform": [0.0, 1.0]}}, r"training.learning_rate.*above 0|greater than 0"),
        ({"training.dropout": {"uniform": [0.5, 0.2]}}, r"dropout: uniform: expected low <= high, found \[0.5, 0.2\]"),
        ({"training.dropout": {"normal": [0.5, 0.2]}}, "training.dropout: expected a value or {choice: .*found {'normal'"),
        ({"training.fraction": {"uniform": [0.5, 2.0]}}, "training.fraction: .*less than or equal to 1"),
        ({"training.batch_size": {"uniform": [1, 8]}}, r"training.batch_size: expected a value or {choice"),
        ({"training.seed": 2**70}, "training.seed.*: .*less than"),
        ({"source": {"kind": "table", "name": "diabetes"}}, "source: expected classes to learn, 'table' has numbers"),
        ({"source": {"kind": "sequences", "count": 300}}, "network: a cnn reads images, found inputs"),
        ({"split.method": "official"}, "split.method: networks have no official split, expected random"),
        ({"data.method": "official"}, "data.method: the source 'digits' has no official split"),
        ({"data.count": 5000}, "data.count: the source has 1797 items, found 5000"),
        ({"data.val": 0.5, "data.test": 0.5}, "data: val and test leave nothing to train on"),
        ({"base": {"learning_rate": {"uniform": [0.1, 0.2]}}}, "base: learning_rate: expected one value"),
        ({"base": {}}, "training.initialiser: networks start from the base; set it under base instead"),
        ({"base": {}, **FROM_BASE, "network.channels": {"choice": [2, 3]}}, "base: expected networks of one architecture"),
        ({"copies": [{"kind": "pruned"}, {"kind": "pruned"}]}, "copies: expected each kind once, found 'pruned' twice"),
        ({"copies": [{"kind": "distilled"}]}, "copies.0: kind: expected one of pruned, .*'distilled'"),
        ({"copies": [{"kind": "quantised", "bits": 1}]}, "copies.*bits: .*greater than or equal to 2"),
        ({"count": 0}, "count: .*greater than 0, found 0"),
        ({"views": 2}, "views: unknown key; expected one of kind, name"),
        (
            {"training.batch_size": 1, "network.norm": "batch", "network.stride": 2, "network.layers": 3},
            "training.batch_size: expected at least 2 items, as these networks' norms need, found a batch of 1",
        ),
        (
            {"training.fraction": 1e-3, "network.norm": "batch", "network.stride": 2, "network.layers": 3},
            "training.batch_size: expected at least 2 items",
        ),
        (
            {"base": {"batch_size": 1}, **FROM_BASE, "network.norm": "batch", "network.stride": 2, "network.layers": 3},
            "base.batch_size: expected at least 2 items",
        ),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(RecipeError, match=f"^recipe digits-cnn(, line [0-9]+)?: .*{message}") as caught:
        make(tmp_path / "zoo.h5", changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "an error found late: something was written"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden: [5]": "hidden: [5], depth: 3"}, "line 4: network.depth: unknown key; expected one of kind, hidden"),
        ({"hidden: [5]": "hidden: [0]"}, "line 4: network.hidden.*greater than 0"),
        ({"kind: mlp": "kind: mlpp"}, "line 4: network: kind: expected one of mlp, cnn, .*found 'mlpp'"),
        ({"batch_size: 16": "batch_size: {integer: [9, 3]}"}, "line 5: training.batch_size: integer: expected low <= high"),
        ({"batch_size: 16": "batchsize: 16"}, "line 5: training.batchsize: unknown key; expected one of optimizer"),
        ({"kind: classifier": "kind: zoo"}, "line 2: kind: expected one of inr, classifier, found 'zoo'"),
        ({"count: 120": "count: many"}, "line 6: data.count: .*found 'many'"),
    ],
)  # fmt: skip
def test_errors_in_a_file_name_the_line(tmp_path, wrong, message):
    path = written(tmp_path / "recipe.yaml", *OTHERS["mlp"], **wrong)
    with pytest.raises(RecipeError, match=f"^recipe {re.escape(str(path))}, {message}") as caught:
        generate(path, tmp_path / "zoo.h5", progress=False)
    assert "\n" not in str(caught.value)


def test_an_architecture_that_cannot_be_built_is_named(tmp_path):
    """Of many draws the one that is impossible, and what was drawn for it."""
    changes = {"network.kernel_size": {"choice": [3, 9]}, "network.padding": 0, "count": 6}
    with pytest.raises(
        RecipeError, match=r"network: architecture \d cannot be built: kernel_size\[0\].*kernel_size=\[9, 9\]"
    ):
        make(tmp_path / "zoo.h5", changes)


def test_no_validation_items_are_no_error(tmp_path):
    cnn = made(tmp_path, {"data.val": 0.0, "count": 2})["cnn"]
    assert np.isnan(cnn.metrics["val_accuracy"]).all()
    assert np.isfinite(cnn.metrics["test_accuracy"]).all()


def test_the_digest_is_of_no_device_or_thread(tmp_path, undisturbed):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert make(tmp_path / "zoo.h5").digest == undisturbed.digest
    finally:
        torch.set_num_threads(threads)
