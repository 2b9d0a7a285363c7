"""Imports flow one way: ops -> models -> tasks -> cli."""

import ast
from pathlib import Path

import linvision

SOURCE = Path(linvision.__file__).parent
# What each room may import from the package; data, errors and recipes serve the rooms above them.
MAY_IMPORT = {
    "ops": {"ops"},
    "models": {"ops", "models", "errors"},
    "data": {"data", "errors", "models"},
    "tasks": {"ops", "models", "data", "tasks", "errors"},
}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {module.split(".")[1] for module in modules if module.startswith("linvision.")}
    return {room for room in rooms if (SOURCE / room).is_dir() or (SOURCE / f"{room}.py").is_file()}


def test_imports_flow_down():
    upward = [
        f"{path.relative_to(SOURCE)} imports {', '.join(sorted(imported_rooms(path) - allowed))}"
        for room, allowed in MAY_IMPORT.items()
        for path in sorted((SOURCE / room).rglob("*.py"))
        if imported_rooms(path) - allowed
    ]
    assert upward == []
    assert imported_rooms(SOURCE / "models" / "vil.py") == {"models"}
