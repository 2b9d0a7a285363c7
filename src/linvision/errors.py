"""The two kinds of failure that a command answers with one line instead of a traceback."""


class UsageError(ValueError):
    """A request that cannot be met as it was put, so that the caller must change it (exit code 2)."""


class RunError(RuntimeError):
    """A sound request that failed on the way, by a file, the network or the numbers (exit code 1)."""
