"""Specs as figures, as Graphviz text and as lines: nothing missing, nothing on top of anything else."""

import io
import re
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.isotonic import isotonic_regression

from weightspace.errors import SpecError
from weightspace.spec import (
    Cell,
    Dim,
    Frozen,
    Group,
    Provenance,
    TensorSpec,
    WeightSpec,
    describe,
    draw,
    to_graphviz,
)
from weightspace.spec._diagram import cell_lines, colours_of
from weightspace.spec._draw import _measure
from weightspace.spec._layout import _spread, lay_out
from weightspace.testing import mixed_spec


def resnet(stages: int = 3) -> WeightSpec:
    """A stream per stage that many tensors share, two blocks with a group of their own each."""
    groups, tensors = [Group("stem", 8, activation="relu")], {}

    def convolution(name, outgoing, incoming, size=3):
        sizes = {group.name: group.size for group in groups}
        shape = (sizes[outgoing], sizes.get(incoming, 3), size, size)
        tensors[f"{name}.weight"] = TensorSpec.dense(shape, [outgoing, incoming, None, None])
        for leaf in ("weight", "bias"):
            tensors[f"{name}_norm.{leaf}"] = TensorSpec.dense(shape[:1], [outgoing])
        for leaf in ("running_mean", "running_var"):
            tensors[f"{name}_norm.{leaf}"] = TensorSpec.dense(shape[:1], [outgoing], "statistic")

    convolution("stem", "stem", None, 7)
    stream = "stem"
    for stage in range(stages):
        for block in range(2):
            name, before = f"stage{stage}.{block}", stream
            groups.append(Group(name, 8 * (stage + 1)))
            if block == 0:
                stream = f"stage{stage}"
                groups.append(Group(stream, 8 * (stage + 1)))
                convolution(f"{name}.shortcut", stream, before, 1)
            convolution(f"{name}.in", name, before)
            convolution(f"{name}.out", stream, name)
    tensors["head.weight"] = TensorSpec.dense((10, 8 * stages), [None, stream])
    tensors["head.bias"] = TensorSpec.dense((10,), [None])
    return WeightSpec.build(groups, tensors)


def transformer(blocks: int = 2) -> WeightSpec:
    """Heads, features of queries and of values within each, fused projections, tied embeddings."""
    heads, features, width = 4, 6, 24
    groups = [Group("stream", width)]
    embedding = TensorSpec.dense((50, width), [None, "stream"])
    tensors = {"embedding.weight": TensorSpec(embedding.shape, embedding.cells, aliases=("head.weight",))}
    for block in range(blocks):
        h, q, v, m = (f"block{block}.{name}" for name in ("heads", "query", "value", "mlp"))
        groups += [
            Group(h, heads),
            Group(q, features, (h,)),
            Group(v, features, (h,)),
            Group(m, 32, (), "gelu"),
        ]
        fused = tuple(
            Cell(
                (
                    Dim(0, features * width, heads, h),
                    Dim(0, width, features, name, (0,)),
                    Dim(1, 1, width, "stream"),
                ),
                part * width * width,
            )
            for part, name in enumerate((q, q, v))
        )
        tensors[f"block{block}.qkv.weight"] = TensorSpec((3 * width, width), fused)
        out = Cell((Dim(0, width, width, "stream"), Dim(1, features, heads, h), Dim(1, 1, features, v, (1,))))
        tensors[f"block{block}.out.weight"] = TensorSpec((width, width), (out,))
        tensors[f"block{block}.mlp.0.weight"] = TensorSpec.dense((32, width), [m, "stream"])
        tensors[f"block{block}.mlp.2.weight"] = TensorSpec.dense((width, 32), ["stream", m])
    return WeightSpec.build(groups, tensors)


def awkward() -> WeightSpec:
    """Nests two deep, names too long for a line, a group that no tensor names, an axis that is a long sum."""
    a, b, c = Group("experts", 2), Group("heads", 2, ("experts",)), Group("units", 2, ("experts", "heads"))
    parts = [Group(f"part{i}", 2) for i in range(14)]
    long = Group("encoder." + "very_" * 30 + "deep", 4, (), "relu")
    nested = Cell((Dim(0, 4, 2, "experts"), Dim(0, 2, 2, "heads", (0,)), Dim(0, 1, 2, "units", (0, 1))))
    tensors = {
        "experts.weight": TensorSpec((8,), (nested,)),
        "joined.weight": TensorSpec(
            (28,), tuple(Cell((Dim(0, 1, 2, p.name),), 2 * i) for i, p in enumerate(parts))
        ),
        f"{long.name}.weight": TensorSpec.dense((4, 3), [long.name, None]),
        "scale": TensorSpec.dense((), []),
    }
    return WeightSpec.build([a, b, c, *parts, long, Group("unused", 3)], tensors)


