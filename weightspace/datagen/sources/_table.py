"""Tables that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from weightspace.datagen.sources._source import SOURCES, Count, Signals, SourceConfig


@SOURCES.register("table")
class Table(SourceConfig):
    """Tables of scikit-learn, which need no file: iris, wine, breast_cancer (classes) and diabetes (a target)."""

    name: Literal["iris", "wine", "breast_cancer", "diabetes"] = Field("iris", description="of the table")
    count: Count = None

    def load(self, data_root: Path | None) -> Signals:
        """Features of mean 0 and standard deviation 1 over the whole table, as float32 channels without a grid."""
        from sklearn import datasets

        table = getattr(datasets, f"load_{self.name}")()
        features = (table.data - table.data.mean(0)) / table.data.std(0)
        classes = self.name != "diabetes"
        return Signals(
            items=features.astype(np.float32),
            labels=table.target.astype(np.int64 if classes else np.float32),
            channels=features.shape[1],
            class_names=tuple(str(name) for name in table.target_names) if classes else (),
        ).subset(self.count, f"source table {self.name}")
