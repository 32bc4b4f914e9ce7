"""Baselines that read the flattened weights or their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.align import weight_matching
from weightspace.errors import ConfigError, RunError
from weightspace.models._orbits import batch_size
from weightspace.models._perceptron import perceptron
from weightspace.spec import Weights, WeightSpec

LEAST_LOG_PROBABILITY = -30.0  # finite, so that the loss of an unseen class stays a number
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class FlatMLP(nn.Module):
    """An MLP on the flattened weights: blind to every symmetry, and the field's first baseline.

    Args:
        spec: the weight space.
        out_features: size of the output.
        hidden: units per hidden layer.
        dropout: after each hidden layer.
        align: whether the units of every network are first put in the order that brings it closest to a reference
            network, by weight matching. The reference is the first network of finite weights that is seen in
            training, and is saved with the model. A batch of 64 SIRENs 2-32-32-1 takes about 60 ms more, in
            evaluation as in training, where augmented weights are new in every step.

    Shapes:
        Weights with one batch axis -> (batch, out_features). Training needs batches of two networks or more, for
        BatchNorm.

    Raises:
        ConfigError: a size below 1.
        SpecError: networks with nested or repeated groups are to be aligned, which is not supported.

    Reference:
        Navon et al. 2023, arXiv:2301.12780, section 7 (MLP, and MLP with alignment).
    """

    reference: Tensor
    has_reference: Tensor

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int,
        *,
        hidden: Sequence[int] = (512, 512),
        dropout: float = 0.2,
        align: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.align = spec, align
        if align:
            self.register_buffer("reference", torch.zeros(spec.num_parameters))
            self.register_buffer("has_reference", torch.tensor(False))
            nothing = spec.unflatten(torch.zeros(1, spec.num_parameters))
            weight_matching(
                spec, nothing, nothing, restarts=1
            )  # refuses now what it would refuse in training
        self.network = perceptron(spec.num_parameters, hidden, out_features, dropout=dropout)

    def set_reference(self, weights: Weights) -> None:
        """Choose the network to which all others are aligned; tensors without a batch axis.

        Raises:
            RunError: its weights are not all finite.
        """
        flat = self.spec.flatten(weights).detach()
        if not bool(flat.isfinite().all()):
            raise RunError("model mlp: cannot align to a network whose weights are not all finite")
        self.reference.copy_(flat)
        self.has_reference.fill_(True)

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks.

        Raises:
            RunError: with ``align``, nothing has been trained yet and no reference was set, or no network of the
                first batch has finite weights.
            SpecError: the weights do not fit the spec, or have not one batch axis.
        """
        batch = batch_size(self.spec, weights)
        aligned = self._aligned(weights) if self.align and batch else weights
        out: Tensor = self.network(_flattened(self.spec, aligned, batch))
        return out

    @torch.compiler.disable
    def _aligned(self, weights: Weights) -> Weights:
        if not bool(self.has_reference):
            if not self.training:
                raise RunError("model mlp: nothing to align to; train it first, or call set_reference")
            finite = self.spec.flatten(weights).isfinite().all(-1)
            first = int(finite.int().argmax())  # the first of all where none is, which set_reference refuses
            self.set_reference({name: tensor[first] for name, tensor in weights.items()})
        return weight_matching(self.spec, self.spec.unflatten(self.reference), weights)[0]


