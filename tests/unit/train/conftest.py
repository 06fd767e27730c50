from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.process_group import ProcessGroup
from tests.unit.storage.conftest import bucket, credentials, moto_bucket, moto_endpoint, rclone

__all__ = ["bucket", "credentials", "moto_bucket", "moto_endpoint", "rclone"]


@pytest.fixture(scope="session")
def one() -> Iterator[ProcessGroup]:
    """A world of one, in a process of its own."""
    group = ProcessGroup(1)
    yield group
    group.close()


@pytest.fixture(scope="session")
def three() -> Iterator[ProcessGroup]:
    """A world of three."""
    group = ProcessGroup(3)
    yield group
    group.close()


@pytest.fixture(scope="session")
def two() -> Iterator[ProcessGroup]:
    """A world of two."""
    group = ProcessGroup(2)
    yield group
    group.close()
