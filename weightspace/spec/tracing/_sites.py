"""Which values of a graph show the units of a spec's groups, and where in them the units lie.

The labels of the parameters are those of the given spec instead of free ones, so that its groups keep their names; a
spec that the operators restrict further is none of this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, fx

from weightspace.errors import SpecError, SpecWarning
from weightspace.spec._cells import cell_view, value_shape
from weightspace.spec._types import Cell, Dim, TensorSpec, WeightSpec
from weightspace.spec.tracing import rules  # noqa: F401  registers the rules
from weightspace.spec.tracing._atoms import Atoms
from weightspace.spec.tracing._groups import fuse, settle
from weightspace.spec.tracing._labels import Box, Index, Label, row_major
from weightspace.spec.tracing._program import Program, operator_name
from weightspace.spec.tracing._trace import Trace

# They sum over units, or over pairs of them: what enters them is what units say to others.
_PRODUCTS = {
    *("linear", "mm", "bmm", "mv", "dot", "matmul", "addmm", "baddbmm", "einsum", "bilinear", "_trilinear"),
    *("gru", "lstm", "rnn_tanh", "rnn_relu"),
}
_PRODUCT_FAMILIES = ("conv", "scaled_dot_product", "_scaled_dot_product")
# Their value holds the same numbers as their operand; `expand` repeats them.
_REARRANGE = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "t", "numpy_T", "transpose", "permute"),
    *("unsqueeze", "squeeze", "alias", "clone", "detach", "contiguous", "_to_copy", "lift_fresh_copy"),
}


@dataclass(frozen=True)
class Site:
    """A value of a graph that shows the units of a group.

    Args:
        group: name of the group.
        node: name of the value in the graph.
        place: which part of the value, where it is a concatenation.
        cell: that part, in elements of the flattened value; dims of other groups than those of ``units`` are foreign.
        units: positions of the cell's dims that are the outer groups' units, outermost first, and then the group's.
        shape: of one number per unit.
    """

    group: str
    node: str
    place: int
    cell: Cell = field(repr=False)
    units: tuple[int, ...] = field(repr=False)
    shape: tuple[int, ...] = field(repr=False)

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies it among the sites of one module, whatever the size of the batch."""
        return self.group, self.node, self.place

    def read(self, value: Tensor) -> Shaped[Tensor, "*units samples"]:
        """The units of a value, and for each its samples: items, positions, whatever else the value runs over.

        Over units of other groups the mean is taken, as their order means nothing.
        """
        part = cell_view(value.reshape(-1), self.cell)
        foreign = [
            at for at, dim in enumerate(self.cell.dims) if dim.group is not None and at not in self.units
        ]
        samples = [at for at in range(part.ndim) if at not in self.units and at not in foreign]
        part = part.permute(*self.units, *samples, *foreign)
        if foreign:
            part = part.flatten(len(self.units) + len(samples)).mean(-1)
        return part.reshape(*self.shape, -1)


def find_sites(
    spec: WeightSpec, program: Program, name: str, everywhere: Collection[str] = ()
) -> tuple[Site, ...]:
    """The values that show each group, in the order of the graph.

    A value counts where other layers read it, as an operand of a product; for groups that meet none, where an operator
    leaves its units out, as a mean over them does; and for others wherever they are seen. For a hidden layer that is
    what follows the activation, for a residual stream every value that a layer reads, for attention the queries, keys
    and values of each head.

    Args:
        spec: a weight space of the module; its group names are kept.
        program: the module's graph.
        name: of the module, for messages.
        everywhere: groups of which every value counts that carries them, such as what enters an activation.

    Raises:
        SpecError: the spec lacks a tensor that the module uses, or gives it another shape, or the module does not
            have these groups.
    """
    seeded = _Seeded(spec, program, name)
    holders = {node: seeded.boxes(node) for node in program.nodes if node in seeded.moved}
    groups = {node: _named(boxes) for node, boxes in holders.items()}
    wanted: dict[fx.Node, set[str]] = {}
    shown: set[str] = set()
    for rule in (_multiplied, _left_out, _carried):
        found = {node: rule(node, groups) - shown - set(everywhere) for node in groups}
        if rule is _carried:
            found = {node: names | groups[node] & set(everywhere) for node, names in found.items()}
        for node, names in found.items():
            if names:
                wanted.setdefault(_root(node, groups), set()).update(names)
        shown |= {name for names in found.values() for name in names}
    return tuple(
        site
        for node in program.nodes
        if node in wanted
        for site in _sites(spec, node, holders[node], wanted[node])
    )


