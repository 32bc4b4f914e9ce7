"""Merge networks into one, tensor by tensor; networks that were trained apart are aligned first, with --align.

A network is ZOO.h5::POPULATION[ROW], a .safetensors or .pt file, or the folder or index of shards. What a method
needs to know from data (fisher, gradient-matching, regmean, greedy-soup) comes from --module and --data.

Example: weightspace merge a.safetensors b.safetensors --base base.safetensors --method ties -o merged.safetensors
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import Tensor

from weightspace.align import MATCHERS, align_networks
from weightspace.align._data import check_data
from weightspace.cli._align import checked_matcher
from weightspace.cli._data import (
    BatchSize,
    Data,
    DataOptions,
    DataRoot,
    JoinedBatches,
    ManyData,
    Mean,
    Samples,
    Std,
    score,
    widened,
)
from weightspace.cli._modules import ModuleArgs, OptionalInput, OptionalModule
from weightspace.cli._networks import (
    Space,
    SpaceOptions,
    SpecOption,
    change_text,
    check_alike,
    check_module,
    check_output_is_no_input,
    data_for,
    find_space,
    first_name,
    in_memory,
    measured_change,
    open_networks,
    record,
    tied_names,
    unknown_architecture,
)
from weightspace.cli._options import Architecture, Device, Json, Overwrite, Quiet, Settings, parse_settings
from weightspace.cli._output import say, show
from weightspace.devices import choose_device
from weightspace.errors import ConfigError, SpecError
from weightspace.merge import MERGERS, STATISTICS, Merger, find_merger, prepare
from weightspace.spec import WeightSpec
from weightspace.zoo import Network, canonical_json, check_checkpoint_output, meta_of, write_tensors

Networks = Sequence[Mapping[str, Tensor]]


def command(
    networks: Annotated[list[str], typer.Argument(metavar="A B [C ...]", help="The networks.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors or .pt file to write.")],
    method: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(MERGERS)}; average by default, weighted with --weights."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="One coefficient per network, as in 0.3,0.7.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The network that they were fine-tuned from.")
    ] = None,
    settings: Settings = None,
    align: Annotated[
        str | None,
        typer.Option(
            "--align", help=f"Align them first, to the first or to the base: one of {', '.join(MATCHERS)}."
        ),
    ] = None,
    repair: Annotated[
        Literal["none", "batch-norm", "repair"],
        typer.Option(
            "--repair", help="Estimate BatchNorm statistics again on --data, or rescale all channels."
        ),
    ] = "none",
    module: OptionalModule = None,
    module_args: ModuleArgs = None,
    inputs: OptionalInput = None,
    spec: SpecOption = None,
    architecture: Architecture = None,
    data: ManyData = None,
    data_root: DataRoot = None,
    batch_size: BatchSize = 256,
    samples: Samples = None,
    mean: Mean = None,
    std: Std = None,
    seed: Annotated[int, typer.Option(help="Of the method and of the alignment.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    merger, options = _method(method, weights, parse_settings(settings), seed=seed)
    effective = {**{name: value for name, value in merger.options.items() if value is not ...}, **options}
    opened = open_networks(networks, architecture, least=1 if merger.base else 2)
    everyone = opened if base is None else [*opened, _opened_base(merger, base, opened, architecture)]
    check_output_is_no_input(output, everyone)
    check_checkpoint_output(output, overwrite=overwrite)
    job = _Job(
        merger,
        align,
        repair,
        everyone[: len(opened)],
        everyone[len(opened) :],
        find_space(SpaceOptions(module, module_args, inputs, spec, architecture, seed), everyone),
        choose_device(device),
        seed,
    )
    chosen: list[str | None] = [*data] if data else [None]
    job.find_data([DataOptions(each, data_root, batch_size, samples, mean, std, seed) for each in chosen])
    job.find_spec()
    merged = job.merge(options)
    facts = {
        "method": merger.name,
        "options": effective,
        "base": base,
        "align": align,
        "repair": repair,
        "seed": seed,
        "data": [each.text for each in job.data] or None,
    }
    stored = {**facts, "base": None if base is None else len(opened)}  # its place among the networks
    _write(
        output,
        merged,
        everyone,
        job.spec if job.is_whole else None,
        record("merge", everyone, **stored),
        overwrite=overwrite,
    )
    document: dict[str, Any] = {**facts, "networks": networks, "output": output}
    text = f"{output}: {merger.name} of {', '.join(networks)}"
    if align is not None:
        document["max_relative_change"] = max((c for c in job.changes if c is not None), default=None)
        text += f", aligned by {align}: {change_text(job.changes)}"
    show(text, document, as_json=as_json, quiet=quiet)


# -- what is asked for -------------------------------------------------------------------------------------


def _method(
    method: str | None, weights: str | None, options: dict[str, Any], *, seed: int
) -> tuple[Merger, dict[str, Any]]:
    """The method and its options."""
    found = find_merger(method or ("average" if weights is None else "weighted"))
    if weights is not None:
        options["weights"] = _coefficients(weights)
    if "seed" in found.options:
        options.setdefault("seed", seed)
    for name in options:
        if name not in found.options:
            option = "--weights" if name == "weights" and weights is not None else f"--set {name}"
            listed = ", ".join(found.options) or "none"
            raise ConfigError(f"{option}: {found.name} has no such option; expected one of {listed}")
    return found, options


def _coefficients(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights: expected numbers such as 0.3,0.7, found {text!r}") from None


def _opened_base(merger: Merger, base: str, networks: Sequence[Network], architecture: str | None) -> Network:
    if not merger.base:
        raise ConfigError(f"--base: {merger.name} makes no use of one")
    (found,) = open_networks([base], architecture, least=1)
    for network in networks:
        if network.is_same(found):
            raise ConfigError(
                f"--base: expected the network that the others were made from, found {network.name}, one of them"
            )
    return found


# -- what is done ------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One merge: from checkpoints to the merged network."""

    merger: Merger
    align: str | None
    repair: str
    networks: Sequence[Network]
    base: Sequence[Network]  # one or none
    space: Space
    device: str
    seed: int
    data: list[Data] = field(default_factory=list)
    spec: WeightSpec | None = None
    changes: list[float | None] = field(default_factory=list)

    def find_data(self, options: Sequence[DataOptions]) -> None:
        """The data that the networks are run on, one for all or one for each; none where nothing runs them."""
        needs: set[str] = set()
        if self.align is not None:
            needs |= {*checked_matcher(self.align, {}).needs}
        runs = {"--repair": self.repair != "none", f"--method {self.merger.name}": self._is_from_data}
        reason = next((name for name, does in runs.items() if does), None)
        if reason is None and "data" in needs:
            reason = f"--align {self.align}"
        if self.space.module is None and (reason is not None or "module" in needs):
            raise ConfigError(
                f"{reason or f'--align {self.align}'}: it runs the networks: pass --module and --input, or --architecture"
            )
        if reason is None and options[0].data is None:
            return
        found = [data_for(self.space, [*self.networks, *self.base], each) for each in options]
        self.data = [each for each in found if each is not None]
        if not self.data:
            raise ConfigError(f"{reason}: it needs --data, such as digits or FILE.npz")
        if len(self.data) not in (1, len(self.networks)):
            raise ConfigError(
                f"--data: expected one for all, or one for each of {len(self.networks)} networks, found {len(self.data)}"
            )

    @property
    def _is_from_data(self) -> bool:
        return self.merger.score or self.merger.statistics is not None

    def find_spec(self) -> None:
        """The spec where something is known of the architecture, and whether the networks fit it and each other."""
        # a merge alone can do without, and not every module can be traced
        if self.align is not None or not self.space.is_users:
            self.spec = self.space.spec(self.data[0] if self.data else None)
        if self.spec is None and self.align is not None:
            raise unknown_architecture(self.networks, "--align")
        everyone = [*self.networks, *self.base]
        check_alike(everyone, self.spec, values=self.align is not None)
        if self.spec is None and self.space.module is not None:
            check_module(everyone, self.space.module, self.space.place)

    @property
    def is_whole(self) -> bool:
        """Whether the networks are taken into memory: to be moved or run, or tied as the module says."""
        return self.align is not None or bool(self.data) or bool(self._ties)

    @cached_property
    def _ties(self) -> dict[str, str]:
        """Which tensors are one in the module, where no spec says it; files may hold them twice."""
        if self.spec is not None or self.space.module is None:
            return {}
        ties = tied_names(self.space.module, self.networks[0].weights)
        return ties if any(name != first for name, first in ties.items()) else {}

    def merge(self, options: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The merged network; its tensors are computed when they are asked for, unless they are repaired."""
        networks, base = self._aligned() if self.is_whole else self._stored()
        given: dict[str, Any] = {}
        with _named(self.networks):
            if self.merger.statistics is not None:
                given["statistics"] = self._statistics(networks)
            if self.merger.score:
                assert self.space.module is not None
                for each in self.data:
                    check_data(self.space.module, widened(networks[0]), each.test, each.loss)
                given["score"] = self._score
            merged = prepare(self.merger.name, networks, base=base, spec=self.spec, **given, **options)
        if self.repair != "none":
            return self._repaired(merged, networks, options.get("weights"))
        if any(merged.stack.kind(name) == "statistic" for name in merged):
            say(
                "weightspace: BatchNorm statistics are averages: --repair batch-norm estimates them on --data"
            )
        return merged

    def _stored(self) -> tuple[Networks, Mapping[str, Tensor] | None]:
        base = next((network.weights for network in self.base), None)
        return [network.weights for network in self.networks], base

    def _aligned(self) -> tuple[Networks, Mapping[str, Tensor] | None]:
        """In memory, brought onto the base if there is one."""
        opened = [*self.base, *self.networks]
        held = [in_memory(network, self.spec, self.device, self._ties) for network in opened]
        if self.align is not None:
            assert self.spec is not None
            given: dict[str, Any] = {"data": self._joined(), "loss": Data.loss} if self.data else {}
            before = held
            held, _ = align_networks(
                self.spec, before, self.align, module=self.space.module, seed=self.seed, **given
            )
            first = self.data[0] if self.data else None
            self.changes = [
                measured_change(self.space, *pair, first) for pair in zip(before, held, strict=True)
            ]
        return held[len(self.base) :], held[0] if self.base else None

    def _joined(self) -> JoinedBatches:
        return JoinedBatches([each.train for each in self.data])

    def _statistics(self, networks: Networks) -> list[Mapping[str, Tensor]]:
        kind = self.merger.statistics
        assert kind is not None
        assert self.space.module is not None
        data = self.data if len(self.data) > 1 else self.data * len(networks)
        found: list[Mapping[str, Tensor]] = []
        for network, each in zip(networks, data, strict=True):
            options: dict[str, Any] = {}
            if kind == "fisher":
                given = each.train.targets.is_floating_point()  # no softmax to sample from
                options = {"seed": self.seed, "labels": "given" if given else "sampled", "loss": each.loss}
            found.append(STATISTICS[kind](self.space.module, network, each.train, **options))
        return found

    def _score(self, weights: Mapping[str, Tensor]) -> float:
        """The mean of the scores on the items that each data keep for tests."""
        assert self.space.module is not None
        scores = [score(self.space.module, weights, each, self.device) for each in self.data]
        return sum(scores) / len(scores)

    def _repaired(
        self, merged: Mapping[str, Tensor], networks: Networks, weights: Sequence[float] | None
    ) -> Mapping[str, Tensor]:
        from weightspace.align import repair, reset_batch_norm

        module, data = self.space.module, self._joined()
        assert module is not None
        whole = {name: merged[name].to(self.device) for name in merged}
        if self.repair == "batch-norm":
            return reset_batch_norm(module, whole, data)
        total = math.fsum(weights or [])
        shares = [weight / total for weight in weights] if weights and total else None
        return repair(module, whole, networks, data, coefficients=shares)


@contextmanager
def _named(networks: Sequence[Network]) -> Iterator[None]:
    """Where the library counts networks, the user knows their names."""
    try:
        yield
    except (ConfigError, SpecError) as error:
        text = re.sub(
            r"\bnetwork (\d+)\b",
            lambda match: networks[int(match[1])].name if int(match[1]) < len(networks) else match[0],
            str(error),
        )
        raise type(error)(text) from None


def _write(
    output: Path,
    merged: Mapping[str, Tensor],
    networks: Sequence[Network],
    spec: WeightSpec | None,
    texts: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    first = networks[0]
    if first.architecture is not None:
        texts = {"architecture": canonical_json(first.architecture), **texts}
    names = {name: first_name(spec, name) for name in first.weights}
    layout = {name: _meta(merged, own) for name, own in names.items()}
    tensors = ((name, merged[own].to(layout[name].dtype)) for name, own in names.items())
    write_tensors(output, layout, tensors, texts, overwrite=overwrite)


def _meta(merged: Mapping[str, Tensor], name: str) -> Tensor:
    meta = getattr(merged, "meta", None)
    return meta_of(merged, name) if meta is None else meta(name)
