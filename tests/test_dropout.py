"""Dropout on the CPU (pipeline/dropout.py): its masks, its attention, what it leaves to torch, and that models take it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from pipeline import dropout
from pipeline.config import TrainConfig
from pipeline.dropout import PARTS, FastDropout, attention, multipliers, use_fast_dropout
from pipeline.model import build_model
from pipeline.sources import Source

SIGMAS = 5
SIZES = {"vocab_size": 50, "num_labels": 3, "initializer_range": 0.2}
BERT_SIZES = SIZES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.tensor([[2, 7, 9, 11, 30, 3, 0, 0], [2, 8, 41, 23, 17, 5, 6, 3]])  # (rows, seq), 0 is padding


def bert(attn: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**BERT_SIZES, attn_implementation=attn)).train()


def distilbert(attn: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=2, hidden_dim=32, attn_implementation=attn)
    return DistilBertForSequenceClassification(config).train()


def deberta(attn: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    return DebertaV2ForSequenceClassification(DebertaV2Config(**BERT_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])).train()


KINDS = [(bert, "sdpa"), (bert, "eager"), (distilbert, "sdpa"), (distilbert, "eager"), (deberta, "eager")]
MODELS = pytest.mark.parametrize(("make", "attn"), KINDS)


def logits(model: nn.Module, ids: Tensor = IDS, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return model(input_ids=ids, attention_mask=(ids != 0).long()).logits


def with_fast(model: nn.Module) -> nn.Module:
    use_fast_dropout(model)
    return model


def drawn(shapes: list[torch.Size], fast: bool) -> Tensor:
    """The generator's state after seed 1 and these masks: a draw for four elements, or torch's one for each."""
    torch.manual_seed(1)
    for shape in shapes:
        torch.empty((math.prod(shape) + 3) // 4 if fast else math.prod(shape), dtype=torch.int64).random_(-(2**63), None)
    return torch.get_rng_state()


def depth() -> int:
    """How many torch function modes are entered."""
    return torch._C._len_torch_function_stack()


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all masks drawn in the test."""
    shapes: list[torch.Size] = []

    def recorded(shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
        shapes.append(shape)
        return multipliers(shape, p, dtype)

    monkeypatch.setattr(dropout, "multipliers", recorded)
    return shapes


# The masks


@pytest.mark.parametrize("p", [0.001, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_random_in_every_place(p: float, dtype: torch.dtype) -> None:
    n, exact = 1_000_000, round(p * PARTS) / PARTS
    torch.manual_seed(0)
    mask = multipliers(torch.Size([1000, 1000]), p, dtype).flatten()
    kept = mask != 0
    assert torch.equal(mask[kept].unique(), torch.tensor([1 / (1 - exact)]).to(dtype))

    spread = math.sqrt(exact * (1 - exact))
    assert abs(exact - p) <= 0.5 / PARTS
    assert abs(kept.double().mean() - (1 - exact)) < SIGMAS * spread / math.sqrt(n)
    lanes = kept.view(-1, 4).double()  # the four elements of one draw
    assert (lanes.mean(0) - (1 - exact)).abs().max() < SIGMAS * spread / math.sqrt(n / 4)
    correlation = torch.corrcoef(lanes.T) - torch.eye(4)
    assert correlation.abs().max() < SIGMAS / math.sqrt(n / 4)
    for apart in (1, 2, 3, 4, 5, 8, 1000):  # 1000: the same place of the next row
        pairs = torch.stack([kept[:-apart].double(), kept[apart:].double()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < SIGMAS / math.sqrt(n), apart


@pytest.mark.parametrize("shape", [(), (0, 5), (1,), (7, 3), (2, 3, 5, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    mask = multipliers(torch.Size(shape), 0.5, torch.float32)
    assert mask.shape == shape and set(mask.flatten().tolist()) <= {0.0, 2.0}


def test_the_seed_decides() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return multipliers(torch.Size([64, 64]), 0.5, torch.float32)

    assert torch.equal(draw(1), draw(1))
    assert 0.4 < (draw(1) == draw(2)).float().mean() < 0.6
    torch.manual_seed(3)
    draw_once = multipliers(torch.Size([64]), 0.5, torch.float32)
    state = torch.get_rng_state()  # what a checkpoint keeps
    following = multipliers(torch.Size([64]), 0.5, torch.float32)
    torch.set_rng_state(state)
    assert torch.equal(multipliers(torch.Size([64]), 0.5, torch.float32), following) and not torch.equal(draw_once, following)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_masks(dtype: torch.dtype) -> None:
    x, upstream = torch.randn(8, 33, dtype=dtype, requires_grad=True), torch.randn(8, 33, dtype=dtype)
    torch.manual_seed(1)
    with FastDropout():
        y = nn.Dropout(0.3)(x)
    y.backward(upstream)
    torch.manual_seed(1)
    mask = multipliers(x.shape, 0.3, dtype)
    assert torch.equal(y, x * mask) and torch.equal(x.grad, upstream * mask)


# Attention


def parts(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `(batch 2, heads 3, tokens 6, width 8)`."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 6, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    return query, key, value


SEEN = torch.ones(2, 1, 1, 6, dtype=torch.bool)
SEEN[0, ..., 4:] = False
ADDED = torch.zeros(2, 1, 6, 6).masked_fill(~SEEN, torch.finfo(torch.float32).min)
BLIND = SEEN.expand(2, 1, 6, 6).clone()
BLIND[1, 0, 3] = False
MASKS = {
    "none": None,
    "bool": SEEN,
    "lowest": ADDED,
    "minus infinity": torch.zeros(2, 1, 6, 6).masked_fill(~SEEN, -math.inf),
    "learned, of each head": torch.linspace(-1, 1, 108).view(1, 3, 6, 6).requires_grad_(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_torchs_but_for_the_masks(mask: Tensor | None, scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(dropout, "multipliers", lambda shape, p, dtype: shapes.append(shape) or torch.ones(shape, dtype=dtype))
    query, key, value = parts()
    ours = attention(query, key, value, mask, 0.1, scale=scale)
    torchs = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    assert shapes == [(2, 3, 6, 6)]
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)
    learns = [x for x in (query, key, value, mask) if x is not None and x.requires_grad]
    gradients = (torch.autograd.grad(out, learns, torch.full_like(out, 0.1).cumsum(-1)) for out in (ours, torchs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_attentions_mean_over_masks_is_attention_without() -> None:
    query, key, value = (x.detach()[:1].expand(20_000, 3, 6, 8) for x in parts())
    torch.manual_seed(1)
    out = attention(query, key, value, SEEN[:1], 0.2).double()
    expected = functional.scaled_dot_product_attention(query[:1], key[:1], value[:1], SEEN[:1]).double()
    assert ((out.mean(0) - expected[0]) / (out.std(0) / math.sqrt(len(out)))).abs().max() < SIGMAS


@pytest.mark.parametrize("mask", [None, SEEN, ADDED])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)])
def test_attention_in_bfloat16(mask: Tensor | None, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "multipliers", lambda shape, p, dtype: torch.ones(shape, dtype=dtype))
    query, key, value = parts(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = attention(query, key, value, mask, 0.1)
        torchs = functional.scaled_dot_product_attention(query, key, value, mask)
    assert ours.dtype == torchs.dtype == torch.bfloat16
    assert (ours - torchs).abs().max() < 0.03  # bfloat16 has 8 bits
    ours.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in (query, key, value))


# What is left to torch, bit for bit and draw for draw

X = torch.linspace(-1, 1, 200)
LEFT_TO_TORCH: dict[str, Callable[[], Tensor]] = {
    "evaluation": lambda: functional.dropout(X, 0.1, False),
    "evaluation by keyword": lambda: functional.dropout(input=X, p=0.1, training=False),
    "evaluation of a module": lambda: nn.Dropout(0.1).eval()(X),
    "float64": lambda: functional.dropout(X.double(), 0.1),
    "in place": lambda: nn.Dropout(0.1, inplace=True)(X.clone()),
    "p 0": lambda: functional.dropout(X, p=0.0),
    "p 1": lambda: functional.dropout(X, p=1.0),
    "p that rounds to 0": lambda: functional.dropout(X, 1e-6),
    "p that rounds to 1": lambda: functional.dropout(X, 1 - 1e-6),
    "another dropout": lambda: functional.alpha_dropout(X, 0.1, True),
    "attention in evaluation": lambda: functional.scaled_dot_product_attention(*parts(), attn_mask=SEEN),
    "attention in float64": lambda: functional.scaled_dot_product_attention(*parts(torch.float64), attn_mask=SEEN, dropout_p=0.1),
    "causal attention": lambda: functional.scaled_dot_product_attention(*parts(), dropout_p=0.1, is_causal=True),
    "causal attention, positional": lambda: functional.scaled_dot_product_attention(*parts(), None, 0.1, True, scale=0.5),
    "grouped attention": lambda: functional.scaled_dot_product_attention(
        parts()[0], parts()[1][:, :1], parts()[2][:, :1], dropout_p=0.1, enable_gqa=True
    ),
    "a query that sees nothing": lambda: functional.scaled_dot_product_attention(*parts(), BLIND, 0.1),
    "a query that sees nothing, added": lambda: functional.scaled_dot_product_attention(
        *parts(), torch.zeros(BLIND.shape).masked_fill(~BLIND, -math.inf), 0.1
    ),
}


@pytest.mark.parametrize("call", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH.keys())
def test_left_to_torch(call: Callable[[], Tensor], masks: list[torch.Size]) -> None:
    torch.manual_seed(1)
    torchs, state = call(), torch.get_rng_state()
    torch.manual_seed(1)
    with FastDropout():
        ours = call()
    assert torch.equal(ours, torchs) and ours.isfinite().all() and torch.equal(torch.get_rng_state(), state)
    assert not masks


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.dropout(X),
        lambda: functional.dropout(input=X, p=0.5),
        lambda: functional.dropout(X, 0.5, True, False),
        lambda: functional.dropout(X.bfloat16(), inplace=False, training=True),
        lambda: nn.Dropout()(X),
    ],
)
def test_however_it_is_called(call: Callable[[], Tensor], masks: list[torch.Size]) -> None:
    with FastDropout():
        y = call()
    assert masks == [X.shape] and set((y / X.to(y.dtype)).unique().tolist()) == {0.0, 2.0}


def test_attention_however_it_is_called(masks: list[torch.Size]) -> None:
    query, key, value = parts()
    out = []
    with FastDropout():
        for call in (
            lambda: functional.scaled_dot_product_attention(query, key, value, SEEN, 0.1),
            lambda: functional.scaled_dot_product_attention(query, key, value, dropout_p=0.1, attn_mask=SEEN, is_causal=False),
            lambda: functional.scaled_dot_product_attention(
                query=query, key=key, value=value, attn_mask=SEEN, dropout_p=0.1, scale=8**-0.5
            ),
        ):
            torch.manual_seed(1)
            out.append(call())
    assert len(masks) == 3 and torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_a_wrong_p_is_refused_as_by_torch() -> None:
    with FastDropout(), pytest.raises(ValueError, match="between 0 and 1"):
        functional.dropout(X, 1.5)


# Models


@MODELS
def test_a_model_takes_it_for_all_its_dropout(make: Callable[[str], nn.Module], attn: str, masks: list[torch.Size]) -> None:
    plain, fast = make(attn), with_fast(make(attn))
    before = logits(fast)
    assert len(masks) >= 6 and depth() == 0
    assert torch.equal(torch.get_rng_state(), drawn(masks, fast=True))
    assert not torch.equal(logits(plain), before)
    assert torch.equal(torch.get_rng_state(), drawn(masks, fast=False)), "some dropout of the model was not replaced"
    assert torch.equal(logits(fast), before)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(logits(fast).float(), torch.tensor([0, 2]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fast.parameters())


@pytest.mark.parametrize(("make", "attn"), KINDS[:4])
def test_a_model_is_torchs_in_the_mean(make: Callable[[str], nn.Module], attn: str) -> None:
    """Mean and spread of 20,000 logits, each of masks of its own."""
    rows = IDS[:1].expand(20_000, -1)
    with torch.no_grad():
        ours, torchs = (logits(model, rows).double() for model in (with_fast(make(attn)), make(attn)))
    error = ((ours.var(0) + torchs.var(0)) / len(rows)).sqrt()
    assert ((ours.mean(0) - torchs.mean(0)) / error).abs().max() < SIGMAS
    assert (ours.std(0) / torchs.std(0) - 1).abs().max() < 0.05
    assert ours.std(0).min() > 0.01, "no dropout at all would pass too"


@MODELS
def test_evaluation_and_float64_stay_bit_for_bit(make: Callable[[str], nn.Module], attn: str, masks: list[torch.Size]) -> None:
    plain, fast = make(attn), with_fast(make(attn))
    depths: list[int] = []
    next(layer for layer in fast.modules() if isinstance(layer, nn.Linear)).register_forward_hook(lambda *_: depths.append(depth()))
    assert torch.equal(logits(plain.eval()), logits(fast.eval()))
    assert depths == [0], "evaluation and export should not even meet the mode"
    assert torch.equal(logits(plain.double().train()), logits(fast.double().train()))
    assert not masks
    assert fast.state_dict().keys() == plain.state_dict().keys() and fast.config.to_dict() == plain.config.to_dict()


def test_gradient_checkpointing_keeps_torchs(masks: list[torch.Size]) -> None:
    """It runs layers again in backward, when the mode is left: with the masks of another algorithm, gradients would be wrong."""
    gradients = []
    for model in (bert(), with_fast(bert())):
        logits(model).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    plain, fast = gradients
    assert masks and not torch.equal(plain[0], fast[0])
    model = with_fast(bert())
    model.gradient_checkpointing_enable()
    masks.clear()
    logits(model).sum().backward()
    assert not masks
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises(error: type[BaseException], masks: list[torch.Size]) -> None:
    model = with_fast(distilbert())
    expected = logits(model)

    def fail(*_: Any) -> None:
        assert depth() == 1
        raise error

    hook = model.distilbert.transformer.register_forward_pre_hook(fail)
    for _ in range(3):
        with pytest.raises(error):
            logits(model)
        assert depth() == (error is KeyboardInterrupt)  # torch skips all hooks then: at most one is left, to the next forward
    hook.remove()
    assert torch.equal(logits(model), expected) and depth() == 0
    masks.clear()
    functional.dropout(X, 0.5)
    assert not masks


def test_a_hook_that_raises_before() -> None:
    model = distilbert()

    def fail(*_: Any) -> None:
        raise RuntimeError

    model.register_forward_pre_hook(fail)
    use_fast_dropout(model)
    with pytest.raises(RuntimeError):
        logits(model)
    assert depth() == 0


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_a_mode_of_its_own(duplicate: Callable[[nn.Module], nn.Module], masks: list[torch.Size]) -> None:
    model = with_fast(distilbert())
    other = duplicate(model)
    modes = [{id(hook.__self__) for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())} for m in (model, other)]
    assert [len(ids) for ids in modes] == [1, 1] and modes[0] != modes[1]
    assert torch.equal(logits(other), logits(model)) and len(masks) % 2 == 0 and masks and depth() == 0
    model.eval()
    masks.clear()
    logits(model)
    assert not masks
    logits(other)
    assert masks


def test_build_model_uses_it(tiny_model_dir: Path, masks: list[torch.Size]) -> None:
    names = ["a", "b", "c"]
    model = build_model(Source(tiny_model_dir, None), TrainConfig(), names).train()
    logits(model)
    assert len(masks) == 6  # embeddings, (attention, feed-forward) x 2, classifier
    masks.clear()
    logits(build_model(Source(tiny_model_dir, None), TrainConfig(precision="fp64"), names).train())
    logits(build_model(Source(tiny_model_dir, None), TrainConfig(dropout=0.0), names).train())
    assert not masks


def test_a_trained_model_is_saved_as_ever(tmp_path: Path) -> None:
    model = with_fast(distilbert())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    functional.cross_entropy(logits(model), torch.tensor([0, 2])).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = DistilBertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert not again._forward_hooks and torch.equal(logits(again), logits(model.eval()))
