"""Cases with recurrent layers, two deep and in both directions."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from weightspace.testing._networks._case import case, floats


class _Readout(nn.Module):
    """A linear layer on every step of a recurrent one."""

    def __init__(self, recurrent: nn.RNNBase, out_features: int) -> None:
        super().__init__()
        self.recurrent = recurrent
        width = recurrent.hidden_size * (2 if recurrent.bidirectional else 1)
        self.readout = nn.Linear(width, out_features)

    def forward(self, x: Float[Tensor, "batch length in"]) -> Float[Tensor, "batch length out"]:
        out: Tensor = self.readout(self.recurrent(x)[0])
        return out


@case(floats((2, 7, 4)), floats((3, 6, 4)))
def gru() -> nn.Module:
    """Gated recurrent unit: three gates concatenated, hidden units that move together over time."""
    return _Readout(nn.GRU(4, 5, num_layers=2, bidirectional=True, batch_first=True), 3)


@case(floats((2, 7, 4)), floats((3, 6, 4)))
def lstm() -> nn.Module:
    """Long short-term memory: four gates concatenated."""
    return _Readout(nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), 3)


@case(floats((2, 7, 4)), floats((3, 6, 4)))
def rnn() -> nn.Module:
    """Elman network with tanh: signs as well."""
    return _Readout(nn.RNN(4, 5, num_layers=2, bidirectional=True, batch_first=True), 3)


@case(floats((2, 7, 4)), floats((3, 6, 4)))
def rnn_relu() -> nn.Module:
    """Elman network with ReLU, one direction, without biases: scales as well."""
    return _Readout(nn.RNN(4, 5, num_layers=2, nonlinearity="relu", bias=False, batch_first=True), 3)


class _Cell(nn.Module):
    """A recurrence written out as a loop over the steps of an nn.GRUCell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 5)
        self.readout = nn.Linear(5, 3)

    def forward(self, x: Float[Tensor, "batch length 4"]) -> Float[Tensor, "batch 3"]:
        state = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        out: Tensor = self.readout(state)
        return out


@case(floats((2, 7, 4)), floats((3, 6, 4)))
def gru_cell() -> nn.Module:
    """A loop over nn.GRUCell: unrolled in the graph, the cell's weights in use once a step."""
    return _Cell()
