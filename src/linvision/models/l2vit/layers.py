"""The layers of L2ViT, smallest first.

Activations are (B, H, W, C) throughout: seen as (B, C, H, W) that is torch's channels-last layout, so the depthwise
convolutions between the token-wise layers need no copies.
"""

from collections import OrderedDict

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from linvision.ops import depthwise_conv2d, linear_attention
from linvision.ops.fused.window_attention import attend_in_windows, pad_to_multiple

for _name in ("depthwise_conv2d", "linear_attention", "pad_to_multiple"):
    torch.fx.wrap(_name)  # torch.fx cannot look into them


def as_image(x: Tensor) -> Tensor:
    """View (B, H, W, C) as (B, C, H, W) in channels-last layout."""
    return x.permute(0, 3, 1, 2)


def as_map(x: Tensor) -> Tensor:
    """Return (B, C, H, W) as a dense (B, H, W, C); a view where x has the channels-last layout."""
    return x.permute(0, 2, 3, 1).contiguous()


def cut_to_parts(x: Tensor, sides: tuple[int, int], divisor: int) -> Tensor:
    """Cut a map to the sizes that it has, ceil(side / divisor): as symbols these are simpler than a convolution's."""
    rows, columns = ((side + divisor - 1) // divisor for side in sides)
    return x.narrow(1, 0, rows).narrow(2, 0, columns).contiguous()


class Depthwise(nn.Conv2d):
    """Depthwise convolution with bias over (B, H, W, C); keeps the size."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve each channel of (B, H, W, C)."""
        return depthwise_conv2d(input, self.weight, self.bias).contiguous()


class PositionEncoding(nn.Module):
    """Conditional position encoding: x + depthwise 3x3 convolution of x."""

    proj: Depthwise

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = Depthwise(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Encode positions into (B, H, W, C)."""
        return x + self.proj(x)


class WindowAttention(nn.Module):
    """Softmax attention within windows of w x w tokens that tile the map; zero tokens fill the last ones up."""

    qkv: nn.Linear
    proj: nn.Linear

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of (B, H, W, C)."""
        return attend_in_windows(x, self.qkv, self.proj, num_heads=self.num_heads, window_size=self.window_size)


class LinearAttention(nn.Module):
    """Enhanced linear attention over all tokens of the map (``linvision.ops.linear_attention``)."""

    qkv: nn.Linear
    proj: nn.Linear

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens of (B, H, W, C)."""
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend with projected tokens (B, H, W, 3 C)."""
        q, k, v = (
            qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, self.proj.in_features // self.num_heads)).unbind(2)
        )
        return linear_attention(q, k, v, self.temperature).flatten(2).unflatten(1, qkv.shape[1:3])


class LocalConcentration(nn.Module):
    """Local concentration module: depthwise 7x7, GELU, batch norm, depthwise 7x7."""

    conv1: Depthwise
    act: nn.GELU
    bn: nn.BatchNorm2d
    conv2: Depthwise

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = Depthwise(dim, 7)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = Depthwise(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Gather each token's neighbourhood in (B, H, W, C)."""
        return self.conv2(as_map(self.bn(as_image(self.act(self.conv1(x))))))


class Mlp(nn.Module):
    """Two linear layers of width 4 C with a GELU between."""

    fc1: nn.Linear
    act: nn.GELU
    fc2: nn.Linear

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of (B, H, W, C)."""
        return self.fc2(self.act(self.fc1(x)))


class LocalBlock(nn.Module):
    """Position encoding, window attention, position encoding, MLP."""

    cpe: nn.ModuleList
    norm1: nn.LayerNorm
    attn: WindowAttention
    norm2: nn.LayerNorm
    mlp: Mlp
    drop_path: DropPath

    def __init__(self, dim: int, num_heads: int, window_size: int, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([PositionEncoding(dim), PositionEncoding(dim)])
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, H, W, C)."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe[1](x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock(nn.Module):
    """Position encoding, linear attention, local concentration, MLP."""

    cpe: nn.ModuleList
    norm1: nn.LayerNorm
    attn: LinearAttention
    norm3: nn.LayerNorm
    local_mp: LocalConcentration
    norm2: nn.LayerNorm
    mlp: Mlp
    drop_path: DropPath

    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList([PositionEncoding(dim)])
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LinearAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.local_mp = LocalConcentration(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, H, W, C)."""
        x = self.cpe[0](x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local_mp(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norms: (B, in_chans, H, W) to (B, H/4, W/4, C)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
        ]
        self.proj = nn.Sequential(OrderedDict(proj=nn.Sequential(*layers)))
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """Embed images; sides that 4 does not divide are zero-padded right and bottom."""
        x = as_map(self.proj(as_image(pad_to_multiple(as_map(image), 4))))
        return self.norm(cut_to_parts(x, (image.shape[2], image.shape[3]), 4))


class Downsample(nn.Module):
    """Layer norm and a 2x2 convolution of stride 2: (B, H, W, C) to (B, H/2, W/2, C')."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.proj = nn.Conv2d(in_dim, dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the sides; odd ones are zero-padded right and bottom."""
        y = as_map(self.proj(as_image(pad_to_multiple(self.norm(x), 2))))
        return cut_to_parts(y, (x.shape[1], x.shape[2]), 2)
