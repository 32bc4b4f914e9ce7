"""Contrastive self-supervision: embeddings in which augmented copies of a network meet, and all others part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from weightspace.datasets import Normalisation, ZooDataset
from weightspace.errors import TaskError
from weightspace.models import FittedOnce
from weightspace.spec import Weights, WeightSpec
from weightspace.tasks._figures import draw_similarities
from weightspace.tasks._metanetwork import Metanetwork
from weightspace.tasks._registry import TASKS, Outputs, Split, Task, TaskOptions

MOST_QUERIES, MOST_DRAWN = 4096, 512  # rows that are compared with all others, for scores and for the figure
CELLS = 2**24  # similarities that are held at once: 64 MB


class ContrastiveOptions(TaskOptions):
    """Options of the task ``contrastive``."""

    dimensions: int = Field(128, ge=1, description="of the embedding")
    projection: int = Field(
        128, ge=0, description="size of what a small MLP makes of the embedding for the loss; 0 for none"
    )
    temperature: float = Field(0.1, ge=0.01, le=10, description="by which cosine similarities are divided")


def nt_xent(
    embeddings: Float[Tensor, "rows features"],
    instances: Int[Tensor, " rows"],
    items: Int[Tensor, " rows"] | None = None,
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    r"""InfoNCE of normalised embeddings, each against all others of a batch (NT-Xent).

    With :math:`s_{ij}` the cosine similarity over the temperature, :math:`P_i` the other rows of the instance of row i,
    and :math:`N_i` the rows of other items,

    .. math:: L = \operatorname{mean}_i \operatorname{mean}_{p \in P_i}
        -\log \frac{e^{s_{ip}}}{e^{s_{ip}} + \sum_{n \in N_i} e^{s_{in}}}.

    With two rows of every instance, and every instance an item of its own, this is the loss of SimCLR. Other networks
    of one item neither attract nor repel each other, so that views of an image are no false negatives. Rows whose
    instance has no other row serve as negatives only.

    Args:
        embeddings: of any length; only directions count.
        instances: equal numbers for rows that belong together.
        items: equal numbers for rows that are no negatives of each other; the instances by default.
        temperature: positive.

    Shapes:
        ``embeddings`` (rows, features), ``instances`` and ``items`` (rows,) -> scalar, float32.

    Reference:
        van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748, eq. 4;
        Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", arXiv:2002.05709,
        eq. 1.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> loss = nt_xent(x, torch.tensor([0, 0, 1, 1]), temperature=1.0)
        >>> bool(torch.isclose(loss, torch.tensor(1 + 2 / torch.e).log()))
        True
    """
    unit = normalize(embeddings.float(), dim=-1)
    pairs = torch.stack([instances, instances if items is None else items], dim=1)
    positives, negatives = _told_apart(pairs, torch.arange(len(unit), device=unit.device))
    losses = _losses(unit @ unit.T / temperature, positives, negatives)
    return losses.sum() / positives.any(-1).sum().clamp_min(1)


def _told_apart(
    numbers: Int[Tensor, "rows 2"], own: Int[Tensor, " queries"]
) -> tuple[Bool[Tensor, "queries rows"], Bool[Tensor, "queries rows"]]:
    """Which rows are of the same instance as each query, itself left out, and which are of other items."""
    same = numbers[own, None] == numbers
    return same[..., 0].scatter(1, own[:, None], False), ~same[..., 1]


def _losses(
    logits: Float[Tensor, "queries rows"],
    positives: Bool[Tensor, "queries rows"],
    negatives: Bool[Tensor, "queries rows"],
) -> Float[Tensor, " queries"]:
    """Loss of each query; 0 for those without positives."""
    # minus infinity would make gradients NaN where no negative is left
    excluded = torch.finfo(logits.dtype).min / 2
    others = logits.masked_fill(~negatives, excluded).logsumexp(-1, keepdim=True)
    return (softplus(others - logits) * positives).sum(-1) / positives.sum(-1).clamp_min(1)


class EmbeddingMetanetwork(Metanetwork):
    """A metanetwork whose output is an embedding, and a small MLP on top of it for the loss alone.

    Args:
        model: gives the embedding.
        normalisation: of the training split; None for models that read raw weights.
        dimensions: of the embedding.
        projection: size of the projection; 0 for none.

    Shapes:
        Weights with one batch axis -> ``embedding`` (batch, dimensions), and ``projection`` (batch, projection).

    Reference:
        Chen et al. 2020, arXiv:2002.05709, section 4.2: what lies before the projection serves other tasks better.
    """

    def __init__(
        self, model: nn.Module, normalisation: Normalisation | None, dimensions: int, projection: int
    ) -> None:
        super().__init__(model, normalisation)
        self.projection = (
            nn.Sequential(nn.Linear(dimensions, dimensions), nn.ReLU(), nn.Linear(dimensions, projection))
            if projection
            else None
        )

    def forward(self, weights: Weights) -> dict[str, Tensor]:
        """Embed a batch of networks."""
        embedding = super().forward(weights)
        assert isinstance(embedding, Tensor)
        if self.projection is None:
            return {"embedding": embedding}
        return {"embedding": embedding, "projection": self.projection(embedding)}


@TASKS.register("contrastive")
class Contrastive(Task):
    """Two augmented copies of each network attract each other and repel the rest of the batch; no label is read."""

    monitor = "information"
    settings = ContrastiveOptions
    needs_target = False
    copies = 2
    embeds = True
    training: ClassVar[Mapping[str, Any]] = {"augment": "sign, noise(0.1)"}

    def __init__(self, options: ContrastiveOptions | None = None) -> None:
        self.options = options or ContrastiveOptions()

    @classmethod
    def from_data(cls, train: Split, options: ContrastiveOptions) -> Contrastive:
        """Nothing is read from the training split.

        Raises:
            TaskError: networks of several populations, or of one item only.
        """
        if not isinstance(train, ZooDataset):
            raise TaskError(
                f"task contrastive: expected networks of one population, found {len(train.parts)}"
            )
        task = cls(options)
        if len(task.targets(train)[:, 1].unique()) < 2:
            raise TaskError(
                f"task contrastive: expected networks of several items in split {train.split!r}, found one"
            )
        return task

    @classmethod
    def from_state(cls, state: Mapping[str, Any], options: ContrastiveOptions) -> Contrastive:
        """See :meth:`state`."""
        return cls(options)

    @property
    def out_features(self) -> int:
        """Dimensions of the embedding."""
        return self.options.dimensions

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def assemble(
        self, model: nn.Module, normalisation: Normalisation | None, spec: WeightSpec
    ) -> EmbeddingMetanetwork:
        """With a projection for the loss.

        Raises:
            TaskError: a model that is not trained by gradients.
        """
        if isinstance(model, FittedOnce):
            raise TaskError(
                f"task contrastive: expected a metanetwork that is trained by gradients, found {type(model).__name__}"
            )
        return EmbeddingMetanetwork(model, normalisation, self.options.dimensions, self.options.projection)

    def targets(self, dataset: ZooDataset) -> Int[Tensor, "networks 2"]:
        """The number of each row, by which its copies are known, and that of its item."""
        population = dataset.population
        items = population.source[population.network[dataset.rows]]
        return torch.from_numpy(np.stack([dataset.rows, items], axis=1))

    def readout(self, outputs: Outputs) -> Float[Tensor, "batch features"]:
        """The embedding, and behind it the projection."""
        assert isinstance(outputs, Mapping)
        return torch.cat(list(outputs.values()), dim=-1).float()

    def loss(self, readout: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """NT-Xent of the projections."""
        projection, (instances, items) = self._parts(readout)[0], targets.unbind(-1)
        return nt_xent(projection, instances, items, self.options.temperature)

    def scores(self, readout: Tensor, targets: Tensor) -> dict[str, float]:
        """Information between copies, and how often a network's nearest neighbour is of its own item.

        ``information``, in nats, is ``log(1 + negatives) - loss`` of the projections, a lower bound of the mutual
        information of two copies, which cannot exceed the first term (van den Oord et al. 2018, eq. 5). ``retrieval`` is
        the share of copies whose nearest neighbour among all copies of all networks, by the cosine of embeddings, is of
        the same item. Of splits with more than 4,096 copies as many are asked, evenly spaced, and all may answer.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        projection, embedding = (normalize(part, dim=-1) for part in self._parts(readout))
        for own in _queries(len(targets), MOST_QUERIES, targets.device):
            positives, negatives = _told_apart(targets, own)
            losses = _losses(projection[own] @ projection.T / self.options.temperature, positives, negatives)
            information = negatives.sum(-1).double().log1p() - losses
            nearest = (embedding[own] @ embedding.T).scatter(1, own[:, None], -math.inf).argmax(-1)
            hits = targets[own, 1] == targets[nearest, 1]
            asked = positives.any(-1)
            sums += torch.stack([information[asked].sum(), hits[asked].sum(), asked.sum()]).cpu()
        information, retrieval = (sums[:2] / sums[2]).tolist()
        return {"information": information, "retrieval": retrieval}

    def predictions(self, readout: Tensor) -> dict[str, Tensor]:
        """The embedding, one column per dimension."""
        return {f"embedding_{at}": column for at, column in enumerate(self._parts(readout)[1].unbind(-1))}

    def figure(
        self, readout: Tensor, targets: Tensor, path: Path, title: str, *, reference: Tensor | None = None
    ) -> None:
        """Histograms of the similarity of copies of one network, and of that of networks of different items."""
        embedding = normalize(self._parts(readout)[1], dim=-1)
        own = torch.cat(list(_queries(len(targets), MOST_DRAWN, targets.device)))
        similarity = embedding[own] @ embedding[own].T
        positives, negatives = (part[:, own] for part in _told_apart(targets, own))
        pairs = {"copies of one network": positives, "networks of different items": negatives}
        cosines = {name: similarity[which.triu(1)].cpu().numpy() for name, which in pairs.items()}
        draw_similarities(cosines, path, title)

    def _parts(self, readout: Tensor) -> tuple[Tensor, Tensor]:
        """What the loss compares, and the embedding; the same without a projection."""
        embedding = readout[:, : self.options.dimensions]
        return (readout[:, self.options.dimensions :] if self.options.projection else embedding), embedding


def _queries(rows: int, most: int, device: torch.device) -> Iterator[Int[Tensor, " queries"]]:
    """Rows that are compared with all others, at most so many and evenly spaced, in blocks that fit into memory."""
    chosen = torch.arange(rows, device=device)
    if rows > most:
        chosen = chosen[torch.linspace(0, rows - 1, most, device=device).long()]
    yield from chosen.split(max(1, CELLS // max(rows, 1)))
