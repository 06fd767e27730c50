"""A data set in figures and samples, for people."""

from __future__ import annotations

from typing import Any

from data_prep.shards.contents import first_samples
from pipeline import storage
from pipeline.data.manifest import MANIFEST_NAME, Manifest, read_manifest


def describe_splits(url: str, num_samples: int = 0) -> dict[str, dict[str, Any]]:
    """By split, a data set's counts, classes and fingerprint, and its first samples if any are asked for; {} where
    there is no data set. One without splits is described under its folder's name.

    Raises:
        DataError: a manifest or an index is damaged.
    """
    splits = {}
    for name, manifest in splits_of(url).items():
        splits[name] = {
            "num_samples": manifest.num_samples,
            "num_shards": len(manifest.shards),
            "size_bytes": sum(shard.size_bytes for shard in manifest.shards),
            "classes": list(manifest.classes),
            "fingerprint": manifest.fingerprint,
            "info": manifest.info,
        }
        if num_samples:
            splits[name]["samples"] = first_samples(manifest, num_samples)
    return splits


def splits_of(url: str) -> dict[str, Manifest]:
    """The manifest in a folder, or those of the folders in it, by name."""
    if storage.exists(storage.join(url, MANIFEST_NAME)):
        return {url.rstrip("/").rpartition("/")[2]: read_manifest(url)}
    suffix = f"/{MANIFEST_NAME}"
    try:
        urls = sorted(entry.url for entry in storage.entries(url) if entry.url.endswith(suffix))
    except FileNotFoundError:
        return {}
    folders = [manifest.removesuffix(suffix) for manifest in urls]
    return {folder.rpartition("/")[2]: read_manifest(folder) for folder in folders}
