"""The training loop's view of a metanetwork: a Lightning module."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm import tqdm

from weightspace.datasets import ZooDataset
from weightspace.errors import TaskError
from weightspace.spec import Weights
from weightspace.tasks._compile import compile_or_fall_back
from weightspace.tasks._config import TrainConfig, write_text
from weightspace.tasks._registry import Outputs, Split, Task


def write_history(run: Path, history: Sequence[dict[str, float]]) -> None:
    """metrics.csv: one line per epoch, the whole file at once, so that resuming loses nothing."""
    names = sorted({name for row in history for name in row} - {"epoch"})
    lines = [",".join(["epoch", *names])]
    lines += [
        ",".join([str(int(row["epoch"])), *(f"{row[name]:.6g}" if name in row else "" for name in names)])
        for row in history
    ]
    write_text(run / "metrics.csv", "\n".join(lines) + "\n")


class Progress(L.Callback):
    """One line for the whole run: steps done, steps per second, time left, the latest scores."""

    def __init__(self, name: str, monitor: str) -> None:
        self.name, self.monitor = name, monitor
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start where a resumed run stopped."""
        if not trainer.is_global_zero:
            return
        total = int(trainer.estimated_stepping_batches)
        self.bar = tqdm(
            total=total, initial=trainer.global_step, unit=" steps", desc=self.name, file=sys.stderr
        )

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """One step."""
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """New scores."""
        if self.bar is None:
            return
        metrics = trainer.callback_metrics
        shown = {
            name: f"{float(metrics[name]):.4g}" for name in ("train_loss", self.monitor) if name in metrics
        }
        self.bar.set_postfix({"epoch": trainer.current_epoch + 1, **shown}, refresh=False)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Close the line."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Close the line after Ctrl-C, too."""
        self.on_train_end(trainer, module)


class EpochOrder(Sampler[int]):
    """Random order keyed by seed and epoch, so that a resumed run goes on in the order of an undisturbed one.

    With several devices each takes every n-th network; the first ones are repeated until all have equally many.
    """

    def __init__(self, dataset: ZooDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before it iterates."""
        self.epoch = self.dataset.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rank, devices = _place()
        order = self.dataset.order(self.seed).tolist()
        order += order[: len(self) * devices - len(order)]
        return iter(order[rank::devices])

    def __len__(self) -> int:
        return -(-len(self.dataset) // _place()[1])


def _place() -> tuple[int, int]:
    """Which of how many devices this process drives."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class MetanetworkModule(L.LightningModule):
    """A metanetwork, its task and its optimiser.

    Args:
        network: weights in, outputs out; normalisation included.
        task: readout, loss and scores.
        config: of the run.
        train: its ``epoch`` is set, so that augmentations differ from epoch to epoch.
        run: where metrics.csv goes.
    """

    def __init__(self, network: nn.Module, task: Task, config: TrainConfig, train: Split, run: Path) -> None:
        super().__init__()
        self.run = run
        self.network, self.task, self.config, self.train_set = network, task, config, train
        self.history: list[dict[str, float]] = []
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": []}
        self._latest: Tensor | None = None
        self._compiled = False

    def configure_model(self) -> None:
        """Compile in the process that trains: what is compiled does not survive the way into another one."""
        if self.config.compile and not self._compiled:
            compile_or_fall_back(self.network)
            self._compiled = True

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled."""
        return {**super().__getstate__(), "_compiled": False}

    def forward(self, weights: Weights, *population: str) -> Outputs:
        """Outputs of the metanetwork; of several populations, the name says of which the weights are."""
        out: Outputs = self.network(weights, *population)
        return out

    def _compare(self, batch: Sequence[Any], *, split: str) -> Tensor:
        """Loss of a batch, in full precision; what was compared is kept for the scores of the epoch."""
        weights, targets, *population = batch
        outputs = self(weights, *population)
        with torch.autocast(targets.device.type, enabled=False):
            readout = self.task.readout(outputs)
            loss = self.task.loss(readout, targets, training=split == "train")
        self._seen[split].append((readout.detach(), targets))
        return loss

    def on_train_epoch_start(self) -> None:
        """Draw new augmentations; dropout depends on seed and epoch, however often the run was resumed.

        Processes that train together draw masks of their own.
        """
        self.train_set.epoch = self.current_epoch
        torch.manual_seed(
            self.config.seed + 1_000_003 * (self.current_epoch + 1) + 2_000_000_011 * _place()[0]
        )

    def training_step(self, batch: Sequence[Any], index: int) -> Tensor:
        """Loss of one batch, scaled such that the batches of a step have a mean gradient, however many they are."""
        loss = self._compare(batch, split="train")
        self._latest = loss.detach()
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]), sync_dist=self._many
        )
        return loss * self._share(index)

    def _share(self, index: int) -> float:
        """What Lightning's division by ``accumulate`` takes too much from the last step of an epoch."""
        batches, accumulate = int(self.trainer.num_training_batches), self.config.accumulate
        rest = batches % accumulate
        return accumulate / rest if index >= batches - rest else 1.0

    def on_validation_start(self) -> None:
        """Stop when training has diverged: a loss that was not finite once has spoiled all parameters.

        Once per epoch, because looking at the loss of every step would have a GPU wait. In 16-mixed steps that
        overflow are left out, and later losses are finite again.

        Raises:
            TaskError: the latest loss is NaN or infinite.
        """
        if self._latest is not None and not bool(self._latest.isfinite()):
            raise TaskError(
                f"run {self.run}: the training loss is NaN or infinite in epoch {self.current_epoch + 1}, at learning "
                f"rate {self.config.learning_rate:g}; take a lower --learning-rate, with --overwrite"
            )

    def validation_step(self, batch: Sequence[Any], index: int) -> None:
        """Keep readouts; scores are of the whole split."""
        self._compare(batch, split="val")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation split."""
        scores = self._scores("val")
        self.log_dict({f"val_{name}": value for name, value in scores.items()}, sync_dist=self._many)

    def on_train_epoch_end(self) -> None:
        """Log the scores of the batches as they were seen, and remember the epoch."""
        scores = self._scores("train")
        scores.pop("loss", None)
        self.log_dict({f"train_{name}": value for name, value in scores.items()}, sync_dist=self._many)
        row = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        self.history.append({"epoch": float(self.current_epoch), **row})
        if self.trainer.is_global_zero:
            write_history(self.run, self.history)

    @property
    def _many(self) -> bool:
        return self.config.devices > 1

    def _scores(self, split: str) -> dict[str, float]:
        readout, targets = (torch.cat(parts) for parts in zip(*self._seen[split], strict=True))
        self._seen[split] = []
        return self.task.scores(readout, targets)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run keeps its learning curve."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`on_save_checkpoint`."""
        self.history = list(checkpoint.get("history", []))

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule over all steps."""
        config = self.config
        total = int(self.trainer.estimated_stepping_batches)
        optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            max_lr=config.learning_rate,
            total_steps=total,
            # with a warm-up of exactly one step PyTorch divides by zero
            pct_start=0.1 if total != 10 else 0.2,
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
