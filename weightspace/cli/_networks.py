"""What the commands on single networks share: checkpoints, what is known of their architecture, and what is said of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from weightspace.cli._data import Data, DataOptions, find_data
from weightspace.cli._modules import Inputs, blaming_module, load_module, parse_inputs, users_code
from weightspace.cli._options import parse_architecture, parse_settings
from weightspace.cli._output import say
from weightspace.errors import CheckpointError, ConfigError, OutputError, SpecError
from weightspace.spec import Weights, WeightSpec
from weightspace.zoo import HeldWeights, Network, StoredWeights, differences, open_network

SpecOption = Annotated[
    Path | None,
    typer.Option(
        "--spec",
        metavar="FILE.json",
        help="The spec, as `weightspace spec -o` writes it, instead of a trace.",
    ),
]
TOLERANCE = 1e-5
"""Relative change of the output by which rounding explains itself."""


# -- checkpoints -------------------------------------------------------------------------------------------


def open_networks(
    references: Sequence[str], architecture: str | None = None, *, least: int = 2
) -> list[Network]:
    """Open checkpoints; those that store no architecture take the others'.

    Raises:
        ConfigError: fewer than ``least``.
        CheckpointError: a file cannot be read, or the stored architectures differ.
    """
    if len(references) < least:
        raise ConfigError(
            f"networks: expected at least {'two' if least == 2 else least}, found {len(references)}"
        )
    given = parse_architecture(architecture)
    found = [open_network(reference, given) for reference in references]
    known = next((network for network in found if network.architecture is not None), None)
    for network in found:
        if known and network.architecture and network.architecture != known.architecture:
            raise CheckpointError(
                f"{network.name}: its architecture differs from that of {known.name}: "
                f"{json.dumps(network.architecture)} and {json.dumps(known.architecture)}"
            )
    return found


def check_output_is_no_input(output: Path, networks: Iterable[Network]) -> None:
    """Through links too.

    Raises:
        OutputError: the output is a file of an input.
    """
    for network in networks:
        for path in network.files:
            if path.exists() and output.exists() and os.path.samefile(path, output):
                raise OutputError(f"output: {output} is the input {network.name}; choose another name")


def check_alike(networks: Sequence[Network], spec: WeightSpec | None, *, values: bool) -> None:
    """Refuse networks that do not fit each other, or the spec.

    Raises:
        CheckpointError: one sentence about the first thing that does not fit.
    """
    fatal = [difference for difference in differences(networks, spec, values=values) if difference.is_fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more; see weightspace check)" if len(fatal) > 1 else ""
        raise CheckpointError(f"{fatal[0].text}{more}")


def check_module(networks: Sequence[Network], module: nn.Module, place: str) -> None:
    """Refuse networks that are none of the module.

    Raises:
        CheckpointError: one sentence about the first thing that does not fit.
    """
    held = HeldWeights(module.state_dict())
    stored = networks[0].weights
    tied = {held.tied(name) for name in held if name in stored}
    state = {name: held[name] for name in held if name in stored or held.tied(name) not in tied}
    check_alike([Network(HeldWeights(state), None, place), *networks], None, values=False)
    for name, first in tied_names(module, stored).items():
        for network in networks if name != first else ():
            if not torch.equal(network.weights[name], network.weights[first]):
                raise CheckpointError(
                    f"{network.name}: {name!r} is tied to {first!r}, expected equal values, found others"
                )


def tied_names(module: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """For every stored name of a module's tensors the first that is stored of the same tensor."""
    held = HeldWeights(module.state_dict())
    first: dict[object, str] = {}
    return {name: first.setdefault(held.tied(name), name) for name in stored if name in held}


def in_memory(
    network: Network,
    spec: WeightSpec | None = None,
    device: str = "cpu",
    ties: Mapping[str, str] | None = None,
) -> Weights:
    """All tensors of a network; with a spec, tied ones under the first of their names alone.

    Args:
        network: whose tensors are copied.
        spec: of the networks, if known.
        device: to which.
        ties: what :func:`tied_names` says: such tensors become one, which is what tells that they are tied.
    """
    held: dict[object, Tensor] = {}
    weights = {}
    for name in network.weights:
        key: object = network.weights.tied(name) if isinstance(network.weights, StoredWeights) else name
        if ties is not None and name in ties:
            key = "module", ties[name]
        if key not in held:
            held[key] = network.weights[name].to(device, copy=True)
        weights[first_name(spec, name)] = held[key]
    return weights


def first_name(spec: WeightSpec | None, name: str) -> str:
    """The spec's own name for a tensor that may be stored under another (tied weights)."""
    return name if spec is None else spec.primary(name) or name


def as_stored(network: Network, spec: WeightSpec, weights: Mapping[str, Tensor]) -> Weights:
    """Weights under the names that the network has in its file."""
    return {name: weights[first_name(spec, name)] for name in network.weights}


