"""Fit many coordinate networks (INRs) to many signals, each from its own initial parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from weightspace.datagen import _kernels
from weightspace.errors import ConfigError, DataError, DeviceError
from weightspace.nets import MLP

__all__ = ["Engine", "FitResult", "fit_networks"]

Engine = Literal["auto", "kernel", "batched"]

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_ACTIVATION_CODES = {
    "sine": _kernels.SINE,
    "relu": _kernels.RELU,
    "tanh": _kernels.TANH,
    "gaussian": _kernels.GAUSSIAN,
}


@dataclass(frozen=True)
class FitResult:
    """What `fit_networks` found, one row per network.

    Attributes:
        parameters: float32, in the order of ``net.state_dict()``, every tensor row-major.
        psnr: float32, dB of exactly these parameters; NaN where the loss was not finite.
        steps: int32, number of Adam updates made.
    """

    parameters: Float32[np.ndarray, "networks parameters"]
    psnr: Float32[np.ndarray, " networks"]
    steps: Int32[np.ndarray, " networks"]


@dataclass(frozen=True)
class _Problem:
    net: MLP
    initial: Float32[np.ndarray, "networks parameters"]
    coordinates: Float32[np.ndarray, "points in_features"]
    targets: Float[np.ndarray, "networks points out_features"]
    learning_rate: float
    steps: int
    target_psnr: float  # NaN: run all steps (no comparison with NaN holds)
    slots: int


def fit_networks(
    net: MLP,
    initial: Float[np.ndarray, "networks parameters"],
    coordinates: Float[np.ndarray, "points in_features"],
    targets: Float[np.ndarray, "networks points out_features"],
    *,
    learning_rate: float = 5e-4,
    steps: int = 1000,
    target_psnr: float | None = 40.0,
    engine: Engine = "auto",
    device: str | torch.device = "cpu",
    slots: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> FitResult:
    """Fit one network per target with Adam (the defaults of `torch.optim.Adam`) on all points at once.

    The loss is the mean squared error over points and output features. Each iteration first computes the
    loss of the current parameters; a network whose PSNR ``-10 log10(loss)`` has reached ``target_psnr`` stops
    before the update, and so does one whose loss is not finite. After ``steps`` updates one more forward pass
    gives the final PSNR.

    A network's bits depend on its own initial parameters and target, never on the other networks or their
    order. With the kernel they do not depend on the number of threads either, only on the kind of processor;
    with the batched engine they may depend on ``slots`` and on how PyTorch splits a product over threads.

    Args:
        net: the architecture; its own parameters are neither read nor changed.
        initial: float32, initial parameters in the order of ``net.state_dict()``, every tensor row-major.
        coordinates: float32, the points at which the signals were sampled, the same for all networks.
        targets: the signals, in [0, 1]; converted to float32 one network at a time.
        learning_rate: of Adam.
        steps: the most updates that a network gets.
        target_psnr: dB at which a network stops; None: all run to the end.
        engine: ``"kernel"`` trains whole networks in compiled code, one per CPU thread; ``"batched"`` trains
            ``slots`` networks at once in PyTorch, on any device; ``"auto"``: kernel on a CPU, else batched.
        device: where to train.
        slots: networks trained at once by the batched engine. A slot whose network has finished takes the
            next one. Default: 8 on a CPU; on a GPU as many as fill about 4 GiB, at most 1024.
        progress: called from this thread with the number of networks finished so far, each time it grows.

    Returns:
        Parameters, PSNR and number of updates of every network, in the order of ``initial``.

    Raises:
        ConfigError: an option out of range, the kernel asked to run on a GPU, or a network with dropout or an
            activation that no INR of the field has.
        DataError: arrays whose shapes do not fit ``net`` or each other.
        DeviceError: a CUDA device on a machine without one.

    Reference:
        Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980, algorithm 1.

    Example:
        >>> net = MLP((1, 8, 1), w0=10.0)
        >>> points = np.linspace(-1, 1, 16, dtype=np.float32)[:, None]
        >>> signals = np.stack([points**2, np.abs(points)])
        >>> initial = np.random.default_rng(0).normal(0, 0.3, (2, 25)).astype(np.float32)
        >>> result = fit_networks(net, initial, points, signals, steps=50, target_psnr=None)
        >>> result.parameters.shape, result.steps.tolist()
        ((2, 25), [50, 50])
    """
    device = torch.device(device)
    _check_network(net)
    _check_options(engine, device, learning_rate, steps, slots)
    _check_arrays(net, initial, coordinates, targets)
    problem = _Problem(
        net=net,
        initial=np.asarray(initial, np.float32),
        coordinates=np.array(coordinates, np.float32, order="C"),
        targets=targets,
        learning_rate=float(learning_rate),
        steps=int(steps),
        target_psnr=float("nan") if target_psnr is None else float(target_psnr),
        slots=slots or _default_slots(net, len(coordinates), device),
    )
    if engine == "kernel" or (engine == "auto" and device.type == "cpu"):
        return _fit_with_kernel(problem, progress)
    return _fit_batched(problem, device, progress)


def _check_network(net: MLP) -> None:
    if net.activation not in _ACTIVATION_CODES:
        known = ", ".join(_ACTIVATION_CODES)
        raise ConfigError(f"net: expected one of the activations {known}, found {net.activation!r}")
    if net.dropout:
        raise ConfigError(f"net: expected no dropout, found a rate of {net.dropout}")


def _check_options(
    engine: str, device: torch.device, learning_rate: float, steps: int, slots: int | None
) -> None:
    if engine not in get_args(Engine):
        raise ConfigError(f"engine: expected one of {', '.join(get_args(Engine))}, found {engine!r}")
    if engine == "kernel" and device.type != "cpu":
        raise ConfigError(f"engine: 'kernel' runs on the CPU only, found device {str(device)!r}")
    if not learning_rate > 0:
        raise ConfigError(f"learning_rate: expected a positive number, found {learning_rate}")
    if steps < 0:
        raise ConfigError(f"steps: expected 0 or more, found {steps}")
    if slots is not None and slots < 1:
        raise ConfigError(f"slots: expected 1 or more, found {slots}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device: {str(device)!r} was asked for, but this machine has no CUDA device")


def _check_arrays(net: MLP, initial: np.ndarray, coordinates: np.ndarray, targets: np.ndarray) -> None:
    expected_parameters = sum(parameter.numel() for parameter in net.parameters())
    if initial.ndim != 2 or initial.shape[1] != expected_parameters:
        raise DataError(f"initial: expected shape (networks, {expected_parameters}), found {initial.shape}")
    if coordinates.ndim != 2 or coordinates.shape[1] != net.widths[0] or len(coordinates) == 0:
        raise DataError(f"coordinates: expected shape (points, {net.widths[0]}), found {coordinates.shape}")
    expected = (len(initial), len(coordinates), net.widths[-1])
    if targets.shape != expected:
        raise DataError(f"targets: expected shape {expected}, found {targets.shape}")


def _default_slots(net: MLP, points: int, device: torch.device) -> int:
    if device.type == "cpu":
        return 8  # 8 and 16 measure alike; more only take memory
    # Each hidden unit keeps about six float32 per point: product, activation, and their gradients.
    bytes_per_network = 24 * points * sum(net.widths)
    return max(1, min(1024, 2**32 // bytes_per_network))


def _empty_result(problem: _Problem) -> FitResult:
    networks = len(problem.initial)
    return FitResult(
        parameters=problem.initial.copy(),
        psnr=np.full(networks, np.nan, np.float32),
        steps=np.zeros(networks, np.int32),
    )


# -------------------------------------------------------------------------------------------- kernel engine


def _fit_with_kernel(problem: _Problem, progress: Callable[[int], None] | None) -> FitResult:
    """One network per thread; the compiled call has released the interpreter lock."""
    result = _empty_result(problem)
    stop = np.zeros(1, np.int32)
    train = _network_trainer(problem, stop)

    def fit_one(index: int) -> None:
        target = np.array(problem.targets[index].T, np.float32, order="C")
        result.psnr[index], result.steps[index] = train(result.parameters[index], target)

    _compile(train, problem, stop)
    threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="weightspace-fit")
    try:
        futures = [pool.submit(fit_one, index) for index in range(len(problem.initial))]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if progress is not None:
                progress(done)
    finally:
        # After an exception (Ctrl-C is one) the running networks give up at their next step.
        stop[0] = 1
        pool.shutdown(cancel_futures=True)
    return result


def _network_trainer(
    problem: _Problem, stop: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], tuple[float, int]]:
    net = problem.net
    widths = np.array(net.widths, np.int64)
    coordinates = np.ascontiguousarray(problem.coordinates.T)
    tile = _tile(net, len(problem.coordinates))

    def train(parameters: np.ndarray, target: np.ndarray) -> tuple[float, int]:
        psnr, steps = _kernels.train_network(
            parameters,
            widths,
            _ACTIVATION_CODES[net.activation],
            float(net.w0),
            np.float32(net.output_offset),
            coordinates,
            target,
            tile,
            problem.learning_rate,
            problem.steps,
            problem.target_psnr,
            stop,
        )
        return psnr, steps

    return train


def _compile(
    train: Callable[[np.ndarray, np.ndarray], tuple[float, int]], problem: _Problem, stop: np.ndarray
) -> None:
    """Compile (or load) the kernel in this thread, where Ctrl-C can interrupt it, by a call that gives up."""
    stop[0] = 1
    train(
        np.zeros(sum(parameter.numel() for parameter in problem.net.parameters()), np.float32),
        np.zeros((problem.net.widths[-1], len(problem.coordinates)), np.float32),
    )
    stop[0] = 0


def _tile(net: MLP, points: int) -> int:
    """Points per tile: activations of about 192 KiB, and few points of padding in the last tile."""
    rows = sum(fan_in + 1 for fan_in in net.widths[:-1]) + sum(net.widths[1:])
    largest = max(96, 192 * 1024 // (4 * rows) // 16 * 16)
    # Each tile costs about as much as 8 more points.
    return min(range(16, largest + 1, 16), key=lambda tile: -(-points // tile) * (tile + 8))


# ------------------------------------------------------------------------------------------- batched engine


@dataclass
class _Slots:
    """The networks in training. ``owner`` is each slot's network, -1 for a slot that has run out of work."""

    owner: np.ndarray
    parameters: Float[Tensor, "slots parameters"]
    first: Float[Tensor, "slots parameters"]
    second: Float[Tensor, "slots parameters"]
    targets: Float[Tensor, "slots points out_features"]
    count: Tensor