SPECS = {
    "mlp": WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0),
    "deep mlp": WeightSpec.mlp([2] + [16] * 12 + [1]),
    "no groups": WeightSpec.mlp([3, 2]),
    "empty": WeightSpec.build([], {}),
    "mixed": mixed_spec(),
    "resnet": resnet(),
    "transformer": transformer(),
    "awkward": awkward(),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def overlap(a, b) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


def holds(outer, inner) -> bool:
    return (
        outer.x < inner.x
        and outer.y < inner.y
        and inner.x + inner.width < outer.x + outer.width
        and inner.y + inner.height < outer.y + outer.height
    )


# -- the layout --------------------------------------------------------------------------------------------


@every_spec
def test_no_box_lies_on_another_and_all_are_on_the_page(spec):
    layout = lay_out(spec, _measure)
    boxes = [*layout.groups, *layout.tensors]
    assert not [(a, b) for a, b in combinations(boxes, 2) if overlap(a, b)]
    for box in [*boxes, *layout.nests]:
        assert box.x > 0
        assert box.x + box.width < layout.width
        assert layout.top < box.y
        assert box.y + box.height < layout.bottom


@every_spec
def test_labels_stay_in_their_boxes(spec):
    layout = lay_out(spec, _measure)
    for box in [*layout.groups, *layout.tensors]:
        heights = [label.y for label in box.labels]
        assert all(box.y + 0.08 < height < box.y + box.height - 0.08 for height in heights)
        for label in box.labels:
            width = sum(_measure(piece.text, label.size, label.style) for piece in label.pieces)
            assert box.x < label.x
            assert label.x + width < box.x + box.width


@every_spec
def test_nested_groups_stand_inside_the_box_of_their_outer_group(spec):
    layout = lay_out(spec, _measure)
    nests = {nest.group: nest for nest in layout.nests}
    places = {box.group: box for box in layout.groups}
    assert set(nests) == {outer for group in spec.groups.values() for outer in group.within}
    for name, box in places.items():
        for outer, nest in nests.items():
            assert holds(nest, box) == (outer == name or outer in spec.groups[name].within)
            assert holds(nest, box) or not overlap(nest, box)


@every_spec
def test_groups_stand_in_forward_order(spec):
    boxes = {box.group: box for box in lay_out(spec, _measure).groups}
    outermost = [boxes[name].y for name, group in spec.groups.items() if not group.within]
    assert outermost == sorted(outermost)
    assert set(boxes) == set(spec.groups)


@every_spec
def test_every_axis_reaches_the_lane_of_its_group_once(spec):
    layout = lay_out(spec, _measure)
    lanes = {lane.group: lane for lane in layout.lanes}
    for link in layout.links:
        lane = lanes[link.group]
        assert link.lane == lane.entry[0] < link.x
        assert lane.entry[1] < link.y <= lane.end
    wanted = {
        (box.y, dim.group, dim.axis)
        for box, tensor in boxes_with_tensors(spec, layout)
        for cell in tensor.cells
        for dim in cell.dims
        if dim.group is not None
    }
    found = [
        (box.y, link.group, link.axis)
        for link in layout.links
        for box in layout.tensors
        if box.y < link.y < box.y + box.height
    ]
    assert sorted(found) == sorted(wanted)


def boxes_with_tensors(spec, layout):
    """Each tensor with the box whose label names it."""
    for name, tensor in spec.tensors.items():
        module, _, leaf = name.rpartition(".")
        for box in layout.tensors:
            text = [piece.text for label in box.labels for piece in label.pieces]
            short = text[0][: text[0].index("…")] if "…" in text[0] else text[0]
            words = {word.strip(", ") for word in text}
            if (
                text[0] == name
                or (module in words and leaf in words)
                or ("…" in text[0] and name.startswith(short))
            ):
                yield box, tensor
                break
        else:
            pytest.fail(f"{name} is not drawn")


@every_spec
def test_lines_never_run_along_each_other(spec):
    layout = lay_out(spec, _measure)
    for a, b in combinations(layout.lanes, 2):
        assert a.entry[0] != b.entry[0] or a.end < b.entry[1] or b.end < a.entry[1]
    heights = [link.y for link in layout.links] + [lane.entry[1] for lane in layout.lanes]
    gaps = np.diff(np.sort(heights))
    assert (gaps > 0.1).all()


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 2)), min_size=1, max_size=12))
def test_groups_are_shifted_no_more_than_they_must(pairs):
    wanted, apart = np.array([p for p, _ in pairs]), np.array([d for _, d in pairs[:-1]])
    found = np.array(_spread(list(wanted), list(apart)))
    needed = np.concatenate([[0.0], np.cumsum(apart)])
    np.testing.assert_allclose(found, isotonic_regression(wanted - needed) + needed, atol=1e-9)


