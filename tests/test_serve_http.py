"""The service as its callers meet it: a real process, over HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import LABELS, MAX_LENGTH, Serve, make_release, make_text


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path) -> Path:
    return make_release(encoder_dir)


@pytest.fixture(scope="module")
def poisoned_dir(release_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real mistake: a word was added to the tokenizer and the model's embedding was not made larger."""
    import shutil

    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("poisoned") / "release"
    shutil.copytree(release_dir, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["quixotify"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def serve(poisoned_dir: Path) -> Iterator[Serve]:
    with Serve("--model", poisoned_dir, "--engine", "onnxruntime", "--max_texts", "64", "--max_body_bytes", "100000") as serve:
        yield serve


@pytest.fixture(scope="module")
def golden(release_dir: Path) -> dict[str, np.ndarray]:
    """Text -> probabilities by torch."""
    examples = json.loads((release_dir / "golden.json").read_text())["examples"]
    logits = np.array([example["logits"] for example in examples])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return {example["text"]: row for example, row in zip(examples, probabilities, strict=True)}


# ---- answers


def test_predict_gives_the_probabilities_of_training(serve: Serve, golden: dict[str, np.ndarray]) -> None:
    for text, expected in golden.items():
        response = serve.client.post("/predict", json={"text": text})
        answer = response.json()
        assert response.status_code == 200
        assert list(answer) == ["label", "confidence", "probabilities", "tokens", "truncated", "model", "revision"]
        assert list(answer["probabilities"]) == LABELS
        assert np.allclose(list(answer["probabilities"].values()), expected, atol=1e-4)
        assert answer["label"] == LABELS[expected.argmax()]
        assert answer["confidence"] == max(answer["probabilities"].values())
        assert answer["truncated"] == (len(text.split()) > MAX_LENGTH - 2) and answer["tokens"] <= MAX_LENGTH
        assert answer["model"] == "release" and answer["revision"] == response.headers["X-Model-Revision"]


def test_a_batch_keeps_its_order_and_changes_no_answer(serve: Serve, golden: dict[str, np.ndarray]) -> None:
    texts = list(golden)
    answer = serve.client.post("/predict/batch", json={"texts": texts}).json()
    assert list(answer) == ["predictions", "model", "revision"]
    for text, prediction in zip(texts, answer["predictions"], strict=True):
        alone = serve.client.post("/predict", json={"text": text}).json()
        assert prediction["label"] == alone["label"]
        assert all(abs(prediction["probabilities"][name] - alone["probabilities"][name]) <= 0.01 for name in LABELS)


def test_parallel_requests_are_batched_and_none_is_mixed_up(serve: Serve, golden: dict[str, np.ndarray]) -> None:
    texts = (list(golden) * 3)[:100]
    before = serve.metric("distrinews_batch_texts_count")
    start = threading.Barrier(100)

    def ask(text: str) -> Any:
        start.wait(20)
        return serve.client.post("/predict", json={"text": text})

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        responses = list(pool.map(ask, texts))
    assert {response.status_code for response in responses} == {200}
    for text, response in zip(texts, responses, strict=True):
        assert np.allclose(list(response.json()["probabilities"].values()), golden[text], atol=1e-4)
    assert serve.metric("distrinews_batch_texts_sum") >= 100 > serve.metric("distrinews_batch_texts_count") - before


@pytest.mark.parametrize(
    "text", ["😀", "العربية", "日本", "a\u0301" * 50, "a" * 90_000, " x ", "\u202eright to left", "[CLS] [SEP] [PAD]", "<script>", "%00", "\\"]
)  # fmt: skip
def test_unusual_texts_get_an_answer(serve: Serve, text: str) -> None:
    response = serve.client.post("/predict", json={"text": text})
    assert response.status_code == 200, response.text
    assert abs(sum(response.json()["probabilities"].values()) - 1) < 1e-4


# ---- what is wrong with a request is said

LONG = make_text(100, 1)
BAD: list[tuple[str, bytes | Any, int, str, str | None, str]] = [
    ("/predict", {}, 422, "text_missing", "text", "`text` is missing"),
    ("/predict", {"txt": "a"}, 422, "text_missing", "text", "`text` is missing"),
    ("/predict", {"text": ""}, 422, "text_unreadable", "text", "is blank"),
    ("/predict", {"text": " \n\t"}, 422, "text_unreadable", "text", "is blank"),
    ("/predict", {"text": "\u200b\u00ad"}, 422, "text_unreadable", "text", "no character that the model can read"),
    ("/predict", {"text": None}, 422, "not_a_string", "text", "is null; allowed is a string"),
    ("/predict", {"text": 5}, 422, "not_a_string", "text", "is a number"),
    ("/predict", {"text": ["a"]}, 422, "not_a_string", "text", "is a list"),
    ("/predict", {"text": True}, 422, "not_a_string", "text", "is true or false"),
    ("/predict", {"text": "a", "more": 1}, 422, "unknown_field", "more", "not known"),
    ("/predict", {"text": "a\0b"}, 422, "text_unreadable", "text", "NUL"),
    ("/predict", rb'{"text": "\ud800"}', 400, "not_json", None, "lone surrogate such as \\ud800, or another broken \\u escape, at line 1"),
    ("/predict", [1], 422, "body_type", None, "The body is a list"),
    ("/predict", "text", 422, "body_type", None, "The body is a string"),
    ("/predict", b"", 422, "body_missing", None, "The body is empty"),
    ("/predict", b"text=a", 400, "not_json", None, "The body is not JSON"),
    ("/predict", b'{"text": "a"', 400, "not_json", None, "at line 1 column 12"),
    ("/predict", b'{"text": "\xff\xfe"}', 400, "not_json", None, "bytes that are not UTF-8"),
    ("/predict", '{"text": "a"}'.encode("utf-16"), 400, "not_json", None, "not JSON"),
    ("/predict", b"[" * 90_000, 400, "not_json", None, "not JSON"),
    ("/predict", b'{"text": ' + b"[" * 50 + b"]" * 50 + b"}", 422, "not_a_string", "text", "is a list"),
    ("/predict", b'{"text": "a", "top_k": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "not_json", None, "recursion limit"),
    ("/predict", {"text": "a", "top_k": 0}, 422, "too_small", "top_k", "less than 1"),
    ("/predict", {"text": "a", "top_k": 1.5}, 422, "not_a_whole_number", "top_k", "is a number; allowed is a whole number"),
    ("/predict", {"text": "a", "top_k": True}, 422, "not_a_whole_number", "top_k", "is true or false"),
    ("/predict", {"text": "a", "truncate": "no"}, 422, "not_a_boolean", "truncate", "is a string; allowed is true or false"),
    ("/predict", {"text": LONG, "truncate": False}, 422, "text_too_long", "text", f"than the {MAX_LENGTH} tokens"),
    ("/predict/batch", {"texts": ["a", LONG], "truncate": False}, 422, "text_too_long", "texts[1]", f"than the {MAX_LENGTH} tokens"),
    ("/", {"inputs": 5}, 422, "not_a_list", "inputs", "is a number; allowed is a string or a list of strings"),
    ("/", {"inputs": {"text": "a", "text_pair": "b"}}, 422, "not_a_list", "inputs", "is an object"),
    ("/", {"inputs": []}, 422, "empty_list", "inputs", "is empty"),
    ("/", {"inputs": ["a"] * 65}, 422, "too_many_texts", "inputs", "allowed are at most 64"),
    ("/", {"inputs": "a", "parameters": []}, 422, "not_an_object", "parameters", "is a list"),
    (
        "/",
        {"inputs": "a", "parameters": {"topk": 1}},
        422,
        "unknown_field",
        "parameters.topk",
        "allowed are top_k, function_to_apply, truncation",
    ),
    ("/", {"inputs": "a", "parameters": {"function_to_apply": "relu"}}, 422, "unknown_value", "parameters.function_to_apply", "'sigmoid'"),
    ("/", {"inputs": LONG, "parameters": {"truncation": False}}, 422, "text_too_long", "inputs[0]", f"than the {MAX_LENGTH} tokens"),
    ("/", {"inputs": ["a", "quixotify"]}, 422, "text_fails", "inputs[1]", "cannot compute"),
    ("/predict", b'{"text": 1' + b"0" * 5000 + b"}", 400, "not_json", None, "number out of range"),
    ("/predict", {"text": "a" * 200_000}, 413, "too_large", None, "larger than 100000 bytes"),
    ("/predict/batch", {"texts": []}, 422, "empty_list", "texts", "is empty"),
    ("/predict/batch", {"texts": "a"}, 422, "not_a_list", "texts", "is a string"),
    ("/predict/batch", {"texts": ["a", 1, 2]}, 422, "not_a_string", "texts[1]", "`texts[1]` is a number"),
    ("/predict/batch", {"texts": ["a", "\u200b"]}, 422, "text_unreadable", "texts[1]", "no character"),
    ("/predict/batch", {"texts": ["a"] * 65}, 422, "too_many_texts", "texts", "65 texts were given; allowed are at most 64"),
    ("/predict/batch", {"text": "a"}, 422, "texts_missing", "texts", '{"texts": ["...", "..."]}'),
    ("/predict", {"text": "please quixotify this"}, 422, "text_fails", "text", "cannot compute an answer for this text"),
    ("/predict/batch", {"texts": ["quixotify"]}, 422, "text_fails", "texts[0]", "cannot compute"),
    ("/predict/batch", {"texts": ["a", "quixotify"]}, 422, "text_fails", "texts[1]", "cannot compute"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[3]}-{str(case[1])[:20]}")
def test_a_bad_request_is_explained(serve: Serve, case: tuple[str, bytes | Any, int, str, str | None, str]) -> None:
    path, body, status, code, field, said = case
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = serve.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()
    assert list(error) == ["code", "message", "field"]
    assert (error["code"], error["field"]) == (code, field)
    assert said in error["message"] and error["message"].endswith(".")
    assert error["message"] == response.headers["X-Error-Message"]


def test_other_wrong_requests(serve: Serve) -> None:
    form = serve.client.post("/predict", data={"text": "a"})
    assert (form.status_code, form.json()["code"]) == (415, "content_type")
    assert (serve.client.get("/predict").status_code, serve.client.get("/nothing").json()["code"]) == (405, "not_found")
    # A body that grows without saying how long it will be.
    chunks = (b'{"text": "' if i == 0 else b"a" * 50_000 for i in range(100))
    endless = serve.client.post("/predict", content=chunks, headers={"Content-Type": "application/json"})
    assert (endless.status_code, endless.json()["code"]) == (413, "too_large")


def test_a_text_that_fails_fails_alone(serve: Serve, golden: dict[str, np.ndarray]) -> None:
    texts = [*golden] * 2 + [f"quixotify {word}" for word in ("oil", "cup", "web")]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        statuses = list(pool.map(lambda text: serve.client.post("/predict", json={"text": text}).status_code, texts))
    assert statuses == [200] * (len(texts) - 3) + [422] * 3
    assert serve.client.get("/ready").status_code == 200
    assert serve.metric("distrinews_engine_failures_total") >= 3
    assert "quixotify" not in serve.log()  # no text in the log


# ---- operations


def test_what_operators_ask(serve: Serve) -> None:
    assert serve.client.get("/health").json() == {"status": "alive"}
    assert serve.client.get("/ready").json() == {"ready": True, "reason": None}
    info = serve.client.get("/info").json()
    assert (info["model"], info["revision"], info["labels"], info["max_length"]) == ("release", None, LABELS, MAX_LENGTH)
    assert (info["engine"], info["device"], info["precision"], info["rejected_engines"]) == ("onnxruntime", "cpu", "fp32", [])
    assert info["proof"]["examples"] == 40 and info["proof"]["agreement"] == 1 and info["proof"]["max_probability_change"] < 1e-4
    assert info["limits"]["max_texts"] == 64 and info["uptime_seconds"] > 0 and info["threads"] >= 1
    assert {"python", "onnxruntime", "tokenizers"} <= set(info["versions"]) and "torch" not in info["versions"]


def test_metrics_count_every_request_once(serve: Serve) -> None:
    name = 'distrinews_requests_total{route="/predict",status="%d"}'
    ok, bad, tokens = (serve.metric(metric) for metric in (name % 200, name % 422, 'distrinews_tokens_total{kind="text"}'))
    for text in ("one two three", "four five six", ""):
        serve.client.post("/predict", json={"text": text})
    assert (serve.metric(name % 200), serve.metric(name % 422)) == (ok + 2, bad + 1)
    assert serve.metric('distrinews_tokens_total{kind="text"}') == tokens + 10
    assert serve.metric('distrinews_request_seconds_count{route="/predict"}') >= 3
    for path in ("/a", "/b", "/c"):
        serve.client.get(path)
    text = serve.client.get("/metrics").text
    assert 'route="other",status="404"' in text and '"/a"' not in text  # made-up paths make no new series


def test_the_page_and_the_documentation(serve: Serve) -> None:
    page = serve.client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "What is this text about?" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    outside = page.text.replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    assert "http://" not in outside and "https://" not in outside and "src=" not in outside
    assert serve.client.get("/docs").status_code == 200
    schema = serve.client.get("/openapi.json").json()
    documented = schema["paths"]["/predict"]["post"]["responses"]
    assert set(documented) == {"200", "400", "408", "413", "415", "422", "429", "500", "503"}
    assert documented["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")


# ---- an engine that hangs

HANGING = """
import pathlib, sys, time
from serve.__main__ import main
from serve.engine import OnnxEngine

whole, stuck = OnnxEngine.logits, pathlib.Path(sys.argv[1])

def logits(self, texts):
    while stuck.exists():
        time.sleep(0.01)
    return whole(self, texts)

OnnxEngine.logits = logits
sys.exit(main([*sys.argv[2:], "--engine", "onnxruntime"]))
"""


def test_a_stuck_engine_turns_ready_red_and_drops_who_hung_up(release_dir: Path, tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    program = ("-c", HANGING, str(stuck))
    with Serve("--model", release_dir, "--stall_seconds", "2", "--deadline_seconds", "2.5", program=program) as serve:

        def ask() -> tuple[int, str]:
            response = serve.client.post("/predict", json={"text": "oil prices"})
            return response.status_code, response.json().get("code", "")

        stuck.touch()
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(serve.url.rsplit(":", 1)[1]))) as caller:
            caller.sendall(head + b'{"text": "oil story"}')
        gone, end = 'distrinews_requests_total{route="/predict",status="499"}', time.monotonic() + 20
        while not serve.metric(gone):  # one that waited to the end would be counted as 503
            assert time.monotonic() < end, "nobody noticed that the caller hung up"
        assert serve.metric("distrinews_queue_tokens") == 0, "the room in the queue stayed taken"

        assert ask() == (503, "too_slow")
        ready = serve.client.get("/ready")
        assert ready.status_code == 503 and "busy with one batch" in ready.json()["reason"]
        assert ask() == (503, "engine_down")  # at once, not after the deadline
        assert serve.client.get("/health").status_code == 200
        stuck.unlink()
        serve.wait_ready()
        assert ask() == (200, "")
        assert "Traceback" not in serve.log()


def test_neither_a_stuck_engine_nor_a_silent_caller_keeps_the_process_from_ending(release_dir: Path, tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    with Serve("--model", release_dir, "--deadline_seconds", "1", program=("-c", HANGING, str(stuck))) as serve:
        stuck.touch()
        assert serve.client.post("/predict", json={"text": "oil prices"}).status_code == 503
        with socket.create_connection(("127.0.0.1", int(serve.url.rsplit(":", 1)[1])), timeout=20) as caller:
            caller.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n")
            requests = 'distrinews_requests_total{route="/predict",status="503"}'
            assert serve.metric(requests) == 1  # which also lets the request without a body arrive
            serve.process.terminate()
            assert caller.recv(1000).startswith(b"HTTP/1.1 408 ")  # an answer: its own time ended it, not the service's
        assert serve.process.wait(10) == 0


# ---- overload


def answer_to_head(serve: Serve) -> str:
    """The first line of the answer to a request whose body has not been sent; "" if there is none in 0.2 s."""
    with socket.create_connection(("127.0.0.1", int(serve.url.rsplit(":", 1)[1]))) as caller:
        caller.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n")
        caller.settimeout(0.2)
        try:
            return caller.recv(1000).decode().splitlines()[0]
        except TimeoutError:
            return ""


def test_a_full_queue_says_when_to_come_back(release_dir: Path) -> None:
    with Serve("--model", release_dir, "--queue_tokens", "1000", "--max_texts", "2000", "--deadline_seconds", "60") as serve:
        big = {"texts": [make_text(60, seed) for seed in range(2000)]}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            # An idle service takes the large request, though it is larger than the queue.
            long = pool.submit(serve.client.post, "/predict/batch", json=big)
            end = time.monotonic() + 20
            while serve.metric("distrinews_queue_tokens") < 1000:
                assert time.monotonic() < end and not long.done(), "the large request was never in the queue"
            statuses, refused_unread = [], False
            while not long.done():
                response = serve.client.post("/predict", json={"text": "oil prices"})
                statuses.append(response.status_code)
                if response.status_code == 429:
                    assert int(response.headers["Retry-After"]) >= 1 and response.json()["code"] == "overloaded"
                    refused_unread = refused_unread or "429" in answer_to_head(serve)
            assert refused_unread, "the body was waited for before the refusal"
            assert long.result().status_code == 200 and 429 in statuses and set(statuses) <= {200, 429}
        assert serve.client.post("/predict", json={"text": "oil prices"}).status_code == 200


def test_a_request_that_takes_too_long_is_ended(release_dir: Path) -> None:
    with Serve("--model", release_dir, "--deadline_seconds", "0.05", "--max_texts", "4000") as serve:
        late = serve.client.post("/predict/batch", json={"texts": [make_text(40, seed) for seed in range(4000)]})
        assert (late.status_code, late.json()["code"]) == (503, "too_slow") and "Retry-After" in late.headers
        end = time.monotonic() + 20
        while serve.client.post("/predict", json={"text": "oil prices"}).status_code != 200:  # and what it left is dropped
            assert time.monotonic() < end
        assert serve.metric("distrinews_queue_tokens") == 0
