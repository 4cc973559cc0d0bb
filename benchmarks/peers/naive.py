"""The server most tutorials end with: FastAPI around a transformers pipeline, one text a call, no batching.

PEER_MODEL=path/to/release PEER_DTYPE=float32 PEER_THREADS=2 python benchmarks/peers/naive.py --port 8001
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

torch.set_num_threads(int(os.environ["PEER_THREADS"]))
classify = pipeline("text-classification", model=os.environ["PEER_MODEL"], dtype=getattr(torch, os.environ["PEER_DTYPE"]), device="cpu")
app = FastAPI()


class Body(BaseModel):
    text: str


@app.post("/predict")
def predict(body: Body) -> dict[str, Any]:  # not async: FastAPI calls it in a thread, so that the event loop goes on
    (answer,) = classify(body.text, truncation=True)
    return {"label": answer["label"], "confidence": answer["score"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(app, host="127.0.0.1", port=parser.parse_args().port, log_level="warning", access_log=False)
