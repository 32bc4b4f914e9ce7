"""Singular-vector analysis: what matching does to the singular values and vectors of weight matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.align.judging._path import check_networks
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import TensorSpec, WeightSpec


@dataclass(frozen=True, eq=False)
class Closeness:
    """How close one weight matrix is to another, by their singular vectors; see :func:`singular_vectors`.

    Args:
        distance: L2.
        joint: R at each share of energy, in [-1, 1].
        directions: the same without the singular values.
        left: that of left singular vectors alone, in [0, 1].
        right: that of right singular vectors alone, in [0, 1].
        overlap: ``u_i^T W_B v_i`` for each singular direction i of A.
    """

    distance: float
    joint: tuple[float, ...]
    directions: tuple[float, ...]
    left: tuple[float, ...]
    right: tuple[float, ...]
    overlap: Float[Tensor, "rank"]


@dataclass(frozen=True, eq=False)
class MatrixReport:
    """One weight matrix of two networks, before and after matching.

    Args:
        name: of the tensor.
        shape: of the matrix: a kernel is unfolded as output units times all that a unit reads.
        values_a: singular values in A, descending, float64.
        values_b: in B.
        values_aligned: in aligned B.
        before: A and B.
        after: A and aligned B.
    """

    name: str
    shape: tuple[int, int]
    values_a: Float[Tensor, "rank"]
    values_b: Float[Tensor, "rank"]
    values_aligned: Float[Tensor, "rank"]
    before: Closeness
    after: Closeness

    @property
    def value_change(self) -> float:
        """The largest change of a singular value of B by matching, relative to the largest one."""
        change = (self.values_aligned - self.values_b).abs().max()
        return float(change / self.values_b.max()) if change > 0 else 0.0

    @property
    def scale(self) -> float:
        """``sqrt(||A||^2 + ||B||^2)``: the distance of two such matrices that have nothing to do with each other."""
        return float((self.values_a.square().sum() + self.values_b.square().sum()).sqrt())


@dataclass(frozen=True, eq=False)
class SingularVectorReport:
    """What matching did to the singular values and vectors of two networks.

    Args:
        energy: shares of the squared singular values that the leading ones make up; 1 for all of them.
        matrices: by the names of the tensors.
    """

    energy: tuple[float, ...]
    matrices: dict[str, MatrixReport]

    def mean(self, what: str, when: str) -> tuple[float, ...]:
        """The mean over matrices at each share of energy, each weighted by ``||A|| ||B||``.

        Args:
            what: ``"joint"``, ``"directions"``, ``"left"`` or ``"right"``.
            when: ``"before"`` or ``"after"``.
        """
        weights = [float(each.values_a.norm() * each.values_b.norm()) for each in self.matrices.values()]
        rows = [getattr(getattr(each, when), what) for each in self.matrices.values()]
        total = sum(weights) or 1.0
        return tuple(
            sum(weight * row[at] for weight, row in zip(weights, rows, strict=True)) / total
            for at in range(len(self.energy))
        )

    def distance(self, when: str) -> float:
        """L2 distance over all matrices, ``"before"`` or ``"after"``."""
        return math.sqrt(sum(getattr(each, when).distance ** 2 for each in self.matrices.values()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        kinds = ("joint", "directions", "left", "right")
        return {
            "energy": list(self.energy),
            "distance_before": self.distance("before"),
            "distance_after": self.distance("after"),
            "value_change": max(each.value_change for each in self.matrices.values()),
            **{
                f"{kind}_{when}": list(self.mean(kind, when))
                for kind in kinds
                for when in ("before", "after")
            },
            "matrices": [_matrix_entry(each) for each in self.matrices.values()],
        }

    def to_json(self) -> str:
        """Means over the matrices, and everything about each."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def summary(self) -> str:
        """One line: change of singular values, R of leading and of all singular vectors, L2 distance."""
        change = max(each.value_change for each in self.matrices.values())
        before, after = self.mean("joint", "before"), self.mean("joint", "after")
        shares = ", ".join(
            f"R at {100 * share:.3g} % of the energy {was:.3f} -> {now:.3f}"
            for share, was, now in zip(self.energy, before, after, strict=True)
        )
        return (
            f"{len(self.matrices)} matrices: singular values changed by at most {change:.1g} relative; {shares}; "
            f"L2 distance {self.distance('before'):.4g} -> {self.distance('after'):.4g}"
        )

    def __str__(self) -> str:
        return self.summary()

    def draw(
        self,
        output: str | Path | BufferedIOBase,
        *,
        matrix: str | None = None,
        title: str | None = None,
        format: str | None = None,
    ) -> None:
        """Draw singular values, overlaps of singular directions, R and L2 distance, before and after.

        Args:
            output: a path, or a binary file that is open for writing.
            matrix: the tensor of which singular values and directions are drawn; by default the one of the highest
                rank, and of those the one with the most entries.
            title: above the figure.
            format: ``"png"``, ``"pdf"`` or ``"svg"``; by default the suffix of the path, PNG for a file.

        Raises:
            ConfigError: another format, or a tensor that was not analysed.
        """
        from weightspace.align.judging._figures import saved, singular_figure

        if matrix is None:
            chosen = max(self.matrices.values(), key=lambda each: (min(each.shape), math.prod(each.shape)))
        elif matrix in self.matrices:
            chosen = self.matrices[matrix]
        else:
            raise ConfigError(f"matrix: expected one of {', '.join(self.matrices)}, found {matrix!r}")
        with saved(output, format, title) as figure:
            singular_figure(figure, self, chosen)


