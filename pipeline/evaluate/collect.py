"""Predictions of a whole evaluation set as tensors, gathered over ranks by sample id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.evaluate.base import Predict
from pipeline.ranks import gather_by_id


def collect(predict: Predict, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """The named predictions of every present sample, in order of sample id, and `ids`; equal on all ranks.

    Names the stage doesn't predict are left out. Collective: all ranks pass the same number of batches.
    """
    ids: list[Tensor] = []
    parts_of: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches:
        predictions = predict(batch)
        ids.append(torch.where(batch.weight > 0, batch.ids, -1).cpu())
        for name in names:
            if name in predictions:
                parts_of[name].append(predictions[name].detach().cpu())
    if not ids:
        return {}
    rows = {name: torch.cat(parts) for name, parts in parts_of.items() if parts}
    sorted_ids, gathered = gather_by_id(torch.cat(ids), rows)
    return gathered | {"ids": sorted_ids}


def labelled(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows whose label is known (not -1); an empty dict where there are no labels."""
    if "labels" not in rows:
        return {}
    known = rows["labels"] >= 0
    return {name: value[known] for name, value in rows.items()} if bool(known.any()) else {}
