"""The raw sample through all stages: every planted fault is found, and pretraining runs on the output."""

import collections
import json

import pytest
from curation_tools import ONE_PROCESS

from configs.curate import PRESETS, get_config
from configs.pretrain import get_config as pretrain_config
from florence_jax.curation import sample
from florence_jax.curation.dedup.join import DEFAULT_JOIN
from florence_jax.curation.driver import curate
from florence_jax.curation.filters.captions import text_id
from florence_jax.curation.main import beam_options, with_sample
from florence_jax.curation.output.funnel import joined_part
from florence_jax.curation.plan import make_all
from florence_jax.curation.table import uid_of
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.tasks import create_task
from florence_jax.train.loop import run as train

TINY_MODEL = {"image_width": 8, "depths": (2,), "text_width": 16, "text_layers": 1, "text_heads": 2, "projection": 16}
# What must become of each fault that is not a copy: (stage, reason).
EXPECTED = {
    **{name: ("validity", name) for name in ("truncated", "corrupt", "unsupported", "missing", "animated")},
    "too_many_pixels": ("validity", "too_many_pixels"),
    "small": ("size", "small_side"),
    "narrow": ("size", "aspect"),
    "hash_list": ("quarantine", "hash_list"),
    "empty": ("text", "empty"),
    "short": ("text", "few_characters"),
    "long": ("text", "many_characters"),
    **{name: ("text", name) for name in ("file_name", "url", "boilerplate", "repetition", "language")},
    **{name: ("post_filter", name) for name in ("mail", "phone", "card", "licence", "domain")},
    "robots": ("post_filter", "x_robots"),
    "tdm": ("post_filter", "tdm_reservation"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sample")
    config = with_sample(get_config().to_dict(), str(workdir))
    config["text"] = config["text"] | {"languages": ("en",)}
    return workdir, curate(config, str(workdir), ONE_PROCESS)


def test_every_planted_fault_is_found(run):
    workdir, summary = run
    truth = json.loads((workdir / "sample" / "truth.json").read_text())
    parts = len(list((workdir / "table").glob("part-*.parquet")))
    rows = [row for i in range(parts) for row in joined_part(str(workdir), i).to_pylist()]
    decisions = {row["uid"]: (row["stage"], row["reason"]) for row in rows}
    assert len(decisions) == summary["rows"] == sum(map(len, truth.values())) > 1000
    found = collections.defaultdict(collections.Counter)
    for source, keys in truth.items():
        for key, fault in keys.items():
            found[fault][decisions[uid_of(source, key)]] += 1
    for fault, expected in EXPECTED.items():
        # Some drawings of the set are near-duplicates of each other: such a pair may have gone for that.
        allowed = {expected} | {("near_duplicates", "exact_copy"), ("near_duplicates", "near_duplicate")}
        assert set(found[fault]) <= allowed and found[fault][expected] >= 0.6 * sum(found[fault].values()), fault
    assert found["benchmark"] == {("decontamination", "benchmark_exact"): 10, ("decontamination", "benchmark_near"): 10}
    assert summary["benchmarks"] == [{"value": "sample", "exact": 10, "near": 10}]
    page = (workdir / "report" / "funnel.html").read_text()
    assert '<td>sample</td><td class="n">10</td><td class="n">10</td>' in page
    assert found["frequent"]["output", "kept"] == 20 and found["frequent"]["text", "frequency"] >= 35
    for form in ("cmyk", "alpha", "orientation"):
        assert found[form]["output", "kept"] >= 5
    copies = sum(count for count, _ in sample.COPIES.values())
    near = next(stage for stage in summary["stages"] if stage["stage"] == "near_duplicates")
    assert copies <= sum(near["reasons"].values()) <= 1.7 * copies
    good = found[""]
    assert (
        good["output", "kept"] + good["near_duplicates", "near_duplicate"] + good["near_duplicates", "exact_copy"]
        > 1095
    )


def test_pretraining_runs_on_the_output(run, tmp_path):
    """configs/pretrain.py --config.data.train=OUTPUT, two steps of a tiny model through the real loop."""
    workdir, summary = run
    config = pretrain_config("runlocal")
    config.model.overrides.update(TINY_MODEL)
    config.total_steps, config.checkpoint.every, config.log.every, config.optim.warmup_steps = 2, 2, 1, 1
    config.data.train = config.eval.source = str(workdir / "output")
    assert train(config.lock(), create_task(config), tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    source = open_source(config.data.train)
    records = source.__getitems__(range(len(source)))
    assert len(records) == summary["records"]
    assert {record["text_id"] for record in records} == {text_id(record["caption"]) for record in records}


def test_the_sample_is_the_same_every_time(tmp_path):
    one, two = (sample.build_sample(str(tmp_path / name)) for name in "ab")
    assert one == two
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path
    assert sample.main([str(tmp_path / "c"), "--seed=1"]) == 0
    assert json.loads((tmp_path / "c" / "truth.json").read_text()) != one
    (tmp_path / "file").write_text("")
    assert sample.main([str(tmp_path / "file")]) == 2


def test_presets_and_options():
    for preset in PRESETS:
        config = get_config(f"preset={preset}")
        if preset == "florence":
            with pytest.raises(UserError, match=r"relevance\.keep needs a score: set scores\.relevance"):
                make_all(config.to_dict())
            config.scores.relevance = "field:similarity"
        rules = make_all(config.to_dict())
        assert rules.digest and rules.join == DEFAULT_JOIN  # one choice, in two places
    with pytest.raises(UserError, match="unknown preset"):
        get_config("preset=none")
    assert beam_options("DirectRunner", 3, "--a=1")[-1] == "--a=1"
    assert beam_options("DirectRunner", 3, "")[:2] == ["--runner=FnApiRunner", "--direct_running_mode=multi_processing"]
    assert beam_options("FlinkRunner", 3, "--flink_master=h:1 --x") == [
        "--runner=FlinkRunner",
        "--flink_master=h:1",
        "--x",
    ]
