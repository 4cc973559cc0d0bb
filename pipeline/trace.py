"""What each optimizer step of a run saw and did, kept so small that two runs can be compared step by step afterwards.

    python -m pipeline.launch train-ddp configs/ag_news.yaml --trace true --logging_steps 1 --max_steps 12 --output_dir outputs/a
    python -m benchmarks.parity --compare outputs/a outputs/b         # where two such runs first part, in words

`attach` puts torch's public hooks on a bare model and its optimizer; each rank writes one JSON line a step. Rows are
kept as hashes with their logits. A tensor is kept as its sha256, which tells whether two are the same bits, and as a
sketch of eight numbers, which tells how far apart they are without keeping either: each element, with a random sign
that is the same in every run, is added to one of eight sums. The sketch of a difference is the difference of the
sketches, and the square of its norm is, on average over the signs, the square of the distance (Charikar, Chen and
Farach-Colton, "Finding frequent items in data streams", 2002).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SKETCH = 8


def attach(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path, rank: int, after_step: int = 0) -> None:
    """From here on write a line to `folder/rank-<rank>.jsonl` for every optimizer step of this process.

    Args:
        model: the bare model, not its DistributedDataParallel wrapper; called with `input_ids` and `attention_mask`
            `(batch, seq)` by name, it answers with `.logits` `(batch, classes)`.
        optimizer: torch's own, not Accelerate's wrapper.
        after_step: optimizer steps already done, in a resumed run; its lines are added to those that are there.

    Evaluation (`model.eval()`) is not traced. A step that fp16 skips for an overflow is told together with the next.
    """
    path = Path(folder) / f"rank-{rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    signs = torch.randint(0, 2, (max(p.numel() for p in model.parameters()),), generator=torch.Generator().manual_seed(0)) * 2 - 1
    signs = signs.to(torch.int8)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    step, rows, micro_batches = after_step, [], []  # type: ignore[var-annotated]
    gradient: dict[str, Any] = {}

    def write(line: Mapping[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def before_forward(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            rows[:] = [
                hashlib.sha256(ids[kept.bool()].cpu().numpy().tobytes()).hexdigest()[:16]  # without padding: it depends on the neighbours
                for ids, kept in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            ]

    def after_forward(_: torch.nn.Module, args: Any, output: Any) -> None:
        if model.training:
            micro_batches.append(list(zip(rows, output.logits.detach().double().cpu().tolist(), strict=True)))

    def before_step(*_: Any) -> None:
        gradient.update({name: fingerprint(p.grad, signs) for name, p in parameters.items() if p.grad is not None})

    def after_step_(*_: Any) -> None:
        nonlocal step
        step += 1
        weights = {name: fingerprint(p, signs) for name, p in parameters.items()}
        write({"step": step, "rows": micro_batches, "gradient": gradient, "weights": weights})
        micro_batches.clear()
        gradient.clear()

    if after_step == 0:
        path.unlink(missing_ok=True)
    write({"after_step": after_step, "weights": {name: fingerprint(p, signs) for name, p in parameters.items()}})
    model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.register_forward_hook(after_forward)
    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step_)


def fingerprint(tensor: torch.Tensor, signs: torch.Tensor) -> dict[str, Any]:
    """`sha256` of the tensor's bytes, `norm` (Euclidean) and `sketch`, the latter two in float64."""
    flat = tensor.detach().cpu().contiguous().flatten()
    # A change of sign is exact in every precision, so the signed copy need not be float64; the sums must.
    padded = torch.nn.functional.pad(flat * signs[: flat.numel()], (0, -flat.numel() % SKETCH))
    return {
        "sha256": hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest(),
        "norm": torch.linalg.vector_norm(flat, dtype=torch.float64).item(),
        "sketch": padded.view(-1, SKETCH).sum(0, dtype=torch.float64).tolist(),
    }
