"""Judging: barriers and loss surfaces between networks, their singular vectors, their distance as functions."""

from weightspace.align.judging._barrier import (
    BarrierReport,
    Curve,
    barrier,
    compare_barriers,
    draw_barriers,
)
from weightspace.align.judging._cycles import CycleReport, cycle_error
from weightspace.align.judging._distance import FunctionalDistance, functional_distance
from weightspace.align.judging._path import Score
from weightspace.align.judging._singular_vectors import (
    Closeness,
    MatrixReport,
    SingularVectorReport,
    singular_vectors,
)
from weightspace.align.judging._surface import LossSurface, loss_surface

__all__ = [
    "BarrierReport",
    "Closeness",
    "Curve",
    "CycleReport",
    "FunctionalDistance",
    "LossSurface",
    "MatrixReport",
    "Score",
    "SingularVectorReport",
    "barrier",
    "compare_barriers",
    "cycle_error",
    "draw_barriers",
    "functional_distance",
    "loss_surface",
    "singular_vectors",
]
