"""Where signals come from: IDX files made here, and scikit-learn's digits."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from weightspace.datagen.sources import SOURCES, Digits, Idx, read_idx
from weightspace.errors import DataError

NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx(values: np.ndarray) -> bytes:
    """Two zero bytes, the type code 0x08, the number of dimensions, big-endian sizes, the data."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_data_set(folder, *, suffix="", images=(5, 3)):
    """Images of 4x6 pixels whose values count up; returns them with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for part, count in zip(("train", "t10k"), images, strict=True):
        pixels = (np.arange(count * 24) % 251).astype(np.uint8).reshape(count, 4, 6)
        labels = (np.arange(count) * 3 % 10).astype(np.uint8)
        for name, values in ((f"{part}-images-idx3", pixels), (f"{part}-labels-idx1", labels)):
            content = gzip.compress(idx(values)) if suffix else idx(values)
            (folder / f"{name}-ubyte{suffix}").write_bytes(content)
        found.append((pixels, labels))
    return found


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["sub-folder", "the root itself"])
def test_idx_files_are_read(tmp_path, suffix, inside):
    folder = tmp_path / "letters" if inside == "sub-folder" else tmp_path
    (train, train_labels), (test, test_labels) = write_data_set(folder, suffix=suffix)
    signals = Idx(folder="letters").load(tmp_path)
    np.testing.assert_array_equal(signals.items, np.concatenate([train, test]))
    np.testing.assert_array_equal(signals.labels, np.concatenate([train_labels, test_labels]))
    assert signals.labels.dtype == np.int64
    assert signals.official.tolist() == [0] * 5 + [2] * 3


def test_a_file_by_hand(tmp_path):
    (tmp_path / "a").write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 20, 30, 40, 50, 60]))
    assert read_idx(tmp_path / "a").tolist() == [[10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of unsigned bytes"),
        (b"\x00\x00\x08", "not an IDX file of unsigned bytes"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file of unsigned bytes"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), "not an IDX file of unsigned bytes"),  # 13: float32
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"expected 18 bytes for shape \[2, 3\], found 17"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", r"expected 18 bytes for shape \[2, 3\], found 19"),
        (idx(np.zeros((2, 3), np.uint8))[:8], r"expected .* found 8"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte: {message}"):
        read_idx(path)


def test_a_header_cut_within_a_size_is_refused(tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(idx(np.zeros((2, 3), np.uint8))[:10])
    with pytest.raises(DataError, match="cut: "):
        read_idx(path)


def test_a_truncated_archive_is_refused(tmp_path):
    path = tmp_path / "labels.gz"
    whole = gzip.compress(idx(np.arange(200, dtype=np.uint8)))
    for content in (whole[:-9], whole[:20], whole[:3], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"labels\.gz: cannot be read, it may be truncated"):
            read_idx(path)


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(DataError, match=r"source letters: pass --data-root DIR with the files ") as caught:
        Idx(folder="letters").load(None)
    assert all(f"{name}-ubyte" in str(caught.value) for name in NAMES)
    write_data_set(tmp_path / "letters")
    (tmp_path / "letters" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        DataError, match=r"source letters: t10k-labels-idx1-ubyte \(or \.gz\) not found"
    ) as caught:
        Idx(folder="letters").load(tmp_path)
    assert all(f"{name}-ubyte" in str(caught.value) for name in NAMES)
    assert str(tmp_path / "letters") in str(caught.value)


def test_images_and_labels_must_belong_together(tmp_path):
    write_data_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    message = r"t10k-images-idx3-ubyte: expected as many images as labels, found shapes \[3, 4, 6\] and \[4\]"
    with pytest.raises(DataError, match=message):
        Idx(folder="x").load(tmp_path)
    write_data_set(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 4, 5), np.uint8)))
    with pytest.raises(DataError, match=r"training and test images differ in size: \[\(4, 5\), \(4, 6\)\]"):
        Idx(folder="x").load(tmp_path)


@pytest.mark.parametrize("folder", ["mnist", "fashion-mnist"])
def test_the_real_files_have_the_published_sizes(data_root, folder):
    signals = Idx(folder=folder).load(data_root)
    assert signals.items.shape == (70000, 28, 28)
    assert signals.official.tolist() == [0] * 60000 + [2] * 10000
    assert np.bincount(signals.labels[:60000]).min() > 5000
    assert set(signals.labels.tolist()) == set(range(10))


def test_digits_are_those_of_scikit_learn():
    digits = load_digits()
    plain = Digits(size=8).load(None)
    np.testing.assert_array_equal(plain.items, np.round(digits.images * 255 / 16).astype(np.uint8))
    np.testing.assert_array_equal(plain.labels, digits.target)
    assert plain.official is None


def test_digits_grow_without_changing_their_shape():
    digits = load_digits()
    large = Digits(size=24).load(None)
    assert large.items.shape == (1797, 24, 24)
    assert large.items.dtype == np.uint8
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(large.items).float()[:, None], 3)[:, 0].numpy()
    for row in (0, 700, 1796):
        assert np.corrcoef(pooled[row].ravel(), digits.images[row].ravel())[0, 1] > 0.97


def test_sources_register_once():
    assert set(SOURCES) == {"arrays", "cifar10", "digits", "folder", "idx", "sequences", "sines", "table"}
    with pytest.raises(ValueError, match="source 'digits' is registered twice"):
        SOURCES.register("digits")(Idx)
    assert SOURCES["digits"] is Digits
    assert Digits.kind == "digits"
