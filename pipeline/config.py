"""Configuration: YAML files that list only differences, checked strictly before anything runs.

A file may name one `base:` (a path relative to it); its own keys win over the base's, mappings merge, everything else
replaces. Overrides `a.b=c` come last, their values parsed as YAML.

A recipe may hold `sizes:`, a mapping from names of model sizes to the keys that differ for them; those of
`options.model.size` apply, before the overrides. Unknown keys, wrong types and impossible values are a `ConfigError`
that names the key and the nearest one that exists.
"""

from __future__ import annotations

import builtins
import difflib
import importlib
import importlib.resources
import re
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
import yaml
from pydantic_core import PydanticCustomError

from pipeline.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")
TypedT = TypeVar("TypedT", bound="TypedOptions")
ValueT = TypeVar("ValueT")
Document = dict[str, Any]


class Config(pydantic.BaseModel):
    """Base of all options: immutable, unknown keys refused, defaults checked, no silent conversion of types."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    renamed: ClassVar[Mapping[str, str]] = {}  # former key -> today's, so that files of earlier versions are read

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_former_keys(cls, document: Any) -> Any:
        """Former keys under today's names; under both at once only mappings, which merge."""
        if not isinstance(document, Mapping) or not cls.renamed.keys() & document.keys():
            return document
        current = {key: value for key, value in document.items() if key not in cls.renamed}
        for former in cls.renamed.keys() & document.keys():
            today, value = cls.renamed[former], document[former]
            if today not in current:
                current[today] = value
            elif isinstance(value, Mapping) and isinstance(current[today], Mapping):
                current[today] = merge(current[today], value)
            else:
                raise ValueError(f"{former!r} is called {today!r} now: give that one alone")
        return current


class TypedOptions(Config):
    """Options of which there are several kinds: a document's `type` picks the class from a table.

    The class that the kinds inherit from names the table, `types`, with each kind's options as "module:Class". That is
    imported when a document picks it, so a kind's libraries slow down nobody else's start, and a new kind is a file and
    a line of the table. Fields take `pydantic.SerializeAsAny[...]` of that class, or only its own fields are written.
    """

    types: ClassVar[Mapping[str, str]] = {}  # type -> "module:Class"
    default_type: ClassVar[str | None] = None  # of documents without a type; None: they must have one

    type: str

    @classmethod
    def class_of(cls: builtins.type[TypedT], name: str) -> builtins.type[TypedT]:
        """The options class of kind `name`, a key of `types`."""
        module, _, attribute = cls.types[name].partition(":")
        options: builtins.type[TypedT] = getattr(importlib.import_module(module), attribute)
        return options

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _as_its_type(cls, document: Any, handler: Callable[[Any], Any]) -> Any:
        if "types" not in cls.__dict__ or not isinstance(document, Mapping):
            return handler(document)
        name = document.get("type", cls.default_type)
        if isinstance(name, str) and name in cls.types:
            return cls.class_of(name).model_validate(document)
        if name is None:
            error: str | PydanticCustomError = "missing"
        else:
            error = PydanticCustomError("unknown_type", "unknown type {name!r}", {"name": name, "known": [*cls.types]})
        raise pydantic.ValidationError.from_exception_data(
            cls.__name__, [{"type": error, "loc": ("type",), "input": name}]
        )


class _ChangesOnResume:
    """What `ChangesOnResume` puts into a field's metadata."""


ChangesOnResume = Annotated[ValueT, _ChangesOnResume()]
"""Type of a field whose value may change when a run is resumed, since what is learned doesn't depend on it:
`keep_last: ChangesOnResume[int] = 2`. All other fields must stay as they were when the run began.
"""


def keys_that_change(cls: type[Config], prefix: str = "") -> list[str]:
    """Dotted keys of the fields marked `ChangesOnResume`, also in nested options; a section's key stands for all of it.

    Args:
        prefix: put before each key ("options.").
    """
    keys = []
    for name, field in cls.model_fields.items():
        if any(isinstance(item, _ChangesOnResume) for item in field.metadata):
            keys.append(prefix + name)
        else:
            for nested in _classes_in(field.annotation):
                keys += keys_that_change(nested, f"{prefix}{name}.")
    return keys


