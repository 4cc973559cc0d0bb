"""The service's contract with its callers: the Hugging Face shape, keys, other origins, ids and logs, and its own document."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from serving import LABELS, MAX_LENGTH, Serve, make_release, make_text

from serve.errors import UserError
from serve.settings import parse

KEYS, ADMIN, TOKEN = ["first-key", "second-key"], "operators-key", "hf_thecallersowntoken"
SECRET_TEXT = "Quarterly earnings of nobody in particular"


@pytest.fixture(scope="module")
def release_dir(encoder_dir: Path) -> Path:
    return make_release(encoder_dir)


@pytest.fixture(scope="module")
def serve(release_dir: Path) -> Iterator[Serve]:
    """Open to anyone, as it starts without further settings."""
    with Serve("--model", release_dir, "--engine", "onnxruntime") as serve:
        yield serve


@pytest.fixture(scope="module")
def guarded(release_dir: Path) -> Iterator[Serve]:
    """With keys, another origin's pages, and every answer in the log."""
    env = {"DISTRINEWS_API_KEYS": ", ".join(KEYS), "DISTRINEWS_ADMIN_KEY": ADMIN}
    options = ("--cors_origins", "https://a.example", "--log_format", "json", "--access_log", "all", "--deadline_seconds", "2")
    with Serve("--model", release_dir, "--engine", "onnxruntime", *options, env=env) as serve:
        yield serve


def post(serve: Serve, body: Any = None, path: str = "/predict", **headers: str) -> httpx.Response:
    content = json.dumps({"text": SECRET_TEXT} if body is None else body).encode()
    encoded = {name: value.encode() for name, value in ({"Content-Type": "application/json"} | headers).items()}
    return serve.client.post(path, content=content, headers=encoded)


# ---- predictions


def test_top_k_and_truncate(serve: Serve) -> None:
    every = post(serve).json()
    ranked = sorted(every["probabilities"].items(), key=lambda pair: -pair[1])
    best = post(serve, {"text": SECRET_TEXT, "top_k": 2}).json()
    assert list(best["probabilities"].items()) == ranked[:2] and best["label"] == ranked[0][0] and best["confidence"] == ranked[0][1]
    assert best == every | {"probabilities": dict(ranked[:2])}
    (batch,) = post(serve, {"texts": [SECRET_TEXT], "top_k": 99, "truncate": False}, "/predict/batch").json()["predictions"]
    assert list(batch["probabilities"].items()) == ranked  # more labels than there are: all
    long = make_text(100, 1)
    assert post(serve, {"text": long, "truncate": True}).json()["truncated"] is True
    refusal = post(serve, {"text": long, "truncate": False})
    assert (refusal.status_code, refusal.json()["code"]) == (422, "text_too_long") and str(MAX_LENGTH) in refusal.json()["message"]


@pytest.mark.parametrize("character", ["a", "\u0301", "界", "😀", " a", "\u202e", "\u200d"])
def test_a_megabyte_of_one_character(serve: Serve, character: str) -> None:
    text = character * (1_000_000 // len(character.encode()))
    body = json.dumps({"text": text}, ensure_ascii=False).encode()
    answer = serve.client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json().get("code")) in ((200, None), (422, "text_unreadable")), answer.text


def test_the_hugging_face_client_gets_the_same_answers(serve: Serve) -> None:
    expected = post(serve).json()["probabilities"]
    for client in (InferenceClient(base_url=serve.url, token=TOKEN), InferenceClient(serve.url, token=TOKEN)):
        answer = client.text_classification(SECRET_TEXT)
        assert {one.label: one.score for one in answer} == expected
        assert [one.score for one in answer] == sorted(expected.values(), reverse=True)
    assert [one.label for one in client.text_classification(SECRET_TEXT, top_k=1)] == [answer[0].label]
    with pytest.raises(HfHubHTTPError, match="is blank; allowed is any text"):
        client.text_classification(" ")
    assert TOKEN not in serve.log() and SECRET_TEXT not in serve.log()


def test_the_functions_of_the_hugging_face_shape(serve: Serve, release_dir: Path) -> None:
    example = json.loads((release_dir / "golden.json").read_text())["examples"][3]
    logits = np.array(example["logits"])
    wanted = {"none": logits, "sigmoid": 1 / (1 + np.exp(-logits)), "softmax": np.exp(logits) / np.exp(logits).sum()}
    for function, values in wanted.items():
        body = {"inputs": ["a", example["text"]], "parameters": {"function_to_apply": function}}
        answer = post(serve, body, "/").json()
        assert len(answer) == 2
        assert [one["label"] for one in answer[1]] == [LABELS[index] for index in np.argsort(-logits)]
        assert np.allclose([one["score"] for one in answer[1]], sorted(values, reverse=True), atol=1e-3)


