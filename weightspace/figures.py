"""What all figures share: the colour of their ink, fonts and lines."""

from __future__ import annotations

from typing import Any

__all__ = ["GREY", "INK", "STYLE"]

INK, GREY = "#1a1b1d", "#8a8f98"

# A user's settings do not reach these figures; names with a dollar sign are names, not mathematics.
STYLE: Any = {
    "text.usetex": False,
    "text.parse_math": False,
    "path.sketch": None,
    "svg.hashsalt": "weightspace",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "figure.titlesize": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
