"""Editing: change the weights of an INR so that it renders an edited version of its image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, mse_loss, pad

from weightspace.datasets import Normalisation, ZooDataset
from weightspace.errors import TaskError
from weightspace.nets import build, coordinate_grid, evaluate_batch
from weightspace.spec import Weights, WeightSpec
from weightspace.tasks._figures import draw_edits
from weightspace.tasks._metanetwork import ResidualMetanetwork
from weightspace.tasks._registry import TASKS, Outputs, Split, Task, TaskOptions
from weightspace.zoo import source_of

Images = Float[Tensor, "batch channels height width"]
BLOCK, BLOCK_PIXELS = 1024, 2**20  # networks, and pixels of all of them, that are rendered at once


class EditingOptions(TaskOptions):
    """Options of the task ``editing``."""

    edit: Literal["dilate", "erode", "contrast", "blur"] = Field(
        "dilate", description="what to do to the image"
    )
    of: Literal["source", "rendered"] = Field(
        "source", description="the image that is edited: the stored one, or what the network renders"
    )
    window: int = Field(3, ge=3, le=63, description="side in pixels of what dilate and erode look at; odd")
    factor: float = Field(1.5, gt=0, description="of contrast, about the mean of the image")
    sigma: float = Field(1.0, gt=0, le=16, description="standard deviation of the blur in pixels")
    side: int | None = Field(
        None, ge=2, le=1024, description="of the rendered image in pixels; null for that of the stored images"
    )
    scale: float = Field(0.01, gt=0, description="initial scale of the change of the weights")

    @field_validator("window")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("input should be odd")
        return value


def dilate(images: Images, window: int = 3) -> Images:
    """The maximum over a square window around each pixel."""
    return max_pool2d(images, window, stride=1, padding=window // 2)


def erode(images: Images, window: int = 3) -> Images:
    """The minimum over a square window around each pixel."""
    return -dilate(-images, window)


def contrast(images: Images, factor: float = 1.5) -> Images:
    """``mean + factor (x - mean)``, cut off at 0 and 1; the mean is that of each image, over all channels."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0.0, 1.0)


def blur(images: Images, sigma: float = 1.0) -> Images:
    """Convolution with a Gaussian of standard deviation ``sigma`` pixels; border pixels go on for ever."""
    reach = max(1, round(3.0 * sigma))
    places = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weights = torch.exp(-0.5 * (places / sigma).square())
    weights = weights / weights.sum()
    flat = images.flatten(0, 1)[:, None]
    flat = conv2d(pad(flat, (reach, reach, 0, 0), mode="replicate"), weights.view(1, 1, 1, -1))
    flat = conv2d(pad(flat, (0, 0, reach, reach), mode="replicate"), weights.view(1, 1, -1, 1))
    return flat.view(images.shape)


EDITS: dict[str, Callable[[Images, EditingOptions], Images]] = {
    "dilate": lambda images, options: dilate(images, options.window),
    "erode": lambda images, options: erode(images, options.window),
    "contrast": lambda images, options: contrast(images, options.factor),
    "blur": lambda images, options: blur(images, options.sigma),
}


class Renderer:
    """Runs INRs of images on a pixel grid.

    Args:
        architecture: of the networks.
        shape: height and width of the image in pixels.

    Raises:
        TaskError: networks that cannot be rebuilt, or that are no INRs of images.
    """

    def __init__(self, architecture: Mapping[str, Any] | None, shape: tuple[int, int]) -> None:
        if architecture is None:
            raise TaskError(
                "task editing: the zoo does not say how to rebuild its networks, so none can be run"
            )
        network = build(architecture)
        widths = getattr(network, "widths", None)
        if widths is None or widths[0] != 2 or widths[-1] not in (1, 3):
            found = (
                type(network).__name__ if widths is None else f"{widths[0]} inputs and {widths[-1]} outputs"
            )
            raise TaskError(
                "task editing: expected INRs of images, from 2 coordinates to 1 or 3 channels, found networks "
                f"of {found}"
            )
        self.network, self.shape, self.channels = network.requires_grad_(False), shape, widths[-1]
        self.grid = coordinate_grid(shape)

    def __call__(self, weights: Weights) -> Images:
        """The images that networks represent, (batch, channels, height, width); gradients flow to the weights."""
        grid = self.grid.to(next(iter(weights.values())).device)
        values = evaluate_batch(self.network, weights, grid)
        return values.movedim(-1, 1).unflatten(-1, self.shape)