@every_spec
def test_groups_that_meet_have_different_colours(spec):
    colours = colours_of(spec)
    for tensor in spec.tensors.values():
        met = {dim.group for cell in tensor.cells for dim in cell.dims if dim.group is not None}
        assert len({colours[group] for group in met}) == min(len(met), 8)


# -- the figure --------------------------------------------------------------------------------------------

MAGIC = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_the_suffix_decides_the_format_and_equal_specs_give_equal_bytes(tmp_path, suffix):
    path = tmp_path / f"spec.{suffix}"
    draw(mixed_spec(), path)
    again = io.BytesIO()
    draw(mixed_spec(), again, format=suffix)
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert path.read_bytes() == again.getvalue()


@every_spec
def test_every_spec_is_drawn_in_its_colours_with_a_white_rim(spec):
    file = io.BytesIO()
    draw(spec, file)
    picture = np.asarray(Image.open(file).convert("RGB"))
    assert (np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]) == 255).all()
    packed = np.unique(picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32))
    seen = {f"#{value:06X}" for value in packed}
    assert set(colours_of(spec).values()) <= seen


def test_pdf_embeds_letters_and_no_outlines_of_them(tmp_path):
    draw(mixed_spec(), tmp_path / "spec.pdf")
    content = (tmp_path / "spec.pdf").read_bytes()
    assert b"/Type3" not in content
    assert b"DejaVuSans" in content


def test_names_are_no_mathematics(tmp_path):
    group = Group("$x^2$ & <b>", 4)
    spec = WeightSpec.build([group], {"a_{1}$.weight": TensorSpec.dense((4,), [group.name])})
    draw(spec, tmp_path / "spec.svg")
    assert "$x^2$" in to_graphviz(spec)


def test_another_format_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"expected the format png, pdf, svg, found 'gif'"):
        draw(mixed_spec(), tmp_path / "spec.gif")
    assert not list(tmp_path.iterdir())


def test_a_figure_beyond_all_pages_is_refused(tmp_path):
    spec = WeightSpec.mlp([4] * 600)
    with pytest.raises(SpecError, match=r"1198 tensors need a figure \d+ inches high, at most 190.*\.dot"):
        draw(spec, tmp_path / "spec.png")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_by_drawing_alone():
    code = "import sys, weightspace.spec; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- cells as text -----------------------------------------------------------------------------------------


def text_of(tensor: TensorSpec) -> list[str]:
    return ["".join(piece.text for piece in line) for line in cell_lines(tensor)]


def test_cells_as_text():
    dense = TensorSpec.dense((4, 1, 3), ["a", None, None])
    assert text_of(dense) == ["[a, 1, 3]"]
    assert text_of(TensorSpec.dense((), [])) == ["[]"]
    assert text_of(mixed_spec().tensors["fused"]) == ["[heads × features + 2, stream]"]
    assert text_of(mixed_spec().tensors["recurrent"]) == ["[stream, stream]"]


def test_interleaved_parts_are_written_as_a_product_of_a_sum():
    # an axis laid out as (heads, query | key): 2 heads of 3 + 3 features, against (query of all | key of all)
    inner = [Dim(0, 1, 3, name, (0,)) for name in ("query", "key")]
    interleaved = tuple(Cell((Dim(0, 6, 2, "heads"), dim), 3 * i) for i, dim in enumerate(inner))
    one_after_another = tuple(Cell((Dim(0, 3, 2, "heads"), dim), 6 * i) for i, dim in enumerate(inner))
    assert text_of(TensorSpec((12,), interleaved)) == ["[heads × (query + key)]"]
    assert text_of(TensorSpec((12,), one_after_another)) == ["[heads × query + heads × key]"]


def test_the_same_group_twice_on_an_axis_is_written_twice():
    twice = tuple(Cell((Dim(0, 5, 4, "a"), Dim(1, 1, 5)), 20 * i) for i in range(2))
    assert text_of(TensorSpec((8, 5), twice)) == ["[a + a, 5]"]


def test_cells_that_differ_on_two_axes_have_a_line_each():
    corners = [(0, 2, "a", 0, 1, "b"), (2, 1, None, 1, 2, None)]
    cells = tuple(
        Cell((Dim(0, 3, rows, a), Dim(1, 1, columns, b)), 3 * top + left)
        for top, rows, a in {(t, r, g) for t, r, g, *_ in corners}
        for left, columns, b in [(0, 2, "c"), (2, 1, None)]
    )
    assert text_of(TensorSpec((3, 3), cells)) == ["[a, c]", "[a, 1]", "[1, c]", "[1, 1]"]


def test_long_sums_are_cut():
    text = text_of(awkward().tensors["joined.weight"])[0]
    assert text == "[" + " + ".join(f"part{i}" for i in range(8)) + " + … 6 more]"


# -- Graphviz ----------------------------------------------------------------------------------------------


