"""The layers of L2ViT, smallest first.

Activations are (B, H, W, C) throughout: seen as (B, C, H, W) that is torch's channels-last layout, so the depthwise
convolutions between the token-wise layers need no copies.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, scaled_dot_product_attention

from linvision.ops.convolution import depthwise_conv2d
from linvision.ops.linear_attention import linear_attention

PART_VALUES = 2**22  # values that ``by_parts`` holds in between: 16 MB in float32
PART_TOKENS = 2048  # of a part at least: each part has the weights laid out anew


def as_image(x: Tensor) -> Tensor:
    """View (B, H, W, C) as (B, C, H, W) in channels-last layout."""
    return x.permute(0, 3, 1, 2)


def as_map(x: Tensor) -> Tensor:
    """Return (B, C, H, W) as a dense (B, H, W, C); a view where x has the channels-last layout."""
    return x.permute(0, 2, 3, 1).contiguous()


def pad_to_multiple(x: Tensor, divisor: int) -> Tensor:
    """Pad (B, H, W, C) with zeros at the right and the bottom until ``divisor`` divides H and W."""
    below, right = ((divisor - side % divisor) % divisor for side in x.shape[1:3])
    return pad(x, (0, 0, 0, right, 0, below)) if right or below else x


def add(x: Tensor, update: Tensor) -> Tensor:
    """Return x + update, written into x where no gradient is recorded: x is its caller's own and read no more."""
    if torch.is_grad_enabled() or x.dtype != update.dtype:
        return x + update
    return x.add_(update)


def by_parts(function: Callable[[Tensor], Tensor], x: Tensor, *, width: int, tokens: int) -> Tensor:
    """Apply a function that keeps the shape and treats the rows of x (N, ...) independently.

    ``width`` is the number of values a row that it holds in between, ``tokens`` the tokens of a row. In inference on a
    CPU the rows go through in parts: for a large image, mapping fresh memory for them costs as much as products.
    """
    rows = max(1, PART_VALUES // width, PART_TOKENS // tokens)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu" or len(x) <= rows:
        return function(x)
    y = torch.empty_like(x)
    for part, result in zip(x.split(rows), y.split(rows), strict=True):
        result.copy_(function(part))
    return y


class Linear(nn.Linear):
    """Linear map of tokens; in inference on a CPU as a 1x1 convolution, which oneDNN computes without copying the bias.

    PyTorch hands matrix products to another library, 5 to 30 % slower at these shapes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map the last axis of (..., in_features)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or input.device.type != "cpu":
            return super().forward(input)
        column = input.reshape(1, -1, 1, self.in_features)
        y = as_map(conv2d(as_image(column), self.weight[:, :, None, None], self.bias))
        return y.view(*input.shape[:-1], self.out_features)


class Depthwise(nn.Conv2d):
    """Depthwise convolution with bias over (B, H, W, C); keeps the size."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve each channel of (B, H, W, C)."""
        return depthwise_conv2d(input, self.weight, self.bias).contiguous()


class PositionEncoding(nn.Module):
    """Conditional position encoding: x + depthwise 3x3 convolution of x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = Depthwise(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Encode positions into (B, H, W, C)."""
        return add(self.proj(x), x)


class WindowAttention(nn.Module):
    """Softmax attention within windows of w x w tokens that tile the map; zero tokens fill the last ones up."""

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of (B, H, W, C)."""
        (B, H, W, C), w = x.shape, self.window_size
        x = pad_to_multiple(x, w)
        tiles = (B, x.shape[1] // w, w, x.shape[2] // w, w, C)
        windows = x.view(tiles).transpose(2, 3).reshape(-1, w * w, C)
        x = by_parts(self._attend, windows, width=3 * w * w * C, tokens=w * w)
        x = x.view(*tiles[:2], tiles[3], w, w, C).transpose(2, 3).reshape(B, tiles[1] * w, tiles[3] * w, C)
        return x[:, :H, :W]

    def _attend(self, windows: Tensor) -> Tensor:
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Enhanced linear attention over all tokens of the map (``linvision.ops.linear_attention``)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens of (B, H, W, C)."""
        return by_parts(self._attend, x, width=3 * x[0].numel(), tokens=x.shape[1] * x.shape[2])

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(linear_attention(q, k, v, self.temperature).reshape(x.shape))


class LocalConcentration(nn.Module):
    """Local concentration module: depthwise 7x7, GELU, batch norm, depthwise 7x7."""

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

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of (B, H, W, C)."""
        y = by_parts(self._transform, x.flatten(0, 2), width=self.fc1.out_features, tokens=1)
        return y.view(x.shape)

    def _transform(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


class LocalBlock(nn.Module):
    """Position encoding, window attention, position encoding, MLP."""

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
        x = add(x, self.drop_path(self.attn(self.norm1(x))))
        x = self.cpe[1](x)
        return add(x, self.drop_path(self.mlp(self.norm2(x))))


class GlobalBlock(nn.Module):
    """Position encoding, linear attention, local concentration, MLP."""

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
        x = add(x, self.drop_path(self.attn(self.norm1(x))))
        x = add(x, self.drop_path(self.local_mp(self.norm3(x))))
        return add(x, self.drop_path(self.mlp(self.norm2(x))))


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
        return self.norm(as_map(self.proj(as_image(pad_to_multiple(as_map(image), 4)))))


class Downsample(nn.Module):
    """Layer norm and a 2x2 convolution of stride 2: (B, H, W, C) to (B, H/2, W/2, C')."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.proj = nn.Conv2d(in_dim, dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the sides; odd ones are zero-padded right and bottom."""
        return as_map(self.proj(as_image(pad_to_multiple(self.norm(x), 2))))