class DeepSets(nn.Module):
    """The weights as a set of numbers, each marked with the tensor that it is from.

    Every weight w of tensor t goes through ``phi(w, e_t)``, an MLP with a learned embedding ``e_t`` of the
    tensor; the mean and the maximum over all weights of a network are read by a second MLP. Invariant to more
    than permutations of units: to any order of the weights within a tensor. What another model gains over it is
    what it makes of the network's structure.

    Args:
        spec: the weight space.
        out_features: size of the output.
        features: of each weight.
        layers: of ``phi``, at least 1.
        hidden: units per hidden layer of the second MLP.
        dropout: of the second MLP.

    Shapes:
        Weights with one batch axis -> (batch, out_features). Activations of (batch, parameters, features) are
        held for every layer. Training needs batches of two networks or more, for BatchNorm.

    Reference:
        Zaheer et al. 2017, "Deep Sets", arXiv:1703.06114, theorem 2; on weights: Navon et al. 2023,
        arXiv:2301.12780, section 7. The maximum beside the mean, and the embeddings of tensors, are ours.

    Example:
        >>> spec = WeightSpec.mlp([2, 8, 1])
        >>> DeepSets(spec, 10)(spec.unflatten(torch.randn(4, spec.num_parameters))).shape
        torch.Size([4, 10])
    """

    owner: Tensor

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int,
        *,
        features: int = 64,
        layers: int = 2,
        hidden: Sequence[int] = (128,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if features < 1 or layers < 1:
            raise ConfigError(f"deepsets: expected features and layers >= 1, found {features} and {layers}")
        self.spec = spec
        counts = torch.tensor([tensor.numel for tensor in spec.tensors.values()])
        total = sum(tensor.numel for tensor in spec.tensors.values())  # without it, meta tensors fail
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts, output_size=total)
        self.register_buffer("owner", owner, persistent=False)
        # the first layer of phi, w slope_t + e_t: no (batch, parameters, 1 + embedding) is ever made
        self.slope = nn.Parameter(torch.randn(len(counts), features))
        self.embedding = nn.Parameter(torch.randn(len(counts), features))
        rest = [layer for _ in range(layers - 1) for layer in (nn.ReLU(), nn.Linear(features, features))]
        self.phi = nn.Sequential(*rest, nn.ReLU())
        self.read = perceptron(2 * features, hidden, out_features, dropout=dropout)

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks."""
        flat = _flattened(self.spec, weights, batch_size(self.spec, weights))
        first = torch.addcmul(self.embedding[self.owner], flat[..., None], self.slope[self.owner])
        features = self.phi(first)
        out: Tensor = self.read(torch.cat([features.mean(-2), features.amax(-2)], dim=-1))
        return out


def _flattened(spec: WeightSpec, weights: Weights, batch: int) -> Float[Tensor, "batch parameters"]:
    """As ``spec.flatten``, which cannot tell the number of parameters of no networks."""
    if batch == 0:
        return next(iter(weights.values())).new_empty(0, spec.num_parameters)
    return spec.flatten(weights)


def statistics(spec: WeightSpec, weights: Mapping[str, Tensor]) -> Float[Tensor, "*batch features"]:
    """Per tensor: mean, variance, and the quantiles 0, 25, 50, 75 and 100 %.

    Invariant to permutations. Tensors with one element give their value alone. Half precision is read as float32.

    Reference:
        Unterthiner et al. 2020, "Predicting Neural Network Accuracy from Weights", arXiv:2002.11448, section 4.

    Example:
        >>> spec = WeightSpec.mlp([2, 3, 1])
        >>> statistics(spec, spec.unflatten(torch.arange(13.0))).shape
        torch.Size([22])
    """
    batch = spec.batch_shape(weights)
    parts = []
    for name, tensor in spec.tensors.items():
        flat = weights[name].reshape(*batch, tensor.numel)
        if flat.dtype in (torch.float16, torch.bfloat16):  # quantiles of which do not exist
            flat = flat.float()
        if tensor.numel == 1:
            parts.append(flat)
            continue
        if flat.numel() == 0:  # no networks, of which there are no quantiles
            parts.append(flat.new_empty(*batch, 2 + len(QUANTILES)))
            continue
        levels = torch.tensor(QUANTILES, dtype=flat.dtype, device=flat.device)
        parts.append(torch.stack([flat.mean(-1), flat.var(-1, correction=0)], dim=-1))
        parts.append(torch.quantile(flat, levels, dim=-1).movedim(0, -1))
    return torch.cat(parts, dim=-1)


class StatisticsMLP(nn.Module):
    """An MLP on the statistics of each tensor.

    Args:
        spec: the weight space.
        out_features: size of the output.
        hidden: units per hidden layer.
        dropout: after each hidden layer.

    Shapes:
        Weights with one batch axis -> (batch, out_features). Training needs batches of two networks or more, for
        BatchNorm.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self, spec: WeightSpec, out_features: int, *, hidden: Sequence[int] = (256, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.spec = spec
        features = sum(1 if tensor.numel == 1 else 2 + len(QUANTILES) for tensor in spec.tensors.values())
        self.network = perceptron(features, hidden, out_features, dropout=dropout)

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks."""
        batch_size(self.spec, weights)
        read = statistics(self.spec, weights)
        out: Tensor = self.network(read.to(next(self.network.parameters()).dtype))
        return out


class StatisticsTrees(nn.Module):
    """Gradient-boosted trees (scikit-learn) on the statistics of each tensor; fitted once, without gradients.

    Integer targets are classes, floating-point ones are numbers to predict.

    Args:
        spec: the weight space.
        out_features: number of classes; 1 for a number.
        iterations: boosting rounds.
        learning_rate: of boosting.
        seed: of the trees.

    Shapes:
        Weights with one batch axis -> log-probabilities (batch, out_features), or numbers (batch, 1).

    Raises:
        ConfigError: less than one class.
    """

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int,
        *,
        iterations: int = 100,
        learning_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if out_features < 1:
            raise ConfigError(f"statistics: expected out_features of at least 1, found {out_features}")
        self.spec, self.out_features = spec, out_features
        self.options = {
            "max_iter": iterations,
            "learning_rate": learning_rate,
            "early_stopping": False,
            "random_state": seed,
        }
        self.trees: Any = None

    def fit_once(self, weights: Weights, targets: Tensor) -> None:
        """Fit on the whole training split; targets (batch,) are class numbers, or floats.

        Raises:
            ConfigError: a class number that is not in 0 ... out_features - 1.
        """
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        kind = (
            HistGradientBoostingRegressor if targets.is_floating_point() else HistGradientBoostingClassifier
        )
        found = targets.detach().cpu().numpy()
        if not targets.is_floating_point() and (found.min() < 0 or found.max() >= self.out_features):
            raise ConfigError(
                f"model statistics: expected labels in 0 ... {self.out_features - 1}, "
                f"found {found.min()} ... {found.max()}"
            )
        self.trees = kind(**self.options)
        self.trees.fit(statistics(self.spec, weights).detach().cpu().numpy(), found)

    def forward(self, weights: Weights) -> Tensor:
        """Log-probabilities of every class, the least for classes that the training split lacks; or numbers.

        Raises:
            RunError: nothing was fitted or loaded.
        """
        if self.trees is None:
            raise RunError("model statistics: the trees are not fitted; call fit_once, or load them")
        batch = batch_size(self.spec, weights)
        features = statistics(self.spec, weights).detach()
        if batch == 0:  # which scikit-learn refuses
            return features.new_empty(0, self.out_features)
        if not hasattr(self.trees, "predict_proba"):
            numbers = torch.from_numpy(self.trees.predict(features.cpu().numpy()))
            return numbers.float()[:, None].to(features.device)
        found = torch.from_numpy(self.trees.predict_proba(features.cpu().numpy())).float().log()
        out = torch.full((len(found), self.out_features), LEAST_LOG_PROBABILITY)
        out[:, torch.from_numpy(np.asarray(self.trees.classes_)).long()] = found
        return out.to(features.device)

    def save(self, path: Path) -> None:
        """Write the trees; skops stores no code, unlike pickle."""
        import skops.io

        skops.io.dump(self.trees, path)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            RunError: the file is damaged, or holds types that are not those of scikit-learn's trees.
        """
        import skops.io

        trusted = ["sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"]
        try:
            self.trees = skops.io.load(path, trusted=trusted)
        except Exception as error:  # a damaged archive fails in many ways
            raise RunError(f"run: {path} cannot be read ({type(error).__name__})") from None
