from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepConfig
from pipeline.config import load, validate
from pipeline.errors import ConfigError


def checked(document: dict[str, Any]) -> PrepConfig:
    return validate(PrepConfig, document, where="prep.yaml")


def test_the_shipped_recipes_are_valid(repository: Path) -> None:
    recipes = sorted((repository / "configs" / "prep").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        checked(load(recipe))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"source": {"url": "t.csv"}}, "prep.yaml: output: required"),
        (
            {"output": "o", "source": {"url": "t.csv", "caption_colum": "x"}},
            "unknown key.*did you mean 'caption_column'",
        ),
        ({"output": "o", "source": {"type": "tabel", "url": "t.csv"}}, "source.type.*'table'"),
        ({"output": "o", "source": {"url": "t.csv"}, "seed": "one"}, "seed"),
        ({"output": "o", "source": {"url": "t.csv"}, "splits": {"shares": {"a": 0.5}}}, "shares sum to 0.5, not 1"),
        ({"output": "o", "source": {"url": "t.csv"}, "splits": {"shares": {"../a": 1.0}}}, "is not a split name"),
        (
            {"output": "o", "source": {"url": "t.csv", "split_column": "s"}, "splits": {"by": "url"}},
            "exclude each other",
        ),
        ({"output": "o", "source": {"url": "t.csv"}, "caption": {"min_chars": 9, "max_chars": 3}}, "larger than"),
    ],
)
def test_a_wrong_setting_is_one_message_naming_its_key(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(document)


def test_only_what_shapes_the_shards_counts_as_content() -> None:
    document: dict[str, Any] = {"output": "o", "source": {"url": "t.csv"}}
    reference = checked(document).content_settings()
    assert checked({**document, "output": "p", "ray": {"tasks": 3}, "max_failed": 1.0}).content_settings() == reference
    assert checked({**document, "seed": 1}).content_settings() != reference


def test_the_former_key_of_rays_tasks_is_read() -> None:
    document: dict[str, Any] = {"output": "o", "source": {"url": "t.csv"}}
    assert checked({**document, "ray": {"workers": 0}}).ray.tasks == 0
    with pytest.raises(ConfigError, match="'workers' is called 'tasks' now"):
        checked({**document, "ray": {"workers": 0, "tasks": 2}})
