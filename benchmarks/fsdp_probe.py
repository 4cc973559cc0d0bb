"""Runs `pipeline.train`, and at its checkpoints writes what this rank keeps in memory to <output_dir>/kept-<rank>.json.

accelerate launch --config_file configs/accelerate/gpu2_fsdp.yaml -m benchmarks.fsdp_probe CONFIG --output_dir FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pipeline import train
from pipeline.config import parse
from pipeline.errors import run_entry


def kept(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors in this process: of a sharded one, of its shard."""
    return sum(t.nbytes for t in (t.to_local() if isinstance(t, DTensor) else t for t in tensors))


class Probe(train.TextTrainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.model is not None
        state, place = self.training_state(), self.recorder.topology
        slots = [t for slots in state.optimizer.state.values() for t in slots.values()]
        figures = {"parameters": kept(self.model.parameters()), "optimizer": kept(slots), "type": type(self.model).__name__}
        (Path(self.config.output_dir or "") / f"kept-{place.rank}.json").write_text(json.dumps(figures), encoding="utf-8")
        super()._save_checkpoint(model, trial)


if __name__ == "__main__":
    train.TextTrainer = Probe  # type: ignore[misc]
    sys.exit(run_entry(lambda argv: train.main(parse(argv))))
