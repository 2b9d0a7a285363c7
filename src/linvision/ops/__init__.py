"""Sequence mixers as pure functions of tensors, linear in the sequence length."""

from linvision.ops._dispatch import BackendError, use_backend
from linvision.ops.mlstm import MLSTMState, mlstm, mlstm_parallel, mlstm_recurrent
from linvision.ops.selective_scan import selective_scan, selective_scan_sequential

__all__ = [
    "BackendError",
    "MLSTMState",
    "mlstm",
    "mlstm_parallel",
    "mlstm_recurrent",
    "selective_scan",
    "selective_scan_sequential",
    "use_backend",
]
