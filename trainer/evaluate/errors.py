"""Errors of evaluations that a user can act on."""

from pydantic import ValidationError

from trainer.errors import TrainerError


class EvaluationError(TrainerError):
    """An evaluation that cannot start or go on."""


class SubjectError(EvaluationError):
    """A backbone that cannot be measured: it is not there, or its service does not answer."""


class StoreError(EvaluationError):
    """Features that cannot be computed, written or read."""


def first_fault(error: ValidationError) -> str:
    """Where a file is not what it should be, and why: "rows.0.spec: Field required"."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']}"
