"""What the README and the docs say is true: commands run, files exist, configurations are accepted."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs" / "tutorials").glob("*.md")) + sorted((ROOT / "docs" / "how-to").glob("*.md"))
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]  # links of docs/ are held by its strict build

QUICK_VERBS = {"plan", "doctor", "runs", "show", "--help"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """One shell line of a document."""

    document: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


def blocks(document: Path, language: str) -> list[str]:
    return [body for found, body in _FENCE.findall(document.read_text(encoding="utf-8")) if found == language]


def commands() -> list[Command]:
    return [
        Command(document.name, line.strip())
        for document in (README, *GUIDES)
        for block in blocks(document, "sh")
        for line in block.splitlines()
        if line.strip()
    ]


def vitrail(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment(), check=False)


@functools.cache
def help_of(verb: str) -> subprocess.CompletedProcess[str]:
    return vitrail(verb, "--help", cwd=ROOT)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def guide_files(tmp_path: Path) -> Path:
    """A folder with the configurations the guide shows, under the names it gives them."""
    for _, name, body in guide_configurations():
        (tmp_path / name).write_text(body, encoding="utf-8")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def guide_configurations() -> Iterator[tuple[str, str, str]]:
    """Kind, file name and text of each YAML block; its first line is `# kind: name`. Parts are fenced `yml`."""
    for page in GUIDES:
        for block in blocks(page, "yaml"):
            match = re.match(r"# (\w+): (\S+\.yaml)\n", block)
            assert match, f"a YAML block of {page.name} lacks its `# kind: name` line:\n{block}"
            yield match[1], match[2], block


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c.document}: {c.line}")
def test_a_documented_command_exists_and_the_quick_ones_run(command: Command, guide_files: Path) -> None:
    program, *arguments = command.words
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "torchrun":
        module = arguments[arguments.index("-m") + 1]
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"vitrail\[(\w+)\]", command.line)
        assert named
        assert set(named) <= set(extras)
    else:
        assert program == "vitrail", f"no test for {command.line!r}"
        places = [word for word in arguments[1:] if arguments[0] in ("show", "runs") and not word.startswith("--")]
        quick = arguments[0] in QUICK_VERBS and all((guide_files / place).exists() for place in places)
        done = vitrail(*arguments, cwd=guide_files) if quick else help_of(arguments[0])
        assert done.returncode == 0, done.stderr
        for word in arguments:
            if word.endswith(".yaml"):
                assert (guide_files / word).is_file(), f"{command.document} names {word}, which it doesn't show"
        for option in (word for word in arguments if word.startswith("--") and word != "--help"):
            assert option in help_of(arguments[0]).stdout, f"{arguments[0]} has no option {option}"


@pytest.mark.parametrize(("kind", "name", "text"), list(guide_configurations()), ids=lambda value: value[:24])
def test_a_documented_configuration_is_accepted(kind: str, name: str, text: str, guide_files: Path) -> None:
    from data_prep.config import PrepConfig
    from launch.chain.graph import load_chain
    from pipeline.config import load, validate
    from pipeline.report.spec import ReportSpec
    from pipeline.stages import stage_class
    from pipeline.train.config import TrainConfig

    document = load(guide_files / name) if "base:" in text else yaml.safe_load(text)
    if kind == "prep":
        validate(PrepConfig, document, where=name)
    elif kind == "train":
        config = validate(TrainConfig, document, where=name)
        validate(stage_class(config.stage).options_class, config.options, where=name, prefix="options")
    elif kind == "report":
        validate(ReportSpec, document, where=name)
    else:
        assert kind == "chain"
        chain = load_chain(str(guide_files / name))
        validate(ReportSpec, chain.steps["report"].document, where=name)


def test_every_verb_of_the_command_is_in_the_readme_and_no_other() -> None:
    from launch.cli import app

    registered = {
        command.name or (command.callback.__name__ if command.callback else "") for command in app.registered_commands
    }
    table = re.findall(r"^\| `vitrail (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(table) == registered
    assert len(table) == len(set(table))


def test_the_file_tree_names_what_is_there_and_all_of_the_library() -> None:
    (tree,) = [block for block in blocks(README, "text") if block.startswith("pipeline/")]
    named: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            named.add(name)
        else:
            named.add(folder + name)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    library = {
        f"pipeline/{path.name}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "pipeline").iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py") or (path.is_dir() and len(list(path.glob("*.py"))) > 1)
    }
    assert library <= named, library - named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert not broken


def headings(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
