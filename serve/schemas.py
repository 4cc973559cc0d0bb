"""What goes in and out over HTTP. /docs shows these with their examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field


def _readable(text: str) -> str:
    """ValueError with what is to be said after the field's name."""
    if not text.strip():
        raise ValueError("is blank; allowed is any text with at least one character to read")
    if "\0" in text:
        raise ValueError("holds a NUL character (\\u0000); allowed is any text without")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a character (a lone surrogate, \\ud800 to \\udfff); allowed is whole Unicode") from error
    return text


Text = Annotated[str, Field(strict=True), AfterValidator(_readable)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PredictRequest(_Request):
    text: Text = Field(description="The text to classify.", examples=["Oil prices rise as cartel cuts output"])


class BatchRequest(_Request):
    texts: Annotated[list[Text], FailFast()] = Field(
        description="The texts to classify; /info says how many may be sent at once.",
        examples=[["Oil prices rise as cartel cuts output", "Striker scores twice in cup final"]],
        min_length=1,
    )


class Prediction(BaseModel):
    label: str = Field(description="The most probable label.")
    confidence: float = Field(description="Its probability, 0-1.")
    probabilities: dict[str, float] = Field(description="Every label's probability; they add up to 1.")
    tokens: int = Field(description="Tokens the model read, special ones included.")
    truncated: bool = Field(description="The text was longer than the model reads; its end was cut off.")


class PredictAnswer(Prediction):
    model: str
    revision: str = Field(description="The commit that answered.")


class BatchAnswer(BaseModel):
    predictions: list[Prediction] = Field(description="One per text, in the order of the texts.")
    model: str
    revision: str = Field(description="The commit that answered.")


class ErrorAnswer(BaseModel):
    code: str = Field(description="A short word for programs.", examples=["text_missing"])
    error: str = Field(description="One sentence: what was given, what is allowed.")
    field: str | None = Field(default=None, description="The part of the request it is about.", examples=["text"])


class HealthAnswer(BaseModel):
    status: Literal["alive"] = "alive"


class ReadyAnswer(BaseModel):
    ready: bool
    reason: str | None = Field(default=None, description="Why it is not ready.")


class InfoAnswer(BaseModel):
    """What serves here; before /ready is green the parts about the model are null."""

    model: str
    revision: str | None = Field(description="What was asked for; null for a folder.")
    commit: str | None = None
    labels: list[str] | None = None
    max_length: int | None = Field(default=None, description="Tokens the model reads of a text, special ones included.")
    engine: str | None = None
    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    proof: dict[str, Any] | None = Field(
        default=None, description="How the engine did on the release's golden examples, and what was allowed."
    )
    rejected_engines: list[str] | None = Field(default=None, description="Engines that did not load or prove themselves, with the reason.")
    limits: dict[str, int | float]
    versions: dict[str, str]
    uptime_seconds: float
