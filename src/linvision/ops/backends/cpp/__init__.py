"""CPU kernels in C++: compiled once for several instruction sets, called through ctypes, tied to no torch version."""

from linvision.ops.backends.cpp import (
    convolution,
    gated_norm,
    linear,
    mlp,
    mlstm,
    mlstm_inputs,
    projected_mlstm,
    selective_scan,
    window_attention,
)

DEVICE = "cpu"
IMPLEMENTATIONS = {
    "mlstm": mlstm,
    "mlstm_inputs": mlstm_inputs,
    "projected_mlstm": projected_mlstm,
    "gated_head_norm": gated_norm,
    "depthwise_conv": convolution,
    "selective_scan": selective_scan,
    "linear": linear,
    "mlp": mlp,
    "window_attention": window_attention,
}
