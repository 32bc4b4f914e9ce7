"""Writing and reading zoos: round trips, the digest, atomic writing, joining."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import OutputError, WeightspaceError, ZooError
from weightspace.spec import WeightSpec
from weightspace.testing import tiny_zoo
from weightspace.zoo import Population, Source, Zoo, atomic_path, join_zoos, verify_digest

TABLES = ("metrics", "labels", "hyperparameters")
COLUMNS = ("network", "step", "source", "view", "split")


def assert_equal_populations(found: Population, expected: Population) -> None:
    assert found.spec == expected.spec
    assert found.architecture == expected.architecture
    assert found.protocol == expected.protocol
    assert found.dtype == expected.dtype
    for name in ("weights", *COLUMNS):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for table in TABLES:
        a, b = getattr(found, table), getattr(expected, table)
        assert set(a) == set(b)
        for name in b:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def digest_by_the_document(path) -> str:
    """The digest as FORMAT.md words it, with h5py and hashlib alone."""
    with h5py.File(path) as file:
        parts: list[bytes] = []

        def text(value: str) -> None:
            parts.append(value.encode() + b"\0")

        def array(dataset: h5py.Dataset, name: str) -> None:
            text(name)
            text(dataset.dtype.name)
            text(json.dumps(list(dataset.shape), separators=(",", ":")))
            parts.append(dataset[()].astype(dataset.dtype.newbyteorder("<")).tobytes())

        for name in sorted(file["populations"]):
            group = file["populations"][name]
            text(name)
            for key in ("spec", "architecture", "protocol"):
                text(json.dumps(json.loads(group.attrs[key]), sort_keys=True, separators=(",", ":")))
            for key in ("network", "source", "split", "step", "view", "weights"):
                array(group[key], key)
            for table in ("hyperparameters", "labels", "metrics"):
                for key in sorted(group[table]):
                    array(group[table][key], f"{table}/{key}")
        text(json.dumps(json.loads(file.attrs["recipe"]), sort_keys=True, separators=(",", ":")))
        return f"sha256:{hashlib.sha256(b''.join(parts)).hexdigest()}"


def test_what_is_saved_is_what_is_opened(rich_zoo, tmp_path):
    path = rich_zoo.save(tmp_path / "rich.h5")
    opened = Zoo.open(path)
    assert set(opened) == {"inr", "second"}
    for name in rich_zoo:
        assert_equal_populations(opened[name], rich_zoo[name])
    assert opened.recipe == {"name": "rich", "seed": 3}
    np.testing.assert_array_equal(opened.sources["tiny"].items, rich_zoo.sources["tiny"].items)
    np.testing.assert_array_equal(opened.sources["tiny"].index, rich_zoo.sources["tiny"].index)
    assert opened.format_version == rich_zoo.format_version == 1
    assert opened.digest == rich_zoo.digest == verify_digest(path)


def test_the_digest_is_the_one_of_the_document(rich_zoo, tmp_path):
    assert digest_by_the_document(rich_zoo.save(tmp_path / "rich.h5")) == rich_zoo.digest


def test_weights_are_contiguous_and_mapped_from_disk(rich_zoo, tmp_path):
    path = rich_zoo.save(tmp_path / "rich.h5")
    with h5py.File(path) as file:
        dataset = file["populations/inr/weights"]
        assert dataset.chunks is None
        assert dataset.compression is None
        assert dataset.dtype == np.dtype("<f4")
        offset = dataset.id.get_offset()
    weights = Zoo.open(path)["inr"].weights
    assert isinstance(weights, np.memmap)
    assert not weights.flags.writeable
    raw = np.frombuffer(path.read_bytes(), "<f4", count=weights.size, offset=offset)
    np.testing.assert_array_equal(raw.reshape(weights.shape), rich_zoo["inr"].weights)


@given(st.lists(st.integers(-20, 19), min_size=1, max_size=30))
def test_random_rows_read_equal(tmp_path_factory, rows):
    zoo = tiny_zoo(networks=20)
    path = tmp_path_factory.getbasetemp() / f"random-rows-{os.getpid()}.h5"
    opened = Zoo.open(path if path.exists() else zoo.save(path))["inr"]
    found = opened.read(np.array(rows))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), zoo["inr"].weights[rows])
    np.testing.assert_array_equal(opened.read(rows[0]).numpy(), zoo["inr"].weights[rows[0]])


def test_what_was_read_is_the_callers_to_change(rich_zoo, tmp_path):
    for zoo in (rich_zoo, Zoo.open(rich_zoo.save(tmp_path / "rich.h5"))):
        before = zoo["inr"].weights[:4].copy()
        for rows in (slice(0, 4), [0, 1, 2, 3], np.arange(4), 0):
            zoo["inr"].read(rows).zero_()
        np.testing.assert_array_equal(zoo["inr"].weights[:4], before)


def test_half_precision_is_stored_and_read_as_float32(tmp_path):
    inr = tiny_zoo(networks=8)["inr"]
    exact = torch.from_numpy(inr.weights)
    cases = {
        "float16": (exact.half().numpy(), exact.half().float(), 2**-11),
        "bfloat16": (
            exact.bfloat16().view(torch.int16).numpy().view(np.uint16),
            exact.bfloat16().float(),
            2**-8,
        ),
    }
    for dtype, (stored, expected, precision) in cases.items():
        path = Zoo({"inr": replace(inr, weights=stored, dtype=dtype)}).save(tmp_path / f"{dtype}.h5")
        opened = Zoo.open(path)["inr"]
        assert opened.weights.dtype.itemsize == 2
        assert opened.read(slice(None)).dtype == torch.float32
        assert torch.equal(opened.read(slice(None)), expected)
        assert ((opened.read(slice(None)) - exact).abs() <= precision * exact.abs() + 1e-7).all()
        verify_digest(path)


def test_weights_of_gives_tensors_by_name(rich_zoo):
    inr = rich_zoo["inr"]
    weights = inr.weights_of([1, 4])
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "layers.0.weight": (2, 8, 2),
        "layers.0.bias": (2, 8),
        "layers.1.weight": (2, 8, 8),
        "layers.1.bias": (2, 8),
        "layers.2.weight": (2, 1, 8),
        "layers.2.bias": (2, 1),
    }
    assert torch.equal(inr.spec.flatten(weights), inr.read([1, 4]))


# -- digest ------------------------------------------------------------------------------------------------


def one_more(values):
    changed = values.copy()
    changed.flat[0] += 1
    return changed


CHANGES = {
    "weights": lambda p: {"weights": one_more(p.weights)},
    "network": lambda p: {"network": p.network[::-1].copy()},
    "step": lambda p: {"step": one_more(p.step)},
    "source": lambda p: {"source": one_more(p.source)},
    "view": lambda p: {"view": one_more(p.view)},
    "split": lambda p: {"split": (p.split + 1) % 3},
    "a metric": lambda p: {"metrics": {**p.metrics, "psnr": one_more(p.metrics["psnr"])}},
    "a metric's name": lambda p: {"metrics": {"quality": p.metrics["psnr"]}},
    "a label": lambda p: {"labels": {"label": one_more(p.labels["label"])}},
    "a hyperparameter": lambda p: {"hyperparameters": {"rate": np.ones(len(p.source), np.float32)}},
    "the spec": lambda p: {"spec": WeightSpec.mlp([2, 8, 8, 1], activation="tanh")},
    "the architecture": lambda p: {"architecture": None},
    "the protocol": lambda p: {"protocol": {**p.protocol, "w0": 10.0}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_covers(change):
    zoo = tiny_zoo(networks=6)
    changed = Zoo({"inr": replace(zoo["inr"], **CHANGES[change](zoo["inr"]))}, zoo.sources)
    assert changed.digest != zoo.digest


def test_the_digest_covers_the_recipe_and_the_names_of_populations():
    zoo = tiny_zoo(networks=6)
    assert replace(zoo, recipe={"seed": 1}).digest != zoo.digest
    assert Zoo({"other": zoo["inr"]}).digest != zoo.digest


def test_the_digest_does_not_cover_who_wrote_the_file(tmp_path):
    path = tiny_zoo(networks=6).save(tmp_path / "zoo.h5")
    before = verify_digest(path)
    with h5py.File(path, "r+") as file:
        assert set(json.loads(file.attrs["created_by"])) == {"python", "torch", "numpy", "weightspace"}
        file.attrs["created_by"] = '{"weightspace": "99.0"}'
    assert verify_digest(path) == before == Zoo.open(path).digest


def test_order_of_names_does_not_change_the_digest(rich_zoo):
    inr = rich_zoo["inr"]
    turned = replace(inr, metrics=dict(reversed(inr.metrics.items())))
    assert (
        Zoo({"second": rich_zoo["second"], "inr": turned}, recipe=rich_zoo.recipe).digest == rich_zoo.digest
    )


@settings(max_examples=25)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_byte_in_the_weights_is_found(tmp_path_factory, share, mask):
    path = tmp_path_factory.getbasetemp() / f"flipped-{os.getpid()}.h5"
    Zoo.save(tiny_zoo(networks=6), path, overwrite=True)
    weights = Zoo.open(path)["inr"].weights
    at = weights.offset + int(share * weights.nbytes)
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)
    with pytest.raises(
        ZooError, match=r"content is damaged: digest should be sha256:\w{64}, found sha256:\w{64}"
    ):
        verify_digest(path)


# -- writing -----------------------------------------------------------------------------------------------


def test_an_existing_file_is_refused_and_kept(tmp_path):
    path = tiny_zoo(networks=6).save(tmp_path / "zoo.h5")
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"zoo\.h5 exists already; choose another name or pass --overwrite"):
        tiny_zoo(networks=4).save(path)
    assert path.read_bytes() == before
    assert issubclass(OutputError, FileExistsError)
    tiny_zoo(networks=4).save(path, overwrite=True)
    assert Zoo.open(path)["inr"].rows == 4


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"output: directory .*missing does not exist"):
        tiny_zoo(networks=4).save(tmp_path / "missing" / "zoo.h5")


def test_a_failure_midway_leaves_what_was_there(tmp_path):
    """The signals are written after the weights; these cannot be."""
    path = tmp_path / "zoo.h5"
    unwritable = {"bad": Source(np.array([object()]), np.arange(1))}
    broken = replace(tiny_zoo(networks=6), sources=unwritable)
    with pytest.raises(TypeError, match="Object dtype"):
        broken.save(path)
    assert list(tmp_path.iterdir()) == []
    before = tiny_zoo(networks=4).save(path).read_bytes()
    with pytest.raises(TypeError, match="Object dtype"):
        broken.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_midway_leaves_no_file(tmp_path):
    def write():
        with atomic_path(tmp_path / "a.bin", overwrite=False) as temporary:
            temporary.write_bytes(b"half")
            assert list(tmp_path.iterdir()) == [temporary]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_no_file(tmp_path):
    """The limit on file sizes stands in for the disk; it can only be set for a whole process."""
    code = """
