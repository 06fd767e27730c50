"""Pages: what comes from outside stays text, a script stays itself, and a template can't name what isn't there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from pipeline.pages.bars import Bar, scale_bars
from pipeline.pages.render import content_policy, render_page

HOSTILE = '</script><!-- <img src=x onerror="alert(1)"> & \' \u2028'
TEMPLATE = """{% extends "page.html.jinja" %}
{% from "parts.html.jinja" import bars, with_code %}
{% block body %}
<p title="{{ text }}">{{ text }}</p><script type="application/json">{{ data | tojson }}</script>
{{ with_code(text) }}{{ bars(text, rows) }}
{% endblock %}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a template, a style sheet and a script."""
    folder = tmp_path / "paper"
    (folder / "templates").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "templates" / "some.html.jinja").write_text(TEMPLATE)
    (folder / "look.css").write_text("b { color: red }")
    (folder / "act.js").write_text("if (1 < 2 && 3 > 2) document.title;\n")
    (folder / "bad.js").write_text("'</script>'")
    monkeypatch.syspath_prepend(str(tmp_path))
    from pipeline.pages import render

    render._environment.cache_clear()
    render._asset.cache_clear()
    yield "paper"
    render._environment.cache_clear()
    render._asset.cache_clear()


def values(text: str = HOSTILE) -> dict[str, Any]:
    return {"title": text, "text": text, "data": {text: [text]}, "rows": [Bar(text, 0.5, text)]}


def test_hostile_text_is_never_markup(package: str) -> None:
    page = render_page(package, "some.html.jinja", **values())
    assert "<img" not in page
    assert "<!--" not in page
    assert page.count("</script>") == 1, "that of the data block"
    assert 'onerror="' not in page


def test_json_inside_a_page_reads_back_and_has_no_character_that_ends_its_element(package: str) -> None:
    page = render_page(package, "some.html.jinja", **values())
    block = re.search(r'<script type="application/json">(.*?)</script>', page, re.S)
    assert block is not None
    assert not set("<>&'\u2028") & set(block[1])
    assert json.loads(block[1]) == {HOSTILE: [HOSTILE]}


def test_what_json_cannot_hold_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        render_page(package, "some.html.jinja", **{**values(), "data": math.nan})


def test_a_name_that_is_missing_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError, match="'rows' is undefined"):
        render_page(package, "some.html.jinja", title="", text="", data="")


def test_styles_and_scripts_stand_as_written_and_only_these_scripts_may_run(package: str) -> None:
    page = render_page(package, "some.html.jinja", styles=["look.css"], scripts=["act.js"], **values())
    script = "if (1 < 2 && 3 > 2) document.title;\n"
    assert "<style>b { color: red }</style>" in page
    assert f"<script>{script}</script>" in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].replace("&#39;", "'") == content_policy([script])
    assert "'unsafe-inline'" not in content_policy([script]).partition("script-src")[2]


def test_the_policy_names_the_digest_that_browsers_compute() -> None:
    # The example of the specification, Content Security Policy Level 3, "Usage of hashes".
    hello = "alert('Hello, world.');"
    assert "script-src 'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='" in content_policy([hello])
    assert "script-src 'none'" in content_policy([])


def test_a_script_that_would_end_its_element_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match=r"bad\.js of paper would end the element"):
        render_page(package, "some.html.jinja", scripts=["bad.js"], **values())


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("ours", 0.8, "80%", (0.7, 0.9), main=True), Bar("chance", 0.2, "20%"), Bar("lost", math.nan, "?")]
    ours, chance, lost = scale_bars(bars)
    assert ours.value == pytest.approx(4 * chance.value, rel=0.01)
    assert ours.bounds == pytest.approx((0.7 / 0.9, 1.0), abs=1e-4), "the longest whisker ends where the chart does"
    assert (lost.value, lost.text) == (0, "?")
    assert scale_bars([Bar("none", 0.0, "0"), Bar("below", -1.0, "-1")])[1].value == 0


def test_what_stands_between_backticks_is_code() -> None:
    from pipeline.pages.render import _environment

    parts: Any = _environment("pipeline.pages").get_template("parts.html.jinja").module
    assert parts.with_code("run `a <b>` twice").strip() == "run <code>a &lt;b&gt;</code> twice"
