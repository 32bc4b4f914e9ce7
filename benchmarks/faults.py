"""What generation survives: after every fault the same command ends with the digest of an undisturbed run.

Real processes that run `weightspace generate`, forked from this one, which has imported it: SIGKILLs at seeded random
moments, a full disk (a tmpfs of limited size, for root only), a damaged shard, two writers at once, and a worker and a
node of a Ray cluster that are lost (where Ray is installed). The log names every fault and what followed.

    python benchmarks/faults.py --recipe digits-inr --count 300
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _report

import weightspace.datagen  # noqa: F401  # so that forks need not import it
from weightspace import cli
from weightspace.zoo import Zoo, verify_digest

COLUMNS = {
    "fault": "{fault}",
    "times": "{times}",
    "what was said": "{said}",
    "calls": "{calls}",
    "trained by the last call": "{trained}",
    "digest": "{digest}",
}
SHARD = "shard-00000.h5"


class Child:
    """A process that runs the command.

    Args:
        arguments: of the command.
        fresh: start Python anew: a fork of a process that speaks to a Ray cluster would not do.
    """

    def __init__(self, arguments: Sequence[str], *, fresh: bool) -> None:
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self.code: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        if fresh:
            command = [sys.executable, "-c", "from weightspace.cli import main; main()", *arguments]
            self.process = subprocess.Popen(command, stdout=self.out, stderr=self.err)
            self.pid = self.process.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                self._become(arguments)

    def _become(self, arguments: Sequence[str]) -> None:
        code = 1
        try:
            os.dup2(self.out.fileno(), 1)
            os.dup2(self.err.fileno(), 2)
            # a parent under pytest has put others in their place
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            code = cli.run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None and self.process is not None:
            self.code = self.process.poll()
        elif self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = float("inf")) -> bool:
        """Whether it ended within the time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.code is not None

    def kill(self) -> None:
        """As the system does it when memory runs out."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        self.out.close()
        self.err.close()

    def said(self) -> tuple[dict[str, Any], str]:
        """The report, and what stands on standard error."""
        self.wait()
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return json.loads(texts[0]) if texts[0] else {}, texts[1].strip()


@dataclass
class Bench:
    """A recipe, where it is made, and the log.

    Args:
        recipe: words of the command, without output.
        folder: for zoos.
        log: lines.
    """

    recipe: list[str]
    folder: Path
    log: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    digest: str = ""
    seconds: float = 0.0

    def say(self, line: str) -> None:
        """A line of the log, with the seconds since the start; no local paths."""
        text = f"{time.monotonic() - self.start:8.2f}  {line}".replace(str(self.folder), "DIR")
        self.log.append(re.sub(r"process \d+ on \S+", "process PID on HOST", text))
        print(self.log[-1], file=sys.stderr)

    def begin(self, output: Path, *more: str, fresh: bool = False) -> Child:
        """The command, started."""
        arguments = ["generate", *self.recipe, "-o", str(output), "--json", "--quiet", *more]
        return Child(arguments, fresh=fresh)

    def run(self, output: Path, *more: str) -> tuple[int | None, dict[str, Any], str]:
        """Exit code, report and what was said of a call that nothing interrupts."""
        child = self.begin(output, *more)
        report, err = child.said()
        return child.code, report, err

    def finish(self, fault: str, output: Path, times: int, calls: int, said: str) -> dict[str, Any]:
        """The same command once more, and what it ends with."""
        code, report, err = self.run(output)
        same = code == 0 and report["digest"] == self.digest == verify_digest(output)
        left = [path.name for path in output.parent.iterdir() if path != output]
        self.say(
            f"{fault}: exit code {code}, trained {report.get('trained')}, equal {same}, left behind {left} {err}"
        )
        return {
            "fault": fault,
            "times": times,
            "said": said or "nothing",
            "calls": calls + 1,
            "trained": report.get("trained", 0),
            "digest": "equal" if same and not left else "DIFFERENT",
            "is_equal": same and not left,
        }


def parts_of(output: Path) -> Path:
    """Where shards wait."""
    return output.with_name(f"{output.name}.parts")


def place(bench: Bench, name: str) -> Path:
    """An output in a folder of its own."""
    folder = bench.folder / name
    folder.mkdir()
    return folder / "zoo.h5"


def undisturbed(bench: Bench) -> None:
    """What all others are compared with."""
    output = place(bench, "undisturbed")
    start = time.monotonic()
    code, report, err = bench.run(output)
    assert code == 0, err
    bench.digest, bench.seconds = report["digest"], time.monotonic() - start
    bench.say(f"undisturbed: {report['networks']} networks, {report['shards']} shards, {report['digest']}")


def killed(bench: Bench, kills: int, seed: int) -> dict[str, Any]:
    """SIGKILL after random times, until so many have hit; a run that completes starts from nothing again."""
    output = place(bench, "killed")
    rng = random.Random(seed)
    hits = calls = completed = 0
    seconds = bench.seconds
    while hits < kills:
        start = time.monotonic()
        child = bench.begin(output)
        calls += 1
        moment = rng.uniform(0.0, 0.9 * seconds)
        if not child.wait(moment):
            child.kill()
            hits += 1
            shards = len(list(parts_of(output).glob("shard-*.h5")))
            bench.say(f"kill {hits} after {moment:.2f} s: {shards} shards, zoo {output.exists()}")
            continue
        completed += 1
        seconds = min(seconds, time.monotonic() - start)  # other work may have slowed the undisturbed run
        report, err = child.said()
        equal = report.get("digest") == bench.digest
        bench.say(f"run completed: exit code {child.code}, equal {equal} {err}")
        if not equal:
            break
        output.unlink()
    said = f"{completed} runs completed in between"
    return bench.finish("SIGKILL at a random moment", output, hits, calls, said)


def damaged(bench: Bench, seed: int) -> dict[str, Any]:
    """One byte of a shard's weights is changed."""
    output = place(bench, "damaged")
    bench.run(output, "--shards", "1/1")
    shard = parts_of(output) / SHARD
    content = bytearray(shard.read_bytes())
    population = next(iter(Zoo.open(shard).populations.values()))
    at = population.weights.offset + random.Random(seed).randrange(population.weights.nbytes)
    content[at] ^= 16
    shard.write_bytes(content)
    bench.say(f"byte {at} of {SHARD} changed")
    return bench.finish("a byte of a shard changed", output, 1, 1, "")


