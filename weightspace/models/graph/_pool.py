"""What each edge is told by its two ends, and each node by its edges, for edges that form whole matrices.

``h[b, s, n, m] = relu(W e[b, s, n, m] + offset + source[b, s, m] + target[b, s, n])`` and its sums, sums of squares,
maxima and minima over all edges of a target and over all edges of a source, without a tensor of (target, source)
pairs besides ``h``, and with one joint backward pass. Ends that have twice as many channels also hold factors:
``h = relu((1 + source' + target') * (W e + offset) + source + target)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STATISTICS = ("sum", "square", "max", "min")
TILE = 1 << 18  # floats of one piece: it stays in the cache with its temporaries, and is worth its calls


@torch.compiler.disable  # writes into pieces of buffers, which the compiler cannot follow
def pair_and_pool(
    edges: Tensor,
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    offset: Tensor,
    statistics: tuple[str, ...],
    pooled: int,
) -> tuple[Tensor, list[Tensor]]:
    """``h`` and its statistics; under autocast in float32, in which sums of squares keep their digits.

    Shapes:
        See :class:`PairAndPool`.
    """
    device = edges.device.type
    tensors = (edges, source, target, weight, offset)
    if torch.is_autocast_enabled(device):
        tensors = tuple(one.float() for one in tensors)  # type: ignore[assignment]
    with torch.autocast(device, enabled=False):
        h, *out = PairAndPool.apply(*tensors, statistics, pooled)
    return h, out


class PairAndPool(torch.autograd.Function):
    """See the module. As in ``amax``, tied maxima share the gradient evenly.

    Shapes:
        edges: (batch, blocks, targets, sources, channels)
        source: (batch, blocks, sources, width), or 2 * width with factors after the first
        target: (batch, blocks, targets, width), or 2 * width as the source
        weight: (width, channels)
        offset: (width,)
        out: h (batch, blocks, targets, sources, width), then, per statistic of the first ``pooled`` channels, one
            (batch, blocks, targets, pooled) and one (batch, blocks, sources, pooled).
    """

    @staticmethod
    def forward(
        ctx: Any,
        edges: Tensor,
        source: Tensor,
        target: Tensor,
        weight: Tensor,
        offset: Tensor,
        statistics: tuple[str, ...],
        pooled: int,
    ) -> tuple[Tensor, ...]:
        batch, blocks, targets, sources, _ = edges.shape
        h = edges.new_empty(batch, blocks, targets, sources, len(weight))
        sizes = (targets, sources)
        out = [edges.new_empty(batch, blocks, size, pooled) for _ in statistics for size in sizes]
        for piece in _pieces(h):
            part = h[piece]
            torch.addmm(offset, edges[piece].flatten(0, 3), weight.t(), out=part.view(-1, len(weight)))
            shifts, factor = _ends(source[piece], target[piece], len(weight))
            if factor is not None:
                part *= factor
            part += shifts[0]
            part += shifts[1]
            part.relu_()
            _reduce(part[..., :pooled], statistics, [one[piece] for one in out])
        ctx.save_for_backward(edges, source, target, weight, offset, h, *out)
        ctx.statistics, ctx.pooled = statistics, pooled
        return (h, *out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        edges, source, target, weight, offset, h, *values = ctx.saved_tensors
        upstream, *pooled = gradients
        width = len(weight)
        edges_grad = torch.empty_like(edges)
        source_grad, target_grad = torch.empty_like(source), torch.empty_like(target)
        weight_grad, offset_grad = torch.zeros_like(weight), torch.zeros_like(offset)
        for piece in _pieces(h):
            part = h[piece]
            grad = upstream[piece].clone(memory_format=torch.contiguous_format)
            _spread(
                grad[..., : ctx.pooled],
                part[..., : ctx.pooled],
                ctx.statistics,
                [one[piece] for one in values],
                [one[piece] for one in pooled],
            )
            hit = torch.gt(part, 0.0, out=torch.empty_like(part))
            grad *= hit
            source_grad[piece][..., :width] = grad.sum(2)
            target_grad[piece][..., :width] = grad.sum(3)
            read, flat = edges[piece].flatten(0, 3), grad.view(-1, width)
            _, factor = _ends(source[piece], target[piece], width)
            if factor is not None:
                torch.addmm(offset, read, weight.t(), out=hit.view(-1, width))
                hit *= grad
                source_grad[piece][..., width:] = hit.sum(2)
                target_grad[piece][..., width:] = hit.sum(3)
                grad *= factor
            torch.mm(flat, weight, out=edges_grad[piece].view(-1, edges.shape[-1]))
            weight_grad.addmm_(flat.t(), read)
            offset_grad += flat.sum(0)
        return edges_grad, source_grad, target_grad, weight_grad, offset_grad, None, None


def _ends(source: Tensor, target: Tensor, width: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """What is added to every edge by its two ends, and the factor before that, if there is one."""
    from_source, from_target = source.unsqueeze(2), target.unsqueeze(3)
    shifts = from_source[..., :width], from_target[..., :width]
    if source.shape[-1] == width:
        return shifts, None
    return shifts, (from_source[..., width:] + from_target[..., width:]).add_(1.0)


def _pieces(h: Tensor) -> list[slice]:
    each = h[0].numel() if len(h) else 1
    step = max(1, TILE // max(each, 1)) if h.device.type == "cpu" else max(len(h), 1)
    return [slice(at, at + step) for at in range(0, len(h), step)]


def _reduce(part: Tensor, statistics: tuple[str, ...], out: list[Tensor]) -> None:
    for place, name in enumerate(statistics):
        source = part.square() if name == "square" else part
        for axis in (0, 1):
            into = out[2 * place + axis]
            if name == "max":
                torch.amax(source, 3 - axis, out=into)
            elif name == "min":
                torch.amin(source, 3 - axis, out=into)
            else:
                torch.sum(source, 3 - axis, out=into)


def _spread(
    grad: Tensor, part: Tensor, statistics: tuple[str, ...], values: list[Tensor], pooled: list[Tensor]
) -> None:
    """Add to ``grad`` what reaches each edge through the statistics."""
    # comparisons straight to floats: ten times as fast as by way of booleans
    hit = torch.empty_like(part)
    for place, name in enumerate(statistics):
        targets, sources = (pooled[2 * place + axis].unsqueeze(3 - axis) for axis in (0, 1))
        if name == "sum":
            grad += targets
            grad += sources
        elif name == "square":
            grad.addcmul_(part, targets + sources, value=2.0)
        else:
            for axis, upstream in enumerate((targets, sources)):
                torch.eq(part, values[2 * place + axis].unsqueeze(3 - axis), out=hit)
                grad.addcmul_(hit, upstream / hit.sum(3 - axis, keepdim=True))
