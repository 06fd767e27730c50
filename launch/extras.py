"""Libraries that only some commands need: what to install when one is missing."""

from __future__ import annotations

from pipeline.errors import ResourceError

EXTRAS = {
    "deepspeed": "train",
    "ninja": "train",
    "tensorboard": "train",
    "ray": "ray",
    "onnx": "onnx",
    "onnxscript": "onnx",
}
"""Library -> the extra of this package that brings it."""


def missing_library(error: ModuleNotFoundError) -> ResourceError | None:
    """What a person can do about an import that failed; None where the library is none of an extra's."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return None
    extra = EXTRAS[library]
    return ResourceError(
        f"this needs {library}, which isn't installed", where="this environment", fix=f"pip install 'vitrail[{extra}]'"
    )
