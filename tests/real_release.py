"""A release that training made: a tiny model, a small dataset on a Hub, the training command as a user types it."""

from __future__ import annotations

import functools
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from launching import launch

from benchmarks.tiny_release import LABELS, WORDS

DATA = "local/tiny-news"
ROWS = {"train": 480, "test": 160}


def put_dataset(hub: Any, repo: str, seed: int = 0) -> str:
    """Texts of four classes, a tenth of them mislabelled so that no figure is 1; returns the commit."""
    draw = random.Random(seed)
    own = [WORDS[i::4] for i in range(4)]
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    for split, rows in ROWS.items():
        lines = ["text,label"]
        for row in range(rows):
            words = " ".join(draw.choices(own[row % 4] + WORDS[:6], k=draw.randint(3, 40)))
            lines.append(f"{words},{draw.choice(LABELS) if draw.random() < 0.1 else LABELS[row % 4]}")
        api.upload_file(path_or_fileobj="\n".join(lines).encode(), path_in_repo=f"{split}.csv", repo_id=repo, repo_type="dataset")
    card = api.upload_file(
        path_or_fileobj=b"---\nlicense: cc-by-4.0\n---\n# News\n", path_in_repo="README.md", repo_id=repo, repo_type="dataset"
    )
    return str(card.oid)


@functools.cache
def trained(hub: Any, model: Path) -> Path:
    """The folder of a finished run on the Hub's dataset `DATA`. Do not change it."""
    put_dataset(hub, DATA)
    folder = Path(tempfile.mkdtemp(dir=os.environ["HF_HOME"]))  # goes when the tests end
    options = ["--model", str(model), "--dataset", DATA, "--output_dir", str(folder / "ag_news"), "--device", "cpu", "--precision", "fp32",
               "--max_length", "32", "--epochs", "2", "--learning_rate", "1e-2", "--validation_share", "0.1"]  # fmt: skip
    done = launch(options, module="pipeline.train", timeout=200, **hub.env, HF_HOME=str(folder / "home"))
    assert done.returncode == 0, done.stderr
    return folder / "ag_news"
