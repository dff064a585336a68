"""Weights of other layouts than timm's from the Hugging Face hub: only the files that are needed.

No code of a repository is ever run: what is downloaded is one index and tensors.
"""

import glob
import re
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, snapshot_download

from backbone.checkpoints.files import INDEX_FILES, WEIGHTS_FILES, read_index
from backbone.checkpoints.layouts import OTHER_TOWERS
from backbone.errors import ModelNotFoundError

REACH_ERRORS = (
    hub.HfHubHTTPError,
    hub.LocalEntryNotFoundError,
    hub.OfflineModeIsEnabled,
    ConnectionError,
    TimeoutError,
)
"""What loading fails with when the hub, or the cached copy of it, is out of reach."""


def download(hub_id: str) -> Path:
    """A folder with the weights of a repository; from the cache when they are there.

    Of sharded weights, files that hold nothing but a text tower are left out.

    Raises:
        ModelNotFoundError: no such repository, no access, no weights in it, or no network.
    """
    unreachable: Exception | None = None
    for index, single in zip(INDEX_FILES, WEIGHTS_FILES, strict=True):
        for name in (index, single):
            try:
                path = Path(hf_hub_download(hub_id, name))
                if name == single:
                    return path.parent
                # Names, not patterns: an index that says * would fetch everything.
                names = [glob.escape(name) for name in (index, *needed_files(path))]
                return Path(snapshot_download(hub_id, allow_patterns=names))
            except hub.RepositoryNotFoundError as error:
                raise _refused(hub_id, error) from error
            except hub.RemoteEntryNotFoundError:
                continue  # it has another of the four
            except REACH_ERRORS as error:
                unreachable = error
    if unreachable is not None:
        raise ModelNotFoundError(
            f"the weights of {hub_id} are not here and the hub cannot be reached "
            f"({type(unreachable).__name__}); download them where there is a network "
            f"(hf download {hub_id}) and give the folder as weights"
        ) from unreachable
    raise ModelNotFoundError(
        f"{hub_id} has none of {', '.join((*INDEX_FILES, *WEIGHTS_FILES))}; "
        "download its weights and give the file as weights"
    )


def needed_files(index: Path) -> list[str]:
    """The shards of an index that hold more than a text tower."""
    return sorted(
        {
            name
            for key, name in read_index(index).items()
            if not any(re.match(pattern, key) for pattern in OTHER_TOWERS)
        }
    )


def _refused(hub_id: str, error: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{hub_id} cannot be had from the hub ({type(error).__name__}): it does not exist, or its "
        "owner asks for a licence to be accepted first; accept it on the model's page and log in "
        "with `hf auth login`, or give a folder as weights"
    )
