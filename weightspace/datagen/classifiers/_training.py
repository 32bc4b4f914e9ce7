"""Train many classifiers at once, each by its own hyperparameters, and record them on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from weightspace.datagen._shards import ShardState
from weightspace.datagen._work import Progress
from weightspace.datagen.classifiers._data import ClassifierData, noisy_labels
from weightspace.datagen.classifiers._engines import Engine, Gradients
from weightspace.datagen.classifiers._hyperparameters import CODED, Hyperparameters
from weightspace.datagen.classifiers._optimizers import PopulationOptimizer
from weightspace.nets import random_keys

METRICS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "generalisation_gap",
    "gradient_norm",
    "diverged",
)
_COSINE, _OWN = CODED["schedule"].index("cosine"), CODED["subset"].index("own")


@dataclass(frozen=True)
class Trajectories:
    """Checkpoints of networks, ordered by network and by step.

    Attributes:
        weights: (rows, parameters) float32.
        network: (rows,) int64, from 0.
        step: (rows,) int64 updates.
        metrics: (rows,) float32 each, by the names in ``METRICS``.
    """

    weights: Float32[np.ndarray, "rows parameters"]
    network: Int64[np.ndarray, " rows"]
    step: Int64[np.ndarray, " rows"]
    metrics: dict[str, Float32[np.ndarray, " rows"]]


@dataclass(frozen=True)
class Schedule:
    """What each network does at which step.

    Args:
        items: (networks,) number of training items.
        batch: (networks,) items per step.
        per_epoch: (networks,) steps per epoch; what does not fill a batch waits for the next epoch's order.
        epochs: (networks,).
    """

    items: np.ndarray
    batch: np.ndarray
    per_epoch: np.ndarray
    epochs: np.ndarray

    @classmethod
    def of(cls, hyperparameters: Hyperparameters, available: int) -> Schedule:
        """That of networks that learn from a fraction of some items."""
        items = np.clip(np.round(hyperparameters["fraction"] * available).astype(np.int64), 1, available)
        batch = np.minimum(hyperparameters["batch_size"], items)
        return cls(items, batch, items // batch, hyperparameters["epochs"])

    @property
    def steps(self) -> np.ndarray:
        """(networks,) steps in all."""
        return self.per_epoch * self.epochs

    def epochs_to_record(self, network: int, checkpoints: Sequence[int]) -> list[int]:
        """After which epochs a network is recorded: at its end, and at those checkpoints that it reaches."""
        last = int(self.epochs[network])
        return sorted({last, *(epoch for epoch in checkpoints if epoch < last)})


@dataclass
class _Records:
    """Checkpoints as they come."""

    weights: list[np.ndarray] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)  # network, step, and the metrics, in float64

    def arrays(self, parameters: int) -> dict[str, np.ndarray]:
        width = 2 + len(METRICS)
        return {
            "records.weights": np.concatenate([*self.weights, np.empty((0, parameters), np.float32)]),
            "records.columns": np.concatenate([*self.columns, np.empty((0, width))]),
        }

    def sorted(self) -> Trajectories:
        weights, columns = np.concatenate(self.weights), np.concatenate(self.columns)
        order = np.lexsort((columns[:, 1], columns[:, 0]))
        columns = columns[order]
        return Trajectories(
            weights[order],
            columns[:, 0].astype(np.int64),
            columns[:, 1].astype(np.int64),
            {name: columns[:, 2 + at].astype(np.float32) for at, name in enumerate(METRICS)},
        )


def _reunited(found: Sequence[Gradients], sets: Sequence[np.ndarray]) -> Gradients:
    """Parts in the order of all networks."""
    back = torch.from_numpy(np.argsort(np.concatenate(sets))).to(found[0].loss.device)
    fields = ("loss", "gradients", "weights")
    return Gradients(**{name: torch.cat([getattr(part, name) for part in found])[back] for name in fields})


class PopulationTraining:
    """Trains networks of one architecture side by side, all at the same step; a finished one makes room.

    Orders, noise and dropout are functions of a network's seed and the step, so that a training that goes on from
    its state gives the same bits as one that was not interrupted.

    Args:
        engine: computes gradients.
        data: what networks learn from.
        hyperparameters: one value per network each.
        initial: (networks, parameters) weights to begin with.
        checkpoints: epochs after which networks are recorded, beside their last.
        seed: of the recipe.
        shared_order: all networks see their items in one order.
        evaluation: items of each split, at most, that metrics are measured on.
    """

    def __init__(
        self,
        engine: Engine,
        data: ClassifierData,
        hyperparameters: Hyperparameters,
        initial: Float32[np.ndarray, "networks parameters"],
        checkpoints: Sequence[int],
        *,
        seed: int,
        shared_order: bool = False,
        evaluation: int = 10_000,
    ) -> None:
        self.engine, self.data, self.seed, self.evaluation = engine, data, seed, evaluation
        self.hyperparameters, self.shared_order = hyperparameters, shared_order
        self.schedule = Schedule.of(hyperparameters, len(data.train))
        self.recorded = [
            self.schedule.epochs_to_record(network, checkpoints) for network in range(len(initial))
        ]
        self.rows = self._training_rows()
        self.labels = self._training_labels()
        self.step, self.alive, self.records = 0, np.arange(len(initial)), _Records()
        self.weights = torch.from_numpy(initial).to(engine.device)
        self.optimizer = PopulationOptimizer(
            hyperparameters["optimizer"],
            hyperparameters["momentum"],
            hyperparameters["weight_decay"],
            torch.zeros_like(self.weights),
            torch.zeros_like(self.weights),
        )
        # of each network's items in its present epoch; -1: not drawn yet
        self._orders = np.empty((len(initial), int(self.schedule.items.max())), np.int32)
        self._ordered = np.full(len(initial), -1)

    def measured(self, epochs: np.ndarray) -> Trajectories:
        """One checkpoint of each network as it begins, untrained, under the given (networks,) epochs."""
        self._record(np.arange(len(self.alive)), epochs, diverged=False)
        return self.records.sorted()

    def timed(self, seconds: float) -> tuple[float, float]:
        """Seconds that a step and a checkpoint of one network take, found by training for about so long."""
        everyone, networks = np.arange(len(self.alive)), len(self.alive)
        self._record(everyone, np.zeros(networks, np.int64), diverged=False)  # compiles
        start = time.perf_counter()
        self._record(everyone, np.zeros(networks, np.int64), diverged=False)
        checkpoint = time.perf_counter() - start
        self._advance()
        start = time.perf_counter()
        trained = 0  # steps of single networks: some may diverge meanwhile
        while (time.perf_counter() - start < seconds or not trained) and len(self.alive):
            trained += len(self.alive)
            self._advance()
        return (time.perf_counter() - start) / max(trained, 1), checkpoint / networks

    def run(self, state: ShardState, progress: Progress) -> Trajectories:
        """Train all networks to their ends.

        Args:
            state: goes on from it, and is saved in it from time to time.
            progress: told of the networks done, in fractions.
        """
        self._restore(state.load())
        steps = self.schedule.steps
        while len(self.alive):
            self._record_due()
            self._keep(steps[self.alive] > self.step)
            if not len(self.alive):
                break
            self._advance()
            if state.is_due:
                state.save(self._state())
            progress(float((np.minimum(self.step, steps) / steps).sum()))
        return self.records.sorted()

    # -- one step --------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One step of every network that is alive; those that would leave the finite numbers end here."""
        self._draw_orders()
        batches = self.schedule.batch[self.alive]
        sets = [np.flatnonzero(batches == size) for size in np.unique(batches)]  # of one batch size each
        found = [self._gradients(at, self._batch(self.alive[at])) for at in sets]
        step = found[0] if len(found) == 1 else _reunited(found, sets)
        moved, good = self.optimizer.step(
            step.weights, step.gradients, self._learning_rate(), np.full(len(self.alive), self.step + 1.0)
        )
        if self.engine.is_statistic is not None:  # weight decay would shrink them
            moved = torch.where(self.engine.is_statistic, step.weights, moved)
        good &= step.loss.isfinite().cpu().numpy()
        if good.all():
            self.weights = moved
        else:
            self._end_diverged(good, moved)
        self.step += 1

    def _gradients(self, at: np.ndarray, places: np.ndarray, dropout: bool = True) -> Gradients:
        """Gradients of some of the living networks on places in the order of training items."""
        networks = self.alive[at]
        keys = rates = None
        share = self.hyperparameters["dropout"][networks]
        if dropout and (share > 0).any():
            keys = random_keys(self.seed, torch.from_numpy(self.hyperparameters["seed"][networks]), self.step)
            rates = torch.from_numpy(share.astype(np.float32))
        everyone = len(at) == len(self.alive)
        weights = self.weights if everyone else self.weights[torch.from_numpy(at).to(self.weights.device)]
        rows, labels = (of[networks[:, None], places] for of in (self.rows, self.labels))
        return self.engine.gradients(weights, rows, labels, keys, rates)

    def _draw_orders(self) -> None:
        """The orders of networks that are in another epoch than that of the order they have."""
        epochs = self.step // self.schedule.per_epoch[self.alive]
        late = np.flatnonzero(self._ordered[self.alive] != epochs)
        for network, epoch in zip(self.alive[late], epochs[late], strict=True):  # once an epoch
            key = 0 if self.shared_order else 1 + int(self.hyperparameters["seed"][network])
            items = int(self.schedule.items[network])
            random = np.random.default_rng([self.seed, 5, key, int(epoch)])
            self._orders[network, :items] = random.permutation(items)
            self._ordered[network] = epoch

    def _batch(self, networks: np.ndarray) -> np.ndarray:
        """(networks, batch) places, among the training items, of this step's batches, which are equally large."""
        size = int(self.schedule.batch[networks[0]])
        position = self.step % self.schedule.per_epoch[networks]
        return self._orders[networks[:, None], position[:, None] * size + np.arange(size)]

    def _learning_rate(self) -> np.ndarray:
        rate = self.hyperparameters["learning_rate"][self.alive]
        done = self.step / self.schedule.steps[self.alive]
        is_cosine = self.hyperparameters["schedule"][self.alive] == _COSINE
        return np.where(is_cosine, rate * 0.5 * (1.0 + np.cos(np.pi * done)), rate)

    def _training_rows(self) -> np.ndarray:
        """(networks, training items) of the data, a network's own first; one line for all where they share them."""
        own, seeds = self.hyperparameters["subset"] == _OWN, self.hyperparameters["seed"]
        common = self.data.train
        if not own.any():
            return np.broadcast_to(common, (len(own), len(common)))
        lines = [
            np.random.default_rng([self.seed, 6, int(key)]).permutation(common) if is_own else common
            for is_own, key in zip(own, seeds, strict=True)
        ]
        return np.stack(lines)

    def _training_labels(self) -> np.ndarray:
        """(networks, training items), one line for all where they have the same items and no noise."""
        noise, seeds = self.hyperparameters["label_noise"], self.hyperparameters["seed"]
        if not (noise > 0).any():
            return self.data.labels[self.rows] if self.rows.strides[0] else self._shared_labels()
        classes = self.data.task.classes
        lines = [
            noisy_labels(self.data.labels[rows], classes, float(share), self.seed, int(key))
            for rows, share, key in zip(self.rows, noise, seeds, strict=True)
        ]
        return np.stack(lines)

    def _shared_labels(self) -> np.ndarray:
        return np.broadcast_to(self.data.labels[self.rows[0]], self.rows.shape)

    # -- who is still trained --------------------------------------------------------------------------------

    def _keep(self, stays: np.ndarray) -> None:
        if stays.all():
            return
        rows = np.flatnonzero(stays)
        self.alive, self.optimizer = self.alive[rows], self.optimizer.take(rows)
        self.weights = self.weights[torch.from_numpy(rows).to(self.weights.device)]

    def _end_diverged(self, good: np.ndarray, moved: Tensor) -> None:
        """Record those with their last finite weights, for every checkpoint that is left, and go on without them."""
        bad = np.flatnonzero(~good)
        left = [
            [
                epoch
                for epoch in self.recorded[network]
                if epoch * self.schedule.per_epoch[network] > self.step
            ]
            for network in self.alive[bad]
        ]
        for epoch in sorted({epoch for entry in left for epoch in entry}):
            at = np.array([place for place, entry in zip(bad, left, strict=True) if epoch in entry])
            self._record(at, np.full(len(at), epoch), diverged=True)
        self.weights = torch.where(torch.from_numpy(good).to(moved.device)[:, None], moved, self.weights)
        self._keep(good)

    # -- recording -------------------------------------------------------------------------------------------

    def _record_due(self) -> None:
        epoch, rest = np.divmod(self.step, self.schedule.per_epoch[self.alive])
        due = [
            place
            for place, network in enumerate(self.alive)
            if rest[place] == 0 and epoch[place] in self.recorded[network]
        ]
        if due:
            at = np.array(due)
            self._record(at, epoch[at], diverged=False)

    def _record(self, at: np.ndarray, epoch: np.ndarray, *, diverged: bool) -> None:
        """Keep weights and metrics of some of the living networks."""
        networks = self.alive[at]
        everyone = len(at) == len(self.alive)
        weights = self.weights if everyone else self.weights[torch.from_numpy(at).to(self.weights.device)]
        metrics = {
            "epoch": epoch,
            "diverged": np.full(len(at), float(diverged)),
            **self._evaluated(at, weights),
        }
        # its last step may have led to weights that are finite, and a loss that is not
        finite = np.isfinite(metrics["train_loss"]) & np.isfinite(metrics["test_loss"])
        metrics["diverged"] = np.where(finite, metrics["diverged"], 1.0)
        metrics["generalisation_gap"] = metrics["train_accuracy"] - metrics["test_accuracy"]
        metrics["gradient_norm"] = self._gradient_norm(at)
        step = epoch * self.schedule.per_epoch[networks]
        columns = [networks, step, *(metrics[name] for name in METRICS)]
        self.records.weights.append(weights.cpu().numpy().copy())
        self.records.columns.append(np.stack(columns, 1).astype(np.float64))

    def _evaluated(self, at: np.ndarray, weights: Tensor) -> dict[str, np.ndarray]:
        found = {}
        for name, rows in {"val": self.data.val, "test": self.data.test}.items():
            rows = rows[: self.evaluation]
            labels = np.broadcast_to(self.data.labels[rows], (len(at), len(rows)))
            found[f"{name}_loss"], found[f"{name}_accuracy"] = self._scores(weights, rows, labels)
        loss, accuracy = np.empty(len(at)), np.empty(len(at))
        items = np.minimum(self.schedule.items[self.alive[at]], self.evaluation)
        for count, part in self._alike(items, at):
            networks = self.alive[at[part]]
            labels, rows = self.labels[networks][:, :count], self.rows[networks[0], :count]
            chosen = weights if len(part) == len(at) else weights[torch.from_numpy(part).to(weights.device)]
            loss[part], accuracy[part] = self._scores(chosen, rows, labels)
        return {"train_loss": loss, "train_accuracy": accuracy, **found}

    def _alike(self, items: np.ndarray, at: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Networks that learn from as many items, and the same: they are evaluated together."""
        own = self.hyperparameters["subset"][self.alive[at]] == _OWN
        kinds = np.where(own, np.arange(len(at)), -1)
        for kind in np.unique(kinds):
            for count in np.unique(items[kinds == kind]):
                yield int(count), np.flatnonzero((kinds == kind) & (items == count))

    def _scores(self, weights: Tensor, rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(rows):
            nothing = np.full(len(weights), np.nan)
            return nothing, nothing
        return self.engine.evaluate(weights, rows, labels)

    def _gradient_norm(self, at: np.ndarray) -> np.ndarray:
        """Of the gradient on the first batch of a network's training items, without dropout."""
        norms, batches = np.empty(len(at)), self.schedule.batch[self.alive[at]]
        for size in np.unique(batches):
            part = np.flatnonzero(batches == size)
            places = np.broadcast_to(np.arange(size), (len(part), size))
            gradients = self._gradients(at[part], places, dropout=False).gradients
            norms[part] = np.linalg.norm(gradients.cpu().numpy().astype(np.float64), axis=1)
        return norms

    # -- resuming --------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, np.ndarray]:
        return {
            "step": np.array([self.step]),
            "alive": self.alive,
            "weights": self.weights.cpu().numpy(),
            "first": self.optimizer.first.cpu().numpy(),
            "second": self.optimizer.second.cpu().numpy(),
            **self.records.arrays(self.weights.shape[1]),
        }

    def _restore(self, state: dict[str, np.ndarray] | None) -> None:
        if state is None or state["weights"].shape[1] != self.weights.shape[1]:
            return
        device = self.weights.device
        self.step, self.alive = int(state["step"][0]), state["alive"]
        self.optimizer = self.optimizer.take(self.alive)
        self.weights, self.optimizer.first, self.optimizer.second = (
            torch.from_numpy(state[name]).to(device) for name in ("weights", "first", "second")
        )
        self.records = _Records([state["records.weights"]], [state["records.columns"]])
