"""The release behind LitServe with its dynamic batching, as its documentation sets it up.

PEER_MODEL=path/to/release PEER_DTYPE=float32 PEER_THREADS=2 python benchmarks/peers/litserve_app.py --port 8001
"""

from __future__ import annotations

import argparse
from typing import Any

import litserve as ls
from classifier import MAX_BATCH, WAIT_SECONDS, Classifier


class Predict(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.classify = Classifier()

    def decode_request(self, request):  # LitServe builds its route from the annotations; without any it takes JSON as it is
        return request["text"]

    def batch(self, inputs: list[str]) -> list[str]:
        return list(inputs)

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        return self.classify(texts)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    api = Predict(max_batch_size=MAX_BATCH, batch_timeout=WAIT_SECONDS)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=parser.parse_args().port, num_api_servers=1, log_level="warning", generate_client_file=False)
