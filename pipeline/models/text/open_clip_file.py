"""Import of a single file of the open_clip package, since importing the whole package takes seconds."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def open_clip_file(name: str) -> ModuleType:
    """Module `open_clip.<name>`, loaded by itself unless the package is imported already."""
    if "open_clip" in sys.modules:
        return importlib.import_module(f"open_clip.{name}")
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"pipeline.models._open_clip_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
