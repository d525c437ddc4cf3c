"""Progress bars for anything that takes over two seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    show: bool | None = None,
) -> tqdm:
    """Return a tqdm bar on standard error.

    Args:
        iterable: what to iterate over, or None to call ``update`` by hand.
        total: number of steps, if the iterable does not know it.
        desc: what is being done, in plain words.
        unit: the word for one step.
        show: True shows the bar, False hides it, None shows it on a terminal only.
    """
    disable = None if show is None else not show
    return tqdm(iterable, total=total, desc=desc, unit=unit, disable=disable, delay=0.5, leave=False)
