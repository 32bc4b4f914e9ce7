"""Data on the command line: a source as recipes describe it, arrays in a file, or what a zoo's networks learned from."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._data import call, runner
from weightspace.cli._options import parse_settings
from weightspace.configuration import validated
from weightspace.errors import ConfigError, DataError

_DATA = typer.Option(
    "--data",
    metavar="SOURCE[:KEY=VALUE,...]",
    help="Data of a recipe's source, as digits:size=8 or idx:folder=mnist, or FILE.npz with the arrays x and y "
    "(and x_test, y_test); by default what a zoo's classifiers learned from.",
)
DataOption = Annotated[str | None, _DATA]
ManyData = Annotated[list[str] | None, _DATA]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder with the source's files.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Items that networks see at a time.")]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Use so many items for training, and for tests; all by default."),
]
Mean = Annotated[
    str | None,
    typer.Option(
        "--mean", help="To subtract from inputs: one number, or one per channel, as in 0.5,0.4,0.3."
    ),
]
Std = Annotated[str | None, typer.Option("--std", help="To divide inputs by, after --mean.")]

_TEST = 0.2  # the share of the items that are kept for tests, where the data come without a split


@dataclass(frozen=True)
class DataOptions:
    """What the options say."""

    data: str | None = None
    data_root: Path | None = None
    batch_size: int = 256
    samples: int | None = None
    mean: str | None = None
    std: str | None = None
    seed: int = 0


class TensorBatches:
    """Batches of inputs and targets, in an order that is always the same.

    Args:
        inputs: (items, ...).
        targets: (items, ...).
        batch_size: of all but the last batch.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int) -> None:
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.inputs.split(self.batch_size), self.targets.split(self.batch_size), strict=True)

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.batch_size)


