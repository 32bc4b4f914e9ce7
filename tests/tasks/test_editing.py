"""Editing: the edits against scipy, equivariance of what is learned, and zoos of edited networks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from weightspace.datasets import Normalisation, ZooDataset
from weightspace.errors import ConfigError, OutputError, RunError, TaskError, ZooError
from weightspace.models import DWS
from weightspace.nets import MLP, build, coordinate_grid
from weightspace.tasks import (
    Editing,
    EditingOptions,
    Renderer,
    ResidualMetanetwork,
    blur,
    contrast,
    dilate,
    edit,
    erode,
    evaluate,
    load_run,
    predict,
    train,
    train_config,
)
from weightspace.testing import assert_equivariant, tiny_zoo
from weightspace.zoo import Population, Source, Zoo, render, verify_digest

SMALL = {"model.hidden": 4, "model.layers": 2}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """One smooth network per item, and what it renders as the stored image."""
    inr = tiny_zoo(networks=60, views=1)["inr"]
    inr = replace(inr, weights=0.4 * inr.weights)
    source = Source(render(inr, np.arange(60), (6, 6)), np.arange(60))
    return Zoo({"inr": inr}, {"tiny": source}).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "dilate"
    fit(config_of(zoo, epochs=8), path)
    return path


def config_of(zoo, model="dws", *, epochs=1, changes=None):
    values = {"zoo": str(zoo), "model": model, "task": "editing", "epochs": epochs, "batch_size": 8}
    return train_config({**values, "learning_rate": 1e-2}, {**SMALL, **(changes or {})})


def fit(config, run):
    return train(config, run, device="cpu", progress=False)


# -- the edits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "oracle"),
    [
        (lambda x: dilate(x, 3), lambda x: ndimage.grey_dilation(x, (3, 3), mode="nearest")),
        (lambda x: dilate(x, 5), lambda x: ndimage.grey_dilation(x, (5, 5), mode="nearest")),
        (lambda x: erode(x, 3), lambda x: ndimage.grey_erosion(x, (3, 3), mode="nearest")),
        (lambda x: blur(x, 1.0), lambda x: ndimage.gaussian_filter(x, 1.0, mode="nearest", truncate=3.0)),
        (lambda x: blur(x, 2.0), lambda x: ndimage.gaussian_filter(x, 2.0, mode="nearest", truncate=3.0)),
    ],
    ids=["dilate-3", "dilate-5", "erode", "blur-1", "blur-2"],
)
def test_edits_are_those_of_scipy(found, oracle):
    images = torch.rand(2, 3, 14, 9, generator=torch.Generator().manual_seed(0))
    expected = [[oracle(channel.double().numpy()) for channel in image] for image in images]
    np.testing.assert_allclose(found(images).numpy(), np.array(expected), atol=1e-6)


def test_contrast_by_hand():
    images = torch.tensor([[[[0.2, 0.4]], [[0.6, 0.8]]], [[[0.0, 1.0]], [[0.0, 1.0]]]])
    expected = torch.tensor([[[[0.05, 0.35]], [[0.65, 0.95]]], [[[0.0, 1.0]], [[0.0, 1.0]]]])
    torch.testing.assert_close(contrast(images, 1.5), expected)


def test_the_renderer_is_the_network_pixel_by_pixel():
    net = MLP((2, 5, 3), output_offset=0.5)
    weights = {name: w.detach()[None] for name, w in net.state_dict().items()}
    found = Renderer({"kind": "mlp", "arguments": net.arguments()}, (4, 7))(weights)
    assert found.shape == (1, 3, 4, 7)
    with torch.no_grad():
        expected = net(torch.tensor([-1.0 + 2 * 2 / 3, -1.0 + 2 * 5 / 6]))
    torch.testing.assert_close(found[0, :, 2, 5], expected)


# -- weights in, weights out -------------------------------------------------------------------------------


def test_residual_scales_are_as_fine_as_the_symmetries_allow(zoo):
    """Two inputs of the first layer, and one of everything else; so that editing commutes with permutations."""
    dataset = ZooDataset(zoo, None)
    network = ResidualMetanetwork(
        DWS(dataset.spec, hidden=4, layers=2, norm="none"), Normalisation.fit(dataset), dataset.spec, 0.01
    )
    assert network.scales.tolist() == pytest.approx([0.01] * 7)
    with torch.no_grad():
        network.scales.copy_(torch.arange(7.0))
    flat = network.scales[network.kinds]
    found = {name: w.unique().tolist() for name, w in dataset.spec.unflatten(flat).items()}
    names = [f"layers.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    assert found == dict(zip(names, [[0, 1], [2], [3], [4], [5], [6]], strict=True))
    assert_equivariant(network, dataset.spec, symmetries=["permutation"])


def test_no_change_is_the_identity(zoo):
    dataset = ZooDataset(zoo, None)
    network = ResidualMetanetwork(DWS(dataset.spec, hidden=4, layers=1), None, dataset.spec, 0.0)
    weights, _ = dataset.read(range(5))
    assert all(torch.equal(w, weights[name]) for name, w in network(weights).items())


@pytest.mark.parametrize("name", ["erode", "blur"])
def test_editing_beats_the_identity_on_unseen_networks(zoo, tmp_path, name):
    changes = {"task.edit": name, "model.layers": 1}
    fit(config_of(zoo, epochs=8, changes=changes), tmp_path / "run")
    report = evaluate(tmp_path / "run", device="cpu")
    assert report.metrics["loss"] / report.reference["loss"] < 0.9


def test_dilation_is_learned_drawn_and_scored(trained):
    report = evaluate(trained, device="cpu")
    assert report.metrics["loss"] / report.reference["loss"] < 0.9
    assert report.metrics["mse_x_100"] == pytest.approx(100 * report.metrics["loss"])
    assert report.metrics["psnr"] == pytest.approx(-10 * np.log10(report.metrics["loss"]), rel=1e-4)
    for picture in ("val.png", "test.png"):
        assert (trained / picture).read_bytes()[:4] == b"\x89PNG"


def test_targets_come_from_stored_or_from_rendered_images(zoo):
    dataset = ZooDataset(zoo, "test", target=None)
    stored = Editing.from_data(dataset, EditingOptions()).targets(dataset)
    rows, population = dataset.rows, dataset.population
    images = dataset.zoo.sources["tiny"].get(population.source[population.network[rows]])
    expected = [ndimage.grey_dilation(image, (3, 3), mode="nearest") for image in images]
    np.testing.assert_allclose(stored[:, 0].numpy(), np.array(expected), atol=1e-6)
    task = Editing.from_data(dataset, EditingOptions(of="rendered", side=11, edit="erode"))
    assert (task.render.shape, task.out_features) == ((11, 11), None)
    rendered = render(population, rows, (11, 11))
    np.testing.assert_allclose(task.reference(dataset)[:, 0].numpy(), rendered, atol=1e-6)
    expected = [ndimage.grey_erosion(image, (3, 3), mode="nearest") for image in rendered]
    np.testing.assert_allclose(task.targets(dataset)[:, 0].numpy(), np.array(expected), atol=1e-6)


def test_a_run_loads_in_one_call(zoo, trained):
    loaded = load_run(trained)
    dataset = ZooDataset(zoo, "train")
    assert (loaded.spec, loaded.config.task) == (dataset.spec, "editing")
    expected = Normalisation.fit(dataset)
    torch.testing.assert_close(loaded.network.normalisation.std, expected.std)
    weights, _ = dataset.read(range(3))
    edited = loaded.network(weights)
    assert {name: w.shape for name, w in edited.items()} == {name: w.shape for name, w in weights.items()}
    assert loaded.task.readout(edited).shape == (3, 1, 6, 6)


# -- zoos of edited networks -------------------------------------------------------------------------------


def test_the_edited_zoo_renders_as_the_model_says(zoo, trained, tmp_path):
    path = tmp_path / "edited.h5"
    report = edit(trained, zoo, path, device="cpu")
    before, after = Zoo.open(zoo), Zoo.open(path)
    assert verify_digest(path) == report.digest == after.digest
    loaded = load_run(trained)
    with torch.no_grad():
        expected = loaded.task.readout(loaded.network(before["inr"].weights_of(slice(None))))
    np.testing.assert_allclose(
        render(after["inr"], np.arange(60), (6, 6)), expected[:, 0].numpy(), rtol=1e-4, atol=1e-5
    )
    dataset = ZooDataset(zoo, None, target=None)
    errors = (expected - loaded.task.targets(dataset)).square().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(after["inr"].metrics["edit_mse"], errors, rtol=1e-3, atol=1e-6)
    assert report.mse_after == pytest.approx(errors.mean(), rel=1e-4)
    assert report.mse_after < report.mse_before
    for name in ("network", "source", "view", "split", "step"):
        np.testing.assert_array_equal(getattr(after["inr"], name), getattr(before["inr"], name))
    np.testing.assert_array_equal(after["inr"].labels["label"], before["inr"].labels["label"])
    assert list(after["inr"].metrics) == ["edit_mse"]
    np.testing.assert_array_equal(after.sources["tiny"].items, before.sources["tiny"].items)


def test_the_edited_zoo_says_who_edited_it_and_how(zoo, trained, tmp_path):
    edit(trained, zoo, tmp_path / "edited.h5", split="test", device="cpu")
    edited = Zoo.open(tmp_path / "edited.h5")
    said = edited["inr"].protocol["edited"]
    assert (said["run"], said["task"], said["model"], said["split"]) == ("dilate", "editing", "dws", "test")
    assert (said["settings"]["edit"], said["zoo"]) == ("dilate", Zoo.open(zoo).digest)
    assert said["parameters"].startswith("sha256:")
    assert edited["inr"].protocol["w0"] == 30.0
    assert edited.recipe["edited"] == said


def test_a_split_keeps_the_rows_of_its_networks(trained, tmp_path):
    """Two checkpoints per network, of which one is not finite: networks are numbered anew."""
    inr = tiny_zoo(networks=60)["inr"]
    weights = np.repeat(inr.weights, 2, axis=0)
    weights[2 * np.flatnonzero(inr.split == 2)[0] + 1] = np.inf
    twice = replace(
        inr,
        weights=weights,
        network=np.repeat(inr.network, 2),
        step=np.tile(np.array([1, 2]), 60),
        metrics={},
        hyperparameters={"number": np.arange(60)},
    )
    source = tiny_zoo(networks=60).sources
    path = Zoo({"inr": twice}, source).save(tmp_path / "twice.h5")
    output = tmp_path / "edited.h5"
    with pytest.raises(TaskError, match=r"NaN or infinite weights in 1 row of split test: \d+; --skip-bad"):
        edit(trained, path, output, split="test", device="cpu")
    assert not output.exists()
    report = edit(trained, path, output, split="test", device="cpu", skip_bad=True)
    assert (report.networks, report.skipped) == (12, 1)
    found: Population = Zoo.open(output)["inr"]
    assert (found.rows, found.networks) == (23, 12)
    assert found.hyperparameters["number"].tolist() == np.flatnonzero(inr.split == 2).tolist()
    numbers = found.hyperparameters["number"][found.network]
    np.testing.assert_array_equal(found.source[found.network], inr.source[numbers])
    assert found.step.tolist() == [1, *([1, 2] * 11)]
    assert set(found.split.tolist()) == {2}


def test_outputs_are_kept_unless_told_otherwise(zoo, trained, tmp_path):
    path = tmp_path / "edited.h5"
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        edit(trained, zoo, path, device="cpu")
    assert path.read_text() == "precious"
    edit(trained, zoo, path, device="cpu", overwrite=True)
    assert Zoo.open(path)["inr"].networks == 60
    assert [entry.name for entry in tmp_path.iterdir()] == ["edited.h5"]


def test_predicting_is_for_numbers_and_editing_for_weights(zoo, trained, tmp_path):
    with pytest.raises(TaskError, match="gives weights and no table; use `weightspace edit`"):
        predict(trained, zoo, tmp_path / "p.csv", device="cpu")
    values = {"zoo": str(zoo), "model": "mlp", "epochs": 1, "batch_size": 8}
    fit(train_config(values, {"model.hidden": [8]}), tmp_path / "run")
    with pytest.raises(TaskError, match="gives no weights; use `weightspace predict`"):
        edit(tmp_path / "run", zoo, tmp_path / "e.h5", device="cpu")


# -- what cannot be edited ---------------------------------------------------------------------------------


def test_networks_that_are_no_images_are_named(zoo, tmp_path):
    opened = Zoo.open(zoo)
    inr = opened["inr"]
    classifiers = [MLP((7, 4, 3), activation="relu") for _ in range(10)]
    other = Zoo.from_state_dicts([net.state_dict() for net in classifiers], module=classifiers[0])
    for name, found, message in [
        (
            "foreign",
            Zoo({"inr": replace(inr, architecture=None)}, opened.sources),
            "does not say how to rebuild",
        ),
        ("bare", Zoo({"inr": inr}), "stores no source images; edit what the networks render, with --set"),
        (
            "other",
            Zoo(other.populations, opened.sources),
            "expected INRs of images, .* found networks of 7 inputs",
        ),
    ]:
        path = found.save(tmp_path / f"{name}.h5")
        with pytest.raises(TaskError, match=message) as caught:
            fit(config_of(path), tmp_path / "run")
        assert "\n" not in str(caught.value)
    with pytest.raises(
        TaskError, match=r"rendered at 9 x 9 pixels, but those stored in .* are of 6 x 6 pixels"
    ):
        fit(config_of(zoo, changes={"task.side": 9}), tmp_path / "run")
    with pytest.raises(ConfigError, match="model mlp: gives numbers and no weights"):
        fit(train_config({"zoo": str(zoo), "model": "mlp", "task": "editing"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_networks_that_render_otherwise_are_refused(zoo, trained, tmp_path):
    """Another output offset: the spec is the same, the images are not."""
    opened = Zoo.open(zoo)
    arguments = {**opened["inr"].architecture["arguments"], "output_offset": 0.0}
    other = replace(opened["inr"], architecture={"kind": "mlp", "arguments": arguments})
    path = Zoo({"inr": other}, opened.sources).save(tmp_path / "other.h5")
    with pytest.raises(RunError, match=r"runs networks of architecture .*0\.5.* are .*0\.0"):
        edit(trained, path, tmp_path / "edited.h5", device="cpu")
    assert build(other.architecture)(coordinate_grid((2, 2))).shape == (4, 1)


def test_edits_are_for_the_weight_space_that_was_trained(zoo, tmp_path):
    """Of graph networks, too, that read any other."""
    values = {"zoo": str(zoo), "model": "graph", "task": "editing", "epochs": 1, "batch_size": 8}
    changes = {"model.hidden": 4, "model.layers": 1, "model.types": "role", "normalisation": "fan_in"}
    fit(train_config(values, changes), tmp_path / "run")
    other = tiny_zoo(networks=10, hidden=(5, 5)).save(tmp_path / "other.h5")
    message = r"found \[5, 2\]\); task editing is for networks like those of training alone, whatever the metanetwork$"
    with pytest.raises(RunError, match=message):
        edit(tmp_path / "run", other, tmp_path / "edited.h5", device="cpu")


def test_of_several_sources_the_population_or_the_recipe_names_one(zoo):
    opened = Zoo.open(zoo)
    inr, tiny = opened["inr"], opened.sources["tiny"]
    other = Source(np.zeros((60, 6, 6), dtype=np.float32), np.arange(60))
    sources = {"another": other, "tiny": tiny}
    own = replace(inr, protocol={**inr.protocol, "source": "tiny"})
    expected = targets_of(opened)
    assert expected.std() > 0
    for found in (Zoo({"inr": own}, sources), Zoo({"inr": inr}, sources, {"source": {"kind": "tiny"}})):
        assert torch.equal(targets_of(found), expected)
    for unclear in (None, {"source": "tiny"}, {"source": {"kind": "third"}}):
        with pytest.raises(
            ZooError, match=r"several sources, another, tiny; the population's protocol should name its own"
        ):
            targets_of(Zoo({"inr": inr}, sources, unclear))


def targets_of(zoo):
    dataset = ZooDataset(zoo, "test", target=None)
    return Editing.from_data(dataset, EditingOptions()).targets(dataset)


def test_large_images_are_rendered_in_smaller_blocks(zoo, monkeypatch):
    import weightspace.tasks._editing as room

    dataset = ZooDataset(zoo, None, target=None)
    task = Editing.from_data(dataset, EditingOptions(of="rendered", side=10))
    expected = task.reference(dataset)
    sizes, forward = [], task.render
    monkeypatch.setattr(
        task, "render", lambda weights: sizes.append(len(weights["layers.0.bias"])) or forward(weights)
    )
    task.render.grid = forward.grid
    monkeypatch.setattr(room, "BLOCK_PIXELS", 700)
    torch.testing.assert_close(task.reference(dataset), expected, rtol=1e-5, atol=1e-6)
    assert (max(sizes), sum(sizes)) == (7, 60)


def test_a_run_of_another_version_is_refused(trained, tmp_path):
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    description = json.loads((trained / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**description, "run_version": 1}))
    with pytest.raises(RunError, match="version should be 2, found 1; train again"):
        load_run(tmp_path)


@pytest.mark.parametrize("augment", ["rotation(10)", "sign, mixup(aligned)", "negation"])
def test_what_changes_the_signal_is_refused(zoo, tmp_path, augment):
    """Targets are edited images of the networks as they are stored."""
    name = augment.split("(")[0].split(", ")[-1]
    with pytest.raises(ConfigError, match=f"expected augmentations that keep the signal, found {name}"):
        fit(config_of(zoo, changes={"augment": augment}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
