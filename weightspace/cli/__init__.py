"""The ``weightspace`` command: one thin file per subcommand, which parses, and calls one library function."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import click
import typer

from weightspace.cli._output import say
from weightspace.errors import WeightspaceError

_COMMANDS = ("recipes", "generate", "info", "show", "train", "evaluate", "align", "merge")

app = typer.Typer(
    name="weightspace",
    help="Machine learning on the weights of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"weightspace {version('weightspace')}")
        raise typer.Exit


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
    except WeightspaceError as error:
        say(f"weightspace: {error}")
        return 2
    except click.exceptions.Abort:
        say("weightspace: interrupted; what was finished is kept")
        return 130
    except KeyboardInterrupt:
        say("weightspace: interrupted; what was finished is kept; run the same command again to go on")
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
