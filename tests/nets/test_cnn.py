"""Convolutional classifiers: published layouts, residuals by hand, what is impossible."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightspace.errors import ConfigError
from weightspace.nets import CNN, PRESETS, build
from weightspace.zoo import spec_of


def test_the_small_cnn_zoo():
    """Keras' layers of the authors' code: no padding, so that 32 pixels become 15, 7 and 3."""
    net = build(PRESETS["small-cnn-zoo"])
    assert sum(tensor.numel() for tensor in net.parameters()) == 4970
    assert [tuple(tensor.shape) for tensor in net.state_dict().values()] == [
        (16, 1, 3, 3),
        (16,),
        (16, 16, 3, 3),
        (16,),
        (16, 16, 3, 3),
        (16,),
        (10, 16),
        (10,),
    ]
    assert net.sizes == ((15, 15), (7, 7), (3, 3))
    plain = nn.Sequential(
        *(layer for convolution in net.convolutions for layer in (convolution, nn.ReLU())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        net.classifier,
    )
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(net(images), plain(images))
    assert [group.size for group in spec_of(net).groups.values()] == [16, 16, 16]


def test_the_wild_park_by_hand():
    net = CNN(
        (3, 9, 9),
        (4, 8, 6),
        10,
        kernel_size=(3, 5, 7),
        activation=("relu", "tanh", "gelu"),
        residual=(-1, -1, 0),
        shortcut="shared",
    )
    x = torch.randn(2, 3, 9, 9)
    first = net.convolutions[0](x).relu()
    third = net.convolutions[2](net.convolutions[1](first).tanh())
    third = third + F.pad(first, (0, 0, 0, 0, 0, 2))
    torch.testing.assert_close(net(x), net.classifier(F.gelu(third).mean((-2, -1))))
    assert len(net.state_dict()) == 8  # no convolution on a shortcut
    groups = spec_of(net).groups.values()
    assert sorted(group.size for group in groups) == [2, 4, 8]  # shared channels, the rest of six, the middle


def test_a_shared_shortcut_adds_the_first_channels_of_a_wider_layer():
    net = CNN((1, 4, 4), (5, 3), 2, residual=(-1, 0), shortcut="shared")
    x = torch.randn(2, 1, 4, 4)
    first = net.convolutions[0](x).relu()
    second = (net.convolutions[1](first) + first[:, :3]).relu()
    torch.testing.assert_close(net(x), net.classifier(second.mean((-2, -1))))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (12, 3, 1, 1),
        (12, 3, 2, 0),
        (13, 3, 2, 0),
        (12, 3, 2, 1),
        (13, 5, 3, 1),
        (9, 4, 1, 2),
        (9, 4, 2, 0),
        (7, 7, 1, 0),
    ],
)
def test_a_projection_reads_the_middle_of_each_window(size, kernel, stride, padding):
    net = CNN(
        (1, 12, 12 + size),
        (2, 3),
        2,
        kernel_size=(1, kernel),
        stride=(1, stride),
        padding=(0, padding),
        residual=True,
    )
    shortcut = net.shortcuts[1]
    columns = torch.arange(12.0 + size).expand(1, 2, 12, -1)
    nn.init.constant_(shortcut.weight, 0.5)
    found = shortcut(columns)
    assert found.shape[2:] == net.sizes[1]
    middle = stride * torch.arange(net.sizes[1][1]) + (kernel - 1) / 2 - padding
    read = found[0, 0, net.sizes[1][0] // 2]
    inside = (middle > 0) & (middle < 11 + size)
    assert inside.sum() >= 4
    assert (read[inside] - middle[inside]).abs().max() <= (0.0 if kernel % 2 else 0.5)


def test_a_projection_over_several_layers_reads_the_middle_of_what_is_seen():
    net = CNN(
        (1, 40, 40), (2, 4, 3), 2, kernel_size=(1, 3, 5), stride=(1, 2, 3), padding=0, residual=(-1, -1, 0)
    )
    shortcut = net.shortcuts[2]
    nn.init.constant_(shortcut.weight, 0.5)
    found = shortcut(torch.arange(40.0).expand(1, 2, 40, 40))
    # pixel j sees 11 columns from 6 j on: (5 - 1) * 2 + 3
    assert found[0, 0, 0].tolist() == [6 * j + 5 for j in range(net.sizes[2][1])]


def test_identity_where_shapes_agree_and_a_projection_elsewhere():
    net = CNN((4, 8, 8), (4, 4, 6, 6), 2, stride=(1, 1, 1, 2), residual=True)
    kinds = [type(shortcut).__name__ for shortcut in net.shortcuts]
    assert kinds == ["Identity", "Identity", "Projection", "Projection"]
    assert [tuple(net.shortcuts[layer].weight.shape) for layer in (2, 3)] == [(6, 4, 1, 1), (6, 6, 1, 1)]
    x = torch.randn(2, 4, 8, 8)
    a = net.convolutions[0](x).relu()
    b = (net.convolutions[1](a) + a).relu()
    c = (net.convolutions[2](b) + F.conv2d(b, net.shortcuts[2].weight)).relu()
    d = (net.convolutions[3](c) + F.conv2d(c, net.shortcuts[3].weight, stride=2)).relu()
    torch.testing.assert_close(net(x), net.classifier(d.mean((-2, -1))))


@pytest.mark.parametrize("pooling", ["mean", "max", "flatten"])
def test_pooling(pooling):
    net = CNN((1, 5, 6), (3,), 2, pooling=pooling)
    x = torch.randn(2, 1, 5, 6)
    maps = net.convolutions[0](x).relu()
    pooled = {
        "mean": F.adaptive_avg_pool2d(maps, 1).flatten(1),
        "max": F.adaptive_max_pool2d(maps, 1).flatten(1),
        "flatten": maps.flatten(1),
    }[pooling]
    torch.testing.assert_close(net(x), net.classifier(pooled))


def test_a_convolution_before_a_batch_norm_has_no_bias():
    names = [name for name, _ in CNN((1, 5, 5), (3,), 2, norm="batch").named_parameters()]
    assert "convolutions.0.bias" not in names
    assert "convolutions.0.bias" in [
        name for name, _ in CNN((1, 5, 5), (3,), 2, norm="layer").named_parameters()
    ]


def test_one_value_for_all_layers_is_one_for_each():
    once = CNN((1, 9, 9), (3, 4), 2, kernel_size=5, stride=2, padding=1, activation="tanh")
    each = CNN(
        (1, 9, 9), (3, 4), 2, kernel_size=(5, 5), stride=(2, 2), padding=(1, 1), activation=("tanh", "tanh")
    )
    assert once.arguments() == each.arguments()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (28, 28)}, r"input_shape: expected channels, height and width, found \(28, 28\)"),
        ({"input_shape": (0, 8, 8)}, r"input_shape\[0\]: expected a whole number of at least 1, found 0"),
        ({"channels": ()}, r"channels: expected some whole numbers, found \[\]"),
        ({"channels": (4, 0)}, r"channels\[1\]: expected a whole number of at least 1, found 0"),
        ({"channels": (4, True)}, r"channels\[1\]: expected a whole number of at least 1, found True"),
        ({"out_features": 0}, "out_features: expected a whole number of at least 1, found 0"),
        (
            {"kernel_size": (3, 3, 3)},
            r"kernel_size: expected one value or 2, one for each layer, found \[3, 3, 3\]",
        ),
        ({"kernel_size": 0}, r"kernel_size\[0\]: expected a whole number of at least 1, found 0"),
        ({"stride": 0}, r"stride\[0\]: expected a whole number of at least 1, found 0"),
        (
            {"kernel_size": (5, 7), "padding": 0, "stride": 2},
            r"kernel_size\[1\]: expected at most 2, the size of the image that layer 1 reads \(2x2, padding 0\), found 7",
        ),
        (
            {"input_shape": (1, 12, 4), "kernel_size": 7, "padding": 1},
            r"kernel_size\[0\]: expected at most 6, .* \(12x4, padding 1\), found 7",
        ),
        ({"padding": 3}, r"padding\[0\]: expected less than the kernel's 3, found 3"),
        ({"padding": -1}, r"padding\[0\]: expected a whole number of at least 0, found -1"),
        ({"padding": "valid"}, "padding: expected 'same' or pixels for each layer, found 'valid'"),
        ({"activation": "swish"}, "activation: expected one of .*, found 'swish'"),
        ({"activation": ("relu", "swish")}, "activation: expected one of .*, found 'swish'"),
        ({"w0": 0.0}, "w0: expected a positive number, found 0.0"),
        ({"norm": "group"}, "norm: expected one of none, batch, layer, found 'group'"),
        ({"residual": (-1, 1)}, r"residual\[1\]: expected an earlier layer or -1, found 1"),
        ({"residual": (0, -1)}, r"residual\[0\]: expected an earlier layer or -1, found 0"),
        ({"residual": (-1,)}, r"residual: expected 2 whole numbers, found \[-1\]"),
        ({"residual": (-1, -2)}, r"residual\[1\]: expected a whole number of at least -1, found -2"),
        ({"shortcut": "crop"}, "shortcut: expected one of projection, shared, found 'crop'"),
        (
            {"residual": True, "shortcut": "shared", "stride": (1, 2)},
            r"residual\[1\]: expected a layer whose images have 4x4 pixels for shortcut 'shared', "
            "found layer 0 with 8x8",
        ),
        ({"pooling": "sum"}, "pooling: expected one of mean, max, flatten, found 'sum'"),
        ({"dropout": -0.5}, "dropout: expected a rate of at least 0 and below 1, found -0.5"),
    ],
)
def test_impossible_networks_are_named(options, message):
    arguments = {"input_shape": (1, 8, 8), "channels": (4, 4), "out_features": 3}
    with pytest.raises(ConfigError, match=message):
        CNN(**{**arguments, **options})


def test_a_projection_may_cut_more_than_there_was_before_it_padded():
    net = CNN(
        (3, 9, 20),
        [15, 1, 1, 6],
        3,
        kernel_size=[4, 1, 2, 2],
        stride=[2, 1, 2, 3],
        padding=[0, 0, 1, 1],
        residual=[-1, -1, 1, 0],
    )
    assert net.shortcuts[3].margins == [2, -4, 2, -4]
    x = torch.randn(2, 15, 3, 9)
    # the middle of what a pixel sees: two pixels outside on either side, then every sixth
    read = torch.nn.functional.pad(x, (2, 0, 2, 0))[:, :, :-4, :-4][:, :, ::6, ::6]
    expected = torch.nn.functional.conv2d(read, net.shortcuts[3].weight)
    torch.testing.assert_close(net.shortcuts[3](x), expected)
    assert net(torch.randn(2, 3, 9, 20)).shape == (2, 3)
