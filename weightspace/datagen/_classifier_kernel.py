"""Losses and gradients of many classifiers of one architecture at once, in compiled code on a CPU.

`ClassifierKernel` holds the inputs and a *plan* of the architecture: what `_kernels_classifier` interprets. This
file makes the plan: where activations, deltas and weights lie in the kernel's memory, and tables of offsets that
say which input pixels, output pixels and weights meet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import nn

from weightspace.datagen import _kernels_classifier as kernels
from weightspace.datagen._kernels import LANES
from weightspace.errors import ConfigError, DataError
from weightspace.nets import CNN, MLP, Network, dropout_state
from weightspace.nets._cnn import Projection

_ACTIVATION_CODES = {
    "relu": kernels.RELU,
    "tanh": kernels.TANH,
    "leaky_relu": kernels.LEAKY_RELU,
    "gelu": kernels.GELU,
    "silu": kernels.SILU,
    "sigmoid": kernels.SIGMOID,
    "sine": kernels.SINE,
    "gaussian": kernels.GAUSSIAN,
}
_NONE_LEFT = 2**62
_MEMORY = 640 * 1024  # bytes of a tile's activations: they should stay in an L2 cache of 1 MiB


class ClassifierKernel:
    """Losses and gradients of classifiers of one architecture on a CPU, in compiled code, one network per thread.

    The loss is the mean cross entropy over a batch. A network's bits depend on its own weights, batch and key,
    never on the other networks, their order or the number of threads; only on the kind of processor. A network
    with weights that are not finite has a loss that is not finite.

    Args:
        net: the architecture; its own parameters are neither read nor changed.
        inputs: all items; the batches name them by their number.
        threads: None: as many as PyTorch uses, and at most one per core.

    Raises:
        ConfigError: a network that the kernel does not know, see :meth:`supports`.
        DataError: inputs of another shape than the network's.

    Example:
        >>> net = MLP((4, 8, 3), activation="relu")
        >>> kernel = ClassifierKernel(net, np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
        >>> weights = np.zeros((2, 67), np.float32)
        >>> rows, labels = np.arange(10).reshape(2, 5), np.zeros((2, 5), np.int64)
        >>> loss, gradients = kernel.gradients(weights, rows, labels)
        >>> np.allclose(loss, np.log(3)), gradients.shape
        (True, (2, 67))
    """

    def __init__(
        self,
        net: Network,
        inputs: Float32[np.ndarray, "items *input_shape"],
        threads: int | None = None,
    ) -> None:
        if not self.supports(net):
            raise ConfigError(
                f"net: expected a CNN without batch norm, or an MLP, found {type(net).__name__}"
            )
        if inputs.shape[1:] != net.input_shape:
            expected = ", ".join(map(str, net.input_shape))
            raise DataError(f"inputs: expected shape (items, {expected}), found {inputs.shape}")
        self._net = net
        self._items = len(inputs)
        self._inputs = _plain(inputs, np.float32).reshape(-1)
        available = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
        self._threads = available if threads is None else max(1, threads)
        self._plan = _Planner(net).plan()
        self._pool: ThreadPoolExecutor | None = None
        self._compile()

    @staticmethod
    def supports(net: Network) -> bool:
        """Whether the kernel knows this network: an `MLP`, or a `CNN` without batch norm."""
        return type(net) is MLP or (type(net) is CNN and net.norm != "batch")

    def gradients(
        self,
        weights: Float32[np.ndarray, "networks parameters"],
        rows: Int64[np.ndarray, "networks batch"],
        labels: Int64[np.ndarray, "networks batch"],
        keys: Int64[np.ndarray, " networks"] | None = None,
        rates: Float32[np.ndarray, " networks"] | None = None,
    ) -> tuple[Float32[np.ndarray, " networks"], Float32[np.ndarray, "networks parameters"]]:
        """Mean cross entropy of each network on its own batch, and the gradient.

        Args:
            weights: flat, in the order of ``net.state_dict()``, every tensor row-major.
            rows: numbers of the batch's items in the inputs.
            labels: their classes.
            keys: of dropout, see :func:`weightspace.nets.random_keys`; the masks are those of
                :func:`weightspace.nets.dropout_state`. None: no dropout.
            rates: of dropout; None: that of ``net``.

        Raises:
            DataError: arrays whose shapes do not fit, rows or labels out of range.
            ConfigError: rates outside [0, 1).
        """
        gradients = np.empty(weights.shape, np.float32)
        loss, _ = self._run(weights, rows, labels, gradients, self._dropout(len(weights), keys, rates))
        return loss.astype(np.float32), gradients

    def evaluate(
        self,
        weights: Float32[np.ndarray, "networks parameters"],
        rows: Int64[np.ndarray, " items"],
        labels: Int64[np.ndarray, "*networks items"],
    ) -> tuple[Float32[np.ndarray, " networks"], Float32[np.ndarray, " networks"]]:
        """Mean cross entropy and accuracy of each network on the same items, without dropout.

        The class of an item is the first of its largest logits.

        Args:
            weights: as in :meth:`gradients`.
            rows: numbers of the items in the inputs.
            labels: their classes, (items,), or (networks, items) where each network was taught others.

        Raises:
            DataError: arrays whose shapes do not fit, rows or labels out of range.
        """
        labels = labels if labels.ndim == 2 else labels[None]
        none = np.empty((0, weights.shape[1]), np.float32)
        loss, right = self._run(
            weights,
            np.broadcast_to(rows, labels.shape),
            labels,
            none,
            self._dropout(len(weights), None, None),
        )
        return loss.astype(np.float32), (right / max(1, len(rows))).astype(np.float32)

    def _run(
        self,
        weights: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray,
        gradients: np.ndarray,
        dropout: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> tuple[Float64[np.ndarray, " networks"], Int64[np.ndarray, " networks"]]:
        self._check(weights, rows, labels)
        arguments = self._arguments(weights, rows, labels, gradients, dropout)
        *_, counter, losses, right, _ = arguments
        if len(weights):
            self._on_threads(min(self._threads, len(weights)), counter, arguments)
        return losses, right

    def _arguments(
        self,
        weights: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray,
        gradients: np.ndarray,
        dropout: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> tuple[Any, ...]:
        plan = self._plan
        return (
            _plain(weights, np.float32),
            self._inputs,
            _plain(rows, np.int64),
            _plain(labels, np.int64),
            plan.operations,
            plan.forward,
            plan.table,
            plan.pack,
            plan.unpack,
            plan.sizes,
            float(getattr(self._net, "w0", 1.0)),
            *dropout,
            np.zeros(1, np.int64),
            np.empty(len(weights)),
            np.empty(len(weights), np.int64),
            gradients,
        )

    def _compile(self) -> None:
        """Compile (or load) the kernel in this thread, where Ctrl-C can interrupt it, by a call without networks."""
        weights, rows = np.zeros((0, len(self._plan.unpack)), np.float32), np.zeros((0, 1), np.int64)
        arguments = self._arguments(weights, rows, rows, weights, self._dropout(0, None, None))
        kernels.run_networks(*arguments)

    def _on_threads(self, threads: int, counter: np.ndarray, arguments: tuple[Any, ...]) -> None:
        """Call the kernel on so many threads, which share the networks; this one waits, so that Ctrl-C is heard."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="weightspace-classifiers")
        calls = [self._pool.submit(kernels.run_networks, *arguments) for _ in range(threads)]
        try:
            for call in calls:
                call.result()
        finally:
            counter[0] = _NONE_LEFT  # after an exception the threads end with the networks they are at

    def _dropout(
        self, networks: int, keys: np.ndarray | None, rates: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Halves of each network's and layer's key, the words that stay, and the factor of what stays."""
        if keys is None:
            none = np.zeros((networks, 0, 2), np.int32)
            return none, np.full(networks, kernels.KEEP_ALL, np.int32), np.ones(networks, np.float32)
        if rates is None:
            rates = np.full(networks, self._net.dropout, np.float32)
        state = dropout_state(self._net, torch.from_numpy(keys), torch.from_numpy(rates))
        found = [tensor.numpy() for name, tensor in state.items() if name.endswith("key")]
        halves = [np.stack([key & 0x7FFFFFFF, key >> 32], -1) for key in found]
        layers = np.stack(halves, 1) if halves else np.zeros((networks, 0, 2))
        # In float32, as in Dropout.forward.
        thresholds = rates * np.float32(2.0**32) - np.float32(2.0**31)
        scales = np.float32(1.0) / (np.float32(1.0) - rates)
        return layers.astype(np.int32), thresholds.astype(np.int32), scales.astype(np.float32)

    def _check(self, weights: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> None:
        parameters = len(self._plan.unpack)
        if weights.ndim != 2 or weights.shape[1] != parameters:
            raise DataError(f"weights: expected shape (networks, {parameters}), found {weights.shape}")
        if rows.shape != labels.shape or rows.shape[0] not in (1, len(weights)) or rows.shape[1] == 0:
            raise DataError(
                f"rows: expected shape ({len(weights)}, batch) like labels, found {rows.shape} and {labels.shape}"
            )
        # The kernel does not look: these are addresses.
        for name, numbers, limit in (("rows", rows, self._items), ("labels", labels, self._net.out_features)):
            if numbers.size and (numbers.min() < 0 or numbers.max() >= limit):
                raise DataError(
                    f"{name}: expected numbers from 0 to {limit - 1}, found {numbers.min()} to {numbers.max()}"
                )


def _plain(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """Contiguous, aligned and writable, whatever it was: numba would compile the kernel again for another kind."""
    return np.require(values, dtype, ["C", "A", "W"])


# ----------------------------------------------------------------------------------------------- architectures


@dataclass(frozen=True)
class _Layer:
    """A convolution and what comes after it; a linear layer is one of images of one pixel."""

    weight: str
    bias: str
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: int = 0
    activation: int | None = None
    place: int = -1  # of its dropout
    norm: str = ""
    source: int = -1  # of its residual
    projection: Projection | None = None
    projection_weight: str = ""


def _mlp_layers(net: MLP) -> list[_Layer]:
    layers = len(net.widths) - 1
    return [
        _Layer(
            weight=f"layers.{layer}.weight",
            bias=f"layers.{layer}.bias",
            in_shape=(net.widths[layer], 1, 1),
            out_shape=(net.widths[layer + 1], 1, 1),
            activation=_ACTIVATION_CODES[net.activation] if layer < layers - 1 else None,
            place=layer,
        )
        for layer in range(layers)
    ]


def _cnn_layers(net: CNN) -> list[_Layer]:
    shape = net.input_shape
    found = []
    for layer, channels in enumerate(net.channels):
        out_shape = (channels, *net.sizes[layer])
        shortcut = net.shortcuts[layer]
        found.append(
            _Layer(
                weight=f"convolutions.{layer}.weight",
                bias=f"convolutions.{layer}.bias",
                in_shape=(shape[0], shape[1], shape[2]),
                out_shape=out_shape,
                kernel=(net.kernel_size[layer],) * 2,
                stride=(net.stride[layer],) * 2,
                padding=net.padding[layer],
                activation=_ACTIVATION_CODES[net.activation[layer]],
                place=layer,
                norm=f"norms.{layer}" if net.norm == "layer" else "",
                source=net.residual[layer],
                projection=shortcut if isinstance(shortcut, Projection) else None,
                projection_weight=f"shortcuts.{layer}.weight",
            )
        )
        shape = out_shape
    return [*found, _classifier(net)]


def _classifier(net: CNN) -> _Layer:
    """The last layer; of flattened images it is one convolution whose kernel is as large as they are."""
    size = net.sizes[-1] if net.pooling == "flatten" else (1, 1)
    return _Layer(
        weight="classifier.weight",
        bias="classifier.bias",
        in_shape=(net.channels[-1], *size),
        out_shape=(net.out_features, 1, 1),
        kernel=size,
        stride=size,
    )


# ------------------------------------------------------------------------------------------------ memory, tables


@dataclass(frozen=True)
class _Images:
    """One image per group of lanes, ``(groups, height, width, channels, lanes)``, in zeros all around."""

    at: int
    shape: tuple[int, int, int]
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)

    @property
    def pixel_pitch(self) -> int:
        return self.shape[0] * LANES

    @property
    def row_pitch(self) -> int:
        return (self.before[1] + self.shape[2] + self.after[1]) * self.pixel_pitch

    @property
    def group_pitch(self) -> int:
        return (self.before[0] + self.shape[1] + self.after[0]) * self.row_pitch

    @property
    def origin(self) -> int:
        """Of pixel (0, 0) of the first group."""
        return self.at + self.before[0] * self.row_pitch + self.before[1] * self.pixel_pitch

    def offsets(
        self, groups: int, rows: np.ndarray, columns: np.ndarray
    ) -> Int64[np.ndarray, "groups pixels"]:
        """Of the pixels at these coordinates, which may lie in the zeros."""
        pixels = self.origin + rows * self.row_pitch + columns * self.pixel_pitch
        return np.arange(groups)[:, None] * self.group_pitch + pixels[None]


def _grid(
    height: Sequence[int] | np.ndarray, width: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.meshgrid(np.asarray(height, np.int64), np.asarray(width, np.int64), indexing="ij")
    return rows.ravel(), columns.ravel()


def _blocks(size: int, widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut ``size`` into blocks, the first widths first: (start, width)."""
    start = 0
    for width in widths:
        while start + width <= size:
            yield start, width
            start += width


@dataclass(frozen=True)
class _Phase:
    """Along one axis: input pixels that meet the same taps of a kernel, and where their outputs begin."""

    taps: tuple[int, ...]  # in the order of the outputs
    pixels: np.ndarray
    starts: np.ndarray


def _phases(size: int, kernel: int, stride: int, padding: int) -> list[_Phase]:
    """A pixel ``i`` meets output ``o`` at tap ``i + padding - stride o``."""
    found = []
    for phase in range(min(stride, size + padding)):
        taps = tuple(range(phase, kernel, stride))[::-1]
        pixels = np.array([i for i in range(size) if (i + padding) % stride == phase], np.int64)
        starts = (pixels + padding) // stride - max(0, len(taps) - 1)
        if len(pixels):
            found.append(_Phase(taps, pixels, starts))
    return found


def _reach(layer: _Layer, axis: int) -> tuple[int, int]:
    """Zeros that the input's gradient reads before and after the deltas, along an axis."""
    size, outputs = layer.in_shape[axis + 1], layer.out_shape[axis + 1]
    before = after = 0
    for phase in _phases(size, layer.kernel[axis], layer.stride[axis], layer.padding):
        if phase.taps:
            before = max(before, -int(phase.starts.min()))
            after = max(after, int(phase.starts.max()) + len(phase.taps) - outputs)
    return before, after


@dataclass(frozen=True)
class _Plan:
    operations: Int64[np.ndarray, "operations fields"]
    forward: int
    table: Int64[np.ndarray, " entries"]
    pack: Int64[np.ndarray, " weights"]
    unpack: Int64[np.ndarray, " parameters"]
    sizes: Int64[np.ndarray, "4"]


class _Planner:
    """Lays out one architecture; `plan` is all that is asked of it."""

    def __init__(self, net: Network) -> None:
        assert isinstance(net, CNN | MLP)
        self.layers = _cnn_layers(net) if isinstance(net, CNN) else _mlp_layers(net)
        self.pooling = net.pooling if isinstance(net, CNN) else "flatten"
        self.input_row = (1, 1, net.widths[0]) if isinstance(net, MLP) else net.input_shape
        self.sources = {layer.source for layer in self.layers}
        self.groups = 1
        self._number_parameters(net)

    def plan(self) -> _Plan:
        self._place_images()
        self.groups = int(max(1, min(8, _MEMORY // (4 * self.memory))))
        return self._lay_out()

    def _number_parameters(self, net: nn.Module) -> None:
        """Each tensor's numbers in the flat parameters, in its own shape."""
        self.numbers: dict[str, np.ndarray] = {}
        self.parameters = 0
        for name, tensor in net.state_dict().items():
            numbers = np.arange(self.parameters, self.parameters + tensor.numel())
            self.numbers[name] = numbers.reshape(tuple(tensor.shape))
            self.parameters += tensor.numel()

    def _lay_out(self) -> _Plan:
        self.sums = 0
        self.operations: list[list[int]] = []
        self.table: list[np.ndarray] = []
        self.entries = 0
        self.pack = [np.full(8, -1)]  # what products without bias read in its place
        self.packed = 8
        self.unpack = np.zeros(self.parameters, np.int64)
        self._place_images()
        self._forward()
        forward = len(self.operations)
        self._backward()
        operations = np.zeros((len(self.operations), kernels.FIELDS), np.int64)
        for row, operation in zip(operations, self.operations, strict=True):
            row[: len(operation)] = operation
        widest = max(max(layer.in_shape[0], layer.out_shape[0]) for layer in self.layers)
        sizes = np.array([self.memory, self.sums, (2 * widest + 2) * LANES, self.groups])
        return _Plan(
            operations, forward, np.concatenate(self.table), np.concatenate(self.pack), self.unpack, sizes
        )

    # ------------------------------------------------------------------------------------------------ memory

    def _images(
        self,
        shape: tuple[int, int, int],
        before: tuple[int, int] = (0, 0),
        after: tuple[int, int] = (0, 0),
    ) -> _Images:
        images = _Images(self.memory, shape, before, after)
        self.memory += self.groups * images.group_pitch
        return images

    def _place_images(self) -> None:
        """Activations in the padding of the layer that reads them, deltas in the zeros that their readers read."""
        self.memory = 0
        first = self.layers[0]
        self.inputs = self._images(first.in_shape, (first.padding,) * 2, (first.padding,) * 2)
        self.outputs: list[_Images] = []
        self.slopes: list[_Images] = []
        self.kept: list[_Images] = []
        self.deltas: list[_Images] = []
        for number, layer in enumerate(self.layers):
            reader = self.layers[number + 1].padding if number + 1 < len(self.layers) else 0
            shape = layer.out_shape
            self.outputs.append(self._images(shape, (reader,) * 2, (reader,) * 2))
            stored = layer.activation not in (None, kernels.RELU)
            self.slopes.append(self._images(shape) if stored else self.outputs[-1])
            self.kept.append(self._images(shape) if layer.norm else self.outputs[-1])
            before, after = zip(_reach(layer, 0), _reach(layer, 1), strict=True) if number else ((0, 0),) * 2
            self.deltas.append(self._images(shape, (before[0], before[1]), (after[0], after[1])))
        if self.pooling != "flatten":
            shape = self.layers[-1].in_shape
            self.pooled, self.pooled_delta = self._images(shape), self._images(shape)
        self.inverse = self.memory
        self.memory += sum(self.groups * LANES for layer in self.layers if layer.norm)

    def _add_table(self, entries: np.ndarray) -> int:
        at = self.entries
        self.table.append(entries.astype(np.int64).ravel())
        self.entries += entries.size
        return at

    def _positions(self, *columns: np.ndarray | int) -> tuple[int, int]:
        """A table of positions from (groups, pixels) of up to three offsets: where it is, and pixels per group."""
        filled = np.broadcast_arrays(*columns, *[np.zeros((), np.int64)] * (3 - len(columns)))
        return self._add_table(np.stack(filled, -1)), filled[0].shape[1]

    def _all(self, *images: _Images) -> tuple[int, int]:
        """Positions of all pixels of images of one size."""
        pixels = _grid(range(images[0].shape[1]), range(images[0].shape[2]))
        return self._positions(*(image.offsets(self.groups, *pixels) for image in images))

    def _emit(self, *operation: int) -> None:
        self.operations.append([int(field) for field in operation])

    # ----------------------------------------------------------------------------------------------- products

    def _product(
        self,
        positions: tuple[int, int],
        numbers: Int64[np.ndarray, "rows segments run"],
        bias: Int64[np.ndarray, " rows"] | None,
        pitch: int,
        mode: int,
    ) -> None:
        """Emit a product with the weights of these numbers, after packing them."""
        rows, segments, run = numbers.shape
        blocks = []
        for start, width in _blocks(rows, kernels.PRODUCT_ROWS):
            weights_at = self._pack(np.moveaxis(numbers[start : start + width], 0, -1))
            bias_at = 0 if bias is None else self._pack(bias[start : start + width])
            blocks.append([width, weights_at, bias_at, start * LANES])
        at = self._add_table(np.array(blocks))
        self._emit(kernels.PRODUCT, *positions, at, len(blocks), segments, pitch, run, mode)

    def _pack(self, numbers: np.ndarray) -> int:
        at = self.packed
        self.pack.append(numbers.ravel())
        self.packed += numbers.size
        return at

    def _gradient(
        self, positions: tuple[int, int], numbers: Int64[np.ndarray, "rows segments run"], pitch: int
    ) -> None:
        """Emit the gradient of the weights of these numbers."""
        rows, segments, run = numbers.shape
        blocks = []
        for segment in range(segments):
            # Rows innermost: the inputs of a block of columns stay in the L1 cache.
            for column, columns in _blocks(run, kernels.GRADIENT_COLUMNS):
                for row, height in _blocks(rows, kernels.GRADIENT_ROWS):
                    x_at = segment * pitch + column * LANES
                    blocks.append([height, columns, row * LANES, x_at, self.sums])
                    block = numbers[row : row + height, segment, column : column + columns]
                    self.unpack[block] = self.sums + np.arange(block.size).reshape(block.shape)
                    self.sums += -(-block.size // LANES) * LANES
        at = self._add_table(np.array(blocks))
        self._emit(kernels.GRADIENT, *positions, at, len(blocks), self._chunk(rows, run))

    @staticmethod
    def _chunk(rows: int, run: int) -> int:
        """Positions at a time: so many that deltas and inputs stay in the L2 cache between blocks."""
        return max(32, 384 * 1024 // (4 * LANES * (rows + run)))

    def _sum(self, numbers: np.ndarray) -> int:
        at = self.sums
        self.unpack[numbers.ravel()] = at + np.arange(numbers.size)
        self.sums += -(-numbers.size // LANES) * LANES
        return at

    # ------------------------------------------------------------------------------------------------ forward

    def _reads(self, number: int) -> _Images:
        """What a layer reads."""
        if number == 0:
            return self.inputs
        pooled = number == len(self.layers) - 1 and self.pooling != "flatten"
        return self.pooled if pooled else self.outputs[number - 1]

    def _weights(self, number: int) -> tuple[Int64[np.ndarray, "rows segments run"], int]:
        """Numbers of a layer's weights in the order of the pixels that it reads, and the pitch of segments."""
        layer, images = self.layers[number], self._reads(number)
        numbers = self.numbers[layer.weight].reshape(layer.out_shape[0], layer.in_shape[0], *layer.kernel)
        numbers = numbers.transpose(0, 2, 3, 1)
        whole = layer.kernel[1] * images.pixel_pitch == images.row_pitch
        segments = 1 if whole else layer.kernel[0]
        return numbers.reshape(layer.out_shape[0], segments, -1), images.row_pitch

    def _windows(self, number: int) -> np.ndarray:
        """Where each output pixel's window begins in what the layer reads."""
        layer = self.layers[number]
        rows, columns = _grid(range(layer.out_shape[1]), range(layer.out_shape[2]))
        return self._reads(number).offsets(
            self.groups,
            rows * layer.stride[0] - layer.padding,
            columns * layer.stride[1] - layer.padding,
        )

    def _pixels(self, images: _Images) -> np.ndarray:
        return images.offsets(self.groups, *_grid(range(images.shape[1]), range(images.shape[2])))

    def _forward(self) -> None:
        images = self.inputs
        at = images.origin
        self._emit(kernels.INPUT, *self.input_row, at, images.group_pitch, images.row_pitch)
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            if last and self.pooling != "flatten":
                code = kernels.POOL_MEAN if self.pooling == "mean" else kernels.POOL_MAX
                before = self.outputs[number - 1]
                self._emit(code, *self._all(before, before), before.shape[0], self.pooled.at)
            self._forward_layer(number, layer)
        logits, deltas = self.outputs[-1], self.deltas[-1]
        self._emit(kernels.LOSS, logits.at, logits.shape[0], deltas.at)

    def _forward_layer(self, number: int, layer: _Layer) -> None:
        out = self.outputs[number]
        fused = layer.activation == kernels.RELU and not layer.norm and layer.source < 0
        positions = self._positions(self._windows(number), self._pixels(out))
        mode = kernels.POSITIVE if fused else kernels.STORE
        self._product(positions, *self._with_bias(number), mode)
        if layer.norm:
            self._norm(number, layer)
        if layer.source >= 0:
            self._shortcut(number, layer)
        if layer.activation is None:
            return
        if not fused:
            rows = _grid(range(layer.out_shape[1]), [0])
            columns = (image.offsets(self.groups, *rows) for image in (out, self.slopes[number]))
            length = layer.out_shape[0] * layer.out_shape[2] * LANES
            self._emit(kernels.ACTIVATE, *self._positions(*columns), length, layer.activation)
        self._dropout(number, layer)

    def _with_bias(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        weights, pitch = self._weights(number)
        return weights, self.numbers[self.layers[number].bias], pitch

    def _dropout(self, number: int, layer: _Layer) -> None:
        channels, height, width = layer.out_shape
        places = np.arange(height * width)[None]
        stored = layer.activation != kernels.RELU
        positions = self._positions(
            self._pixels(self.outputs[number]), self._pixels(self.slopes[number]), places
        )
        plane = height * width
        self._emit(kernels.DROP, *positions, channels, plane, channels * plane, stored, layer.place)

    def _norm(self, number: int, layer: _Layer) -> None:
        positions = self._all(self.outputs[number], self.kept[number])
        self._emit(kernels.NORM, *positions, layer.out_shape[0], *self._norm_places(number, layer))

    def _norm_places(self, number: int, layer: _Layer) -> tuple[int, int, int]:
        weight, bias = self.numbers[f"{layer.norm}.weight"], self.numbers[f"{layer.norm}.bias"]
        return int(weight[0]), int(bias[0]), self.inverse + number * self.groups * LANES

    def _shortcut(self, number: int, layer: _Layer) -> None:
        out, source = self.outputs[number], self.outputs[layer.source]
        if layer.projection is None:
            self._emit(kernels.ADD, *self._all(out, source), min(out.shape[0], source.shape[0]))
            return
        here, there = self._projected(layer)
        if len(here[0]):
            positions = self._positions(source.offsets(self.groups, *there), out.offsets(self.groups, *here))
            numbers = self.numbers[layer.projection_weight].reshape(out.shape[0], 1, -1)
            self._product(positions, numbers, None, 0, kernels.ACCUMULATE)

    def _projected(
        self, layer: _Layer
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Pixels of a layer's output, and those of the source that a projection reads for them: none in the zeros."""
        assert layer.projection is not None
        stride, (left, _, top, _) = layer.projection.stride[0], layer.projection.margins
        rows, columns = _grid(range(layer.out_shape[1]), range(layer.out_shape[2]))
        from_rows, from_columns = rows * stride - top, columns * stride - left
        _, height, width = self.outputs[layer.source].shape
        inside = (from_rows >= 0) & (from_rows < height) & (from_columns >= 0) & (from_columns < width)
        return (rows[inside], columns[inside]), (from_rows[inside], from_columns[inside])

    # ----------------------------------------------------------------------------------------------- backward

    def _backward(self) -> None:
        for source in self.sources - {-1}:
            deltas = self.deltas[source]
            self._emit(kernels.CLEAR, *self._all(deltas), deltas.shape[0])
        for number in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[number]
            if number in self.sources:
                positions = self._all(self.deltas[number], self.slopes[number])
                self._emit(kernels.SLOPE, *positions, layer.out_shape[0], self._derivative(number))
            self._backward_layer(number, layer)

    def _derivative(self, number: int) -> int:
        relu = self.layers[number].activation == kernels.RELU
        return kernels.WHERE_POSITIVE if relu else kernels.TIMES_SLOPE

    def _mode(self, number: int) -> int:
        """What becomes of a gradient that reaches a layer's output. That of a source waits for the others."""
        return kernels.ACCUMULATE if number in self.sources else self._derivative(number)

    def _backward_layer(self, number: int, layer: _Layer) -> None:
        deltas = self.deltas[number]
        if layer.source >= 0:
            self._shortcut_backward(number, layer)
        if layer.norm:
            positions = self._all(deltas, self.kept[number])
            sums = (self._sum(self.numbers[f"{layer.norm}.{name}"]) for name in ("weight", "bias"))
            places = self._norm_places(number, layer)
            self._emit(kernels.NORM_BACKWARD, *positions, deltas.shape[0], *places, *sums)
        positions = self._positions(self._windows(number), self._pixels(deltas))
        self._gradient(positions, *self._weights(number))
        self._emit(kernels.BIAS, *positions, deltas.shape[0], self._sum(self.numbers[layer.bias]))
        if number == 0:
            return
        if number == len(self.layers) - 1 and self.pooling != "flatten":
            self._input_gradient(number, self.pooled_delta, self.pooled, kernels.STORE)
            self._unpool(number - 1)
        else:
            self._input_gradient(
                number, self.deltas[number - 1], self.slopes[number - 1], self._mode(number - 1)
            )

    def _unpool(self, number: int) -> None:
        code = kernels.UNPOOL_MEAN if self.pooling == "mean" else kernels.UNPOOL_MAX
        positions = self._all(self.outputs[number], self.deltas[number], self.slopes[number])
        channels = self.outputs[number].shape[0]
        self._emit(code, *positions, channels, self.pooled_delta.at, self._mode(number), self.pooled.at)

    def _input_gradient(self, number: int, into: _Images, slopes: _Images, mode: int) -> None:
        """The transposed convolution: one product for each phase of the stride."""
        layer, deltas = self.layers[number], self.deltas[number]
        numbers = self.numbers[layer.weight].reshape(layer.out_shape[0], layer.in_shape[0], *layer.kernel)
        down, along = (
            _phases(layer.in_shape[axis + 1], layer.kernel[axis], layer.stride[axis], layer.padding)
            for axis in (0, 1)
        )
        for rows in down:
            for columns in along:
                pixels = _grid(rows.pixels, columns.pixels)
                out = into.offsets(self.groups, *pixels)
                if not rows.taps or not columns.taps:
                    if mode != kernels.ACCUMULATE:
                        self._emit(kernels.CLEAR, *self._positions(out), into.shape[0])
                    continue
                starts = deltas.offsets(self.groups, *_grid(rows.starts, columns.starts))
                taps = numbers[:, :, list(rows.taps)][:, :, :, list(columns.taps)]
                taps = taps.transpose(1, 2, 3, 0).reshape(layer.in_shape[0], len(rows.taps), -1)
                positions = self._positions(starts, out, slopes.offsets(self.groups, *pixels))
                self._product(positions, taps, None, deltas.row_pitch, mode)

    def _shortcut_backward(self, number: int, layer: _Layer) -> None:
        deltas, source = self.deltas[number], self.deltas[layer.source]
        if layer.projection is None:
            self._emit(kernels.ADD, *self._all(source, deltas), min(deltas.shape[0], source.shape[0]))
            return
        here, there = self._projected(layer)
        numbers = self.numbers[layer.projection_weight].reshape(deltas.shape[0], source.shape[0])
        if len(here[0]) == 0:
            self._sum(numbers)
            return
        at, to = deltas.offsets(self.groups, *here), source.offsets(self.groups, *there)
        self._product(self._positions(at, to), numbers.T[:, None], None, 0, kernels.ACCUMULATE)
        read = self.outputs[layer.source].offsets(self.groups, *there)
        self._gradient(self._positions(read, at), numbers[:, None], 0)
