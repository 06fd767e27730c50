"""Loaders and sweeps from flat settings, as tests and comparisons vary them one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from pipeline.data.batch import Batch, Transform
from pipeline.data.loader import Loader, OrderOptions, ReadingOptions, Share, sweep
from pipeline.data.order.mixture import Data


def loader_of(data: Data, transform: Transform, *, micro_batch: int | None = None, **settings: Any) -> Loader:
    """A loader whose order, share and reading take what they know of the settings."""
    order, share, reading = (_taken(kind, settings) for kind in (OrderOptions, Share, ReadingOptions))
    assert not settings, f"no setting {list(settings)}"
    return Loader(data, transform, order, share, reading=reading, micro_batch=micro_batch)


def swept(data: Data, transform: Transform, *, batch: int, block: int = 256, **settings: Any) -> Iterator[Batch]:
    """A sweep whose share and reading take what they know of the settings."""
    share, reading = (_taken(kind, settings) for kind in (Share, ReadingOptions))
    assert not settings, f"no setting {list(settings)}"
    return sweep(data, transform, share, batch=batch, block=block, reading=reading)


def _taken(kind: type[Any], settings: dict[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(kind) if field.name in settings]
    return kind(**{name: settings.pop(name) for name in names})
