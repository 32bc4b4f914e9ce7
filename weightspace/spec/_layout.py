"""Where everything of a spec's figure stands, in inches from its top left corner; nothing is drawn here.

The forward pass runs downwards. Groups stand on the left, tensors on the right. Between them every group is a
lane: it starts beside the first tensor that names it and ends at the last one; a tensor reaches the lanes of its
groups by horizontal lines. So however many tensors share a group, no line runs through a box or through a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

from weightspace.spec._diagram import Piece, Row, nested_order, notes_of, rows_of, size_text
from weightspace.spec._types import WeightSpec

Measure = Callable[[str, float, str], float]
"""Width of a text, in inches, by its size in points and its style: ``""``, ``"bold"`` or ``"italic"``."""

NAME, SMALL = 8.0, 7.0  # sizes of type, in points
LINE = 0.165  # between the lines of a label
MARGIN, PAD = 0.15, 0.06
EDGE_PITCH, LANE_PITCH, TRACK = 0.175, 0.25, 0.12
FAN = 0.45  # between the groups and the lanes, where lines bend to their heights; wider where they bend far
KEY = "dot: the axis of the tensor that moves with the group · number in a tensor: a fixed axis"
WIDEST = 3.2  # of a column of text; longer lines are broken or shortened


@dataclass(frozen=True, slots=True)
class Label:
    """A text whose parts may have the colours of groups."""

    x: float
    y: float
    pieces: tuple[Piece, ...]
    size: float = NAME
    style: str = ""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with its labels; ``group`` gives the colour."""

    x: float
    y: float
    width: float
    height: float
    labels: tuple[Label, ...] = ()
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Lane:
    """The line of a group: from its node at ``start`` by ``entry`` down to ``end``."""

    group: str
    start: tuple[float, float]
    entry: tuple[float, float]
    end: float


@dataclass(frozen=True, slots=True)
class Link:
    """An axis of a tensor: from the tensor's box at ``x`` to the lane of its group."""

    group: str
    axis: int
    x: float
    y: float
    lane: float


@dataclass(slots=True)
class Layout:
    """What is drawn, and the size of the figure."""

    width: float = 0.0
    top: float = 0.0
    bottom: float = 0.0
    fan: float = FAN
    nests: list[Box] = field(default_factory=list)
    groups: list[Box] = field(default_factory=list)
    tensors: list[Box] = field(default_factory=list)
    notes: list[Label] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Text:
    """Lines of a label: pieces, size and style each."""

    lines: tuple[tuple[tuple[Piece, ...], float, str], ...]

    def width(self, measure: Measure) -> float:
        return max((_length(pieces, size, style, measure) for pieces, size, style in self.lines), default=0.0)

    @property
    def height(self) -> float:
        return LINE * len(self.lines)

    def at(self, x: float, middle: float) -> tuple[Label, ...]:
        top = middle - self.height / 2 + LINE / 2
        return tuple(Label(x, top + LINE * index, *line) for index, line in enumerate(self.lines))


@dataclass(frozen=True, slots=True)
class _Sheet:
    """The labels of a row, and how high its box must be."""

    row: Row
    name: _Text
    cells: _Text

    @property
    def height(self) -> float:
        return max(
            self.name.height + 2 * PAD, self.cells.height + 2 * PAD, EDGE_PITCH * len(self.row.edges) + 0.06
        )


def lay_out(spec: WeightSpec, measure: Measure) -> Layout:
    """Place the groups, the tensors and the lines between them."""
    order = nested_order(spec)
    sheets = [_Sheet(row, _name_text(row, measure), _cell_text(row, measure)) for row in rows_of(spec)]
    entries, middles = _swept(sheets, order)
    layout = Layout()
    right = _place_groups(layout, spec, order, entries, measure)
    shifts = [abs(box.y + box.height / 2 - entries[box.group or ""]) for box in layout.groups]
    layout.fan = min(max(FAN, 0.2 * max(shifts, default=0.0)), 3 * FAN)
    columns = _columns(entries, sheets, middles)
    at = {group: right + layout.fan + LANE_PITCH * column for group, column in columns.items()}
    _place_tensors(layout, sheets, middles, at, max([right, *at.values()]) + 0.35, measure)
    _place_lanes(layout, entries, at)
    boxes = [*layout.nests, *layout.groups, *layout.tensors]
    layout.width = max((box.x + box.width for box in boxes), default=1.0) + MARGIN
    layout.top = min((box.y for box in boxes), default=0.0) - MARGIN
    layout.bottom = max((box.y + box.height for box in boxes), default=0.0) + MARGIN
    _place_key(layout, measure)
    return layout


