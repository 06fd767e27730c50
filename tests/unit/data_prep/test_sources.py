import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_prep.account import Refused
from data_prep.sources.base import AllowedPlaces, RangedFile
from data_prep.sources.tables import TableOptions, TableSource
from pipeline.errors import DataError
from tests.support.prep_cases import write_table

CAPTIONS = ["plain", 'with "quotes", and comma', "two\nlines", "caf\u00e9 \u732b", ""]
URLS = [f"images/{i}.jpg" for i in range(len(CAPTIONS))]


def rows(source: TableSource) -> list[dict[str, object]]:
    return [row for batch in source.batches() for row in batch.to_pylist()]


def write_as(folder: Path, ending: str) -> Path:
    """The same pairs in a file of that kind."""
    path = folder / f"pairs.{ending}"
    kind = ending.removesuffix(".gz")
    if kind == "parquet":
        return write_table(path, url=URLS, caption=CAPTIONS, extra=[1.5] * 5)
    if kind == "jsonl":
        lines = [json.dumps({"url": u, "caption": c, "extra": 1.5}) for u, c in zip(URLS, CAPTIONS, strict=True)]
        text = "\n".join(lines) + "\n"
    else:
        comma = "\t" if kind == "tsv" else ","
        cells = [[u, '"' + c.replace('"', '""') + '"', "1.5"] for u, c in zip(URLS, CAPTIONS, strict=True)]
        text = "\n".join(comma.join(line) for line in [["url", "caption", "extra"], *cells]) + "\n"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl", "csv.gz", "jsonl.gz"])
def test_every_format_gives_the_same_inputs(tmp_path: Path, ending: str) -> None:
    source = TableSource(TableOptions(url=str(write_as(tmp_path, ending))))
    source.check()
    inputs = rows(source)
    assert [row["position"] for row in inputs] == [0, 1, 2, 3, 4]
    assert [row["url"] for row in inputs] == [url.encode() for url in URLS]
    assert [row["caption"] for row in inputs] == [caption.encode() for caption in CAPTIONS]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"\xef\xbb\xbfurl,caption\nimages/1.jpg,one\n")
    source = TableSource(TableOptions(url=str(path)))
    source.check()
    assert rows(source)[0]["url"] == b"images/1.jpg"


def test_a_folder_of_tables_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, first in (("b", 2), ("a", 0)):
        write_table(tmp_path / f"{name}.parquet", url=[f"{first}.jpg", f"{first + 1}.jpg"], caption=["x", "y"])
    inputs = rows(TableSource(TableOptions(url=str(tmp_path))))
    assert [(row["position"], row["url"]) for row in inputs] == [(i, b"%d.jpg" % i) for i in range(4)]


def test_a_table_is_streamed_in_batches(tmp_path: Path) -> None:
    count = 40_000
    path = write_table(tmp_path / "big.parquet", url=["x"] * count, caption=["y"] * count)
    sizes = [batch.num_rows for batch in TableSource(TableOptions(url=str(path))).batches()]
    assert sum(sizes) == count
    assert max(sizes) < count / 2


def test_broken_texts_reach_the_rows_as_bytes(tmp_path: Path) -> None:
    table = pa.table({"url": pa.array([b"a.jpg"], pa.binary()), "caption": pa.array([b"caf\xe9"], pa.binary())})
    pa.parquet.write_table(table, tmp_path / "raw.parquet")
    assert rows(TableSource(TableOptions(url=str(tmp_path / "raw.parquet"))))[0]["caption"] == b"caf\xe9"
    (tmp_path / "raw.csv").write_bytes(b"url,caption\na.jpg,caf\xe9\n")
    assert rows(TableSource(TableOptions(url=str(tmp_path / "raw.csv"))))[0]["caption"] == b"caf\xe9"
    (tmp_path / "raw.jsonl").write_bytes(b'{"url": "a.jpg", "caption": "lone \\ud800"}\n')
    assert rows(TableSource(TableOptions(url=str(tmp_path / "raw.jsonl"))))[0]["caption"] == b"lone \xed\xa0\x80"


