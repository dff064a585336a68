"""What went wrong with Redis, as the few kinds that are counted."""

from redis import exceptions

from service.cache.metrics import ErrorKind


def error_kind(error: Exception) -> ErrorKind:
    if isinstance(error, exceptions.OutOfMemoryError):
        return "full"
    if isinstance(error, TimeoutError | exceptions.TimeoutError):
        return "timeout"
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
        # They are connection errors to redis-py, but another network would not help.
        return "other"
    if isinstance(error, OSError | exceptions.ConnectionError):
        return "connection"
    return "other"
