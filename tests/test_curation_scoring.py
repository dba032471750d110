"""Scores of pictures: which pairs are scored, what is kept of it, and clusters of the embeddings."""

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from curation_tools import ONE_PROCESS, pairs, small_config, write_parquet

from florence_jax.curation import stages
from florence_jax.curation.dedup.stage import caption_choice, choose
from florence_jax.curation.ingest.inputs import list_splits
from florence_jax.curation.ingest.measure import measure_split
from florence_jax.curation.plan import make_all
from florence_jax.curation.scores import clusters, phase
from florence_jax.curation.scores.clusters import cluster_embeddings
from florence_jax.curation.table import load_array, read_table, uid_of, with_column
from florence_jax.errors import UserError

NAMES = ("relevance", "nsfw")


def rules_of(**changes):
    return make_all(small_config("p", **changes))


def scored(folder, *rows):
    """Writes rows (uid, text_id, {score: value}) as a run does."""
    phase._write_scores(0, [((uid, text), scores) for uid, text, scores in rows], str(folder), NAMES)
    return read_table(f"{folder}/part-00000.parquet")


def missing(folder, *pairs):
    block = pa.table({"uid": [uid for uid, _ in pairs], "text_id": [text for _, text in pairs]})
    return phase._missing(0, block, str(folder), NAMES)[1]["uid"].to_pylist()


def test_a_pair_is_scored_again_only_if_its_caption_changed_or_it_failed(tmp_path):
    assert missing(tmp_path, ("a", "x"), ("b", "x")) == ["a", "b"]
    good = {"relevance": 0.5, "nsfw": 0.25}
    scored(tmp_path, ("b", "x", {"relevance": 0.5}), ("a", "x", good), ("b", "x", {}), ("c", "x", good))
    everything = [("a", "x"), ("b", "x"), ("c", "y"), ("d", "x")]
    assert missing(tmp_path, *everything) == ["b", "c", "d"]
    stamp = (tmp_path / "part-00000.parquet").stat()
    scored(tmp_path, ("b", "x", {"relevance": 0.5}))  # fails once more
    assert (tmp_path / "part-00000.parquet").stat() == stamp
    table = scored(tmp_path, ("b", "x", good), ("c", "y", {**good, "embedding": [1.0]}), ("d", "x", good))
    assert table["uid"].to_pylist() == ["a", "b", "c", "d"] and table["text_id"].to_pylist() == ["x", "x", "y", "x"]
    assert table["nsfw"].to_pylist() == [0.25] * 4 and table["embedding"].to_pylist() == [None, None, [1.0], None]
    assert missing(tmp_path, *everything) == []


