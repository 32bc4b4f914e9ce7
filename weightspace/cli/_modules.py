"""The user's own module on the command line: where its factory is, its arguments, and inputs to call it with."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TextIO

import torch
import typer
from torch import Tensor, nn

from weightspace.cli._output import say
from weightspace.errors import ConfigError, SpecWarning, WeightspaceError

_MODULE = typer.Option(
    "--module",
    metavar="PLACE:FACTORY",
    help="What makes the module, a class or a function: package.module:factory or path/to/file.py:factory. "
    "Its code runs.",
)
_INPUTS = typer.Option(
    "--input",
    metavar="[NAME=][TYPE:]SHAPE[:BOUND]",
    help="An example input, random: 2,3,32,32 (float32), int64:2,16:100 (whole numbers below 100) or bool:2,16. "
    "Once per positional argument; mask=bool:2,16 for an argument by name.",
)
ModuleOption = Annotated[str, _MODULE]
OptionalModule = Annotated[str | None, _MODULE]
ModuleArgs = Annotated[
    list[str] | None,
    typer.Option("--module-args", metavar="KEY=VALUE", help="Arguments of the factory; values are YAML."),
]
MoreModuleArgs = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="More of --module-args.")
]
InputOption = Annotated[list[str], _INPUTS]
OptionalInput = Annotated[list[str] | None, _INPUTS]

_INPUT = re.compile(
    r"((?P<name>[^\W\d]\w*)=)?((?P<type>[^\W\d]\w*):)?(?P<shape>[0-9]+(,[0-9]+)*)(:(?P<bound>[0-9]+))?"
)
_FLOATS = ("float32", "float64", "float16", "bfloat16")
_INTEGERS = ("int64", "int32")
_SYNTAX = "expected a shape such as 2,3,32,32, int64:2,16:100 or mask=bool:2,16"


# -- the module --------------------------------------------------------------------------------------------


@contextmanager
def users_code() -> Iterator[None]:
    """What the user's code prints is no result; what a spec lacks is said in one line."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("always", SpecWarning)
        others = warnings.showwarning

        def shown(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, SpecWarning):
                say(f"weightspace: {message}")
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = shown
        yield


def load_module(place: str, arguments: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Import the factory and call it; this runs the user's code.

    Args:
        place: ``"package.module:factory"`` or ``"path/to/file.py:factory"``. The current directory, or that of
            the file, can be imported from. A module that exists already serves as well as its factory.
        arguments: keyword arguments of the factory.
        seed: of the random numbers that it draws.

    Raises:
        ConfigError: there is no such factory, it does not take the arguments, it raises, or makes no module.
    """
    source, colon, name = place.rpartition(":")
    if not colon or not source or not name:
        raise ConfigError(
            f"--module: expected package.module:factory or path/to/file.py:factory, found {place!r}"
        )
    is_file = source.endswith(".py")
    folder = Path(source).parent if is_file else Path()
    with users_code(), _importable(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factory = _attribute(_from_file(Path(source)) if is_file else _imported(source), source, name)
        torch.manual_seed(seed)  # an import draws numbers the first time alone
        return _made(factory, place, arguments)


def _made(factory: Any, place: str, arguments: Mapping[str, Any]) -> nn.Module:
    if isinstance(factory, nn.Module) and not arguments:
        return factory
    if isinstance(factory, nn.Module) or not callable(factory):
        kind = type(factory).__name__
        raise ConfigError(f"--module: {place} should be a class or a function, found a {kind}")
    _check_arguments(factory, place.rpartition(":")[2], arguments)
    made = _run(f"{place} failed", lambda: factory(**arguments))
    if not isinstance(made, nn.Module):
        raise ConfigError(f"--module: {place} should make a torch.nn.Module, made a {type(made).__name__}")
    return made


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """As ``python -m`` does; the entry point of an installed command does not."""
    before = list(sys.path)
    sys.path.insert(0, str(directory.resolve()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _imported(name: str) -> ModuleType:
    def load() -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            # a part of the name itself, and not something that the module imports
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(
                    f"--module: there is no module {error.name}, neither installed nor in {Path.cwd()}"
                ) from None
            raise

    return _run(f"importing {name} failed", load)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"--module: file {path} not found")
    name = f"_module_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and torch.export look for the source of a class
    loader = spec.loader
    _run(f"importing {path} failed", lambda: loader.exec_module(module))
    return module


@contextmanager
def blaming_module(place: str, module: nn.Module, calls: Sequence[Inputs]) -> Iterator[None]:
    """Around what runs a module in ways of its own: an error that the plain module raises too is its user's.

    Raises:
        ConfigError: the module cannot be called with one of the inputs.
    """
    try:
        yield
    except WeightspaceError:
        raise
    except Exception:
        for call in calls:
            _called(place, module, call)
        raise  # the module itself works: ours to mend


def _called(place: str, module: nn.Module, call: Inputs) -> None:
    args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
    given = ", ".join(
        f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        for tensor in (*args, *kwargs.values())
    )
    with torch.no_grad():
        _run(f"{place} cannot be called with {given}", lambda: module(*args, **kwargs))


def _attribute(module: ModuleType, source: str, name: str) -> Any:
    try:
        return attrgetter(name)(module)
    except AttributeError:
        has = [
            other
            for other, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        listed = f"; it defines {', '.join(has[:8])}" if has else ""
        raise ConfigError(f"--module: {source} has no {name}{listed}") from None


def _check_arguments(factory: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(map(str, signature.parameters.values())) or "no arguments"
        raise ConfigError(f"--module-args: {name} {error}; it takes {takes}") from None


def _run(what: str, code: Callable[[], Any]) -> Any:
    """Run the user's code; whatever it raises becomes one sentence with the line that it blames."""
    try:
        return code()
    except WeightspaceError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split("\n", 1)[0].split())
        told = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise ConfigError(f"--module: {what}: {told}{_blamed(error)}") from error


