"""Measure the barrier between two networks: how much worse those between them are, in loss and accuracy.

BatchNorm statistics are estimated again on the training data at every point between the two; --repair repair
rescales every channel as well, --repair none does neither.

Example: weightspace barrier zoo.h5::mlp[0] zoo.h5::mlp[1] --align weight-matching -o curve.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from weightspace.align import MATCHERS, align_networks
from weightspace.align.judging import barrier
from weightspace.cli._align import checked_matcher, needed_data
from weightspace.cli._data import BatchSize, DataOption, DataOptions, DataRoot, Mean, Samples, Std
from weightspace.cli._modules import ModuleArgs, OptionalInput, OptionalModule
from weightspace.cli._networks import (
    SpaceOptions,
    SpecOption,
    change_text,
    check_alike,
    check_module,
    check_output_is_no_input,
    data_for,
    find_space,
    in_memory,
    measured_change,
    open_networks,
)
from weightspace.cli._options import Architecture, Device, Json, Overwrite, Quiet, Settings, parse_settings
from weightspace.cli._output import show
from weightspace.devices import choose_device
from weightspace.errors import ConfigError
from weightspace.spec import FIGURE_FORMATS
from weightspace.zoo import atomic_path, check_output

Repair = Literal["none", "batch-norm", "repair"]


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="The network at one end.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The network at the other end.")],
    align: Annotated[
        str | None, typer.Option("--align", help=f"Align B to A first: one of {', '.join(MATCHERS)}.")
    ] = None,
    settings: Settings = None,
    repair: Annotated[
        Repair, typer.Option("--repair", help="What is done to the networks in between.")
    ] = "batch-norm",
    points: Annotated[int, typer.Option(help="Places on the line, ends included.")] = 25,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A figure to write: .png, .pdf or .svg.")
    ] = None,
    module: OptionalModule = None,
    module_args: ModuleArgs = None,
    inputs: OptionalInput = None,
    spec: SpecOption = None,
    architecture: Architecture = None,
    data: DataOption = None,
    data_root: DataRoot = None,
    batch_size: BatchSize = 256,
    samples: Samples = None,
    mean: Mean = None,
    std: Std = None,
    seed: Annotated[int, typer.Option(help="Of the alignment.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    where, options = choose_device(device), parse_settings(settings)
    if options and align is None:
        raise ConfigError(f"--set {next(iter(options))}: expected --align beside it, found none")
    matcher = None if align is None else checked_matcher(align, options)
    opened = open_networks([a, b], architecture)
    if output is not None:
        _check_figure(output, overwrite=overwrite)
        check_output_is_no_input(output, opened)
    space = find_space(SpaceOptions(module, module_args, inputs, spec, architecture, seed), opened)
    if space.module is None:
        raise ConfigError("barrier: it runs the networks: pass --module and --input, or --architecture")
    wanted = DataOptions(data, data_root, batch_size, samples, mean, std, seed)
    found = (
        data_for(space, opened, wanted) if matcher is None else needed_data(matcher, space, opened, wanted)
    )
    found = found or data_for(space, opened, wanted)
    if found is None:
        raise ConfigError("barrier: it needs --data, such as digits or FILE.npz")
    known = space.spec(found) if matcher is not None or not space.is_users else None
    check_alike(opened, known, values=True)
    if known is None:
        check_module(opened, space.module, space.place)
    ends = [in_memory(network, known, where) for network in opened]
    said = ""
    if matcher is not None:
        assert known is not None
        before = ends
        ends, _ = align_networks(
            known,
            before,
            matcher.name,
            module=space.module,
            data=found.train,
            loss=found.loss,
            seed=seed,
            **options,
        )
        changes = [measured_change(space, *pair, found) for pair in zip(before, ends, strict=True)]
        said = f"aligned by {matcher.name}: {change_text(changes)}\n"
    first, second = ends
    report = barrier(
        space.module,
        first,
        second,
        found.train,
        test=found.test,
        loss=found.loss,
        points=points,
        repair=repair,
    )
    if output is not None:
        with atomic_path(output, overwrite=overwrite) as temporary:
            report.draw(temporary, format=output.suffix[1:].lower())
    document = {
        **report.as_dict(),
        "align": align,
        "options": options,
        "data": found.text,
        "networks": [a, b],
        "output": output,
    }
    written = "" if output is None else f"\n{output}"
    show(f"{said}{found.text}\n{report.summary()}{written}", document, as_json=as_json, quiet=quiet)


def _check_figure(output: Path, *, overwrite: bool) -> None:
    if output.suffix.lower()[1:] not in FIGURE_FORMATS:
        listed = ", ".join(f".{name}" for name in FIGURE_FORMATS)
        raise ConfigError(f"output: expected a name that ends in {listed}, found {output}")
    check_output(output, overwrite=overwrite)