@every_spec
def test_graphviz_has_every_group_tensor_and_edge(spec):
    text = to_graphviz(spec)
    assert text.startswith("graph weightspace {\n")
    assert text.endswith("}\n")
    assert text.count("{") == text.count("}")
    quoted = r'"((?:[^"\\]|\\.)*)"'
    nodes = re.findall(rf"^ *{quoted} \[label=", text, re.MULTILINE)
    edges = re.findall(rf'^ *{quoted} -- {quoted} \[label="(\d+)"', text, re.MULTILINE)
    assert len(nodes) == len(set(nodes))
    assert {node.removeprefix("group ") for node in nodes if node.startswith("group ")} == set(spec.groups)
    assert {end for *ends, _ in edges for end in ends} <= set(nodes)
    assert len(edges) == len(lay_out(spec, _measure).links)


def test_graphviz_escapes_names():
    group = Group('say "a"\\', 2)
    text = to_graphviz(WeightSpec.build([group], {"t": TensorSpec.dense((2,), [group.name])}))
    assert r'"t" -- "group say \"a\"\\" [label="0"' in text


def test_graphviz_puts_nested_groups_into_a_cluster():
    text = to_graphviz(mixed_spec())
    cluster = text[text.index('subgraph "cluster heads" {') :]
    assert '"group features"' in cluster[: cluster.index("}")]
    assert '"group stream"' not in cluster[: cluster.index("}")]


# -- lines -------------------------------------------------------------------------------------------------


def test_description_of_nested_groups_ties_and_constants():
    spec = transformer(1)
    spec = WeightSpec(spec.groups, spec.tensors, constants=Frozen({"positions": (1, 8)}))
    assert describe(spec).splitlines()[2:] == [
        "groups",
        "  stream          24 units",
        "  block0.heads    4 units",
        "    block0.query  6 units in each of block0.heads",
        "    block0.value  6 units in each of block0.heads",
        "  block0.mlp      32 units, gelu",
        "",
        "tensors",
        "  embedding.weight     [50, stream]  (tied: head.weight)",
        "  block0.qkv.weight    [block0.heads × block0.query + block0.heads × block0.query + "
        "block0.heads × block0.value, stream]",
        "  block0.out.weight    [stream, block0.heads × block0.value]",
        "  block0.mlp.0.weight  [block0.mlp, stream]",
        "  block0.mlp.2.weight  [stream, block0.mlp]",
        "  positions            [1, 8]  (constant)",
    ]


def test_description_shares_lines():
    lines = [line.split("  ") for line in describe(resnet(1)).splitlines()]
    assert ["stem_norm: weight, bias, running_mean, running_var", "[stem]"] in [
        [word.strip() for word in line if word] for line in lines
    ]


def test_description_shares_a_line_among_constants_of_one_name():
    constants = {f"{i}.num_batches_tracked": () for i in range(20)} | {"mask": (4, 4)}
    spec = WeightSpec.build([], {}, constants=constants)
    assert describe(spec).splitlines()[2:] == [
        "tensors",
        "  *.num_batches_tracked (20 tensors)  []  (constant)",
        "  mask                                [4, 4]  (constant)",
    ]


def test_description_says_why_axes_are_fixed_and_merges_repeated_modules():
    tensors = {f"layers.{i}.weight": TensorSpec.dense((2, 3), [None, None]) for i in range(40)}
    tensors["head.weight"] = TensorSpec.dense((2, 3), [None, None])
    pinned = {name: ("", f"softmax at {name.removesuffix('.weight')}") for name in tensors}
    pinned["head.weight"] = ("output 0", "output 0")
    provenance = Provenance(("float32[2, 3]", "float32[4, 3]"), Frozen(pinned), 2e-15)
    spec = WeightSpec.build([], tensors, provenance=provenance)
    lines = describe(spec).splitlines()
    assert lines[1:3] == [
        "traced with float32[2, 3]; float32[4, 3]",
        "verified: the output changed by 2.0e-15 of its largest value, at most",
    ]
    assert lines[lines.index("fixed axes, by what fixes them") + 1 :] == [
        "  softmax at layers.*",
        "    layers.*.weight (40 tensors) axis 1",
        "  output 0",
        "    head.weight axes 0, 1",
    ]


def test_description_lists_a_bounded_number_of_names_in_lines_of_the_width():
    tensors = {f"tensor_{chr(97 + i)}": TensorSpec.dense((2,), [None]) for i in range(20)}
    provenance = Provenance(pinned=Frozen(dict.fromkeys(tensors, ("input x",))))
    text = describe(WeightSpec.build([], tensors, provenance=provenance), width=60)
    fixed = text[text.index("fixed axes") :].splitlines()
    assert fixed[-1].endswith("… 8 more")
    assert max(map(len, fixed)) <= 60
    assert sum(line.count("tensor_") for line in fixed) == 12
