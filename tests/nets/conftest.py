"""Networks of every kind, and populations of them."""

import pytest
import torch

from weightspace.nets import CNN, MLP, PRESETS, RNN, ResNet, build

CASES = {
    "small_cnn_zoo": lambda: build(PRESETS["small-cnn-zoo"]),
    "cnn_batch_residual": lambda: CNN(
        (3, 12, 12),
        (5, 5, 7, 6),
        4,
        kernel_size=(3, 5, 3, 3),
        stride=(1, 1, 2, 1),
        norm="batch",
        residual=True,
        pooling="max",
        activation="tanh",
    ),
    "cnn_layer_flat": lambda: CNN(
        (1, 10, 11), (4, 6), 3, padding=0, norm="layer", pooling="flatten", activation=("gelu", "silu")
    ),
    "cnn_wild_park": lambda: CNN(
        (3, 9, 9),
        (4, 8, 6, 8),
        5,
        kernel_size=(7, 3, 5, 3),
        residual=(-1, -1, 0, 1),
        shortcut="shared",
        activation=("relu", "gelu", "leaky_relu", "sigmoid"),
    ),
    "cnn_residual_strided": lambda: CNN(
        (2, 13, 11), (4, 6, 5), 3, stride=(2, 1, 2), padding=(0, 1, 0), residual=(-1, 0, 0)
    ),
    "cnn_sine": lambda: CNN((1, 8, 8), (5, 4), 3, activation="sine", w0=3.0),
    "cnn_gaussian": lambda: CNN((1, 8, 8), (5, 4), 3, activation="gaussian", w0=2.0),
    "resnet": lambda: ResNet((3, 9, 8), 5, channels=4, blocks=(2, 1)),
    "resnet_layer": lambda: ResNet((3, 8, 8), 5, channels=4, norm="layer", width=1.5, activation="gelu"),
    "rnn": lambda: RNN(11, 6, 4, cell="rnn", embedding=5, layers=2, length=5),
    "gru": lambda: RNN(11, 6, 4, cell="gru", length=5),
    "lstm": lambda: RNN(3, 6, 4, cell="lstm", sequence="floats", length=5),
    "gru_floats": lambda: RNN(3, 6, 4, cell="gru", sequence="floats", embedding=7, length=5),
    "mlp": lambda: MLP((2, 8, 1)),
    "mlp_images": lambda: MLP((48, 16, 12, 10), activation="gelu", input_shape=(3, 4, 4), dropout=0.1),
}


@pytest.fixture(params=CASES)
def net(request):
    torch.manual_seed(0)
    return CASES[request.param]().eval()


@pytest.fixture
def population():
    """Makes ``count`` networks whose parameters and statistics all differ, as plain tensors."""

    def make(net, count=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor.detach() * (1 + 0.3 * torch.rand(count, *tensor.shape, generator=generator))
            + 0.1 * torch.rand(count, *tensor.shape, generator=generator)
            for name, tensor in net.state_dict().items()
        }

    return make


@pytest.fixture
def inputs_of():
    """Makes inputs that vary."""

    def make(net, batch=5, seed=0):
        return net.random_inputs(batch, torch.Generator().manual_seed(seed))

    return make