class JoinedBatches:
    """The batches of several data, one after the other."""

    def __init__(self, parts: Sequence[TensorBatches]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.parts:
            yield from part


@dataclass(frozen=True)
class Data:
    """What networks are run on.

    Args:
        train: to take statistics of, and to train on.
        test: other items.
        text: what it is, one line.
    """

    train: TensorBatches
    test: TensorBatches
    text: str

    @staticmethod
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        """Cross entropy of classes, which are along the last axis where the shapes say so; else the squared error."""
        if targets.is_floating_point():
            return F.mse_loss(outputs.reshape(targets.shape), targets)
        if outputs.shape[:-1] == targets.shape:
            return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        return F.cross_entropy(outputs, targets)


@dataclass(frozen=True)
class _Items:
    """All items of some data, the inputs channels first, and which of them are for tests."""

    inputs: np.ndarray
    targets: np.ndarray
    is_test: np.ndarray
    text: str


def find_data(
    options: DataOptions, shape: Sequence[int] | None, recipe: Mapping[str, Any] | None = None
) -> Data | None:
    """The data that the options name, or else those of the recipe; None where there are none.

    Args:
        options: what the user said.
        shape: of one input that the module takes; None for that of the items.
        recipe: of the zoo whose classifiers are aligned or merged.

    Raises:
        ConfigError: options that make no sense.
        DataError: data that cannot be read, have no labels, or do not fit the shape.
    """
    if options.data is not None:
        items = _named(options.data, options.data_root)
    elif recipe is not None and recipe.get("kind") == "classifier":
        items = _of_recipe(recipe, options.data_root)
    else:
        return None
    inputs, notes = _shaped(_normalised(items.inputs, options), shape, items.text)
    rng = np.random.default_rng(options.seed)  # a folder's items stand in order of class
    parts, counts = [], []
    for wanted in (False, True):
        rows = rng.permutation(np.flatnonzero(items.is_test == wanted))[: options.samples]
        if not len(rows):
            raise DataError(f"data {items.text}: no items are left for {'tests' if wanted else 'training'}")
        x, y = (torch.from_numpy(np.ascontiguousarray(part[rows])) for part in (inputs, items.targets))
        parts.append(TensorBatches(x, y, options.batch_size))
        counts.append(f"{len(rows):,}")
    text = f"{items.text}: {counts[0]} items for training and {counts[1]} for tests{notes}"
    return Data(parts[0], parts[1], text)


def score(module: nn.Module, weights: Mapping[str, Tensor], data: Data, device: str) -> float:
    """The accuracy on the items that are kept for tests; minus the loss where there are no classes."""
    network = runner(module).to(device)
    moved = {name: tensor.to(device) for name, tensor in widened(weights).items()}
    total = 0.0
    with torch.no_grad():
        for inputs, given in data.test:
            targets = given.to(device)
            outputs = call(network, moved, inputs.to(device))
            if targets.is_floating_point():
                found = -data.loss(outputs, targets)
            else:
                found = (outputs.argmax(-1) == targets).float().mean()
            total += found.item() * len(targets)
    return total / len(data.test.targets)


def widened(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half precision as float32, of which type the data are."""
    return {
        name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for name, tensor in weights.items()
    }


# -- where they are ----------------------------------------------------------------------------------------


def _named(text: str, data_root: Path | None) -> _Items:
    if text.endswith(".npz"):
        return _arrays(Path(text))
    from weightspace.datagen.sources import SOURCES

    kind, _, rest = text.partition(":")
    if kind not in SOURCES:
        raise ConfigError(f"--data: expected FILE.npz or one of {', '.join(SOURCES)}, found {kind!r}")
    fields = parse_settings([part for part in rest.split(",") if part], "--data")
    source = validated(SOURCES[kind], fields, ConfigError, f"--data {kind}: ", "no such option")
    signals = source.load(data_root)
    if signals.labels.ndim != 1:
        raise DataError(f"data {text}: expected items with labels, found none")
    if signals.vocabulary is not None:
        inputs = signals.items
    else:
        inputs = signals.values(np.arange(len(signals)))
        if signals.channels is not None and signals.grid:
            inputs = np.moveaxis(inputs, -1, 1)
        elif len(signals.grid) == 2:
            inputs = inputs[:, None]
    official = None if signals.official is None else signals.official == 2
    return _Items(inputs, signals.labels, _test(official, len(signals)), text)


def _of_recipe(recipe: Mapping[str, Any], data_root: Path | None) -> _Items:
    """Inputs as the networks saw them, standardised alike, and the items that were kept from them."""
    from weightspace.datagen import ClassifierRecipe, parse_recipe
    from weightspace.datagen.classifiers import classifier_data

    parsed = parse_recipe(recipe)
    assert isinstance(parsed, ClassifierRecipe)
    found = classifier_data(parsed, parsed.data, parsed.source.load(data_root))
    rows = np.concatenate([found.train, found.test])
    is_test = np.arange(len(rows)) >= len(found.train)
    text = f"{parsed.source.kind} as recipe {parsed.name} prepares it"
    return _Items(found.inputs[rows], found.labels[rows], is_test, text)


def _arrays(path: Path) -> _Items:
    if not path.is_file():
        raise DataError(f"data {path}: file not found")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        problem = " ".join(str(error).split())
        raise DataError(f"data {path}: cannot be read, it may be truncated ({problem})") from None
    parts = []
    for ending in ("", "_test") if "x_test" in arrays else ("",):
        lacking = next((name for name in (f"x{ending}", f"y{ending}") if name not in arrays), None)
        if lacking is not None:
            listed = ", ".join(arrays) or "none"
            raise DataError(f"data {path}: expected arrays x and y, and {lacking!r} is not in {listed}")
        parts.append(_pair(path, arrays[f"x{ending}"], arrays[f"y{ending}"]))
    if len({inputs.shape[1:] for inputs, _ in parts}) > 1:
        shapes = " and ".join(str(list(inputs.shape[1:])) for inputs, _ in parts)
        raise DataError(f"data {path}: expected items of one shape in x and x_test, found {shapes}")
    inputs, targets = (np.concatenate(both) for both in zip(*parts, strict=True))
    given = np.arange(len(inputs)) >= len(parts[0][0]) if len(parts) > 1 else None
    return _Items(inputs, targets, _test(given, len(inputs)), path.name)


def _pair(path: Path, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y) or not len(x):
        raise DataError(
            f"data {path}: expected as many items in x as in y, found {list(x.shape)} and {list(y.shape)}"
        )
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "iufb":
            raise DataError(f"data {path}: {name}: expected numbers, found {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"data {path}: {name}: expected finite numbers, found NaN or infinity")
    # bytes are pixels; other whole numbers are tokens
    wide_x = x.astype(np.float32) / np.float32(255.0) if x.dtype == np.uint8 else _wide(x)
    return wide_x, _wide(y)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def _test(official: np.ndarray | None, count: int) -> np.ndarray:
    """Which items are for tests: those that the data say, or a fifth of them at random, always the same."""
    if official is not None and official.any():
        return official
    is_test = np.zeros(count, dtype=bool)
    is_test[np.random.default_rng([0, count]).permutation(count)[: round(_TEST * count)]] = True
    return is_test


# -- what networks see -------------------------------------------------------------------------------------


def _normalised(inputs: np.ndarray, options: DataOptions) -> np.ndarray:
    for option, text in (("--mean", options.mean), ("--std", options.std)):
        if text is None:
            continue
        values = _numbers(option, text)
        if inputs.dtype.kind != "f":
            raise ConfigError(f"{option}: expected inputs that are no tokens, found {inputs.dtype}")
        channels = inputs.shape[1] if inputs.ndim > 1 else 1
        if len(values) not in (1, channels):
            raise ConfigError(
                f"{option}: expected 1 number or {channels}, one per channel, found {len(values)}"
            )
        if option == "--std" and (values <= 0).any():
            raise ConfigError(f"{option}: expected numbers above 0, found {text}")
        values = values.reshape(-1, *[1] * (inputs.ndim - 2))
        inputs = inputs - values if option == "--mean" else inputs / values
    return inputs


def _numbers(option: str, text: str) -> np.ndarray:
    try:
        found = np.array([float(part) for part in text.split(",")], np.float32)
    except ValueError:
        raise ConfigError(f"{option}: expected numbers such as 0.5 or 0.5,0.4,0.3, found {text!r}") from None
    if not np.isfinite(found).all():
        raise ConfigError(f"{option}: expected finite numbers, found {text}")
    return found


def _shaped(inputs: np.ndarray, shape: Sequence[int] | None, text: str) -> tuple[np.ndarray, str]:
    """Items of the shape that the module takes, and what was done to them."""
    own = inputs.shape[1:]
    if shape is None or tuple(shape) == own:
        return inputs, ""
    if math.prod(shape) != math.prod(own):
        raise DataError(
            f"data {text}: items are of shape {list(own)}, {math.prod(own)} values, and the module takes inputs of "
            f"shape {list(shape)}, {math.prod(shape)} values"
        )
    return inputs.reshape(len(inputs), *shape), f", reshaped from {list(own)} to {list(shape)}"