@dataclass
class _Schedule:
    """Adam's bias corrections for every step, so that slots at different steps share one gather."""

    scale: Float[Tensor, " steps"]
    root: Float[Tensor, " steps"]


def _fit_batched(
    problem: _Problem, device: torch.device, progress: Callable[[int], None] | None
) -> FitResult:
    """``slots`` networks at a time; the shapes never change, so neither does the arithmetic of a slot."""
    result = _empty_result(problem)
    if len(problem.initial) == 0:
        return result
    evaluate = _batched_gradient(problem, device)
    slots = _idle_slots(problem, device)
    waiting = iter(range(len(problem.initial)))
    _refill(slots, np.arange(problem.slots), waiting, problem)
    schedule = _schedule(problem, device)
    check_every = _check_every(device)
    iteration = done = 0
    while (slots.owner >= 0).any():
        iteration += 1
        gradient, loss = evaluate(slots.parameters, slots.targets)
        psnr = -10.0 * torch.log10(loss)
        # A slot that is not running stays frozen until it is looked at: its result is the same whenever.
        running = torch.isfinite(loss) & (slots.count < problem.steps) & ~(psnr >= problem.target_psnr)
        _adam_update(slots, gradient, running, schedule)
        if iteration % check_every == 0:
            finished = np.flatnonzero(~running.cpu().numpy() & (slots.owner >= 0))
            if finished.size:
                _hand_over(slots, finished, psnr, result)
                _refill(slots, finished, waiting, problem)
                done = _report(done, finished.size, progress)
    return result


