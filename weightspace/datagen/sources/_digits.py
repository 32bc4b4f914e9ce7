"""scikit-learn's handwritten digits: real data that needs no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from weightspace.datagen.sources._source import SOURCES, Signals, SourceConfig


@SOURCES.register("digits")
class Digits(SourceConfig):
    """1,797 handwritten digits of 8x8 grey values, upsampled (UCI, as shipped with scikit-learn)."""

    size: int = Field(28, ge=8, le=256, description="side of the upsampled image in pixels")

    def load(self, data_root: Path | None) -> Signals:
        """Upsample bicubically and round to bytes."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = torch.from_numpy(digits.images).float()[:, None] / 16.0
        large = torch.nn.functional.interpolate(grey, (self.size, self.size), mode="bicubic")
        items = (large[:, 0].clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()
        return Signals(items, digits.target.astype(np.int64))
