"""Errors whose cause lies outside the code, each with one message a person can act on.

An error names *what* is wrong, *where* (a file, a config key, a URL, a sample) and *how to mend it*. The command
prints such an error as one message without a traceback and exits with the class's `exit_code`; anything else that
is raised is a defect of ours and keeps its traceback (exit 1).
"""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """The user's input or surroundings are wrong: printed as one message, exit code 2.

    Args:
        what: what is wrong, as a phrase ("no such bucket").
        where: the file, config key, URL, run or sample it concerns.
        fix: what the reader can do about it, in the imperative.
    """

    exit_code: ClassVar[int] = 2
    kind: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.what}. Fix: {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by keyword, so that an error raised in a Ray task arrives whole."""
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(cls: type[UserError], what: str, where: str, fix: str) -> UserError:
    return cls(what, where=where, fix=fix)


class ConfigError(UserError):
    """A configuration file or override is wrong."""

    kind = "config error"


class DataError(UserError):
    """The data are wrong: an empty table, a missing column, a damaged shard."""

    kind = "data error"


class StorageError(UserError):
    """A place to read or write can't be used: missing bucket, refused credentials, full disk."""

    kind = "storage error"


class CheckpointError(UserError):
    """Checkpoints exist but none can be used, or weights don't fit the model."""

    kind = "checkpoint error"


class ResourceError(UserError):
    """The machine or cluster can't serve the request: too few cores, GPUs or nodes."""

    kind = "resource error"


class Stopped(Exception):  # noqa: N818 -- not an error: the run was asked to stop and can go on
    """A run stopped because it was asked to, with its state saved: exit code 75, the same command resumes it."""

    exit_code: ClassVar[int] = 75