# ---- what goes with every answer


def test_headers_of_every_answer(serve: Serve) -> None:
    answers = [serve.client.get(path) for path in ("/", "/health", "/metrics", "/docs", "/nothing")] + [post(serve), post(serve, {})]
    for answer in answers:
        headers = answer.headers
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert headers["X-Model-Revision"] and headers.get_list("X-Model-Revision") == [headers["X-Model-Revision"]]
        assert "X-Frame-Options" not in headers and "Access-Control-Allow-Origin" not in headers
    assert len({answer.headers["X-Request-ID"] for answer in answers}) == len(answers)
    assert "frame-ancestors 'self' https://huggingface.co https://*.hf.space" in answers[0].headers["Content-Security-Policy"]
    assert post(serve, **{"X-Request-ID": "caller.7"}).headers["X-Request-ID"] == "caller.7"
    for unfit in ("a b", "x" * 65, "ü", "{}"):
        assert post(serve, **{"X-Request-ID": unfit}).headers["X-Request-ID"] != unfit


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Type": "application/json; charset=latin-1"}, "charset"),
        ({"Content-Type": "application/json; charset=no-such-thing"}, "charset"),
        ({"Content-Type": "application/json; charset*0=x"}, "charset"),
        ({"Content-Type": "application/json; charset*1=utf-8; charset=ÿþ"}, "charset"),
        ({"Content-Type": "text/plain"}, "content_type"),
        ({"Content-Type": "application/jsonp"}, "content_type"),
        ({"Content-Type": ""}, "content_type"),
        ({"Content-Encoding": "gzip"}, "content_encoding"),
        ({"Content-Type": "application/json; charset=UTF8"}, None),
        ({"Content-Type": 'Application/JSON ; profile=x; Charset="utf-8"'}, None),
        ({"Content-Type": "application/vnd.api+json"}, None),
    ],
)
def test_the_form_of_the_body(serve: Serve, headers: dict[str, str], code: str | None) -> None:
    answer = post(serve, **headers)
    assert (answer.status_code, answer.json().get("code")) == ((415, code) if code else (200, None))


def test_a_defect_is_an_answer_without_a_trace(release_dir: Path) -> None:
    program = """
import sys, serve.service
from serve.__main__ import main

async def broken(self, texts, *_): raise KeyError(texts[0])
serve.service.Service.predict = broken
serve.service.Service.engine_choice = lambda self: self.nothing
sys.exit(main())
"""
    with Serve("--model", release_dir, "--engine", "onnxruntime", program=("-c", program)) as serve:
        answers = [post(serve), serve.client.get("/info")]
        assert serve.metric('distrinews_requests_total{route="/predict",status="500"}') == 1
        log = serve.log()
        for answer in answers:
            assert answer.status_code == 500 and answer.json()["code"] == "defect" and answer.headers["X-Content-Type-Options"]
            assert answer.headers["X-Request-ID"] in log
        assert "KeyError at " in log and "direct.py:" in log and "AttributeError at " in log
        assert SECRET_TEXT not in log and "Traceback" not in log


# ---- keys, other origins, logs


