"""The HTTP side: routes, their documentation, and one shape for every error.

POST /predict {"text": ...}   POST /predict/batch {"texts": [...]}   POST / {"inputs": ...} as the Hugging Face clients send it
GET  /health  /ready  /info  /metrics  /docs  and a page to try it at /          POST /rollback, for operators

With DISTRINEWS_API_KEYS set, the three predictions ask for one of them in X-API-Key; /rollback asks for
DISTRINEWS_ADMIN_KEY; everything else stays open. An Authorization header is never looked at.
"""

from __future__ import annotations

import asyncio
import contextvars
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import HTMLResponse
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from serve.answers import defect, json_answer, predictions, refused, revision, scores
from serve.direct import PredictionRoute, check_key, direct
from serve.edge import Edge
from serve.errors import Refusal
from serve.info import info
from serve.schemas import (
    BatchAnswer,
    BatchRequest,
    ErrorAnswer,
    HealthAnswer,
    InferenceRequest,
    InfoAnswer,
    LabelScore,
    Parameters,
    PredictAnswer,
    PredictRequest,
    ReadyAnswer,
    RollbackAnswer,
)
from serve.service import Service

PAGE = Path(__file__).parent / "static" / "index.html"
# The page may load nothing from elsewhere and talk to this service only; it may stand in a frame of the Hub (Spaces show it in one).
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self' https://huggingface.co https://*.hf.space",
}
_SHOWN = ["X-Model-Revision", "X-Request-ID", "Retry-After", "X-Error-Message"]  # to pages of other origins
_KEY = [Security(APIKeyHeader(name="X-API-Key", auto_error=False))]  # documents it; `direct.check_key` checks it
_REFUSALS = {
    400: "The body is not JSON",
    401: "The key is missing or wrong",
    403: "This service has no key for operators",
    408: "The body took too long to arrive",
    409: "There is nothing to roll back to",
    413: "The request is too large",
    415: "The content type is not JSON in UTF-8",
    422: "The request holds something that is not allowed; `message` says what",
    429: "The queue is full; Retry-After says for how long",
    500: "The service has a defect",
    503: "No model, or no answer in time",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": _REFUSALS[status]} for status in statuses}


class Application(FastAPI):
    """FastAPI between the edge, which sees every answer, and the service."""

    def __init__(self, service: Service, **options: Any) -> None:
        # FastAPI can report requests, with what they hold, to OpenTelemetry; here /metrics and the log say enough.
        # A path with a slash too many is not there: a redirect would be an answer of another shape, which no page documents.
        super().__init__(telemetry={"tracing": False, "metrics": False, "logs": False}, redirect_slashes=False, **options)
        self.service = self.state.service = service

    def build_middleware_stack(self) -> ASGIApp:
        settings = self.service.settings
        routes = {route.path: route for route in self.routes if isinstance(route, PredictionRoute)}
        app: ASGIApp = direct(routes, super().build_middleware_stack())
        if origins := settings.origins():
            allowed = ["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"]
            app = CORSMiddleware(app, origins, allow_methods=["GET", "POST"], allow_headers=allowed, expose_headers=_SHOWN)
        return Edge(app, metrics=self.service.metrics, revision=lambda: _commit(self.service), access_log=settings.access_log)

    def openapi(self) -> dict[str, Any]:
        """With the headers that every answer can carry."""
        if self.openapi_schema is None:
            for operations in super().openapi()["paths"].values():
                for operation in operations.values():
                    for status, answer in operation["responses"].items():
                        answer["headers"] = _headers(status)
        return super().openapi()


def _headers(status: str) -> dict[str, Any]:
    text = {"type": "string"}
    headers: dict[str, Any] = {
        "X-Request-ID": {"description": "The caller's own, or a new one; it is in the log.", "required": True, "schema": text},
        "X-Model-Revision": {"description": "The commit that serves; absent while none does.", "schema": text},
    }
    if status in ("429", "503"):
        seconds = {"type": "integer", "minimum": 1}
        headers["Retry-After"] = {"description": "Seconds after which trying again makes sense.", "schema": seconds}
    if status == "401":
        headers["WWW-Authenticate"] = {"description": "Names the header that takes the key.", "schema": text}
    if status >= "400":
        headers["X-Error-Message"] = {"description": "`message`, where the Hugging Face clients look for it.", "schema": text}
    return headers


def create_app(service: Service) -> FastAPI:
    """The application in front of `service`, which others start and stop. `app.state.service` is it."""
    app = Application(
        service,
        title="DistriNews",
        summary="Labels for texts, from a classifier on the Hugging Face Hub.",
        description="Every answer carries `X-Request-ID` and `X-Model-Revision`, the commit that serves.",
        version="1",
    )
    _add_predictions(app, service)
    _add_operations(app, service)
    _add_errors(app)
    return app


def _commit(service: Service) -> str | None:
    return service.model.release.commit if service.model else None


def _add_predictions(app: FastAPI, service: Service) -> None:
    settings = service.settings
    refusals = _refusals(400, *([401] if settings.api_keys else []), 408, 413, 415, 422, 429, 500, 503)
    documented: dict[str, Any] = {"responses": refusals, "tags": ["predict"], "dependencies": _KEY if settings.api_keys else []}

    async def predict(body: PredictRequest) -> Response:
        """The label of one text, with its calibrated confidence and the probability of every label."""
        reply = await service.predict([body.text], ["text"], body.truncate)
        (prediction,) = predictions(reply, body.top_k)
        release = reply.model.release
        return json_answer({**prediction, "model": release.model, "revision": release.commit}, headers=revision(reply))

    async def predict_batch(body: BatchRequest) -> Response:
        """The labels of several texts, in their order. A text gets the same answer alone and in any company."""
        reply = await service.predict(body.texts, names("texts", len(body.texts)), body.truncate)
        release = reply.model.release
        answer = {"predictions": predictions(reply, body.top_k), "model": release.model, "revision": release.commit}
        return json_answer(answer, headers=revision(reply))

    async def infer(body: InferenceRequest) -> Response:
        """The same in the Hugging Face shape, for `huggingface_hub.InferenceClient(...).text_classification`.

        A list of scores for each text, the best first, also for a single text.
        """
        wanted = body.parameters or Parameters()
        reply = await service.predict(body.inputs, names("inputs", len(body.inputs)), wanted.truncation is not False)
        return json_answer(scores(reply, wanted.function_to_apply, wanted.top_k), headers=revision(reply))

    def names(field: str, count: int) -> list[str]:
        if count > settings.max_texts:
            message = f"{count} texts were given; allowed are at most {settings.max_texts} in one request."
            raise Refusal(422, "too_many_texts", message, field=field)
        return [f"{field}[{number}]" for number in range(count)]

    app.router.routes += [
        PredictionRoute("/predict", predict, service, response_model=PredictAnswer, **documented),
        PredictionRoute("/predict/batch", predict_batch, service, response_model=BatchAnswer, **documented),
        PredictionRoute("/", infer, service, response_model=list[list[LabelScore]], **documented),
    ]


def _add_operations(app: FastAPI, service: Service) -> None:
    settings, page = service.settings, PAGE.read_text(encoding="utf-8")

    # Probes ask with HEAD; the server leaves the body out.
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operations"])
    async def health() -> HealthAnswer:
        """The process is alive; it may still be loading its model."""
        return HealthAnswer()

    @app.head("/ready", include_in_schema=False)
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

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["operations"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/rollback", responses=_refusals(401, 403, 409, 500, 503), dependencies=_KEY, tags=["operations"])
    async def rollback(request: Request) -> RollbackAnswer:
        """Back to the commit that served before; the one that serves now is not taken again. Asks for the operators' key."""
        if not settings.admin_key:
            message = "This service has no key for operators; start it with one in the environment variable DISTRINEWS_ADMIN_KEY."
            raise Refusal(403, "no_admin_key", message)
        key = request.headers.get("X-API-Key")
        check_key(None if key is None else key.encode("latin-1"), [settings.admin_key.encode()])
        # In a context of its own: what it starts outlives this request and is not to be logged under its id.
        return RollbackAnswer(revision=await asyncio.create_task(service.rollback(), context=contextvars.Context()))

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, tags=["operations"])
    async def demo() -> HTMLResponse:
        """The page to try it at."""
        return HTMLResponse(page, headers=PAGE_HEADERS)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> Response:
        return refused(error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code, message = {
            404: ("not_found", "There is nothing at this path; /docs lists what there is."),
            405: ("method_not_allowed", "This path does not take this method; /docs lists what there is."),
        }.get(error.status_code, ("error", str(error.detail)))
        answer = refused(Refusal(error.status_code, code, message))
        answer.headers.update(error.headers or {})
        if error.status_code == 405:  # Starlette names those of one route; / has two
            here = [route for route in app.routes if isinstance(route, Route) and route.path == request.url.path]
            answer.headers["Allow"] = ", ".join(sorted(method for route in here for method in route.methods or ()))
        return answer

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        return defect()