import resource, sys
from weightspace.errors import OutputError
from weightspace.testing import tiny_zoo
zoo = tiny_zoo(networks=400)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    zoo.save(sys.argv[1])
except OutputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "zoo.h5")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.startswith(f"output: {tmp_path / 'zoo.h5'} could not be written ("), result.stderr
    assert result.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_contradict_each_other_are_not_written(tmp_path):
    inr = tiny_zoo(networks=6)["inr"]
    cases = {
        "/populations/inr/weights: shape": replace(inr, weights=inr.weights[:, 1:]),
        "/populations/inr/weights: unexpected type float64": replace(inr, weights=inr.weights.astype(float)),
        "/populations/inr/step: shape": replace(inr, step=inr.step[1:]),
        "/populations/inr/labels/label: shape": replace(inr, labels={"label": np.zeros(5, np.int64)}),
        "/populations/inr: attribute 'weights_dtype'": replace(inr, dtype="float8"),
        "/populations/inr/labels: a name .* found 'a/b'": replace(inr, labels={"a/b": np.zeros(6, np.int64)}),
    }
    for message, population in cases.items():
        with pytest.raises(ZooError, match=message):
            Zoo({"inr": population}).save(tmp_path / "zoo.h5")
    with pytest.raises(ZooError, match=r"/populations: a name .* found 'a/b'"):
        Zoo({"a/b": inr}).save(tmp_path / "zoo.h5")
    with pytest.raises(ZooError, match="expected at least one population, found none"):
        Zoo({}).save(tmp_path / "zoo.h5")
    assert list(tmp_path.iterdir()) == []


