"""Tests that a package imports only packages of lower levels.

The levels from top to bottom are: programs and tools; evaluation; data and models; utils.
"""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("utils", "data", "models", "evaluation", "tools")
PROGRAMS = ("train_sr", "train_detector", "test", "hubconf")
MAY_IMPORT = {
    "utils": {"utils"},
    "data": {"data", "utils"},
    "models": {"models", "utils"},
    "evaluation": {"evaluation", "data", "models", "utils"},
    "tools": {"tools", "evaluation", "data", "models", "utils"},
    "programs": {"evaluation", "data", "models", "utils"},
}


def map_module_names_to_files() -> dict[str, Path]:
    """Return a dict from module name to source file, without tests and benchmarks."""
    files = [ROOT / f"{name}.py" for name in PROGRAMS]
    for package in PACKAGES:
        files += sorted((ROOT / package).glob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


def list_imported_modules(file: Path) -> set[str]:
    """Return the names of all modules that a source file imports at the top level or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def get_package_of_module(module: str) -> str:
    """Return the name of the package of a module, or "programs" if the module is a program such as test.py."""
    return "programs" if module in PROGRAMS else module.split(".")[0]


def map_modules_to_imported_project_modules() -> dict[str, set[str]]:
    """Return a dict from the name of a module to the names of the project's modules that this module imports."""
    files = map_module_names_to_files()
    return {name: list_imported_modules(file) & files.keys() - {name} for name, file in files.items()}


@pytest.mark.parametrize("module", sorted(map_module_names_to_files()))
def test_a_module_imports_only_from_its_own_and_lower_packages(module):
    imported = {get_package_of_module(other) for other in map_modules_to_imported_project_modules()[module]}
    assert imported <= MAY_IMPORT[get_package_of_module(module)]


def test_the_modules_have_no_import_cycle():
    imports = map_modules_to_imported_project_modules()
    # Imports of whole packages are removed, because evaluation/__init__.py imports modules of its own package
    for package in PACKAGES:
        for others in imports.values():
            others.discard(package)
    graphlib.TopologicalSorter(imports).prepare()
