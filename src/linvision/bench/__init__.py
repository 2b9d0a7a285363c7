"""The command ``linvision bench``: time and memory of models and ops beside their peers, in one process.

Read in this order: ``options`` (what is asked for), ``contenders``, ``models`` and ``ops`` (what runs), ``measure``
(times, ratios, growth), ``probe`` (memory, in processes of their own), ``machine`` (what it ran on, and its peaks),
``command`` (the whole), ``report``, ``tables`` and ``picture`` (what comes out).
"""

from linvision.bench.command import bench
from linvision.bench.options import BenchOptions

__all__ = ["BenchOptions", "bench"]
