"""What goes in and out over HTTP. /docs shows these with their examples."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, StrictBool


def _readable(text: str) -> str:
    """ValueError with what is to be said after the field's name. Half characters do not get past the JSON parser."""
    if not text or text.isspace():
        raise ValueError("is blank; allowed is any text with at least one character to read")
    if "\0" in text:
        raise ValueError("holds a NUL character (\\u0000); allowed is any text without")
    return text


Text = Annotated[str, Field(strict=True, min_length=1), AfterValidator(_readable)]
Texts = Annotated[list[Text], FailFast()]
TopK = Annotated[int, Field(strict=True, ge=1, description="Only so many labels, the most probable ones, best first; null: all labels.")]
Truncate = Annotated[StrictBool, Field(description="false: a text longer than the model reads is refused; true: its end is cut off.")]

A_TEXT, ANOTHER = "Oil prices rise as cartel cuts output", "Striker scores twice in cup final"


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")
    allowed: ClassVar[str]  # said when something else was sent


class PredictRequest(Body):
    allowed = '{"text": "..."}'
    text: Text = Field(description="The text to classify.", examples=[A_TEXT])
    top_k: TopK | None = None
    truncate: Truncate = True


class BatchRequest(Body):
    allowed = '{"texts": ["...", "..."]}'
    texts: Texts = Field(
        description="The texts to classify; /info says how many may be sent at once.", examples=[[A_TEXT, ANOTHER]], min_length=1
    )
    top_k: TopK | None = None
    truncate: Truncate = True


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")
    top_k: TopK | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        default=None, description="From logits to scores; null: softmax, the calibrated probabilities."
    )
    truncation: Truncate | None = None


class InferenceRequest(Body):
    """What `huggingface_hub.InferenceClient.text_classification` sends."""

    allowed = '{"inputs": "...", "parameters": {"top_k": 1}}'
    inputs: Annotated[
        Texts, BeforeValidator(lambda given: [given] if isinstance(given, str) else given, json_schema_input_type=Text | list[Text])
    ] = Field(description="A text or a list of texts.", examples=[A_TEXT], min_length=1)
    parameters: Parameters | None = None


class Prediction(BaseModel):
    label: str = Field(description="The most probable label.")
    confidence: float = Field(description="Its probability, 0-1, calibrated by the release.")
    probabilities: dict[str, float] = Field(description="Every label's probability, which add up to 1; with `top_k` the largest ones.")
    tokens: int = Field(description="Tokens the model read, special ones included.")
    truncated: bool = Field(description="The text was longer than the model reads; its end was cut off.")


class PredictAnswer(Prediction):
    model: str
    revision: str = Field(description="The commit that answered.")


class BatchAnswer(BaseModel):
    predictions: list[Prediction] = Field(description="One per text, in the order of the texts.")
    model: str
    revision: str = Field(description="The commit that answered.")


class LabelScore(BaseModel):
    label: str
    score: float


class RollbackAnswer(BaseModel):
    revision: str = Field(description="The commit that serves from now on.")


class ErrorAnswer(BaseModel):
    code: str = Field(description="A short word for programs.", examples=["text_missing"])
    message: str = Field(description="One sentence: what was given, what is allowed.")
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
    engine_choice: dict[str, Any] | None = Field(default=None, description="Which engines were measured here, and whether that is settled.")
    updates: dict[str, Any] | None = Field(default=None, description="The watch for newer revisions: last check, swaps, what was refused.")
    api_key_required: bool = Field(description="Predictions ask for the header X-API-Key.")
    limits: dict[str, int | float]
    versions: dict[str, str]
    uptime_seconds: float
