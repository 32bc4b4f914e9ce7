"""Where shards are made: in this process, or on a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType

from weightspace.datagen._shards import ShardFolder
from weightspace.datagen._work import Shard, Work
from weightspace.errors import ConfigError

ENGINES = ("local", "ray")
Tell = Callable[[int, int | float], None]
"""Called with the number of a shard and how many of its networks are finished."""


class ShardEngine(ABC):
    """Makes shards; a context, which an engine that has to connect leaves when all is done."""

    @abstractmethod
    def make(self, work: Work, shards: Sequence[Shard], folder: ShardFolder, tell: Tell) -> None:
        """Make shards and put them into their folder.

        Args:
            work: of which they are.
            shards: to be made, in any order.
            folder: where they go, and where the states of unfinished ones are.
            tell: of finished networks.
        """

    def __enter__(self) -> ShardEngine:
        return self

    def __exit__(  # noqa: B027
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to leave."""


class LocalEngine(ShardEngine):
    """One shard after the other, in this process; each uses all cores."""

    def make(self, work: Work, shards: Sequence[Shard], folder: ShardFolder, tell: Tell) -> None:
        """See :class:`ShardEngine`."""
        for shard in shards:

            def progress(networks: int | float, number: int = shard.number) -> None:
                tell(number, networks)

            folder.save(shard.number, work.make(shard, folder.state(shard.number), progress))
            progress(shard.networks)


def choose_engine(name: str, address: str | None) -> ShardEngine:
    """The engine of a name, connected.

    Raises:
        ConfigError: no such engine, not installed, or not reachable.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}")
    if name == "ray":
        from weightspace.datagen._ray import RayEngine

        return RayEngine(address)
    if address is not None:
        raise ConfigError(f"address: expected none for the engine 'local', found {address!r}")
    return LocalEngine()
