"""What every rank executes, whoever started it: our agents, torchrun, or a person by hand.

    python -m launch.worker CONFIG_OR_RUN [key=value ...]
    torchrun --nproc-per-node 2 -m launch.worker CONFIG_OR_RUN

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT tell it its place; without them it is a world of one.
Exit codes: 0 done, 2 the user's input is wrong, 75 stopped with its state saved, 1 anything else.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from launch.extras import missing_library
from launch.parent import watch_parent
from pipeline import config as configs
from pipeline import storage
from pipeline.errors import ConfigError, Stopped, UserError
from pipeline.machine import free_port, has_gpu
from pipeline.train.config import TrainConfig

log = logging.getLogger("vitrail")


class _Stop(Protocol):
    def request(self) -> None: ...


class _Signals:
    """SIGTERM and SIGINT from the first moment on: the libraries take seconds to import, a stop may come before."""

    def __init__(self) -> None:
        self._requested = False
        self._stop: _Stop | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def pass_on_to(self, stop: _Stop) -> None:
        self._stop = stop
        if self._requested:
            stop.request()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if self._stop is not None:
            self._stop.request()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as this process's share of a job; returns the exit code."""
    options = _parse(arguments)
    parent = os.environ.get("VITRAIL_PARENT")
    if parent:
        watch_parent(int(parent))
    signals = _Signals()
    set_defaults()
    rank = int(os.environ.get("RANK", "0"))
    outcome: dict[str, Any] = {}
    try:
        where = options.where or options.config
        document = read_document(options.config, options.overrides)
        config = configs.validate(TrainConfig, document, where=where)
        _start_log(config.run_url, rank)
        code, outcome = _train(config, signals)
    except UserError as error:
        code, outcome = _refused(error)
    except ModuleNotFoundError as missing:
        refusal = missing_library(missing)
        if refusal is None:
            raise
        code, outcome = _refused(refusal)
    except Exception as error:
        log.error("rank %d failed\n%s", rank, traceback.format_exc())
        code, outcome = 1, {"message": f"{type(error).__name__}: {error}"}
    _write_outcome(outcome)
    return code


def read_document(config_or_run: str, overrides: Sequence[str] = ()) -> configs.Document:
    """The configuration document at a YAML file, or the one a run directory was started with.

    Raises:
        ConfigError: neither is there, or the YAML is bad.
    """
    current = partial(configs.current_keys, TrainConfig)
    if storage.is_remote(config_or_run) or Path(config_or_run).is_dir():
        try:
            text = storage.read(storage.join(config_or_run, "config.yaml"))
        except FileNotFoundError as error:
            raise ConfigError(
                "no config.yaml: not a run directory", where=config_or_run, fix="give a run directory or a YAML file"
            ) from error
        with tempfile.NamedTemporaryFile(suffix=".yaml") as copy:
            copy.write(text)
            copy.flush()
            return configs.load(copy.name, overrides, current)
    return configs.load(config_or_run, overrides, current)


def set_defaults() -> None:
    """Fill in what the surroundings leave open, before torch and DeepSpeed are imported and read it."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # we use none of its compiled CUDA operators
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(place, MASTER_PORT=str(free_port()))


def _train(config: TrainConfig, signals: _Signals) -> tuple[int, dict[str, Any]]:
    from pipeline.train.run import train
    from pipeline.train.state import StopSignal

    stop = StopSignal()
    signals.pass_on_to(stop)
    try:
        result = train(config, stop=stop, on_late=_end_late)
    except Stopped as stopped:
        return Stopped.exit_code, {"status": "stopped", "message": str(stopped)}
    outcome = {
        "status": result.status,
        "step": result.step,
        "samples": result.samples,
        "weights_sha256": result.weights_sha256,
    }
    return (0 if result.status == "done" else Stopped.exit_code), outcome


def _end_late(message: str) -> None:
    """End this rank, which hangs: whoever started it ends its peers and starts a new attempt."""
    _write_outcome({"hang": message})
    logging.shutdown()
    os._exit(1)


def _refused(error: UserError) -> tuple[int, dict[str, Any]]:
    from launch.workers.attempts import error_document

    # Under an agent the driver prints the message, once for all ranks.
    if "VITRAIL_OUTCOME" not in os.environ and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{error}\n")
    return error.exit_code, {"error": error_document(error)}


def _write_outcome(outcome: dict[str, Any]) -> None:
    path = os.environ.get("VITRAIL_OUTCOME")
    if path:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(outcome), encoding="utf-8")
        temporary.replace(path)


class _RankLog(logging.FileHandler):
    """A log file that comes into being with its first line, so that a refused run leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def _start_log(run_url: str, rank: int) -> None:
    """Log to stderr, and to logs/rank00000.log where the run directory is a local folder.

    SIGUSR1 dumps the stacks of all threads to stderr, and a fatal signal does so too.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if not storage.is_remote(run_url):
        handlers.append(_RankLog(Path(run_url) / "logs" / f"rank{rank:05d}.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=handlers, force=True)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)
    faulthandler.enable()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.worker", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", help="a YAML configuration, or a run directory to go on with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    parser.add_argument("--where", help="what messages call the configuration, when it is a copy")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of gloo, s3fs or a loader must not keep a finished rank alive