# -- architecture ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpaceOptions:
    """What the options say of the architecture."""

    module: str | None = None
    module_args: Sequence[str] | None = None
    inputs: Sequence[str] | None = None
    spec: Path | None = None
    architecture: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Space:
    """What is known of the networks' architecture.

    Args:
        module: that computes their function.
        inputs: random ones that it accepts.
        shape: of one input; None where nobody said.
        given: the spec that the user wrote down.
        place: what messages call the module.
    """

    module: nn.Module | None = None
    inputs: Inputs | None = None
    shape: tuple[int, ...] | None = None
    given: WeightSpec | None = None
    place: str = "module"

    def spec(self, data: Data | None = None) -> WeightSpec | None:
        """The spec, from a trace if need be; None where nothing is known.

        Raises:
            SpecError: the module cannot be traced.
            ConfigError: it cannot be called with the inputs.
        """
        if self.given is not None or self.module is None:
            return self.given
        from weightspace.spec import trace
        from weightspace.zoo import spec_of

        if not self.is_users:
            return spec_of(self.module)
        inputs = self.sample(data)
        if inputs is None:
            raise ConfigError(
                "--input: expected the shape of an input of --module, such as 2,3,32,32, or --data"
            )
        # what a symmetry does to the output is measured on the networks themselves, at the end
        with users_code(), blaming_module(self.place, self.module, [inputs]):
            return trace(self.module, inputs, verify=False)

    @property
    def is_users(self) -> bool:
        """Whether the module is the user's own."""
        return self.place != "module"

    def sample(self, data: Data | None = None) -> Inputs | None:
        """Some inputs: random ones where their shape is known, else the first of the data."""
        return self.inputs if self.inputs is not None or data is None else (data.train.inputs[:64],)


def find_space(options: SpaceOptions, networks: Sequence[Network]) -> Space:
    """What the options and the checkpoints say of the architecture.

    Raises:
        ConfigError: there is no such module, or inputs that are none.
        SpecError: the file holds no spec.
        CheckpointError: the networks do not fit the spec that was given.
    """
    given = None if options.spec is None else _read_spec(options.spec)
    architecture = next((n.architecture for n in networks if n.architecture is not None), None)
    if options.module is not None:
        arguments = parse_settings(options.module_args, "--module-args")
        inputs = parse_inputs(options.inputs, seed=options.seed)[0] if options.inputs else None
        module = load_module(options.module, arguments, seed=options.seed).eval()
        first = inputs[0] if isinstance(inputs, tuple) else None
        shape = None if first is None else tuple(first.shape[1:])
        return Space(module, inputs, shape, given, options.module)
    for option, value in (("--input", options.inputs), ("--module-args", options.module_args)):
        if value:
            raise ConfigError(f"{option}: expected --module beside it, found none")
    if architecture is None:
        return Space(given=given)
    return _built(architecture, given, options.seed)


def _built(architecture: Mapping[str, Any], given: WeightSpec | None, seed: int) -> Space:
    from weightspace.nets import build

    net = build(architecture).eval()
    few = 1024 if len(net.input_shape) == 1 else 64  # images cost more
    inputs = (net.random_inputs(few, torch.Generator().manual_seed(seed)),)
    return Space(net, inputs, tuple(net.input_shape), given)


def _read_spec(path: Path) -> WeightSpec:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SpecError(f"--spec {path}: cannot be read ({reason})") from None
    try:
        return WeightSpec.from_json(text)
    except SpecError as error:
        raise SpecError(f"--spec {path}: {error}") from None


def unknown_architecture(networks: Sequence[Network], why: str) -> CheckpointError:
    """The error for what cannot be done without a spec."""
    return CheckpointError(
        f"{networks[0].name}: no architecture is stored beside the weights, and {why} needs it: pass --module and "
        "--input, --spec, or --architecture for one of the library's own"
    )


def data_for(space: Space, networks: Sequence[Network], options: DataOptions) -> Data | None:
    """The data that the options name, or that the zoo says; with inputs of the shape that the module takes."""
    recipe = next((network.recipe for network in networks if network.recipe is not None), None)
    return find_data(options, space.shape, recipe)


# -- what is said ------------------------------------------------------------------------------------------


def measured_change(
    space: Space, before: Mapping[str, Tensor], after: Mapping[str, Tensor], data: Data | None
) -> float | None:
    """By how much the function changed, relative to its largest value; None where there is no module to run."""
    from weightspace.spec import output_change

    inputs = space.sample(data)
    if space.module is None or inputs is None:
        return None
    old, new = ({name: tensor.cpu() for name, tensor in weights.items()} for weights in (before, after))
    module = space.module
    with users_code(), blaming_module(space.place, module, [inputs]):
        return output_change(module, old, new, inputs)


def change_text(changes: Sequence[float | None]) -> str:
    """What is printed of :func:`measured_change`, with a warning on standard error where it is more than rounding."""
    known = [change for change in changes if change is not None]
    if not known:
        say(
            "weightspace: warning: the outputs were not compared: there is no module to run, pass --module and --input"
        )
        return "outputs were not compared"
    worst = max(known)
    if not worst <= TOLERANCE:
        say(
            f"weightspace: warning: the outputs changed by {worst:.1e} of their largest value, more than {TOLERANCE:.0e}: "
            "the networks do not compute what they did"
        )
    return f"the function changed by {worst:.1e} of its largest value"


def record(command: str, networks: Sequence[Network], **facts: Any) -> dict[str, str]:
    """Metadata of an output: what it was made of, and how."""
    made = {
        "version": version("weightspace"),
        "command": command,
        **{name: value for name, value in facts.items() if value is not None},
        "networks": [described(network) for network in networks],
    }
    return {"weightspace": json.dumps(made, default=str)}


def described(network: Network) -> dict[str, Any]:
    """A network for a record: its name without folders, and the digests of its files."""
    row = re.search(r"(::.*)?\[-?\d+\]$", network.name)
    tail = row.group() if row and not Path(network.name).exists() else ""
    name = Path(network.name.removesuffix(tail)).name + tail
    return {"name": name, "digests": network.digests()}
