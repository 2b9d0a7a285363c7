"""Forms of ViL's layers: fewer passes over memory than the definitions in ``layers``, and the same function.

q, k, v and the gates come out of one pass, without a concatenation; ``proj_up`` is two products, so that x and z are
contiguous and z is not alive before it is needed; head norm, skip and gate are one pass. Without gradients a CPU also
joins norms, gates and residual sums to the matrix products, and projects q, k and v inside the mLSTM's kernel.
"""

from torch import Tensor

from linvision.models.forms import halves, linear_parameters, stands_for
from linvision.models.vil.layers import NUM_HEADS, ViLBlock, ViLLayer
from linvision.ops import (
    BlockDiagonalParameters,
    GateParameters,
    LayerNormParameters,
    gated_head_norm,
    mlstm,
    mlstm_inputs,
)
from linvision.ops.autocast import cast_once
from linvision.ops.fused import linear, projected_mlstm


@stands_for(ViLBlock, "training")
def block(self: ViLBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute a block with gradients."""
    layer = self.layer
    u = cast_once(self.norm(x))
    x_up, z_up = halves(layer.proj_up)
    v_source = linear(u, x_up)
    c = layer.conv(v_source, grid)
    *tokens, i, f = mlstm_inputs(c, v_source, *_projections(layer), **_gates(layer))
    q, k, v = (tensor.unflatten(-1, (NUM_HEADS, -1)) for tensor in tokens)
    h = mlstm(q, k, v, i, f, reverse=layer.mlstm_cell.reverse)
    y = layer.proj_down(_gated(layer, h, c, linear(u, z_up)))
    return x + self.drop_path(y)


@stands_for(ViLBlock, "inference")
def block_without_gradients(self: ViLBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute a block in inference, where nothing is dropped."""
    layer, norm = self.layer, LayerNormParameters(1 + self.norm.weight, self.norm.bias, self.norm.eps)
    x_up, z_up = halves(layer.proj_up)
    v_source = linear(x, x_up, norm=norm)
    c = layer.conv(v_source, grid)
    h = projected_mlstm(c, v_source, *_projections(layer), **_gates(layer), reverse=layer.mlstm_cell.reverse)
    down = linear_parameters(layer.proj_down)
    if x.device.type != "cpu":
        return linear(_gated(layer, h, c, linear(x, z_up, norm=norm)), down, residual=x)
    y = _gated(layer, h, c, None)
    del h, c, v_source  # the gate is not to be alive beside them: the last product applies it
    return linear(y, down, gate=linear(x, z_up, norm=norm), residual=x)


def _gated(layer: ViLLayer, h: Tensor, c: Tensor, z: Tensor | None) -> Tensor:
    norm = layer.mlstm_cell.outnorm
    return gated_head_norm(h, c, z, weight=norm.weight, bias=norm.bias, skip=layer.learnable_skip, eps=norm.eps)


def _projections(layer: ViLLayer) -> list[BlockDiagonalParameters]:
    return [BlockDiagonalParameters(p.weight, p.bias) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]


def _gates(layer: ViLLayer) -> dict[str, GateParameters]:
    cell = layer.mlstm_cell
    return {name: GateParameters(gate.weight, gate.bias) for name, gate in (("i", cell.igate), ("f", cell.fgate))}
