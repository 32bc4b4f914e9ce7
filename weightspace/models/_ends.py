"""Ends of a network as groups: input and output units, and other fixed indices that are too many to fold.

Nothing may permute these units without changing the function. A layer may all the same treat them alike, as it
does hidden units, when their positions are encoded in the features: fewer parameters, shared by all units, and
no limit to how many there are (NFN-NP of Zhou et al. 2023, arXiv:2302.14040, section 3).
"""

from __future__ import annotations

from dataclasses import replace

from weightspace.spec import Cell, Dim, Frozen, Group, TensorSpec, WeightSpec

UNIT_AXES = (0, 1)  # output units and input units of a weight; kernels come after them


def free_ends(
    spec: WeightSpec, *, units: bool = True, wide: int | None = None
) -> tuple[WeightSpec, tuple[str, ...]]:
    """The spec with fixed indices as groups ``end0``, ``end1``, ...; and the names of these.

    Input and output units are the fixed indices that are the whole first or second axis of a tensor. The tensors
    of one module share those of their first axis (weight and bias); all others have groups of their own.

    Args:
        spec: any weight space.
        units: whether input and output units become groups.
        wide: other fixed indices become groups if there are more than that many; None for none of them.

    Example:
        >>> freed, ends = free_ends(WeightSpec.mlp([2, 32, 10]))
        >>> ends
        ('end0', 'end1')
        >>> freed.tensors["layers.1.bias"].cells[0].dims[0].group
        'end1'
    """
    ends: dict[object, Group] = {}

    def end(name: str, tensor: TensorSpec, place: int, at: int, dim: Dim) -> Dim:
        is_unit = dim.axis in UNIT_AXES and dim.size == tensor.shape[dim.axis]
        is_wide = wide is not None and dim.size > wide
        if dim.group is not None or not (is_wide or (units and is_unit)):
            return dim
        module = name.rpartition(".")[0]
        key: object = (module, dim.size) if is_unit and dim.axis == 0 else (name, place, at)
        return replace(dim, group=ends.setdefault(key, Group(f"end{len(ends)}", dim.size)).name)

    tensors = {
        name: replace(
            tensor,
            cells=tuple(
                Cell(
                    tuple(end(name, tensor, place, at, dim) for at, dim in enumerate(cell.dims)), cell.offset
                )
                for place, cell in enumerate(tensor.cells)
            ),
        )
        for name, tensor in spec.tensors.items()
    }
    groups = {**spec.groups, **{group.name: group for group in ends.values()}}
    freed = replace(spec, groups=Frozen(groups), tensors=Frozen(tensors), scalings=Frozen())
    return freed, tuple(group.name for group in ends.values())
