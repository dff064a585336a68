"""Every error that the service answers with: its status, code and body in one place.

A class says what the client did or met; its docstring is what the OpenAPI document shows, so
documentation and answers cannot drift apart.

ServiceError
  MalformedBodyError, MalformedImageError               400
  NotFoundError                                         404
  MethodNotAllowedError                                 405
  NotAcceptableError                                    406
  BodyTooLargeError, TooManyImagesError, ImageTooLargeError   413
  UnsupportedBodyError, UnsupportedImageError           415
  UnknownOptionError, InvalidOptionError, ResponseTooLargeError, UndecodableImageError,
  FeatureOverflowError                                  422
  InternalError, EncodingFailedError                    500
  NotReadyError, DrainingError                          503
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from backbone import errors as backbone_errors


class ErrorDetail(BaseModel):
    """What went wrong, for programs (`code`, `retryable`) and for people (`message`)."""

    model_config = ConfigDict(frozen=True)

    code: str = Field(description="stable name of the error")
    message: str = Field(description="what came, what was wanted, what to do")
    retryable: bool = Field(description="whether the same request may succeed later")
    request_id: str = Field(description="the x-request-id of this answer")
    index: int | None = Field(default=None, description="which image of the request, from 0")


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    model_config = ConfigDict(frozen=True)

    error: ErrorDetail


class ServiceError(Exception):
    """Base of all errors that a client is told about."""

    status: ClassVar[int]
    code: ClassVar[str]
    retryable: ClassVar[bool] = False
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.index = index

    def body(self, request_id: str) -> ErrorBody:
        """The answer's body."""
        return ErrorBody(
            error=ErrorDetail(
                code=self.code,
                message=self.message,
                retryable=self.retryable,
                request_id=request_id,
                index=self.index,
            )
        )


class MalformedBodyError(ServiceError):
    """The body is not what its content type says."""

    status, code = 400, "malformed_body"


class MalformedImageError(ServiceError):
    """An image of a JSON body is not base64."""

    status, code = 400, "malformed_image"


class NotFoundError(ServiceError):
    """No such path."""

    status, code = 404, "not_found"


class MethodNotAllowedError(ServiceError):
    """The path exists, but not for this method."""

    status, code = 405, "method_not_allowed"


class NotAcceptableError(ServiceError):
    """None of the response formats that `Accept` names is offered."""

    status, code = 406, "not_acceptable"


class BodyTooLargeError(ServiceError):
    """The body has more bytes than allowed."""

    status, code = 413, "body_too_large"


class TooManyImagesError(ServiceError):
    """The request has more images than allowed."""

    status, code = 413, "too_many_images"


class ImageTooLargeError(ServiceError):
    """An image has more pixels than allowed."""

    status, code = 413, "image_too_large"


class UnsupportedBodyError(ServiceError):
    """The content type is not one that is read here."""

    status, code = 415, "unsupported_content_type"


class UnsupportedImageError(ServiceError):
    """An image's format or colour mode is not supported."""

    status, code = 415, "unsupported_image"


class UnknownOptionError(ServiceError):
    """An option or key that does not exist."""

    status, code = 422, "unknown_option"


class InvalidOptionError(ServiceError):
    """An option's value is of the wrong type, out of range, or impossible for this model."""

    status, code = 422, "invalid_option"


class ResponseTooLargeError(ServiceError):
    """The features are too many for the response format asked for."""

    status, code = 422, "response_too_large"


class UndecodableImageError(ServiceError):
    """An image is damaged or incomplete."""

    status, code = 422, "undecodable_image"


class FeatureOverflowError(ServiceError):
    """Features of an image do not fit the dtype asked for."""

    status, code = 422, "feature_overflow"


class InternalError(ServiceError):
    """A fault of the service itself; the log has the rest under the request id."""

    status, code = 500, "internal"


class EncodingFailedError(ServiceError):
    """The model failed on an image, in its batch and again alone."""

    status, code = 500, "encoding_failed"


class NotReadyError(ServiceError):
    """The model is still being loaded or warmed up, or its engine has stopped."""

    status, code, retryable = 503, "not_ready", True
    headers: ClassVar[dict[str, str]] = {"retry-after": "1"}


class DrainingError(ServiceError):
    """The service is shutting down; another replica should take the request."""

    status, code, retryable = 503, "draining", True
    headers: ClassVar[dict[str, str]] = {"retry-after": "1"}


_OF_IMAGE_ERROR: dict[type[backbone_errors.ImageError], type[ServiceError]] = {
    backbone_errors.UnsupportedImageError: UnsupportedImageError,
    backbone_errors.UndecodableImageError: UndecodableImageError,
    backbone_errors.ImageTooLargeError: ImageTooLargeError,
    backbone_errors.ImageSizeError: InvalidOptionError,
}


def from_image_error(error: backbone_errors.ImageError, index: int) -> ServiceError:
    """What the client is told about image `index`."""
    return _OF_IMAGE_ERROR[type(error)](f"image {index}: {error}", index=index)


def responses(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may raise `errors`."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for error in sorted(errors, key=lambda error: (error.status, error.code)):
        entry = by_status.setdefault(error.status, {"model": ErrorBody, "description": ""})
        line = f"`{error.code}`: {(error.__doc__ or '').strip()}"
        entry["description"] = f"{entry['description']}\n\n{line}".strip()
    return by_status
