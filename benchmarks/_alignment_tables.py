"""Rows and tables of the alignment study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import _report

Row = dict[str, Any]
Results = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]

REPAIRS = {"none": "", "batch-norm": ", re-estimated", "repair": ", REPAIR"}
METHODS = {
    "naive": "as they are",
    "weight-matching": "weight matching",
    "activation-matching": "activation matching",
    "straight-through": "straight-through",
    "sinkhorn": "Sinkhorn",
    "merge-many": "merge-many",
    "c2m3": "C2M3",
}
NETWORKS = {"mlp": "MLP", "resnet-batch": "ResNet, BatchNorm", "resnet-layer": "ResNet, LayerNorm"}


def rows_of(part: str, results: Results) -> list[Row]:
    """Plain rows of one part, with means over pairs of networks."""
    return [{"part": part, **row} for row in _ROWS[part](results)]


def document(rows: Sequence[Row], setting: Mapping[str, object]) -> str:
    """All tables, and the setting below them."""
    sections = [f"##{_report.to_markdown(*section, {})}" for section in _sections(rows)]
    facts = "\n".join(f"- {name}: {value}" for name, value in setting.items())
    return (
        "\n".join(["# Aligning and merging networks that were trained independently", "", *sections, facts])
        + "\n"
    )


# -- rows --------------------------------------------------------------------------------------------------


def _curve_rows(results: Results) -> list[Row]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for facts, found in results:
        for how, curve in found["curves"].items():
            key = (facts["data"], facts["network"], facts["width"], facts["method"], how)
            groups.setdefault(key, []).append({**found, **curve})
    names = ("data", "network", "width", "method", "repair")
    data = list(dict.fromkeys(key[0] for key in groups))
    groups = dict(sorted(groups.items(), key=lambda group: data.index(group[0][0])))
    return [{**dict(zip(names, key, strict=True)), **_curves(found)} for key, found in groups.items()]


def _curves(found: Sequence[Mapping[str, Any]]) -> Row:
    """Means over pairs."""
    heights = {
        f"{split}_{what}_barrier": _mean([one[split][f"{what}_barrier"] for one in found])
        for split in ("train", "test")
        for what in ("loss", "accuracy")
    }
    tested = [one["test"]["curve"] for one in found]
    matched = [one["matching"] for one in found if one["matching"]]
    return {
        **heights,
        "ends_accuracy": mean((curve[0]["accuracy"] + curve[-1]["accuracy"]) / 2 for curve in tested),
        "middle_accuracy": mean(curve[len(curve) // 2]["accuracy"] for curve in tested),
        "pairs": len(found),
        "distance_before": _mean([one["distance_before"] for one in matched]),
        "distance_after": _mean([one["distance_after"] for one in matched]),
        "matching_seconds": _mean([one["seconds"] for one in matched]),
    }


def _many_rows(results: Results) -> list[Row]:
    return [
        {
            **facts,
            "ends_accuracy": mean(end["accuracy"] for end in found["ends"]),
            "best_accuracy": max(end["accuracy"] for end in found["ends"]),
            "merged_accuracy": found["merged"]["accuracy"],
            "repaired_accuracy": found["repaired"]["accuracy"],
            "seconds": found["seconds"],
        }
        for facts, found in results
    ]


def _star_rows(results: Results) -> list[Row]:
    rows = []
    for facts, found in results:
        for between in ("regular to regular", "star to source", "star to held-out"):
            heights = {
                f"{name}_barrier": _mean([one[name] for one in found[between]])
                for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
            }
            rows.append(
                {**facts, "between": between, **heights, "pairs": len(found[between]), "star": found["star"]}
            )
    return rows


def _singular_rows(results: Results) -> list[Row]:
    return [
        {**facts, **{name: value for name, value in found.items() if name != "matrices"}}
        for facts, found in results
    ]


def _surface_rows(results: Results) -> list[Row]:
    return [{**facts, "networks": found["networks"]} for facts, found in results]


_ROWS: dict[str, Callable[[Results], list[Row]]] = {
    "barriers": _curve_rows,
    "resnets": _curve_rows,
    "many": _many_rows,
    "star": _star_rows,
    "singular": _singular_rows,
    "surface": _surface_rows,
}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


# -- tables ------------------------------------------------------------------------------------------------

Section = tuple[str, dict[str, str], list[dict[str, str]]]


def _sections(rows: Sequence[Row]) -> list[Section]:
    found = []
    for make in (_barriers, _resnets, _many, _star, _singular):
        part = make.__name__.removeprefix("_")
        mine = [row for row in rows if row["part"] == part]
        found += make(mine) if mine else []
    return found


def _barriers(rows: Sequence[Row]) -> list[Section]:
    index = {
        "data": lambda row: row["data"],
        "width": lambda row: f"{row['width']:,}",
        "test accuracy of the ends": lambda row: _percent(row["ends_accuracy"]),
    }
    shown = [row for row in rows if row["method"] in METHODS]
    return [
        _pivot(
            "MLPs: drop of the test accuracy between two networks, in points", shown, index, _label, _points
        ),
        _pivot("MLPs: barrier of the training loss between two networks", shown, index, _label, _loss),
    ]


def _resnets(rows: Sequence[Row]) -> list[Section]:
    index = {
        "network": lambda row: f"{NETWORKS[row['network']]}, x{row['width']}",
        "test accuracy of the ends": lambda row: _percent(row["ends_accuracy"]),
        "between": lambda row: METHODS[row["method"]],
    }
    titles = {
        "none": "statistics averaged",
        "batch-norm": "statistics estimated again",
        "repair": "REPAIR",
    }

    def column(row: Row) -> str:
        return titles[row["repair"]]

    return [
        _pivot(
            "ResNets: drop of the test accuracy between two networks, in points", rows, index, column, _points
        ),
        _pivot("ResNets: barrier of the training loss between two networks", rows, index, column, _loss),
    ]


def _many(rows: Sequence[Row]) -> list[Section]:
    index = {
        "data": lambda row: row["data"],
        "width": lambda row: f"{row['width']:,}",
        "models": lambda row: str(row["models"]),
        "their mean": lambda row: _percent(row["ends_accuracy"]),
    }
    both = [
        {**row, "repair": how, "accuracy": row[name]}
        for row in rows
        for how, name in (("none", "merged_accuracy"), ("repair", "repaired_accuracy"))
    ]
    title = "Several MLPs merged into one: test accuracy in %"
    return [_pivot(title, both, index, _label, lambda row: _percent(row["accuracy"]))]


def _star(rows: Sequence[Row]) -> list[Section]:
    index = {
        "data": lambda row: row["data"],
        "width": lambda row: f"{row['width']:,}",
        "networks that the star was trained with": lambda row: str(row["sources"]),
        "test accuracy of the star": lambda row: _percent(row["star"]["accuracy"]),
    }

    def column(row: Row) -> str:
        return str(row["between"])

    return [
        _pivot(
            "Star models: barrier of the training loss, after weight matching", rows, index, column, _loss
        ),
        _pivot("Star models: drop of the test accuracy in points", rows, index, column, _points),
    ]


def _singular(rows: Sequence[Row]) -> list[Section]:
    columns = {
        "data": "{data}",
        "width": "{width:,}",
        "L2 distance before": "{distance_before:.2f}",
        "after": "{distance_after:.2f}",
        "singular values changed by": "{value_change:.1g}",
    }
    table = []
    for row in rows:
        cells = {name: text.format(**row) for name, text in columns.items()}
        for at, share in enumerate(row["energy"]):
            before, after = row["joint_before"][at], row["joint_after"][at]
            cells[f"R at {share:.0%} of the energy"] = f"{before:.2f} -> {after:.2f}"
        table.append(cells)
    return [("Singular vectors of two MLPs, before and after weight matching", _columns(table), table)]


def _label(row: Row) -> str:
    return METHODS[row["method"]] + REPAIRS[row["repair"]]


def _points(row: Row) -> str:
    return f"{100 * row['test_accuracy_barrier']:.2f}"


def _loss(row: Row) -> str:
    value = row["train_loss_barrier"]
    return "inf" if value is None else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _pivot(
    title: str,
    rows: Sequence[Row],
    index: Mapping[str, Callable[[Row], str]],
    column: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> Section:
    """One line per value of the index, one column per value of ``column``; a dash where there is nothing."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    names: dict[str, None] = {}
    for row in rows:
        key = tuple(text(row) for text in index.values())
        lines.setdefault(key, {})[column(row)] = cell(row)
        names.setdefault(column(row))
    table = [
        {**dict(zip(index, key, strict=True)), **{name: cells.get(name, "-") for name in names}}
        for key, cells in lines.items()
    ]
    return title, _columns(table), table


def _columns(table: Sequence[Mapping[str, str]]) -> dict[str, str]:
    return {name: f"{{{name}}}" for name in table[0]}
