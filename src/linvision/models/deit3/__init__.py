"""DeiT-III (arXiv 2204.07118), the quadratic yardstick."""
