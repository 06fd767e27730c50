"""The filters that look at finished samples, by the type a configuration gives them."""

from __future__ import annotations

FILTERS: dict[str, str] = {
    "clip_score": "data_prep.filters.clip_score:ClipScoreFilter",
    "function": "data_prep.filters.function:FunctionFilter",
}
"""Where each filter is: a new filter is one file, and one line of this table."""
