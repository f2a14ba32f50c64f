"""Imports go one way: the ground floor; models, data; the rest of utils; the programs. Read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"utils.run", "utils.distributed", "utils.checkpoint", "utils.options"}
PROGRAMS = {"train_sr", "train_detector", "test"}
# models.load is the one way up: what users import is with the networks, and what it gives stands on data, too.
ALLOWED = {("models", "utils.scoring")}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *(f for room in ("models", "data", "utils") for f in (ROOT / room).glob("*.py"))]
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    return {name.removesuffix(".__init__"): f for f, name in names.items()}


def imported_by(file: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known


GRAPH = {name: imported_by(file, set(modules())) for name, file in modules().items()}
EDGES = {(name, other) for name, others in GRAPH.items() for other in others} - ALLOWED


def storey(module: str) -> str:
    return "ground" if module in GROUND else "programs" if module in PROGRAMS else module.split(".")[0]


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("ground", {"models", "data", "utils", "programs"}),
        ("models", {"data", "utils", "programs"}),
        ("data", {"models", "utils", "programs"}),
        ("utils", {"programs"}),
        ("programs", {"programs"}),
    ],
)
def test_imports_go_one_way(below, above):
    edges = EDGES - {("utils", "utils")}
    assert [(a, b) for a, b in sorted(edges) if storey(a) == below and storey(b) in above and b != "utils"] == []


def test_there_is_no_circle():
    left = dict(GRAPH) | {"models": GRAPH["models"] - {"utils.scoring"}}
    while left:
        free = {name for name, others in left.items() if not others - {name} & left.keys()}
        assert free, left
        left = {name: others - free for name, others in left.items() if name not in free}


def test_options_import_nothing_that_takes_time():
    names = set()
    for file in (ROOT / "utils" / "options.py", ROOT / "utils" / "__init__.py", ROOT / "utils" / "launch.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    standard = {
        "argparse",
        "collections.abc",
        "functools",
        "math",
        "os",
        "pathlib",
        "signal",
        "socket",
        "subprocess",
        "sys",
        "time",
    }
    assert names <= standard