def two_writers(bench: Bench) -> dict[str, Any]:
    """The same command twice at the same time."""
    output = place(bench, "writers")
    children = [bench.begin(output) for _ in range(2)]
    texts = [child.said()[1] for child in children]
    codes = sorted(child.code or 0 for child in children)
    said = " ".join(text for text in texts if text).replace(str(bench.folder), "DIR")
    said = re.sub(r"process \d+ on \S+;", "process PID on HOST;", said)
    bench.say(f"two writers: exit codes {codes}; {said}")
    return bench.finish(f"two writers at once (exit codes {codes[0]} and {codes[1]})", output, 1, 2, said)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of limited size."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(bench: Bench) -> dict[str, Any] | None:
    """No room at the start; then another file takes the room while it runs; then there is room."""
    if os.geteuid() != 0:
        bench.say("full disk: skipped, mounting a tmpfs needs root")
        return None
    size = (bench.folder / "undisturbed" / "zoo.h5").stat().st_size
    output = place(bench, "disk")
    with small_disk(output.parent, 4 * size):
        ballast = output.parent / "ballast"
        ballast.write_bytes(bytes(3 * size))
        first = bench.run(output)
        bench.say(f"full disk, before the start: exit code {first[0]}, {first[2]}")
        ballast.unlink()
        child = bench.begin(output)
        while child.poll() is None and not (parts_of(output) / SHARD).exists():
            time.sleep(0.01)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        _, err = child.said()
        bench.say(f"full disk, meanwhile: exit code {child.code}, {err}")
        ballast.unlink()
        said = f"exit codes {first[0]} and {child.code}: {first[2]}; {err}"
        return bench.finish("a full disk", output, 2, 2, said.replace(str(bench.folder), "DIR"))


