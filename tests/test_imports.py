"""Imports flow down: ops -> models -> tasks -> commands; every file of the package is held to it."""

import ast
from pathlib import Path

import linvision

SOURCE = Path(linvision.__file__).parent
TOOLS = {"errors", "console", "files", "devices", "interruption", "records"}  # the house's own, which any room may use
# What each room may import from the package. A name that is missing here fails the test.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "console": {"errors", "files"},
    "files": set(),
    "interruption": set(),
    "devices": {"errors"},
    "records": {"errors"},
    "ops": {"ops", *TOOLS},
    "models": {"ops", "models", *TOOLS},
    "data": {"data", *TOOLS},
    "training": {"", "models", "data", "training", *TOOLS},
    "recipes": {"training", "recipes", *TOOLS},
    "tasks": {"ops", "models", "data", "training", "tasks", *TOOLS},
    "bench": {"", "ops", "models", "bench", *TOOLS},
    "commands": {"models", "data", "training", "recipes", "tasks", "bench", "commands", *TOOLS},
    "cli": {"", "commands", *TOOLS},
    "__main__": {"cli"},
    "__init__": {"ops", "models", "tasks"},
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """Name the rooms that a module imports from; "" is the package itself."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            inside = [alias.name for alias in node.names]
        else:
            continue
        names = [name.split(".") for name in inside if name.split(".")[0] == "linvision"]
        rooms |= {name[1] if len(name) > 1 else "" for name in names}
    known = {room_of(path) for path in SOURCE.rglob("*.py")}
    return {room if room in known else "" for room in rooms}


def test_imports_flow_down():
    upward = []
    for path in sorted(SOURCE.rglob("*.py")):
        wrong = imported_rooms(path.read_text()) - MAY_IMPORT[room_of(path)]
        if wrong:
            upward.append(f"{path.relative_to(SOURCE)} imports {', '.join(sorted(wrong)) or 'the package itself'}")
    assert upward == []


def test_every_form_of_import_is_seen():
    assert imported_rooms("import linvision.tasks.classify as x\nfrom linvision import ops, create_model") == {
        "tasks",
        "ops",
        "",
    }
    assert imported_rooms("import torch\nimport linvision") == {""}
    assert imported_rooms("def f():\n    from linvision.bench import bench") == {"bench"}
