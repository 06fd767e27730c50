"""Processes that are a job of their own, without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys

ALONE = """
import sys
from pipeline.train.engine.deepspeed_setup import join_group
join_group()
print("joined", flush=True)
sys.stdin.read()
"""


def test_two_of_them_on_one_machine_do_not_meet() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "WORLD_SIZE", "RANK")
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    for process in both:  # each is in its group while the other is
        assert process.stdout is not None
        assert "joined" in process.stdout.read(len("joined\n"))
    for process in both:
        process.communicate("", timeout=60)
        assert process.returncode == 0