# -- joining -----------------------------------------------------------------------------------------------


def part_of(population: Population, first: int, stop: int) -> Population:
    """Networks ``first .. stop - 1``, numbered from 0."""
    rows = (population.network >= first) & (population.network < stop)
    pick = slice(first, stop)
    return replace(
        population,
        weights=population.weights[rows],
        network=population.network[rows] - first,
        step=population.step[rows],
        source=population.source[pick],
        view=population.view[pick],
        split=population.split[pick],
        metrics={name: values[rows] for name, values in population.metrics.items()},
        labels={name: values[pick] for name, values in population.labels.items()},
        hyperparameters={name: values[pick] for name, values in population.hyperparameters.items()},
    )


def test_joined_parts_equal_the_zoo_in_one_piece(rich_zoo, tmp_path):
    whole = Zoo({"inr": rich_zoo["inr"]}, rich_zoo.sources, rich_zoo.recipe)
    bounds = [(0, 1), (1, 6), (6, 10)]
    paths = [
        Zoo({"inr": part_of(whole["inr"], *bound)}).save(tmp_path / f"{bound[0]}.h5") for bound in bounds
    ]
    joined = tmp_path / "joined.h5"
    digest = join_zoos(paths, joined, recipe=whole.recipe, sources=whole.sources)
    assert digest == whole.digest == verify_digest(joined)
    assert_equal_populations(Zoo.open(joined)["inr"], whole["inr"])
    assert Zoo.open(joined).recipe == whole.recipe
    np.testing.assert_array_equal(Zoo.open(joined).sources["tiny"].items, whole.sources["tiny"].items)


