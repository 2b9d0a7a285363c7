"""GPU kernels in Triton: they need no compiler but Triton's own, which comes with PyTorch for CUDA and for ROCm.

A module an op says what is unsupported and launches kernels; the kernels stand in modules of their own, which import
Triton and are imported at the first launch alone. Nothing that happens on the host depends on values on the device, so
that launches can be captured into a CUDA graph.
"""

from linvision.ops.backends.triton import convolution, gated_norm, mlstm, mlstm_inputs, selective_scan

DEVICE = "cuda"
IMPLEMENTATIONS = {
    "mlstm": mlstm,
    "mlstm_inputs": mlstm_inputs,
    "gated_head_norm": gated_norm,
    "depthwise_conv": convolution,
    "selective_scan": selective_scan,
}
