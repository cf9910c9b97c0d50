"""Keeps the working folder off the import path, so that a user's random.py, numpy.py or datasets/ is never imported.

`python -m` and `python -c` put the working folder first on the import path. It is removed in modules of this package
that are started by `-m`, and in the Python processes that they start.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGE = "megastruct"
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that holds this package


def leave_out_working_folder() -> None:
    """Remove the working folder from the import path; for a module started by `python -m`, before its other imports."""
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]
    if getattr(sys.modules[_PACKAGE], "__file__", None) is None:  # some other folder `megastruct` was found there
        for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
            del sys.modules[name]


def import_variables() -> dict[str, str]:
    """The environment variables with which a Python process imports this package, and nothing from the working folder.

    These are PYTHONSAFEPATH, and PYTHONPATH where it is needed.
    """
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if _ROOT not in [*paths, *site.getsitepackages(), site.getusersitepackages()]:
        paths.insert(0, _ROOT)
    return {"PYTHONSAFEPATH": "1", **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


@contextmanager
def import_variables_set() -> Iterator[None]:
    """Put `import_variables` into the environment, for processes that are started inside the `with` block."""
    variables = import_variables()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
