"""The Hub as the safety net of a run: complete checkpoints go to a branch of the model repository, and come back from it.

    python -m pipeline.backup push --run outputs/ag_news --repo your-name/ag-news
    python -m pipeline.backup pull --run outputs/ag_news --repo your-name/ag-news

With `--hub_checkpoints` a run does both by itself: the first in the background (`background.py`), the second
when it starts on a machine that has no newer checkpoint. The branch is called checkpoints-<name of the run's folder>.
Its head holds the newest complete checkpoint and the best one, which the end of a run needs, and no history: old
training states do not pile up. main holds releases only and is never written to from here.

Imports no torch: a push is a process of its own beside the training ranks and has to be light.

    branch <- {to_hub, from_hub}; to_hub <- background; __main__
"""

from pipeline.backup.background import Backup
from pipeline.backup.branch import RemoteCheckpoint, branch_of, find
from pipeline.backup.from_hub import pull, restore
from pipeline.backup.to_hub import push

__all__ = ["Backup", "RemoteCheckpoint", "branch_of", "find", "pull", "push", "restore"]
