"""`AsyncFeatureClient`: `FeatureClient` for programs with an event loop."""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Sequence,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import httpx2 as httpx

from service.client.answers import Receiver
from service.client.errors import FeatureError, from_answer, from_transport
from service.client.exchange import Exchange, Outcome, Source
from service.client.features import Features
from service.client.images import check_is_several
from service.client.requests import Box, FeatureOptions
from service.client.retry import Deadline
from service.client.shared import ClientSettings, SourceCounter, in_order, take_batches

if TYPE_CHECKING:
    from service.client.images import ImageInput


class AsyncFeatureClient:
    """`FeatureClient` with `await`: the same settings, options, results and errors.

        async with AsyncFeatureClient("http://127.0.0.1:8000") as client:
            cat = await client.feature("cat.jpg", size=448)
            async for index, found in client.stream(paths):
                ...

    Images may also come as an asynchronous iterable. Files are read and pixels packed in threads.
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
        transport: httpx.AsyncBaseTransport | None = None,
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
        self._http = httpx.AsyncClient(**self._settings.http_arguments(), transport=transport)
        self._slots = asyncio.Semaphore(max_connections)

    async def __aenter__(self) -> "AsyncFeatureClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def info(self) -> dict[str, Any]:
        """See `FeatureClient.info`."""
        url = f"{self._settings.url.rstrip('/')}/info"
        try:
            response = await self._http.get(url)
        except httpx.TransportError as error:
            raise from_transport(error, url) from error
        if response.status_code != httpx.codes.OK:
            raise from_answer(response.status_code, response.headers, response.content)
        document: dict[str, Any] = response.json()
        return document

    async def feature(
        self,
        image: "ImageInput",
        *,
        boxes: Sequence[Box] | None = None,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> Features:
        """See `FeatureClient.feature`."""
        several = None if boxes is None else [boxes]
        (found,) = await self.features(
            [image], boxes=several, deadline_seconds=deadline_seconds, **options
        )
        return found

    @overload
    async def features(
        self,
        images: "Iterable[ImageInput] | AsyncIterable[ImageInput]",
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        partial: Literal[False] = False,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> list[Features]: ...

    @overload
    async def features(
        self,
        images: "Iterable[ImageInput] | AsyncIterable[ImageInput]",
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        partial: Literal[True],
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> list[Features | FeatureError]: ...

    async def features(
        self,
        images: "Iterable[ImageInput] | AsyncIterable[ImageInput]",
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        partial: bool = False,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> list[Features] | list[Features | FeatureError]:
        """See `FeatureClient.features`."""
        check_is_several(images)
        deadline = self._settings.deadline(deadline_seconds)
        counter = SourceCounter(boxes)
        exchanges = (
            (
                self._settings.exchange(
                    batch, options, mode="partial" if partial else "all", deadline=deadline
                ),
                deadline,
            )
            async for batch in _batches(images, counter, self._settings.batch_images)
        )
        outcomes = {index: outcome async for index, outcome in self._outcomes(exchanges)}
        return in_order(outcomes, counter.num_sources)

    def stream(
        self,
        images: "Iterable[ImageInput] | AsyncIterable[ImageInput]",
        *,
        boxes: Iterable[Sequence[Box]] | None = None,
        deadline_seconds: float | None = None,
        **options: Unpack[FeatureOptions],
    ) -> AsyncGenerator[Outcome, None]:
        """See `FeatureClient.stream`; leave it early with `contextlib.aclosing`."""
        check_is_several(images)
        return self._outcomes(
            (
                self._settings.exchange(
                    batch,
                    options,
                    mode="frames",
                    deadline=(deadline := self._settings.deadline(deadline_seconds)),
                ),
                deadline,
            )
            async for batch in _batches(images, SourceCounter(boxes), self._settings.batch_images)
        )

    async def _outcomes(
        self, exchanges: AsyncIterator[tuple[Exchange, Deadline]]
    ) -> AsyncGenerator[Outcome, None]:
        """Run exchanges, as many at once as there may be connections."""
        messages: asyncio.Queue[Outcome | asyncio.Task[None]] = asyncio.Queue()
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                # One that has finished counts until its outcomes are taken: who takes them slowly
                # slows down what is read ahead.
                while len(running) < self._settings.max_connections:
                    item = await anext(exchanges, None)
                    if item is None:
                        break
                    task = asyncio.create_task(self._run(*item, messages.put_nowait))
                    task.add_done_callback(messages.put_nowait)
                    running.add(task)
                if not running:
                    return
                message = await messages.get()
                if isinstance(message, asyncio.Task):
                    running.discard(message)
                    message.result()
                else:
                    yield message
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _run(
        self, exchange: Exchange, deadline: Deadline, put: Callable[[Outcome], None]
    ) -> None:
        _put_all(put, await asyncio.to_thread(exchange.prepare))
        while exchange.is_pending():
            try:
                await self._try(exchange, deadline, put)
            except TimeoutError:
                _put_all(put, exchange.fail(deadline.error()))
            except httpx.TransportError as error:
                _put_all(put, exchange.fail(from_transport(error, self._settings.endpoint)))
            except FeatureError as error:
                _put_all(put, exchange.fail(error))
            if not exchange.is_pending():
                return
            delay = exchange.delay()
            if delay is None:
                _put_all(put, exchange.give_up())
            else:
                await asyncio.sleep(delay)

    async def _try(
        self, exchange: Exchange, deadline: Deadline, put: Callable[[Outcome], None]
    ) -> None:
        # Calls that run at once share the connections: wait here, not until the pool gives up.
        async with asyncio.timeout(deadline.remaining_seconds), self._slots:
            request = await asyncio.to_thread(exchange.request, self._settings.timeout_seconds)
            async with self._http.stream("POST", self._settings.endpoint, **request) as response:
                receiver = Receiver(exchange, response.status_code, response.headers)
                async for piece in response.aiter_raw():
                    _put_all(put, receiver.feed(piece))
                _put_all(put, receiver.end())


def _put_all(put: Callable[[Outcome], None], outcomes: Iterable[Outcome]) -> None:
    for outcome in outcomes:
        put(outcome)


async def _batches(
    images: "Iterable[ImageInput] | AsyncIterable[ImageInput]",
    counter: SourceCounter,
    batch_images: int,
) -> AsyncIterator[list[Source]]:
    if not isinstance(images, AsyncIterable):
        for batch in take_batches(images, counter, batch_images):
            yield batch
        return
    gathered: list[Source] = []
    async for image in images:
        gathered.append(counter.number(image))
        if len(gathered) == batch_images:
            yield gathered
            gathered = []
    if gathered:
        yield gathered
    counter.end()
