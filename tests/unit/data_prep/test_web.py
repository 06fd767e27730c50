"""Fetching from web servers that misbehave, on behalf of tables that can't be trusted."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.account import Refused
from data_prep.build import build
from data_prep.config import FetchConfig, WebConfig
from data_prep.fetch.inputs import Fetched, FetchRequest, fetch_all
from data_prep.fetch.web import Boundary, opts_out, retry_after_s
from data_prep.sources.base import AllowedPlaces
from tests.support.prep_cases import encoded, reasons, samples, settings, sidecar, write_table
from tests.support.web_server import MisbehavingServer, serving

NOWHERE = AllowedPlaces("/nowhere", ())
LOOPBACK: dict[str, Any] = {"allow_networks": ("127.0.0.0/8",), "timeout_s": 3.0}


@pytest.fixture(scope="module", name="server")
def run_server() -> Iterator[MisbehavingServer]:
    with serving({f"/{i}.jpg": encoded(i) for i in range(60)}) as server:
        yield server


def got(urls: list[str], *, retries: int = 2, max_bytes: int = 1000, **web: Any) -> list[bytes | str]:
    """Each URL's body, or the reason there is none."""
    options = FetchConfig(retries=retries, max_bytes=max_bytes, web=WebConfig(**LOOPBACK | web))
    answers: list[bytes | str] = [""] * len(urls)
    for number, result in fetch_all([FetchRequest(url.encode()) for url in urls], NOWHERE, options):
        answers[number] = result.data if isinstance(result, Fetched) else result.reason
    return answers


def test_bodies_arrive_and_what_goes_wrong_has_its_reason(server: MisbehavingServer) -> None:
    expected: dict[str, bytes | str] = {
        "/0.jpg": encoded(0),
        "/nothing": "not_found",
        "/gone": "not_found",
        "/forbidden": "read_refused",
        "/broken": "server_error",
        "/short": "connection_failed",
        "/huge-said": "too_many_bytes",
        "/huge-unsaid": "too_many_bytes",
        "/gzip-bomb": "too_many_bytes",
        "/to//0.jpg": encoded(0),
        "/loop": "too_many_redirects",
        "/to/file:///etc/passwd": "unsupported_scheme",
        "/to/ftp://127.0.0.1/x": "unsupported_scheme",
        "/robots/noai": "opted_out",
        "/robots/otherbot: noai": b"image",
        "/much-later": "server_busy",
    }
    answers = got([server.url + path for path in expected], max_bytes=1500)
    assert dict(zip(expected, answers, strict=True)) == expected
    assert "vitrail" in next(iter(server.agents))


def test_what_may_pass_is_tried_again_and_retry_after_is_honoured(server: MisbehavingServer) -> None:
    started = time.monotonic()
    assert got([server.url + "/later"]) == [b"now"]
    assert time.monotonic() - started >= 1
    assert got([server.url + "/twice", server.url + "/twice-busy"], timeout_s=10) == [b"at last"] * 2
    assert server.asked["/twice"] == 3
    assert server.asked["/forbidden"] <= 1, "an answer isn't asked for again"


def test_a_body_that_never_ends_costs_no_more_than_the_deadline(server: MisbehavingServer) -> None:
    """And holds up nobody: eight of them beside images that arrive."""
    urls = [server.url + path for path in ["/endless", "/silent"] * 4] + [f"{server.url}/{i}.jpg" for i in range(40)]
    started = time.monotonic()
    answers = got(urls, timeout_s=1.0, per_host=16, max_bytes=10_000_000)
    assert answers[:8] == ["timeout"] * 8
    assert answers[8:] == [encoded(i) for i in range(40)]
    assert time.monotonic() - started < 15  # one deadline after the other would be 8 s; the machine may be slow


def test_a_host_is_asked_by_a_few_connections_at_once() -> None:
    with serving({f"/{i}.jpg": b"x" for i in range(24)}) as server:
        got([f"{server.url}/slow/{i}.jpg" for i in range(24)], per_host=3)
        assert server.most_at_once == 3


def test_a_name_nobody_knows_and_a_closed_port_have_their_reasons() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert got(["http://no-such-host.invalid/a.jpg"], retries=0) == ["name_unknown"]
    assert got([f"http://127.0.0.1:{port}/a.jpg"], retries=0) == ["connection_failed"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/0.jpg",
        "http://localhost:{port}/0.jpg",
        "http://[::1]:{port}/0.jpg",
        "http://[::ffff:127.0.0.1]:{port}/0.jpg",
        "http://2130706433:{port}/0.jpg",
        "http://0x7f.1:{port}/0.jpg",
        "http://127.1:{port}/0.jpg",
        "http://0.0.0.0:{port}/0.jpg",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/a.jpg",
        "http://[fe80::1]/a.jpg",
        "http://[64:ff9b::7f00:1]/a.jpg",
        "http://[2002:7f00:1::]/a.jpg",
        "http://8.8.8.8:22/a.jpg",
    ],
)
def test_the_inside_is_not_read_for_strangers(server: MisbehavingServer, url: str) -> None:
    port = server.server_address[1]
    before = server.asked.total()
    assert got([url.format(port=port)], allow_networks=(), retries=0)[0] in ("address_not_allowed", "url_invalid")
    assert server.asked.total() == before


