"""Is the package called ``fastedit`` ours? Two other distributions install a package of that name.

Installed after ours, one of them overwrites our ``__init__.py``; our other modules are still there and would
fail in odd ways. They import this module first, which says what is wrong instead.
"""

from __future__ import annotations

import sys
import warnings
from importlib import metadata

DISTRIBUTION = "fastedit-llm"
_OTHERS = ("fastedit", "pyfastedit")


def others_installed() -> list[str]:
    """Other distributions on this machine that provide the import name ``fastedit``."""
    found = []
    for name in _OTHERS:
        try:
            found.append(metadata.distribution(name).metadata["Name"])
        except metadata.PackageNotFoundError:
            continue
    return found


def _mend(others: list[str]) -> str:
    return (
        f"pip uninstall -y {' '.join(others or _OTHERS)} {DISTRIBUTION} && pip install {DISTRIBUTION}, or keep "
        "them in different virtual environments"
    )


def check() -> None:
    """Refuse to go on inside another package; warn if another one is installed beside ours.

    Raises:
        ImportError: the package's ``__init__.py`` is not ours; says which distribution it is from, if that
            can be told, and how to mend it.
    """
    package = sys.modules[__name__.rpartition(".")[0]]
    others = others_installed()
    if getattr(package, "DISTRIBUTION", None) != DISTRIBUTION:
        raise ImportError(
            f"{package.__file__} does not belong to {DISTRIBUTION}: another distribution"
            f"{' (' + ', '.join(others) + ')' if others else ''} has installed a package of the same name over "
            f"it. Mend it with: {_mend(others)}"
        )
    if others:
        warnings.warn(
            f"{', '.join(others)} also provides a package called fastedit, in the same place as {DISTRIBUTION}. "
            f"This one is {DISTRIBUTION}; the other is hidden. Better: {_mend(others)}",
            stacklevel=2,
        )


check()
