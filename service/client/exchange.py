"""Images on their way to their features, without input or output: what both clients share.

An `Exchange` holds a few images until each has its outcome. It says what to send next, and how
long to wait before.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from service.client.errors import AnswerError, FeatureError, InputError
from service.client.features import Features
from service.client.images import read_image
from service.client.requests import Body, Box, Item, make_body
from service.client.retry import Deadline, Tries

SAFETENSORS = "application/x-safetensors"
FRAMES = "application/x-refinery-frames"
# Half of what the service takes by default. What is beyond goes in a request of its own.
_MAX_BODY_BYTES = 16 * 1024 * 1024

Mode = Literal["all", "partial", "frames"]
Outcome = tuple[int, Features | FeatureError]


class Source(NamedTuple):
    """An image as the caller gave it."""

    number: int  # in the call, from 0
    image: Any
    boxes: Sequence[Box] | None


class Exchange:
    """A few images that go together: in one request, unless they are very large.

    Args:
        sources: The images.
        options: As `FeatureOptions`.
        mode: `all`: one image without features fails the call; `partial`: each image has its own
            outcome; `frames`: the same, and each as soon as it is there.
        deadline: Of the call.
        max_retries: Tries after the first.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        options: Mapping[str, object],
        *,
        mode: Mode,
        deadline: Deadline,
        max_retries: int,
    ) -> None:
        self._sources = sources
        self._options = options if mode == "all" else {**options, "partial": True}
        self._mode = mode
        self._deadline = deadline
        self._tries = Tries(max_retries, deadline)
        self._pending: dict[int, Item] = {}
        self._sent: list[Item] = []
        self._reason: FeatureError | None = None

    def is_pending(self) -> bool:
        """Whether an image is still without outcome."""
        return bool(self._pending)

    def prepare(self) -> list[Outcome]:
        """Read files and pixels; the outcomes are those of images that cannot be sent.

        Raises:
            InputError: there is one, in mode `all`.
        """
        outcomes: list[Outcome] = []
        sources, self._sources = self._sources, ()  # images need not live as long as their answers
        for index, image, boxes in sources:
            try:
                self._pending[index] = Item(index, read_image(image), boxes)
            except InputError as error:
                outcomes += self.fail(error.about(index))
        return outcomes

    def request(self, timeout_seconds: float) -> dict[str, Any]:
        """Arguments of the HTTP client for the next try: the images that are still pending.

        Raises:
            DeadlineError: there is no time for one.
        """
        self._deadline.check()
        self._reason = None
        self._sent = self._next_items()
        body: Body = make_body(self._sent, self._options)
        headers = {
            "accept": FRAMES if self._mode == "frames" else SAFETENSORS,
            "content-type": body.content_type,
        }
        remaining = self._deadline.remaining_seconds
        if remaining is not None:
            headers["x-deadline-ms"] = str(max(1, int(remaining * 1000)))
            timeout_seconds = min(timeout_seconds, max(remaining, 0.001))
        return {
            "content": body.content,
            "params": body.params,
            "headers": headers,
            "timeout": timeout_seconds,
        }

    def _next_items(self) -> list[Item]:
        items: list[Item] = []
        num_bytes = 0
        for item in self._pending.values():
            num_bytes += item.payload.num_bytes
            if items and num_bytes > _MAX_BODY_BYTES:
                break
            items.append(item)
        return items

    def settle(self, position: int, result: Features | FeatureError) -> list[Outcome]:
        """What an answer says about one image, by its position in what was sent.

        Raises:
            AnswerError: the image was not sent, or has its outcome already.
            FeatureError: `result`, where it ends the call.
        """
        index = self.index_of(position)
        if index not in self._pending:
            raise AnswerError(
                f"the answer is about image {position}, which was not asked for",
                code="malformed_answer",
            )
        if isinstance(result, FeatureError):
            return self.fail(result.about(index))
        del self._pending[index]
        return [(index, result)]

    def fail(self, error: FeatureError) -> list[Outcome]:
        """An error about image `error.index`, or about all that is pending.

        One that is retryable leaves them pending.

        Raises:
            FeatureError: `error`, where it ends the call: any in mode `all`, and otherwise one
                that every other request would meet.
        """
        if error.retryable:
            self._reason = error
            return []
        if self._mode == "all" or error.is_about_the_request:
            raise error
        about = list(self._pending) if error.index is None else [error.index]
        for index in about:
            self._pending.pop(index, None)
        return [(index, error.about(index)) for index in about]

    def delay(self) -> float | None:
        """Seconds to wait before the next try; None: there is none, `give_up`."""
        return 0.0 if self._reason is None else self._tries.delay_after(self._reason)

    def give_up(self) -> list[Outcome]:
        """The last try's failure is the outcome of all that is pending.

        Raises:
            FeatureError: that failure, in mode `all`.
        """
        assert self._reason is not None
        error = self._reason
        if self._deadline.remaining_seconds == 0.0:
            error = self._deadline.error()
            error.__cause__ = self._reason
        if self._mode == "all":
            raise error
        outcomes: list[Outcome] = [(index, error.about(index)) for index in self._pending]
        self._pending.clear()
        return outcomes

    def check_deadline(self) -> None:
        """
        Raises:
            DeadlineError: it has passed.
        """
        self._deadline.check()

    @property
    def num_sent(self) -> int:
        """Images of the last try."""
        return len(self._sent)

    def index_of(self, position: int | None) -> int | None:
        """The place in the call of an image of the last try."""
        if position is None or not 0 <= position < len(self._sent):
            return None
        return self._sent[position].index
