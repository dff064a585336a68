"""Errors that the user of the trainer can act on.

RefineryError (backbone.errors)
  TrainerError
    RecipeError         a recipe that cannot be read or has values that it must not have
    DataError           images that are missing or cannot be read
    CheckpointError     a checkpoint that is damaged or of another run
    AdapterError        an adapter that is damaged, or of other weights
    NonFiniteError      a loss or gradient that is not a number: the step was not taken
"""

from backbone.errors import RefineryError


class TrainerError(RefineryError):
    """A run that cannot start or go on."""


class RecipeError(TrainerError):
    """A recipe cannot be read, or a value in it is not allowed."""


class DataError(TrainerError):
    """Training images are missing or cannot be read."""


class CheckpointError(TrainerError):
    """A checkpoint is damaged, or belongs to another run."""


class AdapterError(TrainerError):
    """An adapter cannot be read, or does not belong to these weights."""


class NonFiniteError(TrainerError):
    """A loss or gradient is NaN or infinite; the weights were not changed by it."""
