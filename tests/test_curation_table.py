"""The table of scores: repeated keys, parts measured again, quarantine, and what is left of earlier runs."""

import hashlib
import io
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from curation_tools import ONE_PROCESS, pairs, picture, small_config, write_parquet
from PIL import Image

from florence_jax.curation.filters.known_pictures import HashList
from florence_jax.curation.ingest import measure
from florence_jax.curation.ingest.hashing import Limits
from florence_jax.curation.ingest.inputs import list_splits
from florence_jax.curation.ingest.phase import build_table, write_part
from florence_jax.curation.plan import make_all
from florence_jax.curation.run import Run


def statuses(workdir, config):
    build_table(Run(config, str(workdir), ONE_PROCESS))
    return sorted(pq.read_table(workdir / "table" / "part-00000.parquet")["status"].to_pylist())


@pytest.mark.parametrize("reverse", [False, True])
def test_of_repeats_the_row_with_the_opt_out_stays(tmp_path, reverse):
    rows = pairs(6)
    for row in rows:
        row |= {"headers": [], "license": "mit", "x": "a"}
    rows += [rows[1] | {"headers": ["X-Robots-Tag: noai"]}, rows[2] | {"license": "cc0"}, rows[3] | {"x": "b"}]
    rows += [rows[4] | {"image": picture(9), "headers": ["tdm-reservation: 1"]}]
    rows = rows[::-1] if reverse else rows
    (tmp_path / "table").mkdir()
    rules = make_all(small_config("p", measure={"extra_fields": ("x",)})).measure
    (split,) = list_splits("p=" + write_parquet(tmp_path / "p.parquet", rows), 99)
    table = pq.read_table(measure.measure_split(split, str(tmp_path), rules))
    write_part(0, table.sort_by("uid"), str(tmp_path / "table"))
    assert json.loads((tmp_path / "table" / "part-00000.json").read_text())["repeated"] == 4
    kept = {row["key"]: row for row in pq.read_table(tmp_path / "table" / "part-00000.parquet").to_pylist()}
    assert [kept[f"000{i}"]["headers"] for i in (0, 1, 4)] == [[], ["X-Robots-Tag: noai"], ["tdm-reservation: 1"]]
    assert (kept["0002"]["licence"], kept["0003"]["extra"]) == ("cc0", '{"x": "a"}')


def test_a_retry_may_be_repeated(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "captions.csv").write_text("file,caption\n0.png,a cup\n1.png,a glass\n")
    (tmp_path / "f" / "1.png").write_bytes(picture(6))
    config = small_config(f"f={tmp_path}/f", measure={"retry": ("missing",)}, parts=1)
    assert statuses(tmp_path, config) == ["missing", "ok"]
    (tmp_path / "f" / "0.png").write_bytes(picture(5))
    assert statuses(tmp_path, config) == ["ok", "ok"]


def test_a_later_hash_list_leaves_nothing_of_its_pictures(tmp_path):
    rows = pairs(2)
    write_parquet(tmp_path / "p" / "0.parquet", rows)
    (tmp_path / "list.txt").write_text(hashlib.sha256(rows[1]["image"]).hexdigest())
    config = small_config(f"p={tmp_path}/p", parts=1)
    assert statuses(tmp_path, config) == ["ok", "ok"]
    measured = tmp_path / "measured"
    (copies,) = measured.glob("*.images")
    assert rows[1]["image"] in copies.read_bytes()
    (measured / f".{copies.name}.{'0' * 32}.tmp").write_bytes(rows[1]["image"])  # of a run that was killed
    (measured / "my.images").write_bytes(b"not a part")
    old = {file.name for file in measured.iterdir()}
    config["post_filter"]["hash_list"] = str(tmp_path / "list.txt")
    assert statuses(tmp_path, config) == ["ok", "ok"]
    assert not any(rows[1]["image"] in file.read_bytes() for file in measured.iterdir())
    assert old & {file.name for file in measured.iterdir()} == {"my.images"}


@pytest.mark.parametrize(
    ("status", "limits", "cut"),
    [
        ("animated", {}, 10**6),
        ("too_narrow", {"max_aspect": 1.1}, 10**6),
        ("too_many_pixels", {"max_pixels": 99}, 10**6),
        ("corrupt", {}, 12),
    ],
)
def test_a_listed_picture_is_quarantined_whatever_else_is_wrong_with_it(status, limits, cut):
    frames = [Image.open(io.BytesIO(picture(i))).convert("P") for i in (1, 2)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    data = file.getvalue()[:cut]
    listed = HashList([hashlib.md5(data).hexdigest()], np.zeros((1, 32), np.uint8))
    rules = measure.MeasureRules(Limits(**limits), (), listed, (), "")
    pair = {"key": "k", "source": "s", "image": data, "problem": "", "locator": ("x.gif", 0, len(data))}
    row = measure.measure_picture(pair, rules)
    assert (row["status"], row["listed"], row["path"]) == (status, 0, "")
    assert measure.measure_picture(pair | {"image": data + b"0"}, rules)["listed"] is None


def test_a_name_that_is_not_utf_8_is_shown_escaped_and_the_picture_kept(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / os.fsdecode(b"bl\xe5.png")).write_bytes(picture(5))
    (folder / os.fsdecode(b"bl\xe5.txt")).write_text("a blue square")
    (split,) = list_splits(f"own={folder}", 99)
    rules = measure.MeasureRules(Limits(), (), None, (), "0" * 8)
    (row,) = pq.read_table(measure.measure_split(split, str(tmp_path), rules)).to_pylist()
    assert row["key"].endswith("bl\\udce5.png") and row["caption"] == "a blue square" and row["status"] == "ok"
    where = [row[name] for name in ("path", "offset", "size", "image_id")]
    assert measure.image_bytes(str(tmp_path), *where) == picture(5)
