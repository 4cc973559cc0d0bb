"""Dropout on the CPU for less: torch draws 64 random bits an element there, one element after the other on one thread.

That was a quarter of a training step of MiniLM (32 rows of 56 tokens, two threads). Here one draw of 64 bits decides on
four elements, 16 bits each. So p is rounded to 1/65,536 (0.1 becomes 0.100006, and what is kept is scaled to match). The
bits come from torch's own generator: seeds, checkpoints and random states work as ever.

Torch's own dropout stays on a GPU; in evaluation; in float64, which is for comparisons; and under gradient checkpointing,
which runs parts of the forward again when the forward is over, and would draw other masks then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PARTS = 2**16  # values that 16 bits have


def multipliers(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
    """A mask of `shape`: 0 with probability p, where an element is dropped, else 1 / (1 - p); p in (0, 1), rounded to 1/PARTS."""
    numel, dropped = math.prod(shape), round(p * PARTS)
    draws = torch.empty((numel + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # None: all 64 bits
    bits = draws.view(torch.int16)[:numel].view(shape)
    return (bits >= dropped - PARTS // 2).to(dtype).mul_(PARTS / (PARTS - dropped))


def covered(x: Tensor, p: float) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 < round(p * PARTS) < PARTS


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, which it leaves to torch where this file does not cover it."""
    if not training or inplace or not covered(input, p):
        return functional.dropout(input, p, training, inplace)
    return input * multipliers(input.shape, p, input.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` as its documentation writes it: torch's fused kernels have no dropout on the CPU anyway.

    `query` `(..., queries, width)`, `key` and `value` `(..., keys, width)`, `attn_mask` broadcast to `(..., queries, keys)`:
    bool, True where a query sees a key, or float, added to the scores. Left to torch if some query sees no key, as padding
    may in a local window: the formula gives NaN there, torch gives zeros.
    """
    ours, bias = covered(query, dropout_p) and not is_causal and not enable_gqa, attn_mask
    if ours and bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -math.inf)
        ours = bool((bias.detach().amax(-1) > torch.finfo(bias.dtype).min).all())
    if not ours:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return dropout(weights, dropout_p).to(value.dtype) @ value  # a float32 mask makes float32 weights of bfloat16 scores


REPLACED: dict[Any, Callable[..., Tensor]] = {functional.dropout: dropout, functional.scaled_dot_product_attention: attention}


class FastDropout(TorchFunctionMode):
    """While it is entered, what a model's code calls by torch's names is done here. `enter` and `leave` are a model's hooks.

    Methods, not closures, so that a copied or pickled model has a mode of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered = ExitStack()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))

    def enter(self, model: nn.Module, *_: Any) -> None:
        self.entered.close()  # Ctrl-C in the last forward skipped even hooks that are always called
        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu and model.training and not getattr(model, "is_gradient_checkpointing", False):
            self.entered.enter_context(self)

    def leave(self, *_: Any) -> None:
        self.entered.close()


def use_fast_dropout(model: nn.Module) -> None:
    """From now on the model's training forwards on the CPU take it, whoever calls them. The model's own code and names stay."""
    mode = FastDropout()
    model.register_forward_pre_hook(mode.enter)
    model.register_forward_hook(mode.leave, always_call=True)
