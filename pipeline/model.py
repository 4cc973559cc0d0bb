"""The model, its tokenizer, its loss, and the optimizer of the raw script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.config import TrainConfig
from pipeline.dropout import use_fast_dropout
from pipeline.errors import UserError
from pipeline.sources import Source

DROPOUTS = ("dropout", "attention_dropout", "seq_classif_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
            "classifier_dropout", "hidden_dropout", "classifier_dropout_prob", "embedding_dropout", "mlp_dropout")  # fmt: skip


def load_tokenizer(source: Source, config: TrainConfig) -> Any:
    """The model's fast tokenizer; it truncates to `max_length` wherever it is used later, the Hub included."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"model '{config.model}' has no tokenizer that can be used: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        raise UserError(f"model '{config.model}' has a tokenizer without a padding token; choose an encoder such as DistilBERT.")
    tokenizer.model_max_length = config.max_length
    return tokenizer


def build_model(source: Source, config: TrainConfig, label_names: Sequence[str], attention: str | None = None) -> nn.Module:
    """The pre-trained encoder with a new classification head, on the CPU, the head drawn from `seed`.

    In fp32 whatever the precision of training: autocast computes in less where that is safe. Only fp64 holds its weights
    in float64 (drawn in fp32, so that they start from the same values).
    """
    import transformers
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    longest = getattr(settings, "max_position_embeddings", None)
    if longest and config.max_length > longest:
        raise UserError(f"max_length is {config.max_length}, but {config.model} reads at most {longest} tokens. Lower --max_length.")
    settings.num_labels = len(label_names)
    settings.id2label = dict(enumerate(label_names))
    settings.label2id = {name: i for i, name in enumerate(label_names)}
    settings.problem_type = "single_label_classification"
    if config.dropout is not None:
        for name in DROPOUTS:
            if getattr(settings, name, None) is not None:
                setattr(settings, name, config.dropout)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a new head is what we ask for: no table of missing weights
    try:
        torch.manual_seed(config.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            source.folder,
            config=settings,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except ValueError as error:
        raise UserError(f"model '{config.model}' cannot classify texts: {str(error).splitlines()[0]}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    # Stock Trainer believes that a forward with **kwargs divides the loss by the tokens of the global batch, and
    # multiplies losses and gradients by the world size and the accumulation. This model's mean loss wants neither.
    model.accepts_loss_kwargs = False
    use_fast_dropout(model)
    return model.double() if config.precision == "fp64" else model


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the rows of (weighted) cross-entropy; logits `(batch, classes)`, labels `(batch,)`, weights `(classes,)`.

    Weighted rows are divided by the number of rows, not by the sum of their weights (torch's default): only so is the
    mean over ranks of equal micro-batches the loss of the global batch.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if class_weights is None:
        return nn.functional.cross_entropy(logits, labels)
    rows = nn.functional.cross_entropy(logits, labels, reduction="none")
    return (class_weights[labels] * rows).mean()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay and without: biases and LayerNorm (all that has one dimension) are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    kept = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def warmup_steps(config: TrainConfig, total_steps: int) -> int:
    return math.ceil(config.warmup_share * total_steps)


def scheduler_name(config: TrainConfig) -> str:
    """transformers' name for the configured schedule: its plain `constant` would skip the warm-up."""
    return "constant_with_warmup" if config.schedule == "constant" else config.schedule


def weights_sha256(model: nn.Module) -> str:
    """One hash over all weights, name by name: equal hashes are bit-identical models."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
