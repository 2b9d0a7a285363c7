"""How anything is trained: settings, loop, checkpoints, run folder, progress; which task it is, tasks say.

Nothing is imported here, so that the command line can read settings without torch.
"""
