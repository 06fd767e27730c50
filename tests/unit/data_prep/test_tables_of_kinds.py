"""Sources and filters are picked from tables by their type."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from data_prep.config import PrepConfig
from data_prep.filters.options import FilterOptions
from data_prep.sources.options import SourceOptions
from pipeline.config import TypedOptions, validate
from pipeline.errors import ConfigError


def checked(**document: Any) -> PrepConfig:
    return validate(PrepConfig, {"output": "o", "source": {"url": "t.csv"}, **document}, where="prep.yaml")


@pytest.mark.parametrize("base", [SourceOptions, FilterOptions])
def test_each_line_of_a_table_names_options_of_that_type(base: type[TypedOptions]) -> None:
    for name in base.types:
        options = base.class_of(name)
        assert issubclass(options, base)
        assert "type" in options.model_fields
        with pytest.raises(ConfigError, match=r"12345.*known keys: .*type"):
            validate(base, {"type": name, "12345": 1}, where="a.yaml")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"source": {"type": "tarz", "url": "u"}}, r"source\.type: unknown type 'tarz'.*did you mean 'tars'"),
        ({"source": {"type": "zzzzzz", "url": "u"}}, r"source\.type: .*use one of table, folder"),
        ({"source": {"type": ["table"], "url": "u"}}, r"source\.type"),
        ({"source": {"type": "coco", "url": "u", "image": "i"}}, r"source\.image: .*did you mean 'images'"),
        ({"source": {"type": "coco", "url": "u"}}, r"source\.images: required"),
        ({"filters": [{"type": "clip_score", "min_scor": 0.1}]}, r"filters\.0\.min_scor: .*did you mean 'min_score'"),
        ({"filters": [{"name": "f"}]}, r"filters\.0\.type: required"),
        ({"filters": [{"type": "clip_score", "min_score": 0.1}]}, r"filters\.0: give either model"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(**document)
    assert re.search(message, str(error.value)), error.value


def test_a_source_without_a_type_is_a_table_and_all_its_fields_are_written_out() -> None:
    config = checked(source={"url": "t.csv", "label_column": "n"}, filters=[{"type": "function", "name": "m:f"}])
    settings = config.content_settings()
    assert settings["source"]["type"] == "table"
    assert settings["source"]["label_column"] == "n"
    assert settings["filters"] == [{"type": "function", "name": "m:f"}]
    assert validate(PrepConfig, config.model_dump(mode="json"), where="again") == config


def test_reading_no_source_imports_no_sources_libraries() -> None:
    code = "import sys, data_prep.config; print([name for name in ('pyarrow', 'torch', 'ray') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
