"""One safetensors file with the features of many images, written while they come.

The format wants its header first, and the header knows where every tensor lies: so tensors are
spooled beside the file, and put together at the end. Memory holds one image's features and a few
hundred bytes about each image.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from service.client.features import Features
from service.client.tensors import RawTensor

_HEADER_BYTES = 100_000_000  # the format's own bound
_COPY_BYTES = 1 << 20
# What all images of a file have in common.
_COMMON = ("model", "model_digest", "patch_size", "layer_numbers", "dtype", "layout")


class FeatureFileError(Exception):
    """Features that the file cannot hold."""


class FeatureFile:
    """Collects features; `save` makes the file, whole or not at all.

        with FeatureFile(Path("features.safetensors")) as file:
            file.add("cat.jpg", features)
            file.save()

    Tensors are called `NAME`, and `NAME.layer11` where there are several layers; what else was
    asked for follows as `NAME.cls`, `NAME.scale`, `NAME.layer11.spurious`. The metadata `images`
    is a JSON list of what is known about each image. Numbers are as the service sent them: int8
    is to be multiplied by `NAME.scale`.

    Args:
        path: The file; replaced only by a whole one.

    Raises:
        OSError: its folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Wide numbers first, so that every tensor of the file lies at a multiple of its width.
        self._spools: dict[int, IO[bytes]] = {}
        with contextlib.ExitStack() as stack:
            for width in (4, 2, 1):
                self._spools[width] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            self._stack = stack.pop_all()
        self._tensors: list[tuple[str, RawTensor, int]] = []
        self._images: list[dict[str, Any]] = []
        self._common: dict[str, Any] = {}

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def num_images(self) -> int:
        """Images added so far."""
        return len(self._images)

    def add(self, name: str, features: Features) -> None:
        """Add an image.

        Raises:
            FeatureFileError: its features are of another model or form than those before.
            OSError: the disk is full.
        """
        common = {field: getattr(features, field) for field in _COMMON}
        self._common = self._common or common
        for field, value in common.items():
            if value != self._common[field]:
                raise FeatureFileError(
                    f"{name} has {field} {value}, the images before {self._common[field]}; "
                    "was the model changed meanwhile?"
                )
        has_layers = len(features.layer_numbers) > 1
        for (layer, part), tensor in features.tensors.items():
            full_name = name + f".layer{layer}" * has_layers + f".{part}" * (part != "features")
            spool = self._spools[tensor.item_bytes]
            # What is remembered of a tensor must not keep its bytes.
            empty = RawTensor(tensor.dtype, tensor.shape, memoryview(b""))
            self._tensors.append((full_name, empty, spool.tell()))
            spool.write(tensor.data)
        self._images.append(
            {
                "name": name,
                "grid": features.grid,
                "original_size": features.original_size,
                "resized_to": features.resized_to,
                "bucket": features.bucket,
                "affine": features.affine,
            }
        )

    def save(self) -> None:
        """Write the file, and replace the one that may be there.

        Raises:
            FeatureFileError: nothing was added, or too many images for one header.
            OSError: the disk is full.
        """
        if not self._images:
            raise FeatureFileError("there are no features to save")
        header = self._header()
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".features.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for spool in self._spools.values():
                    spool.seek(0)
                    shutil.copyfileobj(spool, file, _COPY_BYTES)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's is for its owner alone
            os.replace(temporary, self._path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _header(self) -> bytes:
        starts, start = {}, 0
        for width, spool in self._spools.items():
            starts[width] = start
            start += spool.tell()
        common = {
            "layers" if field == "layer_numbers" else field: value
            for field, value in self._common.items()
        }
        entries: dict[str, Any] = {
            "__metadata__": {
                name: value if isinstance(value, str) else orjson.dumps(value).decode()
                for name, value in {**common, "images": self._images}.items()
            }
        }
        for name, tensor, offset in self._tensors:
            begin = starts[tensor.item_bytes] + offset
            entries[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": (begin, begin + tensor.num_bytes),
            }
        header = orjson.dumps(entries)
        header += b" " * (-len(header) % 8)
        if len(header) > _HEADER_BYTES:
            raise FeatureFileError(
                f"{self.num_images} images need a header of {len(header)} bytes, and safetensors "
                f"ends at {_HEADER_BYTES}; make several files"
            )
        return header


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
