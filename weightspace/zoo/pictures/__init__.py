"""What figures and reports of zoos are made of: networks as columns, panels, pages."""

from weightspace.figures import GREY
from weightspace.zoo.pictures._inrs import (
    draw_curves,
    draw_image,
    drawn_shape,
    drawn_source,
    render_weights,
    some_rows,
    source_of,
    value_range,
)
from weightspace.zoo.pictures._panels import cut
from weightspace.zoo.pictures._style import STYLE

__all__ = [
    "GREY",
    "STYLE",
    "cut",
    "draw_curves",
    "draw_image",
    "drawn_shape",
    "drawn_source",
    "render_weights",
    "some_rows",
    "source_of",
    "value_range",
]