def _blamed(error: BaseException) -> str:
    """The last line of the user's own code that was running."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__
        and "site-packages" not in frame.filename
        and not frame.filename.startswith(("<", sysconfig.get_path("stdlib")))
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


# -- its inputs --------------------------------------------------------------------------------------------

Inputs = tuple[Tensor, ...] | dict[str, Tensor]


def parse_inputs(texts: Sequence[str], more: Sequence[str] = (), *, seed: int = 0) -> list[Inputs]:
    """Random example inputs: those of the first call and, from ``more``, of further calls.

    Floating types are normal, integers uniform below their bound. ``more`` holds as many texts per call as the
    first call has.

    Raises:
        ConfigError: a text that is no input, or another number of them than full calls need.
    """
    if len(more) % len(texts):
        raise ConfigError(
            f"--more-input: expected {len(texts)} for each further call, as many as --input, found {len(more)}"
        )
    generator = torch.Generator().manual_seed(seed)
    calls = [texts, *(more[at : at + len(texts)] for at in range(0, len(more), len(texts)))]
    return [
        _call("--more-input" if index else "--input", call, generator) for index, call in enumerate(calls)
    ]


def _call(option: str, texts: Sequence[str], generator: torch.Generator) -> Inputs:
    parsed = [_input(option, text, generator) for text in texts]
    names = [name for name, _ in parsed if name]
    if not names:
        return tuple(tensor for _, tensor in parsed)
    if len(set(names)) < len(parsed):
        raise ConfigError(
            f"{option}: expected a different name for every input, or no names, found {' '.join(texts)}"
        )
    return {name: tensor for name, tensor in parsed if name}


def _input(option: str, text: str, generator: torch.Generator) -> tuple[str | None, Tensor]:
    match = _INPUT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option}: {_SYNTAX}, found {text!r}")
    kind, bound = match["type"] or "float32", match["bound"]
    shape = [int(size) for size in match["shape"].split(",")]
    if kind not in (*_FLOATS, *_INTEGERS, "bool"):
        listed = ", ".join((*_FLOATS, *_INTEGERS, "bool"))
        raise ConfigError(f"{option} {text}: expected a type of {listed}, found {kind!r}")
    if (kind in _INTEGERS) != (bound is not None):
        wanted = "a bound, as in int64:2,16:100" if kind in _INTEGERS else f"no bound for {kind}"
        raise ConfigError(f"{option} {text}: expected {wanted}")
    if min(shape) < 1 or (bound is not None and int(bound) < 1):
        raise ConfigError(f"{option} {text}: sizes and bound should be at least 1")
    try:
        return match["name"], _random(shape, getattr(torch, kind), int(bound or 2), generator)
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"{option} {text}: no such tensor can be made ({reason})") from None


def _random(shape: list[int], dtype: torch.dtype, bound: int, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(bound, shape, generator=generator).to(dtype)
