"""Sequence mixers as pure functions of tensors, linear in the sequence length, and the token-wise work around them."""

from linvision.ops._dispatch import current_backend, use_backend
from linvision.ops.block_diagonal import BlockDiagonal, Gate, MLSTMInputs, block_diagonal, mlstm_inputs
from linvision.ops.block_diagonal import BlockDiagonal as BlockDiagonalParameters
from linvision.ops.block_diagonal import Gate as GateParameters
from linvision.ops.convolution import causal_conv1d, depthwise_conv2d
from linvision.ops.gated_norm import gated_head_norm
from linvision.ops.linear_attention import linear_attention
from linvision.ops.mlstm import MLSTMState, mlstm, mlstm_parallel, mlstm_recurrent
from linvision.ops.projected_mlstm import projected_mlstm
from linvision.ops.selective_scan import selective_scan, selective_scan_sequential

__all__ = [
    "BlockDiagonal",
    "Gate",
    "MLSTMInputs",
    "MLSTMState",
    "block_diagonal",
    "causal_conv1d",
    "depthwise_conv2d",
    "gated_head_norm",
    "mlstm",
    "mlstm_inputs",
    "mlstm_parallel",
    "mlstm_recurrent",
    "projected_mlstm",
    "selective_scan",
    "selective_scan_sequential",
    "use_backend",
]