class _Yaml(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number (PyYAML takes it for a string), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:merge" and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it isn't YAML, or gives a key twice.
    """
    return yaml.load(text, Loader=_Yaml)  # a SafeLoader


def load(path: str | Path, overrides: Sequence[str] = (), current: Callable[[Document], Document] = dict) -> Document:
    """Read a YAML file with its base and overrides; nothing is validated yet.

    Args:
        path: a file, or the path of a shipped one ("configs/demo/mae.yaml") when no such file exists here.
        overrides: "a.b=c" items; `c` is parsed as YAML.
        current: puts keys of earlier versions under today's names (`current_keys`). It is applied to each file and each
            override before they are merged, so that whatever comes last wins, whichever name it goes by.

    Raises:
        ConfigError: missing file, bad YAML, a base that is missing or circular, a malformed override.
    """
    document = _load_with_base(_find(Path(path)), current, seen=())
    of_sizes = document.pop("sizes", {})
    overridden = _overridden(document, overrides, current)
    differences = of_sizes.get(_size(overridden)) if isinstance(of_sizes, Mapping) else None
    if differences is None:
        return overridden
    if not isinstance(differences, Mapping):
        raise ConfigError("expected a mapping", where=f"{path}: sizes.{_size(overridden)}", fix="give keys that differ")
    return _overridden(merge(document, current(dict(differences))), overrides, current)


def current_keys(cls: type[Config], document: Mapping[str, Any]) -> Document:
    """A document of `cls` with former keys under today's names, in nested options too. A key that is there under both
    names keeps them, for validation to refuse.
    """
    renamed: Document = {}
    for key, value in document.items():
        today = cls.renamed.get(key, key)
        field = cls.model_fields.get(today)
        nested = _classes_in(field.annotation) if field is not None else []
        if isinstance(value, Mapping) and len(nested) == 1:
            value = current_keys(nested[0], value)
        renamed[key if today in document and today != key else today] = value
    return renamed


def _overridden(document: Document, overrides: Sequence[str], current: Callable[[Document], Document]) -> Document:
    for item in overrides:
        document = merge(document, current(_nested(item)))
    return document


def _size(document: Mapping[str, Any]) -> Hashable:
    """`options.model.size`, where there is one."""
    at: Any = document
    for key in ("options", "model", "size"):
        at = at.get(key) if isinstance(at, Mapping) else None
    return at if isinstance(at, Hashable) else None


def override(document: Document, item: str) -> Document:
    """A copy of `document` with one "a.b=c" applied."""
    return merge(document, _nested(item))


def _nested(item: str) -> Document:
    """The document that one "a.b=c" stands for."""
    key, equals, text = item.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"{item!r} isn't of the form key=value", where="command line", fix="write e.g. seed=1")
    try:
        nested: Any = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of {key!r} isn't YAML ({_first_line(error)})", where="command line", fix="quote the value"
        ) from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    document: Document = nested
    return document


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Document:
    """Mappings merge key by key, `above` winning; other values replace."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def validate(cls: type[ConfigT], document: object, *, where: str, prefix: str = "") -> ConfigT:
    """Build `cls` from a document, or raise one `ConfigError` for the first thing that is wrong.

    Args:
        where: the file (and whatever else tells the reader where to look).
        prefix: the dotted key under which `document` stands in that file.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"expected a mapping, found {type(document).__name__}",
            where=_spot(where, prefix),
            fix=f"give keys of {cls.__name__}: {', '.join(cls.model_fields)}",
        )
    try:
        return cls.model_validate(_plain(document))
    except pydantic.ValidationError as error:
        raise _config_error(cls, error, document, where, prefix) from None


def dump(config: Config) -> str:
    """The configuration as YAML, every value written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def entry_of(table: Mapping[str, ValueT], name: str, *, what: str, where: str) -> ValueT:
    """What a table of names has under `name`.

    Args:
        what: the table has, in the singular ("stage"), for the message.

    Raises:
        ConfigError: it has no such name; says the nearest.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    fix = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(table)}"
    raise ConfigError(f"no {what} {name!r}", where=where, fix=fix)


def by_dotted_name(name: str, *, where: str) -> Any:
    """The object at "package.module:attribute" or "package.module.attribute"."""
    module_name, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"can't import {name!r} ({error})", where=where, fix="give an importable package.module:function"
        ) from error


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    parts = path.parts
    if parts and parts[0] == "configs":
        shipped = Path(str(importlib.resources.files("configs"))).joinpath(*parts[1:])
        if shipped.is_file():
            return shipped
    nearby = path.parent if path.parent.is_dir() else Path("configs")
    known = sorted(str(p) for p in nearby.rglob("*.yaml")) if nearby.is_dir() else []
    close = difflib.get_close_matches(str(path), known, n=3, cutoff=0.4)
    raise ConfigError(
        "no such file", where=str(path), fix=f"did you mean {' or '.join(close)}" if close else "check the path"
    )


def _load_with_base(path: Path, current: Callable[[Document], Document], seen: tuple[Path, ...]) -> Document:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError("`base:` leads back to this file", where=str(path), fix="remove one of the bases")
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML ({_first_line(error)})", where=str(path), fix="mend the file") from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", where=str(path), fix="save it as UTF-8") from error
    if document is None:
        document = {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError("expected a mapping of names at the top", where=str(path), fix="write `key: value` lines")
    base = document.pop("base", None)
    document = current(document)
    if base is None:
        return document
    if not isinstance(base, str):
        raise ConfigError("`base` must be one path", where=f"{path}: base", fix="name a single YAML file")
    return merge(_load_with_base(_find(path.parent / base), current, (*seen, resolved)), document)


def _plain(value: Any) -> Any:
    """YAML lists as tuples where a model wants them: strict mode tells lists and tuples apart, YAML can't."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_plain(item) for item in value)
    return value


def _config_error(
    cls: type[Config], error: pydantic.ValidationError, document: Mapping[str, Any], where: str, prefix: str
) -> ConfigError:
    # A misspelt key that is required shows up twice: as unknown, which names the right one, and as missing.
    problems = error.errors()
    first = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
    path, known = _spelt_out(cls, [str(part) for part in first["loc"]], document)
    key = ".".join(([prefix] if prefix else []) + path)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]!r}?" if close else f"remove it; known keys: {', '.join(known)}"
        return ConfigError(f"unknown key {path[-1]!r}", where=_spot(where, key), fix=fix)
    if first["type"] == "missing":
        return ConfigError("required, but not given", where=_spot(where, key), fix=f"set {key}")
    if first["type"] == "unknown_type":
        close = difflib.get_close_matches(str(first["input"]), first["ctx"]["known"], n=1, cutoff=0.5)
        fix = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(first['ctx']['known'])}"
        return ConfigError(f"unknown type {first['input']!r}", where=_spot(where, key), fix=fix)
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return ConfigError(message, where=_spot(where, key) if key else where, fix="correct the value")
    return ConfigError(f"{message}, found {first['input']!r}", where=_spot(where, key), fix="correct the value")


