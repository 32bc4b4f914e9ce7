"""Pictures of augmentations: what networks represent before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from weightspace.datasets._dataset import ZooDataset
from weightspace.datasets.augment import Augmentation, Compose
from weightspace.errors import ConfigError
from weightspace.zoo import Population, Zoo, atomic_path, check_output
from weightspace.zoo.pictures import (
    GREY,
    STYLE,
    cut,
    draw_curves,
    draw_image,
    drawn_shape,
    render_weights,
    some_rows,
    source_of,
    value_range,
)

IMAGES, CURVES = 10, 5  # beside one another
DPI = 110
NAME, NOTE = 0.072, 0.054  # of one character, in inches, as all lengths
GAP, TOP, BETWEEN = 0.07, 0.4, 0.15
KEPT = {"exactly": "function kept exactly", "approximately": "function kept approximately"}


def draw_augmented(
    zoo: Zoo,
    augment: Augmentation | Sequence[Augmentation],
    path: str | Path,
    *,
    population: str | None = None,
    count: int = 8,
    draws: int = 3,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Draw what networks represent before and after augmentation, as PNG.

    Images: on top the targets that the zoo stores and what the networks represent, then a line for every draw. Curves:
    two lines in one panel. Where targets are shares of classes afterwards (MixUp, label smoothing), they stand above.
    The networks are one batch, so that MixUp mixes those that are seen, and draw *n* is what a :class:`ZooDataset` with
    this seed reads of them in epoch *n - 1*.

    Args:
        zoo: of INRs of images, grey or in colour, or of curves.
        augment: one, or several to compare, each named beside its lines.
        path: of the PNG.
        population: which one; by default the first.
        count: networks, each of an item of its own.
        draws: of each augmentation.
        seed: of the choice and of the augmentation.
        overwrite: replace an existing file.

    Raises:
        ConfigError: an augmentation that does not suit the weight space or the labels, no networks or no draws, or a
            negative seed.
        ZooError: networks that represent no signal, or that cannot be rebuilt.
        OutputError: ``path`` exists.

    Example:
        >>> import tempfile
        >>> from weightspace import GaussianNoise
        >>> from weightspace.testing import tiny_zoo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_augmented(tiny_zoo(), GaussianNoise(0.1), Path(folder) / "noise.png", count=4).name
        'noise.png'
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    augments = [augment] if isinstance(augment, Augmentation) else list(augment)
    if min(count, draws, len(augments)) < 1:
        raise ConfigError(
            f"picture: expected at least one network, draw and augmentation, found {count}, {draws} and {len(augments)}"
        )
    if seed < 0:
        raise ConfigError(f"seed: expected at least 0, found {seed}")
    figure = _figure(Pictured.of(zoo, population, count, seed), augments, draws)
    with _style(), atomic_path(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    return path


def call_text(augment: Augmentation) -> str:
    """How ``--augment`` names it: the first option, and others where they are not as by default.

    Example:
        >>> from weightspace import GaussianNoise, MixUp, Permutation
        >>> call_text(Compose([Permutation(), GaussianNoise(0.1), MixUp("direct", beta=0.4)]))
        'permutation, noise(0.1), mixup(direct, beta=0.4)'
    """
    if isinstance(augment, Compose):
        return ", ".join(call_text(part) for part in augment.parts)
    given = []
    for at, option in enumerate(signature(type(augment)).parameters.values()):
        value = getattr(augment, option.name, Parameter.empty)
        if at == 0 and value is not Parameter.empty:
            given.append(_written(value))
        elif value not in (option.default, Parameter.empty):
            given.append(f"{option.name}={_written(value)}")
    name = augment.name or type(augment).__name__
    return f"{name}({', '.join(given)})" if given else name


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


# -- what is drawn -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Signals beside one another.

    Args:
        signals: (networks, *shape).
        name: what they are, to the left.
        note: below the name.
        titles: above each signal; none, or one each.
    """

    signals: np.ndarray
    name: str = ""
    note: str = ""
    titles: Sequence[str] = ()


