"""What a data set's samples hold, read back from its shards: for end reports, `vitrail look` and verification."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import storage
from pipeline.data.images.decode import UnreadableSample, read_header
from pipeline.data.manifest import Manifest, read_index
from pipeline.data.reading.tar import first_image, key_and_extension


def is_indexed(manifest: Manifest) -> bool:
    """Whether other programs wrote the tars, see `data_prep.indexing`: their members are less regular."""
    return "indexed" in manifest.info


def tar_content(data: bytes) -> dict[str, bytes]:
    """Name -> bytes of the regular files in a piece of a tar."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read() for name, file in files.items() if file is not None}


def first_members(manifest: Manifest, count: int) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """(shard's name, key, extension -> bytes) of a split's first samples, which are a mixture where `vitrail prep`
    shuffled them.

    Raises:
        DataError: an index is missing or damaged.
    """
    for shard in manifest.shards:
        offsets = read_index(manifest, shard)[: count + 1].tolist()
        data = storage.read_range(manifest.tar_url(shard), offsets[0], offsets[-1])
        for start, stop in itertools.pairwise(offsets):
            content = tar_content(data[start - offsets[0] : stop - offsets[0]])
            named = [(parts, value) for name, value in content.items() if (parts := key_and_extension(name))]
            yield shard.name, named[0][0][0], {extension: value for (_, extension), value in named}
        count -= len(offsets) - 1
        if count <= 0:
            return


def first_samples(manifest: Manifest, count: int) -> list[dict[str, Any]]:
    """The first samples of a split as plain data: shard, key, caption, members, and the JSON's facts.

    Raises:
        DataError: see `first_members`.
    """
    samples: list[dict[str, Any]] = []
    for name, key, members in first_members(manifest, count):
        caption = members.get("txt", b"").decode("utf-8", "replace")
        shown: dict[str, Any] = {"shard": name, "key": key, "caption": caption, "members": sorted(members)}
        samples.append(_facts(members) | shown if is_indexed(manifest) else shown | _facts(members))
    return samples


def _facts(members: Mapping[str, bytes]) -> dict[str, Any]:
    """A sample's JSON, with the number of annotations in their place, and its image's size where that is missing."""
    try:
        facts = json.loads(members.get("json", b"{}"))
    except ValueError:
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    if isinstance(facts.get("annotations"), list):
        facts["num_annotations"] = len(facts.pop("annotations"))
    image = first_image(members)
    if image is not None and "width" not in facts:
        with contextlib.suppress(UnreadableSample):
            header = read_header(image)
            facts |= {"width": header.width, "height": header.height}
    return facts
