"""The data model: groups of interchangeable units, tensors as cells over them, and scalings.

Everything here is immutable, hashable and free of tensors. A tensor is a disjoint union of *cells*; a cell is
a strided box in which every dimension runs over one group or is a fixed index. The weight of an MLP is one
cell with two dimensions, and prints as ``[hidden1, hidden0]``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from weightspace.errors import SpecError

if TYPE_CHECKING:
    from weightspace.spec._verify import VerifyReport

Weights = dict[str, Tensor]
"""What ``torch.func`` uses: tensors under their ``state_dict`` names, with any number of leading batch axes."""

Element = dict[str, Tensor]
"""A group element: a permutation per group name and a value per scaling name; a missing name acts as identity."""

TensorKind = Literal["parameter", "statistic"]
ScalingKind = Literal["positive", "sign", "phase"]
Symmetry = Literal["permutation", "positive", "sign", "phase"]
SYMMETRIES: tuple[Symmetry, ...] = get_args(Symmetry)

_Value = TypeVar("_Value")


class Frozen(Mapping[str, _Value], Generic[_Value]):
    """An ordered, immutable, hashable mapping from names."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[str, _Value] | Sequence[tuple[str, _Value]] = ()) -> None:
        self._items: dict[str, _Value] = dict(items)
        self._hash: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._items,)  # without the hash, which is another in every process

    def __getitem__(self, key: str) -> _Value:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:  # specs are keys of caches that every batch asks
            self._hash = hash(tuple(self._items.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Equal means the same items in the same order, as order is that of the forward pass."""
        if not isinstance(other, Frozen):
            return NotImplemented
        return list(self._items.items()) == list(other._items.items())

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, slots=True)
class Group:
    """A set of interchangeable units: a hidden layer, a residual stream, the heads of an attention layer.

    Args:
        name: unique in its spec.
        size: number of units, at least 1.
        within: names of the groups whose units each own a copy of this one (the features *within* each
            head); closed under ancestors.
        activation: name of the activation that the units apply, when there is one.
    """

    name: str
    size: int
    within: tuple[str, ...] = ()
    activation: str | None = None


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a cell.

    Args:
        axis: the axis of the tensor on which it lives.
        stride: distance between neighbours, in elements of the row-major flattened tensor.
        size: number of indices.
        group: the group it runs over; None for a fixed index.
        parents: positions, in this cell, of the dims that bind ``Group.within``, in its order.
    """

    axis: int
    stride: int
    size: int
    group: str | None = None
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A strided box of a tensor's elements; ``offset`` counts elements of the flattened tensor."""

    dims: tuple[Dim, ...] = ()
    offset: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return tuple(dim.size for dim in self.dims)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Orientation:
    """Which axes of a tensor are units, and how many of its entries make one output.

    Args:
        output: axis of the units that a tensor writes to; None for none.
        input: axis of the units that it reads, or of the positions of a table; None for none.
        fan_in: number of entries that are summed for one output, kernel positions included; 1 where none are, as
            in an embedding.
    """

    output: int | None
    input: int | None
    fan_in: int = 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The shape of one tensor and the cells that partition it.

    Args:
        shape: as in the ``state_dict``.
        cells: disjoint, and together the whole tensor.
        kind: ``"parameter"``, or ``"statistic"`` for what moves with its group though it is not trained
            (BatchNorm's running mean).
        aliases: other names under which the same tensor is stored (tied weights).
        orientation: where it is not the usual one; see :attr:`units`.
    """

    shape: tuple[int, ...]
    cells: tuple[Cell, ...]
    kind: TensorKind = "parameter"
    aliases: tuple[str, ...] = ()
    orientation: Orientation | None = None

    @classmethod
    def dense(
        cls, shape: Sequence[int], groups: Sequence[str | None], kind: TensorKind = "parameter"
    ) -> TensorSpec:
        """One cell with one dim per axis; fixed axes of size 1 carry no dim.

        Example:
            >>> TensorSpec.dense((4, 1), ["hidden0", None]).cells[0].dims
            (Dim(axis=0, stride=1, size=4, group='hidden0', parents=()),)
        """
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        dims = [
            Dim(axis, stride, size, group)
            for axis, (stride, size, group) in enumerate(zip(strides, shape, groups, strict=True))
            if group is not None or size > 1
        ]
        return cls(tuple(shape), (Cell(tuple(dims)),), kind)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def units(self) -> Orientation:
        """Its orientation; by default output units on axis 0, input units on axis 1 and kernels after them.

        Example:
            >>> TensorSpec.dense((8, 3, 5, 5), [None] * 4).units
            Orientation(output=0, input=1, fan_in=75)
        """
        if self.orientation is not None:
            return self.orientation
        rank = len(self.shape)
        return Orientation(0 if rank else None, 1 if rank > 1 else None, max(math.prod(self.shape[1:]), 1))


@dataclass(frozen=True, slots=True)
class Exponent:
    """The power with which a scaling multiplies along one dim of one cell of one tensor."""

    tensor: str
    cell: int
    dim: int
    power: int = 1


@dataclass(frozen=True, slots=True)
class Scaling:
    """A symmetry that multiplies (and, for phase, shifts) what enters and leaves the units of a group.

    One value per unit: ``c > 0`` for ``"positive"``, ``s`` in {-1, 1} for ``"sign"``, an integer ``k`` for
    ``"phase"``. Along each dim in ``exponents`` the tensor is multiplied by ``c^power``, ``s^power`` or
    ``(-1)^(k power)``; along each dim in ``shifts`` ``k power shift`` is added, where ``shift`` is ``pi / w0``
    for ``sin(w0 (W x + b))``.

    Args:
        name: unique among groups and scalings.
        group: the group whose units it scales.
        kind: ``"positive"``, ``"sign"`` or ``"phase"``.
        exponents: where it multiplies.
        shifts: where it adds (phase only).
        shift: what one step of ``k`` adds (phase only).
    """

    name: str
    group: str
    kind: ScalingKind
    exponents: tuple[Exponent, ...]
    shifts: tuple[Exponent, ...] = ()
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a spec was found, for whoever reads it; no part of what it says.

    Args:
        inputs: the example inputs of each traced call, as text: ``"float32[2, 3, 32, 32]"``.
        pinned: per tensor, a text per axis: why units on it cannot be permuted, ``""`` where they can.
        verified_change: worst relative change of the output that was measured; None if it was not.
    """

    inputs: tuple[str, ...] = ()
    pinned: Frozen[tuple[str, ...]] = field(default_factory=Frozen)
    verified_change: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class WeightSpec:
    """What a weight space is: which axes of which tensors move together, and how they scale.

    Args:
        groups: the groups of units, in the order of the forward pass.
        tensors: every tensor that is trained or estimated, under its ``state_dict`` name, in the order in which
            they are flattened.
        scalings: continuous, sign and phase symmetries.
        constants: shapes of the other tensors of the ``state_dict``, which never move (position indices, counts
            of batches); they are no part of a flattened network.
        provenance: how the spec was found; ignored when specs are compared.

    Raises:
        SpecError: the parts contradict each other (unknown group, wrong size, overlapping cells, ...).

    Example:
        >>> spec = WeightSpec.mlp([2, 4, 1], activation="tanh")
        >>> spec
        WeightSpec: 4 tensors, 17 parameters
          hidden0: 4 units, tanh, sign
          layers.0.weight [hidden0, 2]
          layers.0.bias   [hidden0]
          layers.1.weight [hidden0]
          layers.1.bias   []
    """

    groups: Frozen[Group]
    tensors: Frozen[TensorSpec]
    scalings: Frozen[Scaling] = field(default_factory=Frozen)
    constants: Frozen[tuple[int, ...]] = field(default_factory=Frozen)
    provenance: Provenance = field(default_factory=Provenance, compare=False)

    def __post_init__(self) -> None:
        from weightspace.spec._validate import validate

        validate(self)

    @classmethod
    def build(
        cls,
        groups: Iterable[Group],
        tensors: Mapping[str, TensorSpec],
        scalings: Iterable[Scaling] = (),
        constants: Mapping[str, Sequence[int]] | None = None,
        provenance: Provenance | None = None,
    ) -> WeightSpec:
        """A spec from plain lists and a dict, in the order of the forward pass.

        Example:
            >>> channels = Group("channels", 8)
            >>> WeightSpec.build([channels], {"norm.weight": TensorSpec.dense((8,), ["channels"])})
            WeightSpec: 1 tensors, 8 parameters
              channels: 8 units
              norm.weight [channels]
        """
        fixed = Frozen({name: tuple(shape) for name, shape in (constants or {}).items()})
        return cls(
            Frozen(_by_name(groups)),
            Frozen(dict(tensors)),
            Frozen(_by_name(scalings)),
            fixed,
            provenance or Provenance(),
        )

    @classmethod
    def trace(
        cls,
        module: torch.nn.Module,
        example_inputs: Tensor | tuple[Any, ...] | dict[str, Any],
        *,
        more_inputs: Sequence[Tensor | tuple[Any, ...] | dict[str, Any]] = (),
        outputs: str | Sequence[str | int] | None = None,
        verify: bool = True,
    ) -> WeightSpec:
        """Derive the spec of any module; see :func:`weightspace.spec.trace`.

        It has no groups of a single unit: an axis of size 1 cannot be told from none. :meth:`mlp` has them, for
        their scalings.
        """
        from weightspace.spec.tracing import trace

        return trace(module, example_inputs, more_inputs=more_inputs, outputs=outputs, verify=verify)

    @classmethod
    def mlp(
        cls,
        widths: Sequence[int],
        activation: str = "relu",
        w0: float = 1.0,
        layers: Sequence[str] | None = None,
        bias: bool = True,
    ) -> WeightSpec:
        """The spec of a multilayer perceptron; see :func:`weightspace.spec.mlp_spec`.

        A hidden layer of one unit is a group too, unlike in a spec that :meth:`trace` derives.
        """
        from weightspace.spec._builders import mlp_spec

        return mlp_spec(widths, activation=activation, w0=w0, layers=layers, bias=bias)

    def primary(self, name: str) -> str | None:
        """The tensor that is stored under ``name``, which may be an alias of a tied one; None for constants.

        Raises:
            SpecError: the spec has no such tensor.
        """
        if name in self.tensors:
            return name
        if name in self.constants:
            return None
        tied = (first for first, tensor in self.tensors.items() if name in tensor.aliases)
        found = next(tied, None)
        if found is None:
            known = [*self.tensors, *self.constants]
            listed = ", ".join(known[:8]) + (f", ... ({len(known)} in all)" if len(known) > 8 else "")
            raise SpecError(f"weights: unknown tensor {name!r}; expected {listed}")
        return found

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of one network's tensor of that name.

        Raises:
            SpecError: the spec has no such tensor.
        """
        found = self.primary(name)
        return self.constants[name] if found is None else self.tensors[found].shape

    def unit_shape(self, group: str) -> tuple[int, ...]:
        """The shape of one value per unit of a group, as in an element: the sizes of its outer groups, then its own."""
        from weightspace.spec._cells import value_shape

        return value_shape(self, self.groups[group])

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors: the length P of a flattened network."""
        return sum(_parts(self)[0])

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The kinds of symmetry that this weight space has."""
        kinds = {scaling.kind for scaling in self.scalings.values()}
        return tuple(name for name in SYMMETRIES if (self.groups if name == "permutation" else name in kinds))

    # -- weights as one vector -----------------------------------------------------------------------------

    def flatten(self, weights: Mapping[str, Tensor]) -> Shaped[Tensor, "*batch parameters"]:
        """Concatenate the tensors in spec order to ``(*batch, P)``, each under its own name or one it is tied to.

        Raises:
            SpecError: a tensor is missing, unknown, or of the wrong shape.
        """
        batch = self.batch_shape(weights)
        names = {name: (name, *tensor.aliases) for name, tensor in self.tensors.items()}
        stored = {name: next((at for at in tied if at in weights), None) for name, tied in names.items()}
        missing = [name for name, at in stored.items() if at is None]
        if missing:
            raise SpecError(f"weights: tensor {missing[0]!r} is missing")
        return torch.cat(
            [weights[at].reshape(*batch, self.tensors[name].numel) for name, at in stored.items() if at],
            dim=-1,
        )

    def unflatten(self, flat: Shaped[Tensor, "*batch parameters"]) -> Weights:
        """Views of ``flat`` (..., P) as a dict of tensors (the inverse of :meth:`flatten`).

        Raises:
            SpecError: the last axis is not P.
        """
        if flat.shape[-1] != self.num_parameters:
            raise SpecError(
                f"flat weights: expected {self.num_parameters} parameters on the last axis, found {flat.shape[-1]}"
            )
        sizes, shapes = _parts(self)
        batch = flat.shape[:-1]
        # a slice of a flattened batch is not contiguous, but its last axis alone can be split in place
        return {
            name: part.view(*batch, *shape)
            for (name, shape), part in zip(shapes.items(), flat.split(sizes, dim=-1), strict=True)
        }

    def batch_shape(self, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The common leading batch axes of ``weights``.

        Raises:
            SpecError: what is no tensor, is unknown, has the wrong shape, or another batch shape than the first.
        """
        from weightspace.spec._arguments import batch_of

        return batch_of(self, weights)

    # -- the group -----------------------------------------------------------------------------------------

    def identity(self, *, dtype: torch.dtype | None = None) -> Element:
        """The element that changes nothing; see :func:`weightspace.spec.identity`."""
        from weightspace.spec._elements import identity

        return identity(self, dtype=dtype)

    def random_element(
        self,
        batch: Sequence[int] = (),
        symmetries: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Element:
        """Draw elements; see :func:`weightspace.spec.random_element`."""
        from weightspace.spec._elements import random_element

        return random_element(
            self, batch, symmetries=symmetries, generator=generator, device=device, dtype=dtype
        )

    def act(self, element: Element, weights: Mapping[str, Tensor]) -> Weights:
        """The network with its units reordered and rescaled; see :func:`weightspace.spec.act`."""
        from weightspace.spec._elements import act

        return act(self, element, weights)

    def compose(self, second: Element, first: Element) -> Element:
        """The element that acts as ``first`` and then ``second``; see :func:`weightspace.spec.compose`."""
        from weightspace.spec._elements import compose

        return compose(self, second, first)

    def invert(self, element: Element) -> Element:
        """The element that undoes ``element``; see :func:`weightspace.spec.invert`."""
        from weightspace.spec._elements import invert

        return invert(self, element)

    def canonicalize(self, weights: Mapping[str, Tensor]) -> tuple[Weights, Element]:
        """The representative of the networks' orbits; see :func:`weightspace.spec.canonicalize`."""
        from weightspace.spec._canonical import canonicalize

        return canonicalize(self, weights)

    def verify(
        self, module: torch.nn.Module, inputs: Float[Tensor, "..."] | tuple[Any, ...], **options: Any
    ) -> VerifyReport:
        """Check on ``module`` itself that the symmetries hold; see :func:`weightspace.spec.verify`."""
        from weightspace.spec._verify import verify

        return verify(self, module, inputs, **options)

    # -- text ----------------------------------------------------------------------------------------------

    def to_json(self, *, provenance: bool = True) -> str:
        """One line of JSON from which :meth:`from_json` builds an equal spec, with or without its provenance."""
        document: dict[str, Any] = {
            "groups": [asdict(group) for group in self.groups.values()],
            "tensors": {name: _tensor_entry(tensor) for name, tensor in self.tensors.items()},
            "scalings": [asdict(scaling) for scaling in self.scalings.values()],
        }
        if self.constants:
            document["constants"] = dict(self.constants)
        if provenance and self.provenance != Provenance():
            document["provenance"] = {
                "inputs": self.provenance.inputs,
                "pinned": dict(self.provenance.pinned),
                "verified_change": self.provenance.verified_change,
            }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> WeightSpec:
        """Parse what :meth:`to_json` wrote.

        Raises:
            SpecError: the text is not JSON, or not a consistent spec.
        """
        try:
            document = json.loads(text)
            groups = [Group(**{**group, "within": tuple(group["within"])}) for group in document["groups"]]
            tensors = {name: _tensor_from(entry) for name, entry in document["tensors"].items()}
            scalings = [_scaling_from(entry) for entry in document["scalings"]]
            constants = document.get("constants", {})
            provenance = _provenance_from(document.get("provenance", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpecError(
                f"spec: not a weight-space description ({type(error).__name__}: {error})"
            ) from None
        return cls.build(groups, tensors, scalings, constants, provenance)

    def __repr__(self) -> str:
        lines = [f"WeightSpec: {len(self.tensors)} tensors, {self.num_parameters:,} parameters"]
        for group in self.groups.values():
            counts = Counter(
                scaling.kind for scaling in self.scalings.values() if scaling.group == group.name
            )
            kinds = [kind if count == 1 else f"{kind} x {count}" for kind, count in counts.items()]
            within = [f"within {', '.join(group.within)}"] if group.within else []
            activation = [group.activation] if group.activation else []
            lines.append(
                "  " + ", ".join([f"{group.name}: {group.size} units", *within, *activation, *kinds])
            )
        width = max((len(name) for name in self.tensors), default=0)
        for name, tensor in self.tensors.items():
            cells = " + ".join(_cell_text(cell) for cell in tensor.cells)
            lines.append(f"  {name:<{width}} {cells}")
        return "\n".join(lines)


@lru_cache(maxsize=64)  # every batch is split
def _parts(spec: WeightSpec) -> tuple[list[int], dict[str, tuple[int, ...]]]:
    """The sizes of all tensors, and their shapes."""
    tensors = spec.tensors.items()
    return [tensor.numel for _, tensor in tensors], {name: tensor.shape for name, tensor in tensors}


def _by_name(things: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for thing in things:
        if thing.name in found:
            raise SpecError(f"spec: two groups or scalings are called {thing.name!r}")
        found[thing.name] = thing
    return found


def _cell_text(cell: Cell) -> str:
    return "[" + ", ".join(str(dim.size) if dim.group is None else dim.group for dim in cell.dims) + "]"


def _tensor_entry(tensor: TensorSpec) -> dict[str, Any]:
    entry = asdict(tensor)
    if tensor.orientation is None:
        del entry["orientation"]
    return entry


def _tensor_from(entry: dict[str, Any]) -> TensorSpec:
    cells = [
        Cell(tuple(Dim(**{**dim, "parents": tuple(dim["parents"])}) for dim in cell["dims"]), cell["offset"])
        for cell in entry["cells"]
    ]
    orientation = Orientation(**entry["orientation"]) if "orientation" in entry else None
    return TensorSpec(
        tuple(entry["shape"]), tuple(cells), entry["kind"], tuple(entry["aliases"]), orientation
    )


def _scaling_from(entry: dict[str, Any]) -> Scaling:
    places = {key: tuple(Exponent(**place) for place in entry[key]) for key in ("exponents", "shifts")}
    return Scaling(entry["name"], entry["group"], entry["kind"], shift=entry["shift"], **places)


def _provenance_from(entry: dict[str, Any]) -> Provenance:
    pinned = Frozen({name: tuple(reasons) for name, reasons in entry.get("pinned", {}).items()})
    return Provenance(tuple(entry.get("inputs", ())), pinned, entry.get("verified_change"))


def cell_index(cell: Cell) -> np.ndarray:
    """Positions of the cell's elements in the flattened tensor, shape ``cell.sizes``, int64."""
    index = np.full(cell.sizes, cell.offset, dtype=np.int64)
    for position, dim in enumerate(cell.dims):
        shape = [1] * len(cell.dims)
        shape[position] = dim.size
        index += (np.arange(dim.size) * dim.stride).reshape(shape)
    return index
