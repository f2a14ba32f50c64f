"""Let torch.hub load a trained detector with the function `detector`.

    torch.hub.load(CHECKOUT, "detector", source="local", checkpoint="best.pth.tar")

CHECKOUT is the folder of this project.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

dependencies = ["torch", "numpy", "PIL", "tqdm"]

CHECKOUT = Path(__file__).resolve().parent
PACKAGES = ("models", "data", "utils", "evaluation")


def detector(checkpoint: str, **arguments):
    """Load a trained detector, with the arguments of `evaluation.load`."""
    import_context = contextlib.nullcontext() if is_project_already_imported() else put_project_packages_first()
    with import_context:
        from evaluation import load

        return load(checkpoint, **arguments)


def is_project_already_imported() -> bool:
    """Return whether the calling program has already imported packages of this checkout."""
    file = getattr(sys.modules.get("models"), "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(CHECKOUT)


@contextlib.contextmanager
def put_project_packages_first() -> Iterator[None]:
    """Create a context in which import statements import the packages in PACKAGES from this checkout.

    At the end of the `with` block, the calling program's own modules with the same names, such as `models`, are put
    back into `sys.modules`.
    """
    callers = pop_modules_with_project_package_names()
    sys.path.insert(0, str(CHECKOUT))
    try:
        yield
    finally:
        sys.path.remove(str(CHECKOUT))
        pop_modules_with_project_package_names()
        sys.modules.update(callers)


def pop_modules_with_project_package_names() -> dict:
    """Remove the packages in PACKAGES and their submodules from `sys.modules`, and return them by name."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
