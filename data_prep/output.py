"""What an output folder records about its build: the settings it was begun with, and the attempts at it.

Both are files that are created only if absent, so two builds that write into the same folder notice each other.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from data_prep.shards.commit import json_bytes, read_document
from pipeline import storage
from pipeline.errors import ConfigError, StorageError

FORMAT_VERSION = 3
_SETTINGS_NAME = "build.json"


def read_settings(url: str) -> dict[str, Any] | None:
    """The settings of the build in `url`; None where the folder is empty.

    Raises:
        ConfigError: the folder holds something else.
        DataError: the settings are damaged, or of another version.
    """
    try:
        return read_document(_settings_url(url), FORMAT_VERSION, "a build", "delete the output folder and build again")
    except FileNotFoundError:
        entry = next(storage.entries(url), None)
        if entry is None:
            return None
        raise ConfigError(
            f"the folder isn't empty ({entry.url}) and holds no data set build",
            where=f"output {url}",
            fix="choose another folder",
        ) from None


def write_settings(url: str, settings: dict[str, Any]) -> None:
    """Begin a build in `url` with these settings.

    Raises:
        ConfigError: another build with other settings was faster.
    """
    storage.create(_settings_url(url), json_bytes(settings))
    refuse_changed_settings(read_settings(url) or settings, settings, url)


def refuse_changed_settings(earlier: dict[str, Any], current: dict[str, Any], url: str) -> None:
    """Raise a ConfigError that names the settings that differ between an earlier attempt and the current one."""
    if earlier["fingerprint"] == current["fingerprint"]:
        return
    before, after = _flat(earlier["settings"]), _flat(current["settings"])
    changes = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    if earlier["classes"] != current["classes"]:
        changes.append("the classes' names")
    raise changed(url, changes)


def changed(url: str, changes: Sequence[str]) -> ConfigError:
    """The error of a build whose settings or inputs have changed since it was begun."""
    return ConfigError(
        f"this output was begun with other inputs or settings ({'; '.join(changes) or 'another format'})",
        where=f"output {url}",
        fix="restore them to finish that build, or choose another output",
    )


def taken(url: str) -> ConfigError:
    """The error of two builds at once in one folder."""
    return ConfigError(
        "another build is writing into this output", where=f"output {url}", fix="give each build an output of its own"
    )


def begin_attempt(url: str) -> int:
    """Number this attempt, by which tasks of an earlier one that are still alive notice that they were replaced."""
    number = _newest_attempt(url)
    while True:
        number += 1
        # The nonce makes two attempts' files differ, of which only one can be created.
        content = json_bytes({"number": number, "begun": time.time(), "nonce": secrets.token_hex(8)})
        if storage.create(storage.join(_attempts_url(url), f"{number:06d}.json"), content):
            return number


def check_attempt(url: str, attempt: int) -> None:
    """Stop the work of an attempt that a newer one has replaced, before both write.

    Raises:
        StorageError: there is a newer one.
    """
    newest = _newest_attempt(url)
    if newest > attempt:
        raise StorageError(
            f"attempt {newest} at this build has taken over from attempt {attempt}",
            where=url,
            fix="let that one finish, or run the same command once it has ended",
        )


def _newest_attempt(url: str) -> int:
    """The highest number of an attempt at the build in `url`; 0 before the first."""
    names = (entry.url.rpartition("/")[2] for entry in storage.entries(_attempts_url(url)))
    return max((int(name.removesuffix(".json")) for name in names), default=0)


def _attempts_url(url: str) -> str:
    return storage.join(url, "_prep", "attempts")


def _settings_url(url: str) -> str:
    return storage.join(url, "_prep", _SETTINGS_NAME)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
