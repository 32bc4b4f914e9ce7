"""A spec as text to read: its groups, its tensors, and why what is fixed cannot move."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence

from weightspace.spec._diagram import nested_order, notes_of, rows_of, size_text
from weightspace.spec._types import WeightSpec

MOST_NAMES = 12  # of what one reason fixes that are listed
_INDEX = re.compile(r"(?<=\.)\d+\b|\b\d+(?=\.)")  # of a module in a list


def describe(spec: WeightSpec, *, width: int = 100) -> str:
    """The groups, the tensors and the fixed axes of a spec, as lines for a terminal.

    Neighbouring tensors of one module with equal axes share a line, and so do axes that are fixed for the same
    reason. Where names differ in numbers alone (``layers.0``, ``layers.1``, ...) the numbers become ``*``.

    Args:
        spec: what to describe; why an axis is fixed stands in its ``provenance``.
        width: columns at which lists of names are broken.

    Example:
        >>> print(describe(WeightSpec.mlp([2, 4, 1], activation="tanh")))
        4 tensors, 17 parameters, 1 group
        <BLANKLINE>
        groups
          hidden0  4 units, tanh, sign flip
        <BLANKLINE>
        tensors
          layers.0.weight  [hidden0, 2]
          layers.0.bias    [hidden0]
          layers.1.weight  [1, hidden0]
          layers.1.bias    [1]
    """
    parts = [list(_summary(spec)), _groups(spec), _tensors(spec), list(_fixed(spec, width))]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _summary(spec: WeightSpec) -> Iterator[str]:
    groups = "1 group" if len(spec.groups) == 1 else f"{len(spec.groups)} groups"
    yield f"{len(spec.tensors)} tensors, {spec.num_parameters:,} parameters, {groups}"
    provenance = spec.provenance
    if provenance.inputs:
        yield f"traced with {'; '.join(provenance.inputs)}"
    if provenance.verified_change is not None:
        yield f"verified: the output changed by {provenance.verified_change:.1e} of its largest value, at most"
    elif provenance.inputs:
        yield "not verified"


def _groups(spec: WeightSpec) -> list[str]:
    names = [(f"{'  ' * depth}{name}", name) for name, depth in nested_order(spec)]
    return _table(
        "groups", [(shown, ", ".join([size_text(spec, n), *notes_of(spec, n)])) for shown, n in names]
    )


def _tensors(spec: WeightSpec) -> list[str]:
    rows = []
    for row in rows_of(spec):
        tied = f"  (tied: {', '.join(row.tied)})" if row.tied else ""
        rows.append((row.label, row.text + tied))
    return _table("tensors", [*rows, *_constants(spec)])


def _constants(spec: WeightSpec) -> Iterator[tuple[str, str]]:
    """Those of many modules that have the same name and shape share a line."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in spec.constants.items():
        alike[name.rpartition(".")[2], shape].append(name)
    for (leaf, shape), names in alike.items():
        shown = names[0] if len(names) == 1 else f"*.{leaf} ({len(names)} tensors)"
        yield shown, f"{list(shape)}  (constant)"


def _table(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [title, *(f"  {name:<{width}}  {text}" for name, text in rows)] if rows else []


# -- why what is fixed cannot move -------------------------------------------------------------------------


def _fixed(spec: WeightSpec, width: int) -> Iterator[str]:
    """By reason: the tensors and axes that it fixes."""
    found = _by_reason(spec)
    if found:
        yield "fixed axes, by what fixes them"
    for reason, names in found.items():
        yield f"  {reason}"
        hidden = len(names) - MOST_NAMES
        shown = [*names[:MOST_NAMES], f"… {hidden} more"] if hidden > 1 else names
        text = "; ".join(name.replace(" ", "\0") for name in shown)  # a name stays with its axes
        lines = textwrap.wrap(text, width - 4, break_long_words=False, break_on_hyphens=False)
        yield from (f"    {line}".replace("\0", " ") for line in lines)


def _by_reason(spec: WeightSpec) -> dict[str, list[str]]:
    """For every reason the tensors and axes; what differs in the indices of modules alone is one entry."""
    found: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, str]]] = defaultdict(list)
    for tensor, reasons in spec.provenance.pinned.items():
        for reason in dict.fromkeys(filter(None, reasons)):
            axes = tuple(axis for axis, other in enumerate(reasons) if other == reason)
            found[_INDEX.sub("*", reason), _INDEX.sub("*", tensor), axes].append((reason, tensor))
    originals: dict[str, set[str]] = defaultdict(set)
    for (pattern, _, _), entries in found.items():
        originals[pattern].update(reason for reason, _ in entries)
    lines: dict[str, list[str]] = defaultdict(list)
    for (pattern, tensors, axes), entries in found.items():
        shown = pattern if len(originals[pattern]) > 1 else entries[0][0]
        name = f"{tensors} ({len(entries)} tensors)" if len(entries) > 1 else entries[0][1]
        listed = f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"
        lines[shown].append(f"{name} {listed}")
    return lines
