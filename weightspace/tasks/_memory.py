"""How much memory a training step takes, found out before the first one."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from weightspace.datasets import ZooDataset
from weightspace.errors import DeviceError
from weightspace.tasks._metanetwork import Metanetwork
from weightspace.tasks._registry import Task

COPIES = 4  # parameters, their gradients, and the two moments of AdamW
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, or of a job on a cluster


def step_memory(
    network: Metanetwork, task: Task, training: ZooDataset, batch_size: int, *, mixed: bool = False
) -> int:
    """Bytes that a step needs at least: the optimiser's, and what is kept for the backward pass.

    What is kept is measured on batches of 2 and 3 networks; it grows by the same amount with each network. Work space
    inside an operator is not seen.

    Args:
        network: on any device; a copy of it is run on the CPU.
        task: of the run.
        training: from which the networks are read.
        batch_size: of the step.
        mixed: whether activations are of 16 bits.
    """
    trial = copy.deepcopy(network).cpu().train()
    two, three = (_kept(trial, task, training, size, mixed) for size in (2, 3))
    parameters = sum(parameter.nbytes for parameter in trial.parameters())
    return COPIES * parameters + two + (three - two) * (batch_size - 2)


def _kept(trial: Metanetwork, task: Task, training: ZooDataset, size: int, mixed: bool) -> int:
    """Bytes of the tensors that the backward pass of a batch needs, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trial.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights, targets = training.read([at % len(training) for at in range(size)])
    with (
        torch.random.fork_rng(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed),
    ):
        outputs = trial({name: tensor.cpu() for name, tensor in weights.items()})
        with torch.autocast("cpu", enabled=False):
            loss = task.loss(task.readout(outputs), targets.cpu(), training=True)
    total = sum(found.values())
    del loss  # the graph had to live until everything was counted
    return total


def held_memory(*datasets: ZooDataset, device: str) -> int:
    """Bytes of the targets of whole splits, and on a GPU of their weights, which lie there from the start."""
    weights = sum(4 * len(dataset) * dataset.spec.num_parameters for dataset in datasets)
    return sum(dataset.targets.nbytes for dataset in datasets) + (weights if device == "cuda" else 0)


def total_memory(device: str) -> int:
    """Bytes of memory that a device has, or that this process and its children may use of it."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(there, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max" in it
        return there


@contextmanager
def limited_parameters(limit: int) -> Iterator[None]:
    """Stop the building of a metanetwork as soon as its training needs more than ``limit`` bytes for parameters.

    A parameter is counted after its memory was asked for and before most of them are filled, which is when the
    system really gives it.

    Raises:
        DeviceError: it needs more.
    """
    needed = 0

    def count(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal needed
        needed += 0 if parameter is None else COPIES * parameter.nbytes
        if needed > limit:
            raise DeviceError(
                f"model: its parameters, gradients and moments need at least {needed / 1e9:,.1f} GB, but there are "
                f"{limit / 1e9:,.1f} GB; take fewer channels, with --set model.hidden=..."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
