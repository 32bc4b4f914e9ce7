"""A spec as a figure: groups and tensors, and which axis of which tensor runs over which group."""

from __future__ import annotations

from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from weightspace.errors import SpecError
from weightspace.spec._diagram import colours_of, ink_on
from weightspace.spec._layout import SMALL, Box, Label, Lane, Layout, Link, lay_out
from weightspace.spec._types import WeightSpec

FIGURE_FORMATS = ("png", "pdf", "svg")
TALLEST = 190.0  # inches; a page of PDF ends at 200
_FONT = "DejaVu Sans"  # which matplotlib brings along
_INK, _GREY, _FAINT = "#222222", "#6B6B6B", "#C9C9C9"
_BEND = 0.1
_DOT = 0.072
# Equal specs give equal bytes; letters stay letters in PDF; a user's TeX is not called.
_STYLE: Any = {
    "text.usetex": False,
    "text.hinting": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "weightspace",
    "path.sketch": None,
}
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}


def draw(spec: WeightSpec, output: str | Path | BufferedIOBase, *, format: str | None = None) -> None:
    """Draw the groups and the tensors of a spec, the forward pass running downwards.

    On the left stand the groups with size, activation and scalings, nested ones inside the group that they lie
    within; on the right the tensors with their cells, fixed axes as numbers. Each group is a coloured line, and a
    dot on it an axis of a tensor that runs over the group. Neighbours of one module with equal axes share a box.

    Args:
        spec: what to draw; the figure grows with it.
        output: a path, or a binary file that is open for writing.
        format: ``"png"``, ``"pdf"`` or ``"svg"``; by default the suffix of the path, PNG for a file.

    Raises:
        SpecError: another format, or more tensors than a page can show.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if format is None:
        format = Path(output).suffix[1:].lower() if isinstance(output, str | Path) else "png"
    if format not in FIGURE_FORMATS:
        raise SpecError(f"draw: expected the format {', '.join(FIGURE_FORMATS)}, found {format!r}")
    layout = lay_out(spec, _measure)
    height = layout.bottom - layout.top
    if height > TALLEST:
        raise SpecError(
            f"draw: {len(spec.tensors)} tensors need a figure {height:.0f} inches high, at most "
            f"{TALLEST:.0f} can be drawn; write Graphviz text instead (to_graphviz, or a name in .dot)"
        )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(layout.width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, layout.width), ylim=(layout.bottom, layout.top))
        axes.set_axis_off()
        _paint(axes, layout, colours_of(spec))
        # a very tall PNG stays below 65,536 pixels, where its writer ends
        dpi = min(200.0, 30_000 / height)
        target: Any = output
        figure.savefig(target, format=format, dpi=dpi, metadata=_METADATA[format])


@cache
def _font(size: float, style: str) -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(family=_FONT, size=size, weight="bold" if style == "bold" else "normal")


@cache
def _measure(text: str, size: float, style: str) -> float:
    """Width in inches."""
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, _font(size, style), False)[0] / 72


def _paint(axes: Any, layout: Layout, colours: dict[str, str]) -> None:
    for box in layout.nests:
        _rectangle(axes, box, face=_tint(colours[box.group or ""]), edge=colours[box.group or ""], order=1)
    for lane in layout.lanes:
        _lane(axes, lane, layout.fan, colours[lane.group])
    for link in layout.links:
        _link(axes, link, colours[link.group])
    for box in layout.tensors:
        _rectangle(axes, box, face="#FAFAFA", edge=_FAINT, order=6)
        for label in box.labels:
            _label(axes, label, colours)
    for label in layout.notes:
        _label(axes, label, colours)
    for box in layout.groups:
        colour = colours[box.group or ""]
        _rectangle(axes, box, face=colour, edge=colour, order=6)
        for label in box.labels:
            _label(axes, label, colours, ink_on(colour))


def _rectangle(axes: Any, box: Box, *, face: str, edge: str, order: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = min(0.07, box.height / 2)
    style = f"round,pad=0,rounding_size={corner}"
    axes.add_patch(
        FancyBboxPatch(
            (box.x, box.y), box.width, box.height, boxstyle=style, fc=face, ec=edge, lw=0.8, zorder=order
        )
    )


def _label(axes: Any, label: Label, colours: dict[str, str], ink: str | None = None) -> None:
    x, plain = label.x, ink or (_INK if label.size > SMALL else _GREY)
    for piece in label.pieces:
        colour = plain if piece.group is None else _dark(colours[piece.group])
        axes.text(
            x,
            label.y,
            piece.text,
            color=colour,
            fontproperties=_font(label.size, label.style),
            va="center_baseline",
            parse_math=False,
            zorder=8,
        )
        x += _measure(piece.text, label.size, label.style)


def _lane(axes: Any, lane: Lane, fan: float, colour: str) -> None:
    """From the group's node in a curve to its height of entry, level to its column, and down."""
    from matplotlib.path import Path as Curve

    (x, y), (column, entry) = lane.start, lane.entry
    level = x + fan - _BEND
    half = (x + level) / 2
    curve = [(x, y), (half, y), (half, entry), (level, entry)]
    _stroke(axes, curve, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4], colour)
    _stroke(axes, [(level, entry), (column - _BEND, entry)], [Curve.MOVETO, Curve.LINETO], colour, over=True)
    down = [(column - _BEND, entry), (column, entry), (column, entry + _BEND), (column, lane.end)]
    _stroke(axes, down, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3, Curve.LINETO], colour)


def _stroke(axes: Any, points: Any, codes: Any, colour: str, *, over: bool = False) -> None:
    """A line; one that passes ``over`` others has a white rim."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    path = Curve(points, codes)
    if over:
        axes.add_patch(PathPatch(path, fc="none", ec="white", lw=4.2, capstyle="butt", zorder=3))
    order = 4 if over else 2
    axes.add_patch(PathPatch(path, fc="none", ec=colour, lw=2.0, capstyle="round", zorder=order))


def _link(axes: Any, link: Link, colour: str) -> None:
    from matplotlib.patches import Circle

    axes.plot(
        [link.x, link.lane + _DOT], [link.y] * 2, color="white", lw=3.2, zorder=3, solid_capstyle="butt"
    )
    axes.plot([link.x, link.lane], [link.y] * 2, color=colour, lw=1.1, zorder=4)
    axes.add_patch(Circle((link.lane, link.y), _DOT, fc=colour, ec="white", lw=0.7, zorder=5))
    axes.text(
        link.lane,
        link.y,
        str(link.axis),
        color=ink_on(colour),
        fontproperties=_font(5.5, "bold"),
        ha="center",
        va="center_baseline",
        zorder=7,
    )


def _mixed(colour: str, other: int, share: float) -> str:
    channels = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(value * (1 - share) + other * share):02X}" for value in channels)


def _tint(colour: str) -> str:
    return _mixed(colour, 255, 0.88)


def _dark(colour: str) -> str:
    """Readable as text on white."""
    return _mixed(colour, 0, 0.25)
