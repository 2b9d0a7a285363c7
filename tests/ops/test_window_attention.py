"""Window attention: the kernels against float64 and against torch's attention, at every size of grid and window."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from linvision.ops import use_backend
from linvision.ops.backends.cpp import window_attention as cpp_window_attention
from linvision.ops.fused import window_attention
from linvision.ops.parameters import LayerNormParameters, LinearParameters
from tests.goldens import relative_error
from tests.ops import kernels


def random_inputs(batch, rows, columns, width, dtype=torch.float32):
    """Return x, qkv, proj and norm."""
    generator = torch.Generator().manual_seed(1000 * rows + columns)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    qkv = LinearParameters((2 * random(3 * width, width) / width**0.5).to(dtype), random(3 * width))
    proj = LinearParameters((random(width, width) / width**0.5).to(dtype), random(width))
    return (
        random(batch, rows, columns, width).to(dtype),
        qkv,
        proj,
        LayerNormParameters(1 + random(width) / 4, random(width)),
    )


def attend(inputs, num_heads, window_size):
    x, qkv, proj, norm = inputs
    return window_attention(x, qkv, proj, norm=norm, num_heads=num_heads, window_size=window_size)


def token_by_token(inputs, num_heads, window_size):
    """Compute the definition in float64, one window after the other."""
    x, qkv, proj, norm = inputs
    x = x.double()
    y = F.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
    w, result = window_size, x.clone()
    for row in range(0, x.shape[1], w):
        for column in range(0, x.shape[2], w):
            tokens = torch.zeros(len(x), w, w, x.shape[3], dtype=torch.float64)
            part = y[:, row : row + w, column : column + w]
            tokens[:, : part.shape[1], : part.shape[2]] = part
            q, k, v = F.linear(tokens.flatten(1, 2), qkv.weight.double(), qkv.bias.double()).chunk(3, dim=-1)
            heads = []
            for q_h, k_h, v_h in zip(*(z.chunk(num_heads, dim=-1) for z in (q, k, v)), strict=True):
                heads.append((q_h @ k_h.mT / q_h.shape[-1] ** 0.5).softmax(-1) @ v_h)
            out = F.linear(torch.cat(heads, dim=-1), proj.weight.double(), proj.bias.double())
            part = out.unflatten(1, (w, w))[:, : part.shape[1], : part.shape[2]]
            result[:, row : row + w, column : column + w] += part
    return result


def assert_matches(size, num_heads, window_size, dtype=torch.float32):
    inputs = random_inputs(*size, dtype)
    expected = token_by_token(inputs, num_heads, window_size)
    y = attend(inputs, num_heads, window_size)
    assert y.dtype == dtype
    assert relative_error(y, expected, expected.norm().clamp_min(1e-30)) <= kernels.BOUND[dtype]
    assert (y.double() - expected).abs().max() <= 2 * kernels.BOUND[dtype] * expected.abs().max()


# (batch, rows, columns, channels), heads, window.
CASES = [
    ((2, 7, 7, 32), 1, 7),
    ((1, 14, 9, 24), 3, 7),
    ((3, 5, 1, 10), 5, 4),
    ((1, 3, 4, 96), 3, 12),
    ((2, 4, 4, 70), 2, 1),
    ((1, 1, 1, 4), 1, 16),
    ((1, 18, 17, 8), 2, 17),
]


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_definition(case, dtype, backend):
    with use_backend(kernels.able(backend, dtype)):
        assert_matches(*case, dtype)


@kernels.needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("level", kernels.LEVELS)
@torch.no_grad()
def test_every_instruction_set_and_thread_number(level, threads):
    with kernels.settings(level, threads):
        for dtype in (torch.float32, torch.bfloat16):
            with use_backend(kernels.able("cpp", dtype)):
                assert_matches((2, 16, 13, 42), 3, 7, dtype)


@kernels.needs_kernels
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 40), st.integers(1, 9)
)
@torch.no_grad()
def test_any_size(batch, rows, columns, num_heads, head_dim, window_size):
    with use_backend("cpp"):
        assert_matches((batch, rows, columns, num_heads * head_dim), num_heads, window_size)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@torch.no_grad()
def test_large_scores_and_nan(backend):
    x, qkv, proj, norm = random_inputs(1, 7, 14, 32)
    large = LinearParameters(300 * qkv.weight, qkv.bias)
    expected = token_by_token((x, large, proj, norm), 2, 7)
    with use_backend(backend):
        y = attend((x, large, proj, norm), 2, 7)
        assert relative_error(y, expected, expected.norm()) < 1e-3
        x[0, 0, 0, 0] = torch.nan
        y = attend((x, qkv, proj, norm), 2, 7)
    assert y[:, :, :7].isnan().all()
    assert y[:, :, 7:].isfinite().all()


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@torch.no_grad()
def test_views_are_read_where_they_lie(backend):
    x, *layers = random_inputs(2, 9, 8, 16)
    wide = torch.randn(2, 9, 16, 32, generator=torch.Generator().manual_seed(0))
    for view in (
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        wide[:, :, ::2, 16:],
        x[:1].expand(3, -1, -1, -1),
    ):
        with use_backend(backend):
            torch.testing.assert_close(attend((view, *layers), 2, 7), attend((view.contiguous(), *layers), 2, 7))


def test_gradients():
    x, qkv, proj, norm = random_inputs(1, 3, 4, 4)
    leaves = [tensor.double().requires_grad_() for tensor in (x, *qkv, *proj, *norm[:2])]

    def function(x, w1, b1, w2, b2, weight, bias):
        return attend((x, LinearParameters(w1, b1), LinearParameters(w2, b2), LayerNormParameters(weight, bias)), 2, 2)

    assert torch.autograd.gradcheck(function, leaves)


@kernels.needs_kernels
@torch.no_grad()
def test_kernels_run_in_inference_only(monkeypatch):
    calls = []
    monkeypatch.setattr(cpp_window_attention, "call", lambda name, arguments: calls.append(name))
    inputs = random_inputs(1, 3, 4, 4)
    with torch.enable_grad():
        attend(inputs, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attend(inputs, 2, 2)
    torch._dynamo.reset()
    torch.compile(attend, fullgraph=True, backend="eager")(inputs, 2, 2)
    assert not calls
    attend(inputs, 2, 2)
    assert calls == ["linvision_window_attention_forward"]


@kernels.needs_kernels
@torch.no_grad()
def test_operations_are_counted_and_torch_accepts_the_operator():
    x, qkv, proj, norm = inputs = random_inputs(1, 8, 7, 4)
    with FlopCounterMode(display=False) as counter:
        attend(inputs, 2, 7)
    assert counter.get_total_flops() == 14 * 7 * (2 * 4 * 16 + 4 * 49 * 4)
    arguments = (x, *qkv, *proj, *norm, 2, 7)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.linvision.window_attention, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \(B, H, W, C\)"),
        ({"qkv": LinearParameters(torch.zeros(8, 4))}, "must have 12 outputs"),
        ({"proj": LinearParameters(torch.zeros(5, 4))}, "proj 4"),
        ({"num_heads": 3}, "must divide them"),
        ({"num_heads": 0}, "must divide them"),
        ({"window_size": 0}, "at least 1 token"),
        ({"norm": LayerNormParameters(torch.zeros(3))}, "must have shape"),
    ],
)
@torch.no_grad()
def test_wrong_inputs(change, message):
    x, qkv, proj, norm = random_inputs(1, 3, 3, 4)
    arguments = {"x": x, "qkv": qkv, "proj": proj, "norm": norm, "num_heads": 2, "window_size": 2, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)
