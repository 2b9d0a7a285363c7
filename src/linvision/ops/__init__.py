"""Sequence mixers as pure functions of tensors, linear in the sequence length, and the token-wise work around them.

An op is a public function with its checks, a reference form (functional PyTorch that any tracer can follow), an
operator registered with torch (meta kernel, gradient, count of operations) and implementations by backend
(``linvision.ops.backends``). ``block_diagonal`` and ``linear_attention`` have no kernels: their reference form is all
there is, and nothing is registered. ``linvision.ops.fused`` holds what exists for inference alone.
"""

from linvision.ops import fused
from linvision.ops.backends.cpp.allocator import keep_freed_memory
from linvision.ops.block_diagonal import BLOCK_SIZE, block_diagonal
from linvision.ops.convolution import causal_conv1d, depthwise_conv2d
from linvision.ops.dispatch import backend_names, current_backend, use_backend
from linvision.ops.gated_norm import gated_head_norm
from linvision.ops.linear_attention import linear_attention
from linvision.ops.mlstm import MLSTMState, mlstm, mlstm_parallel, mlstm_recurrent
from linvision.ops.mlstm_inputs import MLSTMInputs, mlstm_inputs
from linvision.ops.parameters import (
    BlockDiagonalParameters,
    GateParameters,
    LayerNormParameters,
    LinearParameters,
)
from linvision.ops.selective_scan import selective_scan, selective_scan_sequential

__all__ = [
    "BLOCK_SIZE",
    "BlockDiagonalParameters",
    "GateParameters",
    "LayerNormParameters",
    "LinearParameters",
    "MLSTMInputs",
    "MLSTMState",
    "backend_names",
    "block_diagonal",
    "causal_conv1d",
    "current_backend",
    "depthwise_conv2d",
    "fused",
    "gated_head_norm",
    "keep_freed_memory",
    "linear_attention",
    "mlstm",
    "mlstm_inputs",
    "mlstm_parallel",
    "mlstm_recurrent",
    "selective_scan",
    "selective_scan_sequential",
    "use_backend",
]
