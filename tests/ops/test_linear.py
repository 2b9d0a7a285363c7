"""Linear layers and MLPs with norm and residual: kernels against float64, when they run, and how torch sees them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from linvision.ops import use_backend
from linvision.ops.backends.cpp import linear as cpp_linear
from linvision.ops.fused import linear, mlp
from linvision.ops.parameters import LayerNormParameters, LinearParameters
from tests.goldens import relative_error
from tests.ops import kernels


def random_layer(generator, inputs, outputs, dtype, *, bias=True):
    weight = (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).to(dtype)
    return LinearParameters(weight, torch.randn(outputs, generator=generator) if bias else None)


def random_norm(generator, width, *, bias=True):
    weight = 1 + torch.randn(width, generator=generator) / 4
    return LayerNormParameters(weight, torch.randn(width, generator=generator) if bias else None, 1e-5)


def double(parameters):
    return (
        None if parameters is None else type(parameters)(*(x.double() if torch.is_tensor(x) else x for x in parameters))
    )


def assert_close(y, expected):
    """Bound the error over all, and each element's beside the largest."""
    bound = kernels.BOUND[y.dtype]
    assert y.shape == expected.shape
    assert relative_error(y, expected, expected.norm().clamp_min(1e-30)) <= bound
    if y.numel():
        assert (y.double() - expected).abs().max() <= 2 * bound * expected.abs().max().clamp_min(1)


def assert_linear(rows, inputs, outputs, *, dtype=torch.float32, norm=True, gate=True, residual=True, bias=True):
    generator = torch.Generator().manual_seed(1000 * rows + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    layer = random_layer(generator, inputs, outputs, dtype, bias=bias)
    norms = random_norm(generator, inputs, bias=bias) if norm else None
    gates = torch.randn(rows, inputs, generator=generator).to(dtype) if gate else None
    added = torch.randn(rows, outputs, generator=generator).to(dtype) if residual else None
    y = linear(x, layer, norm=norms, gate=gates, residual=added)
    z = x.double() if norms is None else F.layer_norm(x.double(), (inputs,), *double(norms))
    z = z if gates is None else z * F.silu(gates.double())
    expected = F.linear(z, *double(layer)) + (0 if added is None else added.double())
    assert y.dtype == dtype
    assert_close(y, expected)


def assert_mlp(rows, inputs, hidden, outputs, *, dtype=torch.float32, norm=True, residual=True):
    generator = torch.Generator().manual_seed(1000 * rows + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    first, second = (random_layer(generator, *size, dtype) for size in ((inputs, hidden), (hidden, outputs)))
    norms = random_norm(generator, inputs) if norm else None
    added = torch.randn(rows, outputs, generator=generator).to(dtype) if residual else None
    y = mlp(x, first, second, norm=norms, residual=added)
    z = x.double() if norms is None else F.layer_norm(x.double(), (inputs,), *double(norms))
    z = F.linear(F.gelu(F.linear(z, *double(first))), *double(second))
    expected = z + (0 if added is None else added.double())
    assert y.dtype == dtype
    assert_close(y, expected)


# Rows and columns around the tiles and panels of every instruction set, and none at all.
SIZES = [(1, 2, 1), (5, 12, 7), (9, 16, 48), (28, 30, 49), (131, 96, 50), (217, 44, 97), (0, 8, 8), (2000, 24, 20)]


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_linear_matches_float64(size, dtype, backend):
    with use_backend(kernels.able(backend, dtype)):
        for norm, gate, residual, bias in itertools.product((False, True), repeat=4):
            assert_linear(*size, dtype=dtype, norm=norm, gate=gate, residual=residual, bias=bias)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 2, 2, 1), (9, 16, 64, 16), (50, 96, 384, 96), (131, 20, 500, 33), (0, 8, 8, 8)])
@torch.no_grad()
def test_mlp_matches_float64(size, dtype, backend):
    with use_backend("auto" if dtype == torch.bfloat16 else backend):
        for norm, residual in ((False, False), (True, True)):
            assert_mlp(*size, dtype=dtype, norm=norm, residual=residual)


@kernels.needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("level", kernels.LEVELS)
@torch.no_grad()
def test_every_instruction_set_and_thread_number(level, threads):
    with kernels.settings(level, threads):
        for dtype in (torch.float32, torch.bfloat16):
            with use_backend(kernels.able("cpp", dtype)):
                assert_linear(61, 70, 201, dtype=dtype)
                assert_mlp(61, 70, 280, 70, dtype=dtype)


@kernels.needs_kernels
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 200), st.booleans(), st.booleans())
@torch.no_grad()
def test_any_size(rows, inputs, outputs, norm, residual):
    with use_backend("cpp"):
        assert_linear(rows, 2 * inputs, outputs, norm=norm, residual=residual)
        assert_mlp(rows, 2 * inputs, 2 * outputs, inputs, norm=norm, residual=residual)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@torch.no_grad()
