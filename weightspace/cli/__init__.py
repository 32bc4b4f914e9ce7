"""The ``weightspace`` command: one thin file per subcommand, which parses, and calls one library function."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer

from weightspace.cli._output import say
from weightspace.errors import WeightspaceError

USER_ERROR, INTERRUPTED = 2, 130
_COMMANDS = (
    "recipes",
    "plan",
    "generate",
    "join",
    "import",
    "export",
    "info",
    "show",
    "report",
    "canonicalize",
    "train",
    "evaluate",
    "predict",
    "edit",
    "spec",
    "align",
    "merge",
    "barrier",
    "check",
)
_RESUMED = ("generate", "import", "canonicalize", "train")  # what these finished before Ctrl-C is kept

# Typer carries its own copy of click in some releases and depends on click in others.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="weightspace",
    help="Machine learning on the weights of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"weightspace {version('weightspace')}")
        raise typer.Exit
    return value


@app.callback()
def _root(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Machine learning on the weights of neural networks."""


for _name in _COMMANDS:
    _module = import_module(f"weightspace.cli._{_name}")
    app.command(_name, help=_module.__doc__)(_module.command)


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        result = typer.main.get_command(app).main(
            list(arguments), prog_name="weightspace", standalone_mode=False
        )
    except (typer.Abort, KeyboardInterrupt):
        result = INTERRUPTED
    except WeightspaceError as error:
        say(f"weightspace: {error}")
        result = USER_ERROR
    except _ClickException as error:
        error.show()
        result = error.exit_code
    if result == INTERRUPTED:  # some releases of Typer return this code of their own
        resumed = any(argument in _RESUMED for argument in arguments[:1])
        kept = "what was finished is kept; the same command goes on from there"
        say(f"\nweightspace: interrupted; {kept if resumed else 'nothing was written'}")
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