def _batched_gradient(
    problem: _Problem, device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gradient and loss of every slot, ``(slots, parameters), (slots, points, out) -> ...``."""
    net = problem.net
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    # One copy per slot: a shared input would turn all first layers into one product, in which the bits of a
    # network depend on its slot.
    coordinates = torch.from_numpy(problem.coordinates).to(device).repeat(problem.slots, 1, 1)

    def loss(flat: Tensor, points: Tensor, target: Tensor) -> Tensor:
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        parameters = {name: part.view(shape) for (name, shape), part in parts}
        return (functional_call(net, parameters, (points,)) - target).square().mean()

    batched = vmap(grad_and_value(loss))
    return lambda parameters, targets: batched(parameters, coordinates, targets)


def _check_every(device: torch.device) -> int:
    """Iterations between two looks for finished slots: on a GPU each look waits for all queued work."""
    return 1 if device.type == "cpu" else 25


def _idle_slots(problem: _Problem, device: torch.device) -> _Slots:
    shape = (problem.slots, problem.initial.shape[1])
    return _Slots(
        owner=np.full(problem.slots, -1, np.int64),
        parameters=torch.zeros(shape, device=device),
        first=torch.zeros(shape, device=device),
        second=torch.zeros(shape, device=device),
        targets=torch.zeros(problem.slots, *problem.targets.shape[1:], device=device),
        count=torch.full((problem.slots,), problem.steps, device=device),
    )


def _schedule(problem: _Problem, device: torch.device) -> _Schedule:
    step = torch.arange(1, problem.steps + 2, dtype=torch.float64)
    scale = problem.learning_rate / (1.0 - _BETA1**step)
    root = (1.0 - _BETA2**step).sqrt()
    return _Schedule(scale=scale.float().to(device), root=root.float().to(device))


def _adam_update(slots: _Slots, gradient: Tensor, running: Tensor, schedule: _Schedule) -> None:
    slots.first.lerp_(gradient, 1.0 - _BETA1)
    slots.second.mul_(_BETA2).addcmul_(gradient, gradient, value=1.0 - _BETA2)
    denominator = slots.second.sqrt().div_(schedule.root[slots.count, None]).add_(_EPSILON)
    update = denominator.reciprocal_().mul_(slots.first).mul_(schedule.scale[slots.count, None])
    # `where`, not a product with the mask: a frozen network may have a gradient of NaN.
    slots.parameters.sub_(torch.where(running[:, None], update, 0.0))
    slots.count += running


def _refill(slots: _Slots, free: np.ndarray, waiting: Iterator[int], problem: _Problem) -> None:
    device = slots.parameters.device
    for slot in free.tolist():
        network = next(waiting, -1)
        slots.owner[slot] = network
        if network < 0:
            continue
        slots.parameters[slot] = torch.from_numpy(problem.initial[network].copy()).to(device)
        slots.targets[slot] = torch.from_numpy(np.array(problem.targets[network], np.float32)).to(device)
        slots.first[slot] = 0.0
        slots.second[slot] = 0.0
        slots.count[slot] = 0


def _hand_over(slots: _Slots, finished: np.ndarray, psnr: Tensor, result: FitResult) -> None:
    rows = torch.from_numpy(finished).to(psnr.device)
    networks = slots.owner[finished]
    result.parameters[networks] = slots.parameters[rows].cpu().numpy()
    result.steps[networks] = slots.count[rows].cpu().numpy()
    found = psnr[rows].cpu().numpy()
    # An infinite loss has a PSNR of -inf; the caller looks for NaN. A loss of 0 is a perfect fit.
    result.psnr[networks] = np.where(found == -np.inf, np.nan, found)


def _report(done: int, finished: int, progress: Callable[[int], None] | None) -> int:
    for _ in range(finished):
        done += 1
        if progress is not None:
            progress(done)
    return done
