"""GPU kernels in Triton: they need no compiler but Triton's own, which comes with PyTorch for CUDA and for ROCm.

Each op has a body here (``mlstm``, ``selective_scan``), which says what it refuses and launches kernels; the kernels
stand in modules of their own, which import Triton and are imported at the first launch alone. Nothing that happens on
the host depends on values on the device, so that launches can be captured into a CUDA graph.
"""
