"""Every error that the service answers with: its status, code and body in one place.

A class says what the client did or met; its docstring is what the OpenAPI document shows, so
documentation and answers cannot drift apart.

ServiceError
  MalformedRequestError, MalformedBodyError, MalformedImageError, MalformedPixelsError,
  InvalidDeadlineError                                  400
  UnauthorizedError                                     401
  ForbiddenError, UrlRefusedError                       403
  NotFoundError, UnknownModelError                      404
  MethodNotAllowedError                                 405
  NotAcceptableError                                    406
  BodyTooSlowError                                      408
  ConflictError                                         409
  BodyTooLargeError, TooManyImagesError, ImageTooLargeError   413
  UnsupportedBodyError, UnsupportedImageError           415
  UnknownOptionError, InvalidOptionError, TooManyLayersError, TooManyBoxesError,
  ResponseTooLargeError, UndecodableImageError, FeatureOverflowError, ModelLoadError    422
  OverloadedError                                       429
  HeadersTooLargeError                                  431
  InternalError, EncodingFailedError                    500
  UrlFetchError                                         502
  NotReadyError, DrainingError                          503
  DeadlineError                                         504
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
    headers: dict[str, str] = {}

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


class MalformedRequestError(ServiceError):
    """What came is not HTTP/1.1."""

    status, code = 400, "malformed_request"


class MalformedBodyError(ServiceError):
    """The body is not what its content type says."""

    status, code = 400, "malformed_body"


class MalformedImageError(ServiceError):
    """An image of a JSON body is not base64."""

    status, code = 400, "malformed_image"


class MalformedPixelsError(ServiceError):
    """A body of raw pixels is no uint8 array [B, H, W, 3]."""

    status, code = 400, "malformed_pixels"


class InvalidDeadlineError(ServiceError):
    """`x-deadline-ms` is no positive number of milliseconds."""

    status, code = 400, "invalid_deadline"


class UnauthorizedError(ServiceError):
    """The request has no valid API key."""

    status, code = 401, "unauthorized"
    headers = {  # Basic first: some browsers look at the first only.
        "www-authenticate": 'Basic realm="vit-refinery", Bearer realm="vit-refinery"'
    }


class ForbiddenError(ServiceError):
    """The API key does not have the right that the route needs."""

    status, code = 403, "forbidden"


class UrlRefusedError(ServiceError):
    """An image's URL leads where the operator does not allow it."""

    status, code = 403, "url_refused"


class NotFoundError(ServiceError):
    """No such path."""

    status, code = 404, "not_found"


class MethodNotAllowedError(ServiceError):
    """The path exists, but not for this method."""

    status, code = 405, "method_not_allowed"


class UnknownModelError(ServiceError):
    """No model of that name is served."""

    status, code = 404, "unknown_model"


class NotAcceptableError(ServiceError):
    """None of the response formats that `Accept` names is offered."""

    status, code = 406, "not_acceptable"


class BodyTooSlowError(ServiceError):
    """The body took longer to arrive than allowed."""

    status, code, retryable = 408, "body_too_slow", True


class ConflictError(ServiceError):
    """What is asked for contradicts what is served."""

    status, code = 409, "conflict"


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


class TooManyLayersError(ServiceError):
    """The request asks for more layers than allowed."""

    status, code = 422, "too_many_layers"


class TooManyBoxesError(ServiceError):
    """The request has more boxes, or asks for more vectors of boxes, than allowed."""

    status, code = 422, "too_many_boxes"


class ModelLoadError(ServiceError):
    """A model could not be loaded."""

    status, code = 422, "model_not_loaded"


class UnknownOptionError(ServiceError):
    """An option or key that does not exist."""

    status, code = 422, "unknown_option"


class InvalidOptionError(ServiceError):
    """An option's value is of the wrong type, out of range, or impossible for this model."""

    status, code = 422, "invalid_option"


class ResponseTooLargeError(ServiceError):
    """The features are too many for one answer, or for the response format asked for."""

    status, code = 422, "response_too_large"


class UndecodableImageError(ServiceError):
    """An image is damaged or incomplete."""

    status, code = 422, "undecodable_image"


class FeatureOverflowError(ServiceError):
    """Features of an image do not fit the dtype asked for."""

    status, code = 422, "feature_overflow"


class OverloadedError(ServiceError):
    """As much work waits as is allowed to; `Retry-After` says when there will be room."""

    status, code, retryable = 429, "overloaded", True

    def __init__(self, message: str, *, retry_seconds: int = 1) -> None:
        super().__init__(message)
        self.headers = {"retry-after": str(retry_seconds)}


class HeadersTooLargeError(ServiceError):
    """The request's line and headers have more bytes than allowed."""

    status, code = 431, "headers_too_large"


class InternalError(ServiceError):
    """A fault of the service itself; the log has the rest under the request id."""

    status, code = 500, "internal"


class EncodingFailedError(ServiceError):
    """The model failed on an image, in its batch and again alone."""

    status, code = 500, "encoding_failed"


class UrlFetchError(ServiceError):
    """The image behind a URL could not be fetched."""

    status, code, retryable = 502, "url_not_fetched", True


class NotReadyError(ServiceError):
    """The model is still being loaded or warmed up, or its engine has stopped."""

    status, code, retryable = 503, "not_ready", True
    headers = {"retry-after": "1"}


class DrainingError(ServiceError):
    """The service is shutting down; another replica should take the request."""

    status, code, retryable = 503, "draining", True
    headers = {"retry-after": "1"}


class DeadlineError(ServiceError):
    """The answer was not ready by the request's deadline."""

    status, code, retryable = 504, "deadline_exceeded", True


_OF_IMAGE_ERROR: dict[type[backbone_errors.ImageError], type[ServiceError]] = {
    backbone_errors.UnsupportedImageError: UnsupportedImageError,
    backbone_errors.UndecodableImageError: UndecodableImageError,
    backbone_errors.ImageTooLargeError: ImageTooLargeError,
    backbone_errors.ImageSizeError: InvalidOptionError,
}


def from_image_error(error: backbone_errors.ImageError, index: int) -> ServiceError:
    """What the client is told about image `index`."""
    return _OF_IMAGE_ERROR[type(error)](f"image {index}: {error}", index=index)


# Errors that are about one image when they come up while one is worked on.
_OF_ONE_IMAGE = (
    BodyTooLargeError,  # a file behind a URL
    EncodingFailedError,
    ImageTooLargeError,
    InvalidOptionError,
    UrlFetchError,
    UrlRefusedError,
)


def about_image(error: backbone_errors.ImageError | ServiceError, index: int) -> ServiceError:
    """What the client is told when `error` came up with image `index`."""
    if isinstance(error, backbone_errors.ImageError):
        return from_image_error(error, index)
    if error.index is None and isinstance(error, _OF_ONE_IMAGE):
        return type(error)(f"image {index}: {error}", index=index)
    return error


def responses(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may raise `errors`."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for error in sorted(errors, key=lambda error: (error.status, error.code)):
        entry = by_status.setdefault(error.status, {"model": ErrorBody, "description": ""})
        line = f"`{error.code}`: {(error.__doc__ or '').strip()}"
        entry["description"] = f"{entry['description']}\n\n{line}".strip()
    return by_status
