"""Let torch.hub.load(CHECKOUT, "detector", source="local", checkpoint="best.pth.tar") return a trained detector."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

dependencies = ["torch", "numpy", "PIL", "tqdm"]

CHECKOUT = str(Path(__file__).resolve().parent)
PACKAGES = ("models", "data", "utils", "evaluation")


def detector(checkpoint: str, **options):
    """Load a trained detector. The docstring of `evaluation.load` explains the arguments."""
    if is_project_already_imported():
        from evaluation import load

        return load(checkpoint, **options)
    with let_import_find_project_packages():
        from evaluation import load

        return load(checkpoint, **options)


def is_project_already_imported() -> bool:
    """Return whether the calling program has already imported packages of this checkout."""
    module = sys.modules.get("models")
    return module is not None and str(getattr(module, "__file__", "")).startswith(CHECKOUT)


@contextlib.contextmanager
def let_import_find_project_packages() -> Iterator[None]:
    """Make `import` find the packages of this checkout inside a `with` block.

    After the block, the modules of the calling program that have the same names are restored.
    """
    callers = pop_modules_with_project_package_names()
    sys.path.insert(0, CHECKOUT)
    try:
        yield
    finally:
        sys.path.remove(CHECKOUT)
        pop_modules_with_project_package_names()
        sys.modules.update(callers)


def pop_modules_with_project_package_names() -> dict:
    """Remove the modules of PACKAGES from `sys.modules`. Returns a dict of the removed modules, by name."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