def _spelt_out(cls: type[Config], location: Sequence[str], document: Any) -> tuple[list[str], list[str]]:
    """An error's location as a list of keys, and the field names of the options class that holds its last part.

    The fields are the outermost class's where the location isn't one of plain nesting.
    """
    path: list[str] = []
    at: type[Config] | None = cls
    for i, part in enumerate(location):
        path.append(part)
        at = _class_for(at, document)
        document = _item(document, part)
        if i < len(location) - 1 and not part.isdigit():
            field = at.model_fields.get(part) if at is not None else None
            classes = _classes_in(field.annotation) if field is not None else []
            at = classes[0] if len(classes) == 1 else None
    return path, list((at or cls).model_fields)


def _class_for(cls: type[Config] | None, document: Any) -> type[Config] | None:
    """The class that checks `document`: of typed options, the one that its type picks."""
    if cls is not None and issubclass(cls, TypedOptions) and isinstance(document, Mapping):
        name = document.get("type", cls.default_type)
        return cls.class_of(name) if isinstance(name, str) and name in cls.types else cls
    return cls


def _item(document: Any, part: str) -> Any:
    """What stands in a document under one part of a location; None where nothing does."""
    if isinstance(document, Mapping):
        return document.get(part)
    if isinstance(document, Sequence) and part.isdigit() and int(part) < len(document):
        return document[int(part)]
    return None


def _classes_in(annotation: Any) -> list[type[Config]]:
    """The options classes that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [cls for argument in typing.get_args(annotation) for cls in _classes_in(argument)]


def _spot(where: str, key: str) -> str:
    return f"{where}: {key}" if key else where


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())
