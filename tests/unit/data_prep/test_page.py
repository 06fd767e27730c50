"""The end report, and samples shown in a terminal."""

from __future__ import annotations

import html.parser
from pathlib import Path

from data_prep.build import build
from launch.inspect import describe
from tests.support.prep_cases import settings, write_pairs, write_table

EVIL = '<script>alert(1)</script>\x1b[31m & "quotes"'


class Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_accounts_for_everything_and_escapes_captions(tmp_path: Path) -> None:
    write_pairs(tmp_path / "raw", 12)
    urls = [f"images/{i}.{('jpg', 'png', 'webp')[i % 3]}" for i in range(12)]
    table = write_table(tmp_path / "raw" / "t.parquet", url=[*urls, "<b>gone</b>.jpg"], caption=[EVIL] * 13)
    build(settings(table, tmp_path / "out", image={"min_side": 32}, name="my <set>"))
    page = Reader()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("figure") == page.tags.count("img") + 3 > 6, "the samples and three histograms"
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "my <set>" in page.text
    assert "<script>alert(1)</script>" in page.text
    for word in ("not_found", "image_too_small", "13 inputs = ", "1 failed", "Length of captions"):
        assert word in page.text


def test_samples_are_shown_without_what_a_terminal_would_obey(tmp_path: Path) -> None:
    table = write_table(
        write_pairs(tmp_path / "raw", 3).parent / "t.parquet", url=["images/0.jpg"] * 2, caption=[EVIL, "plain"]
    )
    build(settings(table, tmp_path / "out"))
    document, lines = describe(str(tmp_path / "out"), num_samples=5)
    assert len(document["splits"]["train"]["samples"]) == 2
    assert len(lines) == 3
    assert any("plain" in line for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert len(describe(str(tmp_path / "out"))[1]) == 1
