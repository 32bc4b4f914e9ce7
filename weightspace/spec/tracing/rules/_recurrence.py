"""Attention and recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._trace import Trace, rule
from weightspace.spec.tracing.rules._products import axis_letters, linear
from weightspace.spec.tracing.rules._reductions import softmax
from weightspace.spec.tracing.rules._unary import UNARY, note_activation, scaled


@rule("scaled_dot_product_attention")
def attention(
    t: Trace,
    query: Label,
    key: Label,
    value: Label,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    grouped: bool = False,
) -> Label:
    """``softmax(q k^T) v``; with grouped queries each key's head serves several."""
    if grouped and query.shape[-3] != key.shape[-3]:
        heads, served = key.shape[-3], query.shape[-3] // key.shape[-3]
        query = t.reshape(query, [*query.shape[:-3], heads, served, *query.shape[-2:]])
        key, value = (op.unsqueeze(t, part, len(part.shape) - 2) for part in (key, value))
        mask = _of_queries(t, mask, heads, served)
    if is_causal:
        query, key = (t.pin(part, [len(part.shape) - 2]) for part in (query, key))
    batch = axis_letters(len(query.shape) - 2)
    scores = op.einsum(t, f"{batch}xe,{batch}ye->{batch}xy", query, key)
    if isinstance(mask, Label):
        scores = op.pointwise(t, [op.inhomogeneous(t, scores), op.inhomogeneous(t, mask)], "add")
    attended = softmax(t, scores, -1)
    out = op.einsum(t, f"{batch}xy,{batch}ye->{batch}xe", attended, value)
    return t.reshape(out, t.shape)


def _of_queries(t: Trace, mask: Any, heads: int, served: int) -> Any:
    """A mask for (key heads, queries that each serves) in place of query heads."""
    if not isinstance(mask, Label) or len(mask.shape) < 3:
        return mask
    split = (heads, served) if mask.shape[-3] > 1 else (1, 1)
    return t.reshape(mask, [*mask.shape[:-3], *split, *mask.shape[-2:]])


@rule("gru", "lstm", "rnn_tanh", "rnn_relu")
def recurrent(t: Trace, x: Label, *arguments: Any) -> tuple[Label, ...]:
    """Each layer and direction steps to a fixed point: the state that leaves is the state that entered."""
    if isinstance(arguments[1], Label):  # a packed sequence: sizes of the batch come before the states
        t.give_up(_flat([x, *arguments]))
        return tuple(t.fixed(shape) for shape in t.shapes)
    states, weights, has_biases, layers, _, _, bidirectional, batch_first = arguments
    states = list(states) if isinstance(states, list | tuple) and not isinstance(states, Label) else [states]
    if not batch_first:
        x = op.transpose(t, x, 0, 1)
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (layers * directions)
    last: list[list[Label]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            cell = weights[place * per_cell : (place + 1) * per_cell]
            before = [op.select(t, state, 0, place) for state in states]
            after = _cell(t, x, before, cell, has_biases)
            outputs.append(after[0])
            for kept, state in zip(last, after, strict=True):
                kept.append(op.select(t, state, 1, 0))
        x = op.concatenate(t, outputs, 2) if directions == 2 else outputs[0]
        t.see(x)
    out = x if batch_first else op.transpose(t, x, 0, 1)
    final = [op.concatenate(t, [op.unsqueeze(t, part, 0) for part in kept], 0) for kept in last]
    return (out, *final)


def _flat(value: Any) -> list[Label]:
    if isinstance(value, Label):
        return [value]
    return [label for part in value for label in _flat(part)] if isinstance(value, list | tuple) else []


def _cell(
    t: Trace, x: Label, states: Sequence[Label], weights: Sequence[Label], has_biases: bool
) -> list[Label]:
    """New states (batch, time, hidden) of one layer: what it reads is what it writes."""
    into, back, *rest = weights
    biases = rest[:2] if has_biases else [None, None]
    projection = rest[-1] if len(rest) in (1, 3) else None
    hidden = [t.loose(op.unsqueeze(t, state, 1)) for state in states]  # one unknown for all its uses
    driven = linear(t, x, into, biases[0])
    length = driven.shape[1]
    fed = linear(t, hidden[0], back, biases[1])
    step = {"gru": _gru_step, "lstm": _lstm_step}.get(t.name, _plain_step)
    fed, driven = t.resolve(fed), t.resolve(driven)
    after = step(t, driven, fed, hidden)
    if projection is not None:
        after[0] = linear(t, after[0], projection)
    closed = []
    for new, old in zip(after, hidden, strict=True):
        grown = op.spread(t, old, (*old.shape[:1], length, *old.shape[2:]))
        closed.append(op.pointwise(t, [new, grown], "add"))
    return closed


def _plain_step(t: Trace, driven: Label, fed: Label, hidden: Sequence[Label]) -> list[Label]:
    total = op.pointwise(t, [driven, fed], "add")
    name = t.name.removeprefix("rnn_")
    note_activation(t, total, name)
    return [scaled(t, total, *UNARY[name])]


def _gates(t: Trace, x: Label, count: int) -> list[Label]:
    size = x.shape[-1] // count
    return [op.narrow(t, x, len(x.shape) - 1, at * size, size) for at in range(count)]


def _gru_step(t: Trace, driven: Label, fed: Label, hidden: Sequence[Label]) -> list[Label]:
    """Reset, update, new; the reset gate multiplies what the state feeds to the new one."""
    (r_in, z_in, n_in), (r_back, z_back, n_back) = _gates(t, driven, 3), _gates(t, fed, 3)
    reset = op.inhomogeneous(t, op.pointwise(t, [r_in, r_back], "add"))
    update = op.inhomogeneous(t, op.pointwise(t, [z_in, z_back], "add"))
    candidate = op.pointwise(t, [n_in, op.pointwise(t, [reset, n_back], "multiply")], "add")
    note_activation(t, candidate, "tanh")
    new = scaled(t, candidate, *UNARY["tanh"])
    kept = op.pointwise(t, [update, hidden[0]], "multiply")
    return [op.pointwise(t, [op.pointwise(t, [update, new], "multiply"), kept], "add")]


def _lstm_step(t: Trace, driven: Label, fed: Label, hidden: Sequence[Label]) -> list[Label]:
    """Input, forget, cell, output."""
    gates = [
        op.pointwise(t, pair, "add") for pair in zip(_gates(t, driven, 4), _gates(t, fed, 4), strict=True)
    ]
    enter, forget, leave = (op.inhomogeneous(t, gates[at]) for at in (0, 1, 3))
    note_activation(t, gates[2], "tanh")
    candidate = scaled(t, gates[2], *UNARY["tanh"])
    kept = op.pointwise(t, [forget, hidden[1]], "multiply")
    cell = op.pointwise(t, [kept, op.pointwise(t, [enter, candidate], "multiply")], "add")
    shown = scaled(t, cell, *UNARY["tanh"])
    return [op.pointwise(t, [leave, shown], "multiply"), cell]
