"""DLA-L in plain NumPy with explicit loops, written from the paper's formulas.

Shares no code and no idea with the package: what the reference is held to. float64 only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy import ndarray as Array


def sigmoid(u: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-u))


ACTIVATIONS = {
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "relu": lambda u: np.maximum(u, 0.0),
    "identity": lambda u: u,
}


def cell_row(kind: str, y: Array, state: Array, params: list[Array], activation: str) -> Array:
    """One sample: y [C], state [S, C] -> new state [S, C]."""
    size = len(y)
    if kind in ("lstm", "rnn"):
        w_y, w_h, b_y, b_h = params
        gates = w_y @ y + b_y + w_h @ state[0] + b_h
        if kind == "rnn":
            return np.stack([np.tanh(gates)])
        c = state[1]
    elif kind == "dsu":
        c = state[0]
        hidden = params[0] @ np.concatenate([ACTIVATIONS[activation](c), y])
        gates = params[1] @ np.maximum(hidden, 0.0) + params[2]
    else:
        h, c = state
        gates = np.zeros(len(params[3]))
        for u, (w1, b1, w2, b2) in ((y, params[:4]), (h, params[4:])):
            gates = gates + w2 @ np.maximum(w1 @ u + b1, 0.0) + b2
    i, f, candidate, *o = (gates[at : at + size] for at in range(0, len(gates), size))
    new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(candidate)
    if kind == "dsu":
        return np.stack([new_c])
    output = np.tanh(new_c) if kind == "lstm" else sigmoid(new_c)
    return np.stack([sigmoid(o[0]) * output if o else output, new_c])


def cell(kind: str, y: Array, state: Array, params: list[Array], activation: str) -> Array:
    """y [B, C], state [S, B, C] -> new state [S, B, C], sample by sample."""
    rows = [cell_row(kind, y[b], state[:, b], params, activation) for b in range(len(y))]
    return np.stack(rows, axis=1)


def depthwise(x: Array, weight: Array) -> Array:
    """3x3 cross-correlation of every plane of [B, C, H, W] with its filter [C, 1, 3, 3]."""
    _, channels, height, width = x.shape
    out = np.zeros_like(x)
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        if 0 <= row + i < height and 0 <= column + j < width:
                            tap = weight[c, 0, i + 1, j + 1]
                            out[:, c, row, column] += tap * x[:, c, row + i, column + j]
    return out


def filter_channels(y: Array, weight: Array) -> Array:
    """One filter [1, 1, k] along the channels of y [C]; zeros beyond the ends."""
    taps = weight.reshape(-1)
    reach = len(taps) // 2
    out = np.zeros_like(y)
    for c in range(len(y)):
        for t, tap in enumerate(taps):
            if 0 <= c + t - reach < len(y):
                out[c] += tap * y[c + t - reach]
    return out


def attention(y: Array, q_weight: Array, k_weight: Array, head_dim: int) -> Array:
    """a [C] of one sample: one sigmoid score per head."""
    q, k = filter_channels(y, q_weight), filter_channels(y, k_weight)
    a = np.zeros_like(y)
    for start in range(0, len(y), head_dim):
        head = slice(start, start + head_dim)
        a[head] = sigmoid(np.dot(q[head], k[head]) / math.sqrt(head_dim))
    return a


def normalised(x, norm, weight, bias, mean, var, eps):
    """x after a norm, and the statistics of the batch if it took them."""
    nothing = np.zeros(0)
    found = nothing, nothing
    if norm == "none":
        return x, *found
    if norm == "batch":
        mean, var = found = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    n = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + eps)
    if weight is not None:
        n = n * weight[:, None, None] + bias[:, None, None]
    return n, *found


def covariance(a: Array, b: Array) -> Array:
    """Of two maps over space, for every plane: [B, C]."""
    deviations = (m - m.mean(axis=(2, 3), keepdims=True) for m in (a, b))
    return np.prod(list(deviations), axis=0).mean(axis=(2, 3))


def light_attention(
    x, p, state, cell_params, q_weight, k_weight, v_weight, prev_weight, lam,
    norm_weight, norm_bias, branch_weight, branch_bias,
    mean_in, var_in, branch_mean_in, branch_var_in, drop_scale,
    *, cell, activation, gate, context, head_dim, norm, eps, residual, join,
    branch_norm, branch_eps, return_o,
):  # fmt: skip
    """All arguments and results as for the op, as NumPy arrays."""
    batch = x.shape[0]
    affine = branch_weight, branch_bias, branch_mean_in, branch_var_in
    x, *branch_statistics = normalised(x, branch_norm, *affine, branch_eps)
    x = np.maximum(x + p, 0) if join else x
    y = x.mean(axis=(2, 3))
    gated = p is not None and cell != "none"
    pooled_p = p.mean(axis=(2, 3)) if gated else np.zeros_like(y)
    step = globals()["cell"]
    new_state = state if cell == "none" else step(cell, y, state, cell_params, activation)
    keys = depthwise(x, v_weight)
    earlier = np.zeros_like(x)
    o, a, gates = np.zeros_like(x), np.zeros_like(y), np.ones_like(y)
    for b in range(batch):
        a[b] = attention(y[b], q_weight, k_weight, head_dim)
        o[b] = a[b][:, None, None] * keys[b]
        if p is None:
            continue
        if gated:
            own = new_state[:, 0 if context == "first_sample" else b]
            d = cell_row(cell, pooled_p[b], own, cell_params, activation)[0]
            gates[b] = sigmoid(d) if gate == "sigmoid" else d
        history = p[b] * gates[b][:, None, None]
        if prev_weight is not None:
            earlier[b] = depthwise(p[b : b + 1], prev_weight)[0]
            history = history + earlier[b]
        o[b] += lam[:, None, None] * history

    n, mean, var = normalised(o, norm, norm_weight, norm_bias, mean_in, var_in, eps)
    if drop_scale is not None:
        n = drop_scale[:, None, None, None] * n
    out = x + n if residual else n
    summary = [y, pooled_p, a, gates]
    if norm == "batch":
        maps = keys, np.zeros_like(x) if p is None else p, earlier
        means = [m.mean(axis=(2, 3)) for m in maps]
        summary = [y, means[1], a, gates, means[0], means[2]]
        summary += 3 * [np.zeros_like(y)]  # what rounding took from these
        summary += [covariance(o, m) for m in maps]
    kept = o if return_o else np.zeros(0)
    return out, kept, new_state, mean, var, *branch_statistics, np.stack(summary)