def test_predictions_ask_for_a_key(guarded: Serve) -> None:
    for path in ("/predict", "/predict/batch", "/"):
        answer = post(guarded, path=path)
        assert (answer.status_code, answer.json()["code"]) == (401, "api_key_missing") and "X-API-Key" in answer.headers["WWW-Authenticate"]
        for wrong in ("first", "first-key ,", "", ADMIN, "schlüssel"):
            answer = post(guarded, path=path, **{"X-API-Key": wrong, "Authorization": f"Bearer {KEYS[0]}"})
            assert (answer.status_code, answer.json()["code"]) == (401, "api_key_wrong")
    # A path with a slash too many is none: no redirect, and no way round the key.
    answer = guarded.client.post("/predict/", json={"text": "a"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    for key in KEYS:
        assert post(guarded, **{"X-API-Key": key}).status_code == 200
    for path in ("/health", "/ready", "/info", "/metrics", "/docs", "/", "/openapi.json"):
        assert guarded.client.get(path).status_code == 200
    assert guarded.client.get("/info").json()["api_key_required"] is True
    for path in ("/health", "/ready", "/"):  # as probes ask
        answer = guarded.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_operators_have_a_key_of_their_own(serve: Serve, guarded: Serve) -> None:
    def roll_back(serve: Serve, **headers: str) -> tuple[int, str]:
        answer = serve.client.post("/rollback", headers=headers)
        return answer.status_code, answer.json()["code"]

    assert roll_back(serve, **{"X-API-Key": ""}) == (403, "no_admin_key")
    assert roll_back(guarded) == (401, "api_key_missing")
    assert roll_back(guarded, **{"X-API-Key": KEYS[0]}) == (401, "api_key_wrong")
    assert roll_back(guarded, **{"X-API-Key": ADMIN}) == (409, "nothing_to_roll_back")


def test_pages_of_an_allowed_origin_may_call(serve: Serve, guarded: Serve) -> None:
    asks = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-api-key",
    }
    allowed = guarded.client.options("/predict", headers=asks)
    assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert guarded.client.options("/predict", headers=asks | {"Origin": "https://b.example"}).status_code == 400
    assert serve.client.options("/predict", headers=asks).status_code == 405
    refusal = post(guarded, Origin="https://a.example")
    assert refusal.status_code == 401 and refusal.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert {"X-Model-Revision", "X-Request-ID", "Retry-After"} <= set(refusal.headers["Access-Control-Expose-Headers"].split(", "))
    assert "Access-Control-Allow-Origin" not in post(guarded, Origin="https://b.example").headers


def test_the_log_has_ids_and_no_secrets(guarded: Serve) -> None:
    identity = {"X-Request-ID": "log-test"}
    post(guarded, **identity, **{"X-API-Key": KEYS[0], "Authorization": f"Bearer {TOKEN}"})
    guarded.client.get("/nothing/of/mine?secret=query", headers=identity)
    end = time.monotonic() + 10
    while guarded.log().count("log-test") < 2 and time.monotonic() < end:  # a line is written once the answer is sent
        time.sleep(0.02)
    lines = [json.loads(line) for line in guarded.log().splitlines()]
    about = [{name: line[name] for name in ("level", "route", "status")} for line in lines if line.get("request_id") == "log-test"]
    assert about == [{"level": "INFO", "route": "/predict", "status": 200}, {"level": "INFO", "route": "other", "status": 404}]
    assert all({"time", "level", "message"} <= set(line) for line in lines) and any("ready: " in line["message"] for line in lines)
    for secret in (*KEYS, ADMIN, TOKEN, SECRET_TEXT, "of/mine", "query"):
        assert secret not in guarded.log() and secret not in guarded.client.get("/info").text


def test_keys_come_from_the_environment_only(capsys: pytest.CaptureFixture[str]) -> None:
    settings = parse(["--model", "a/b"], {"DISTRINEWS_API_KEYS": "k1, k2", "DISTRINEWS_ADMIN_KEY": "k3"})
    assert settings.keys() == [b"k1", b"k2"] and settings.admin_key == "k3"
    assert "k1" not in repr(settings) and "k3" not in repr(settings)
    with pytest.raises(UserError, match="unrecognized arguments"):
        parse(["--model", "a/b", "--api_keys", "k1"], {})
    for unfit in ("k1,", "k 1", "schlüssel"):
        with pytest.raises(UserError, match="DISTRINEWS_API_KEYS holds") as raised:
            parse(["--model", "a/b"], {"DISTRINEWS_API_KEYS": unfit})
        assert unfit not in str(raised.value)
    with pytest.raises(UserError, match="allowed are origins like"):
        parse(["--model", "a/b", "--cors_origins", "a.example"], {})
    with pytest.raises(SystemExit):
        parse(["--help"])
    help = capsys.readouterr().out
    assert "DISTRINEWS_API_KEYS" in help and "--api_keys" not in help


def test_a_body_that_does_not_come_is_not_waited_for(guarded: Serve) -> None:
    def slowly() -> Iterator[bytes]:
        yield b'{"text": '
        time.sleep(3)
        yield b'"oil"}'

    headers = {"Content-Type": "application/json", "X-API-Key": KEYS[0]}
    answer = guarded.client.post("/predict", content=slowly(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (408, "body_too_slow")
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-API-Key: {KEYS[0]}\r\nContent-Length: 15\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(guarded.url.rsplit(":", 1)[1])), timeout=20) as caller:
        caller.sendall(head.encode())  # and no body
        assert caller.recv(1000).startswith(b"HTTP/1.1 408 ")


# ---- the document


def test_nothing_undocumented_is_answered(guarded: Serve) -> None:
    """schemathesis sends what the OpenAPI document allows and what it does not."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{guarded.url}/openapi.json", "--seed", "1", "--max-examples", "50"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,"
    checks += "negative_data_rejection,unsupported_method,allow_header_conformance,ignored_auth"
    options = [
        "--checks",
        checks,
        "--header",
        f"X-API-Key: {KEYS[0]}",
        "--no-color",
        "--max-failures",
        "5",
        "--generation-database",
        "none",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert guarded.client.get("/ready").status_code == 200
    document = guarded.client.get("/openapi.json").json()
    assert {"/predict", "/predict/batch", "/", "/info", "/ready", "/health", "/metrics", "/rollback"} == set(document["paths"])
