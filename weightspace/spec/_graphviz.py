"""A spec as Graphviz text."""

from __future__ import annotations

from collections.abc import Iterator

from weightspace.spec._diagram import Row, colours_of, ink_on, notes_of, outer_of, rows_of, size_text
from weightspace.spec._types import WeightSpec

_HEAD = """graph weightspace {
  rankdir=LR; ranksep=0.9; nodesep=0.12;
  node [fontname="Helvetica", fontsize=10, margin="0.12,0.05"];
  edge [fontname="Helvetica", fontsize=8, penwidth=1.4];"""


def to_graphviz(spec: WeightSpec) -> str:
    r"""The groups and the tensors of a spec as a bipartite graph, in Graphviz' DOT language.

    Groups are coloured nodes with their size, activation and scalings; nested groups share a box with the group
    that they lie within. Tensors are boxes with their cells, fixed axes as numbers; neighbours of one module with
    equal axes share a box. An edge carries the axis of the tensor and the colour of the group.

    Example:
        >>> text = to_graphviz(WeightSpec.mlp([2, 4, 1], activation="tanh"))
        >>> print(text.splitlines()[-3])
          "group hidden0" -- "layers.0.bias" [label="0", color="#0072B2"];
    """
    colours = colours_of(spec)
    groups = [
        line for name in spec.groups if outer_of(spec, name) is None for line in _group(spec, name, colours)
    ]
    rows = rows_of(spec)
    tensors = [f"{_quoted(row.label)} [label={_quoted(_text(row))}, shape=box];" for row in rows]
    edges = list(_edges(rows, colours))
    return "\n".join([_HEAD, *(f"  {line}" for line in [*groups, *tensors, *edges]), "}\n"])


def _group(spec: WeightSpec, name: str, colours: dict[str, str]) -> Iterator[str]:
    """The node of a group; with those within it in a box of their own."""
    label = "\n".join(filter(None, (name, size_text(spec, name), ", ".join(notes_of(spec, name)))))
    node = (
        f"{_quoted(f'group {name}')} [label={_quoted(label)}, shape=box, style="
        f'"rounded,filled", fillcolor="{colours[name]}", fontcolor="{ink_on(colours[name])}"];'
    )
    inner = [
        line
        for other in spec.groups
        if outer_of(spec, other) == name
        for line in _group(spec, other, colours)
    ]
    if not inner:
        yield node
        return
    yield f"subgraph {_quoted(f'cluster {name}')} {{"
    yield f'  style="rounded,filled"; color="{colours[name]}"; fillcolor="{colours[name]}22";'
    yield from (f"  {line}" for line in [node, *inner])
    yield "}"


def _edges(rows: list[Row], colours: dict[str, str]) -> Iterator[str]:
    """The tensor that names a group first stands before it, all others after: so the ranks go forward."""
    named: set[str] = set()
    for row in rows:
        for axis, group in row.edges:
            ends = [_quoted(row.label), _quoted(f"group {group}")]
            first, second = ends if group not in named else reversed(ends)
            yield f'{first} -- {second} [label="{axis}", color="{colours[group]}"];'
        named |= {group for _, group in row.edges}


def _text(row: Row) -> str:
    return "\n".join([row.label, *("".join(piece.text for piece in line) for line in row.lines)])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
