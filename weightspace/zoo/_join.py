"""Many zoo files into one, in a single pass: read, verify, digest and write at the same time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from weightspace.errors import ZooError
from weightspace.zoo._files import (
    PER_NETWORK,
    TABLES,
    ContentDigest,
    check_output,
    new_file,
    open_zoo,
    stored_digest,
    write_header,
    write_population,
    write_sources,
)
from weightspace.zoo._zoo import Population, Source, Zoo

BLOCK = 2**21  # bytes that are read, digested and written at once: they stay in the cache
FLUSH = 64  # blocks after which the disk is told to write: it would idle while we digest, and then hold us up
BUFFERS = 4  # two are being read ahead while two are digested and written


@dataclass
class _Member:
    """One of the files.

    Args:
        path: of the file.
        stored: as it is, with weights that are mapped from the file.
        joined: what becomes of its populations.
        digest: of what is read from the file.
    """

    path: Path
    stored: Zoo
    joined: Mapping[str, Population]
    digest: ContentDigest = field(default_factory=ContentDigest)

    def verify(self) -> None:
        """Raise ZooError when what was read is not what was written."""
        found, claimed = self.digest.finish(self.stored.recipe), stored_digest(self.path)
        if found != claimed:
            raise ZooError(f"zoo {self.path}: content is damaged: digest should be {claimed}, found {found}")


def join_zoos(
    paths: Sequence[Path],
    output: Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    sources: Mapping[str, Source] | None = None,
    overwrite: bool = False,
) -> str:
    """Concatenate zoos, block by block, into one file; returns its digest.

    Populations of one name become one, whose networks are renumbered consecutively in the order of ``paths``;
    a zoo need not have all of them. The weights are read once: what is written is digested, and compared with the
    digest of the file that it came from, on the way; memory does not grow with them.

    Args:
        paths: of zoos.
        output: of the joined zoo.
        recipe: that the joined zoo records.
        sources: that the joined zoo stores; those of ``paths`` are left out.
        overwrite: replace an existing file.

    Raises:
        ZooError: no paths, a file cannot be read or is damaged, or two populations of one name differ in more than
            their networks.
        OutputError: ``output`` exists and may not be overwritten, or cannot be written.
    """
    if not paths:
        raise ZooError("join: expected at least one zoo, found none")
    members = [_Member(path, zoo, zoo.populations) for path in paths for zoo in [open_zoo(path)]]
    return _join(members, output, recipe, sources or {}, overwrite)


def join_finished(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> str:
    """Bring finished zoos that belong together into one, with the signals that they store; returns its digest.

    Populations of one name have to be of one architecture and protocol. The recipe is kept where all have the same.
    Networks of one item stay in one split: an item that several zoos have keeps the split that the first of them
    gives it. Zoos that store no signals number their networks by themselves; their ``source`` is renumbered.

    Args:
        paths: of two zoos or more.
        output: of the joined zoo.
        overwrite: replace an existing file.

    Raises:
        ZooError: fewer than two zoos or the same one twice, a file cannot be read or is damaged, populations that
            differ in more than their networks, or one item with two contents.
        OutputError: ``output`` exists and may not be overwritten, or cannot be written.
    """
    if len(paths) < 2:
        raise ZooError(f"join: expected at least two zoos, found {len(paths)}")
    check_output(output, overwrite=overwrite)
    zoos = [open_zoo(path) for path in paths]
    _check_distinct(paths)
    sources = _joined_sources(paths, zoos)
    members = [
        _Member(path, zoo, joined) for path, zoo, joined in zip(paths, zoos, _renumbered(zoos), strict=True)
    ]
    recipe = zoos[0].recipe if all(zoo.recipe == zoos[0].recipe for zoo in zoos) else None
    return _join(members, output, recipe, sources, overwrite)


def _check_distinct(paths: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in paths:
        digest = stored_digest(path)
        if digest in seen:
            raise ZooError(f"join: {path} holds the same networks as {seen[digest]}")
        seen[digest] = path


def _joined_sources(paths: Sequence[Path], zoos: Sequence[Zoo]) -> dict[str, Source]:
    joined: dict[str, Source] = {}
    for path, zoo in zip(paths, zoos, strict=True):
        for name, source in zoo.sources.items():
            joined[name] = _united(path, name, joined[name], source) if name in joined else source
    return joined


def _united(path: Path, name: str, one: Source, other: Source) -> Source:
    if one.items.shape[1:] != other.items.shape[1:] or one.items.dtype != other.items.dtype:
        raise ZooError(f"zoo {path}: the items of source {name!r} differ in shape or type from those before")
    _, at, place = np.intersect1d(one.index, other.index, assume_unique=True, return_indices=True)
    same = (one.items[at] == other.items[place]).all(tuple(range(1, one.items.ndim)))
    if not same.all():
        item = one.index[at[~same][0]]
        raise ZooError(f"zoo {path}: item {item} of source {name!r} is another one than in the zoos before")
    new = np.setdiff1d(np.arange(len(other.index)), place)
    index = np.concatenate([one.index, other.index[new]])
    order = np.argsort(index)
    return Source(np.concatenate([one.items, other.items[new]])[order], index[order])


def _renumbered(zoos: Sequence[Zoo]) -> Iterator[dict[str, Population]]:
    """Populations whose networks of one item are in one split, and whose numbers of items do not collide."""
    splits: dict[str, dict[int, int]] = {}
    first = 0
    for zoo in zoos:
        if zoo.sources:
            yield {
                name: _settled(population, splits.setdefault(_source_name(zoo, population), {}))
                for name, population in zoo.populations.items()
            }
        else:
            yield {
                name: replace(population, source=population.source + first)
                for name, population in zoo.populations.items()
            }
            first += 1 + max(int(population.source.max()) for population in zoo.populations.values())


def _source_name(zoo: Zoo, population: Population) -> str:
    return str(population.protocol.get("source", next(iter(zoo.sources))))


def _settled(population: Population, splits: dict[int, int]) -> Population:
    pairs = zip(population.source.tolist(), population.split.tolist(), strict=True)
    split = [splits.setdefault(item, own) for item, own in pairs]
    return replace(population, split=np.array(split, dtype=population.split.dtype))


# -- one pass ----------------------------------------------------------------------------------------------


def _join(
    members: Sequence[_Member],
    output: Path,
    recipe: Mapping[str, Any] | None,
    sources: Mapping[str, Source],
    overwrite: bool,
) -> str:
    names = dict.fromkeys(name for member in members for name in member.joined)
    parts = {name: [member for member in members if name in member.joined] for name in names}
    for name, found in parts.items():
        for member in found[1:]:
            _check_alike(member, found[0], name)
    digest = ContentDigest()
    with new_file(output, overwrite=overwrite) as file, _Copier(file) as copier:
        for name, found in sorted(parts.items()):  # the digest's order
            population = _concatenated([member.joined[name] for member in found])
            weights = write_population(file.create_group(f"populations/{name}"), population)
            digest.begin(name, population)
            copier.copy(name, found, weights, digest)
            digest.end(population)
        for member in members:
            member.verify()
        write_sources(file, sources)
        found_digest = digest.finish(recipe)
        write_header(file, recipe, found_digest)
    return found_digest


@dataclass(frozen=True)
class _Block:
    """Some bytes on their way from one file to another.

    Args:
        path: of the file that they are read from.
        start: where they stand there.
        size: how many.
        target: where they go.
        stored: the population whose weights they are.
        digest: of the file that they are read from.
        is_first: of the population's weights.
        is_last: of the population's weights.
    """

    path: Path
    start: int
    size: int
    target: int
    name: str
    stored: Population
    digest: ContentDigest
    is_first: bool
    is_last: bool

    def read(self, view: memoryview) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            at = 0
            while at < self.size:
                got = file.readinto(view[at : self.size])
                if not got:
                    raise ZooError(f"zoo {self.path}: file is truncated; copy or generate it again")
                at += got

    def write(self, descriptor: int, view: memoryview) -> None:
        at = 0
        while at < self.size:
            at += os.pwrite(descriptor, view[at : self.size], self.target + at)

    def check(self, view: memoryview) -> None:
        if self.is_first:
            self.digest.begin(self.name, self.stored)
        self.digest.block(view[: self.size])
        if self.is_last:
            self.digest.end(self.stored)


def _blocks(name: str, members: Sequence[_Member], target: int) -> Iterator[_Block]:
    for member in members:
        stored = member.stored[name]
        weights = stored.weights
        assert isinstance(weights, np.memmap)
        for start in range(0, weights.nbytes, BLOCK):
            size = min(BLOCK, weights.nbytes - start)
            yield _Block(
                member.path,
                weights.offset + start,
                size,
                target,
                name,
                stored,
                member.digest,
                is_first=start == 0,
                is_last=start + size == weights.nbytes,
            )
            target += size


class _Copier:
    """Copies weights past the HDF5 library, which keeps the interpreter to itself.

    One thread reads ahead, one writes, one digests what each file holds, one waits for the disk; the caller's digests
    the whole.

    Args:
        file: the output.
    """

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self.buffers = [memoryview(bytearray(BLOCK)) for _ in range(BUFFERS)]
        self.busy: list[list[Future[None]]] = [[] for _ in range(BUFFERS)]
        self.flushes: list[Future[None]] = []
        self.threads = [ThreadPoolExecutor(1, thread_name_prefix="weightspace-join") for _ in range(4)]

    def __enter__(self) -> _Copier:
        self.descriptor = os.open(self.file.filename, os.O_WRONLY)
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self.threads:
            thread.shutdown(cancel_futures=True)
        os.close(self.descriptor)

    def copy(
        self, name: str, members: Sequence[_Member], weights: h5py.Dataset, digest: ContentDigest
    ) -> None:
        """The weights of one population of all files.

        Args:
            name: of the population.
            members: the files, in order.
            weights: where they go.
            digest: of the output.
        """
        offset = weights.id.get_offset()
        assert offset is not None
        ahead: deque[tuple[_Block, int, Future[None]]] = deque()
        for number, block in enumerate(_blocks(name, members, offset)):
            slot = number % BUFFERS
            self._wait(slot)
            ahead.append((block, slot, self.threads[0].submit(block.read, self.buffers[slot])))
            if len(ahead) == BUFFERS // 2:
                self._pass_on(*ahead.popleft(), digest)
            if number % FLUSH == FLUSH - 1:
                self.flushes.append(self.threads[3].submit(os.fsync, self.descriptor))
        while ahead:
            self._pass_on(*ahead.popleft(), digest)
        for slot in range(BUFFERS):
            self._wait(slot)
        for flush in self.flushes:
            flush.result()  # the system tells of a disk's error once
        self.flushes.clear()

    def _pass_on(self, block: _Block, slot: int, read: Future[None], digest: ContentDigest) -> None:
        read.result()
        view = self.buffers[slot]
        self.busy[slot] = [
            self.threads[1].submit(block.write, self.descriptor, view),
            self.threads[2].submit(block.check, view),
        ]
        digest.block(view[: block.size])

    def _wait(self, slot: int) -> None:
        for future in self.busy[slot]:
            future.result()
        self.busy[slot] = []


# -- what belongs together ---------------------------------------------------------------------------------


def _check_alike(member: _Member, first: _Member, name: str) -> None:
    population, other = member.joined[name], first.joined[name]
    place, there = f"zoo {member.path}", first.path
    if population.spec != other.spec:
        raise ZooError(f"{place}: the spec differs from that of {there}")
    for key in ("architecture", "protocol", "dtype"):
        if getattr(population, key) != getattr(other, key):
            raise ZooError(f"{place}: {key} differs from that of {there}")
    for table in TABLES:
        if _types(getattr(population, table)) != _types(getattr(other, table)):
            raise ZooError(f"{place}: {table} differ from those of {there}")


def _types(table: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
    return {name: values.dtype for name, values in table.items()}


def _concatenated(members: Sequence[Population]) -> Population:
    """All but the weights, which stay with the members."""
    first = members[0]
    offsets = np.cumsum([0, *(member.networks for member in members[:-1])])
    tables: dict[str, Any] = {
        table: {
            name: np.concatenate([getattr(member, table)[name] for member in members])
            for name in getattr(first, table)
        }
        for table in TABLES
    }
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(member, name) for member in members]) for name in ("step", *PER_NETWORK)
    }
    return replace(
        first,
        network=np.concatenate([member.network + at for member, at in zip(members, offsets, strict=True)]),
        **columns,
        **tables,
    )
