"""The release behind mosec with its dynamic batching, as its documentation sets it up.

PEER_MODEL=path/to/release PEER_DTYPE=bfloat16 PEER_THREADS=2 python benchmarks/peers/mosec_app.py --port 8001
"""

from __future__ import annotations

from typing import Any

from classifier import MAX_BATCH, WAIT_SECONDS, Classifier
from mosec import Server, Worker


class Predict(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.classify = Classifier()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.classify([item["text"] for item in data])


if __name__ == "__main__":  # mosec reads --port and its other options itself
    server = Server()
    server.append_worker(Predict, num=1, max_batch_size=MAX_BATCH, max_wait_time=int(1000 * WAIT_SECONDS), route="/predict")
    server.run()
