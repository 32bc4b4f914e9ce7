"""See whether checkpoints fit each other before hours of work: a dry run of align and merge.

Names, shapes and types are compared, all values are looked at for NaN and infinity, one tensor at a time, and the
memory and the disk space that merging takes are told. Exit code 2 when they do not fit.

Example: weightspace check a.safetensors b.safetensors --base base.safetensors -o merged.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from weightspace.cli._modules import ModuleArgs, OptionalInput, OptionalModule
from weightspace.cli._networks import (
    SpaceOptions,
    SpecOption,
    check_output_is_no_input,
    find_space,
    open_networks,
)
from weightspace.cli._options import Architecture, Json, Overwrite, Quiet
from weightspace.cli._output import show
from weightspace.errors import WeightspaceError
from weightspace.spec import WeightSpec
from weightspace.zoo import (
    Difference,
    Network,
    StoredWeights,
    bytes_of,
    check_checkpoint_output,
    differences,
    free_space,
    meta_of,
)

_MISFIT = 2
_SHOWN = 10  # differences that people are shown; programs get all


def command(
    networks: Annotated[list[str], typer.Argument(metavar="A [B ...]", help="One network or more.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The network that they were fine-tuned from.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where the result will be saved; nothing is written."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Look for NaN and infinity, which reads everything.")
    ] = True,
    module: OptionalModule = None,
    module_args: ModuleArgs = None,
    inputs: OptionalInput = None,
    spec: SpecOption = None,
    architecture: Architecture = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    opened = open_networks([*networks, *([] if base is None else [base])], architecture, least=1)
    known = find_space(SpaceOptions(module, module_args, inputs, spec, architecture), opened).spec()
    found = differences(opened, known, values=values)
    target = None if output is None else _target(output, opened, overwrite=overwrite)
    fits = not any(difference.is_fatal for difference in found) and (
        target is None or target["error"] is None
    )
    memory = _memory(opened)
    document = {
        "fits": fits,
        "networks": [_network(network) for network in opened],
        "differences": [{**vars(difference), "is_fatal": difference.is_fatal} for difference in found],
        "spec": None if known is None else _spec(known),
        "memory": memory,
        "output": target,
    }
    show(_text(document, found, known, output), document, as_json=as_json, quiet=quiet)
    if not fits:
        raise typer.Exit(_MISFIT)


# -- what is found -----------------------------------------------------------------------------------------


def _network(network: Network) -> dict[str, Any]:
    metas = [meta_of(network.weights, name) for name in network.weights]
    return {
        "name": network.name,
        "tensors": len(metas),
        "elements": sum(meta.numel() for meta in metas),
        "bytes": sum(map(bytes_of, metas)),
        "types": sorted({str(meta.dtype).removeprefix("torch.") for meta in metas}),
        "tied": _tied(network),
        "architecture": network.architecture,
    }


def _tied(network: Network) -> list[list[str]]:
    """Names of one storage; safetensors has none."""
    names: dict[object, list[str]] = {}
    for name in network.weights:
        key = network.weights.tied(name) if isinstance(network.weights, StoredWeights) else name
        names.setdefault(key, []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def _memory(networks: Sequence[Network]) -> dict[str, Any]:
    """What a merge holds at most when it goes tensor by tensor: one of each network, and the merged one."""
    first = networks[0].weights
    sizes = {
        name: sum(bytes_of(meta_of(network.weights, name)) for network in networks if name in network.weights)
        for name in first
    }
    largest = max(first, key=lambda name: bytes_of(meta_of(first, name)), default=None)
    size = 0 if largest is None else bytes_of(meta_of(first, largest))
    return {
        "largest_tensor": largest,
        "largest_bytes": size,
        "streamed_bytes": max(sizes.values(), default=0) + size,
        "whole_bytes": sum(sizes.values()),
    }


def _spec(spec: WeightSpec) -> dict[str, Any]:
    return {
        "groups": {group.name: group.size for group in spec.groups.values()},
        "symmetries": spec.symmetries,
        "parameters": spec.num_parameters,
        "tied": [[name, *tensor.aliases] for name, tensor in spec.tensors.items() if tensor.aliases],
    }


def _target(output: Path, networks: Sequence[Network], *, overwrite: bool) -> dict[str, Any]:
    needed = sum(_merged_bytes(networks, name) for name in networks[0].weights)
    try:
        check_output_is_no_input(output, networks)
        check_checkpoint_output(output, overwrite=overwrite)
        free = free_space(output)
        error = (
            None
            if needed <= free
            else f"output: {output} takes {_size(needed)}, {_size(free)} are free there"
        )
    except WeightspaceError as problem:
        free, error = None, str(problem)
    return {"path": output.resolve(), "bytes": needed, "free_bytes": free, "error": error}


def _merged_bytes(networks: Sequence[Network], name: str) -> int:
    metas = [meta_of(network.weights, name) for network in networks if name in network.weights]
    if any(meta.is_floating_point() and meta.element_size() == 1 for meta in metas):
        return max(map(bytes_of, metas))  # types that PyTorch does not promote; they do not fit anyway
    dtype = metas[0].dtype
    for meta in metas[1:]:
        dtype = torch.promote_types(dtype, meta.dtype)
    return metas[0].numel() * dtype.itemsize


# -- what is said ------------------------------------------------------------------------------------------


def _text(
    document: dict[str, Any], found: Sequence[Difference], spec: WeightSpec | None, output: Path | None
) -> str:
    lines = [_network_text(network) for network in document["networks"]]
    lines.append(
        "architecture unknown: they can be merged, and aligned with --module and --input, --spec or --architecture"
        if spec is None
        else f"spec: {len(spec.groups)} groups of {sum(g.size for g in spec.groups.values()):,} units, symmetries "
        f"{', '.join(spec.symmetries) or 'none'}"
    )
    lines += [difference.text for difference in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"... and {len(found) - _SHOWN:,} more differences (--json lists all)")
    memory = document["memory"]
    lines.append(
        f"memory: {_size(memory['streamed_bytes'])} to merge tensor by tensor (the largest, {memory['largest_tensor']!r}, "
        f"is {_size(memory['largest_bytes'])}), {_size(memory['whole_bytes'])} to align"
    )
    target = document["output"]
    if target is not None:
        space = f"{_size(target['bytes'])}, {_size(target['free_bytes'] or 0)} are free"
        lines.append(target["error"] or f"output: {target['path']}, {space}")
    lines.append("they fit" if document["fits"] else "they do not fit")
    return "\n".join(lines)


def _network_text(network: dict[str, Any]) -> str:
    tied = "".join(f", {' = '.join(names)} tied" for names in network["tied"])
    size = f"{network['elements']:,} elements of {', '.join(network['types'])}, {_size(network['bytes'])}"
    return f"{network['name']}: {network['tensors']:,} tensors, {size}{tied}"


def _size(count: int) -> str:
    """``"12.3 MB"``."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"
