"""Networks in NumPy, float64, written from papers and the specification of the releases, to compare with."""

import numpy as np


def convolution(x, kernel, stride, before, after, bias=0.0):
    """Cross-correlation of (N, H, W, C), output pixel by output pixel; zeros before and after both axes."""
    kh, kw, _, out = kernel.shape
    x = np.pad(x, ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0)))
    rows, cols = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    y = np.zeros((len(x), rows, cols, out))
    for i, j in np.ndindex(rows, cols):
        window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
        y[:, i, j] = np.einsum("nhwc,hwco->no", window, kernel) + bias
    return y


def same(x, size, stride):
    """Zeros before and after each axis so that ceil(length / stride) windows fit, the odd one after."""
    totals = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[1:3]]
    return [t // 2 for t in totals], [t - t // 2 for t in totals]


def standardized(kernel):
    flat = kernel.reshape(-1, kernel.shape[-1])
    flat = flat - flat.mean(0)
    return (flat / (np.sqrt((flat**2).mean(0)) + 1e-5)).reshape(kernel.shape)


def group_norm(x, p, groups=32):
    n, h, w, c = x.shape
    y = x.reshape(n, h * w, groups, c // groups)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-6)
    return y.reshape(x.shape) * p["scale"] + p["bias"]


def film(x, p, c):
    a, b = (c @ p[name]["kernel"] + p[name]["bias"] for name in ("Dense_0", "Dense_1"))
    return x * (1 + a[:, None, None]) + b[:, None, None]


def relu(x):
    return np.maximum(x, 0)


def max_pool_3_2(x):
    before, after = same(x, 3, 2)
    x = np.pad(x, ((0, 0), *zip(before, after, strict=True), (0, 0)), constant_values=-np.inf)
    rows, cols = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    return np.stack(
        [[x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(cols)] for i in range(rows)]
    ).transpose(2, 0, 1, 3)


def layer_norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def map_pooling(tokens, mask, p):
    """(m, D) tokens by (m,) mask to (n, D): eight heads, probe by probe; uniform where nothing is valid."""
    a, mlp = p["MultiHeadDotProductAttention_0"], p["MlpBlock_0"]
    out = np.stack([attend(probe, tokens, mask, a) for probe in p["probe"][0]])
    hidden = gelu(dense(layer_norm(out, p["LayerNorm_0"]), mlp["Dense_0"]))
    return out + dense(hidden, mlp["Dense_1"])


def attend(query, tokens, mask, p):
    """One query (D,) to its output (D,)."""
    out = p["out"]["bias"].copy()
    for h in range(p["query"]["kernel"].shape[1]):
        q = query @ p["query"]["kernel"][:, h] + p["query"]["bias"][h]
        k, v = (tokens @ p[name]["kernel"][:, h] + p[name]["bias"][h] for name in ("key", "value"))
        logits = np.where(mask, k @ q / np.sqrt(len(q)), np.finfo(np.float32).min)
        weights = np.exp(logits - logits.max())
        out = out + weights @ v / weights.sum() @ p["out"]["kernel"][h]
    return out


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def swish(x):
    return x / (1 + np.exp(-x))


def transformer(x, mask, p, num_layers):
    """(N, D) tokens, (N, N) mask."""
    for i in range(num_layers):
        block = p[f"encoderblock_{i}"]
        h = layer_norm(x, block["LayerNorm_0"])
        x = x + np.stack([attend(h[j], h, mask[j], block["MultiHeadDotProductAttention_0"]) for j in range(len(x))])
        h = layer_norm(x, block["LayerNorm_1"])
        x = x + dense(gelu(dense(h, block["MlpBlock_0"]["Dense_0"])), block["MlpBlock_0"]["Dense_1"])
    return layer_norm(x, p["encoder_norm"])


def small_stem(x, p, num_convolutions, patch):
    for i in range(num_convolutions):
        x = convolution(x, standardized(p[f"StdConv_{i}"]["kernel"]), 2, (1, 1), (1, 1), p[f"StdConv_{i}"]["bias"])
        x = relu(group_norm(x, p[f"GroupNorm_{i}"]))
    return convolution(x, p["embedding"]["kernel"], patch, (0, 0), (0, 0), p["embedding"]["bias"])


def score(embedding, x, t, p, num_blocks):
    """The noise in x at the integer time t."""
    phase = 2 * np.pi * t * p["time_preprocess"]["kernel"][:, 0]
    c = np.concatenate([np.cos(phase), np.sin(phase)])
    c = dense(swish(dense(c, p["cond_encoder"]["Dense_0"])), p["cond_encoder"]["Dense_1"])
    net = p["reverse_network"]
    y = dense(np.concatenate([c, embedding, x]), net["Dense_0"])
    for i in range(num_blocks):
        block = net[f"MLPResNetBlock_{i}"]
        y = y + dense(swish(dense(layer_norm(y, block["LayerNorm_0"]), block["Dense_0"])), block["Dense_1"])
    return dense(swish(y), net["Dense_1"])
