"""The audit: the log accounts for every pair, the report shows what it may, the metadata is valid Croissant."""

import collections
import hashlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_tools import ONE_PROCESS, pairs, picture, small_config, write_parquet

from florence_jax.curation.driver import curate
from florence_jax.curation.keyed import keyed_hash
from florence_jax.curation.output.funnel import TOP_REASONS, AuditError, Funnel, joined_part
from florence_jax.curation.output.funnel_page import write_html
from florence_jax.curation.run import Run
from florence_jax.curation.table import DECISIONS, uid_of

mlcroissant = pytest.importorskip("mlcroissant")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("audit")
    rows = pairs(40)
    rows[1] |= {"image": rows[0]["image"]}
    rows[2] |= {"caption": "write to jane.doe@mail.example for the price of this thing"}
    rows[3] |= {"caption": "<b>bold</b> & <script>alert(1)</script>"}
    rows[4] |= {"image": b"not an image"}
    rows[5] |= {"image": picture(5, (20, 20))}
    rows += [{**rows[6], "caption": "a second row with a key that is taken"}]  # the key 0006 again
    write_parquet(tmp / "raw" / "0.parquet", rows)
    (tmp / "raw" / "1.tar").write_bytes(b"no tar at all" * 100)
    (tmp / "list.txt").write_text(hashlib.sha256(rows[9]["image"]).hexdigest())
    config = small_config(
        f"p={tmp}/raw",
        post_filter={"hash_list": str(tmp / "list.txt")},
        output={"formats": ("array_record", "parquet"), "licence": "https://creativecommons.org/licenses/by/4.0/"},
    )
    return tmp / "w", curate(config, str(tmp / "w"), ONE_PROCESS)


def test_every_uid_once_with_its_reason_and_the_counts_add_up(run):
    workdir, summary = run
    log = pa.concat_tables([pq.read_table(path) for path in sorted((workdir / "decisions").glob("log-*.parquet"))])
    assert log.schema.names == DECISIONS.names and len(log) == summary["rows"] == 40
    assert sorted(log["uid"].to_pylist()) == sorted(uid_of("p", f"{i:04d}") for i in range(40))
    assert set(log["config"].to_pylist()) == {summary["config"]}
    left = summary["rows"]
    for stage in summary["stages"]:
        assert stage["came"] == left and stage["kept"] == left - sum(stage["reasons"].values())
        left = stage["kept"]
    assert left == summary["records"] == log["stage"].to_pylist().count("output")
    small = next(row for row in log.to_pylist() if row["uid"] == uid_of("p", "0005"))
    assert (small["stage"], small["reason"], small["value"], small["threshold"]) == ("size", "small_side", "20", "32")
    assert summary["repeated_keys"] == 1 and "1.tar" in summary["damaged_inputs"][0]
    for rows in summary["slices"].values():
        assert sum(row["pairs"] for row in rows) == 40 and sum(row["kept"] for row in rows) == summary["records"]


def test_a_log_that_does_not_account_for_a_pair_is_an_error(run):
    workdir, _ = run
    path = next(path for path in sorted((workdir / "decisions").glob("log-*.parquet")))
    whole = path.read_bytes()
    table = pq.read_table(path)
    for wrong in (table.slice(1), pa.concat_tables([table, table.slice(0, 1)])):
        pq.write_table(wrong, path)
        with pytest.raises(AuditError, match="not for the same uids"):
            [joined_part(str(workdir), number) for number in range(3)]
    path.unlink()
    with pytest.raises(AuditError, match="0 decisions"):
        joined_part(str(workdir), int(path.stem[-5:]))
    path.write_bytes(whole)
    assert sum(len(joined_part(str(workdir), number)) for number in range(3)) == 40


