"""Time and memory of models and ops beside their peers, in one process.

Read in this order: ``options`` and ``plan`` (what is asked for), ``contenders``, ``models`` and ``ops`` (what runs),
``measure`` (times, ratios, growth), ``probe`` (memory, in processes of their own), ``machine`` (what it ran on, and its
peaks), ``command`` (the whole), ``report``, ``tables`` and ``picture`` (what comes out). Nothing is imported here, so
that the command line can read the options without torch.
"""