@TASKS.register("editing")
class Editing(Task):
    """Weights in, weights out; squared error between what the edited network renders and the edited image."""

    monitor = "psnr"
    settings = EditingOptions
    needs_target = False
    # noise changes what the network renders, and the edit would have to undo it
    reads_signals: ClassVar[bool] = True
    training: ClassVar[Mapping[str, Any]] = {"augment": "sign"}

    def __init__(self, render: Renderer, architecture: Mapping[str, Any], options: EditingOptions) -> None:
        self.render, self.architecture, self.options = render, architecture, options

    @classmethod
    def from_data(cls, train: Split, options: EditingOptions) -> Editing:
        """A renderer of the population's networks, on the grid of the stored images.

        Raises:
            TaskError: the networks are no INRs of images, cannot be rebuilt, or the size of images is unknown.
        """
        if not isinstance(train, ZooDataset):
            raise TaskError(f"task editing: expected networks of one population, found {len(train.parts)}")
        architecture = train.population.architecture
        shape = _stored_shape(train) if options.side is None else (options.side, options.side)
        return cls(Renderer(architecture, shape), architecture or {}, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], options: EditingOptions) -> Editing:
        """See :meth:`state`."""
        height, width = (int(size) for size in state["shape"])
        return cls(Renderer(state["architecture"], (height, width)), state["architecture"], options)

    @property
    def out_features(self) -> None:
        """Weights."""
        return None

    def state(self) -> dict[str, Any]:
        """The networks and the size of the image."""
        return {"architecture": self.architecture, "shape": list(self.render.shape)}

    def assemble(
        self, model: nn.Module, normalisation: Normalisation | None, spec: WeightSpec
    ) -> ResidualMetanetwork:
        """The model's output is a change of the weights."""
        return ResidualMetanetwork(model, normalisation, spec, self.options.scale)

    def targets(self, dataset: ZooDataset) -> Images:
        """Edited images, (networks, channels, height, width) float32.

        Raises:
            TaskError: networks of another architecture, or no stored images of the size that is rendered.
        """
        if dataset.population.architecture != self.architecture:
            raise TaskError(
                f"task editing: runs networks of architecture {self.architecture}, but those of "
                f"{dataset.zoo.path} are {dataset.population.architecture}"
            )
        images = self._stored(dataset) if self.options.of == "source" else self.reference(dataset)
        return EDITS[self.options.edit](images, self.options)

    def reference(self, dataset: ZooDataset) -> Images:
        """What the networks render before they are edited."""
        population = dataset.population
        with torch.no_grad():
            size = max(1, min(BLOCK, BLOCK_PIXELS // len(self.render.grid)))
            starts = range(0, len(dataset), size)
            blocks = [self.render(population.weights_of(dataset.rows[at : at + size])) for at in starts]
        return torch.cat(blocks)

    def readout(self, outputs: Outputs) -> Images:
        """What the edited networks render."""
        assert not isinstance(outputs, Tensor)
        return self.render(outputs)

    def loss(self, readout: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Mean squared error over pixels."""
        return mse_loss(readout, targets)

    def scores(self, readout: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean squared error, times 100 as the papers print it, and its PSNR in dB for a range of 1."""
        error = float(mse_loss(readout, targets))
        psnr = float(-10.0 * torch.log10(torch.tensor(error)))
        return {"psnr": psnr, "mse_x_100": 100.0 * error, "loss": error}

    def figure(
        self, readout: Tensor, targets: Tensor, path: Path, title: str, *, reference: Tensor | None = None
    ) -> None:
        """Images before the edit, targets, and images after it."""
        rows = {"before": reference, "target": targets, "edited": readout}
        shown = {name: images.cpu().numpy() for name, images in rows.items() if images is not None}
        draw_edits(shown, path, title)

    def _stored(self, dataset: ZooDataset) -> Images:
        """The stored images of the networks' items."""
        shape = _stored_shape(dataset)
        if shape != self.render.shape:
            raise TaskError(
                f"task editing: images are rendered at {_size(self.render.shape)}, but those stored in "
                f"{dataset.zoo.path} are of {_size(shape)}; take task.of=rendered"
            )
        source = source_of(dataset.zoo, dataset.population)
        assert source is not None
        items = dataset.population.source[dataset.population.network[dataset.rows]]
        images = torch.from_numpy(source.get(items))
        images = images[:, None] if images.ndim == 3 else images.movedim(-1, 1)
        if images.shape[1] != self.render.channels:
            raise TaskError(
                f"task editing: networks render {self.render.channels} channels, but the images stored in "
                f"{dataset.zoo.path} have {images.shape[1]}"
            )
        return images


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]} pixels"


def _stored_shape(dataset: ZooDataset) -> tuple[int, int]:
    """Height and width of the images that a zoo stores.

    Raises:
        TaskError: it stores none.
        ZooError: it stores those of several sources, and does not say which were these networks'.
    """
    source = source_of(dataset.zoo, dataset.population)
    if source is None:
        raise TaskError(
            f"task editing: zoo {dataset.zoo.path} stores no source images; edit what the networks render, with "
            "--set task.of=rendered --set task.side=28 (pixels)"
        )
    if source.items.ndim not in (3, 4):
        raise TaskError(
            f"task editing: expected stored images (items, height, width) or (items, height, width, channels), "
            f"found {list(source.items.shape)} in {dataset.zoo.path}"
        )
    height, width = source.items.shape[1:3]
    return int(height), int(width)
