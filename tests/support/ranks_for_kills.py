"""A rank that is forked from a process which has imported everything, to be killed soon after."""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: F401
import s3fs  # noqa: F401
import tensorboard.compat.proto.event_pb2  # noqa: F401

from pipeline import config as configs
from pipeline.train.config import TrainConfig
from pipeline.train.run import train
from pipeline.train.state import StopSignal


def serve_rank(document: dict[str, Any], rank: int, size: int, port: int) -> None:
    """Train as one rank; the exit code is 0 when done."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    outcome = train(configs.validate(TrainConfig, document, where="test"), stop=StopSignal())
    sys.stderr.flush()
    os._exit(0 if outcome.status == "done" else 75)
