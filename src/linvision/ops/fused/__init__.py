"""What exists for inference alone: several ops in one pass over memory, without gradients.

With gradients, under autocast and while a compiler traces each is the plain PyTorch that it stands for.
"""

from linvision.ops.fused.linear import linear, mlp
from linvision.ops.fused.projected_mlstm import projected_mlstm
from linvision.ops.fused.window_attention import window_attention

__all__ = ["linear", "mlp", "projected_mlstm", "window_attention"]
