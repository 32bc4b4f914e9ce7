"""Export and import give the same networks back, bit for bit, in every layout that has both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from weightspace.errors import ConfigError, OutputError, ZooError
from weightspace.nets import CNN, architecture_of
from weightspace.testing import tiny_zoo
from weightspace.zoo import (
    EXPORTERS,
    IMPORTERS,
    Population,
    Zoo,
    export_zoo,
    import_zoo,
    spec_of,
    split_items,
)

INRS, CLASSIFIERS = ("augmentation", "dwsnets", "nfn"), ("cnn-wild-park", "modelzoos", "small-cnn-zoo")


def inrs(views=2):
    zoo = tiny_zoo(networks=14, views=views)
    inr = zoo["inr"]
    far = np.where(inr.source >= 5, inr.source + 60_000, inr.source)
    return Zoo({"inr": replace(inr, source=far)}, zoo.sources)


def classifiers(activations=("relu", "tanh"), residual=False):
    populations = {}
    for at, activation in enumerate(activations):
        net = CNN((1, 32, 32), (4, 5), 3, activation=activation, stride=2, padding=0)
        if residual:
            net = CNN((3, 32, 32), (4, 5, 6), 3, activation=[activation, "gelu", "silu"], residual=[-1, -1, 0],
                      shortcut="shared")  # fmt: skip
        spec = spec_of(net)
        generator = torch.Generator().manual_seed(at)
        network = np.repeat(np.arange(4), 2)
        populations[f"cnn-{activation}"] = Population(
            spec=spec,
            weights=torch.randn(8, spec.num_parameters, generator=generator).numpy(),
            network=network,
            step=np.tile(np.array([0, 40]), 4),
            source=np.arange(4) + 4 * at,
            view=np.zeros(4, dtype=np.int64),
            split=split_items(np.arange(4) + 4 * at, (0.5, 0.25, 0.25), 0),
            metrics={"test_accuracy": np.linspace(0.1, 0.9, 8, dtype=np.float32)},
            hyperparameters={
                "learning_rate": np.array([0.1, 0.001, 3e-7, 1 / 3], dtype=np.float32),
                "epochs": np.array([3, 4, 5, 2**40]),
                "optimizer": np.array([1, 0, 1, 1]),
            },
            architecture=architecture_of(net),
            protocol={"choices": {"optimizer": ["adam", "sgd"]}},
        )
    return Zoo(populations)


def there_and_back(zoo, format, folder, **options):
    export_zoo(zoo, format, folder / "exported", progress=False)
    splits = folder / "exported" / "splits.json"
    if format == "cnn-wild-park" or not splits.exists():
        splits = None
    import_zoo(format, folder / "exported", folder / "back.h5", splits=splits, progress=False, **options)
    return Zoo.open(folder / "back.h5")


def in_order(population):
    """Rows by item, view and step."""
    network = population.network
    keys = (population.step, population.view[network], population.source[network])
    return np.lexsort(keys)


def assert_alike(found, expected, *, tables, items=True):
    one, other = (in_order(each) if items else np.arange(each.rows) for each in (found, expected))
    assert np.array_equal(found.weights[one], expected.weights[other])
    a, b = found.network[one], expected.network[other]
    assert np.array_equal(found.split[a], expected.split[b])
    if items:
        assert np.array_equal(found.source[a], expected.source[b])
        assert np.array_equal(found.view[a], expected.view[b])
    for table in tables:
        assert set(getattr(found, table)) == set(getattr(expected, table))
        for name, values in getattr(expected, table).items():
            mine = getattr(found, table)[name]
            assert mine.dtype == values.dtype
            left, right = (mine[one], values[other]) if table == "metrics" else (mine[a], values[b])
            assert np.array_equal(left, right), name


@pytest.mark.parametrize("format", INRS)
def test_coordinate_networks(tmp_path, format):
    zoo = inrs(views=1 if format == "dwsnets" else 2)
    back = there_and_back(zoo, format, tmp_path, options={"output_offset": 0.5})["inr"]
    assert_alike(back, zoo["inr"], tables=["labels"])
    assert (back.spec, back.architecture) == (zoo["inr"].spec, zoo["inr"].architecture)


@pytest.mark.parametrize("format", CLASSIFIERS)
def test_classifiers(tmp_path, format):
    zoo = classifiers(("relu", "tanh") if format == "small-cnn-zoo" else ("relu",))
    back = there_and_back(zoo, format, tmp_path)
    assert len(back.populations) == len(zoo.populations)
    for found, expected in zip(back.populations.values(), zoo.populations.values(), strict=True):
        assert_alike(found, expected, tables=["metrics"], items=False)
        assert np.array_equal(found.network, expected.network)
        assert np.array_equal(found.step, expected.step)
        for name in ("learning_rate", "epochs"):
            assert np.array_equal(found.hyperparameters[name], expected.hyperparameters[name])
        names = found.protocol["choices"]["optimizer"]
        assert [names[code] for code in found.hyperparameters["optimizer"]] == ["sgd", "adam", "sgd", "sgd"]
    if format == "small-cnn-zoo":
        assert [p.architecture for p in back.populations.values()] == [
            p.architecture for p in zoo.populations.values()
        ]
        assert [p.spec for p in back.populations.values()] == [p.spec for p in zoo.populations.values()]


def test_wild_architectures(tmp_path):
    zoo = classifiers(residual=True)
    back = there_and_back(zoo, "cnn-wild-park", tmp_path)
    for found, expected in zip(back.populations.values(), zoo.populations.values(), strict=True):
        assert_alike(found, expected, tables=["metrics"], items=False)
        assert (found.architecture, found.spec) == (expected.architecture, expected.spec)


@pytest.mark.parametrize(
    "zoo", [inrs(), classifiers(), Zoo({**inrs().populations, **classifiers(("tanh",)).populations})]
)
def test_a_folder_keeps_everything(tmp_path, zoo):
    back = there_and_back(zoo, "folder", tmp_path)
    assert set(back) == set(zoo)
    tables = ["metrics", "labels", "hyperparameters"]
    for name in zoo:
        assert_alike(back[name], zoo[name], tables=tables, items=False)
        for column in ("network", "step", "source", "view"):
            assert np.array_equal(getattr(back[name], column), getattr(zoo[name], column)), column
        assert (back[name].spec, back[name].architecture) == (zoo[name].spec, zoo[name].architecture)
        assert zoo[name].protocol.items() <= back[name].protocol.items()


def test_half_precision_is_exported_as_it_reads(tmp_path):
    zoo = inrs()
    half = replace(zoo["inr"], weights=zoo["inr"].weights.astype(np.float16), dtype="float16")
    back = there_and_back(Zoo({"inr": half}), "folder", tmp_path)["inr"]
    assert np.array_equal(back.weights, half.weights.astype(np.float32))


def test_every_exporter_has_an_importer_and_says_what_it_keeps():
    assert set(EXPORTERS) <= set(IMPORTERS)
    assert set(EXPORTERS) == {*INRS, *CLASSIFIERS, "folder"}
    assert all(kind.keeps and kind.__doc__ for kind in EXPORTERS.values())


# -- choices and refusals ----------------------------------------------------------------------------------


def test_a_part_of_a_zoo(tmp_path):
    report = export_zoo(
        classifiers(), "folder", tmp_path / "x", population="cnn-tanh", where="step == last", progress=False
    )
    assert (report.populations, report.rows) == ({"cnn-tanh": 4}, 4)
    import_zoo("folder", tmp_path / "x", tmp_path / "x.h5", progress=False)
    back = Zoo.open(tmp_path / "x.h5")
    assert np.array_equal(back["cnn-tanh"].weights, classifiers()["cnn-tanh"].weights[1::2])


def test_what_has_no_place_is_told(tmp_path):
    report = export_zoo(inrs(1), "dwsnets", tmp_path / "x", progress=False)
    assert report.left_out == ["metrics/psnr", "step", "sources/tiny"]
    assert export_zoo(classifiers(), "folder", tmp_path / "y", progress=False).left_out == []


@pytest.mark.parametrize(
    ("zoo", "format", "arguments", "message"),
    [
        (inrs(), "zip", {}, "format: expected one of dwsnets, .*, found 'zip'"),
        (inrs(), "dwsnets", {}, 'takes one network per item; say --where "view == 0"'),
        (inrs(), "small-cnn-zoo", {}, "takes CNNs with the mean over pixels, .* population inr is of other networks"),
        (inrs(), "cnn-wild-park", {}, "takes CNNs without norm"),
        (classifiers(), "dwsnets", {}, "takes one population, found cnn-relu, cnn-tanh; say --population NAME"),
        (classifiers(("relu",)), "nfn", {}, "takes MLPs, and population cnn-relu is of other networks"),
        (classifiers(residual=True), "small-cnn-zoo", {}, "neither norm nor shortcuts"),
        (classifiers(), "folder", {"where": "step > 99"}, "'step > 99' holds for no row of any population"),
        (inrs(), "folder", {"where": "nonsense > 1"}, "where: expected one of"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, zoo, format, arguments, message):
    with pytest.raises(ConfigError, match=message):
        export_zoo(zoo, format, tmp_path / "x", progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_unknown_population(tmp_path):
    with pytest.raises(ZooError, match="population: expected one of inr, found 'x'"):
        export_zoo(inrs(), "folder", tmp_path / "x", population="x", progress=False)


def test_only_exports_are_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(OutputError, match="thesis exists already"):
        export_zoo(inrs(), "folder", tmp_path / "thesis", progress=False)
    with pytest.raises(
        OutputError, match=r"thesis was not made by an export \(it has no zoo\.json\); move it away"
    ):
        export_zoo(inrs(), "folder", tmp_path / "thesis", overwrite=True, progress=False)
    with pytest.raises(OutputError, match=r"directory .*nowhere does not exist"):
        export_zoo(inrs(), "folder", tmp_path / "nowhere" / "x", progress=False)
    export_zoo(inrs(), "folder", tmp_path / "x", progress=False)
    export_zoo(inrs(1), "dwsnets", tmp_path / "x", overwrite=True, progress=False)
    assert not (tmp_path / "x" / "labels.csv").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis", "x"]


@pytest.mark.parametrize("format", ["dwsnets", "folder"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch, format):
    from weightspace.zoo.transfer import _folder

    def full(*_):
        raise OSError(28, "No space left on device")

    def full_says_rust(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(_folder, "save_file", full_says_rust)
    with pytest.raises(OutputError, match=r"x could not be written \(No space left on device\)"):
        export_zoo(inrs(1), format, tmp_path / "x", progress=False)
    assert not list(tmp_path.iterdir())
