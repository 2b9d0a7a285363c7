"""What L2ViT gains from fused window attention and from activations that need no layout copies.

Compares ``l2vit_tiny`` with the same network written straightforwardly (below): tokens (B, N, C) that are copied to
images (B, C, H, W) and back around every convolution, attention matrices written out by hand. Both have the same
weights and must agree. timm's DeiT-T is the yardstick of both. Times are medians over alternating runs, on the CPU.

    python benchmarks/l2vit_layout.py --size 224 --batch 8
    python benchmarks/l2vit_layout.py --size 1248 --batch 1 --repeats 5
"""

# ruff: noqa: T201  (a script speaks by printing)

import argparse
import os
import platform
from statistics import median

import timm
import torch
from linvision.models._l2vit_layers import LocalBlock
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from linvision.bench.measure import alternate
from linvision.models.l2vit import L2ViT


def convolve(conv: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Run an image layer on tokens (B, N, C) of an H x W map: copy to an image, run, copy back."""
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size).contiguous()
    return nn.Conv2d.forward(conv, image).flatten(2).transpose(1, 2).contiguous()


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """Run a linear layer as PyTorch does."""
    return linear(x, layer.weight, layer.bias)


def heads(qkv: nn.Linear, x: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Project tokens (B, N, C) to q, k, v, each (B, heads, N, D)."""
    B, N, C = x.shape
    return project(qkv, x).reshape(B, N, 3, num_heads, C // num_heads).permute(2, 0, 3, 1, 4).unbind(0)


def window_attention(attn: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Attend within windows, by explicit attention matrices."""
    (B, _, C), (H, W), w = x.shape, size, attn.window_size
    x = pad(x.view(B, H, W, C), (0, 0, 0, -W % w, 0, -H % w))
    rows, columns = x.shape[1] // w, x.shape[2] // w
    x = x.view(B, rows, w, columns, w, C).transpose(2, 3).contiguous().view(-1, w * w, C)
    q, k, v = heads(attn.qkv, x, attn.num_heads)
    matrices = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    x = project(attn.proj, (matrices @ v).transpose(1, 2).reshape(-1, w * w, C))
    x = x.view(B, rows, columns, w, w, C).transpose(2, 3).contiguous().view(B, rows * w, columns * w, C)
    return x[:, :H, :W].contiguous().view(B, H * W, C)


def linear_attention(attn: nn.Module, x: Tensor) -> Tensor:
    """Attend over all tokens, as the equation stands."""
    q, k, v = heads(attn.qkv, x, attn.num_heads)
    q, k = q.relu(), k.relu()
    denominator = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True).clamp(min=100)
    h = attn.temperature * (q @ (k.transpose(-2, -1) @ v)) / denominator
    return project(attn.proj, h.transpose(1, 2).reshape(x.shape))


def block(layer: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Run a block on tokens."""
    x = x + convolve(layer.cpe[0].proj, x, size)
    if isinstance(layer, LocalBlock):
        x = x + window_attention(layer.attn, layer.norm1(x), size)
        x = x + convolve(layer.cpe[1].proj, x, size)
    else:
        x = x + linear_attention(layer.attn, layer.norm1(x))
        concentration, y = layer.local_mp, layer.norm3(x)
        image = y.transpose(1, 2).reshape(y.shape[0], -1, *size).contiguous()
        image = concentration.bn(concentration.act(nn.Conv2d.forward(concentration.conv1, image)))
        x = x + nn.Conv2d.forward(concentration.conv2, image).flatten(2).transpose(1, 2).contiguous()
    return x + project(layer.mlp.fc2, layer.mlp.act(project(layer.mlp.fc1, layer.norm2(x))))


def straightforward(model: L2ViT, image: Tensor) -> Tensor:
    """Classify images with the weights of ``model``, layer by layer."""
    x, size = image, (image.shape[2], image.shape[3])
    for s, stage in enumerate(model.stages):
        layer = model.downsample_layers[s]
        step = 2 if s else 4
        if s:
            x = layer.norm(x).transpose(1, 2).reshape(x.shape[0], x.shape[2], *size).contiguous()
        x = layer.proj(pad(x, (0, -size[1] % step, 0, -size[0] % step)))
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2).contiguous()
        x = x if s else layer.norm(x)
        for child in stage:
            x = block(child, x, size)
    return model.head(model.norm(x).mean(1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15, help="alternating rounds")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = L2ViT().eval()
    deit = timm.create_model("deit_tiny_patch16_224", img_size=args.size).eval()
    image = torch.randn(args.batch, 3, args.size, args.size)
    contestants = {
        "l2vit_tiny": lambda: model(image),
        "straightforward": lambda: straightforward(model, image),
        "deit_tiny": lambda: deit(image),
    }
    with torch.inference_mode():
        error = (straightforward(model, image) - model(image)).norm() / model(image).norm()
        times = alternate(contestants, rounds=args.repeats, seconds=3600, synchronize=lambda: None)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"images {tuple(image.shape)}, {image.dtype}, {args.repeats} alternating rounds; difference {error:.0e}")
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["straightforward"], strict=True)]
        yardstick = [a / b for a, b in zip(own, times["deit_tiny"], strict=True)]
        print(
            f"{name:16} {1e3 * median(own) / args.batch:8.1f} ms/image, {median(ratios):.2f} of straightforward, "
            f"{median(yardstick):.2f} of DeiT-T"
        )


if __name__ == "__main__":
    main()