@dataclass(frozen=True)
class Pictured:
    """Some networks of a zoo.

    Args:
        dataset: with their labels, if there are any.
        members: which of its members.
        shape: of one signal.
        targets: (networks, *shape) stored signals; None if there are none.
    """

    dataset: ZooDataset
    members: np.ndarray
    shape: tuple[int, ...]
    targets: np.ndarray | None

    @classmethod
    def of(cls, zoo: Zoo, population: str | None, count: int, seed: int) -> Pictured:
        """Random networks, one per item."""
        name = population if population is not None else next(iter(zoo))
        shape = drawn_shape(zoo, zoo[name])
        label = _label(zoo[name])
        dataset = ZooDataset(zoo, None, target=label, population=name, seed=seed)
        if dataset.classes is None:
            # numbers can be mixed whatever they are, and are not shown
            dataset.targets = dataset.targets.double()
        rows = some_rows(zoo[name], count, seed, among=dataset.rows)
        if not len(rows):
            raise ConfigError(
                f"zoo {zoo.path or ''}: the last checkpoints of population {name} hold NaN or infinite weights"
            )
        source = source_of(zoo, zoo[name])
        targets = None if source is None else source.get(zoo[name].source[zoo[name].network[rows]])
        return cls(dataset, np.flatnonzero(np.isin(dataset.rows, rows)), shape, targets)

    def originals(self) -> list[Line]:
        """Stored signals, and what the networks represent; labels above where there are classes."""
        self.dataset.augment = None
        weights, labels = self.dataset.read(self.members)
        titles = [f"{label}" for label in labels.tolist()] if self.dataset.classes is not None else []
        fitted = Line(render_weights(self.dataset.population, weights, self.shape), "network", titles=titles)
        if self.targets is None:
            return [fitted]
        return [Line(self.targets, "target", titles=titles), Line(fitted.signals, fitted.name)]

    def augmented(self, augments: Sequence[Augmentation], draws: int) -> Iterator[Line]:
        """A line for every draw of every augmentation."""
        dataset = self.dataset
        for augment in augments:
            dataset.augment = augment
            for draw in range(draws):
                dataset.epoch = draw
                weights, targets = dataset.read(self.members)
                signals = render_weights(dataset.population, weights, self.shape)
                name, note = _names(augment, draw, alone=len(augments) == 1)
                yield Line(signals, name, note, _shares(targets) if dataset.classes is not None else [])


def _label(population: Population) -> str | None:
    """The label that augmentations may mix."""
    return "label" if "label" in population.labels else next(iter(population.labels), None)


def _names(augment: Augmentation, draw: int, *, alone: bool) -> tuple[str, str]:
    """Of a line: the number of the draw, or the augmentation and what it keeps."""
    if alone:
        return f"draw {draw + 1}", ""
    return (call_text(augment), KEPT.get(augment.keeps, augment.effect)) if draw == 0 else ("", "")


def _shares(targets: Tensor) -> list[str]:
    """``"3: 62 %, 7: 38 %"``: the two largest shares of each network; nothing where targets are as they were."""
    if targets.ndim != 2:
        return []
    shares, classes = targets.topk(min(2, targets.shape[1]))
    named = zip((100 * shares).round().int().tolist(), classes.tolist(), strict=True)
    return [_said([(share, of) for share, of in zip(*one, strict=True) if share > 0]) for one in named]


def _said(shares: Sequence[tuple[int, int]]) -> str:
    return f"{shares[0][1]}" if shares[0][0] == 100 else ", ".join(f"{of}: {share} %" for share, of in shares)


