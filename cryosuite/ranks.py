"""Which process of a command this is, as torchrun, srun or a training that started the others itself say; no torch.

Lies below every room: the command line asks before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# commands whose work the processes of torchrun or srun share; all others are done by the first of them alone
SHARED = frozenset(
    ("preprocess", "backproject", "polish", "fastar-infer", "deco-classify", "pretrain-iev", "pretrain-lvm")
    + ("train-hype", "train-kraqen", "train-fastar", "train-lvm")
)


def process_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The number of this process from 0; 0 where it is alone."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return int(environ["RANK"])
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return int(environ.get("SLURM_PROCID", "0"))
    return int(environ.get("LOCAL_RANK", "0")) + 1000 * int(environ.get("NODE_RANK", "0"))


def process_count(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun or srun started for this command; 1 where nobody did."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return int(environ["WORLD_SIZE"])
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1"))


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The number of this process on its machine, from 0."""
    name = "LOCAL_RANK" if "TORCHELASTIC_RUN_ID" in environ else "SLURM_LOCALID"
    return int(environ.get(name, "0")) if process_count(environ) > 1 else 0


def local_count(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes of this command share this process's processors (srun gives each task its own)."""
    return int(environ.get("LOCAL_WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in environ else 1
