"""Faster bodies of the ops: one folder a backend."""
