"""The error of zero-shot evaluations that a user can act on."""

from trainer.evaluate.errors import EvaluationError


class ZeroshotError(EvaluationError):
    """Text and image features that cannot be compared, or classes that cannot be named."""
