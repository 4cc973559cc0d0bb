"""What the tests share: a real encoder, a tiny model with its vocabulary, real texts, and a running local Hub."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Set before any library reads them: no telemetry, no Xet, no token or cache of the person who runs the tests.
os.environ.update({"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"})  # fmt: skip
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="distrinews-hf-home-")
for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
# What a shell starts in the background, as these tests may be, ignores Ctrl-C, and so would what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of launched runs, the longest first: begun last, one of them would keep a single core busy at the end.
LONG = ("test_training", "test_stopping", "test_crash", "test_backup_run", "test_doctor_launched", "test_parity", "test_two_nodes",
        "test_fsdp", "test_deploy_space", "test_backup", "test_lab", "test_bench", "test_explain", "test_verify")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The empty Hugging Face home of this test run and of its child processes."""
    folder = Path(os.environ["HF_HOME"])
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ag_news_dir() -> Path:
    """Real AG News rows in the Hub's layout: in $AG_NEWS_DIR, or beside the checkout in shared/ag_news."""
    folder = Path(os.environ.get("AG_NEWS_DIR", ROOT.parent / "shared" / "ag_news"))
    if not (folder / "data").is_dir():
        pytest.skip("no AG News rows here: set AG_NEWS_DIR to a folder with data/train-*.parquet and data/test-*.parquet")
    return folder


@pytest.fixture(scope="session")
def assets() -> Any:
    from pipeline.assets import fetch

    return fetch()


@pytest.fixture(scope="session")
def encoder_dir(assets: Any) -> Path:
    """all-MiniLM-L6-v2: a real encoder, 22.7 M parameters."""
    return assets.encoder


@pytest.fixture(scope="session")
def r8_dir(assets: Any) -> Path:
    return assets.r8


@pytest.fixture(scope="session")
def tiny_model_dir(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DistilBERT of two small layers with the encoder's vocabulary: real in kind, fast in tests."""
    import torch
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

    folder = tmp_path_factory.mktemp("tiny-distilbert")
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=30522, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=512)
    DistilBertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def local_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running local Hub; `.url`, `.token`, `.user`, `.env`."""
    from pipeline.local_hub.process import HubProcess

    with HubProcess(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