def test_counts_on_beam_equal_those_of_one_list(run):
    workdir, summary = run
    rows = [row for number in range(3) for row in joined_part(str(workdir), number).to_pylist()]
    funnel = Funnel(json.loads((workdir / "audit" / "facts.json").read_text()))
    assert funnel.reasons == collections.Counter((row["stage"], row["reason"]) for row in rows)
    for title, column in (("domain", "host"), ("source", "source"), ("language", "language")):
        values = collections.Counter(row[column] for row in rows)
        kept = collections.Counter(row[column] for row in rows if row["stage"] == "output")
        expected = [
            (value, n, kept[value]) for value, n in sorted(values.items(), key=lambda item: (-item[1], item[0]))
        ]
        assert [(row["value"], row["pairs"], row["kept"]) for row in summary["slices"][title]] == expected[:TOP_REASONS]
    shown = [row for row in rows if row["listed"] is None]
    shown.sort(key=lambda row: keyed_hash(0, row["uid"], "example"))
    for stage, reason in funnel.reasons:
        expected = [row for row in shown if (row["stage"], row["reason"]) == (stage, reason)]
        assert funnel.examples(stage, reason) == expected[: 0 if stage == "quarantine" else 6]
    (copy,) = funnel.examples("near_duplicates", "exact_copy")
    assert set(funnel.partners) == {copy["value"]} and copy["value"] in {uid_of("p", "0000"), uid_of("p", "0001")}


def test_report_shows_reasons_with_pictures_and_hides_what_it_must(run):
    workdir, summary = run
    page = (workdir / "report" / "funnel.html").read_text()
    assert json.loads((workdir / "report" / "funnel.json").read_text()) == summary
    for stage in summary["stages"]:
        for reason, count in stage["reasons"].items():
            assert f"<h3>{reason.replace('_', ' ').capitalize()}: {count}</h3>" in page
    assert page.count('src="data:image/png;base64,') >= 8 and "http" not in re.sub(r'src="[^"]*"', "", page)
    assert "<script" not in page and "&lt;script" in page
    assert "jane.doe" not in page and "[mail]" in page
    assert "thing number 9 " not in page and summary["quarantined"] == 1
    assert (workdir / "report" / "quarantine.txt").read_text().split() == [uid_of("p", "0009")]
    assert summary["root"] in page and summary["config"] in page


def test_a_report_without_examples(run, tmp_path):
    workdir, summary = run
    facts = json.loads((workdir / "audit" / "facts.json").read_text())
    funnel = Funnel(facts | {"examples": [], "partners": []})
    assert funnel.stages(row["stage"] for row in summary["stages"]) == summary["stages"]
    write_html(str(tmp_path / "funnel.html"), str(workdir), summary, funnel)
    text = (tmp_path / "funnel.html").read_text()
    assert "near duplicate" in text and "base64" not in text


def test_croissant_validates_and_reads_the_records(run):
    workdir, summary = run
    dataset = mlcroissant.Dataset(str(workdir / "output" / "croissant.json"))
    assert dataset.metadata.name == "florence_jax-sample"
    files = {file.name: file.sha256 for file in dataset.metadata.distribution}
    sums = dict(reversed(line.split()) for line in (workdir / "output" / "SHA256SUMS").read_text().splitlines())
    assert files == sums and len(files) == 6  # two shards in two formats, and a side file of each ArrayRecord
    names = [record_set.name for record_set in dataset.metadata.record_sets]
    found = [record for name in names for record in dataset.records(name)]
    assert len(found) == summary["records"]
    uids = {next(value for field, value in record.items() if field.endswith("/key")).decode() for record in found}
    assert uids == {uid for path in (workdir / "output" / "uids").iterdir() for uid in path.read_text().split()}


def test_datasheet_states_counts_and_open_questions(run):
    workdir, summary = run
    text = (workdir / "output" / "DATASHEET.md").read_text()
    assert f"{summary['records']} image-text pairs from 40 raw pairs" in text
    assert "| size | " in text and "small_side 1" in text and "Not known to this program" in text


def test_phases_are_not_repeated(run, monkeypatch):
    workdir, summary = run
    config = json.loads(json.dumps(summary))  # the summary is plain JSON
    assert config == summary
    assert Run.phase is not None
    manifest = json.loads((workdir / "table" / "manifest.json").read_text())
    assert manifest["rows"] == 40 and len(manifest["parts"]) == 3
