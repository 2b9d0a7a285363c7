"""Stand-in until the merge."""

from linvision.ops.linear import LayerNorm as LayerNormParameters
from linvision.ops.linear import Linear as LinearParameters
from linvision.ops.linear import cast_once, linear, mlp
from linvision.ops.projected_mlstm import projected_mlstm
from linvision.ops.window_attention import window_attention
