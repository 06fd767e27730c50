"""The proxy that injects faults really injects them, and storage on the other side of it loses nothing."""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from launch.s3_server import S3Server
from pipeline import storage
from tests.support.fault_proxy import Fault, FaultProxy

Through = Callable[..., FaultProxy]


@pytest.fixture
def through(rclone: S3Server, credentials: Callable[..., None]) -> Iterator[Through]:
    """Puts a proxy with the faults given between this process and rclone."""
    started: list[FaultProxy] = []

    def start(*faults: Fault, seed: int = 0) -> FaultProxy:
        proxy = FaultProxy(rclone.endpoint, faults, seed=seed).start()
        started.append(proxy)
        credentials(proxy.endpoint, rclone.access_key, rclone.secret_key)
        return proxy

    yield start
    for proxy in started:
        proxy.stop()


def ask(proxy: FaultProxy, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One bare request, without any retries."""
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=10)
    try:
        connection.request(method, target, body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_each_fault_looks_to_a_client_as_it_should(bucket: str, through: Through) -> None:
    payload = os.urandom(1 << 20)
    storage.write(f"{bucket}/there", payload)
    target = "/" + f"{bucket}/there".removeprefix("s3://")
    assert ask(through(Fault("busy", 1.0)), "GET", target)[0] == 503
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        ask(through(Fault("reset", 1.0)), "GET", target)
    with pytest.raises(http.client.IncompleteRead):
        ask(through(Fault("truncate", 1.0, methods="GET")), "GET", target)
    proxy = through(Fault("reset", 1.0, methods="PUT"))
    with pytest.raises(OSError):
        ask(proxy, "PUT", target, payload[:1000])
    assert storage.read(f"{bucket}/there") == payload, "the server saw half a request"


def test_a_write_whose_reply_is_lost_has_happened(bucket: str, through: Through) -> None:
    proxy = through(Fault("lost_reply", 0.6, methods="PUT"))
    for i in range(8):
        storage.write(f"{bucket}/{i}", b"new")
        assert storage.read(f"{bucket}/{i}") == b"new"
    assert proxy.injected["lost_reply"] > 4


def test_a_create_whose_reply_is_lost_counts_as_ours(bucket: str, through: Through) -> None:
    proxy = through(Fault("lost_reply", 0.5, methods="PUT"), seed=1)
    ours = [storage.create(f"{bucket}/{i}", b"mine %d" % i) for i in range(12)]
    assert proxy.injected["lost_reply"] >= 3
    assert all(ours)
    assert not storage.create(f"{bucket}/3", b"somebody else's")


def test_nothing_is_lost_where_one_request_in_five_fails(bucket: str, through: Through) -> None:
    proxy = through(Fault("busy", 0.1), Fault("reset", 0.05), Fault("truncate", 0.05), seed=2)
    content = {f"{bucket}/{i:02d}": os.urandom(20_000 + i) for i in range(40)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.write, content, content.values()))
        assert list(pool.map(storage.read, content)) == list(content.values())
        pieces = pool.map(lambda url: storage.read_range(url, 5_000, 15_000), content)
        assert list(pieces) == [data[5_000:15_000] for data in content.values()]
    assert [entry.url for entry in storage.entries(bucket)] == list(content)
    assert proxy.injected.total() > 10
    assert {"busy", "reset", "truncate"} <= set(proxy.injected)


def test_the_same_seed_strikes_the_same_requests() -> None:
    def fates(seed: int) -> list[bool]:
        proxy = FaultProxy("http://127.0.0.1:1", [Fault("busy", 0.3)], seed=seed)
        return [bool(proxy.strikes("GET", f"/{i % 50}")) for i in range(400)]

    assert fates(3) == fates(3) != fates(4)
    assert 80 < sum(fates(3)) < 160


def test_a_range_that_breaks_off_is_gone_on_with(bucket: str, through: Through) -> None:
    """Nine of ten replies break off half-way: the rest is asked for, never the whole again."""
    payload = os.urandom(3_000_000)
    storage.write(f"{bucket}/there", payload)
    proxy = through(Fault("reset", 0.9, methods="GET"), seed=4)
    assert storage.read_range(f"{bucket}/there", 500_000, 2_900_000) == payload[500_000:2_900_000]
    assert 3 <= proxy.injected["reset"] <= 40, "each try brings half of what is left"
    proxy.faults = (Fault("truncate", 0.9, methods="GET"),)
    assert storage.read_range(f"{bucket}/there", 0, 1_000_000) == payload[:1_000_000]


def test_a_range_isnt_put_together_of_two_objects(bucket: str, through: Through) -> None:
    first, second = bytes(1_000_000), b"\1" * 1_000_000
    storage.write(f"{bucket}/there", first)
    proxy = through(Fault("reset", 1.0, methods="GET", target="there"))
    strikes = proxy.strikes

    def replace_after_the_first(method: str, target: str) -> list[Fault]:
        met = strikes(method, target)
        if method == "GET" and sum(proxy.requests.values()) == 2:
            storage.write(f"{bucket}/there", second)
            proxy.faults = ()
        return met

    proxy.strikes = replace_after_the_first  # type: ignore[method-assign]
    assert storage.read_range(f"{bucket}/there", 0, 1_000_000) in (first, second)
