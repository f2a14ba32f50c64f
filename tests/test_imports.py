"""Imports go one way: the ground floor; models, data; the rest of utils; the programs. Read off the source."""

import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUND = {"utils.run", "utils.distributed", "utils.checkpoint", "utils.options"}
PROGRAMS = {"train_sr", "train_detector", "test"}
FLOORS = {"ground": 0, "models": 1, "data": 1, "utils": 2, "programs": 3}
# models.load is the one way up: what users import is with the networks, and what it gives stands on data, too.
ALLOWED = ("models", "utils.scoring")


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def graph() -> dict[str, set[str]]:
    """Of each module of ours, those of ours that it imports."""
    files = [*ROOT.glob("*.py"), *(f for room in ("models", "data", "utils") for f in (ROOT / room).glob("*.py"))]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    found = {name: imports_of(file) & names.keys() - {name, "utils"} for name, file in names.items()}
    found[ALLOWED[0]].remove(ALLOWED[1])
    return found


def room(module: str) -> str:
    return "ground" if module in GROUND else "programs" if module in PROGRAMS else module.split(".")[0]


def test_imports_go_one_way():
    for module, others in graph().items():
        here = room(module)
        for other in others if here in FLOORS else ():
            assert FLOORS[room(other)] < FLOORS[here] or room(other) == here != "programs", (module, other)


def test_there_is_no_circle():
    graphlib.TopologicalSorter(graph()).prepare()


def test_what_runs_before_pytorch_imports_nothing_that_takes_time():
    for name in ("options", "__init__", "launch"):
        modules = {module.split(".")[0] for module in imports_of(ROOT / "utils" / f"{name}.py")}
        assert modules <= sys.stdlib_module_names
