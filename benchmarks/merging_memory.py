"""How much memory merging checkpoints takes, in units of their largest tensor.

The command runs in a process of its own, on generated checkpoints with the tensors of a language model. Two figures:
what the process holds itself at most (anonymous memory), and that together with the pages of the inputs that are
mapped into it, which the system takes away when it needs them; both above an idle process that has imported the same.
Beside it the script that one writes without: load all, average, save.

    python benchmarks/merging_memory.py --folder DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _report
import torch

from weightspace.zoo import write_tensors

COLUMNS = {
    "what": "{what}",
    "own memory / largest tensor": "{ratio:.2f}x",
    "with mapped pages": "{ratio_with_pages:.2f}x",
    "MB": "{megabytes:.0f}",
    "MB with mapped pages": "{megabytes_with_pages:.0f}",
    "seconds": "{seconds:.1f}",
    "GB/s": "{gigabytes_per_second:.2f}",
}
METHODS = {
    "average": (),
    "weighted": ("--weights", "0.3,0.7"),
    "slerp": (),
    "task-arithmetic": ("--base",),
    "ties": ("--base",),
    "dare": ("--base",),
    "dare-ties": ("--base",),
    "model-stock": ("--base",),
}
PLAIN = """
import sys
from safetensors.torch import load_file, save_file
first, second, output = sys.argv[1:]
a, b = load_file(first), load_file(second)
save_file({name: (a[name].float() + b[name].float()).div_(2).to(a[name].dtype) for name in a}, output)
"""
IDLE = "import weightspace.cli, weightspace.merge, weightspace.align, weightspace.zoo"
IDLE_PLAIN = "import torch, safetensors.torch"
PAGE = 4096


def shapes(layers: int, width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder with gated MLPs and untied embeddings."""
    inner = 8 * width // 3
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        found |= {f"{at}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (width, inner)
        found |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {**found, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def make_checkpoints(folder: Path, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Path]:
    """A base, and two networks that were made from it."""
    layout = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in sizes.items()}

    def tensors(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        for name, shape in sizes.items():
            values = torch.randn(shape, generator=common) * 0.02
            values += torch.randn(shape, generator=own) * (0.002 if seed else 0.0)
            yield name, values.to(dtype)

    names = {"base": 0, "first": 1, "second": 2}
    return {
        name: write_tensors(folder / f"{name}.safetensors", layout, tensors(seed))
        for name, seed in names.items()
    }


def measured(command: Sequence[str]) -> dict[str, float]:
    """Seconds, and the most memory that a process holds: its own, and with mapped files; looked at every 2 ms."""
    start = time.perf_counter()
    own = all_ = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while True:
        if process.poll() is not None:
            break
        found = _resident(status)
        own, all_ = max(own, found.get("RssAnon", 0)), max(all_, found.get("VmHWM", 0))
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return {"seconds": time.perf_counter() - start, "own": own, "all": all_}


def _resident(status: Path) -> dict[str, int]:
    """What the system says of a process, in bytes; the ru_maxrss of a child begins at that of its parent."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return {}
    fields = (line.split() for line in lines if line.startswith(("RssAnon:", "VmHWM:")))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in fields}


def measure(
    methods: Sequence[str], paths: dict[str, Path], output: Path, largest: int, rounds: int, *, script: bool
) -> list[dict[str, Any]]:
    """Each method, and the script unless that is left out."""
    program = [sys.executable, "-c", "from weightspace.cli import main; main()", "merge"]
    pair = [str(paths["first"]), str(paths["second"])]
    commands = {}
    for method in methods:
        options = METHODS[method]
        added = [*options, str(paths["base"])] if options == ("--base",) else [*options]
        commands[f"weightspace merge --method {method}"] = (
            [*program, *pair, "-o", str(output), "--method", method, *added],
            2 + ("--base" in options),
        )
    idle = {True: measured([sys.executable, "-c", IDLE])}
    if script:
        commands["load both, average, save"] = ([sys.executable, "-c", PLAIN, *pair, str(output)], 2)
        idle[False] = measured([sys.executable, "-c", IDLE_PLAIN])
    rows = []
    for what, (command, inputs) in commands.items():
        found = []
        for _ in range(rounds):
            found.append(measured(command))
            output.unlink()
        before = idle[what.startswith("weightspace")]
        own, all_ = (max(max(f[key] for f in found) - before[key], PAGE) for key in ("own", "all"))
        seconds = min(f["seconds"] for f in found) - before["seconds"]
        moved = (inputs + 1) * paths["first"].stat().st_size
        rows.append(
            {
                "what": what,
                "ratio": own / largest,
                "ratio_with_pages": all_ / largest,
                "megabytes": own / 1e6,
                "megabytes_with_pages": all_ / 1e6,
                "seconds": max(seconds, 1e-3),
                "gigabytes_per_second": moved / max(seconds, 1e-3) / 1e9,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``merging_memory.json`` and ``merging_memory.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, between commas")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of each; the fastest and the largest count"
    )
    parser.add_argument("--folder", type=Path, help="on the disk to be used; a temporary one by default")
    parser.add_argument("--toy", action="store_true", help="one method and no script, 1 layer of width 16")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    methods = arguments.methods.split(",")
    if arguments.toy:
        arguments.layers, arguments.width, arguments.vocabulary = 1, 16, 32
        methods = ["average"]
    sizes = shapes(arguments.layers, arguments.width, arguments.vocabulary)
    dtype = getattr(torch, arguments.dtype)
    largest = max(torch.Size(shape).numel() for shape in sizes.values()) * dtype.itemsize
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        paths = make_checkpoints(Path(name), sizes, dtype)
        total = paths["first"].stat().st_size
        merged = Path(name) / "merged.safetensors"
        rows = measure(methods, paths, merged, largest, arguments.rounds, script=not arguments.toy)
    setting = {
        "command": _report.command_line("merging_memory.py", argv, {"--folder": "DIR", "-o": "OUTDIR"}),
        "checkpoints": f"{total / 1e9:.3g} GB each, {len(sizes)} tensors of {arguments.dtype}",
        "largest tensor": f"{largest / 1e6:.4g} MB",
        "memory": "above an idle process that has imported the same; own: anonymous memory, the most of looks every 2 ms; "
        "with mapped pages: the most that was resident (VmHWM), pages of the inputs included",
        "seconds": "start of Python and imports taken off; inputs in the page cache; GB/s counts what is read and written "
        "once; the command flushes to the disk and hashes its inputs (SHA-256), the script does neither",
        **_report.environment("torch", "safetensors"),
    }
    table = _report.to_markdown("Memory of merging", COLUMNS, rows, setting)
    _report.write(arguments.output, "merging_memory", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
