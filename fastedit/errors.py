"""The exceptions of fastedit. Every message says what was expected, what came, and what to do."""

from . import _identity  # noqa: F401  refuses to run inside another package of the same name


class FasteditError(Exception):
    """Base class of all errors that fastedit raises on purpose."""


class BackendUnavailable(FasteditError, RuntimeError):
    """A backend was asked for by name and cannot serve; the message carries the registry's reason."""


class UnsupportedModel(FasteditError, ValueError):
    """The model's layout is not known and could not be found by structure."""


class NumericalError(FasteditError, ArithmeticError):
    """A factorisation or an optimisation failed; names the layer or fact and what to change."""


class BaseMismatch(FasteditError, ValueError):
    """An edit or a statistic was made on another model than the one it is to be used on."""


class InvalidFact(FasteditError, ValueError):
    """A fact cannot be edited as it is given; the message names the fact and the reason."""


class CorruptFile(FasteditError, ValueError):
    """A file is truncated, has a wrong checksum, or is not what its name says."""
