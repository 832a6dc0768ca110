"""Exceptions of the package: one base class, one subclass per kind of trouble.

Every message says where (layer or argument), what was received, what was expected and how to
fix it. Subclasses also derive from the built-in exception that a caller would expect.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "DataError",
    "ExportError",
    "InvalidArgumentError",
    "KFACPruneError",
    "NonFiniteError",
    "ParityError",
    "UnsupportedModelError",
    "WorkerLostError",
]


class KFACPruneError(Exception):
    """Base class of every error this package raises on purpose."""


class InvalidArgumentError(KFACPruneError, ValueError):
    """An argument has the wrong type, value or combination."""


class UnsupportedModelError(KFACPruneError, TypeError):
    """A model or layer cannot be traced, gated or compacted exactly."""


class BudgetError(KFACPruneError, ValueError):
    """A budget is malformed or cannot be reached on this model."""


class DataError(KFACPruneError, ValueError):
    """A data set is missing, malformed or does not fit the model."""


class NonFiniteError(KFACPruneError, ArithmeticError):
    """Training met NaN or infinite values too many times in a row."""


class ParityError(KFACPruneError, RuntimeError):
    """Two models that must agree do not."""


class ExportError(KFACPruneError, RuntimeError):
    """A model could not be written, converted or verified."""


class WorkerLostError(KFACPruneError, ConnectionError):
    """Another worker of a distributed training has died or cannot be reached."""
