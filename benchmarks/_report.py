"""What every benchmark reports beside its numbers, and how it writes them down."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def cpu_model() -> str:
    """The processor as the operating system names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(*libraries: str) -> dict[str, object]:
    """The machine and the versions on which the numbers depend."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }


def command_line(program: str, argv: Sequence[str] | None, paths: Mapping[str, str] | None = None) -> str:
    """The command that was run, with the values of options that name local paths replaced by a word."""
    words = list(sys.argv[1:] if argv is None else argv)
    shown = [(paths or {}).get(words[at - 1], word) if at else word for at, word in enumerate(words)]
    return shlex.join(["python", f"benchmarks/{program}", *shown])


def to_markdown(
    title: str,
    columns: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    setting: Mapping[str, object],
) -> str:
    """A table and the setting below it.

    ``columns`` maps each heading to a format of the row's values, as in ``{"ratio": "{ratio:.1f}x"}``. The
    first column is text, the others are numbers.
    """
    cells = [[text.format(**row) for text in columns.values()] for row in rows]
    lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *cells]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    facts = [f"- {name}: {value}" for name, value in setting.items()]
    return "\n".join([f"# {title}", "", *table, "", *facts]) + "\n"


def write(
    folder: Path, name: str, table: str, rows: Sequence[Mapping[str, Any]], setting: Mapping[str, object]
) -> None:
    """Print the table, and write ``NAME.json`` and ``NAME.md`` into ``folder``."""
    print(table, end="")
    folder.mkdir(parents=True, exist_ok=True)
    document = {"setting": setting, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    (folder / f"{name}.md").write_text(table)
