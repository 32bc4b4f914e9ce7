"""Cases with attention: heads, features nested within heads, grouped queries, rotary positions."""

from __future__ import annotations

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.testing._networks._case import case, floats, tokens

Sequence: TypeAlias = Float[Tensor, "batch length width"]
Ids: TypeAlias = Int[Tensor, "batch length"]
Scores: TypeAlias = Float[Tensor, "batch out_features"]
Logits: TypeAlias = Float[Tensor, "batch length vocabulary"]


class _FusedAttention(nn.Module):
    """Self-attention whose one projection is read as (queries, keys, values) x heads x features."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Sequence) -> Sequence:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class _VisionBlock(nn.Module):
    """Attention and a perceptron, each behind a layer norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _FusedAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Sequence) -> Sequence:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.norm(x))


class _VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv:2010.11929."""

    def __init__(self, width: int, heads: int, patches: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, width) / 50)
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width) / 50)
        self.blocks = nn.Sequential(_VisionBlock(width, heads, 18), _VisionBlock(width, heads, 19))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Scores:
        patches = self.stem(x).flatten(2).transpose(1, 2)
        stream = torch.cat([self.cls.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        out: Tensor = self.head(self.norm(self.blocks(stream))[:, 0])
        return out


@case(floats((3, 3, 8, 12)), floats((5, 3, 8, 12)))
def vit() -> nn.Module:
    """Vision transformer: class token, learned positions, fused projection read as (3, heads, features)."""
    return _VisionTransformer(width=14, heads=2, patches=6)


class _CausalAttention(nn.Module):
    """Masked self-attention written out, its one projection cut by chunk."""

    mask: Tensor

    def __init__(self, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(positions, positions).tril().bool(), persistent=False)

    def forward(self, x: Sequence) -> Sequence:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        scores = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(~self.mask[:length, :length], float("-inf"))
        mixed = scores.softmax(-1) @ value
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class _CausalBlock(nn.Module):
    """Masked attention and a perceptron, each behind a layer norm."""

    def __init__(self, width: int, heads: int, hidden: int, positions: int) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _CausalAttention(width, heads, positions)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)
        )

    def forward(self, x: Sequence) -> Sequence:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.norm(x))


class _TiedDecoder(nn.Module):
    """Radford et al. 2019 (GPT-2): the head is the token embedding."""

    def __init__(self, vocabulary: int, width: int, heads: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(_CausalBlock(width, heads, hidden, positions) for hidden in (17, 16)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Ids) -> Logits:
        places = torch.arange(ids.shape[1], device=ids.device)
        stream = self.tokens(ids) + self.positions(places)
        out: Tensor = self.head(self.norm(self.blocks(stream)))
        return out


@case(tokens(13, 3, 7), tokens(13, 4, 6))
def gpt2() -> nn.Module:
    """Decoder with tied embeddings, causal mask, fused projection cut by chunk."""
    return _TiedDecoder(vocabulary=13, width=10, heads=2, positions=7)


class _RMSNorm(nn.Module):
    """Root-mean-square norm, written out in float32 as libraries do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Sequence) -> Sequence:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class _RotaryAttention(nn.Module):
    """Causal grouped-query attention; queries and keys turn with their position."""

    frequencies: Tensor

    def __init__(self, width: int, heads: int, groups: int, features: int) -> None:
        super().__init__()
        self.heads, self.groups, self.features = heads, groups, features
        self.query = nn.Linear(width, heads * features, bias=False)
        self.key = nn.Linear(width, groups * features, bias=False)
        self.value = nn.Linear(width, groups * features, bias=False)
        self.out = nn.Linear(heads * features, width, bias=False)
        frequencies = 1000.0 ** (-torch.arange(0, features, 2) / features)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Sequence) -> Sequence:
        batch, length, _ = x.shape
        query = self._rotated(self._split(self.query(x), self.heads))
        key = self._repeated(self._rotated(self._split(self.key(x), self.groups)))
        value = self._repeated(self._split(self.value(x), self.groups))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _split(self, x: Sequence, heads: int) -> Float[Tensor, "batch heads length features"]:
        return x.view(x.shape[0], x.shape[1], heads, self.features).transpose(1, 2)

    def _rotated(
        self, x: Float[Tensor, "batch heads length features"]
    ) -> Float[Tensor, "batch heads length features"]:
        places = torch.arange(x.shape[2], device=x.device, dtype=self.frequencies.dtype)
        angles = torch.outer(places, self.frequencies).repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def _repeated(
        self, x: Float[Tensor, "batch groups length features"]
    ) -> Float[Tensor, "batch heads length features"]:
        batch, groups, length, features = x.shape
        wide = x[:, :, None].expand(batch, groups, self.heads // groups, length, features)
        return wide.reshape(batch, self.heads, length, features)


class _GatedMLP(nn.Module):
    """Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202: SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Sequence) -> Sequence:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class _LlamaBlock(nn.Module):
    """Rotary attention and a gated perceptron, each behind a root-mean-square norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.norm = _RMSNorm(width), _RMSNorm(width)
        self.attention = _RotaryAttention(width, heads=6, groups=3, features=8)
        self.mlp = _GatedMLP(width, hidden)

    def forward(self, x: Sequence) -> Sequence:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.norm(x))