def test_gelu_over_its_whole_range(backend):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -0.0, 1e30, 1e-30])])[:, None]
    one = LinearParameters(torch.ones(1, 1))
    with use_backend(backend):
        torch.testing.assert_close(mlp(x, one, one), F.gelu(x.double()).float(), rtol=1e-6, atol=2e-6)
        assert mlp(torch.full((1, 1), torch.nan), one, one).isnan().all()


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@torch.no_grad()
def test_views_are_read_where_they_lie(backend):
    generator = torch.Generator().manual_seed(0)
    layer, norm = random_layer(generator, 8, 12, torch.float32), random_norm(generator, 8)
    wide = torch.randn(2, 5, 24, generator=generator)
    for x in (wide[..., 8:16], wide[..., ::3], wide[:, ::2, :8], wide[:1, :, :8].expand(3, -1, -1), wide.mT[:, :8].mT):
        residual = torch.randn(12, *x.shape[:-1], generator=generator).movedim(0, -1)
        with use_backend(backend):
            expected = linear(x.contiguous(), layer, norm=norm, residual=residual.contiguous())
            torch.testing.assert_close(linear(x, layer, norm=norm, residual=residual), expected)
        transposed = LinearParameters(layer.weight.T.contiguous().T, layer.bias)
        with use_backend(backend):
            torch.testing.assert_close(linear(x, transposed, norm=norm, residual=residual), expected)


@kernels.needs_kernels
def test_kernels_run_without_gradients_only(monkeypatch):
    calls = []
    monkeypatch.setattr(cpp_linear, "call", lambda name, arguments: calls.append(name))
    x, layer = torch.randn(3, 4), LinearParameters(torch.randn(5, 4))
    linear(x, layer)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, layer).dtype == torch.bfloat16
    with torch.no_grad(), use_backend("plain"):
        linear(x, layer)
    assert not calls
    with torch.no_grad():
        linear(x, layer)
    assert calls == ["linvision_linear_forward"]


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    parameters = [*random_layer(generator, 4, 6, torch.float32), *random_layer(generator, 6, 4, torch.float32)]
    norm = random_norm(generator, 4)[:2]

    def function(x, residual, w1, b1, w2, b2, weight, bias):
        y = mlp(
            x,
            LinearParameters(w1, b1),
            LinearParameters(w2, b2),
            norm=LayerNormParameters(weight, bias),
            residual=residual,
        )
        return linear(y, LinearParameters(w1, b1), norm=LayerNormParameters(weight, bias))

    leaves = [tensor.double().requires_grad_() for tensor in (x, residual, *parameters, *norm)]
    assert torch.autograd.gradcheck(function, leaves)


def test_forward_mode_derivatives():
    generator = torch.Generator().manual_seed(0)
    x, layer = torch.randn(4, generator=generator), random_layer(generator, 4, 6, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jacfwd(lambda x: linear(x, layer))(x), layer.weight)


@kernels.needs_kernels
@torch.no_grad()
def test_operations_are_counted():
    x, first, second = torch.randn(10, 4), LinearParameters(torch.randn(6, 4)), LinearParameters(torch.randn(3, 6))
    with FlopCounterMode(display=False) as counter:
        linear(x, first)
        assert counter.get_total_flops() == 2 * 10 * 24
        mlp(x, first, second)
    assert counter.get_total_flops() == 2 * 10 * (24 + 24 + 18)


@kernels.needs_kernels
@torch.no_grad()
def test_torch_accepts_the_operators():
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    first, second = random_layer(generator, 4, 6, torch.float32), random_layer(generator, 6, 4, torch.float32)
    norm = random_norm(generator, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.linvision.linear, (x, *first, *norm, x, None), test_utils=checks)
    torch.library.opcheck(torch.ops.linvision.mlp, (x, *first, *second, *norm, residual), test_utils=checks)


@torch.no_grad()
def test_compile_fuses_the_plain_expression():
    generator = torch.Generator().manual_seed(0)
    x, layer, norm = torch.randn(3, 4), random_layer(generator, 4, 4, torch.float32), random_norm(generator, 4)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(linear, fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(x, layer, norm=norm, residual=x), linear(x, layer, norm=norm, residual=x))
    assert len(graphs) == 1
    assert "linvision" not in graphs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, "layer.weight must have shape"),
        ({"x": torch.tensor(1.0)}, "weight must be"),
        ({"layer": LinearParameters(torch.zeros(6, 4), torch.zeros(5))}, "must have shape"),
        ({"layer": LinearParameters(torch.zeros(0, 4))}, "weight must be"),
        ({"layer": LinearParameters(torch.zeros(6, 4).double())}, "one floating-point type"),
        ({"layer": LinearParameters(torch.zeros(6, 4), torch.zeros(6, device="meta"))}, "on one device"),
        ({"layer": LinearParameters(torch.zeros(6, 4), torch.zeros(6, dtype=torch.int32))}, "floating-point"),
        ({"norm": LayerNormParameters(torch.zeros(5))}, "must have shape"),
        ({"norm": LayerNormParameters(None)}, "without a weight"),
        ({"gate": torch.zeros(3, 6)}, "gate must have shape"),
        ({"residual": torch.zeros(3, 5)}, "residual must have shape"),
        ({"residual": torch.zeros(3, 6).double()}, "residual is torch.float64"),
    ],
)
@torch.no_grad()
def test_wrong_inputs(change, message):
    arguments = {"x": torch.zeros(3, 4), "layer": LinearParameters(torch.zeros(6, 4)), **change}
    with pytest.raises(ValueError, match=message):
        linear(**arguments)


@pytest.mark.parametrize(
    "types", itertools.product((torch.float32, torch.float16, torch.bfloat16, torch.float64), repeat=2)
)
def test_parameters_of_a_norm_may_have_any_types_under_autocast(types):
    x, weight = torch.randn(2, 3, 4), torch.randn(4, 4)
    norm = LayerNormParameters(*(torch.randn(4).to(dtype) for dtype in types))
    expected = linear(x, LinearParameters(weight), norm=LayerNormParameters(norm.weight.float(), norm.bias.float()))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x.bfloat16(), LinearParameters(weight, torch.zeros(4, dtype=types[0])), norm=norm)
    assert relative_error(y, expected) < 4e-2
