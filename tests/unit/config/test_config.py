"""Configuration files are read strictly, and every mistake in one is told in a message that says how to mend it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, model_validator

from pipeline.config import Config, by_dotted_name, current_keys, dump, load, override, validate
from pipeline.errors import ConfigError


class Inner(Config):
    rate: float = Field(default=0.5, gt=0)
    names: tuple[str, ...] = ()


class Outer(Config):
    renamed: ClassVar[Mapping[str, str]] = {"sub": "inner", "extent": "size"}

    size: int
    inner: Inner = Inner()
    by_name: dict[str, Inner] = {}

    @model_validator(mode="after")
    def _even(self) -> Outer:
        if self.size % 2:
            raise ValueError("Size must be even")
        return self


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, document, where="run.yaml")
    return str(caught.value)


def test_own_keys_win_over_the_base_and_mappings_merge(tmp_path: Path) -> None:
    write(tmp_path, "below/base.yaml", "size: 2\ninner: {rate: 0.1, names: [a, b]}\n")
    path = write(tmp_path, "run.yaml", "base: below/base.yaml\ninner: {names: [c]}\n")
    assert load(path) == {"size": 2, "inner": {"rate": 0.1, "names": ["c"]}}


def test_overrides_come_last_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "size: 2\n")
    config = validate(Outer, load(path, ["inner.rate=1e-4", "inner.names=[x, y]", "size=8"]), where="run.yaml")
    assert config == Outer(size=8, inner=Inner(rate=1e-4, names=("x", "y")))


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "1_0e-5"])
def test_every_way_to_write_a_float_is_one(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "run.yaml", f"size: 2\ninner: {{rate: {text}}}\n")
    assert validate(Outer, load(path), where="run.yaml").inner.rate == pytest.approx(1e-4)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "size: 2\nsize: 4\n")
    with pytest.raises(ConfigError, match="'size' is given twice"):
        load(path)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "size: 2\nby_name: {a: &a {rate: 0.1}, b: {<<: *a, rate: 0.2}}\n")
    assert validate(Outer, load(path), where="run.yaml").by_name["b"].rate == 0.2


def test_a_misspelt_key_is_answered_with_the_nearest_one() -> None:
    assert message({"size": 2, "inner": {"rte": 1.0}}) == (
        "config error at run.yaml: inner.rte: unknown key 'rte'. Fix: did you mean 'rate'?"
    )


def test_a_far_key_is_answered_with_the_known_ones() -> None:
    assert "known keys: size, inner, by_name" in message({"size": 2, "wholly_else": 1})


def test_wrong_types_missing_keys_and_impossible_values_name_the_key() -> None:
    assert "run.yaml: size: required" in message({})
    assert "run.yaml: size: input should be a valid integer, found 'two'" in message({"size": "two"})
    assert "run.yaml: inner.rate: input should be greater than 0, found -1" in message(
        {"size": 2, "inner": {"rate": -1}}
    )
    assert "size must be even" in message({"size": 3})
    assert "expected a mapping, found list" in message([1])


def test_a_string_is_not_taken_for_a_number() -> None:
    assert "found '2'" in message({"size": "2"})


def test_missing_bad_and_circular_files_are_told(tmp_path: Path) -> None:
    write(tmp_path, "train.yaml", "size: 2\n")
    with pytest.raises(ConfigError, match=r"no such file.*did you mean .*train\.yaml"):
        load(tmp_path / "trian.yaml")
    with pytest.raises(ConfigError, match="not YAML"):
        load(write(tmp_path, "bad.yaml", "a: [1\n"))
    with pytest.raises(ConfigError, match="expected a mapping"):
        load(write(tmp_path, "list.yaml", "- 1\n"))
    write(tmp_path, "one.yaml", "base: two.yaml\n")
    with pytest.raises(ConfigError, match="leads back"):
        load(write(tmp_path, "two.yaml", "base: one.yaml\n"))


@pytest.mark.parametrize("item", ["size", "=2", "a..b=1", ".a=1"])
def test_malformed_overrides_are_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        override({}, item)


def test_dumping_and_loading_gives_the_same_configuration(tmp_path: Path) -> None:
    config = Outer(size=4, inner=Inner(rate=1e-7, names=("a",)))
    path = write(tmp_path, "dumped.yaml", dump(config))
    assert validate(Outer, load(path), where="dumped.yaml") == config


def test_objects_are_found_by_dotted_name() -> None:
    assert by_dotted_name("pipeline.errors:ConfigError", where="here") is ConfigError
    with pytest.raises(ConfigError, match="can't import"):
        by_dotted_name("pipeline.nowhere:thing", where="here")


def test_errors_survive_pickling_whole() -> None:
    error = ConfigError("broken", where="there", fix="mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ConfigError
    assert str(copy) == str(error) == "config error at there: broken. Fix: mend it"


def test_a_recipes_numbers_follow_the_models_size_and_overrides_win(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        "recipe.yaml",
        "options: {model: {size: B, patch_size: 16}}\noptim: {lr: 1, decay: 2}\n"
        "sizes:\n  H: {options: {model: {patch_size: 14}}, optim: {lr: 3}}\n",
    )
    assert load(recipe) == {"options": {"model": {"size": "B", "patch_size": 16}}, "optim": {"lr": 1, "decay": 2}}
    huge = load(recipe, ["options.model.size=H"])
    assert huge == {"options": {"model": {"size": "H", "patch_size": 14}}, "optim": {"lr": 3, "decay": 2}}
    assert load(recipe, ["options.model.size=H", "optim.lr=4"])["optim"]["lr"] == 4
    derived = write(
        tmp_path, "mine.yaml", "base: recipe.yaml\noptions: {model: {size: H}}\nsizes: {H: {optim: {lr: 5}}}"
    )
    assert load(derived)["optim"] == {"lr": 5, "decay": 2}
    broken = write(tmp_path, "broken.yaml", "options: {model: {size: B}}\nsizes: {B: 3}")
    with pytest.raises(ConfigError, match=r"sizes\.B"):
        load(broken)


def test_a_former_key_is_read_under_todays_name() -> None:
    config = validate(Outer, {"extent": 4, "sub": {"rate": 0.1}}, where="run.yaml")
    assert config == Outer(size=4, inner=Inner(rate=0.1))
    assert validate(Outer, config.model_dump(), where="run.yaml") == config


def test_mappings_under_a_former_and_a_present_key_merge() -> None:
    config = validate(
        Outer, {"size": 2, "inner": {"rate": 0.1, "names": ["a"]}, "sub": {"rate": 0.2}}, where="run.yaml"
    )
    assert config.inner == Inner(rate=0.2, names=("a",))


FORMER, TODAY = "sub: {rate: 0.1}\nextent: 2\n", "inner: {rate: 0.1}\nsize: 2\n"


@pytest.mark.parametrize("file", [FORMER, TODAY])
@pytest.mark.parametrize("overrides", [["sub.rate=0.2", "extent=8"], ["inner.rate=0.2", "size=8"]])
def test_what_comes_last_wins_under_either_name(tmp_path: Path, file: str, overrides: list[str]) -> None:
    path = write(tmp_path, "run.yaml", file)
    document = load(path, overrides, partial(current_keys, Outer))
    assert validate(Outer, document, where="run.yaml") == Outer(size=8, inner=Inner(rate=0.2))


@pytest.mark.parametrize(
    ("base", "file"), [(FORMER, "size: 4\ninner: {rate: 0.3}\n"), (TODAY, "extent: 4\nsub: {rate: 0.3}\n")]
)
def test_a_file_wins_over_its_base_under_either_name(tmp_path: Path, base: str, file: str) -> None:
    write(tmp_path, "base.yaml", base)
    path = write(tmp_path, "run.yaml", f"base: base.yaml\n{file}")
    document = load(path, (), partial(current_keys, Outer))
    assert validate(Outer, document, where="run.yaml") == Outer(size=4, inner=Inner(rate=0.3))


def test_a_value_under_a_former_and_a_present_key_is_refused() -> None:
    assert "'extent' is called 'size' now: give that one alone" in message({"size": 2, "extent": 4})
