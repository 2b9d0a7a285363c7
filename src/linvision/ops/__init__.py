"""Sequence mixers as pure functions of tensors, linear in the sequence length."""

from linvision.ops.mlstm import MLSTMState, mlstm, mlstm_parallel, mlstm_recurrent

__all__ = ["MLSTMState", "mlstm", "mlstm_parallel", "mlstm_recurrent"]
