"""Triton kernels for the end of a ViL layer: norm of heads, skip and gate, one program a tile of tokens of one head."""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from linvision.ops.backends.triton.tiles import place, rows, sigmoid, store_rows


@triton.jit
def _normalise(h, valid, column, eps, HEAD_DIM: tl.constexpr):
    """Return the tokens of a head with mean 0 and variance 1, and the inverses of their deviations."""
    mean = tl.sum(h, 1) / HEAD_DIM
    centred = tl.where((column < HEAD_DIM)[None, :], h - mean[:, None], 0.0)
    inverse = tl.where(valid, tl.rsqrt(tl.sum(centred * centred, 1) / HEAD_DIM + eps), 0.0)
    return centred * inverse[:, None], inverse


@triton.jit
def _load_vector(x, column, HEAD_DIM: tl.constexpr):
    """Load a parameter of a head: (1, columns)."""
    return tl.load(x + column, column < HEAD_DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def forward_kernel(
    h, c, z, weight, bias, skip, y,
    num_tokens, num_heads, eps, h_batch, h_token, h_head, c_batch, c_token, z_batch, z_token,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Compute y (B, S, H D)."""
    _, first, head, batch = place(num_tokens, num_heads, TOKENS)
    head = head.to(tl.int64)
    token = (first + tl.arange(0, TOKENS)).to(tl.int64)
    valid = token < num_tokens
    column = tl.arange(0, COLUMNS)
    start = head * HEAD_DIM
    of_h = rows(h + batch * h_batch + head * h_head, token, h_token, valid, column, HEAD_DIM).to(tl.float32)
    of_c = rows(c + batch * c_batch + start, token, c_token, valid, column, HEAD_DIM).to(tl.float32)
    normalised, _ = _normalise(of_h, valid, column, eps, HEAD_DIM)
    sums = normalised * (1.0 + _load_vector(weight + start, column, HEAD_DIM))
    if bias is not None:
        sums += _load_vector(bias + start, column, HEAD_DIM)
    sums += _load_vector(skip + start, column, HEAD_DIM) * of_c
    if GATED:
        of_z = rows(z + batch * z_batch + start, token, z_token, valid, column, HEAD_DIM).to(tl.float32)
        sums *= of_z * sigmoid(of_z)
    store_rows(y + start, sums, batch * num_tokens + token, num_heads * HEAD_DIM, valid, column, HEAD_DIM)


@triton.jit
def backward_kernel(
    dy, h, c, z, weight, bias, skip, dh, dc, dz, parts,
    num_tokens, num_heads, eps, dy_batch, dy_token,
    h_batch, h_token, h_head, c_batch, c_token, z_batch, z_token,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Compute dh, dc and dz (B, S, H D), and in parts, to be added, the parameters' gradients (pieces, H, 3, D).

    These are those of weight, bias and skip.
    """
    piece, first, head, batch = place(num_tokens, num_heads, TILES * TOKENS)
    head = head.to(tl.int64)
    column = tl.arange(0, COLUMNS)
    start = head * HEAD_DIM
    scale = 1.0 + _load_vector(weight + start, column, HEAD_DIM)
    of_skip = _load_vector(skip + start, column, HEAD_DIM)
    shift = tl.zeros_like(of_skip)
    if bias is not None:
        shift += _load_vector(bias + start, column, HEAD_DIM)
    d_weight = tl.zeros((TOKENS, COLUMNS), tl.float32)
    d_bias, d_skip = tl.zeros_like(d_weight), tl.zeros_like(d_weight)
    for tile in range(0, TILES):
        token = (first + tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        valid = token < num_tokens
        of_h = rows(h + batch * h_batch + head * h_head, token, h_token, valid, column, HEAD_DIM).to(tl.float32)
        of_c = rows(c + batch * c_batch + start, token, c_token, valid, column, HEAD_DIM).to(tl.float32)
        of_z = rows(z + batch * z_batch + start, token, z_token, valid, column, HEAD_DIM).to(tl.float32)
        of_y = rows(dy + batch * dy_batch + start, token, dy_token, valid, column, HEAD_DIM).to(tl.float32)
        normalised, inverse = _normalise(of_h, valid, column, eps, HEAD_DIM)
        ungated = normalised * scale + shift + of_skip * of_c
        opened = sigmoid(of_z)
        d_gate = of_y * ungated * opened * (1.0 + of_z * (1.0 - opened))
        d_sums = of_y * of_z * opened
        d_bias += d_sums
        d_weight += d_sums * normalised
        d_skip += d_sums * of_c

        d_normalised = d_sums * scale
        mean = tl.sum(d_normalised, 1) / HEAD_DIM
        along = tl.sum(d_normalised * normalised, 1) / HEAD_DIM
        of_heads = (d_normalised - mean[:, None] - normalised * along[:, None]) * inverse[:, None]
        at = batch * num_tokens + token
        store_rows(dh + start, of_heads, at, num_heads * HEAD_DIM, valid, column, HEAD_DIM)
        store_rows(dc + start, d_sums * of_skip, at, num_heads * HEAD_DIM, valid, column, HEAD_DIM)
        store_rows(dz + start, d_gate, at, num_heads * HEAD_DIM, valid, column, HEAD_DIM)
    parts += (piece * num_heads + head) * (3 * HEAD_DIM) + column
    tl.store(parts, tl.sum(d_weight, 0), column < HEAD_DIM)
    tl.store(parts + HEAD_DIM, tl.sum(d_bias, 0), column < HEAD_DIM)
    tl.store(parts + 2 * HEAD_DIM, tl.sum(d_skip, 0), column < HEAD_DIM)
