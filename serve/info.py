"""What /info tells: which model serves, on what, how it was proven, within which limits."""

from __future__ import annotations

import platform
import time
from pathlib import Path

from serve.machine import versions
from serve.proof import MAX_NEIGHBOUR_CHANGE
from serve.schemas import InfoAnswer
from serve.service import Service


def info(service: Service) -> InfoAnswer:
    settings, model = service.settings, service.model
    answer = InfoAnswer(
        model=Path(settings.model).name if Path(settings.model).is_dir() else settings.model,  # folders are nobody's business
        revision=settings.revision or None,
        limits={
            "max_texts": settings.max_texts,
            "max_body_bytes": settings.max_body_bytes,
            "queue_tokens": settings.queue_tokens,
            "deadline_seconds": settings.deadline_seconds,
        },
        engine_choice=service.engine_choice(),
        updates=service.updates(),
        api_key_required=bool(settings.api_keys),
        versions=_versions(with_torch=model is not None and model.engine.name.startswith("torch")),
        uptime_seconds=round(time.monotonic() - service.started, 3),
    )
    if model is None:
        return answer
    release, engine, proof = model.release, model.engine, model.proof
    return answer.model_copy(
        update={
            "model": release.model,
            "revision": release.revision,
            "commit": release.commit,
            "labels": release.labels,
            "max_length": model.tokenizer.max_length,
            "engine": engine.name,
            "device": engine.device,
            "precision": engine.precision,
            "threads": engine.threads,
            "proof": {
                "examples": proof.examples,
                "agreement": proof.agreement,
                "agreement_allowed": settings.min_agreement,
                "max_probability_change": proof.max_probability_change,
                "max_probability_change_allowed": settings.max_probability_change,
                "max_neighbour_change": proof.max_neighbour_change,
                "max_neighbour_change_allowed": MAX_NEIGHBOUR_CHANGE,
                "seconds": round(proof.seconds, 3),
            },
            "rejected_engines": list(model.rejected),
        }
    )


def _versions(with_torch: bool) -> dict[str, str]:
    packages = ["onnxruntime", "openvino", "tokenizers", "huggingface_hub", "fastapi"] + ["torch", "transformers"] * with_torch
    return {"python": platform.python_version(), **versions(*packages)}
