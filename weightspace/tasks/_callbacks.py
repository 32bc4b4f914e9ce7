"""What training keeps from epoch to epoch, and when it stops: Lightning callbacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

BEST, LAST = "best.ckpt", "last.ckpt"


class KeepEpochs(ModelCheckpoint):
    """``best.ckpt``, the best epoch so far, and ``last.ckpt``, the latest, from which an interrupted run goes on.

    The run directory may be moved in between: Lightning alone would forget the best epoch then. A score that is NaN
    counts as the worst.

    Args:
        folder: of the two files.
        monitor: the score, larger is better.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__(
            folder,
            Path(BEST).stem,
            monitor=monitor,
            mode="max",
            enable_version_counter=False,
            save_last=False,
        )

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the epoch in one step, so that a kill leaves no half of it; Lightning writes the best ones only."""
        super().on_train_epoch_end(trainer, module)
        assert self.dirpath is not None
        last = Path(self.dirpath) / LAST
        part = last.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, last)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The paths that were written are read as names in the present folder."""
        assert self.dirpath is not None
        here = Path(self.dirpath)

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                **{name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")},
                "best_k_models": {moved(path): score for path, score in state_dict["best_k_models"].items()},
            }
        )


class Patience(EarlyStopping):
    """Stop after so many epochs without a better score; NaN is no better score, and no reason to stop at once.

    Args:
        monitor: the score, larger is better.
        patience: in epochs.
    """

    def __init__(self, monitor: str, patience: int) -> None:
        super().__init__(monitor, mode="max", patience=patience, check_finite=False)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A run that was stopped already, and then interrupted, goes on with nothing."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
