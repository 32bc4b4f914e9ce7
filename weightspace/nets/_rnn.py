"""Recurrent classifiers of short sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.nets import _checks
from weightspace.nets._dropout import Dropout
from weightspace.nets._network import NETWORKS, Network

Cell = Literal["rnn", "gru", "lstm"]
CELLS: tuple[str, ...] = get_args(Cell)
SEQUENCES = ("tokens", "floats")

_HOLDERS: dict[str, Callable[[int, int], nn.RNNCellBase]] = {
    "rnn": nn.RNNCell,
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}

# A step: what the inputs give (weights and bias applied), what the last state gives, and the state; the new state,
# whose first part is the output. PyTorch's own cells do not run under vmap on every device, these do.
State = tuple[Tensor, ...]


def _rnn_step(x: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(x + h),)


def _gru_step(x: Tensor, h: Tensor, state: State) -> State:
    (hidden,) = state
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = x.chunk(3, -1), h.chunk(3, -1)
    update = torch.sigmoid(x_update + h_update)
    new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
    return (new + update * (hidden - new),)


def _lstm_step(x: Tensor, h: Tensor, state: State) -> State:
    _, cell = state
    entering, forgetting, new, leaving = (x + h).chunk(4, -1)
    cell = torch.tanh(new) * torch.sigmoid(entering) + torch.sigmoid(forgetting) * cell
    return torch.sigmoid(leaving) * torch.tanh(cell), cell


_STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "rnn": _rnn_step,
    "gru": _gru_step,
    "lstm": _lstm_step,
}


def run_cell(
    kind: str, cell: nn.RNNCellBase, x: Float[Tensor, "batch length in_features"]
) -> Float[Tensor, "batch length hidden"]:
    """The hidden states of a recurrent layer at every step, from a state of zeros.

    The same as ``nn.RNN`` (tanh), ``nn.GRU`` or ``nn.LSTM`` with these weights, in operations that run under
    ``torch.vmap``.
    """
    projected = F.linear(x, cell.weight_ih, cell.bias_ih)
    zeros = x.new_zeros(x.shape[0], cell.hidden_size)
    state: State = (zeros, zeros) if kind == "lstm" else (zeros,)
    outputs = []
    for step in projected.unbind(1):
        state = _STEPS[kind](step, F.linear(state[0], cell.weight_hh, cell.bias_hh), state)
        outputs.append(state[0])
    return torch.stack(outputs, 1)


@NETWORKS.register("rnn")
class RNN(Network):
    """A recurrent classifier: an embedding, recurrent layers, and a linear layer on the last hidden state.

    Args:
        in_features: size of the vocabulary, or numbers per step.
        hidden: units of each recurrent layer.
        out_features: number of classes.
        cell: ``"rnn"`` (tanh), ``"gru"`` or ``"lstm"``.
        sequence: ``"tokens"`` (int64, embedded) or ``"floats"``.
        embedding: features per token (None: as many as ``hidden``); for floats, features of a linear layer before
            the recurrent ones (None: there is none, and the first cell reads the numbers themselves).
        layers: number of recurrent layers.
        length: of the sequences that are typical, at least 2; any other is accepted as well.
        dropout: rate on the embedded inputs and after every recurrent layer, in training; a population may have
            other rates, see :func:`dropout_state`.

    Shapes:
        (batch, length) of tokens, or (batch, length, in_features) of floats -> (batch, out_features).

    Raises:
        ConfigError: an argument that makes no network; the sentence names it.

    Reference:
        Zhou et al. 2024, "Universal Neural Functionals", arXiv:2402.05232 (Tiny RNN Zoo); Cho et al. 2014,
        arXiv:1406.1078 (GRU); Hochreiter and Schmidhuber 1997 (LSTM).

    Example:
        >>> RNN(16, 32, 10, cell="gru", length=6)(torch.zeros(2, 6, dtype=torch.int64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        *,
        cell: str = "gru",
        sequence: str = "tokens",
        embedding: int | None = None,
        layers: int = 1,
        length: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features = _checks.whole("in_features", in_features)
        self.hidden = _checks.whole("hidden", hidden)
        self.out_features = _checks.whole("out_features", out_features)
        self.cell = _checks.choice("cell", cell, CELLS)
        self.sequence = _checks.choice("sequence", sequence, SEQUENCES)
        self.embedding = None if embedding is None else _checks.whole("embedding", embedding)
        if self.sequence == "tokens":
            self.embedding = self.embedding or self.hidden
        self.layers = _checks.whole("layers", layers)
        self.length = _checks.whole("length", length, 2)  # traced with fewer, no state would ever be read
        self.dropout = _checks.rate("dropout", dropout)
        self.input_shape = (self.length,) if self.sequence == "tokens" else (self.length, self.in_features)
        self._add_layers()

    def _add_layers(self) -> None:
        features = self.embedding or self.in_features
        self.embed: nn.Module = nn.Identity()
        if self.sequence == "tokens":
            self.embed = nn.Embedding(self.in_features, features)
        elif self.embedding is not None:
            self.embed = nn.Linear(self.in_features, features)
        widths = [features] + [self.hidden] * (self.layers - 1)
        self.cells = nn.ModuleList(_HOLDERS[self.cell](entering, self.hidden) for entering in widths)
        self.dropouts = nn.ModuleList(Dropout(self.dropout) for _ in range(self.layers + 1))
        self.classifier = nn.Linear(self.hidden, self.out_features)

    def forward(self, x: Shaped[Tensor, "batch length ..."]) -> Float[Tensor, "batch out_features"]:
        """The logits of sequences."""
        states = self.dropouts[0](self.embed(x))
        for cell, dropout in zip(self.cells, self.dropouts[1:], strict=True):
            assert isinstance(cell, nn.RNNCellBase)
            states = dropout(run_cell(self.cell, cell, states))
        logits: Tensor = self.classifier(states[:, -1])
        return logits

    def example_inputs(self, batch: int = 2) -> Tensor:
        """Inputs that the network accepts, ``(batch, *input_shape)``: zeros, or tokens that vary."""
        if self.sequence == "floats":
            return super().example_inputs(batch)
        return (torch.arange(batch * self.length) % self.in_features).view(batch, self.length)

    def random_inputs(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Inputs that the network accepts, ``(batch, *input_shape)``: uniform in [-1, 1], or any tokens."""
        if self.sequence == "floats":
            return super().random_inputs(batch, generator)
        return torch.randint(self.in_features, (batch, self.length), generator=generator)

    def arguments(self) -> dict[str, object]:
        """The keyword arguments that build this network again, ready for JSON."""
        return {
            "in_features": self.in_features,
            "hidden": self.hidden,
            "out_features": self.out_features,
            "cell": self.cell,
            "sequence": self.sequence,
            "embedding": self.embedding,
            "layers": self.layers,
            "length": self.length,
            "dropout": self.dropout,
        }
