"""How figures look: colours that serve on white paper and on dark pages, fonts, ticks."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

from weightspace.figures import GREY, INK
from weightspace.figures import STYLE as SHARED
from weightspace.zoo.pictures._html import Html, escaped
from weightspace.zoo.pictures._summary import short

MAIN, ACCENT, BAD = "#4c8bc4", "#e8833a", "#d6455d"
CLASSES = (
    "#4c8bc4",
    "#e8833a",
    "#4ba36b",
    "#d6455d",
    "#9a75c9",
    "#a9805f",
    "#d77fb8",
    "#8a8f98",
    "#b3a733",
    "#3aa9b5",
)

STYLE: Any = {**SHARED, "svg.fonttype": "path"}


def new_figure(width: float, height: float) -> Any:
    """An empty figure whose parts make room for one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
    return figure


def colour_map() -> Any:
    """Viridis without its ends, which vanish on dark and on white."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0.2, 0.92, 256)), name="weightspace")


def grid(axes: Any, axis: str = "y") -> None:
    """Thin lines behind the data."""
    axes.grid(axis=axis, color=GREY, alpha=0.25, linewidth=0.6)


def numbered(axis: Any, *, integer: bool = False) -> None:
    """Plain numbers at the ticks of an axis, few enough not to touch on a linear one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if axis.get_scale() == "linear":
        axis.set_major_locator(
            MaxNLocator(5, integer=integer, steps=[1, 2, 5, 10] if integer else [1, 2, 2.5, 5, 10])
        )
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def scaled(axis: Any, scale: str, values: np.ndarray) -> None:
    """The axis of a variable; where it is logarithmic its ticks stand at powers of ten, or between them."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    if scale not in ("log", "symlog"):
        numbered(axis)
        return
    positive = values[values > 0]
    low, high = float(positive.min()), float(positive.max())
    symlog = {"linthresh": low, "linscale": 0.3} if scale == "symlog" else {}
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale(scale, **symlog)
    ticks = powers(low, high)
    axis.set_major_locator(FixedLocator([0.0, *ticks] if scale == "symlog" else ticks))
    if scale == "symlog":
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    numbered(axis)


def powers(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, at most six; with values between where there are fewer than three.

    Example:
        >>> powers(2e-5, 0.3)
        [0.0001, 0.001, 0.01, 0.1]
        >>> powers(0.002, 0.09)
        [0.003, 0.01, 0.03]
    """
    exponents = range(int(np.ceil(np.log10(low) - 1e-9)), int(np.floor(np.log10(high) + 1e-9)) + 1)
    if len(exponents) >= 3:
        every = -(-len(exponents) // 6)
        return [float(f"1e{exponent}") for exponent in exponents[::every]]
    around = range(int(np.floor(np.log10(low))), int(np.floor(np.log10(high))) + 1)
    found: list[float] = []
    for digits in ((1, 3), (1, 2, 5), range(1, 10)):
        candidates = [float(f"{digit}e{exponent}") for exponent in around for digit in digits]
        found = [value for value in candidates if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 3:
            break
    return found


def to_svg(figure: Any, label: str, prefix: str) -> Html:
    """A figure as an element of a page: its ink is the page's, its width at most the page's.

    Args:
        figure: of matplotlib.
        label: what it shows, for those who do not see it.
        prefix: put before its identifiers, so that two figures of one page do not share any.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=144, transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    # two colour bars of one figure are one image with one name, which nothing refers to
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    for before in (' id="', "url(#", 'href="#'):
        text = text.replace(before, before + prefix)
    text = text.replace(INK, "currentColor")  # on a page the colour of its text takes the ink's place
    opening, rest = text.split(">", 1)
    found = re.search(r'viewBox="([^"]+)"', opening)
    assert found is not None
    width = float(found[1].split()[2]) * 4 / 3  # points to CSS pixels
    size = f'style="max-width:{width:.0f}px"'
    return Html(f'<svg viewBox="{found[1]}" role="img" aria-label="{escaped(label)}" {size}>{rest.strip()}')
