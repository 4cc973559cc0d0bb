"""What callers read: from logits to labels and scores, and a refusal as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import Response
from pydantic_core import to_json

from serve.errors import Refusal
from serve.service import Reply
from serve.text import softmax

Scores = npt.NDArray[np.float64]  # (texts, classes)


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` is trusted to have the shape its route documents: validating it would cost as much as computing it."""
    return Response(to_json(content), status, headers, "application/json")


def refused(error: Refusal) -> Response:
    """The one shape of every error, `schemas.ErrorAnswer`."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = 'ApiKey header="X-API-Key"'
    if error.revision:
        headers["X-Model-Revision"] = error.revision
    if error.message.isascii() and error.message.isprintable():
        headers["X-Error-Message"] = error.message  # where the Hugging Face clients look for it
    return json_answer({"code": error.code, "message": error.message, "field": error.field}, error.status, headers)


def defect() -> Response:
    """For what nobody foresaw; the edge logs its place."""
    return refused(Refusal(500, "defect", "The service has a defect; its log names the place, under this answer's X-Request-ID."))


def revision(reply: Reply) -> dict[str, str]:
    """The header that names the commit which answered."""
    return {"X-Model-Revision": reply.model.release.commit}


def predictions(reply: Reply, top_k: int | None = None) -> list[dict[str, Any]]:
    """One `schemas.Prediction` per text, in their order. With `top_k` its probabilities are the largest ones, in order."""
    labels, found = reply.model.release.labels, []
    for text, row in zip(reply.tokens, _rounded(softmax(reply.logits)), strict=True):
        named = _best(labels, row, top_k) if top_k else list(zip(labels, row, strict=True))
        confidence = max(row)
        found.append(
            {
                "label": labels[row.index(confidence)],
                "confidence": confidence,
                "probabilities": dict(named),
                "tokens": len(text.ids),
                "truncated": text.truncated,
            }
        )
    return found


def scores(reply: Reply, function: str | None = None, top_k: int | None = None) -> list[list[dict[str, Any]]]:
    """For each text its `schemas.LabelScore`s, the best first, as transformers' text-classification pipeline gives them."""
    logits = reply.logits
    if function == "none":
        values = logits
    elif function == "sigmoid":
        values = 0.5 * (1 + np.tanh(0.5 * logits))  # 1 / (1 + exp(-x)) without its overflow
    else:
        values = softmax(logits)
    labels = reply.model.release.labels
    return [[{"label": label, "score": score} for label, score in _best(labels, row, top_k)] for row in _rounded(values)]


def _rounded(values: Scores) -> list[list[float]]:
    rows: list[list[float]] = values.round(6).tolist()
    return rows


def _best(labels: list[str], row: list[float], top_k: int | None) -> list[tuple[str, float]]:
    return sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])[:top_k]
