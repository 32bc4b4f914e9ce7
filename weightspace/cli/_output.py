"""What goes where: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    """A line for people, on standard error."""
    sys.stderr.write(f"{line}\n")


def show(lines: str, document: Mapping[str, Any], *, as_json: bool, quiet: bool = False) -> None:
    """The result: exactly one JSON object, or text for people, on standard output."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(document), allow_nan=False) + "\n")
    elif not quiet:
        sys.stdout.write(lines.rstrip("\n") + "\n")


def counted(networks: int, skipped: int, kind: str = "") -> str:
    """``"12 networks"`` or ``"12 test networks"``, and how many were left out, if any."""
    return f"{networks:,} {f'{kind} ' if kind else ''}networks" + (
        f" ({skipped:,} skipped)" if skipped else ""
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN, and knows neither paths nor tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