def test_joining_refuses_what_does_not_belong_together(tmp_path):
    inr = tiny_zoo(networks=4)["inr"]
    first = Zoo({"inr": inr}).save(tmp_path / "first.h5")
    half = replace(inr, weights=inr.weights.astype(np.float16), dtype="float16")
    strangers = {
        "the spec differs from that of .*first.h5": {"inr": tiny_zoo(networks=2, hidden=(5,))["inr"]},
        "dtype differs from that of .*first.h5": {"inr": half},
        "protocol differs from that of .*first.h5": {"inr": replace(inr, protocol={"w0": 1.0})},
        "architecture differs from that of .*first.h5": {"inr": replace(inr, architecture=None)},
        "metrics differ from those of .*first.h5": {"inr": replace(inr, metrics={})},
    }
    for number, (message, populations) in enumerate(strangers.items()):
        stranger = Zoo(populations).save(tmp_path / f"{number}.h5")
        with pytest.raises(ZooError, match=rf"zoo .*{number}\.h5: {message}"):
            join_zoos([first, stranger], tmp_path / "joined.h5")
    with pytest.raises(ZooError, match="join: expected at least one zoo, found none"):
        join_zoos([], tmp_path / "joined.h5")
    assert not (tmp_path / "joined.h5").exists()
    with pytest.raises(OutputError, match="exists already"):
        join_zoos([first], first)


def test_joining_brings_populations_of_several_names_together(tmp_path):
    inr, other = tiny_zoo(networks=4)["inr"], tiny_zoo(networks=3, hidden=(5,))["inr"]
    paths = [
        Zoo(populations).save(tmp_path / f"{number}.h5")
        for number, populations in enumerate([{"a": inr}, {"b": other}, {"a": inr, "b": other}])
    ]
    join_zoos(paths, tmp_path / "joined.h5")
    joined = Zoo.open(tmp_path / "joined.h5")
    assert (joined["a"].networks, joined["b"].networks) == (8, 6)
    np.testing.assert_array_equal(joined["b"].weights, np.concatenate([other.weights, other.weights]))
    assert joined["a"].network.tolist() == list(range(8))


def test_errors_are_ours_and_built_in():
    assert issubclass(ZooError, WeightspaceError)
    assert issubclass(ZooError, ValueError)


def test_an_item_that_is_not_stored_is_named(rich_zoo):
    source = rich_zoo.sources["tiny"]
    found = source.get(np.array([4, 0, 4]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, source.items[[4, 0, 4]] / 255, rtol=1e-6)
    with pytest.raises(ZooError, match="sources: item 77 is not stored"):
        source.get(np.array([1, 77]))
