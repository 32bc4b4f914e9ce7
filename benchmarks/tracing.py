"""What tracing finds in whole networks, how far their outputs then change, and how long it takes.

Every network of `weightspace.testing.networks`: plain PyTorch at a few thousand parameters, a ResNet-50 at full
width, models of the `transformers` package from tiny configurations, and GPT-2 at its real size on the meta
device. Each is exported at two input sizes. The change is measured in float64 with random weights and
statistics: the worst over all groups and scalings, each by itself, and over all at once.

    python benchmarks/tracing.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report
import torch
from torch import nn

from weightspace import WeightSpec
from weightspace.spec import verify
from weightspace.testing import Case, networks

TOY = ("mlp", "multihead_attention")
COLUMNS = {
    "network": "{network}",
    "parameters": "{parameters:,}",
    "axes that move": "{moving_share:.0%}",
    "groups": "{groups}",
    "positive": "{positive}",
    "sign": "{sign}",
    "phase": "{phase}",
    "seconds": "{seconds:.1f}",
    "change": "{change}",
    "illegal": "{illegal}",
}


def moving_share(spec: WeightSpec) -> float:
    """Share of the axes of size 2 or more along which some units move."""
    moving = total = 0
    for tensor in spec.tensors.values():
        axes = {dim.axis for cell in tensor.cells for dim in cell.dims if dim.group is not None}
        moving += len(axes)
        total += sum(size > 1 for size in tensor.shape)
    return moving / total


def summary(name: str, spec: WeightSpec, seconds: float) -> dict[str, Any]:
    kinds = Counter(scaling.kind for scaling in spec.scalings.values())
    return {
        "network": name,
        "parameters": spec.num_parameters,
        "moving_share": moving_share(spec),
        "groups": len(spec.groups),
        **{kind: kinds[kind] for kind in ("positive", "sign", "phase")},
        "seconds": seconds,
        "change": "not measured",
        "illegal": "not measured",
    }


def measure(case: Case, draws: int) -> dict[str, Any]:
    module = case.build()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operator without a rule
        spec = WeightSpec.trace(
            module, case.inputs(), more_inputs=[case.more_inputs()], outputs=case.outputs, verify=False
        )
    row = summary(case.name, spec, time.perf_counter() - start)
    reports = [
        verify(spec, module, inputs, outputs=case.outputs, draws=draws)
        for inputs in (case.inputs(), case.more_inputs())
    ]
    row["change"] = f"{max(report.max_relative_change for report in reports):.0e}"
    row["illegal"] = f"{min(report.illegal_change for report in reports):.0e}"
    return row


def gpt2_at_full_size() -> dict[str, Any]:
    """124 million parameters on the meta device: no weights exist, so nothing can be verified."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        module: nn.Module = GPT2LMHeadModel(GPT2Config(use_cache=False))
    start = time.perf_counter()
    spec = WeightSpec.trace(module, {"input_ids": torch.zeros(2, 16, dtype=torch.long)}, outputs=("logits",))
    return summary("gpt2, 124 M, meta device", spec, time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2, help="random networks and elements per input size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="two networks, to see that it works")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    installed = importlib.util.find_spec("transformers") is not None
    families = ("core",) if options.toy else ("core", "large", *(("transformers",) if installed else ()))
    cases = [case for name, case in networks(*families).items() if not options.toy or name in TOY]
    WeightSpec.trace(nn.Linear(2, 2), torch.zeros(2, 2))  # PyTorch's first export is slower
    rows = []
    for case in cases:
        rows.append(measure(case, options.draws))
        print({key: rows[-1][key] for key in ("network", "seconds", "change")}, file=sys.stderr, flush=True)
    if installed and not options.toy:
        rows.append(gpt2_at_full_size())
    setting = {
        **_report.environment("torch", *(("transformers",) if installed else ())),
        "command": _report.command_line("tracing.py", argv),
    }
    title = "Tracing: what is found in whole networks"
    _report.write(
        options.output, "tracing", _report.to_markdown(title, COLUMNS, rows, setting), rows, setting
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