class _LlamaDecoder(nn.Module):
    """Touvron et al. 2023, "LLaMA", arXiv:2302.13971."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(_LlamaBlock(width, 17), _LlamaBlock(width, 16))
        self.norm = _RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Ids) -> Logits:
        out: Tensor = self.head(self.norm(self.blocks(self.tokens(ids))))
        return out


@case(tokens(13, 4, 7), tokens(13, 5, 9))
def llama() -> nn.Module:
    """Decoder with RMS norms, rotary positions, grouped queries and gated perceptrons."""
    return _LlamaDecoder(vocabulary=13, width=14)


class _SelfAttention(nn.Module):
    """nn.MultiheadAttention applied to one sequence, with or without the averaged attention weights."""

    def __init__(self, width: int, heads: int, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Sequence) -> tuple[Tensor, Tensor | None]:
        out, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return out, weights


@case(floats((2, 7, 15)), floats((4, 6, 15)), outputs=("0",))
def multihead_attention() -> nn.Module:
    """nn.MultiheadAttention alone: between fixed inputs and outputs, heads and their features are free."""
    return _SelfAttention(15, 3, need_weights=False)


@case(floats((2, 7, 15)), floats((4, 6, 15)))
def multihead_attention_weights() -> nn.Module:
    """The same, returning the attention weights averaged over heads: products and softmax written out."""
    return _SelfAttention(15, 3, need_weights=True)


class _CrossAttention(nn.Module):
    """Attention from one sequence to two others of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            15, 3, kdim=4, vdim=6, add_bias_kv=True, add_zero_attn=True, batch_first=True
        )

    def forward(
        self,
        query: Float[Tensor, "batch length 15"],
        key: Float[Tensor, "batch places 4"],
        value: Float[Tensor, "batch places 6"],
    ) -> Float[Tensor, "batch length 15"]:
        out: Tensor = self.attention(query, key, value, need_weights=False)[0]
        return out


@case(floats((2, 7, 15), (2, 5, 4), (2, 5, 6)), floats((4, 6, 15), (4, 9, 4), (4, 9, 6)))
def cross_attention() -> nn.Module:
    """nn.MultiheadAttention with separate projections, extra keys and values, and a zero key."""
    return _CrossAttention()


@case(floats((2, 7, 4)), floats((5, 6, 4)))
def transformer_encoder() -> nn.Module:
    """nn.TransformerEncoder, norms after, between two linear layers that free its stream."""
    layer = nn.TransformerEncoderLayer(15, 3, dim_feedforward=19, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(4, 15), encoder, nn.Linear(15, 2))


class _DecoderWithMemory(nn.Module):
    """nn.TransformerDecoder between linear layers, causal over its own sequence."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            15, 3, dim_feedforward=19, activation="gelu", batch_first=True, norm_first=True
        )
        self.target, self.memory = nn.Linear(4, 15), nn.Linear(5, 15)
        self.decoder = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(15))
        self.head = nn.Linear(15, 2)

    def forward(
        self, target: Float[Tensor, "batch length 4"], memory: Float[Tensor, "batch places 5"]
    ) -> Float[Tensor, "batch length 2"]:
        mask = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], device=target.device, dtype=target.dtype
        )
        stream = self.decoder(self.target(target), self.memory(memory), tgt_mask=mask, tgt_is_causal=True)
        out: Tensor = self.head(stream)
        return out


@case(floats((2, 7, 4), (2, 8, 5)), floats((3, 6, 4), (3, 9, 5)))
def transformer_decoder() -> nn.Module:
    """nn.TransformerDecoder with memory, norms first, causal mask."""
    return _DecoderWithMemory()
