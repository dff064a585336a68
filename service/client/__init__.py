"""Client of the feature service.

    from service.client import FeatureClient

    with FeatureClient("http://127.0.0.1:8000") as client:
        for index, found in client.stream(paths, size=448):
            ...

`python -m service.client IMAGE... --out features.safetensors` does it from the command line.
Importing this does not import torch.
"""

from service.client.async_client import AsyncFeatureClient
from service.client.errors import (
    AnswerError,
    AuthenticationError,
    ConnectionFailedError,
    DeadlineError,
    FeatureError,
    InputError,
    OverloadedError,
    RefusedError,
    ServerError,
    UnavailableError,
)
from service.client.features import Features
from service.client.requests import FeatureOptions
from service.client.sync_client import FeatureClient
from service.client.tensors import RawTensor

__all__ = [
    "AnswerError",
    "AsyncFeatureClient",
    "AuthenticationError",
    "ConnectionFailedError",
    "DeadlineError",
    "FeatureClient",
    "FeatureError",
    "FeatureOptions",
    "Features",
    "InputError",
    "OverloadedError",
    "RawTensor",
    "RefusedError",
    "ServerError",
    "UnavailableError",
]
