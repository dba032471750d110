"""The pipeline: the same output whatever the workers and the order, decisions without images, restarts, every stage."""

import dataclasses
import functools
import io
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.local_job_service import LocalJobServicer
from curation_tools import ONE_PROCESS, pairs, picture, small_config, stamps, write_parquet
from PIL import Image

from florence_jax.curation import plan, stages
from florence_jax.curation.blocks import Stage, rows_of
from florence_jax.curation.dedup.stage import cluster_decisions
from florence_jax.curation.driver import curate
from florence_jax.curation.filters.captions import text_decisions
from florence_jax.curation.filters.validity import validity_decisions
from florence_jax.curation.ingest import measure as measure_module
from florence_jax.curation.ingest.inputs import list_splits
from florence_jax.curation.main import beam_options, with_sample
from florence_jax.curation.output.phase import merkle_root
from florence_jax.curation.output.terminal import summary_lines
from florence_jax.curation.plan import make_all
from florence_jax.curation.run import runner_trouble
from florence_jax.curation.select import simulate
from florence_jax.curation.table import SCORES, uid_of
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError


def brightness(images, captions):
    """A relevance function: higher numbers in captions score higher; one pair makes it fail."""
    if any("number 3 " in caption for caption in captions):
        raise UserError("no score for number 3")
    return [float(caption.split()[2]) for caption in captions]


