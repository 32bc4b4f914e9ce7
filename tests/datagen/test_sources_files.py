"""Sources that read files: small faithful copies of CIFAR-10, folders of images and NumPy's files."""

import re
import shutil

import numpy as np
import pytest
from matplotlib.image import imsave

from weightspace.datagen.sources import Arrays, Cifar10, Folder
from weightspace.datagen.sources._images import grey_of, resized
from weightspace.errors import DataError

BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


# -- CIFAR-10 ----------------------------------------------------------------------------------------------


def write_cifar(folder, records=4):
    """Six files of few records; returns images (N, 32, 32, 3) and labels in the order of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * records, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 6 * records)
    for number, name in enumerate(BATCHES):
        content = b""
        for row in range(number * records, (number + 1) * records):
            red, green, blue = (images[row, :, :, channel].tobytes() for channel in range(3))
            content += bytes([labels[row]]) + red + green + blue
        (folder / name).write_bytes(content)
    return images, labels


@pytest.mark.parametrize("inside", ["sub-folder", "the root itself"])
def test_cifar_is_read_in_colour_with_its_own_split(tmp_path, inside):
    folder = tmp_path / "cifar-10-batches-bin" if inside == "sub-folder" else tmp_path
    images, labels = write_cifar(folder)
    signals = Cifar10().load(tmp_path)
    np.testing.assert_array_equal(signals.items, images)
    np.testing.assert_array_equal(signals.labels, labels)
    assert (signals.items.dtype, signals.labels.dtype) == (np.uint8, np.int64)
    assert signals.official.tolist() == [0] * 20 + [2] * 4
    assert (signals.grid, signals.channels, signals.classes) == ((32, 32), 3, 10)
    assert signals.class_names[3] == "cat"


def test_cifar_in_grey_and_smaller(tmp_path):
    images, _ = write_cifar(tmp_path)
    grey = Cifar10(grey=True).load(tmp_path)
    assert (grey.items.shape, grey.grid, grey.channels) == ((24, 32, 32), (32, 32), None)
    exact = images @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey.items - exact).max() < 0.51
    small = Cifar10(size=8, count=5).load(tmp_path)
    assert small.items.shape == (5, 8, 8, 3)
    assert len(small.labels) == len(small.official) == 5


def test_damaged_cifar_files_are_refused(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    cases = {
        whole[:-1]: "expected records of 3073 bytes, found 12291 bytes; it may be truncated",
        b"": "expected records of 3073 bytes, found 0 bytes; it may be truncated",
        whole[:-3073]: "expected 4 records, as in the other files, found 3; it may be truncated",
        whole[:3073] + b"\x0c" + whole[3074:]: "record 1: expected a label from 0 to 9, found 12",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}$"):
            Cifar10().load(tmp_path)


def test_missing_cifar_files_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"source cifar-10-batches-bin: pass --data-root DIR with the files data_"
    ):
        Cifar10().load(None)
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(
        DataError, match=r"test_batch\.bin not found in .*; expected the files data_batch_1\.bin"
    ):
        Cifar10().load(tmp_path)


# -- grey values and sizes ---------------------------------------------------------------------------------


def test_every_grey_colour_keeps_its_value():
    shades = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(grey_of(np.repeat(shades[None, :, None], 3, axis=2))[0], shades)


def test_resizing_keeps_what_is_constant_and_the_mean():
    images = np.full((3, 6, 10, 3), 77, np.uint8)
    assert (resized(images, 4) == 77).all()
    assert resized(images, None) is images
    noise = np.random.default_rng(0).integers(0, 256, (1500, 8, 8), dtype=np.uint8)
    small = resized(noise, 4)
    assert small.shape == (1500, 4, 4)
    assert abs(small.mean() - noise.mean()) < 0.5
    assert small.std() < 0.8 * noise.std(), "shrinking averages neighbours"
    np.testing.assert_array_equal(small[1100], resized(noise[1100:1101], 4)[0])


def test_enlarging_interpolates_linearly_by_hand():
    # centres of four new pixels lie at 1/4 and 3/4 of the way between the two old ones
    assert resized(np.array([[[0, 100], [0, 100]]], np.uint8), 4)[0, 0].tolist() == [0, 25, 75, 100]


# -- folders of images -------------------------------------------------------------------------------------


def colour(red, green, blue, shape=(4, 5)):
    return np.broadcast_to(np.array([red, green, blue], np.uint8), (*shape, 3))


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.ascontiguousarray(pixels))
    return path


def write_classes(root):
    """Two classes with two and one images, the value of red counting up."""
    for number, name in enumerate(("cat/b.png", "cat/a.png", "dog/deep/c.PNG")):
        write_image(root / name, colour(10 * number, 20, 30))


def test_sub_folders_are_classes(tmp_path):
    write_classes(tmp_path / "pets")
    (tmp_path / "pets" / ".hidden").mkdir()
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    signals = Folder(folder="pets").load(tmp_path)
    assert signals.items.shape == (3, 4, 5, 3)
    assert signals.items[:, 0, 0].tolist() == [[10, 20, 30], [0, 20, 30], [20, 20, 30]]
    assert signals.labels.tolist() == [0, 0, 1]
    assert (signals.class_names, signals.official, signals.channels) == (("cat", "dog"), None, 3)


def test_flat_files_have_no_labels(tmp_path):
    write_image(tmp_path / "flat" / "a.png", colour(1, 2, 3))
    write_image(tmp_path / "flat" / "b.png", colour(4, 5, 6))
    signals = Folder(folder="flat").load(tmp_path)
    assert signals.items[:, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert signals.named_labels == {}


def test_folders_named_as_splits_are_splits(tmp_path):
    for part in ("train", "test"):
        write_classes(tmp_path / part)
    signals = Folder(folder=".").load(tmp_path)
    assert signals.official.tolist() == [0, 0, 0, 2, 2, 2]
    assert signals.labels.tolist() == [0, 0, 1, 0, 0, 1]
    assert signals.class_names == ("cat", "dog")
    write_image(tmp_path / "test" / "emu" / "a.png", colour(0, 0, 0))
    with pytest.raises(
        DataError, match=r"test: expected the classes cat, dog of .*train, found cat, dog, emu$"
    ):
        Folder(folder=".").load(tmp_path)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DataError, match="expected a folder train beside test, found none"):
        Folder(folder=".").load(tmp_path)


def test_grey_png_transparency_and_jpeg(tmp_path):
    from matplotlib import image

    write_image(tmp_path / "x" / "a.png", np.dstack([colour(9, 9, 9), np.full((4, 5), 128, np.uint8)]))
    shades = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image.imsave(
        tmp_path / "x" / "b.jpg", np.repeat(4 * shades[..., None], 3, axis=2), pil_kwargs={"quality": 95}
    )
    assert Folder(folder="x", size=4).load(tmp_path).items.shape == (2, 4, 4, 3)
    (tmp_path / "x" / "a.png").unlink()
    read = Folder(folder="x", grey=True).load(tmp_path)
    assert (read.items.shape, read.channels) == ((1, 8, 8), None)
    assert np.abs(read.items[0].astype(int) - 4 * shades.astype(int)).max() < 12
    (tmp_path / "x" / "b.jpg").unlink()
    write_image(tmp_path / "x" / "a.png", np.dstack([colour(9, 9, 9), np.full((4, 5), 128, np.uint8)]))
    assert (Folder(folder="x", grey=True).load(tmp_path).items == 9).all()


def test_bytes_of_png_are_exact(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    write_image(tmp_path / "x" / "a.png", pixels)
    np.testing.assert_array_equal(Folder(folder="x").load(tmp_path).items[0], pixels)


def test_a_count_reads_no_other_images(tmp_path):
    for number in range(20):
        write_image(tmp_path / f"{number:02d}.png", colour(number, 0, 0))
    kept = Folder(folder=".", count=3).load(tmp_path).items[:, 0, 0, 0].tolist()
    for number in set(range(20)) - set(kept):
        (tmp_path / f"{number:02d}.png").write_bytes(b"damaged")
    assert Folder(folder=".", count=3).load(tmp_path).items[:, 0, 0, 0].tolist() == kept
    with pytest.raises(DataError, match="source folder: count: the data set has 20 items, found 21"):
        Folder(folder=".", count=21).load(tmp_path)


def test_the_first_bad_image_is_named(tmp_path):
    write_classes(tmp_path)
    good = (tmp_path / "cat" / "b.png").read_bytes()
    for content in (b"", b"not an image", good[: len(good) // 2], good[:20]):
        for name in ("b.png", "c.jpg"):
            (tmp_path / "cat" / name).write_bytes(content)
        with pytest.raises(DataError, match=r"cat/b\.png: cannot be read as an image \(.+\)$") as caught:
            Folder(folder=".").load(tmp_path)
        assert "\n" not in str(caught.value)


def test_images_of_several_sizes_need_a_size(tmp_path):
    write_classes(tmp_path)
    write_image(tmp_path / "dog" / "e.png", colour(0, 0, 0, (5, 4)))
    message = r"dog/e\.png: expected 4x5 pixels, as a\.png has, found 5x4; set size to resize all"
    with pytest.raises(DataError, match=message):
        Folder(folder=".").load(tmp_path)
    assert Folder(folder=".", size=6).load(tmp_path).items.shape == (4, 6, 6, 3)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="source folder: pass --data-root DIR with a folder pets of PNG or JPEG"
    ):
        Folder(folder="pets").load(None)
    with pytest.raises(DataError, match="pets not found; expected a folder pets of --data-root"):
        Folder(folder="pets").load(tmp_path)
    (tmp_path / "pets").mkdir()
    with pytest.raises(DataError, match="pets: holds no PNG or JPEG files"):
        Folder(folder="pets").load(tmp_path)
    write_classes(tmp_path / "pets")
    (tmp_path / "pets" / "emu").mkdir()
    with pytest.raises(
        DataError, match=r"pets/emu: holds no PNG or JPEG files, expected images of one class of"
    ):
        Folder(folder="pets").load(tmp_path)
    write_image(tmp_path / "pets" / "z.png", colour(0, 0, 0))
    with pytest.raises(
        DataError, match=r"expected either images or one folder of images per class, found both \(z"
    ):
        Folder(folder="pets").load(tmp_path)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    write_classes(tmp_path)
    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path))}: cannot be listed \\(Permission denied"
    ):
        Folder(folder=".").load(tmp_path)


# -- arrays ------------------------------------------------------------------------------------------------

ITEMS = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)


def test_an_npz_holds_everything(tmp_path):
    labels, split = np.array([3, 1, 0, 1], np.int32), np.array([0, 0, 1, 2])
    np.savez_compressed(tmp_path / "mine.npz", items=ITEMS, labels=labels, split=split)
    signals = Arrays(items="mine.npz").load(tmp_path)
    np.testing.assert_array_equal(signals.items, ITEMS)
    np.testing.assert_array_equal(signals.labels, labels)
    assert (signals.labels.dtype, signals.official.dtype, signals.grid) == (np.int64, np.uint8, (2, 3))
    assert signals.official.tolist() == [0, 0, 1, 2]
    assert len(Arrays(items="mine.npz", count=2).load(tmp_path)) == 2


def test_a_pair_of_npy(tmp_path):
    np.save(tmp_path / "x.npy", ITEMS.astype(np.float64))
    np.save(tmp_path / "y.npy", np.linspace(0, 1, 4))
    signals = Arrays(items="x.npy", labels="y.npy", channels=True).load(tmp_path)
    assert (signals.items.dtype, signals.labels.dtype) == (np.float32, np.float32)
    assert (signals.grid, signals.channels, signals.classes) == ((2,), 3, None)
    assert Arrays(items="x.npy").load(tmp_path).named_labels == {}


def test_arrays_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(DataError, match=r"source arrays: pass --data-root DIR with the file x\.npz"):
        Arrays(items="x.npz").load(None)
    with pytest.raises(DataError, match=r"x\.npz not found; expected the file in --data-root"):
        Arrays(items="x.npz").load(tmp_path)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"x\.csv: expected a file \.npy or \.npz, found \.csv"):
        Arrays(items="x.csv").load(tmp_path)
    np.savez(tmp_path / "x.npz", items=ITEMS)
    np.save(tmp_path / "x.npy", ITEMS)
    np.save(tmp_path / "o.npy", np.array([{}, 1], dtype=object))
    for name, keep in (("x.npz", 100), ("x.npy", 140), ("x.npy", 0), ("x.npz", 0), ("o.npy", None)):
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / name).write_bytes((tmp_path / name).read_bytes()[:keep])
        with pytest.raises(
            DataError, match=rf"{name}: cannot be read, it may be truncated \(.+\)$"
        ) as caught:
            Arrays(items=f"cut/{name}").load(tmp_path)
        assert "\n" not in str(caught.value)
    np.savez(tmp_path / "y.npz", labels=np.arange(4))
    with pytest.raises(
        DataError, match=r"y\.npz: expected the labels in a file \.npy, or in the \.npz of the"
    ):
        Arrays(items="x.npz", labels="y.npz").load(tmp_path)
    with pytest.raises(DataError, match=r"y\.npz: expected an array items, found labels"):
        Arrays(items="y.npz").load(tmp_path)


MISTAKES = {
    "items of one axis": ({"items": np.zeros(3)}, r"items: expected (items, ...), found shape [3]"),
    "integers": (
        {"items": ITEMS.astype(np.int64)},
        "items: expected bytes (uint8) or floats, found int64",
    ),
    "NaN": ({"items": np.array([[1.0], [np.nan]])}, "item 1: expected finite numbers"),
    "too few labels": (
        {"labels": np.arange(3)},
        "labels: expected one for each of 4 items, found shape [3]",
    ),
    "labels of two axes": (
        {"labels": np.zeros((4, 2))},
        "labels: expected one for each of 4 items, found shape [4, 2]",
    ),
    "names": ({"labels": np.array(list("abcd"))}, "labels: expected integers or floats, found <U1"),
    "a negative class": (
        {"labels": np.array([0, -2, 1, 1])},
        "label of item 1: expected a class from 0, found -2",
    ),
    "an infinite target": (
        {"labels": np.array([0, np.inf, 1, 1])},
        "label of item 1: expected a finite number, found inf",
    ),
    "a split too many": (
        {"split": np.array([0, 1, 2, 3])},
        "split of item 3: expected 0 (train), 1 (val) or 2 (test), found 3",
    ),
    "a split of floats": (
        {"split": np.zeros(4)},
        "split: expected one integer for each of 4 items, found float64 of shape [4]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_arrays_that_do_not_fit(tmp_path, mistake):
    arrays, message = MISTAKES[mistake]
    path = tmp_path / "x.npz"
    np.savez(path, **{"items": ITEMS, **arrays})
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}$"):
        Arrays(items="x.npz").load(tmp_path)
