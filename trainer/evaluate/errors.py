"""Errors of evaluations that a user can act on."""

from trainer.errors import TrainerError


class EvaluationError(TrainerError):
    """An evaluation that cannot start or go on."""


class SubjectError(EvaluationError):
    """A backbone that cannot be measured: it is not there, or its service does not answer."""


class StoreError(EvaluationError):
    """Features that cannot be computed, written or read."""