def log(workdir, source="p"):
    """{key: (stage, reason, value)} of a run."""
    rows = [
        row
        for path in sorted(Path(workdir, "decisions").glob("log-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    by_uid = {row["uid"]: (row["stage"], row["reason"], row["value"]) for row in rows}
    assert len(by_uid) == len(rows)
    return {f"{i:04d}": by_uid[uid] for i in range(2000) if (uid := uid_of(source, f"{i:04d}")) in by_uid}


@pytest.fixture
def raw(tmp_path):
    """60 pairs with copies, a bad caption and a broken file; as one parquet file."""
    rows = pairs(60)
    rows[10] |= {"image": rows[0]["image"], "caption": "the first thing again"}
    rows[11] |= {"image": picture(1, (144, 120), "JPEG", quality=85)}
    rows[12] |= {"caption": "IMG_1234.jpg"}
    rows[13] |= {"image": rows[13]["image"][:300]}
    rows[14] |= {"url": "https://x.blocked.example/14", "image": picture(2)}
    write_parquet(tmp_path / "raw" / "0.parquet", rows)
    return rows, tmp_path


def test_every_stage_and_its_reason(raw):
    rows, tmp = raw
    summary = curate(small_config(f"p={tmp}/raw"), str(tmp / "w"), ONE_PROCESS)
    found = log(tmp / "w")
    assert len(found) == 60 == summary["rows"]
    first, tenth = found["0000"], found["0010"]
    assert {first[:2], tenth[:2]} == {("output", "kept"), ("near_duplicates", "exact_copy")}
    assert found["0001"] == ("near_duplicates", "near_duplicate", uid_of("p", "0011")) and found["0011"][1] == "kept"
    assert found["0012"][:2] == ("text", "file_name") and found["0013"][:2] == ("validity", "truncated")
    # Of two copies the one from the blocked domain is not the representative, though the pictures are equal.
    assert found["0014"] == ("near_duplicates", "exact_copy", uid_of("p", "0002"))
    records = {r["key"]: r for r in map(open_source(str(tmp / "w" / "output")).__getitem__, range(summary["records"]))}
    assert len(records) == summary["records"] == 55
    both = records.get(uid_of("p", "0000")) or records[uid_of("p", "0010")]
    assert sorted(both["captions"]) == ["the first thing again", "thing number 0 on a table"] and both["members"] == 2
    assert both["caption"] == both["captions"][0] and both["image"] == rows[0]["image"]
    assert sum(stage["came"] - stage["kept"] for stage in summary["stages"]) == 5
    assert any("after text  (file_name 1)" in line for line in summary_lines(summary, small_config("")))


def shop_decisions(block, number):
    """A filter of these tests: captions with this number are from a shop."""
    rows = rows_of(block, ("caption",))
    return block, [("shop", number, "") if f"number {number} " in row["caption"] else None for row in rows]


def test_a_new_stage_is_a_file_and_a_line_of_the_plan(raw, monkeypatch):
    """The log, the report, the simulator's order and the columns that are read follow from the list."""
    _, tmp = raw

    def make_stages(rules, count, benchmarks=""):
        listed = plan.make_stages(rules, count, benchmarks)
        return [*listed[:2], Stage("shops", ("caption",), functools.partial(shop_decisions, number=7)), *listed[2:]]

    monkeypatch.setattr(stages, "make_stages", make_stages)
    summary = curate(small_config(f"p={tmp}/raw"), str(tmp / "w"), ONE_PROCESS)
    found = log(tmp / "w")
    assert found["0007"] == ("shops", "shop", "7") and found["0008"][0] == "output"
    names = [stage["stage"] for stage in summary["stages"]]
    assert names[:4] == ["quarantine", "validity", "shops", "size"] and len(names) == 10
    assert (summary["stages"][2]["came"], summary["stages"][2]["kept"]) == (59, 58)
    assert "<h2>Shops</h2>" in (tmp / "w" / "report" / "funnel.html").read_text()


def test_stages_can_be_sent_to_workers_and_read_what_they_name():
    """Each that decides by itself, on a block with its columns only."""
    listed = plan.make_stages(make_all(small_config("p")), 3)
    assert len({stage.name for stage in listed}) == len(listed) == 9
    added = {"flag": pa.array([], pa.string())}  # by near_duplicates
    for stage in (stage for stage in listed if isinstance(stage, Stage)):
        sent = pickle.loads(pickle.dumps(stage))
        columns = {name: pa.array([], SCORES.field(name).type) for name in stage.columns}
        assert sent.decide(pa.table(columns | added))[1] == []


def test_order_splits_parts_and_workers_do_not_matter(raw):
    rows, tmp = raw
    config = small_config(f"p={tmp}/raw")
    root = curate(config, str(tmp / "a"), ONE_PROCESS)["root"]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(60)]
    write_parquet(tmp / "other" / "x.parquet", shuffled[:25], group=5)
    write_parquet(tmp / "other" / "y.parquet", shuffled[25:], group=35)
    changed = config | {"inputs": f"p={tmp}/other", "parts": 5, "max_edges_in_memory": 0}
    changed["measure"] = config["measure"] | {"rows_per_split": 7}
    # Two processes; and components in rounds on the runner instead of in memory.
    assert curate(changed, str(tmp / "b"), beam_options("DirectRunner", 2, ""))["root"] == root
    assert list((tmp / "b" / "clusters" / "edges").glob("round-*/changed.json"))
    for name in ("log-00000.parquet",):
        assert (tmp / "a" / "decisions" / name).exists()
    assert log(tmp / "a") == log(tmp / "b")
    other_seed = curate(config | {"seed": 1}, str(tmp / "a"), ONE_PROCESS)["root"]
    assert other_seed != root


def test_the_runner_does_not_matter(raw):
    """Another engine of Beam's, and a job server, spoken to as those of Flink and Spark are."""
    _, tmp = raw
    config = small_config(f"p={tmp}/raw")
    root = curate(config, str(tmp / "a"), ONE_PROCESS)["root"]
    assert curate(config, str(tmp / "b"), beam_options("BundleBasedDirectRunner", 0, ""))["root"] == root
    server = LocalJobServicer(str(tmp / "staging"))
    try:
        more = f"--job_endpoint=localhost:{server.start_grpc_server()} --environment_type=LOOPBACK"
        assert curate(config, str(tmp / "c"), beam_options("PortableRunner", 0, more))["root"] == root
    finally:
        server.stop()
    assert log(tmp / "a") == log(tmp / "b") == log(tmp / "c")


def test_captions_of_a_cluster_begin_with_the_representatives():
    texts = ["A red apple", "fruit", "A  RED apple", "a pear"]
    usable = [[{"text": " ".join(t.lower().split()), "caption": t, "personal": ""}] for t in texts]
    usable[3] *= 2
    rows = [{"uid": str(i), "usable": captions, "clean": True, "flag": ""} for i, captions in enumerate(usable)]
    block = pa.Table.from_pylist([row | {"refused": ["url"] * i} for i, row in enumerate(rows)])
    chosen, _ = cluster_decisions(block, np.zeros(4, np.int64), [None] * 4)
    assert chosen["captions"].to_pylist() == [["A red apple", "fruit", "a pear"], [], [], []]
    assert chosen["refused"].to_pylist() == [["url"] * 6, [], [], []]


def test_a_caption_that_is_dropped_for_its_length_costs_nothing_more():
    rows = [
        {"caption": caption, "captions": captions, "text": "", "text_id": "", "mails": 0, "phones": 0, "cards": 0}
        | {"text_decision": '["many_characters", 80001, 1000]'}
        for i, (caption, captions) in enumerate([("&" + "amp;" * 20_000, []), ("IMG_1", ["Mail a@b.org &amp; go"])])
    ]
    start = time.process_time()
    block, decisions = text_decisions(pa.Table.from_pylist(rows))
    assert time.process_time() - start < 0.5
    assert decisions == [("many_characters", 80001, 1000), None]
    (chosen,) = block.slice(1).select(["caption", "text", "text_id", "mails", "phones"]).to_pylist()
    caption = "Mail a@b.org &amp; go"
    text = {"text": "mail a@b.org & go", "text_id": measure_module.text_scores(caption)["text_id"]}
    assert chosen == {"caption": caption, "mails": 1, "phones": 0, **text}


def test_a_new_threshold_opens_no_image(raw, monkeypatch):
    _, tmp = raw
    config = small_config(f"p={tmp}/raw", text={"cap": 0})
    first = curate(config, str(tmp / "w"), ONE_PROCESS)
    before = stamps(tmp / "w", "measured/*") | stamps(tmp / "w", "table/*")
    shards = stamps(tmp / "w", "output/*.array_record")
    assert curate(config, str(tmp / "w"), ONE_PROCESS)["root"] == first["root"]
    assert stamps(tmp / "w", "output/*.array_record") == shards

    def refuse(*args):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(measure_module, "measure", refuse)
    second = curate(config | {"size": config["size"] | {"max_aspect": 1.1}}, str(tmp / "w"), ONE_PROCESS)
    assert second["records"] == 0 and not stamps(tmp / "w", "output/*.array_record")
    assert stamps(tmp / "w", "measured/*") | stamps(tmp / "w", "table/*") == before
    monkeypatch.undo()
    assert curate(config, str(tmp / "w"), ONE_PROCESS)["root"] == first["root"]


def test_takedown_removes_the_cluster_and_rewrites_only_its_shard(raw):
    _, tmp = raw
    config = small_config(f"p={tmp}/raw", output={"shards": 8})
    curate(config, str(tmp / "w"), ONE_PROCESS)
    before = stamps(tmp / "w", "output/*.array_record")
    shard = int(log(tmp / "w")["0011"][2])
    # 0001 is not in the output, its near-duplicate 0011 is.
    (tmp / "gone.txt").write_text(f"uid {uid_of('p', '0001')}\n")
    taken = config | {"post_filter": config["post_filter"] | {"takedown": str(tmp / "gone.txt")}}
    curate(taken, str(tmp / "w"), ONE_PROCESS)
    assert log(tmp / "w")["0011"][:2] == ("post_filter", "takedown")
    after = stamps(tmp / "w", "output/*.array_record")
    assert {name for name in before if after.get(name) != before[name]} == {f"pairs-{shard:05d}-of-00008.array_record"}


def test_scores_selection_quarantine_and_decontamination(raw):
    rows, tmp = raw
    (tmp / "bench").mkdir()
    (tmp / "bench" / "b.jpg").write_bytes(picture(20, (200, 170), "JPEG"))
    import hashlib

    (tmp / "list.txt").write_text(hashlib.sha256(rows[30]["image"]).hexdigest() + "\n")
    (tmp / "queries.txt").write_text("table\n")
    config = small_config(
        f"p={tmp}/raw",
        scores={"relevance": "test_curation_pipeline:brightness"},
        relevance={"min_score": 6.0},
        selection={"t": 30, "metadata": str(tmp / "queries.txt")},
        post_filter={"hash_list": str(tmp / "list.txt"), "blocked_domains": ()},
        decontamination={"benchmarks": {"set": str(tmp / "bench")}},
    )
    curate(config, str(tmp / "w"), ONE_PROCESS)
    found = log(tmp / "w")
    assert found["0030"][:2] == ("quarantine", "hash_list") and found["0003"][:2] == ("relevance", "unscored")
    assert found["0005"] == ("relevance", "relevance", "5")
    left = [stage for stage, _, _ in found.values()]
    balanced = sum(stage == "selection" for stage in left)
    assert (
        60
        - sum(stage in ("quarantine", "validity", "near_duplicates", "text", "relevance") for stage in left)
        - balanced
        == 30
    )
    assert found["0020"][:2] in (("decontamination", "benchmark_near"), ("selection", "balance"))
    quarantined = uid_of("p", "0030")
    (row,) = [
        row
        for path in (tmp / "w" / "table").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["uid"] == quarantined
    ]
    assert (row["caption"], row["url"], row["key"], row["path"]) == ("", "", "", "")
    copies = b"".join(p.read_bytes() for p in (tmp / "w" / "measured").glob("*.images"))
    assert rows[30]["image"] not in copies and rows[31]["image"] in copies
    # A lower threshold scores only what was not scored, and lets more live; balance is nested.
    scores = stamps(tmp / "w", "scores/*/*.parquet")
    kept = {key for key, value in found.items() if value[1] == "kept"}
    more = config | {
        "relevance": config["relevance"] | {"min_score": 4.0},
        "selection": config["selection"] | {"t": 40},
    }
    curate(more, str(tmp / "w"), ONE_PROCESS)
    assert kept <= {key for key, value in log(tmp / "w").items() if value[1] == "kept"}
    assert stamps(tmp / "w", "scores/*/*.parquet") == scores


def test_the_simulator_predicts_what_a_run_keeps(tmp_path, capsys):
    rows = [
        row | {"caption": f"{word} number {i} on a table"}
        for i, row in enumerate(pairs(60))
        for word in [("cat", "dog", "cat and dog", "bird", "thing")[i % 5]]
    ]
    write_parquet(tmp_path / "raw" / "0.parquet", rows)
    (tmp_path / "queries.txt").write_text("cat\ndog\nbird\nfish\n")
    arguments = [str(tmp_path / "w"), f"--metadata={tmp_path}/queries.txt", "--t=6,12,1000", "--size=30", "--tail=0.2"]
    assert simulate.main(arguments) == 2 and "no finished run" in capsys.readouterr().err
    config = small_config(f"p={tmp_path}/raw")
    curate(config, str(tmp_path / "w"), ONE_PROCESS)
    assert simulate.main(arguments[:2]) == 2 and "--t, --size or --tail" in capsys.readouterr().err
    assert simulate.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["matched"], found["queries_found"]) == (60, 48, 3)
    predicted = {line["t"]: line["pairs"] for line in found["t"]}
    assert predicted[1000] == 48 and max(n for n in predicted.values() if n <= 30) > 25
    assert next(line["tail_share"] for line in found["t"] if line["t"] == 13) == 0.2  # 12 birds in 60 matches
    for t in (6, 12):
        selection = config["selection"] | {"t": t, "metadata": str(tmp_path / "queries.txt")}
        kept = curate(config | {"selection": selection}, str(tmp_path / "w"), ONE_PROCESS)["records"]
        assert kept == pytest.approx(predicted[t], rel=0.2)
    # The pairs that selection removed came to it, too.
    capsys.readouterr()
    assert simulate.main(arguments) == 0 and json.loads(capsys.readouterr().out) == found


def test_score_columns_of_the_input_decide(tmp_path):
    """NSFW scores and the losses of two models, given as fields: each a column with a switch."""
    rows = pairs(9)
    for i, row in enumerate(rows):
        row |= {"unsafe": "0.9" if i == 2 else "1e-1", "small": 4.0, "large": 3.9 if i in (4, 5) else 1.0}
    write_parquet(tmp_path / "raw" / "p.parquet", rows)
    fields = {"nsfw": "field:unsafe", "learner_loss": "field:small", "reference_loss": "field:large"}
    config = small_config(
        f"p={tmp_path}/raw",
        measure={"extra_fields": ("small",)},
        scores=fields,
        selection={"min_gap": 1.0},
        post_filter={"max_nsfw": 0.5},
    )
    curate(config, str(tmp_path / "w"), ONE_PROCESS)
    found = {key: value[:2] for key, value in log(tmp_path / "w").items() if value[1] != "kept"}
    gone = ("selection", "learnability")
    assert found == {"0002": ("post_filter", "nsfw"), "0004": gone, "0005": gone}


def test_forms_of_pictures_are_dropped_where_asked(tmp_path):
    image = Image.open(io.BytesIO(picture(1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = pairs(4)
    for row, mode, kind, more in (
        (rows[1], "CMYK", "JPEG", {}),
        (rows[2], "RGBA", "PNG", {}),
        (rows[3], "RGB", "JPEG", {"exif": exif}),
    ):
        file = io.BytesIO()
        image.convert(mode).save(file, kind, **more)
        row["image"] = file.getvalue()
    splits = list_splits("p=" + write_parquet(tmp_path / "p.parquet", rows), 9)
    rules = make_all(small_config("p", validity={"drop": ("cmyk", "alpha", "orientation")}))
    part = measure_module.measure_split(splits[0], str(tmp_path), rules.measure)
    _, decisions = validity_decisions(pq.read_table(part), rules.validity)
    assert [decision and decision[0] for decision in decisions] == [None, "cmyk", "alpha", "orientation"]
    _, kept = validity_decisions(pq.read_table(part), make_all(small_config("p")).validity)
    assert kept == [None] * 4


def test_failed_pairs_are_measured_again_on_request(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "0.png").write_bytes(picture(0))
    (folder / "captions.csv").write_text("file,caption\n0.png,a cup\n1.png,a jar\n")
    (split,) = list_splits(f"p={folder}", 9)
    rules = make_all(small_config("p")).measure
    part = measure_module.measure_split(split, str(tmp_path), rules)
    assert measure_module.statuses(part) == {"ok", "missing"}
    (folder / "1.png").write_bytes(picture(1))
    before = stamps(tmp_path, "measured/*")
    again = dataclasses.replace(rules, retry=("missing",))
    assert (
        measure_module.measure_split(split, str(tmp_path), rules) == part and stamps(tmp_path, "measured/*") == before
    )
    assert measure_module.measure_split(split, str(tmp_path), again) == part
    assert measure_module.statuses(part) == {"ok"}
    done = stamps(tmp_path, "measured/*")
    measure_module.measure_split(split, str(tmp_path), again)
    assert stamps(tmp_path, "measured/*") == done != before


def test_mistakes_are_one_message(tmp_path):
    good = small_config("x")
    for section, change, message in (
        ("near_duplicates", {"k": 3}, "near_duplicates.k=3"),
        ("validity", {"drop": ("gif",)}, "known: cmyk"),
        ("text", {"preset": "none"}, "text.preset='none'"),
        ("size", {"min_sid": 3}, "min_sid"),
        ("scores", {"relevance": "model"}, "write field:NAME"),
        ("selection", {"t": 3}, "selection.metadata"),
        ("post_filter", {"max_nsfw": 0.5}, "scores.nsfw"),
        ("relevance", {"min_score": 0.2}, r"relevance\.min_score needs a score: set scores\.relevance"),
        ("relevance", {"keep": 0.3}, r"relevance\.keep needs a score: set scores\.relevance"),
        ("relevance", {"keep": 2}, r"relevance\.keep=2 must be"),
        ("measure", {"rows_per_split": 0}, r"measure\.rows_per_split=0 must be at least 1"),
        ("output", {"records_per_shard": 0}, r"output\.records_per_shard=0"),
        ("output", {"formats": ("parquets",)}, "formats='parquets' is unknown; known: array_record"),
        ("report", {"examples": -1}, r"report\.examples=-1"),
        ("post_filter", {"takedown": "/none"}, "/none"),
    ):
        with pytest.raises(UserError, match=message):
            make_all(good | {section: good[section] | change})
    with pytest.raises(UserError, match="does not exist"):
        curate(small_config(f"x={tmp_path}/none"), str(tmp_path / "w"), ONE_PROCESS)
    write_parquet(tmp_path / "one" / "p.parquet", pairs(1))
    config = small_config(f"p={tmp_path}/one", output={"face_detector": "no_such_module:f"})
    with pytest.raises(UserError, match="no_such_module"):
        curate(config, str(tmp_path / "w"), ONE_PROCESS)
    with pytest.raises(UserError, match="give --input"):
        with_sample(good | {"inputs": ""}, "memory://w")


def test_changed_input_is_noticed(raw):
    rows, tmp = raw
    folder = tmp / "files"
    folder.mkdir()
    for row in rows[:3]:
        (folder / f"{row['key']}.png").write_bytes(row["image"])
    (folder / "captions.csv").write_text(
        "file,caption\n" + "".join(f"{r['key']}.png,a cup {r['key']}\n" for r in rows[:3])
    )
    config = small_config(f"p={folder}")
    curate(config, str(tmp / "w"), ONE_PROCESS)
    (folder / "0001.png").write_bytes(rows[5]["image"])
    for path in (tmp / "w" / "output").glob("*.array_record"):
        path.unlink()
    with pytest.raises(UserError, match=r"0001\.png has changed since it was measured"):
        curate(config, str(tmp / "w"), ONE_PROCESS)


@pytest.mark.parametrize(
    ("runner", "more", "message"),
    [
        ("NoRunner", "", "--runner=NoRunner: Unexpected pipeline runner"),
        ("DataflowRunner", "--region=r --temp_location=gs://x/tmp", r"--runner=DataflowRunner: .*project"),
        ("PortableRunner", "--job_endpoint=localhost:1 --job_server_timeout=1", "no job server answers"),
    ],
)
def test_a_runner_that_cannot_start_is_one_message(tmp_path, runner, more, message):
    write_parquet(tmp_path / "one" / "p.parquet", pairs(1))
    with pytest.raises(UserError, match=message):
        curate(small_config(f"p={tmp_path}/one"), str(tmp_path / "w"), beam_options(runner, 0, more))


def test_the_advice_for_a_job_server_that_cannot_be_fetched():
    error = RuntimeError("Unable to fetch remote job server jar at https://x: no route")
    assert "--flink_job_server_jar" in runner_trouble(error) and "no route" in runner_trouble(error)
    assert runner_trouble(RuntimeError("a picture is broken")) == ""


def test_merkle_root():
    one, two, three = (f"{i:064x}" for i in range(3))
    assert merkle_root([one]) == one and len({merkle_root(x) for x in ([one, two], [two, one], [one, two, three])}) == 3
