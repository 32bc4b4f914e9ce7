"""torch.compile for a metanetwork, and plain PyTorch where that fails."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def compile_or_fall_back(network: nn.Module) -> None:
    """Compile a module in place, under the same parameter names; a failure costs one line on standard error.

    The first call compiles. When that fails, for instance because there is no C++ compiler, this call and all
    later ones are plain PyTorch.
    """
    compiled = torch.compile(network._call_impl)

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return compiled(*arguments, **keywords)
        except Exception as error:  # compilers fail in many ways; a fault of the module itself comes up again
            network._compiled_call_impl = None
            out = network._call_impl(*arguments, **keywords)
            reason = (" ".join(str(error).split()) or "no reason given")[:200]
            sys.stderr.write(
                f"weightspace: compile: torch.compile failed ({type(error).__name__}: {reason}); "
                "going on without it\n"
            )
            return out

    network._compiled_call_impl = call
