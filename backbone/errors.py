"""Errors that a caller of `backbone` can act on.

RefineryError
  ImageError                what is wrong with one image; costs nobody else anything
    UnsupportedImageError     the bytes are not of a format that is read here
    UndecodableImageError     the format is known, the file is broken
    ImageTooLargeError        more pixels than allowed
    ImageSizeError            a size that the patch grid cannot have
  ModelError                what is wrong with a backbone or its files
    ModelNotFoundError        no such model, or its weights cannot be had
    ArtifactError             an artifact folder that is damaged or of another schema
  DeviceError               a device that is not here, or that PyTorch cannot use
"""


class RefineryError(Exception):
    """Base of every error that the project raises for its users."""


class ImageError(RefineryError):
    """One image cannot be used."""


class UnsupportedImageError(ImageError):
    """The bytes are not an image of a supported format or colour mode."""


class UndecodableImageError(ImageError):
    """The image's format is known, but its data are damaged or incomplete."""


class ImageTooLargeError(ImageError):
    """The image's header declares more pixels than are allowed."""


class ImageSizeError(ImageError):
    """A size in pixels that does not fit the patch grid."""


class ModelError(RefineryError):
    """A backbone cannot be built, loaded or saved."""


class ModelNotFoundError(ModelError):
    """No model of that name or path, or its weights cannot be reached."""


class ArtifactError(ModelError):
    """An artifact folder is incomplete, damaged, or of an unknown schema."""


class DeviceError(RefineryError):
    """There is no such device, or PyTorch cannot use it."""
