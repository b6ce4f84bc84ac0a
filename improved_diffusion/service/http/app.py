"""The FastAPI application: what each route does. The engine draws; the guard stands outside."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ... import __version__
from ...config import UserError
from ...config.service import ServeConfig
from ...respace import space_timesteps
from ...sampling.images import Images
from ..requests import Request as Work
from . import uploads
from .formats import FORMATS, as_json, choose, encode
from .jobs import LAST, STOP_RETRY, ClientGone, Results, Watch, finish, gone, images_of, refused, sse
from .metrics import Metrics, Observed
from .pages import docs_page
from .replies import Refused, busy, mistake
from .schemas import EDITS, Body, Sample, options_of
from .security import Access, App, Guard, Receive, Scope, Send

if TYPE_CHECKING:
    from ..engine import Engine, Event, Job, ModelInfo

PUBLIC = ("/healthz", "/healthz/live")  # need no token, say no more than whether the service works
DECODERS = 2  # images are decoded by this many threads: each may need much memory
CLIENT_GONE = 499  # nobody reads this status but the log and the metrics
ABOUT = "Draws and edits images with trained diffusion models. Every error is {error: {type, message, parameter}}."
_FORMATS: Any = {media_type: {} for media_type in (*FORMATS.values(), "text/event-stream")}
_ERROR = {"description": "Refused: {error: {type, message, parameter}}"}
RESPONSES: Any = {200: {"description": "The images", "content": _FORMATS}, "4XX": _ERROR, "5XX": _ERROR}


class Service:
    """What the routes share."""

    def __init__(self, engine: Engine, options: ServeConfig):
        self.engine = engine
        self.catalogue = engine.catalogue
        self.options = options
        self.metrics = Metrics(engine.health)
        self.results = Results(60 * options.result_minutes, options.result_mb * 10**6)
        self.stopping = False
        self._decoders: Any = None

    def stop(self, seconds: float) -> None:
        """Refuse new work, and finish what is running. Blocks."""
        self.stopping = True
        self.engine.stop(seconds)

    # A request for images, from its body to its reply

    async def answer(self, request: Request, body: Body, form: uploads.Form | None, kind: str) -> Response:
        """Draw the images of a request, and reply in the format that it asks for."""
        work = await self._work(request, body, form, kind)
        accept = "" if body.stream else request.headers.get("accept", "")
        wanted = choose(body.format, accept, _count(work))
        try:
            job = await to_thread.run_sync(self._submit, work, request, body.stream and body.previews)
        except Exception as error:
            raise refused(error) from None
        if body.stream:
            return _Stream(self, job, wanted)
        try:
            images = await finish(job, request.receive)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        return await self.images(images, wanted)

    def _submit(self, work: Work, request: Request, previews: bool) -> Job:
        client = request.client.host if request.client else ""
        return self.engine.submit(work, client=client, previews=previews)

    async def _work(self, request: Request, body: Body, form: uploads.Form | None, kind: str) -> Work:
        if self.stopping:
            raise busy("the service stops", STOP_RETRY, status=503)
        info = await self.info(body.model)
        options = options_of(body)
        if (steps := steps_of(kind, options, info.diffusion_steps, info.own_steps)) > self.options.max_steps:
            raise Refused(422, f"{steps:,} steps are more than {self.options.max_steps:,}: give steps", "steps")
        images = mask = None
        if form:
            images, mask = await self._decode(form, body, info)
        return Work(
            kind=kind,
            model=body.model,
            average=body.average,
            n=body.images_asked(),
            seed=body.seed,
            classes=tuple(body.classes or ()),
            options=options,
            images=images,
            mask=mask,
        )

    async def info(self, name: str) -> ModelInfo:
        """What a model is. Raises Refused for an unknown one, and one that cannot be read."""
        try:
            path = await to_thread.run_sync(self.catalogue.path, name)
        except UserError as error:
            raise Refused(404, str(error), "model") from None
        try:
            return await to_thread.run_sync(self.catalogue.describe, name)
        except UserError as error:
            raise Refused(422, without_path(error, path, name), "model") from None

    async def _decode(self, form: uploads.Form, body: Body, info: ModelInfo) -> Any:
        """(images, mask) of a form."""
        if self._decoders is None:
            self._decoders = anyio.CapacityLimiter(DECODERS)

        def read() -> Any:
            most = self.options.max_pixels
            return uploads.read_images(form, info, body, most), uploads.read_mask(form, info, body, most)

        try:
            return await to_thread.run_sync(read, limiter=self._decoders)
        except UserError as error:
            raise mistake(error) from None

    async def images(self, images: Images, wanted: str) -> Response:
        """The reply with finished images."""
        body, media_type, name = await to_thread.run_sync(encode, images, wanted)
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"} if name else {}
        return Response(body, media_type=media_type, headers=headers)


def without_path(error: UserError, path: str, name: str) -> str:
    """What an error says of a model, whose place on this machine is nobody's business."""
    return str(error).replace(path, name)


