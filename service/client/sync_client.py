"""`FeatureClient`: features over HTTP, for programs without an event loop."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import httpx2 as httpx

from service.client.answers import Receiver
from service.client.errors import FeatureError, from_answer, from_transport
from service.client.exchange import Exchange, Outcome
from service.client.features import Features
from service.client.images import check_is_several
from service.client.requests import Box, FeatureOptions
from service.client.retry import Deadline
from service.client.shared import ClientSettings, SourceCounter, in_order, take_batches

if TYPE_CHECKING:
    from service.client.images import ImageInput


class FeatureClient:
    """Asks a feature service, with several requests in flight.

        with FeatureClient("http://127.0.0.1:8000") as client:
            cat = client.feature("cat.jpg", size=448)
            row, column = cat.patch_of(320, 200)
            vector = cat.features[row, column]

    An image is a path, the bytes of an image file, a `PIL.Image`, a numpy array uint8 [H, W, 3],
    or a torch tensor uint8 [3, H, W] or [H, W, 3] (told apart by where the 3 is; refused where
    both could be). Several images are any iterable of them, or an array or tensor with a
    dimension before. Files go as they are, pixels without loss.

    Errors are `FeatureError`; the retryable ones (429, 503, broken connections, ...) only after
    `max_retries`, with growing pauses that honour `Retry-After`.

    May be used by many threads. Do not take it across a fork: make one in each process.

    Args:
        url: Of the service, as http://127.0.0.1:8000.
        api_key: Sent as bearer token.
        model: Which of the service's models; default its first.
        timeout_seconds: Longest wait for the connection to make any progress.
        deadline_seconds: Longest time for a call, tries and pauses included; the service hears of
            it and does not work in vain. For `stream`: for each request that it makes.
        max_retries: Tries after the first.
        max_connections: Most requests in flight.
        batch_images: Most images in a request.
        transport: Instead of the network, or with TLS settings of your own.

    Raises:
        ValueError: a setting that is not possible.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_seconds: float = 60.0,
        deadline_seconds: float | None = None,
        max_retries: int = 8,
        max_connections: int = 4,
        batch_images: int = 8,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._settings = ClientSettings(
            url,
            api_key,
            model,
            timeout_seconds,
            deadline_seconds,
            max_retries,
            max_connections,
            batch_images,
        )
        self._http = httpx.Client(**self._settings.http_arguments(), transport=transport)
        self._pool = ThreadPoolExecutor(max_connections, thread_name_prefix="feature-client")
        self._lock = threading.Lock()
        self._stops: set[threading.Event] = set()
        self._is_closed = False

    def __enter__(self) -> "FeatureClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that still run end with an error."""
        with self._lock:
            self._is_closed = True
            for stop in self._stops:
                stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def info(self) -> dict[str, Any]:
        """What `GET /info` says: models, limits, formats. One try.

        Raises:
            FeatureError: it says nothing.
        """
        url = f"{self._settings.url.rstrip('/')}/info"
        try:
            response = self._http.get(url)
        except httpx.TransportError as error:
            raise from_transport(error, url) from error
        if response.status_code != httpx.codes.OK:
            raise from_answer(response.status_code, response.headers, response.content)
        document: dict[str, Any] = response.json()
        return document

    def feature(
        self,
        image: "ImageInput",
        *,
        boxes: Sequence[Box] | None = None,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> Features:
        """Features of one image.

        Args:
            image: See the class.
            boxes: `(x0, y0, x1, y1)` in pixels of the upright image: features of these instead of
                the patch grid.
            deadline_seconds: Instead of the client's.
            options: See `FeatureOptions`.

        Raises:
            FeatureError: why there are none.
        """
        several = None if boxes is None else [boxes]
        (found,) = self.features(
            [image], boxes=several, deadline_seconds=deadline_seconds, **options
        )
        return found

    @overload
    def features(
        self,
        images: Iterable["ImageInput"],
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        partial: Literal[False] = False,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> list[Features]: ...

    @overload
    def features(
        self,
        images: Iterable["ImageInput"],
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        partial: Literal[True],
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> list[Features | FeatureError]: ...

    def features(
        self,
        images: Iterable["ImageInput"],
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        partial: bool = False,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> list[Features] | list[Features | FeatureError]:
        """Features of several images, in their order.

        Args:
            images: See the class.
            boxes: A list of boxes for each image.
            partial: An image that fails costs the others nothing: its error stands in its place.
            deadline_seconds: Instead of the client's.
            options: See `FeatureOptions`.

        Raises:
            FeatureError: the first failure, with the image's index; with `partial` only what every
                image would meet, as a wrong key or option.
        """
        check_is_several(images)
        deadline = self._settings.deadline(deadline_seconds)
        counter = SourceCounter(boxes)
        exchanges = (
            self._settings.exchange(
                batch, options, mode="partial" if partial else "all", deadline=deadline
            )
            for batch in take_batches(images, counter, self._settings.batch_images)
        )
        # With `partial` every image is told its own error, so what runs out of time says so itself.
        outcomes = dict(self._outcomes(exchanges, Deadline(None) if partial else deadline))
        return in_order(outcomes, counter.num_sources)

    def stream(
        self,
        images: Iterable["ImageInput"],
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> Iterator[Outcome]:
        """Features of any number of images, each as soon as it is there.

        `images` is taken in the caller's thread and only as far ahead as requests may be in
        flight: at most `max_connections * batch_images` images are between taken and yielded.

        Yields:
            `(index, features)` in the order of completion, or `(index, error)`.

        Raises:
            FeatureError: what every image would meet, as a wrong key or option.
        """
        check_is_several(images)
        exchanges = (
            self._settings.exchange(
                batch, options, mode="frames", deadline=self._settings.deadline(deadline_seconds)
            )
            for batch in take_batches(images, SourceCounter(boxes), self._settings.batch_images)
        )
        return self._outcomes(exchanges, Deadline(None))

    def _outcomes(self, exchanges: Iterator[Exchange], deadline: Deadline) -> Iterator[Outcome]:
        """Run exchanges, as many at once as there may be connections."""
        messages: SimpleQueue[Outcome | Future[None]] = SimpleQueue()
        stop = threading.Event()
        with self._lock:
            self._check_open()
            self._stops.add(stop)
        num_running = 0
        try:
            while True:
                # One that has finished counts until its outcomes are taken: who takes them slowly
                # slows down what is read ahead.
                while num_running < self._settings.max_connections:
                    exchange = next(exchanges, None)
                    if exchange is None:
                        break
                    future = self._pool.submit(self._run, exchange, messages.put, stop)
                    future.add_done_callback(messages.put)
                    num_running += 1
                if num_running == 0:
                    return
                try:
                    message = messages.get(timeout=deadline.remaining_seconds)
                except Empty:
                    raise deadline.error() from None
                if isinstance(message, Future):
                    num_running -= 1
                    self._check_open()
                    message.result()
                else:
                    yield message
        finally:
            stop.set()
            with self._lock:
                self._stops.discard(stop)

    def _check_open(self) -> None:
        if self._is_closed:
            raise FeatureError("the client is closed; make another", code="client_closed")

    def _run(
        self, exchange: Exchange, put: Callable[[Outcome], None], stop: threading.Event
    ) -> None:
        if stop.is_set():
            return
        for outcome in self._tries(exchange, stop):
            put(outcome)

    def _tries(self, exchange: Exchange, stop: threading.Event) -> Iterator[Outcome]:
        url = self._settings.endpoint
        yield from exchange.prepare()
        while exchange.is_pending():
            try:
                request = exchange.request(self._settings.timeout_seconds)
                with self._http.stream("POST", url, **request) as response:
                    receiver = Receiver(exchange, response.status_code, response.headers)
                    for piece in response.iter_raw():
                        if stop.is_set():
                            return
                        yield from receiver.feed(piece)
                    yield from receiver.end()
            except httpx.TransportError as error:
                yield from exchange.fail(from_transport(error, url))
            except FeatureError as error:
                yield from exchange.fail(error)
            if not exchange.is_pending():
                return
            delay = exchange.delay()
            if delay is None:
                yield from exchange.give_up()
            elif stop.wait(delay):
                return