def test_a_redirect_to_the_inside_is_not_followed(server: MisbehavingServer) -> None:
    """The server itself is allowed here, but not what it points to: another loopback address."""
    for target in ("http://127.0.0.2/a", "http://0.0.0.0/a", "http://169.254.169.254/latest"):
        options = {"allow_networks": ("127.0.0.1/32",)}
        assert got([f"{server.url}/to/{target}"], **options) == ["address_not_allowed"]


@pytest.mark.parametrize("url", ["http://", "http:///a.jpg", "http://[::1/a", "http://a\x01b/", "https://host:99999/"])
def test_urls_that_are_none_are_refused(url: str) -> None:
    assert got([url]) == ["url_invalid"]


def test_addresses_are_judged_by_where_they_lead() -> None:
    boundary = Boundary(("10.1.0.0/16",), (80, 443))
    allowed = [("8.8.8.8", 443), ("2606:4700::1111", 80), ("10.1.2.3", 8080), ("::ffff:10.1.2.3", 80)]
    refused = [("10.2.0.1", 80), ("192.168.0.1", 80), ("100.64.0.1", 80), ("224.0.0.1", 80), ("240.0.0.1", 80),
               ("fc00::1", 80), ("ff02::1", 80), ("::", 80), ("8.8.8.8", 8080), ("::ffff:192.168.0.1", 80)]  # fmt: skip
    assert [boundary.refusal(ipaddress.ip_address(a), p) for a, p in allowed] == [None] * len(allowed)
    assert all(boundary.refusal(ipaddress.ip_address(a), p) for a, p in refused)


def test_headers_are_read_as_they_are_meant() -> None:
    words = ("noai", "noindex")
    assert opts_out(["nofollow, NoAI"], words)
    assert opts_out(["*: noindex"], words)
    assert opts_out(["googlebot: noindex", "noai"], words)
    assert not opts_out(["googlebot: noindex"], words)
    assert not opts_out(["unavailable_after: 25 Jun 2030 15:00:00 PST"], words)
    assert retry_after_s("7", 0) == 7
    assert retry_after_s("Thu, 01 Jan 1970 00:01:40 GMT", 40) == 60
    assert retry_after_s("soon", 0) is None


def test_a_table_of_web_addresses_builds_and_timeouts_can_be_retried(tmp_path: Path) -> None:
    pages = {f"/{i}.jpg": encoded(i) for i in range(40)}
    with serving(pages) as server:
        urls = [f"{server.url}/{i}.jpg" for i in range(40)]
        urls[3], urls[9] = f"{server.url}/silent", f"{server.url}/nothing"
        table = write_table(tmp_path / "t.parquet", url=urls, caption=["x"] * 40)
        fetch: dict[str, Any] = {"retries": 0, "web": {"allow_networks": ["127.0.0.0/8"], "timeout_s": 1.0}}
        report = build(settings(table, tmp_path / "out", fetch=fetch))
        assert report.failed == {"not_found": 1, "timeout": 1}
        assert report.written == 38 == len(samples(tmp_path / "out" / "train"))
        again = build(settings(table, tmp_path / "out", fetch=fetch), retry_reasons=["timeout"])
        assert again.failed == {"not_found": 1, "timeout": 1}
        assert sorted(row["position"] for row in sidecar(tmp_path / "out" / "train")) == list(range(40))


def test_with_a_look_at_all_images_first_nothing_is_downloaded_twice(tmp_path: Path) -> None:
    pages = {f"/{i}.jpg": encoded(i % 30) for i in range(40)}
    with serving(pages) as server:
        table = write_table(
            tmp_path / "t.parquet", url=[f"{server.url}/{i}.jpg" for i in range(40)], caption=["x"] * 40
        )
        web = {"web": {"allow_networks": ["127.0.0.0/8"]}}
        report = build(settings(table, tmp_path / "out", fetch=web, dedup={"drop": "exact"}, max_failed=1.0))
        assert (report.written, report.filtered) == (30, {"duplicate": 10})
        assert set(server.asked.values()) == {1}
        assert reasons(tmp_path / "out") == {"duplicate": 10}
        assert not list((tmp_path / "out").rglob("*.bytes"))


def test_a_refusal_is_no_defect() -> None:
    with pytest.raises(ValueError, match="unknown reason"):
        Refused("no-such-reason", "")