@dataclass(frozen=True)
class _Named:
    """A box of a label, with the name of the group of each of its indices (None for fixed ones)."""

    box: Box
    groups: tuple[str | None, ...]
    sizes: tuple[int, ...]


class _Seeded:
    """A trace whose parameters have the labels of a spec."""

    def __init__(self, spec: WeightSpec, program: Program, name: str) -> None:
        self.spec, self.module = spec, name
        self.atoms = Atoms()
        self.numbers: dict[str, int] = {}
        for group in sorted(spec.groups.values(), key=lambda group: len(group.within)):
            if group.size > 1:  # one unit has no index
                outer = {self.numbers[at] for at in group.within if at in self.numbers}
                self.numbers[group.name] = self.atoms.fresh(group.size, outer)
        used = {node.name: program.names[node.name] for node in program.nodes if node.name in program.names}
        shapes = {
            used[node.name]: tuple(node.meta["val"].shape) for node in program.nodes if node.name in used
        }
        self.trace = Trace(self.atoms, {tensor: self._label(tensor, shapes[tensor]) for tensor in shapes})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpecWarning)  # said when the spec was traced
            # what is returned need not be fixed: only what the values inside are counts
            self.values = self.trace.run(replace(program, outputs=()))
            settle(self.trace)
        fuse(self.atoms, self.trace.parameters)
        self.names = {self._survivor(group): group for group in self.numbers}
        self.moved = _moved(program)

    def _label(self, name: str, shape: tuple[int, ...]) -> Label:
        known = (*self.spec.tensors, *self.spec.constants, *self._aliases())
        if name not in known:
            raise SpecError(f"spec: it has no tensor {name!r}, which {self.module} uses")
        primary = self.spec.primary(name)
        expected = self.spec.shape_of(name)
        if expected != shape:
            raise SpecError(
                f"spec: {name!r} of {self.module} should have shape {list(expected)}, found {list(shape)}"
            )
        if primary is None:
            return Label(shape, (Box((0,) * len(shape), self._fixed(shape)),))
        return Label(
            shape, tuple(self._box(self.spec.tensors[primary], cell) for cell in self._cells(primary))
        )

    def _aliases(self) -> Iterator[str]:
        return (alias for tensor in self.spec.tensors.values() for alias in tensor.aliases)

    def _cells(self, name: str) -> tuple[Cell, ...]:
        return self.spec.tensors[name].cells

    def _fixed(self, shape: Sequence[int]) -> tuple[Index, ...]:
        return tuple(
            Index(axis, 1, self.atoms.fresh(size, (), "fixed by the spec"))
            for axis, size in enumerate(shape)
            if size > 1
        )

    def _box(self, tensor: TensorSpec, cell: Cell) -> Box:
        scale = row_major(tensor.shape)
        offsets = tuple(cell.offset // step % size for step, size in zip(scale, tensor.shape, strict=True))
        indices = [
            Index(dim.axis, dim.stride // scale[dim.axis], self._number(dim))
            for dim in cell.dims
            if dim.size > 1
        ]
        return Box(offsets, tuple(sorted(indices, key=lambda index: (index.axis, -index.stride))))

    def _number(self, dim: Dim) -> int:
        if dim.group is None:
            return self.atoms.fresh(dim.size, (), "fixed by the spec")
        return self.numbers[dim.group]

    def _survivor(self, group: str) -> int:
        """The one atom that a group still is.

        Raises:
            SpecError: its units may not all move, or not as the spec says.
        """
        leaves = self.atoms.leaves(self.numbers[group])
        reason = next((self.atoms[leaf].pinned for leaf in leaves if self.atoms[leaf].pinned), None)
        found = {self.atoms.final(leaf) for leaf in leaves}
        final = found.pop()
        if reason is None and not found and self.atoms[final].size == self.spec.groups[group].size:
            within = self.spec.groups[group].within
            outer = {self.atoms.final(self.numbers[at]) for at in within if at in self.numbers}
            if {self.atoms.final(parent) for parent in self.atoms[final].parents} == outer:
                return final
        why = reason or "its units do not all move alike there"
        raise SpecError(f"spec: group {group!r} is none of {self.module}: {why}")

    def boxes(self, node: fx.Node) -> list[_Named]:
        """Of the label of a value, with the names of this spec; none where it is several values, or whole numbers."""
        label, value = self.values[node.name], node.meta.get("val")
        if not isinstance(label, Label) or not isinstance(value, Tensor) or not value.is_floating_point():
            return []
        return [self._joined(box) for box in self.trace.resolve(label).boxes]

    def _joined(self, box: Box) -> _Named:
        """The box with one index where several that were fused stand side by side; apart they have no name."""
        indices: list[Index] = []
        names: list[str | None] = []
        left = list(box.indices)
        while left:
            index = left.pop(0)
            final = self.atoms.final(index.atom)
            parts = self.atoms.constituents(final)
            run = [index, *left[: len(parts) - 1]]
            whole = [part.atom for part in run] == parts and self._adjacent(run)
            if whole and len(parts) > 1:
                del left[: len(parts) - 1]
                index = run[-1]._replace(atom=final)
            indices.append(index)
            known = self.names.get(final, "") if whole else ""
            names.append(known if self.atoms.is_live(index.atom) else None)
        sizes = tuple(self.atoms[index.atom].size for index in indices)
        return _Named(box._replace(indices=tuple(indices)), tuple(names), sizes)

    def _adjacent(self, run: Sequence[Index]) -> bool:
        return all(
            one.axis == other.axis and one.stride == other.stride * self.atoms[other.atom].size
            for one, other in pairwise(run)
        )


def _moved(program: Program) -> set[fx.Node]:
    """The nodes whose values depend on the arguments of the call."""
    moved: set[fx.Node] = set()
    for node in program.nodes:
        if node.name in program.inputs or not moved.isdisjoint(node.all_input_nodes):
            moved.add(node)
    return moved


def _named(boxes: Sequence[_Named]) -> set[str]:
    return {name for box in boxes for name in box.groups if name}


def _multiplied(node: fx.Node, groups: Mapping[fx.Node, set[str]]) -> set[str]:
    """The groups of a value that enters a product."""
    names = map(operator_name, node.users)
    return groups[node] if any(n in _PRODUCTS or n.startswith(_PRODUCT_FAMILIES) for n in names) else set()


def _left_out(node: fx.Node, groups: Mapping[fx.Node, set[str]]) -> set[str]:
    """The groups of a value that an operator reads and does not pass on."""
    readers = (user for user in node.users if user in groups and _is_value(user))
    return {name for user in readers for name in groups[node] - groups[user]}


def _carried(node: fx.Node, groups: Mapping[fx.Node, set[str]]) -> set[str]:
    return groups[node]


def _is_value(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _root(node: fx.Node, groups: Mapping[fx.Node, set[str]]) -> fx.Node:
    """The first value that holds the same numbers, so that none counts twice because it was reshaped twice."""
    while operator_name(node) in _REARRANGE:
        source = node.all_input_nodes[0]
        if groups.get(source) != groups[node] or not _is_value(source):
            break
        node = source
    return node


def _sites(spec: WeightSpec, node: fx.Node, boxes: Sequence[_Named], wanted: set[str]) -> Iterator[Site]:
    scale = row_major(node.meta["val"].shape)
    for place, named in enumerate(boxes):
        for at, group in enumerate(named.groups):
            if not group or not wanted & {group, *spec.groups[group].within}:
                continue
            units = _bound(spec, named, at)
            if units is not None and not _has_inner(spec, named, group):
                cell = _cell(named, scale)
                yield Site(group, node.name, place, cell, units, value_shape(spec, spec.groups[group]))


def _has_inner(spec: WeightSpec, named: _Named, group: str) -> bool:
    return any(other and group in spec.groups[other].within for other in named.groups)


def _bound(spec: WeightSpec, named: _Named, at: int) -> tuple[int, ...] | None:
    """Where the outer units of an index stand, and where it stands; None if that is ambiguous."""
    group = named.groups[at]
    assert group is not None
    found = []
    for outer in (*spec.groups[group].within, group):
        places = [place for place, name in enumerate(named.groups) if name == outer]
        if len(places) > 1 or (not places and spec.groups[outer].size > 1):
            return None
        found += places
    return tuple(found)


def _cell(named: _Named, scale: Sequence[int]) -> Cell:
    dims = tuple(
        Dim(index.axis, index.stride * scale[index.axis], size, group)
        for index, size, group in zip(named.box.indices, named.sizes, named.groups, strict=True)
    )
    return Cell(dims, sum(at * step for at, step in zip(named.box.offsets, scale, strict=True)))
