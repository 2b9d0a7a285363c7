"""Plain PyTorch, on any device and of any type: what is faster here than an op's reference form.

Where nothing is listed, the reference form itself runs.
"""

from linvision.ops.backends.plain import mlstm, selective_scan

DEVICE = None
IMPLEMENTATIONS = {"mlstm": mlstm, "selective_scan": selective_scan}