def singular_vectors(
    spec: WeightSpec,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    aligned: Mapping[str, Tensor],
    *,
    energy: Sequence[int | float] = (0.5, 0.9, 1.0),
) -> SingularVectorReport:
    """What matching B onto A did to the singular values and singular vectors of the weight matrices.

    With singular value decompositions ``W_A = sum_i s_i u_i v_i^T`` and ``W_B = sum_j t_j x_j y_j^T``, of which the
    leading k and l are kept that make up a share of the energy ``||W||^2``:

        R          = sum_ij s_i t_j <u_i, x_j> <v_i, y_j>  /  sqrt(sum_i s_i^2  sum_j t_j^2)        (``joint``)
        directions = sum_ij <u_i, x_j> <v_i, y_j>  /  sqrt(k l)
        left       = sum_ij s_i^2 t_j^2 <u_i, x_j>^2  /  sqrt(sum_i s_i^4  sum_j t_j^4)
        right      = sum_ij s_i^2 t_j^2 <v_i, y_j>^2  /  sqrt(sum_i s_i^4  sum_j t_j^4)

    At a share of 1, R is the cosine ``<W_A, W_B> / (||W_A|| ||W_B||)``, so that ``||W_A - W_B||^2 = ||W_A||^2 +
    ||W_B||^2 - 2 R ||W_A|| ||W_B||``, and the overlaps ``o_i = u_i^T W_B v_i`` take it apart by the singular
    directions of A: ``<W_A, W_B> = sum_i s_i o_i``. The average of both networks keeps ``(s_i + o_i) / 2`` of what A
    does along direction i: all of it where ``o_i = s_i``. ``left`` and ``right`` are above 0 for any two matrices of many
    singular values, whether they have to do with each other or not.

    A permutation of rows and columns turns singular vectors and keeps singular values. The paper's claims are that
    matching brings the directions of large singular values together, which are what the network computes with, and
    that the L2 distance hardly falls. Its own R leaves out the singular values and selects singular vectors by the ratio
    of their value to the largest one, where ``directions`` here selects them by energy.

    Args:
        spec: the weight space: its parameters with two or more axes are the matrices, of which the axis of output
            units makes the rows and all others together the columns.
        a: network A.
        b: network B.
        aligned: B after matching.
        energy: shares in (0, 1], ascending.

    Raises:
        SpecError: networks that do not fit the spec, have batch axes, or hold values that are not finite; or a spec
            without matrices.
        ConfigError: shares that are not ascending in (0, 1].

    Reference:
        Ito et al. 2024, "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching",
        arXiv:2402.04051.

    Example:
        >>> spec = WeightSpec.mlp([4, 16, 16, 3], activation="relu")
        >>> a = spec.unflatten(torch.randn(spec.num_parameters))
        >>> b = spec.act(spec.random_element(symmetries=["permutation"]), a)
        >>> report = singular_vectors(spec, a, b, aligned=a)
        >>> round(report.mean("joint", "after")[-1], 6), report.distance("after")
        (1.0, 0.0)
    """
    _check_energy(energy)
    networks = {"A": a, "B": b, "aligned": aligned}
    chosen = {
        name: tensor
        for name, tensor in spec.tensors.items()
        if tensor.kind == "parameter" and len(tensor.shape) >= 2
    }
    _check(spec, chosen, networks)
    return SingularVectorReport(
        tuple(energy),
        {
            name: _analyse(name, [_matrix(tensor, w[name]) for w in networks.values()], energy)
            for name, tensor in chosen.items()
        },
    )


