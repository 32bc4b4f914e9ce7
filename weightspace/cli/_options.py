"""Options that several subcommands share, each described once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from weightspace.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar and no text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Leave out networks with NaN or infinite weights or targets, and count them."
    ),
]
AnySplit = Annotated[str, typer.Option("--split", help="train, val, test or all.")]
PopulationName = Annotated[
    str | None, typer.Option("--population", help="Which one, for zoos with several; the run's by default.")
]
PopulationNames = Annotated[
    str | None,
    typer.Option(
        "--population",
        help="Which one, for zoos with several: a name, several between commas, or all; the run's by default.",
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where", help='Only rows for which this holds, such as "test_accuracy > 0.3 and epoch == last".'
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any field of the configuration; may be repeated."),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--architecture",
        help='For checkpoints that do not store it: JSON such as \'{"kind": "mlp", "arguments": {"widths": '
        "[2, 32, 32, 1]}}', or a file that holds it.",
    ),
]


def parse_settings(settings: Sequence[str] | None, option: str = "--set") -> dict[str, Any]:
    """``["a.b=1", "c=x"]`` to ``{"a.b": 1, "c": "x"}``; values are read as YAML.

    ``option`` is what a message calls them.

    Raises:
        ConfigError: an entry without ``=``, or a value that is not YAML.
    """
    parsed = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option}: expected KEY=VALUE, found {setting!r}")
        try:
            parsed[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{option} {key}: not a valid value: {value!r}") from None
    return parsed


def parse_architecture(text: str | None) -> dict[str, Any] | None:
    """JSON, or the path of a file that holds it.

    Raises:
        ConfigError: neither.
    """
    if text is None:
        return None
    source = Path(text).read_text() if not text.lstrip().startswith("{") and Path(text).is_file() else text
    try:
        document = json.loads(source)
    except ValueError:
        raise ConfigError(f"--architecture: expected JSON or a file that holds it, found {text!r}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"--architecture: expected a JSON object, found {text!r}")
    return document
