"""Imports point down: the house in DESIGN.md, held by a test.

The check reads the source; nothing is imported. Imports inside functions count too (a lazy import
upwards is still a dependency upwards); those under ``if TYPE_CHECKING:`` do not.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A module may import from its own floor and from those before it.
FLOORS = [
    "torch_private",
    "errors",
    "kernels",
    "settings",
    "distributions",
    "params",
    "engine",
    "poutine",
    "primitives",
    "util",
    "nn",
    "optim",
    "infer",
    "",  # the public face, `import fastsvi as pyro`
    "contrib",
    "interop",
    "examples",
    "cli",
    "__main__",
]
MAX_LINES = 500
# What a floor may need from outside; everything else is a dependency we did not mean to take.
KERNEL_IMPORTS = {"torch", "triton", "fastsvi", "__future__"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT / "fastsvi", "fastsvi"), (ROOT / "kernels", "fastsvi.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()
STDLIB = set(sys.stdlib_module_names)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def imports(name: str, *, top_level_only: bool = False) -> set[str]:
    """Names of the modules that module ``name`` imports, as absolute dotted names."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if is_type_checking(node):
            return
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found


def floor(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_module_has_a_floor():
    unknown = {name for name in MODULES if floor(name) and floor(name) not in FLOORS}
    assert not unknown, f"put these on a floor of tests/test_layers.py: {sorted(unknown)}"


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name)])
def test_imports_point_down(name):
    allowed = FLOORS[: FLOORS.index(floor(name)) + 1]
    up = {
        other
        for other in imports(name)
        if other.split(".")[0] == "fastsvi" and floor(other) not in allowed
    }
    assert not up, f"{name} imports from floors above its own: {sorted(up)}"


def test_no_import_cycles():
    graph = {
        name: {other for other in imports(name, top_level_only=True) if other in MODULES}
        for name in MODULES
    }
    state: dict[str, str] = {}

    def walk(name: str, trail: list[str]) -> None:
        if state.get(name) == "done":
            return
        if state.get(name) == "open":
            pytest.fail("import cycle: " + " -> ".join([*trail[trail.index(name) :], name]))
        state[name] = "open"
        for other in sorted(graph[name]):
            # Importing a sub-module runs its package first; the package importing it back is
            # how every __init__ works, and not a cycle.
            if not name.startswith(other + "."):
                walk(other, [*trail, name])
        state[name] = "done"

    for name in graph:
        walk(name, [])


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) == "kernels"])
def test_kernels_stand_on_torch_and_triton_alone(name):
    outside = {other.split(".")[0] for other in imports(name)} - KERNEL_IMPORTS
    assert not outside - STDLIB, f"{name} imports {sorted(outside - STDLIB)}"


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short_and_clean(name):
    path = MODULES[name]
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, f"{path} has {len(lines)} lines; one concept per file"
    for node in ast.walk(tree(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"bare assert at {where}: raise a typed error"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception", "BaseException"), f"broad except at {where}"