def test_the_newest_checkpoint_is_part_of_what_scores_stand_for(tmp_path):
    rules = rules_of(scores={"relevance": f"checkpoint:{tmp_path}"})
    assert phase.scoring_step(rules) is None
    for name in ("9", "12", "13.orbax-checkpoint-tmp-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert phase.scoring_step(rules) == 12
    assert phase.scoring_step(rules_of(scores={"relevance": "m:f"})) is None


def test_clusters_of_what_is_alive(tmp_path):
    """Also in a part where nothing is, or where nothing has an embedding."""
    found = {"a": [1.0, 0.0], "c": [0.0, 1.0], "gone": [9.0, 9.0]}
    scored(tmp_path, ("b", "x", {}), *((uid, "x", {"embedding": values}) for uid, values in found.items()))
    phase.fill_missing_parts(str(tmp_path), NAMES, 3)
    for number, uids in enumerate(["abc", "d"]):
        phase._write_alive(number, pa.table({"uid": list(uids)}), str(tmp_path))
    folder = cluster_embeddings(str(tmp_path), 3, 2, 0, run_beam)
    parts = [read_table(f"{folder}/part-{i:05d}.parquet") for i in range(3)]
    assert parts[0]["uid"].to_pylist() == ["a", "b", "c"]
    assert parts[0]["embedding_cluster"].to_pylist() in ([0, -1, 1], [1, -1, 0])
    assert all(part.schema.equals(parts[0].schema) and len(part) == 0 for part in parts[1:])
    phase.fill_missing_parts(str(tmp_path / "none"), NAMES, 1)
    folder = cluster_embeddings(str(tmp_path / "none"), 1, 2, 0, run_beam)
    assert len(read_table(f"{folder}/part-00000.parquet")) == 0


def run_beam(build):
    with beam.Pipeline(options=PipelineOptions(ONE_PROCESS)) as root:
        build(root)


def test_clusters_depend_on_nothing_but_the_pairs(tmp_path, monkeypatch):
    """Centres of a part of the pairs, in one part or in three; every pair is with its nearest centre."""
    monkeypatch.setattr(clusters, "SAMPLE", 20)
    rng = np.random.default_rng(0)
    uids = [f"{i * 7919 % 600:032x}" for i in range(300)]
    x = {uid: (10 * np.eye(4)[i % 4] + rng.normal(0, 0.3, 4)).astype(np.float32) for i, uid in enumerate(uids)}
    found = []
    for folder, parts in ((tmp_path / "one", 1), (tmp_path / "three", 3)):
        for number in range(parts):
            rows = [((uid, "t"), {"embedding": x[uid].tolist()}) for uid in uids if int(uid, 16) % parts == number]
            phase._write_scores(number, rows, str(folder), NAMES)
            phase._write_alive(number, pa.table({"uid": [uid for (uid, _), _ in rows]}), str(folder))
        made = cluster_embeddings(str(folder), parts, 4, 0, run_beam)
        tables = [read_table(f"{made}/part-{i:05d}.parquet") for i in range(parts)]
        found.append({uid: n for t in tables for uid, n in zip(*t.select(["uid", "embedding_cluster"]), strict=True)})
    assert {str(uid): n.as_py() for uid, n in found[0].items()} == {str(uid): n.as_py() for uid, n in found[1].items()}
    labels = {str(uid): n.as_py() for uid, n in found[0].items()}
    assert len({(i % 4, labels[uid]) for i, uid in enumerate(uids)}) == 4
    centres = [load_array(str(tmp_path / name / "centres.npy")) for name in ("one", "three")]
    assert (centres[0] == centres[1]).all()
    plain = ((np.stack([x[uid] for uid in uids])[:, None] - centres[0]) ** 2).sum(-1).argmin(1)
    assert plain.tolist() == [labels[uid] for uid in uids]
    drawn = [
        len(table) for number in range(3) for _, table in clusters._sample(number, str(tmp_path / "three"), 0, 80, 300)
    ]
    assert 50 < sum(drawn) < 110


def test_kmeans_edges():
    assert clusters.kmeans(np.zeros((3, 2), np.float32), 5, 0).tolist() == [[0, 0]] * 3
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert sorted(clusters.nearest(rows, clusters.kmeans(rows, 9, 0)).tolist()) == [0, 1, 2]
    for bad in (np.zeros((0, 2), np.float32), np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(UserError, match="k-means"):
            clusters.kmeans(bad, 2, 0)
    with pytest.raises(UserError, match="finite embeddings"):
        clusters.nearest(np.full((1, 2), np.inf, np.float32), rows)


def test_scores_of_pictures_do_not_choose_representatives(tmp_path):
    """They are made for representatives only; scores that are fields of the input are there for all."""
    rows = sorted(pairs(2), key=lambda row: uid_of("p", row["key"]))
    rows = [row | {"image": rows[0]["image"], "unsafe": 0.9 - 0.8 * i} for i, row in enumerate(rows)]
    (split,) = list_splits("p=" + write_parquet(tmp_path / "p.parquet", rows), 9)
    how = {"measure": {"extra_fields": ("unsafe",)}, "post_filter": {"max_nsfw": 0.5}}
    by_field = rules_of(scores={"nsfw": "field:unsafe"}, **how)
    block = read_table(measure_split(split, str(tmp_path), by_field.measure)).sort_by("uid")
    block = with_column(block, "cluster", np.zeros(2, np.int64))
    for rules, chosen in ((by_field, [False, True]), (rules_of(scores={"nsfw": "m:f"}, **how), [True, False])):
        ready = stages.with_fields(caption_choice(block, rules.duplicates), rules)
        assert [reason is None for reason in choose(ready, rules.duplicates)[1]] == chosen