def test_numbers_categories_and_nested_values_become_text(tmp_path: Path) -> None:
    boxes = [{"bbox": [1, 2, 3, 4], "category_id": 5}]
    table = pa.table(
        {
            "url": pa.array(["a.jpg"]).dictionary_encode(),
            "caption": ["x"],
            "label": [7],
            "boxes": [boxes],
        }
    )
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    options = TableOptions(url=str(tmp_path / "t.parquet"), label_column="label", annotations_column="boxes")
    row = rows(TableSource(options))[0]
    assert (row["url"], row["label"]) == (b"a.jpg", b"7")
    assert json.loads(row["annotations"]) == boxes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the table is empty"),
        ("a.csv", b"url,caption\n", "holds no rows"),
        ("a.csv", b"url,caption\na,b,c\n", "can't be read as csv"),
        ("a.csv", b"url,captoin\na,b\n", r"no column 'caption'.*did you mean 'captoin'\?.*url, captoin"),
        ("a.jsonl", b"", "no column 'url'"),
        ("a.jsonl", b'{"url": 1', "line 1 isn't JSON"),
        ("a.jsonl", b"[1]\n", "line 1 isn't a JSON object"),
        ("a.parquet", b"PAR1 and no more", "can't be read as parquet"),
        ("a.csv.gz", b"not gzip", "can't be read as csv"),
        ("a.xlsx", b"?", "unknown table format"),
    ],
)
def test_a_bad_table_is_one_clear_message(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        TableSource(TableOptions(url=str(tmp_path / name))).check()
    assert name in error.value.where


def test_a_missing_table_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("url,caption\n")
    with pytest.raises(DataError, match=r"no such table.*did you mean .*pairs\.csv"):
        TableSource(TableOptions(url=str(tmp_path / "pears.csv"))).check()


def test_class_names_come_from_the_settings_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    (tmp_path / "wrong.json").write_text('{"cat": 0}')
    assert TableSource(TableOptions(url="t.csv", classes=("cat", "dog"))).classes() == ("cat", "dog")
    assert TableSource(TableOptions(url="t.csv", classes=str(tmp_path / "classes.json"))).classes() == ("cat", "dog")
    with pytest.raises(DataError, match="aren't a list of texts"):
        TableSource(TableOptions(url="t.csv", classes=str(tmp_path / "wrong.json"))).classes()


def test_rows_may_name_only_allowed_places(tmp_path: Path) -> None:
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (inside / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (inside / "t.csv").write_text("url,caption\n")
    places = TableSource(TableOptions(url=str(inside / "t.csv"))).places()
    assert places.resolve(b"a/b.jpg") == str(inside / "a/b.jpg")
    assert places.resolve(str(inside / "c.jpg").encode()) == str(inside / "c.jpg")
    for url, reason in [
        (b"../secret.jpg", "place_not_allowed"),
        (b"/etc/passwd", "place_not_allowed"),
        (b"file:///etc/passwd", "place_not_allowed"),
        (b"link.jpg", "place_not_allowed"),
        (b"s3://bucket/a.jpg", "place_not_allowed"),
        (b"ftp://host/a.jpg", "unsupported_scheme"),
        (b"pipe://rm", "unsupported_scheme"),
        (b" ", "url_empty"),
        (None, "url_empty"),
    ]:
        with pytest.raises(Refused) as refused:
            places.resolve(url)
        assert refused.value.reason == reason, url
    wider = TableSource(TableOptions(url=str(inside / "t.csv"), allow=("s3://bucket/open", str(tmp_path)))).places()
    assert wider.resolve(b"../secret.jpg") == str(tmp_path / "secret.jpg")
    assert wider.resolve(b"s3://bucket/open/a.jpg") == "s3://bucket/open/a.jpg"
    for url in (b"s3://bucket/opened/a.jpg", b"s3://bucket/open/../closed/a.jpg", b"s3://other/open/a.jpg"):
        with pytest.raises(Refused):
            wider.resolve(url)


def test_a_table_in_a_bucket_may_name_that_bucket_only() -> None:
    places = AllowedPlaces("s3://raw/tables", ("s3://raw/",))
    assert places.resolve(b"../images/a b?#.jpg") == "s3://raw/images/a b?#.jpg"
    assert places.resolve(b"s3://raw/x//y.jpg") == "s3://raw/x//y.jpg"
    assert places.resolve(b"../../../other/a.jpg") == "s3://raw/other/a.jpg"
    for url in (b"s3://rawer/a.jpg", b"/etc/passwd"):
        with pytest.raises(Refused) as refused:
            places.resolve(url)
        assert refused.value.reason == "place_not_allowed"


def test_a_ranged_file_reads_like_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(data)
    file = RangedFile(str(tmp_path / "file"))
    assert file.read(10) == data[:10]
    assert file.seek(-7, 2) == len(data) - 7
    assert file.read() == data[-7:]
    assert file.read(5) == b""
    file.seek(100)
    assert file.readall() == data[100:]