# -- the figure ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """Where panels stand: lines below one another, and blocks of lines where there are too many networks for one.

    Args:
        networks: in all.
        columns: of panels.
        panel: width and height of each, in inches, as all lengths.
        above: room above each line, for titles where it has some.
        left: room for names.
    """

    networks: int
    columns: int
    panel: tuple[float, float]
    above: tuple[float, ...]
    left: float

    @classmethod
    def of(cls, lines: Sequence[Line], shape: tuple[int, ...]) -> Sheet:
        """For the given lines of signals."""
        flat, networks = len(shape) == 1, len(lines[0].signals)
        panel = (1.7, 0.85) if flat else (0.9, max(0.45, 0.9 * shape[0] / shape[1]))
        above = tuple(0.2 if line.titles else 0.12 if flat else GAP for line in lines)
        left = max(max(NAME * len(line.name), NOTE * len(line.note)) for line in lines) + 0.25
        return cls(networks, min(CURVES if flat else IMAGES, networks), panel, above, left)

    @property
    def block(self) -> float:
        """Height of a block, with the room below it."""
        return len(self.above) * self.panel[1] + sum(self.above) + BETWEEN

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure."""
        blocks = -(-self.networks // self.columns)
        return self.left + self.columns * (self.panel[0] + GAP) + GAP, TOP + blocks * self.block

    def place(self, line: int, network: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel, as shares of the figure."""
        (width, height), (wide, high) = self.size, self.panel
        block, column = divmod(network, self.columns)
        left = self.left + column * (wide + GAP)
        bottom = height - TOP - block * self.block - sum(self.above[: line + 1]) - (line + 1) * high
        # on whole pixels: an image that begins between two gets a dark rim
        left, bottom = round(left * DPI) / DPI, round(bottom * DPI) / DPI
        return left / width, bottom / height, wide / width, high / height


def _figure(pictured: Pictured, augments: Sequence[Augmentation], draws: int) -> Any:
    from matplotlib.figure import Figure

    for augment in augments:
        pictured.dataset.augment = augment  # refuses one that does not suit, before any work
    originals, lines = pictured.originals(), list(pictured.augmented(augments, draws))
    if not any(line.titles for line in lines):
        originals = [Line(line.signals, line.name) for line in originals]
    shown = lines if len(pictured.shape) == 1 else [*originals, *lines]
    sheet = Sheet.of(shown, pictured.shape)
    with _style():
        figure = Figure(figsize=sheet.size)
        (_draw_curves if len(pictured.shape) == 1 else _draw_images)(figure, sheet, originals, shown)
        figure.text(
            0.1 / sheet.size[0], 1 - 0.1 / sheet.size[1], _title(pictured, augments), va="top", fontsize=11
        )
    return figure


def _style() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def _title(pictured: Pictured, augments: Sequence[Augmentation]) -> str:
    networks = f"{len(pictured.members)} network{'s' if len(pictured.members) > 1 else ''}"
    if len(augments) > 1:
        return f"{networks}, and what augmentations make of them"
    return f"{networks}, augmented by {cut(call_text(augments[0]), 70)}"


def _draw_images(figure: Any, sheet: Sheet, originals: Sequence[Line], lines: Sequence[Line]) -> None:
    low, high = value_range(originals[0].signals)
    for axes, signal, _ in _panels(figure, sheet, lines):
        axes.set_axis_off()
        draw_image(axes, signal, low, high)


def _draw_curves(figure: Any, sheet: Sheet, originals: Sequence[Line], lines: Sequence[Line]) -> None:
    before = originals[-1].signals
    for axes, signal, network in _panels(figure, sheet, lines):
        draw_curves(axes, before[network], signal, ("network", "augmented"))
        low, high = before[network].min(), before[network].max()
        # one scale for all draws of a network; what leaves it has left what networks represent
        axes.set_ylim(low - 0.4 * (high - low) - 1e-6, high + 0.4 * (high - low) + 1e-6)
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="upper right", ncols=2)


def _panels(figure: Any, sheet: Sheet, lines: Sequence[Line]) -> Iterator[tuple[Any, np.ndarray, int]]:
    """Axes with their titles and names, and the signal that belongs there."""
    for at, line in enumerate(lines):
        for network, signal in enumerate(line.signals):
            axes = figure.add_axes(sheet.place(at, network))
            if line.titles:
                axes.set_title(line.titles[network], fontsize=6.5, pad=2)
            if network % sheet.columns == 0:
                _name(axes, line, sheet)
            yield axes, signal, network


def _name(axes: Any, line: Line, sheet: Sheet) -> None:
    """To the left of the first panel of a line."""
    beside: Any = {"transform": axes.transAxes, "ha": "right", "fontsize": 9}
    right, half = -0.12 / sheet.panel[0], 0.5
    axes.text(right, half, line.name, va="bottom" if line.note else "center", **beside)
    axes.text(right, half - 0.04, line.note, va="top", **{**beside, "fontsize": 7.5, "color": GREY})
