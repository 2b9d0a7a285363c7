"""Forms of L2ViT's blocks in inference: norms and residual sums joined to the matrix products between them.

Sums are written into what this module has computed itself, never into what came in or was handed out.
"""

from typing import cast

import torch
from torch import Tensor

from linvision.models.forms import layer_norm_parameters, linear_parameters, stands_for
from linvision.models.l2vit.layers import GlobalBlock, LocalBlock, PositionEncoding
from linvision.ops.fused import linear, mlp, window_attention


@stands_for(LocalBlock, "inference", within=(PositionEncoding,))
def local_block(self: LocalBlock, x: Tensor) -> Tensor:
    """Compute a local block."""
    x = _encode_positions(self, 0, x)
    x = window_attention(
        x,
        linear_parameters(self.attn.qkv),
        linear_parameters(self.attn.proj),
        norm=layer_norm_parameters(self.norm1),
        num_heads=self.attn.num_heads,
        window_size=self.attn.window_size,
    )
    return _add_mlp(self, _encode_positions(self, 1, x))


@stands_for(GlobalBlock, "inference", within=(PositionEncoding,))
def global_block(self: GlobalBlock, x: Tensor) -> Tensor:
    """Compute a global block."""
    x = _encode_positions(self, 0, x)
    qkv = linear(x, linear_parameters(self.attn.qkv), norm=layer_norm_parameters(self.norm1))
    x = linear(self.attn.attend(qkv), linear_parameters(self.attn.proj), residual=x)
    return _add_mlp(self, _add(self.local_mp(self.norm3(x)), x))


def _encode_positions(self: LocalBlock | GlobalBlock, index: int, x: Tensor) -> Tensor:
    encoding = cast(PositionEncoding, self.cpe[index])
    return _add(encoding.proj(x), x)


def _add_mlp(self: LocalBlock | GlobalBlock, x: Tensor) -> Tensor:
    first, second = linear_parameters(self.mlp.fc1), linear_parameters(self.mlp.fc2)
    return mlp(x, first, second, norm=layer_norm_parameters(self.norm2), residual=x)


def _add(update: Tensor, x: Tensor) -> Tensor:
    """Return x + update, written into update, which is nobody else's; compilers save that memory by themselves."""
    return x + update if torch.compiler.is_compiling() or update.dtype != x.dtype else update.add_(x)
