"""Find the symmetries of a module: its groups of units, its tensors, and why what is fixed cannot move.

The module is made and traced by running its own code. The spec is printed, and drawn or stored with -o.

Example: weightspace spec --module models.py:ResNet --module-args width=64 --input 2,3,32,32 -o resnet.pdf
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightspace.cli._modules import (
    InputOption,
    ModuleArgs,
    ModuleOption,
    MoreModuleArgs,
    blaming_module,
    load_module,
    parse_inputs,
    users_code,
)
from weightspace.cli._options import Json, Overwrite, Quiet, parse_settings
from weightspace.cli._output import show
from weightspace.errors import ConfigError

if TYPE_CHECKING:
    from weightspace.spec import WeightSpec

_SUFFIXES = (".png", ".pdf", ".svg", ".dot", ".json")


def command(
    module: ModuleOption,
    inputs: InputOption,
    module_args: ModuleArgs = None,
    more_module_args: MoreModuleArgs = None,
    more_inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--more-input",
            metavar="SHAPE",
            help="A further example of other sizes, for symmetries that hold at every size; as many as --input.",
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--outputs",
            metavar="NAME",
            help="The outputs that count, as logits; all by default. May be repeated.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Measure on the module that the symmetries hold.")
    ] = True,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="A figure (.png, .pdf, .svg), Graphviz text (.dot) or .json to write.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the module's weights and of the inputs.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.spec import describe, trace

    path = None if output is None else _checked(output, overwrite=overwrite)
    arguments = parse_settings([*(module_args or []), *(more_module_args or [])], "--module-args")
    example, *more = parse_inputs(inputs, more_inputs or [], seed=seed)
    net = load_module(module, arguments, seed=seed)
    with users_code(), blaming_module(module, net, [example, *more]):
        spec = trace(net, example, more_inputs=more, outputs=outputs or None, verify=verify)
    if path is not None:
        _write(spec, path, overwrite=overwrite)
    document = {**json.loads(spec.to_json()), "verified_change": spec.provenance.verified_change}
    written = f"\n\n{path}" if path is not None else ""
    show(f"{module}: {describe(spec)}{written}", document, as_json=as_json, quiet=quiet)


def _checked(output: str, *, overwrite: bool) -> Path:
    from weightspace.zoo import check_output

    path = Path(output)
    if output.endswith(("/", os.sep)) or path.is_dir():
        raise ConfigError(f"output: expected the name of a file, found the directory {output}")
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"output: expected a name that ends in {', '.join(_SUFFIXES)}, found {output}")
    check_output(path, overwrite=overwrite)
    return path


def _write(spec: WeightSpec, output: Path, *, overwrite: bool) -> None:
    from weightspace.spec import draw, to_graphviz
    from weightspace.zoo import atomic_path

    suffix = output.suffix.lower()
    with atomic_path(output, overwrite=overwrite) as temporary:
        if suffix == ".json":
            temporary.write_text(spec.to_json() + "\n", encoding="utf-8")
        elif suffix == ".dot":
            temporary.write_text(to_graphviz(spec), encoding="utf-8")
        else:
            draw(spec, temporary, format=suffix[1:])
