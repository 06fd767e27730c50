import json
from pathlib import Path

import pytest

from data_prep.build import build
from data_prep.shards.verify import verify
from pipeline.data.manifest import read_index, read_manifest
from pipeline.errors import DataError
from tests.support.prep_cases import settings, write_pairs


@pytest.fixture(name="built")
def build_one(tmp_path: Path) -> Path:
    table = write_pairs(tmp_path / "raw", 20, split=["train"] * 12 + ["heldout"] * 8)
    build(settings(table, tmp_path / "out", source={"split_column": "split"}))
    return tmp_path / "out"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_sound_data_set_has_no_problems(built: Path) -> None:
    report = verify(str(built))
    assert (report.shards, report.samples, report.problems) == (3, 20, ())
    assert verify(str(built / "train")).samples == 12


@pytest.mark.parametrize("where", ["header", "image", "padding"])
def test_a_flipped_byte_is_found_and_its_sample_named(built: Path, where: str) -> None:
    manifest = read_manifest(str(built / "train"))
    shard = manifest.shards[1]
    offsets = read_index(manifest, shard)
    keys = [row.partition(".")[0] for row in _names(built / "train" / shard.name)]
    at = {"header": offsets[2] + 3, "image": offsets[2] + 700, "padding": offsets[3] - 1}[where]
    flip(built / "train" / shard.name, int(at))
    problems = verify(str(built)).problems
    assert {problem.where for problem in problems} == {str(built / "train" / shard.name)}
    assert [problem.sample for problem in problems if problem.sample] == [keys[2]]
    with pytest.raises(DataError, match=keys[2]):
        verify(str(built)).raise_if_damaged()


def test_without_the_sidecar_a_damaged_image_still_names_its_sample(built: Path) -> None:
    manifest = read_manifest(str(built / "train"))
    shard = manifest.shards[0]
    start = int(read_index(manifest, shard)[1])
    keys = [row.partition(".")[0] for row in _names(built / "train" / shard.name)]
    (built / "train" / "00000.parquet").unlink()
    flip(built / "train" / shard.name, start + 512)  # the JPEG's first byte
    problems = verify(str(built)).problems
    assert any(problem.sample is not None and "image can't be read" in problem.what for problem in problems), problems
    assert any(problem.where.endswith("00000.parquet") and problem.what == "missing" for problem in problems)
    assert keys


@pytest.mark.parametrize("name", ["00000.tar", "00000.index.npy", "00000.parquet", "sizes.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_any_damaged_object_is_named(built: Path, name: str, damage: str) -> None:
    path = built / "train" / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        flip(path, path.stat().st_size // 2)
    problems = verify(str(built)).problems
    assert str(path) in {problem.where for problem in problems}


def test_a_folder_without_manifest_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished data set"):
        verify(str(tmp_path))


def test_a_sample_that_was_written_wrong_is_found(built: Path) -> None:
    """Hashes that agree don't prove that an image can be read: here the shard itself was made with a bad one."""
    import hashlib

    folder = built / "train"
    manifest = read_manifest(str(folder))
    start = int(read_index(manifest, manifest.shards[0])[0])
    flip(folder / "00000.tar", start + 512)
    document = json.loads((folder / "manifest.json").read_text())
    document["shards"][0]["sha256"] = hashlib.sha256((folder / "00000.tar").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(document))
    problems = verify(str(built)).problems
    assert len(problems) == 1
    assert "image can't be read" in problems[0].what
    assert problems[0].sample is not None


def _names(archive: Path) -> list[str]:
    import tarfile

    with tarfile.open(archive) as tar:
        return [name for name in tar.getnames() if name.endswith(".json")]