def _place_tensors(
    layout: Layout,
    sheets: Sequence[_Sheet],
    middles: Sequence[float],
    at: dict[str, float],
    left: float,
    measure: Measure,
) -> None:
    """The boxes, in two columns of text, and a line from each to the lanes of its groups."""
    first = left + PAD + 0.03
    second = first + max((sheet.name.width(measure) for sheet in sheets), default=0.0) + 0.3
    end = second + max((sheet.cells.width(measure) for sheet in sheets), default=0.0) + PAD + 0.03
    for sheet, middle in zip(sheets, middles, strict=True):
        labels = (*sheet.name.at(first, middle), *sheet.cells.at(second, middle))
        layout.tensors.append(Box(left, middle - sheet.height / 2, end - left, sheet.height, labels))
        layout.links.extend(
            Link(edge.group, edge.axis, left, y, at[edge.group])
            for edge, y in zip(sheet.row.edges, _edge_heights(sheet.row, middle), strict=True)
        )


def _place_lanes(layout: Layout, entries: dict[str, float], at: dict[str, float]) -> None:
    ends: dict[str, float] = {}
    for link in layout.links:
        ends[link.group] = max(ends.get(link.group, link.y), link.y)
    for box in layout.groups:
        if box.group in ends:
            start = (box.x + box.width, box.y + box.height / 2)
            entry = (at[box.group], entries[box.group])
            layout.lanes.append(Lane(box.group, start, entry, ends[box.group]))


def _place_key(layout: Layout, measure: Measure) -> None:
    """What a dot means, in the corner below the tensors."""
    if layout.links:
        width = measure(KEY, SMALL, "")
        layout.width = max(layout.width, width + 2 * MARGIN)
        layout.notes.append(Label(layout.width - MARGIN - width, layout.bottom + 0.02, (Piece(KEY),), SMALL))
        layout.bottom += LINE


def _edge_heights(row: Row, middle: float) -> list[float]:
    first = middle - EDGE_PITCH * (len(row.edges) - 1) / 2
    return [first + EDGE_PITCH * index for index in range(len(row.edges))]


# -- text --------------------------------------------------------------------------------------------------


def _name_text(row: Row, measure: Measure) -> _Text:
    tied = [(Piece(f"tied: {', '.join(row.tied)}"),)] if row.tied else []
    head = row.label if len(row.leaves) == 1 else row.module
    leaves = row.leaves if len(row.leaves) > 1 else ()
    listed = [Piece(f"{leaf}, ") for leaf in leaves[:-1]] + [Piece(leaf) for leaf in leaves[-1:]]
    lines = [(line, SMALL if head else NAME, "") for line in _broken(listed, measure) if line]
    first = [((Piece(_shortened(head, measure)),), NAME, "")] if head else []
    return _Text((*first, *lines, *((line, SMALL, "") for line in tied)))


def _cell_text(row: Row, measure: Measure) -> _Text:
    shown = [[piece._replace(text=_shortened(piece.text, measure)) for piece in line] for line in row.lines]
    return _Text(tuple((part, NAME, "") for line in shown for part in _broken(line, measure)))


def _group_text(spec: WeightSpec, name: str, measure: Measure) -> _Text:
    facts = [size_text(spec, name), *notes_of(spec, name)]
    pieces = [Piece(f"{fact} · ") for fact in facts[:-1]] + [Piece(facts[-1])]
    lines = _broken(pieces, measure, WIDEST / 2)
    return _Text(
        (
            ((Piece(_shortened(name, measure)),), NAME, "bold"),
            *(((Piece("".join(piece.text for piece in line).rstrip(" ·")),), SMALL, "") for line in lines),
        )
    )


def _length(pieces: Sequence[Piece], size: float, style: str, measure: Measure) -> float:
    return sum(measure(piece.text, size, style) for piece in pieces)


def _broken(pieces: Sequence[Piece], measure: Measure, widest: float = WIDEST) -> list[tuple[Piece, ...]]:
    """Lines that are no longer than ``widest`` unless a single piece is."""
    lines: list[list[Piece]] = [[]]
    used = 0.0
    for piece in pieces:
        width = measure(piece.text, NAME, "")
        # separators and brackets stay with what they belong to
        bound = piece.text[0] in " ,])" or (lines[-1] and lines[-1][-1].text[-1] in "[(")
        if lines[-1] and not bound and used + width > widest:
            lines.append([])
            used = 0.0
        lines[-1].append(piece)
        used += width
    return [tuple(line) for line in lines]


def _shortened(text: str, measure: Measure) -> str:
    """The text, or its beginning and its end."""
    keep = len(text)
    while keep > 8 and measure(_elided(text, keep), NAME, "bold") > WIDEST:
        keep -= 1
    return _elided(text, keep)


def _elided(text: str, keep: int) -> str:
    return text if keep >= len(text) else f"{text[: keep // 3]}…{text[len(text) - keep + keep // 3 :]}"


# -- places ------------------------------------------------------------------------------------------------


