"""The work for one request to `POST /features`, once its body has arrived."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import Any

from fastapi import Response

from backbone.errors import ImageError
from service import errors, logs, wire
from service.bodies import BodyKind, Payload, parse_payload
from service.boxes import BoxLimits
from service.composing import MappedImage, composed, finished, serialise
from service.etags import etag_of, matches
from service.finishing import num_values
from service.lifecycle import FeatureService
from service.models import ServedModel
from service.negotiation import MediaType
from service.options import FeatureOptions, OptionLimits, parse_options
from service.responses import FramesResponse, PartsResponse
from service.stages import Stages
from service.tracing import StageSpan
from service.work import Item, Outcome

# Converting so few values takes 0.1 ms, less than the way to a thread that may be busy.
_INLINE_VALUES = 65536
# Lists of a JSON body that are no boxes: `images`, `boxes`, `size`, `layers`, and what is mistaken.
_OTHER_LISTS = 16


class FeatureRequest:
    """The work for one request once its body has arrived."""

    def __init__(
        self,
        service: FeatureService,
        media: MediaType,
        kind: BodyKind,
        query: Sequence[tuple[str, str]],
        *,
        if_none_match: str | None,
        deadline: float | None,
        stages: Stages,
        spans: list[StageSpan],
    ) -> None:
        """
        Args:
            query: Names and texts of the query parameters.
            if_none_match: The header of that name.
            deadline: Of the request, in the event loop's time; frames that are not done by then
                carry an error. Other answers are cut off by the middleware.
            stages: What the request has gone through so far.
            spans: Where its stages are noted for a trace.
        """
        self._service = service
        self._media = media
        self._kind = kind
        self._query = query
        self._if_none_match = if_none_match
        self._deadline = deadline
        self._stages = stages
        self._spans = spans

    async def answer(self, body: bytes) -> Response:
        """
        Raises:
            ServiceError: whatever stands in the way.
        """
        payload = await self._parse(body)
        options = await self._options(payload)
        model = self._service.registry.find(options.model)
        layers = resolve_layers(options.layers, model.encoder.backbone.depth)
        wire.check_format(
            self._media, options, num_images=len(payload.images), num_layers=len(layers)
        )
        source = wire.Source(model, layers, options)
        planned = await self._service.planner.plan(
            payload.images,
            options,
            model,
            layers,
            lists_failures=self._lists_failures(options),
        )
        items = [item for item in planned if isinstance(item, Item)]
        num_channels = model.encoder.backbone.embed_dim
        sent_values = len(layers) * sum(
            num_values(options, _grid(item), item.regions, num_channels) for item in items
        )
        wire.check_response_size(
            self._media,
            sent_values,
            options,
            num_images=len(items),
            max_bytes=self._service.settings.max_response_bytes,
        )
        failures = [item for item in planned if isinstance(item, wire.ImageFailure)]
        for failure in failures:
            self._service.metrics.errors.labels(failure.error.code).inc()
        # Frames may turn out to be errors when their headers are long sent.
        has_name = not failures and self._media != "application/x-refinery-frames"
        etag = etag_of(self._media, items, options) if has_name else None
        if etag is not None and matches(self._if_none_match, etag):
            self._service.metrics.not_modified.inc()
            unchanged = _headers([], etag, model)
            del unchanged["x-cache"]
            return Response(status_code=304, headers=unchanged)
        outcomes = await self._service.workshop.begin(items, options.cache, deadline=self._deadline)
        headers = _headers(outcomes, etag, model)
        logs.note(
            model=model.name,
            images=len(planned),
            tokens=sum(item.num_tokens for item in items),
            cache=headers["x-cache"],
        )
        if self._media == "application/x-refinery-frames":
            frames = self._frames(outcomes, failures, source)
            return FramesResponse(frames, headers, on_end=partial(_leave, outcomes))
        self._stages.end("cache")
        maps: Sequence[MappedImage | wire.Answer] = await self._collect(outcomes, options)
        if any(isinstance(image, wire.ImageFailure) for image in maps):
            headers.pop("etag", None)  # what failed now may succeed when it is asked for again
        self._stages.skip_to_now()
        if options.project:
            # Tens of milliseconds for each: between them other requests get a turn, and what
            # nobody waits for any more is not begun.
            maps = [await self._service.helpers.run(composed, image, source) for image in maps]
        work = partial(serialise, self._media, [*maps, *failures], source)
        if sent_values <= _INLINE_VALUES and self._media != "image/png" and not options.project:
            parts, more = work()
        else:
            parts, more = await self._service.helpers.run(work)
        self._stages.end("encode")
        for stage, seconds in self._stages.seconds.items():
            self._service.metrics.stage_seconds[stage].observe(seconds)
        self._spans.extend(self._stages.spans())
        headers |= more | {"server-timing": self._stages.header()}
        return PartsResponse(parts, self._media, headers)

    async def _parse(self, body: bytes) -> Payload:
        settings = self._service.settings
        parse = partial(
            parse_payload,
            self._kind,
            body,
            max_images=settings.max_images,
            # One for each box and each image's boxes, and those around them.
            max_lists=settings.max_box_vectors + settings.max_images + _OTHER_LISTS,
        )
        return parse() if self._kind.form == "image" else await self._service.helpers.run(parse)

    async def _options(self, payload: Payload) -> FeatureOptions:
        settings = self._service.settings
        parse = partial(
            parse_options,
            self._query,
            payload.options,
            num_images=len(payload.images),
            limits=OptionLimits(
                settings.max_layers,
                BoxLimits(settings.max_image_boxes, settings.max_box_vectors),
            ),
        )
        # A body may list as many boxes as are allowed, which takes a tenth of a second to read.
        return await self._service.helpers.run(parse) if payload.options else parse()

    def _failure(
        self, error: ImageError | errors.ServiceError, index: int, options: FeatureOptions
    ) -> wire.ImageFailure:
        """For the answer's list of failures.

        Raises:
            ServiceError: the error itself, when the request is not `partial`.
        """
        if not self._lists_failures(options):
            raise errors.about_image(error, index)
        return self._listed(error, index)

    def _lists_failures(self, options: FeatureOptions) -> bool:
        return options.partial or self._media == "application/x-refinery-frames"

    async def _collect(
        self, outcomes: Sequence[Outcome], options: FeatureOptions
    ) -> list[MappedImage | wire.ImageFailure]:
        tasks = [outcome.flight.task for outcome in outcomes if outcome.flight is not None]
        try:
            if tasks:
                await asyncio.wait(tasks)
            collected: list[MappedImage | wire.ImageFailure] = []
            for outcome in outcomes:
                try:
                    collected.append(self._mapped(outcome))
                except (ImageError, errors.ServiceError) as error:
                    collected.append(self._failure(error, outcome.item.index, options))
            return collected
        finally:
            _leave(outcomes)

    def _mapped(self, outcome: Outcome) -> MappedImage:
        if outcome.found is not None:
            return MappedImage(outcome.item, outcome.found)
        assert outcome.flight is not None
        computed = outcome.flight.task.result()
        for stage, seconds in computed.seconds.items():
            known = self._stages.seconds
            known[stage] = max(known.get(stage, 0.0), seconds)
        return MappedImage(outcome.item, computed.features)

    async def _frames(
        self,
        outcomes: Sequence[Outcome],
        failures: Sequence[wire.ImageFailure],
        source: wire.Source,
    ) -> AsyncIterator[list[wire.Part]]:
        """A frame per image, in the order in which they are done."""
        for failure in failures:
            yield wire.frame(failure, source)
        waiting: dict[asyncio.Task[Any], list[Outcome]] = {}
        for outcome in outcomes:
            if outcome.flight is None:
                yield await self._frame(outcome, source)
            else:
                waiting.setdefault(outcome.flight.task, []).append(outcome)
        while waiting:
            done = await self._next_done(waiting)
            for task in done or list(waiting):
                for outcome in waiting.pop(task):
                    if done:
                        yield await self._frame(outcome, source)
                    else:
                        late = errors.DeadlineError("the image was not done by the deadline")
                        yield wire.frame(self._listed(late, outcome.item.index), source)

    async def _next_done(self, tasks: Iterable[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
        """Tasks that are done; none when the deadline comes first."""
        left = None
        if self._deadline is not None:
            left = max(0.0, self._deadline - asyncio.get_running_loop().time())
        done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        return done

    async def _frame(self, outcome: Outcome, source: wire.Source) -> list[wire.Part]:
        try:
            mapped = self._mapped(outcome)
            answer: wire.Answer = await self._service.helpers.run(finished, mapped, source)
        except (ImageError, errors.ServiceError) as error:
            answer = self._listed(error, outcome.item.index)
        return wire.frame(answer, source)

    def _listed(self, error: ImageError | errors.ServiceError, index: int) -> wire.ImageFailure:
        known = errors.about_image(error, index)
        self._service.metrics.errors.labels(known.code).inc()
        return wire.ImageFailure(index, known)


def resolve_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Block numbers counted from 0.

    Raises:
        InvalidOptionError: a block that the model does not have, or one named twice.
    """
    resolved = tuple(layer + depth if layer < 0 else layer for layer in layers)
    for asked, layer in zip(layers, resolved, strict=True):
        if not 0 <= layer < depth:
            raise errors.InvalidOptionError(
                f"option 'layers' has {asked}; the {depth} blocks are {-depth} to {depth - 1}"
            )
    if len(set(resolved)) < len(resolved):
        raise errors.InvalidOptionError(f"option 'layers' names a block twice: {list(layers)}")
    return resolved


def _grid(item: Item) -> tuple[int, int]:
    patch_size = item.plan.model.encoder.patch_size
    return item.plan.size[0] // patch_size, item.plan.size[1] // patch_size


def _headers(outcomes: Sequence[Outcome], etag: str | None, model: ServedModel) -> dict[str, str]:
    num_hits = sum(outcome.found is not None for outcome in outcomes)
    state = "miss" if num_hits == 0 else "hit" if num_hits == len(outcomes) else "partial"
    headers = {"x-cache": state, "x-model-digest": model.encoder.digest, "vary": "accept"}
    return headers | ({"etag": etag} if etag else {})


def _leave(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.flight is not None:
            outcome.flight.leave()
