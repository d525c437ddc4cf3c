"""What an acceleration did: replaced, left alone, fell back, and the time spent on either side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass
class PointReport:
    """What became of one function.

    Attributes:
        name: ``"module:function"`` or ``"module:Class.method"``.
        version: the label of the known version that was met; empty if it was skipped.
        skipped: why it was left alone; empty if it was replaced.
        calls: calls that our replacement answered.
        seconds: time spent in them, inner replaced functions included.
        fell_back: reason -> number of calls that went to the original.
        original_seconds: time spent in those.
    """

    name: str
    version: str = ""
    skipped: str = ""
    calls: int = 0
    seconds: float = 0.0
    fell_back: Counter[str] = field(default_factory=Counter)
    original_seconds: float = 0.0


class Report:
    """What was replaced in a project, and the way back; also a context manager that restores on exit.

    >>> with accelerate() as report:  # doctest: +SKIP
    ...     main()
    >>> print(report)  # doctest: +SKIP

    Attributes:
        title: the integration.
        points: one entry for each function met so far, by name; functions are met when their module is loaded.
        notes: what else the user should know.
    """

    def __init__(self, title: str, restore: Callable[[], None]) -> None:
        self.title = title
        self.points: dict[str, PointReport] = {}
        self.notes: list[str] = []
        self._restore = restore

    def restore(self) -> None:
        """Put every original object back; a second call does nothing."""
        self._restore()

    def note(self, text: str) -> None:
        """Add a line, once."""
        if text not in self.notes:
            self.notes.append(text)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    @property
    def replaced(self) -> dict[str, str]:
        """Name -> version of the functions that were replaced."""
        return {name: point.version for name, point in self.points.items() if not point.skipped}

    @property
    def skipped(self) -> dict[str, str]:
        """Name -> reason of the functions that were left alone."""
        return {name: point.skipped for name, point in self.points.items() if point.skipped}

    @property
    def fell_back(self) -> dict[str, dict[str, int]]:
        """Name -> reason -> number of calls that the original answered."""
        return {name: dict(point.fell_back) for name, point in self.points.items() if point.fell_back}

    @property
    def seconds(self) -> dict[str, tuple[float, float]]:
        """Name -> time in our replacement, time in the original when it fell back; functions called so far."""
        return {
            name: (point.seconds, point.original_seconds)
            for name, point in self.points.items()
            if point.calls or point.fell_back
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {
            "title": self.title,
            "replaced": {
                name: {
                    "version": version,
                    "calls": self.points[name].calls,
                    "seconds": round(self.points[name].seconds, 4),
                }
                for name, version in self.replaced.items()
            },
            "skipped": self.skipped,
            "fell_back": {
                name: {"reasons": reasons, "seconds": round(self.points[name].original_seconds, 4)}
                for name, reasons in self.fell_back.items()
            },
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"fastedit: {self.title}"]
        for point in self.points.values():
            if point.skipped:
                lines.append(f"  left alone  {point.name}: {point.skipped}")
                continue
            calls = f"{point.calls} calls, {point.seconds:.2f} s" if point.calls else "not called"
            lines.append(f"  replaced    {point.name} ({point.version}): {calls}")
            lines += [
                f"  fell back   {point.name}, {count} times: {reason}"
                for reason, count in point.fell_back.items()
            ]
        if not self.points:
            lines.append("  nothing was replaced: no module of a project that is known was loaded")
        return "\n".join([*lines, *(f"  note        {note}" for note in self.notes)])
