"""Pages made from the code each time the docs are built: the commands, and every key of a configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import mkdocs_gen_files
import typer
import typer.main
from pydantic_core import PydanticUndefined

from data_prep.config import PrepConfig
from data_prep.sources import SOURCES
from launch.chain.graph import ChainConfig, StepConfig
from launch.cli import app
from pipeline.config import Config, by_dotted_name
from pipeline.stages import STAGES, stage_class
from pipeline.train.config import TrainConfig


def command_pages() -> Iterator[str]:
    """A section for each verb: what it does, its arguments and its options."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    yield "# Commands\n\nMade from the command itself; `vitrail VERB --help` says the same.\n"
    yield (
        "Exit codes: 0 done; 2 the input is wrong; 75 stopped, and the same command resumes; 1 anything else. `--json` "
        "prints one JSON object, last on stdout; progress goes to stderr.\n"
    )
    for name, command in sorted(commands.items()):
        if command.hidden:
            continue
        context = typer.Context(command, info_name=f"vitrail {name}")
        usage = command.get_usage(context).removeprefix("Usage: ")
        yield f"## vitrail {name}\n\n{command.help or ''}\n\n```text\n{usage}\n```\n"
        records = [parameter.get_help_record(context) for parameter in command.params if not parameter.hidden]
        lines = [f"| `{_cell(spelling)}` | {_cell(meaning)} |" for spelling, meaning in records]
        yield "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def configuration_pages() -> Iterator[str]:
    """A table for each options class, starting from a run's and a data set's, then every stage's own."""
    yield (
        "# Configuration\n\nEvery key there is, made from the classes that check them. How files are written, merged "
        "and overridden stands in [Configure a run](../how-to/configure.md).\n"
    )
    seen: set[type[Config]] = set()
    yield "## A training run\n"
    yield from _tables(TrainConfig, seen)
    yield "## A data set\n"
    yield from _tables(PrepConfig, seen)
    for name in STAGES:
        yield f"## Options of stage `{name}`\n"
        yield from _tables(stage_class(name).options_class, seen)
    for name, place in SOURCES.items():
        yield f"## Data source `{name}`\n"
        yield from _tables(by_dotted_name(place, where=name), seen)
    yield "## A chain\n"
    yield from _tables(ChainConfig, seen)
    yield from _tables(StepConfig, seen)


def _tables(cls: type[Config], seen: set[type[Config]]) -> Iterator[str]:
    if cls in seen:
        yield f"See [`{cls.__name__}`](#{cls.__name__.lower()}).\n"
        return
    seen.add(cls)
    comments = _comments(cls)
    yield f"### {cls.__name__}\n\n{(inspect.getdoc(cls) or '').strip()}\n"
    yield (
        "| key | type | default | |\n|---|---|---|---|\n"
        + "\n".join(
            f"| `{name}` | {_type_of(field.annotation)} | {_default(field)} | {_cell(comments.get(name, ''))} |"
            for name, field in cls.model_fields.items()
        )
        + "\n"
    )
    for field in cls.model_fields.values():
        for nested in _nested(field.annotation):
            if nested not in seen:
                yield from _tables(nested, seen)


def _comments(cls: type[Config]) -> dict[str, str]:
    """What stands behind a field in the source: the comment on its line, and on the lines that continue it."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if issubclass(base, Config) and base is not Config]):
        current = ""
        for line in inspect.getsource(base).splitlines():
            field = re.match(r"    (\w+): ", line)
            comment = re.search(r"# (?!noqa|type:)(.*)$", line)
            if field:
                current = field.group(1)
                texts[current] = comment.group(1) if comment else ""
            elif re.match(r"    # ", line) and current:
                texts[current] += " " + line.strip()[2:]
            else:
                current = ""
    return texts


def _type_of(annotation: object) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"(typing|collections\.abc|[a-z_]+(\.[a-z_]+)*)\.(?=[A-Z])", "", text).replace("NoneType", "None")
    return f"`{_cell(text)[:90]}`"


def _default(field: object) -> str:
    default = getattr(field, "default", None)
    if default is PydanticUndefined:
        return "required"
    text = f"{default.__class__.__name__}()" if isinstance(default, Config) else repr(default)
    return f"`{_cell(text)[:60]}`"


def _nested(annotation: object) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _nested(argument)


for path, parts in (
    ("reference/cli.md", command_pages()),
    ("reference/configuration.md", configuration_pages()),
):
    with mkdocs_gen_files.open(path, "w") as page:
        page.write("\n".join(parts))
