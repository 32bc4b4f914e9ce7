"""Bring the units of networks onto those of the first; what each of them computes stays the same.

A network is ZOO.h5::POPULATION[ROW], a .safetensors or .pt file, or the folder or index of shards. Two networks
make one file, network B aligned; more make a folder, and so do methods that move all of them.

Example: weightspace align zoo.h5::inr[0] zoo.h5::inr[1] -o aligned.safetensors
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import Tensor

from weightspace.align import MATCHERS, align_networks, find_matcher
from weightspace.cli._data import BatchSize, DataOption, DataOptions, DataRoot, Mean, Samples, Std
from weightspace.cli._modules import ModuleArgs, OptionalInput, OptionalModule
from weightspace.cli._networks import (
    Space,
    SpaceOptions,
    SpecOption,
    as_stored,
    change_text,
    check_alike,
    check_output_is_no_input,
    data_for,
    find_space,
    in_memory,
    measured_change,
    open_networks,
    record,
    unknown_architecture,
)
from weightspace.cli._options import Architecture, Device, Json, Overwrite, Quiet, Settings, parse_settings
from weightspace.cli._output import show
from weightspace.devices import choose_device
from weightspace.errors import ConfigError, OutputError
from weightspace.zoo import check_checkpoint_output, check_output, save_network

if TYPE_CHECKING:
    from weightspace.align import Matcher, MatchReport
    from weightspace.cli._data import Data
    from weightspace.zoo import Network


_CENTER = "center.safetensors"  # where the methods that find one write it, beside the networks


def command(
    networks: Annotated[list[str], typer.Argument(metavar="A B [C ...]", help="Two networks or more.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The .safetensors or .pt file to write, or the folder.")
    ],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(MATCHERS)}.")] = "weight-matching",
    settings: Settings = None,
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
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    where, options = choose_device(device), parse_settings(settings)
    matcher = checked_matcher(method, options)
    opened = open_networks(networks, architecture)
    paths = _outputs(output, opened, folder=matcher.together or len(opened) > 2, overwrite=overwrite)
    space = find_space(SpaceOptions(module, module_args, inputs, spec, architecture, seed), opened)
    found_data = needed_data(
        matcher, space, opened, DataOptions(data, data_root, batch_size, samples, mean, std, seed)
    )
    known = space.spec(found_data)
    if known is None:
        raise unknown_architecture(opened, "align")
    check_alike(opened, known, values=True)
    before = [in_memory(network, known, where) for network in opened]
    given: dict[str, Any] = {} if found_data is None else {"data": found_data.train, "loss": found_data.loss}
    aligned, report = align_networks(
        known, before, method, module=space.module, seed=seed, **given, **options
    )
    changes = [measured_change(space, *pair, found_data) for pair in zip(before, aligned, strict=True)]
    facts = {
        "method": method,
        "options": {**matcher.options, **options},
        "seed": seed,
        "data": found_data and found_data.text,
    }
    texts = record("align", opened, **facts)
    stored = [as_stored(network, known, weights) for network, weights in zip(opened, aligned, strict=True)]
    _write(output, paths, stored, report.center, opened, texts, overwrite=overwrite)
    document = {**facts, **_document(matcher, report, changes, paths), "output": output}
    show(f"{output}: {_text(document)}; {change_text(changes)}", document, as_json=as_json, quiet=quiet)


# -- the method --------------------------------------------------------------------------------------------


def checked_matcher(method: str, options: Mapping[str, Any]) -> Matcher:
    """The matcher of that name, which has such options.

    Raises:
        ConfigError: there is none, or an option that it does not have.
    """
    found = find_matcher(method)
    for name in options:
        if name not in found.options:
            listed = ", ".join(found.options) or "none"
            raise ConfigError(f"--set {name}: {method} has no such option; expected one of {listed}")
    return found


def needed_data(
    matcher: Matcher, space: Space, networks: Sequence[Network], options: DataOptions
) -> Data | None:
    """The data, where the matcher looks at them or the user names some.

    Raises:
        ConfigError: the matcher needs data, or a module to run, and there is none.
    """
    if "module" in matcher.needs and space.module is None:
        raise ConfigError(
            f"--method {matcher.name}: it runs the networks: pass --module and --input, or --architecture"
        )
    wanted = options.data is not None or "data" in matcher.needs
    found = data_for(space, networks, options) if wanted else None
    if "data" in matcher.needs and found is None:
        raise ConfigError(f"--method {matcher.name}: it needs --data, such as digits or FILE.npz")
    return found


# -- what is written ---------------------------------------------------------------------------------------


def _outputs(output: Path, networks: Sequence[Network], *, folder: bool, overwrite: bool) -> list[Path]:
    """Where each network goes; of a pair, only the second is written."""
    if not folder:
        check_output_is_no_input(output, networks)
        check_checkpoint_output(output, overwrite=overwrite)
        return [output]
    if output.suffix in (".safetensors", ".pt", ".pth") or output.is_file():
        raise OutputError(
            f"output: expected the name of a folder for {len(networks)} networks, found {output}"
        )
    check_output(output, overwrite=overwrite)
    paths = [output / f"{name}.safetensors" for name in _names(networks)]
    for path in (*paths, output / _CENTER):
        check_output_is_no_input(path, networks)
    return paths


def _names(networks: Sequence[Network]) -> list[str]:
    """Names for files, numbered where two networks are called the same."""
    names = [network.short_name for network in networks]
    taken = {*names, Path(_CENTER).stem}
    if len(taken) > len(names):
        return names
    return [f"{number}-{name}" for number, name in enumerate(names)]


def _write(
    output: Path,
    paths: Sequence[Path],
    aligned: Sequence[Mapping[str, Tensor]],
    center: Mapping[str, Tensor] | None,
    networks: Sequence[Network],
    texts: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    architecture = networks[0].architecture
    if list(paths) == [output]:
        save_network(output, aligned[-1], architecture, metadata=texts, overwrite=overwrite)
        return
    files = dict(zip((path.name for path in paths), aligned, strict=True))
    if center is not None:
        files[_CENTER] = dict(center)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent) as made:
        for name, weights in files.items():
            save_network(Path(made) / name, weights, architecture, metadata=texts)
        output.mkdir(exist_ok=True)  # not the temporary folder itself, which nobody else may read
        for name in files:
            (Path(made) / name).replace(output / name)


def _document(
    matcher: Matcher, report: MatchReport, changes: Sequence[float | None], paths: Sequence[Path]
) -> dict[str, Any]:
    """Means over the networks that moved, and what is known of each."""
    columns = {
        "objective": report.objective.flatten().tolist(),
        "distance_before": report.distance_before.flatten().tolist(),
        "distance_after": report.distance_after.flatten().tolist(),
    }
    moved = slice(None) if matcher.together else slice(1, None)  # the reference stays
    found: dict[str, Any] = {name: _mean(values[moved]) for name, values in columns.items()}
    known = [change for change in changes if change is not None]
    found |= {
        "sweeps": int(report.sweeps.max()),
        "seconds": report.seconds,
        "max_relative_change": max(known) if known else None,
    }
    if len(paths) > 1:
        rows = zip(paths, changes, *columns.values(), strict=True)
        keys = ("output", "max_relative_change", *columns)
        found["networks"] = [dict(zip(keys, row, strict=True)) for row in rows]
    return found


def _text(document: Mapping[str, Any]) -> str:
    several = "networks" in document
    before, after = document["distance_before"], document["distance_after"]
    return (
        f"{document['method']}{' of ' + str(len(document['networks'])) + ' networks, means' if several else ''}: "
        f"L2 distance {before:.4g} -> {after:.4g} after {document['sweeps']} sweeps, {document['seconds']:.2g} s"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
