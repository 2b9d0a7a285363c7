"""Linear-time vision backbones: ViL, Vim and L2ViT, with DeiT-III as the quadratic yardstick."""

__version__ = "0.1.0"
