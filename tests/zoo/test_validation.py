"""Every damage is refused in one sentence that names the file and the path inside it."""

import os
import random
import re

import h5py
import numpy as np
import pytest

from weightspace.errors import WeightspaceError, ZooError
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, verify_digest

INR = "populations/inr"


@pytest.fixture
def path(tmp_path):
    return tiny_zoo(networks=10).save(tmp_path / "zoo.h5")


def put(name, values, **options):
    def damage(file):
        if name in file:
            del file[name]
        file.create_dataset(name, data=values, **options)

    return damage


def drop(name):
    def damage(file):
        del file[name]

    return damage


def drop_attribute(name, where="/"):
    def damage(file):
        del file[where].attrs[name]

    return damage


def set_attribute(name, value, where="/"):
    def damage(file):
        file[where].attrs[name] = value

    return damage


def tamper(old, new):
    """Edit the JSON of the spec."""

    def damage(file):
        text = file[INR].attrs["spec"]
        assert old in text
        file[INR].attrs["spec"] = text.replace(old, new, 1)

    return damage


def turn_into_a_dataset(name):
    def damage(file):
        del file[name]
        file.create_dataset(name, data=np.zeros(3))

    return damage


LONG = np.zeros(10, "<i8")
DAMAGES = {
    "weights: columns": (
        put(f"{INR}/weights", np.zeros((10, 104), "<f4")),
        "/populations/inr/weights: shape should be [10, 105], found [10, 104]",
    ),
    "weights: rows": (
        put(f"{INR}/weights", np.zeros((9, 105), "<f4")),
        "/populations/inr/weights: shape should be [10, 105], found [9, 105]",
    ),
    "weights: type": (
        put(f"{INR}/weights", np.zeros((10, 105), "<f8")),
        "/populations/inr/weights: unexpected type float64",
    ),
    "weights: big-endian": (
        put(f"{INR}/weights", np.zeros((10, 105), ">f4")),
        "/populations/inr/weights: unexpected type >f4",
    ),
    "weights: chunked": (
        put(f"{INR}/weights", np.zeros((10, 105), "<f4"), chunks=(1, 105)),
        "/populations/inr/weights: weights must be stored contiguously",
    ),
    "weights: compressed": (
        put(f"{INR}/weights", np.zeros((10, 105), "<f4"), compression="gzip"),
        "/populations/inr/weights: weights must be stored contiguously",
    ),
    "weights: missing": (drop(f"{INR}/weights"), "/populations/inr/weights: dataset is missing"),
    "step: missing": (drop(f"{INR}/step"), "/populations/inr/step: dataset is missing"),
    "step: shape": (put(f"{INR}/step", LONG[1:]), "/populations/inr/step: shape should be [10], found [9]"),
    "step: type": (put(f"{INR}/step", np.zeros(10)), "/populations/inr/step: unexpected type float64"),
    "view: shape": (
        put(f"{INR}/view", LONG[None]),
        "/populations/inr/view: shape should be [10], found [1, 10]",
    ),
    "split: value": (
        put(f"{INR}/split", np.full(10, 3, "u1")),
        "/populations/inr/split: values should be in 0 .. 2, found 3 .. 3",
    ),
    "network: too large": (
        put(f"{INR}/network", np.r_[LONG[:9], 10]),
        "/populations/inr/network: values should be in 0 .. 9, found 0 .. 10",
    ),
    "network: negative": (
        put(f"{INR}/network", np.r_[LONG[:9], -1]),
        "/populations/inr/network: values should be in 0 .. 9, found -1 .. 0",
    ),
    "labels: missing": (drop(f"{INR}/labels"), "/populations/inr/labels: group is missing"),
    "labels: not a group": (
        turn_into_a_dataset(f"{INR}/labels"),
        "/populations/inr/labels: group is missing",
    ),
    "label: shape": (
        put(f"{INR}/labels/label", LONG[1:]),
        "/populations/inr/labels/label: shape should be [10], found [9]",
    ),
    "label: type": (
        put(f"{INR}/labels/label", np.array([b"a"] * 10)),
        "/populations/inr/labels/label: unexpected type |S1",
    ),
    "metrics: missing": (drop(f"{INR}/metrics"), "/populations/inr/metrics: group is missing"),
    "metric: shape": (
        put(f"{INR}/metrics/psnr", np.zeros(11, "<f4")),
        "/populations/inr/metrics/psnr: shape should be [10], found [11]",
    ),
    "spec: missing": (drop_attribute("spec", INR), "/populations/inr: attribute 'spec' is missing"),
    "spec: no JSON": (
        set_attribute("spec", "{", INR),
        "/populations/inr: attribute 'spec': spec: not a weight-space description (JSONDecodeError",
    ),
    "spec: another size": (
        tamper('"size":8', '"size":7'),
        "/populations/inr: attribute 'spec': tensor 'layers.0.weight': a dim of group 'hidden0' should have size 7",
    ),
    "spec: unknown group": (
        tamper('"group":"hidden0"', '"group":"nobody"'),
        "/populations/inr: attribute 'spec': tensor 'layers.0.weight': unknown group 'nobody'",
    ),
    "architecture: missing": (
        drop_attribute("architecture", INR),
        "/populations/inr: attribute 'architecture' is missing",
    ),
    "architecture: no JSON": (set_attribute("architecture", "{", INR), "content is damaged ("),
    "architecture: a list": (
        set_attribute("architecture", "[1]", INR),
        "/populations/inr: attribute 'architecture' should be a JSON object",
    ),
    "protocol: a number": (
        set_attribute("protocol", "3", INR),
        "/populations/inr: attribute 'protocol' should be a JSON object",
    ),
    "weights_dtype: unknown": (
        set_attribute("weights_dtype", "float8", INR),
        "/populations/inr: attribute 'weights_dtype' should be one of float32, float16, bfloat16, found 'float8'",
    ),
    "weights_dtype: another": (
        set_attribute("weights_dtype", "float16", INR),
        "/populations/inr/weights: unexpected type float32",
    ),
    "sources: missing items": (drop("sources/tiny/items"), "/sources/tiny/items: dataset is missing"),
    "recipe: missing": (drop_attribute("recipe"), "attribute 'recipe' is missing"),
    "recipe: no JSON": (set_attribute("recipe", "{"), "content is damaged ("),
    "digest: missing": (drop_attribute("digest"), "attribute 'digest' is missing"),
    "format: missing": (
        drop_attribute("format"),
        "not a zoo: attribute 'format' should be 'weightspace-zoo'",
    ),
    "format: an array": (set_attribute("format", np.arange(3)), ""),
    "version: newer": (
        set_attribute("format_version", 2),
        "format version 2 is newer than 1, the newest known here; update weightspace",
    ),
    "version: zero": (
        set_attribute("format_version", 0),
        "attribute 'format_version' should be a positive integer, found 0",
    ),
    "version: text": (
        set_attribute("format_version", "one"),
        "attribute 'format_version' should be a positive integer, found 'one'",
    ),
    "populations: missing": (drop("populations"), "/populations is missing or empty"),
    "populations: empty": (drop(INR), "/populations is missing or empty"),
    "populations: not a group": (turn_into_a_dataset("populations"), "/populations is missing or empty"),
    "sources: not a group": (turn_into_a_dataset("sources"), "/sources: group is missing"),
    "a source: not a group": (turn_into_a_dataset("sources/tiny"), "/sources/tiny: group is missing"),
    "a population: not a group": (turn_into_a_dataset(INR), "/populations/inr: group is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_by_its_place(name, path):
    damage, message = DAMAGES[name]
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(ZooError, match=f"^zoo {re.escape(str(path))}: {re.escape(message)}") as caught:
        Zoo.open(path)
    assert "\n" not in str(caught.value)


def test_no_rows_at_all(path):
    with h5py.File(path, "r+") as file:
        for name in ("network", "step", "metrics/psnr"):
            dtype = file[f"{INR}/{name}"].dtype
            put(f"{INR}/{name}", np.zeros(0, dtype))(file)
        put(f"{INR}/weights", np.zeros((0, 105), "<f4"))(file)
    with pytest.raises(ZooError, match="/populations/inr/weights: "):
        Zoo.open(path)


@pytest.mark.parametrize("share", [0.0, 1e-4, 2e-3, 0.05, 0.3, 0.6, 0.9, 0.999, 1.0])
def test_a_truncated_file_is_refused(share, path):
    content = path.read_bytes()
    path.write_bytes(content[: min(int(share * len(content)), len(content) - 1)])
    with pytest.raises(
        ZooError, match=rf"^zoo {re.escape(str(path))}: (file is truncated|not a zoo|cannot be op)"
    ):
        Zoo.open(path)


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not HDF5 " * 1000)
    with pytest.raises(ZooError, match=r"notes\.txt: not a zoo: not an HDF5 file"):
        Zoo.open(text)
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["populations/inr/weights"] = np.zeros((3, 3))
    with pytest.raises(
        ZooError, match=r"foreign\.h5: not a zoo: attribute 'format' should be 'weightspace-zoo'"
    ):
        Zoo.open(foreign)
    with pytest.raises(ZooError, match=r"missing\.h5: file not found"):
        Zoo.open(tmp_path / "missing.h5")
    with pytest.raises(ZooError, match="expected a file, found a directory"):
        Zoo.open(tmp_path)


def test_a_flipped_byte_anywhere_is_found_or_harmless(path):
    """In metadata HDF5 fails in a dozen ways; none may come through. Children, as HDF5 itself may crash."""
    content, expected = path.read_bytes(), Zoo.open(path).digest
    weights = Zoo.open(path)["inr"].weights
    outside = [at for at in range(len(content)) if not 0 <= at - weights.offset < weights.nbytes]
    draw = random.Random(0)
    found = 0
    for at in [697, 744, 1019, 1027, 1251, 1264, 1924, 2073, *draw.sample(outside, 80)]:
        changed = bytearray(content)
        changed[at] ^= draw.choice([1, 16, 128, 255])
        path.write_bytes(changed)
        verdict = in_a_child(path, expected)
        assert verdict in ("found", "harmless", "crash of the HDF5 library"), f"byte {at}: {verdict}"
        found += verdict == "found"
    assert found > 10


def in_a_child(path, expected) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            verdict = "harmless" if verify_digest(path) == expected else "another digest, unnoticed"
        except WeightspaceError as error:
            verdict = "found" if "\n" not in str(error) else f"many lines: {error}"
        except BaseException as error:
            verdict = repr(error)
        os.write(writing, verdict.encode()[:1000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        verdict = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return "crash of the HDF5 library" if os.WIFSIGNALED(status) else verdict


def test_unknown_names_list_the_known_ones(path):
    zoo = Zoo.open(path)
    with pytest.raises(ZooError, match="population: expected one of inr, found 'cnn'"):
        zoo["cnn"]
    with pytest.raises(WeightspaceError, match="split: expected one of train, val, test, found 'dev'"):
        zoo["inr"].rows_of("dev")
