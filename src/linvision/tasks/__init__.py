"""Tasks: what a model learns, how it is measured and what is drawn. Each is one file, and a line here.

Nothing of them is imported before it is asked for, so that the command line can name them without torch.
"""

import pkgutil
from typing import TYPE_CHECKING

from linvision.errors import UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from linvision.training.task import Task

TASKS: dict[str, str] = {"classify": "linvision.tasks.classify:Classification"}


def get_task(name: str) -> "Task":
    """Return a task by its name.

    Raises:
        UnknownNameError: there is none of that name; the nearest ones are named.
    """
    if name not in TASKS:
        raise UnknownNameError(f"no task is called {name}{did_you_mean(name, TASKS)}; known are {', '.join(TASKS)}")
    return pkgutil.resolve_name(TASKS[name])()
