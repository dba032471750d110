"""Outputs: the three formats hold the same records, appear whole, carry their checksums and depend on nothing else."""

import hashlib
import io
import json
import subprocess
import tarfile

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from curation_tools import ONE_PROCESS, pairs, small_config, write_parquet
from PIL import Image

from florence_jax.curation.blocks import load_callable
from florence_jax.curation.driver import curate
from florence_jax.curation.ingest.inputs import list_splits, read_split
from florence_jax.curation.output import shards
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.files import read_bytes, write_file

COUNT = 30


def whole_face(image):
    """A face detector that finds the left half."""
    height, width = image.shape[:2]
    return [[0, 0, width / 2, height]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("outputs")
    write_parquet(tmp / "raw" / "0.parquet", [row | {"group": "things"} for row in pairs(COUNT)])
    config = small_config(f"p={tmp}/raw", output={"formats": ("array_record", "parquet", "webdataset")})
    return tmp, config, curate(config, str(tmp / "w"), ONE_PROCESS)


def test_formats_hold_the_same_records(run):
    tmp, _, summary = run
    output = tmp / "w" / "output"
    source = open_source(str(output))
    records = {record["key"]: record for record in source.__getitems__(range(len(source)))}
    assert len(records) == COUNT == summary["records"]
    assert all(record["group"] == "things" and "label" not in record for record in records.values())
    tables = [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {row["key"]: row for row in tables} == records
    found = [p for split in list_splits(f"t={output}/*.tar", 99) for p in read_split(split, 1 << 20)]
    keys = [pair["key"].partition("/")[2] for pair in found]
    assert sorted(keys) == sorted(records)
    for key, pair in zip(keys, found, strict=True):
        assert pair["image"] == records[key]["image"] and pair["caption"] == records[key]["caption"]
        assert pair["extra"]["text_id"] == records[key]["text_id"]


def test_checksums_list_and_no_leftovers(run):
    tmp, _, summary = run
    output = tmp / "w" / "output"
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=output, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 8
    assert not [path for path in (tmp / "w").rglob("*") if "tmp" in path.name]
    lists = sorted((output / "uids").iterdir())
    assert [path.name for path in lists] == ["uids-00000-of-00002.txt", "uids-00001-of-00002.txt"]
    uids = [uid for path in lists for uid in path.read_text().split()]
    assert uids == sorted(uids) and len(uids) == COUNT
    manifests = [json.loads((output / "manifest" / f"{i:05d}.json").read_text()) for i in range(2)]
    assert sum(manifest["records"] for manifest in manifests) == COUNT
    for name, facts in manifests[0]["files"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == facts["sha256"]


def test_shuffled_by_keyed_hash_and_divided_by_uid(run):
    tmp, config, _ = run
    source = open_source(str(tmp / "w" / "output" / "pairs-00000-of-00002.array_record"))
    keys = [record["key"] for record in source.metadata()]
    assert len(keys) > 5 and keys != sorted(keys)
    curate(config, str(tmp / "w2"), ONE_PROCESS)
    for name in ("pairs-00000-of-00002.array_record", "pairs-00001-of-00002.tar", "pairs-00001-of-00002.parquet"):
        assert (tmp / "w" / "output" / name).read_bytes() == (tmp / "w2" / "output" / name).read_bytes()


def test_other_shards_replace_the_old_and_faces_are_blurred(run):
    tmp, config, _ = run
    # Other formats and more shards: nothing of the old output stays.
    changed = config | {
        "output": config["output"]
        | {"shards": 4, "formats": ("array_record",), "face_detector": "test_curation_outputs:whole_face"}
    }
    before = open_source(str(tmp / "w2" / "output"))
    original = {r["key"]: r["image"] for r in before.__getitems__(range(COUNT))}
    curate(changed, str(tmp / "w2"), ONE_PROCESS)
    names = sorted(path.name for path in (tmp / "w2" / "output").glob("pairs-*"))
    assert names == [f"pairs-{i:05d}-of-00004.array_record{end}" for i in range(4) for end in ("", ".meta")]
    assert {path.name[-12:] for path in (tmp / "w2" / "output" / "uids").iterdir()} == {"of-00004.txt"}
    after = open_source(str(tmp / "w2" / "output"))
    for record in after.__getitems__(range(3)):
        both = (original[record["key"]], record["image"])
        was, now = (np.asarray(Image.open(io.BytesIO(data)).convert("L"), float) for data in both)
        assert now[30:50, 10:30].std() < 0.5 * was[30:50, 10:30].std()
        assert abs(now[20:60, 60:90] - was[20:60, 60:90]).mean() < 8


def test_shard_count_moves_rarely():
    assert [shards.shard_count(n, 100) for n in (0, 1, 100, 101, 200, 201, 399, 900)] == [1, 1, 1, 2, 2, 4, 4, 16]


def test_files_appear_whole_or_not_at_all(tmp_path):
    def fail(path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    for target in (str(tmp_path / "a" / "x.bin"), "memory://outputs/x.bin"):
        with pytest.raises(OSError, match="disk full"):
            write_file(target, fail)
        with pytest.raises(FileNotFoundError):
            read_bytes(target)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_workdir_on_another_file_system(tmp_path):
    write_parquet(tmp_path / "raw" / "0.parquet", pairs(8))
    config = small_config(f"p={tmp_path}/raw", output={"shards": 1})
    local = curate(config, str(tmp_path / "w"), ONE_PROCESS)["root"]
    assert curate(config, "memory://curated", ONE_PROCESS)["root"] == local
    with fsspec.open("memory://curated/output/SHA256SUMS", "rt") as file:
        assert "pairs-00000-of-00001.array_record" in file.read()


@pytest.mark.parametrize("values", [(3, "three"), ([1], "x"), (2**70, 1)])
def test_a_field_of_two_types_has_no_parquet_column(tmp_path, values):
    records = [{"key": str(i), "image": b"x", "size": value} for i, value in enumerate(values)]
    with pytest.raises(UserError, match="field 'size' does not fit a parquet column: give it one type"):
        shards.WRITERS["parquet"](str(tmp_path / "x.parquet"), records)
    shards.WRITERS["parquet"](str(tmp_path / "x.parquet"), records[:1] if values[0] != 2**70 else records[1:])


def test_webdataset_names(tmp_path):
    record = {"key": "k", "image": b"\xff\xd8x", "caption": "é"}
    shards.WRITERS["webdataset"](str(tmp_path / "x.tar"), [record])
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames() == ["k.jpg", "k.txt", "k.json"]
    with pytest.raises(UserError, match="write module:function"):
        load_callable("json:nothing")
