"""Cases made of linear layers: perceptrons, implicit representations, sets, experts."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.nets import MLP
from weightspace.testing._networks._case import case, floats, tokens

Rows: TypeAlias = Float[Tensor, "batch in_features"]
Scores: TypeAlias = Float[Tensor, "batch out_features"]
Points: TypeAlias = Float[Tensor, "batch points in_features"]


@case(floats((5, 3)), floats((4, 3)))
def mlp() -> nn.Module:
    """Multilayer perceptron with ReLU: the plainest case."""
    return MLP((3, 8, 7, 6, 2), activation="relu")


@case(floats((5, 2)), floats((4, 2)))
def siren() -> nn.Module:
    """Implicit representation with sine: phases beside signs."""
    return MLP((2, 9, 8, 3), activation="sine", w0=30.0)


@case(floats((5, 3)), floats((4, 3)))
def mlp_tanh() -> nn.Module:
    """Perceptron with tanh: signs, no scales."""
    return MLP((3, 8, 7, 2), activation="tanh")


@case(floats((5, 3)), floats((4, 3)))
def mlp_gaussian() -> nn.Module:
    """Perceptron with an even activation: the sign of a unit's input is free."""
    return MLP((3, 8, 7, 2), activation="gaussian", w0=2.0)


@case(floats((5, 3)), floats((4, 3)))
def weight_norm_mlp() -> nn.Module:
    """Weight normalisation as a parametrisation: gains and directions move together."""
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        weight_norm(nn.Linear(3, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 7)), nn.ReLU(), nn.Linear(7, 2)
    )


class _Residual(nn.Module):
    """The stream plus a branch of it."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return x + self.branch(x)


def _branch(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


@case(floats((5, 3)), floats((4, 3)))
def norm_free_residual() -> nn.Module:
    """Residual stream without norms: scales inside the branches, and one for each unit of the stream."""
    return nn.Sequential(
        nn.Linear(3, 7), _Residual(_branch(7, 9)), _Residual(_branch(7, 8)), nn.ReLU(), nn.Linear(7, 2)
    )


@case(floats((5, 3)), floats((4, 3)))
def rms_norm_residual() -> nn.Module:
    """Residual stream read through nn.RMSNorm, which forbids to scale the units of the stream separately."""
    return nn.Sequential(
        nn.Linear(3, 7),
        _Residual(nn.Sequential(nn.RMSNorm(7), _branch(7, 9))),
        _Residual(nn.Sequential(nn.RMSNorm(7), _branch(7, 8))),
        nn.RMSNorm(7),
        nn.Linear(7, 2),
    )


class _TiedAutoencoder(nn.Module):
    """The decoder is the encoder transposed."""

    def __init__(self, in_features: int, hidden: int, code: int) -> None:
        super().__init__()
        self.outer = nn.Linear(in_features, hidden)
        self.inner = nn.Linear(hidden, code)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(in_features))

    def forward(self, x: Rows) -> Rows:
        code = torch.relu(self.inner(torch.relu(self.outer(x))))
        hidden = torch.relu(F.linear(code, self.inner.weight.t(), self.hidden_bias))
        return F.linear(hidden, self.outer.weight.t(), self.bias)


@case(floats((5, 6)), floats((4, 6)))
def tied_autoencoder() -> nn.Module:
    """Autoencoder whose decoder uses the encoder's weights transposed: every weight has two uses."""
    return _TiedAutoencoder(6, 8, 5)


class _SoftExperts(nn.Module):
    """Every expert, weighted by a softmax; the experts' weights are stacked."""

    def __init__(self, features: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(features, experts)
        self.up = nn.Parameter(torch.randn(experts, features, hidden) / features**0.5)
        self.up_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, features) / hidden**0.5)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        hidden = torch.relu(torch.einsum("bd,edh->beh", x, self.up) + self.up_bias)
        return torch.einsum("be,beh,ehd->bd", self.gate(x).softmax(-1), hidden, self.down)


@case(floats((5, 2)), floats((4, 2)))
def mixture_of_experts() -> nn.Module:
    """Soft mixture of experts with stacked weights: hidden units nested within the experts."""
    return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), _SoftExperts(7, 6, 3), nn.Linear(7, 2))


class _Bilinear(nn.Module):
    """Two embeddings joined by nn.Bilinear."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 7)
        self.right = nn.Linear(4, 6)
        self.join = nn.Bilinear(7, 6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Float[Tensor, "batch 3"], y: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch 2"]:
        joined: Tensor = torch.relu(self.join(torch.relu(self.left(x)), torch.relu(self.right(y))))
        out: Tensor = self.head(joined)
        return out


@case(floats((5, 3), (5, 4)), floats((6, 3), (6, 4)))
def bilinear() -> nn.Module:
    """A bilinear layer: one weight with three permutable axes."""
    return _Bilinear()


class _DeepSets(nn.Module):
    """Zaheer et al. 2017, "Deep Sets", arXiv:1703.06114, pooled by sum and by maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 7))
        self.outer = nn.Sequential(nn.Linear(14, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Points) -> Scores:
        points = self.inner(x)
        out: Tensor = self.outer(torch.cat([points.sum(1), points.amax(1)], -1))
        return out


@case(floats((4, 5, 3)), floats((2, 6, 3)))
def deep_sets() -> nn.Module:
    """Pooling over a set by sum and by maximum, concatenated."""
    return _DeepSets()


class _TextClassifier(nn.Module):
    """Tokens and positions embedded, averaged, classified."""

    def __init__(self, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 8)
        self.positions = nn.Embedding(positions, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, ids: Int[Tensor, "batch length"]) -> Scores:
        places = torch.arange(ids.shape[1], device=ids.device)
        out: Tensor = self.head((self.tokens(ids) + self.positions(places)).mean(1))
        return out


@case(tokens(11, 3, 7), tokens(11, 4, 5))
def text_classifier() -> nn.Module:
    """Embedded tokens and learned positions, averaged."""
    return _TextClassifier(11, 7)


class _MixerBlock(nn.Module):
    """Tolstikhin et al. 2021, "MLP-Mixer", arXiv:2105.01601."""

    def __init__(self, patches: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mixing = nn.Sequential(
            nn.Linear(patches, token_hidden), nn.GELU(), nn.Linear(token_hidden, patches)
        )
        self.channel_mixing = nn.Sequential(
            nn.Linear(width, channel_hidden), nn.GELU(), nn.Linear(channel_hidden, width)
        )

    def forward(self, x: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch patches width"]:
        x = x + self.token_mixing(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mixing(self.channel_norm(x))


class _Mixer(nn.Module):
    """Patches, mixing blocks, average, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(_MixerBlock(6, 8, 7, 10), _MixerBlock(6, 8, 9, 11))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Scores:
        patches = self.stem(x).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.norm(self.blocks(patches)).mean(1))
        return out


@case(floats((4, 3, 8, 12)), floats((5, 3, 8, 12)))
def mlp_mixer() -> nn.Module:
    """Mixing over patches and over channels: the patches' axis is mixed too, so it is no batch."""
    return _Mixer()
