"""What sources of images share: their options, grey values, and resizing."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field

Size = Annotated[
    int | None,
    Field(ge=1, le=1024, description="side in pixels, images are stretched to it; null to keep their size"),
]
Grey = Annotated[bool, Field(description="one grey value per pixel instead of red, green and blue")]

_BLOCK = 1024  # images that are resized at once: floats of a whole data set would take four times its memory


def grey_of(images: UInt8[np.ndarray, "*items height width 3"]) -> UInt8[np.ndarray, "*items height width"]:
    """Luma of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, rounded; grey colours keep their value.

    Example:
        >>> grey_of(np.array([[[255, 0, 0], [7, 7, 7]]], np.uint8)).tolist()
        [[76, 7]]
    """
    # sixteen bits of the weights, whose sum is exactly 2**16: the same bytes on every machine
    red, green, blue = (images[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def resized(
    images: UInt8[np.ndarray, "items height width *channels"], size: int | None
) -> UInt8[np.ndarray, "items new_height new_width *channels"]:
    """Images stretched to ``size`` x ``size`` pixels, bilinear and low-pass filtered where they shrink."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    blocks = [_resized(images[at : at + _BLOCK], size) for at in range(0, len(images), _BLOCK)]
    return np.concatenate(blocks)


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    channels = images[..., None] if images.ndim == 3 else images
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(channels, 3, 1))).float()
    new = torch.nn.functional.interpolate(planes, (size, size), mode="bilinear", antialias=True)
    block = np.moveaxis(new.round().to(torch.uint8).numpy(), 1, 3)
    return np.ascontiguousarray(block[..., 0] if images.ndim == 3 else block)
