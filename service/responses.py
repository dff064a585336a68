"""Responses whose bodies are sent in parts, without joining or copying them first."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.wire import Part

END_OF_FRAMES = struct.pack("<Q", 0)


class PartsResponse(Response):
    """A response whose body is sent part by part, without joining the parts first."""

    def __init__(self, parts: Sequence[Part], media_type: str, headers: Mapping[str, str]) -> None:
        self._parts = parts
        length = sum(len(part) for part in parts)
        super().__init__(headers={**headers, "content-length": str(length)}, media_type=media_type)

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 - ASGI's signature
        receive: Receive,  # noqa: ARG002
        send: Send,
    ) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        last = len(self._parts) - 1
        for number, part in enumerate(self._parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < last})


class FramesResponse(Response):
    """A response that is sent frame by frame, as images are done."""

    def __init__(
        self,
        frames: AsyncIterator[Sequence[Part]],
        headers: Mapping[str, str],
        *,
        on_end: Callable[[], None],
    ) -> None:
        """
        Args:
            frames: What is sent.
            headers: Of the response.
            on_end: Called when all is sent, or nobody is there to read it.
        """
        self._frames = frames
        self._at_end = [on_end]
        super().__init__(headers=dict(headers), media_type="application/x-refinery-frames")
        # Response counts an empty body; how long this one will be nobody knows.
        self.raw_headers = [item for item in self.raw_headers if item[0] != b"content-length"]

    def at_end(self, call: Callable[[], None]) -> None:
        """Call this too when all is sent, or nobody is there to read it."""
        self._at_end.append(call)

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 - ASGI's signature
        receive: Receive,
        send: Send,
    ) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            sending.result()
        finally:
            leaving.cancel()
            sending.cancel()
            for call in self._at_end:
                call()

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for parts in self._frames:
            for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": END_OF_FRAMES, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
