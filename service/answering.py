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
from service.composing import Body, MappedImage, composed, finished, is_costly, serialise
from service.etags import etag_of, matches
from service.finishing import num_more_values, num_values
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

    async def answer(self, data: bytes) -> Response:
        """
        Raises:
            ServiceError: whatever stands in the way.
        """
        payload = await self._parse(data)
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
        sent_values = len(layers) * sum(_num_values(item, options) for item in items)
        wire.check_response_size(
            self._media,
            sent_values,
            options,
            num_images=len(items),
            max_bytes=self._service.settings.max_response_bytes,
        )
        _check_feature_bytes(items, self._service.settings.max_feature_bytes)
        failures = [item for item in planned if isinstance(item, wire.ImageFailure)]
        for failure in failures:
            self._service.metrics.errors.labels(failure.error.code).inc()
        # Frames may turn out to be errors when their headers are long sent.
        has_name = not failures and self._media != "application/x-refinery-frames"
        etag = await self._name(items, options) if has_name else None
        # Whoever asks for a refresh wants the work done, also when the answer stays the same.
        is_known = etag is not None and matches(self._if_none_match, etag)
        if is_known and options.cache != "refresh":
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
        images = [*await self._collect(outcomes, options), *failures]
        self._stages.skip_to_now()
        body = await self._compose(images, source, sent_values)
        if body.failures:
            headers.pop("etag", None)  # what failed now may succeed when it is asked for again
        counted = {image.index for image in images if isinstance(image, wire.ImageFailure)}
        for failure in body.failures:
            if failure.index not in counted:
                self._service.metrics.errors.labels(failure.error.code).inc()
        self._stages.end("encode")
        for stage, seconds in self._stages.seconds.items():
            self._service.metrics.stage_seconds[stage].observe(seconds)
        self._spans.extend(self._stages.spans())
        headers |= body.headers | {"server-timing": self._stages.header()}
        return PartsResponse(body.parts, self._media, headers)

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

    async def _name(self, items: Sequence[Item], options: FeatureOptions) -> str:
        name = partial(etag_of, self._media, items, options)
        # Boxes are part of the name, and there may be tens of thousands.
        return await self._service.helpers.run(name) if options.boxes is not None else name()

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

    async def _compose(
        self,
        images: Sequence[MappedImage | wire.Answer],
        source: wire.Source,
        sent_values: int,
    ) -> Body:
        decoders, helpers = self._service.decoders, self._service.helpers
        if self._media == "image/png":
            return await decoders.run(serialise, self._media, images, source)
        if is_costly(self._media, source.options):
            # One by one: between them other requests get a turn, and what nobody waits for any
            # more is not begun. Not by the helpers, whom every request needs.
            images = [await decoders.run(composed, image, source) for image in images]
        work = partial(serialise, self._media, images, source)
        return work() if sent_values <= _INLINE_VALUES else await helpers.run(work)

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
            is_slow = is_costly(self._media, source.options)
            pool = self._service.decoders if is_slow else self._service.helpers
            answer: wire.Answer = await pool.run(finished, mapped, source)
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


def _check_feature_bytes(items: Sequence[Item], max_bytes: int) -> None:
    """
    Raises:
        ResponseTooLargeError: the maps of all images together are too large to be held.
    """
    num_bytes = sum(item.plan.num_bytes for item in items)
    if num_bytes > max_bytes:
        raise errors.ResponseTooLargeError(
            f"the features are {num_bytes} bytes before anything is made of them, {max_bytes} are "
            "allowed; ask for fewer layers or a smaller size, or send several requests"
        )


def _num_values(item: Item, options: FeatureOptions) -> int:
    """Values that an image is answered with in one layer."""
    encoder, grid, width = item.plan.model.encoder, _grid(item), item.plan.register_width
    backbone = encoder.backbone
    canvas = (grid[0] + 2 * width) * (grid[1] + 2 * width)
    return num_values(options, grid, item.regions, backbone.embed_dim) + num_more_values(
        options,
        grid,
        backbone.embed_dim,
        prefix=backbone.num_prefix_tokens,
        registers=canvas - grid[0] * grid[1],
    )


def _headers(outcomes: Sequence[Outcome], etag: str | None, model: ServedModel) -> dict[str, str]:
    num_hits = sum(outcome.found is not None for outcome in outcomes)
    state = "miss" if num_hits == 0 else "hit" if num_hits == len(outcomes) else "partial"
    headers = {"x-cache": state, "x-model-digest": model.encoder.digest, "vary": "accept"}
    return headers | ({"etag": etag} if etag else {})


def _leave(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.flight is not None:
            outcome.flight.leave()
