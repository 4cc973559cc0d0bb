"""The HTTP side: routes, and one shape for every error.

POST /predict {"text": ...}         POST /predict/batch {"texts": [...]}
GET  /health  /ready  /info  /metrics  /docs  and a page to try it at /
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from serve.edge import Edge
from serve.errors import Refusal
from serve.info import info
from serve.metrics import Metrics
from serve.schemas import BatchAnswer, BatchRequest, ErrorAnswer, HealthAnswer, InfoAnswer, PredictAnswer, PredictRequest, ReadyAnswer
from serve.service import Service
from serve.settings import Settings
from serve.validation import explain

Result = TypeVar("Result")

PAGE = Path(__file__).parent / "static" / "index.html"
# The page may load nothing from elsewhere and talk to this service only; it may stand in a frame (Spaces show it in one).
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "The body is not JSON",
        413: "The request is too large",
        415: "The content type is not JSON",
        422: "The request holds something that is not allowed; `error` says what",
        429: "The queue is full; Retry-After says for how long",
        503: "No model, or no answer in time",
    }.items()
}


def create_app(settings: Settings) -> FastAPI:
    """The application; its lifespan loads the model. `app.state.service` is the service behind it."""
    metrics = Metrics()
    service = Service(settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="DistriNews",
        summary="Labels for texts, from a classifier on the Hugging Face Hub.",
        description="Every answer carries `X-Model-Revision`, the commit that serves.",
        version="1",
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(Edge, metrics=metrics, max_body_bytes=settings.max_body_bytes, revision=lambda: _commit(service))
    _add_routes(app, service)
    _add_errors(app)
    return app


def _commit(service: Service) -> str | None:
    return service.model.release.commit if service.model else None


def _add_routes(app: FastAPI, service: Service) -> None:
    settings, page = service.settings, PAGE.read_text(encoding="utf-8")

    @app.post("/predict", responses=REFUSALS, tags=["predict"])
    async def predict(body: PredictRequest, request: Request, response: Response) -> PredictAnswer:
        """The label of one text, with its calibrated confidence and the probability of every label."""
        model, (prediction,) = await _unless_gone(request, service.predict([body.text], ["text"]))
        response.headers["X-Model-Revision"] = model.release.commit
        return PredictAnswer(model=model.release.model, revision=model.release.commit, **dict(prediction))

    @app.post("/predict/batch", responses=REFUSALS, tags=["predict"])
    async def predict_batch(body: BatchRequest, request: Request, response: Response) -> BatchAnswer:
        """The labels of several texts, in their order. A text gets the same answer alone and in any company."""
        if len(body.texts) > settings.max_texts:
            message = f"{len(body.texts)} texts were given; allowed are at most {settings.max_texts} in one request."
            raise Refusal(422, "too_many_texts", message, field="texts")
        fields = [f"texts[{number}]" for number in range(len(body.texts))]
        model, predictions = await _unless_gone(request, service.predict(body.texts, fields))
        response.headers["X-Model-Revision"] = model.release.commit
        return BatchAnswer(predictions=predictions, model=model.release.model, revision=model.release.commit)

    @app.get("/health", tags=["operations"])
    async def health() -> HealthAnswer:
        """The process is alive; it may still be loading its model."""
        return HealthAnswer()

    @app.get("/ready", responses={503: {"model": ReadyAnswer, "description": "Not ready"}}, tags=["operations"])
    async def ready(response: Response) -> ReadyAnswer:
        """A model is loaded, has proven itself on the release's golden examples, and its engine works."""
        trouble = service.trouble()
        response.status_code = 503 if trouble else 200
        return ReadyAnswer(ready=trouble is None, reason=trouble)

    @app.get("/info", tags=["operations"])
    async def about() -> InfoAnswer:
        """What serves here: model, commit, engine, labels, proof, limits, versions."""
        return info(service)

    @app.get("/metrics", response_class=Response, tags=["operations"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def demo() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; cancels it when the caller hangs up, so that no engine time is spent on nobody."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refusal(499, "gone", "The caller hung up.")  # nobody reads this; it is counted
    finally:
        task.cancel()
        watch.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(status: int, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"code": code, "error": message, "field": field}, status, headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return _error(error.status, error.code, error.message, error.field, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        is_batch = request.url.path.endswith("/batch")
        return _error(*explain(error.errors()[0], {"texts": ["...", "..."]} if is_batch else {"text": "..."}))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        sentences = {
            400: "The body is not JSON that can be read.",
            404: f"There is nothing at {request.url.path}; /docs lists what there is.",
            405: f"{request.url.path} does not take {request.method}; /docs lists what there is.",
        }
        codes = {400: "not_json", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
        message = sentences.get(error.status_code, str(error.detail))
        return _error(error.status_code, codes.get(error.status_code, "error"), message, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        return _error(500, "defect", "The service has a defect; the error is in its log.")
