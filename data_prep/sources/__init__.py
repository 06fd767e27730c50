"""The sources that raw pairs are read from, by the type a configuration gives them."""

from __future__ import annotations

SOURCES: dict[str, str] = {
    "table": "data_prep.sources.tables:TableOptions",
    "folder": "data_prep.sources.folders:FolderOptions",
    "class_folders": "data_prep.sources.folders:ClassFoldersOptions",
    "tars": "data_prep.sources.archives:TarsOptions",
    "coco": "data_prep.sources.coco:CocoOptions",
}
"""Where each source's options are: a new source is one file, and one line of this table."""
