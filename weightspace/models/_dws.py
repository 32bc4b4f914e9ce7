"""DWS, NFN and UNF: the universal equivariant layer as three papers use it."""

from __future__ import annotations

from collections.abc import Sequence

from weightspace.errors import ConfigError
from weightspace.models._encoding import Encoding
from weightspace.models._stack import (
    EquivariantHead,
    EquivariantNetwork,
    EquivariantStack,
    InvariantHead,
)
from weightspace.spec import WeightSpec


class DWS(EquivariantNetwork):
    """A deep weight-space network for classification, regression or editing of networks.

    ``layers`` equivariant layers, each followed by BatchNorm, ReLU and dropout, then an invariant pooling and an
    MLP head. Invariant: ``model(g . W) == model(W)`` for all permutations g of the spec. Without ``out_features``
    one more equivariant map gives weights again: ``model(g . W) == g . model(W)``. What differs from the publication
    stands under the reference.

    Args:
        spec: the weight space.
        out_features: size of the output, at least 1, for instance the number of classes; None for weights.
        hidden: channels per weight entry.
        layers: number of equivariant layers, at least 1.
        pooling: in the equivariant layers and the head; mean *and* max by default.
        norm: ``"batch"`` or ``"none"``.
        attention: heads of self-attention among the units, added to each layer; 0 for none. See
            :class:`SetAttention`.
        dropout: probability with which a feature is dropped after each layer, and a unit after that of the head.
        head: hidden units of the head; 0 for a linear head.
        head_pooling: some of ``mean``, ``max``, ``sum`` and ``attention``; as in the layers by default.
        global_mixing: see :class:`EquivariantLinear`.
        wide: what becomes of more than 16 fixed indices, such as input pixels: ``"refuse"``, ``"project"`` (narrowed
            once; the paper narrows and widens in every layer, beside a skip) or ``"encode"``; see
            :class:`Encoding`.

    Shapes:
        Weights with one batch axis -> (batch, out_features), or weights of the same shapes.
        Training on batches of one network needs ``norm="none"``: BatchNorm has nothing to average over.

    Raises:
        SpecError: a fixed index is wider than 16, or more than 256 positions lie on those of one cell together, and
            ``wide`` does not say what becomes of them.
        ConfigError: an option out of range.

    Reference:
        Navon et al. 2023, "Equivariant Architectures for Learning in Deep Weight Spaces", arXiv:2301.12780. The preset
        ``paper`` has the sizes of the authors' classifier of SIRENs (five layers, maxima, attention with eight heads, a
        linear head). What still differs from it: attention is added to the map within a group, where theirs takes
        its place, and has neither the residual nor the layer of a set attention block (which costs as much again as
        the map within the group); it has eight heads in the last layer too, where theirs has one; BatchNorm follows
        the last layer as well, and has statistics per entry of an orbit type, where theirs has them per tensor; one
        matrix product per orbit type stands for their layer per pair of tensors; the initialisation is ours.

    Example:
        >>> import torch
        >>> spec = WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)
        >>> model = DWS(spec, out_features=10, hidden=8, layers=2)
        >>> model(spec.unflatten(torch.randn(4, spec.num_parameters))).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int | None = None,
        *,
        hidden: int = 32,
        layers: int = 4,
        pooling: Sequence[str] = ("mean", "max"),
        norm: str = "batch",
        attention: int = 0,
        dropout: float = 0.0,
        head: int = 128,
        head_pooling: Sequence[str] | None = None,
        global_mixing: str = "full",
        wide: str = "refuse",
    ) -> None:
        stack = EquivariantStack(
            Encoding(spec, wide=wide, decodes=out_features is None),
            hidden=hidden,
            layers=layers,
            pooling=pooling,
            norm=norm,
            attention=attention,
            dropout=dropout,
            global_mixing=global_mixing,
        )
        read = _head(stack, out_features, hidden, pooling, head_pooling, head, dropout, global_mixing)
        super().__init__(stack, read)


class NFN(EquivariantNetwork):
    """A permutation equivariant neural functional.

    HNP: hidden units may be permuted, input and output units are fixed. NP: all may, and learned vectors tell
    input and output units apart. Invariant, or equivariant without ``out_features``, under all permutations of the
    spec.

    Args:
        spec: the weight space.
        out_features: size of the output, at least 1; None for weights.
        variant: ``"hnp"`` or ``"np"``.
        hidden: channels per weight entry.
        layers: number of equivariant layers, at least 1.
        fourier: number of random frequencies in which each weight is encoded; 0 for the weight alone.
        scale: standard deviation of the frequencies, above 0.
        raw: whether the weight itself stays beside its sines and cosines.
        dropout: probability with which a channel of a weight entry is dropped after each layer, at all positions
            of its orbit type at once; and a unit after each hidden layer of the head.
        head: hidden units of the head: a number for one layer, several for several.
        head_pooling: some of ``mean``, ``max``, ``sum`` and ``attention``.
        global_mixing: see :class:`EquivariantLinear`.
        wide: for HNP, what becomes of more than 16 fixed indices; see :class:`Encoding`.

    Shapes:
        Weights with one batch axis -> (batch, out_features), or weights of the same shapes.

    Raises:
        SpecError: a fixed index is wider than 16, or more than 256 positions lie on those of one cell together, and
            ``wide`` does not say what becomes of them.
        ConfigError: an option out of range.

    Reference:
        Zhou et al. 2023, "Permutation Equivariant Neural Functionals", arXiv:2302.14040. The preset ``paper`` has the
        sizes of the authors' classifier of SIRENs (three layers of 512 channels, sines and cosines of 128
        frequencies, a head of two times 1000). What still differs from it: a dropped channel is one of a weight
        entry, where theirs is one of a tensor; NP adds learned vectors of the ends, where theirs concatenates
        sinusoids of their positions and of the layer's number; the initialisation is ours.
    """

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int | None = None,
        *,
        variant: str = "hnp",
        hidden: int = 64,
        layers: int = 3,
        fourier: int = 0,
        scale: float = 1.0,
        raw: bool = True,
        dropout: float = 0.0,
        head: int | Sequence[int] = 512,
        head_pooling: Sequence[str] = ("mean",),
        global_mixing: str = "full",
        wide: str = "refuse",
    ) -> None:
        if variant not in ("hnp", "np"):
            raise ConfigError(f"variant: expected hnp or np, found {variant!r}")
        ends = "encoded" if variant == "np" else "fixed"
        pooling = ("mean",)
        stack = EquivariantStack(
            Encoding(
                spec,
                ends=ends,
                wide=wide,
                fourier=fourier,
                scale=scale,
                raw=raw,
                decodes=out_features is None,
            ),
            hidden=hidden,
            layers=layers,
            pooling=pooling,
            dropout=dropout,
            drop_channels=True,
            global_mixing=global_mixing,
        )
        read = _head(stack, out_features, hidden, pooling, head_pooling, head, dropout, global_mixing)
        super().__init__(stack, read)


class UNF(EquivariantNetwork):
    """A universal neural functional: for any architecture, recurrent, residual or with attention.

    Invariant, or equivariant without ``out_features``, under all permutations of the spec.

    Args:
        spec: the weight space.
        out_features: size of the output, at least 1; None for weights.
        hidden: channels per weight entry.
        layers: number of equivariant layers, at least 1.
        pooling: how groups are pooled in them.
        norm: ``"batch"`` or ``"none"``.
        dropout: probability with which a feature is dropped after each layer, and a unit after that of the head.
        head: hidden units of the head; 0 for a linear head.
        head_pooling: some of ``mean``, ``max``, ``sum`` and ``attention``.
        global_mixing: see :class:`EquivariantLinear`; ``"shared"`` grows linearly with depth.
        wide: what becomes of more than 16 fixed indices; see :class:`Encoding`.

    Shapes:
        Weights with one batch axis -> (batch, out_features), or weights of the same shapes.
        Training on batches of one network needs ``norm="none"``: BatchNorm has nothing to average over.

    Raises:
        SpecError: a fixed index is wider than 16, or more than 256 positions lie on those of one cell together, and
            ``wide`` does not say what becomes of them.
        ConfigError: an option out of range.

    Reference:
        Zhou et al. 2024, "Universal Neural Functionals", arXiv:2402.05232. The preset ``paper`` has the complete layer
        with means, as published. What differs from the authors' layers: fixed indices (input and output units,
        kernels) are folded into channels, or encoded by learned vectors where they are wide; biases are free, one
        per output entry and one per diagonal; sizes, initialisation and head are ours.
    """

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int | None = None,
        *,
        hidden: int = 32,
        layers: int = 3,
        pooling: Sequence[str] = ("mean",),
        norm: str = "batch",
        dropout: float = 0.0,
        head: int = 128,
        head_pooling: Sequence[str] = ("mean", "max"),
        global_mixing: str = "shared",
        wide: str = "encode",
    ) -> None:
        stack = EquivariantStack(
            Encoding(spec, wide=wide, decodes=out_features is None),
            hidden=hidden,
            layers=layers,
            pooling=pooling,
            norm=norm,
            dropout=dropout,
            global_mixing=global_mixing,
        )
        read = _head(stack, out_features, hidden, pooling, head_pooling, head, dropout, global_mixing)
        super().__init__(stack, read)


def _head(
    stack: EquivariantStack,
    out_features: int | None,
    channels: int,
    pooling: Sequence[str],
    head_pooling: Sequence[str] | None,
    hidden: int | Sequence[int],
    dropout: float,
    global_mixing: str,
) -> InvariantHead | EquivariantHead:
    if out_features is None:
        return EquivariantHead(stack.encoding, channels, pooling=pooling, global_mixing=global_mixing)
    if head_pooling is None:
        head_pooling = pooling
    return InvariantHead(
        stack.orbits, channels, out_features, pooling=head_pooling, hidden=hidden, dropout=dropout
    )