def _swept(
    sheets: Sequence[_Sheet], order: Sequence[tuple[str, int]]
) -> tuple[dict[str, float], list[float]]:
    """From top to bottom: where each group's line enters, and the middle of each row.

    A group enters with the whole of the nest that it belongs to, in a gap above the first row that names one.
    """
    nests: list[list[str]] = []
    for name, depth in order:
        if depth == 0:
            nests.append([])
        nests[-1].append(name)
    entries: dict[str, float] = {}
    middles: list[float] = []
    y, module = 0.0, None
    for sheet in sheets:
        y += (0.05 if sheet.row.module == module else 0.09) if middles else 0.0
        missing = {edge.group for edge in sheet.row.edges if edge.group not in entries}
        new = (nest for nest in nests if not missing.isdisjoint(nest)) if missing else ()
        for name in chain.from_iterable(new):
            y += TRACK
            entries[name] = y
        y += TRACK if missing else 0.0
        middles.append(y + sheet.height / 2)
        y, module = y + sheet.height, sheet.row.module
    for name, _ in order:  # groups that no tensor names
        entries.setdefault(name, y)
    return entries, middles


def _place_groups(
    layout: Layout,
    spec: WeightSpec,
    order: Sequence[tuple[str, int]],
    entries: dict[str, float],
    measure: Measure,
) -> float:
    """Every group as near as can be to where its line enters; returns the right edge of their column."""
    texts = [_group_text(spec, name, measure) for name, _ in order]
    heights = [text.height + 2 * PAD for text in texts]
    deepest = max((depth for _, depth in order), default=0)
    pad, indent = (0.08, 0.22) if deepest else (0.0, 0.0)
    lefts = [MARGIN + pad + indent * depth for _, depth in order]
    right = max(
        (left + text.width(measure) + 2 * PAD + 0.06 for left, text in zip(lefts, texts, strict=True)),
        default=MARGIN,
    )
    depths = [depth for _, depth in order]
    opens = [later > depth for depth, later in pairwise([*depths, 0])]
    closes = [max(0, depth - later) for depth, later in pairwise([*depths, 0])]
    apart = [
        (heights[i] + heights[i + 1]) / 2 + 0.1 + pad * (opens[i + 1] + closes[i])
        for i in range(len(order) - 1)
    ]
    middles = _spread([entries[name] for name, _ in order], apart)
    for (name, _), left, height, text, middle in zip(order, lefts, heights, texts, middles, strict=True):
        box = Box(left, middle - height / 2, right - left, height, text.at(left + PAD + 0.03, middle), name)
        layout.groups.append(box)
    layout.nests = _nests(order, layout.groups, pad, deepest)
    return right + pad * deepest


def _nests(order: Sequence[tuple[str, int]], boxes: Sequence[Box], pad: float, deepest: int) -> list[Box]:
    """A box around each group that others lie within, and around those."""
    nests = []
    for index, (name, depth) in enumerate(order):
        last, reach = index, depth
        while last + 1 < len(order) and order[last + 1][1] > depth:
            last += 1
            reach = max(reach, order[last][1])
        if last == index:
            continue
        outer, inner = boxes[index], boxes[last]
        below = pad * max(1, order[last][1] - depth)
        bottom = inner.y + inner.height + below
        top, left = outer.y - pad, outer.x - pad
        right = outer.x + outer.width + pad * (deepest - depth)
        nests.append(Box(left, top, right - left, bottom - top, (), name))
    return nests


def _spread(wanted: Sequence[float], apart: Sequence[float]) -> list[float]:
    """Places in order, ``apart`` at least, with the least sum of squared shifts from those ``wanted``.

    Less the distances that are needed anyway, the places only have to be in order: isotonic regression.
    """
    needed = [0.0]
    for distance in apart:
        needed.append(needed[-1] + distance)
    blocks: list[list[float]] = []  # sum and count of the places that were pooled
    for place, before in zip(wanted, needed, strict=False):
        blocks.append([place - before, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    level = [total / count for total, count in blocks for _ in range(int(count))]
    return [place + before for place, before in zip(level, needed, strict=False)]


def _columns(entries: dict[str, float], sheets: Sequence[_Sheet], middles: Sequence[float]) -> dict[str, int]:
    """A column for each lane: the longest stand leftmost, and lanes that do not meet share one."""
    ends: dict[str, float] = {}
    for sheet, middle in zip(sheets, middles, strict=True):
        for edge, y in zip(sheet.row.edges, _edge_heights(sheet.row, middle), strict=True):
            ends[edge.group] = y
    taken: list[list[tuple[float, float]]] = []
    columns: dict[str, int] = {}
    for name in sorted(ends, key=lambda name: entries[name] - ends[name]):
        span = (entries[name] - EDGE_PITCH, ends[name] + EDGE_PITCH)
        free = (
            index
            for index, spans in enumerate(taken)
            if all(span[1] < start or end < span[0] for start, end in spans)
        )
        column = next(free, len(taken))
        if column == len(taken):
            taken.append([])
        taken[column].append(span)
        columns[name] = column
    return columns
