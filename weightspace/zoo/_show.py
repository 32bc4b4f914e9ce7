"""A picture of a zoo: what its networks represent, or how well they do and why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightspace.errors import ZooError
from weightspace.zoo._files import atomic_path, check_output
from weightspace.zoo._zoo import Population, Zoo
from weightspace.zoo.pictures._classifiers import (
    WIDTH,
    classifier_figure,
    distributions_height,
    draw_distributions,
)
from weightspace.zoo.pictures._inrs import drawn_source, inr_figure, is_inr, some_rows
from weightspace.zoo.pictures._panels import cut
from weightspace.zoo.pictures._style import STYLE, new_figure
from weightspace.zoo.pictures._summary import Summary, Variable

INRS = 30


def draw_zoo(
    zoo: Zoo,
    path: str | Path,
    *,
    population: str | None = None,
    count: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Draw a zoo as PNG.

    - INRs (images, grey or in colour, and curves): random networks beside their targets, and the histogram of PSNR.
    - Classifiers (populations with ``test_accuracy``): the histogram of final accuracies, learning curves, accuracy
      against every hyperparameter that varies, and first-layer filters.
    - Anything else: the histogram of every metric and label.

    Args:
        zoo: INRs with their source signals, classifiers, or networks with metrics or labels.
        path: of the PNG.
        population: which one; by default the first for INRs, all of them for others.
        count: networks to draw at most: 30 INRs, or the filters of 8 classifiers.
        seed: of the choice.
        overwrite: replace an existing file.

    Raises:
        ZooError: INRs without stored signals, or with those of several sources, or that cannot be rebuilt; or other
            networks of which nothing is known but their weights.
        OutputError: ``path`` exists.

    Example:
        >>> import tempfile
        >>> from weightspace.testing import tiny_zoo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw_zoo(tiny_zoo(), Path(folder) / "zoo.png", count=6).name
        'zoo.png'
    """
    path = Path(path)
    check_output(path, overwrite=overwrite)
    first = zoo[population if population is not None else next(iter(zoo))]
    chosen = {population: first} if population is not None else dict(zoo.populations)
    if is_inr(zoo, first):
        source = drawn_source(zoo, first)
        figure, style = inr_figure(first, source, some_rows(first, count or INRS, seed)), {}
    else:
        figure, style = None, STYLE
    import matplotlib as mpl

    with mpl.rc_context(style):
        if figure is None:
            figure = _figure(zoo, chosen, count, seed)
        with atomic_path(path, overwrite=overwrite) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    return path


def _figure(zoo: Zoo, chosen: Mapping[str, Population], count: int | None, seed: int) -> Any:
    classifiers = {name: member for name, member in chosen.items() if "test_accuracy" in member.metrics}
    title = zoo_name(zoo) if len(chosen) != 1 else f"{zoo_name(zoo)}, {next(iter(chosen))}"
    if classifiers:
        return classifier_figure(Summary.of(classifiers), title, count=count, seed=seed)
    summary = Summary.of(chosen)
    variables = known_variables(summary)
    if not variables:
        raise ZooError(
            f"zoo {zoo.path or ''}: stores neither metrics nor labels of its networks, so there is nothing to draw"
        )
    figure = new_figure(WIDTH, distributions_height(len(variables)) + 0.5)
    draw_distributions(figure, variables)
    diverged = int(summary.diverged.sum())
    figure.suptitle(f"{title}: {len(summary):,} networks" + (f" ({diverged:,} diverged)" if diverged else ""))
    return figure


def known_variables(summary: Summary) -> list[Variable]:
    """Metrics at the last checkpoints, then labels."""
    metrics = [Variable(name, values) for name, values in summary.metrics.items()]
    return [*metrics, *summary.labels.values()]


def zoo_name(zoo: Zoo) -> str:
    """What a zoo is called: by its recipe, or by its file."""
    named = (zoo.recipe or {}).get("name")
    return cut(str(named) if named else zoo.path.name if zoo.path else "zoo", 60)
