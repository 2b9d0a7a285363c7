"""Sequence mixers as pure functions of tensors, linear in the sequence length."""