# -- ray ---------------------------------------------------------------------------------------------------


def busy_workers() -> list[int]:
    """Workers below this process that make a shard."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in lines.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def is_ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return [int(pid) for pid, _, text in rows if text.startswith("ray::make_shard") and is_ours(int(pid))]


def ray_faults(bench: Bench) -> list[dict[str, Any]]:
    """A worker is killed, and the node that makes the shards is lost while another one comes."""
    if importlib.util.find_spec("ray") is None:
        bench.say("ray: skipped, not installed")
        return []
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)

    def kill_worker() -> None:
        os.kill(busy_workers()[0], signal.SIGKILL)

    def lose_node() -> None:
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=2)

    try:
        return [
            ray_fault(bench, cluster.address, "a Ray worker killed", "worker", kill_worker),
            ray_fault(bench, cluster.address, "a Ray node removed", "node", lose_node),
        ]
    finally:
        cluster.shutdown()


def ray_fault(
    bench: Bench, address: str, fault: str, name: str, strike: Callable[[], None]
) -> dict[str, Any]:
    """Strikes as soon as a worker makes a shard."""
    output = place(bench, name)
    child = bench.begin(output, "--engine", "ray", "--address", address, fresh=True)
    hit = 0
    while child.poll() is None and not hit:
        time.sleep(0.02)
        with contextlib.suppress(IndexError, ProcessLookupError):
            if busy_workers():
                strike()
                hit = 1
                bench.say(f"{fault}: {len(list(parts_of(output).glob('shard-*.h5')))} shards were there")
    report, err = child.said()
    same = report.get("digest") == bench.digest
    bench.say(f"{fault}: the run went on; exit code {child.code}, equal {same}")
    said = "the run went on" if child.code == 0 else err.splitlines()[-1]
    return bench.finish(fault, output, hit, 1, said)


# -- the program -------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The defaults take some minutes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="digits-inr")
    parser.add_argument("--count", type=int, default=300, help="items or networks")
    parser.add_argument("--shard", type=int, default=30, help="networks per shard")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for `generate`")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--no-ray", action="store_true", help="leave the cluster out")
    parser.add_argument("--data-root", type=Path, help="as for `generate`")
    parser.add_argument("--toy", action="store_true", help="6 small networks, 2 kills, no Ray")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.count, arguments.shard, arguments.kills, arguments.no_ray = 6, 2, 2, True
        arguments.set = ["network.hidden=[4]", "protocol.steps=5", "source.size=8"]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Strike, print the table, and write ``faults.md``, ``faults.json`` and ``faults.log``."""
    arguments = parse(argv)
    settings = [f"shard={arguments.shard}", *arguments.set]
    recipe = [arguments.recipe, "--count", str(arguments.count), "--seed", "0", "--device", "cpu"]
    recipe += [word for setting in settings for word in ("--set", setting)]
    recipe += ["--data-root", str(arguments.data_root)] if arguments.data_root else []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(recipe, Path(name))
        undisturbed(bench)
        rows = [
            killed(bench, arguments.kills, arguments.seed),
            damaged(bench, arguments.seed),
            two_writers(bench),
            full_disk(bench),
            *([] if arguments.no_ray else ray_faults(bench)),
        ]
    rows = [row for row in rows if row is not None]
    setting = {
        "command": _report.command_line("faults.py", argv, {"--data-root": "DIR"}),
        "recipe": f"{arguments.recipe}, {arguments.count} networks in shards of {arguments.shard}",
        "seconds of an undisturbed run": f"{bench.seconds:.1f}",
        "digest": bench.digest,
        "load of the machine before and after": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
        **_report.environment("torch", "numba", "numpy", "h5py"),
    }
    table = _report.to_markdown("Faults that generation survives", COLUMNS, rows, setting)
    _report.write(arguments.output, "faults", table, rows, setting)
    (arguments.output / "faults.log").write_text("\n".join(bench.log) + "\n")
    return 0 if all(row["is_equal"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