def steps_of(kind: str, options: dict[str, Any], diffusion_steps: int, own_steps: int) -> int:
    """How many steps a request's sampler takes.

    :param own_steps: of a distilled model, 0 for others.
    """
    if options.get("steps"):
        return options["steps"]
    if options.get("timestep_respacing"):
        try:
            return len(space_timesteps(diffusion_steps, options["timestep_respacing"]))
        except ValueError as error:
            raise Refused(422, str(error), "timestep_respacing") from None
    if own_steps and options.get("sampler", "auto") == "auto" and not options.get("use_ddim"):
        return own_steps
    takes_all = kind in ("sample", "upscale") and options.get("sampler", "auto") in ("auto", "ancestral", "ddim")
    return diffusion_steps if takes_all else 0


def _count(work: Work) -> int:
    """How many images a request is for."""
    try:
        return len(work.numbers())
    except ValueError as error:
        raise Refused(422, str(error), "seeds") from None


class _Stream(Response):
    """A job's events as server-sent events. It is cancelled where the client leaves."""

    def __init__(self, service: Service, job: Job, wanted: str):
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self.service, self.job, self.wanted = service, job, wanted
        self.ended = False
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_all(send))
        left = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sending, left}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            if not self.ended:
                self.job.cancel()
            await self._cancel(sending)
            await self._cancel(left)

    async def _cancel(self, task: asyncio.Future[Any]) -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _send_all(self, send: Send) -> None:
        async for event in Watch(self.job).events():
            if event is not None and event.kind in LAST:
                self.ended = True
            await send({"type": "http.response.body", "body": await self._encoded(event), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _encoded(self, event: Event | None) -> bytes:
        if event is None:
            return b": still here\n\n"
        if event.kind in LAST:
            try:
                return sse("done", await self._done(images_of(self.job)))
            except Refused as error:
                return sse("failed", error.content())
        if event.kind == "queued":
            return sse("queued", {"position": event.position})
        if event.kind == "progress":
            return sse("progress", {"done": event.done, "total": event.total, "seconds_left": event.seconds_left})
        if event.preview is not None:
            return sse("preview", {"images": await to_thread.run_sync(as_json, event.preview)})
        return sse(event.kind, {})

    async def _done(self, images: Images) -> dict[str, Any]:
        """What the last event says: where the result is and, as json, the result itself."""
        where = f"/v1/results/{self.service.results.put(images)}"
        data: dict[str, Any] = {"result": f"{where}?format={self.wanted}"}
        if self.wanted == "json":
            data["images"] = await to_thread.run_sync(as_json, images)
        return data


def create_app(engine: Engine, options: ServeConfig, access: Access) -> tuple[App, Service]:
    """(the application, guarded, what stops it). The engine is started and stopped by the caller."""
    service = Service(engine, options)
    app = FastAPI(
        title="improved-diffusion", version=__version__, description=ABOUT, docs_url=None, redoc_url=None
    )  # no page of FastAPI's: it loads scripts from a CDN
    _add_errors(app)
    _add_images(app, service)
    _add_models(app, service)
    _add_pages(app, service)
    return Observed(Guard(app, access), service.metrics), service


def _add_images(app: FastAPI, service: Service) -> None:
    @app.post("/v1/samples", responses=RESPONSES, summary="Draw images", response_class=Response)
    async def samples(body: Sample, request: Request) -> Response:  # type: ignore[valid-type]
        return await service.answer(request, body, None, "sample")

    def add_edit(kind: str, path: str, summary: str) -> None:
        schema = EDITS[kind]

        @app.post(
            path, responses=RESPONSES, summary=summary, name=kind, response_class=Response, openapi_extra=_form(schema)
        )
        async def edit(request: Request) -> Response:
            form = await uploads.read_form(request)
            return await service.answer(request, uploads.parse(schema, form.options), form, kind)

    add_edit("inpaint", "/v1/edits/inpaint", "Paint the masked part of images")
    add_edit("variations", "/v1/edits/variations", "Make images like those given")
    add_edit("interpolate", "/v1/edits/interpolate", "Make images on the way from one to another")
    add_edit("transform", "/v1/edits/transform", "Encode images, and decode them to another class")
    add_edit("upscale", "/v1/upscale", "Enlarge images with a super-resolution model")

    @app.get("/v1/results/{name}", responses=RESPONSES, summary="Fetch a streamed request's images")
    async def result(name: str, request: Request, format: str | None = None) -> Response:
        images = service.results.get(name)
        if format is not None and format not in FORMATS:
            raise Refused(422, f"format must be one of {', '.join(FORMATS)}", "format")
        return await service.images(images, choose(format, request.headers.get("accept", ""), len(images)))


def _form(schema: type[Body]) -> dict[str, Any]:
    """How OpenAPI describes a form with images."""
    options = schema.model_json_schema()
    file = {"type": "string", "format": "binary"}
    parts: dict[str, Any] = {"images": {"type": "array", "items": file}, "options": options}
    if schema is EDITS["inpaint"]:
        parts["mask"] = {**file, "description": "white where to paint"}
    content = {"multipart/form-data": {
        "schema": {"type": "object", "properties": parts, "required": ["options"]},
        "encoding": {"options": {"contentType": "application/json"}},
    }}  # fmt: skip
    return {"requestBody": {"required": True, "content": content}}


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="List the models")
    async def models() -> dict[str, Any]:
        def listed() -> list[dict[str, Any]]:
            return [_listed(service, name) for name in service.catalogue.names()]

        return {"models": await to_thread.run_sync(listed)}

    @app.get("/v1/models/{name:path}", summary="Describe a model")
    async def model(name: str) -> dict[str, Any]:
        return _described(await service.info(name))


def _listed(service: Service, name: str) -> dict[str, Any]:
    """What clients learn of a model; of one that cannot be read, why."""
    try:
        return _described(service.catalogue.describe(name))
    except UserError as error:
        return {"name": name, "error": without_path(error, service.catalogue.path(name), name)}


def _described(info: ModelInfo) -> dict[str, Any]:
    """A model in JSON, without its path."""
    return {
        "name": info.name,
        "kind": info.kind,
        "size": list(info.size),
        "small_size": list(info.small_size) if info.small_size else None,
        "channels": info.channels,
        "classes": list(info.class_names) if info.class_names else None,
        "step": info.step,
        "diffusion_steps": info.diffusion_steps,
        "own_steps": info.own_steps or None,
        "guidance": info.hides_classes,
        "averages": list(info.averages),
    }


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", summary="Readiness: 200 where work is taken, else 503")
    async def ready() -> JSONResponse:
        works = not service.stopping and service.engine.health().state == "ready"
        return JSONResponse({"ready": works}, 200 if works else 503)

    @app.get("/healthz/live", summary="Liveness: the process answers")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))


def _add_errors(app: FastAPI) -> None:
    """Every error has the one shape."""

    @app.exception_handler(Refused)
    async def on_refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.content(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if request.method == "POST" and not _is_json(request):
            return await on_refused(request, Refused(415, "send application/json", "Content-Type"))
        return await on_refused(request, uploads.invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        text = "there is no such page" if error.status_code == 404 else str(error.detail)
        return await on_refused(request, Refused(error.status_code, text, None, error.headers))

    @app.exception_handler(ClientDisconnect)
    async def on_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> JSONResponse:
        return await on_refused(request, Refused(500, "an error of the service: its log has the details"))


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