def _check_energy(energy: Sequence[int | float]) -> None:
    ascending = list(energy) == sorted(set(energy))
    if not energy or not ascending or not (energy[0] > 0 and energy[-1] <= 1):
        raise ConfigError(f"energy: expected shares in (0, 1], ascending, found {list(energy)}")


def _check(
    spec: WeightSpec, chosen: Mapping[str, TensorSpec], networks: Mapping[str, Mapping[str, Tensor]]
) -> None:
    if not chosen:
        raise SpecError("spec: expected a parameter with two axes or more, found none")
    for label, network in networks.items():
        for name, tensor in chosen.items():
            if name not in network:
                raise SpecError(f"network {label}: parameter {name!r} is missing")
            if tuple(network[name].shape) != tensor.shape:
                raise SpecError(
                    f"network {label}: {name!r} should have shape {list(tensor.shape)}, "
                    f"found {list(network[name].shape)}"
                )
    check_networks({label: {name: w[name] for name in chosen} for label, w in networks.items()})


def _matrix(tensor: TensorSpec, weight: Tensor) -> Float[Tensor, "rows columns"]:
    rows = tensor.units.output or 0
    return weight.detach().movedim(rows, 0).flatten(1).double()


def _analyse(name: str, matrices: Sequence[Tensor], energy: Sequence[int | float]) -> MatrixReport:
    ours, before, after = (_Decomposition(matrix) for matrix in matrices)
    rows, columns = matrices[0].shape
    return MatrixReport(
        name,
        (rows, columns),
        ours.values.cpu(),
        before.values.cpu(),
        after.values.cpu(),
        _closeness(ours, before, energy),
        _closeness(ours, after, energy),
    )


class _Decomposition:
    """A matrix, its singular values and vectors."""

    def __init__(self, matrix: Float[Tensor, "rows columns"]) -> None:
        self.matrix = matrix
        self.left, self.values, right = torch.linalg.svd(matrix, full_matrices=False)
        self.right = right.T

    def leading(self, share: float) -> int:
        """How many singular values make up that share of the energy; at least one."""
        sums = self.values.square().cumsum(0)
        # rounding must not ask for one more than the share needs, nor for directions without any energy
        return min(int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1, len(self.values))


def _closeness(one: _Decomposition, other: _Decomposition, energy: Sequence[int | float]) -> Closeness:
    left, right = one.left.T @ other.left, one.right.T @ other.right
    rows = []
    for share in energy:
        k, m = one.leading(share), other.leading(share)
        s, t = one.values[:k], other.values[:m]
        u, v = left[:k, :m], right[:k, :m]
        squares = s.square(), t.square()
        rows.append(
            (
                _normalised(u * v, s, t),
                _normalised(u * v, torch.ones_like(s), torch.ones_like(t)),
                _normalised(u.square(), *squares),
                _normalised(v.square(), *squares),
            )
        )
    overlap = (one.left * (other.matrix @ one.right)).sum(0)
    distance = float((one.matrix - other.matrix).norm())
    joint, directions, lefts, rights = zip(*rows, strict=True)
    return Closeness(distance, joint, directions, lefts, rights, overlap.cpu())


def _normalised(products: Tensor, first: Tensor, second: Tensor) -> float:
    """``first^T products second``, over the norms; 0 where one of them is."""
    norm = float(first.norm() * second.norm())
    return float(first @ products @ second) / norm if norm > 0 else 0.0


def _matrix_entry(each: MatrixReport) -> dict[str, Any]:
    sides = {
        when: {
            name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(side).items()
        }
        for when, side in (("before", each.before), ("after", each.after))
    }
    values = {name: getattr(each, name).tolist() for name in ("values_a", "values_b", "values_aligned")}
    return {
        "name": each.name,
        "shape": list(each.shape),
        **values,
        "value_change": each.value_change,
        "scale": each.scale,
        **sides,
    }
