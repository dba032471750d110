"""Relevance: the JAX model handler in a real Beam pipeline, a checkpoint, any callable, and exact thresholds."""

import dataclasses
import io

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that, equal_to
from golden import clip_shapes, fill, swin_shapes
from PIL import Image
from safetensors.numpy import save_file

from configs.pretrain import get_config
from florence_jax.curation.scores.models import (
    CallableModelHandler,
    CheckpointLoader,
    Failure,
    JaxModelHandler,
    PairModel,
    ScorePairs,
)
from florence_jax.curation.select.relevance import (
    RelevanceRules,
    RelevanceThreshold,
    kept_count,
    locate,
    score_histogram,
    threshold_at,
)
from florence_jax.curation.select.stage import relevance_decisions
from florence_jax.errors import UserError
from florence_jax.inference import Florence
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.weights import write_description
from florence_jax.tasks.pretrain import Pretrain
from florence_jax.tools.import_torch.__main__ import main as import_torch


def png(seed, size=(40, 36)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# -- the handler on a model without a network -------------------------------------------------------------------------


@dataclasses.dataclass
class Sizes:
    """Scores are known in closed form: bytes of the image times the parameter, plus characters of the caption."""

    params: dict
    traces: list

    def prepare(self, example):
        if not example["caption"]:
            raise UserError("empty caption")
        return {"x": np.float32([len(example["image"]), len(example["caption"])])}

    def apply(self, params, batch):
        self.traces.append(batch["x"].shape)
        return {"relevance": batch["x"][:, 0] * params["w"] + batch["x"][:, 1]}


def load_sizes():
    return Sizes({"w": jnp.float32(2)}, [])


def test_batches_are_padded_to_one_shape_and_order_is_kept():
    handler = JaxModelHandler(load_sizes, batch_size=4)
    model = handler.load_model()
    for count in (1, 4, 3, 9):
        examples = [{"image": bytes(i), "caption": "a" * (i % 3)} for i in range(count)]
        results = handler.run_inference(examples, model)
        for i, result in enumerate(results):
            expected = Failure("empty caption") if i % 3 == 0 else {"relevance": 2.0 * i + i % 3}
            assert result == expected
    assert model.model.traces == [(4, 2)]  # traced, and so compiled, once


def test_a_score_that_is_not_finite_is_a_failure():
    handler = JaxModelHandler(lambda: Sizes({"w": jnp.float32(np.inf)}, []), 2)
    results = handler.run_inference(
        [{"image": b"", "caption": "a"}, {"image": b"a", "caption": "a"}], handler.load_model()
    )
    assert results == [Failure("relevance is not finite")] * 2


def test_every_uid_is_scored_or_a_dead_letter_once():
    pairs = [(f"u{i}", {"image": bytes(i), "caption": "a" * (i % 5)}) for i in range(23)]
    with test_pipeline.TestPipeline() as pipeline:
        out = pipeline | beam.Create(pairs) | ScorePairs(JaxModelHandler(load_sizes, 4))
        expected = [(f"u{i}", {"relevance": 2.0 * i + i % 5}) for i in range(23) if i % 5]
        assert_that(out["scores"], equal_to(expected), "scores")
        assert_that(out["failures"], equal_to([(f"u{i}", "empty caption") for i in range(0, 23, 5)]), "failures")


def length_ratio(images, captions):
    if "bad" in captions:
        raise UserError("out of cheese")
    if "lost" in captions:
        raise ConnectionError("no server")
    return [len(c) / len(i) for i, c in zip(images, captions, strict=True)]


def test_any_callable_scores_and_the_bad_pair_alone_fails():
    pairs = [("a", {"image": b"12", "caption": "x"}), ("b", {"image": b"12", "caption": "bad"})]
    pairs.append(("c", {"image": b"1234", "caption": "x"}))
    with test_pipeline.TestPipeline() as pipeline:
        out = pipeline | beam.Create(pairs) | ScorePairs(CallableModelHandler(length_ratio, 8))
        assert_that(out["scores"], equal_to([("a", {"relevance": 0.5}), ("c", {"relevance": 0.25})]), "scores")
        assert_that(out["failures"], equal_to([("b", "out of cheese")]), "failures")


def test_what_is_no_fault_of_a_pair_is_raised():
    handler = CallableModelHandler(length_ratio, 8)
    for captions in (["x", "lost"], ["bad", "lost"]):
        with pytest.raises(ConnectionError, match="no server"):
            handler.run_inference([{"image": b"12", "caption": c} for c in captions], handler.load_model())


def test_a_callable_with_the_wrong_number_of_scores_is_an_error():
    handler = CallableModelHandler(lambda images, captions: [1.0])
    with pytest.raises(UserError, match="one score a pair"):
        handler.run_inference([{"image": b"", "caption": ""}] * 2, handler.load_model())


def test_batch_size_is_checked():
    with pytest.raises(UserError, match="batch_size=0"):
        JaxModelHandler(load_sizes, 0)


# -- the project's model ----------------------------------------------------------------------------------------------


def tiny_config():
    config = get_config("runlocal,res=16")
    with config.unlocked():
        config.model.overrides = {
            "res": 16, "image_width": 8, "depths": (2,), "heads": (1,), "out_stages": (0,), "text_width": 8,
            "text_layers": 1, "text_heads": 1, "text_length": 8, "projection": 4,
        }  # fmt: skip
    config.optim.ema_decay = 0.0
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Work directory of a fresh tiny run, its task and its parameters."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config()
    task = Pretrain(config)
    write_description(str(workdir / "checkpoints"), task.description)
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)
    checkpoints = Checkpoints(str(workdir / "checkpoints"))
    checkpoints.save(7, {"step": jnp.int32(7), "params": params})
    checkpoints.close()
    return workdir, task, params


def test_checkpoint_scores_are_the_cosine_of_the_towers(run):
    workdir, task, params = run
    images, captions = [png(i) for i in range(3)], ["a red car", "two dogs", "the sea"]
    pairs = [(f"u{i}", {"image": images[i], "caption": captions[i]}) for i in range(3)]
    pairs += [("corrupt", {"image": images[0][:60], "caption": "a"}), ("empty", {"image": images[0], "caption": " "})]
    handler = JaxModelHandler(CheckpointLoader(str(workdir), embeddings=True), batch_size=4)

    model = handler.load_model()
    results = dict(
        zip([uid for uid, _ in pairs], handler.run_inference([pair for _, pair in pairs], model), strict=True)
    )
    prepared = [model.model.prepare(pair) for _, pair in pairs[:3]]
    batch = {name: jnp.stack([p[name] for p in prepared]) for name in ("image", "text")}
    image, text = jax.jit(lambda p, b: [task.predict[tower](p, b) for tower in ("image", "text")])(params, batch)
    for i in range(3):
        assert results[f"u{i}"]["relevance"] == pytest.approx(float(image[i] @ text[i]), abs=1e-5)
        np.testing.assert_allclose(results[f"u{i}"]["embedding"], image[i], atol=1e-5)
    assert "corrupt image" in results["corrupt"].reason and "no tokens" in results["empty"].reason

    # The same numbers to the last bit, in another order and another batch, and through Beam.
    again = handler.run_inference([pairs[2][1], pairs[0][1]], model)
    assert [r["relevance"] for r in again] == [results["u2"]["relevance"], results["u0"]["relevance"]]
    with test_pipeline.TestPipeline() as pipeline:
        out = pipeline | beam.Create(pairs) | ScorePairs(handler)
        values = out["scores"] | beam.MapTuple(lambda uid, scores: (uid, scores["relevance"]))
        assert_that(values, equal_to([(f"u{i}", results[f"u{i}"]["relevance"]) for i in range(3)]), "scores")
        assert_that(out["failures"] | beam.Keys(), equal_to(["corrupt", "empty"]), "failures")


def test_weights_that_are_not_there(tmp_path):
    for folder, message in ((tmp_path / "none", "no weights at"), (tmp_path, "cannot tell which model")):
        with pytest.raises(UserError, match=message):
            CheckpointLoader(str(folder))()


def test_a_moving_average_is_preferred(tmp_path, run):
    _, task, params = run
    write_description(str(tmp_path / "checkpoints"), task.description)
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    ema = jax.tree.map(lambda x: x + 1, params)
    checkpoints.save(1, {"params": params, "ema": ema})
    checkpoints.close()
    loaded = CheckpointLoader(str(tmp_path))()
    assert isinstance(loaded, PairModel)
    np.testing.assert_array_equal(loaded.params["logit_scale"], ema["logit_scale"])


def save(state, path):
    save_file({name: np.array(value, np.float32, order="C") for name, value in state.items()}, path)


def test_imported_clip_weights_score_as_they_embed(tmp_path, run):
    """A CLIP-like file through the importer; its folder names no tokenizer, so the configuration must."""
    merges = tmp_path / "merges.txt"
    merges.write_text("#version: 0.2\nd o\ndo g</w>\n")
    shapes = clip_shapes() | {"token_embedding.weight": (516, 8), "positional_embedding": (8, 8)}
    save(fill(shapes, 0.2), tmp_path / "clip.safetensors")
    folder = tmp_path / "clip"
    command = ["--from=clip", f"--file={tmp_path}/clip.safetensors", f"--out={folder}"]
    assert import_torch([*command, "--set", "activation=gelu", "--set", "heads=(2,)", "--set", "text_heads=2"]) == 0
    with pytest.raises(UserError, match="relevance.tokenizer=FILE"):
        CheckpointLoader(str(folder))()
    handler = JaxModelHandler(CheckpointLoader(str(folder), str(merges), step=0), batch_size=2)
    captions = ["a dog", "the sea"]
    examples = [{"image": png(i), "caption": caption} for i, caption in enumerate(captions)]
    found = [result["relevance"] for result in handler.run_inference(examples, handler.load_model())]
    model = Florence(folder, tokenizer=str(merges))
    pictures = [np.asarray(Image.open(io.BytesIO(example["image"]))) for example in examples]
    cosines = np.sum(model.embed_images(pictures) * model.embed_texts(captions), axis=1)
    np.testing.assert_allclose(found, cosines, atol=1e-5)
    # A run goes on: scores of two of its checkpoints are not mixed.
    with pytest.raises(UserError, match="a new checkpoint, 7 after 3"):
        CheckpointLoader(str(run[0]), step=3)()


def test_an_image_tower_alone_scores_nothing(tmp_path):
    save(fill(swin_shapes(), 0.2), tmp_path / "s.safetensors")
    command = ["--from=swin", f"--file={tmp_path}/s.safetensors", f"--out={tmp_path}/swin", "--res=64", "--window=4"]
    assert import_torch(command) == 0
    with pytest.raises(UserError, match="no text tower"):
        CheckpointLoader(f"{tmp_path}/swin")()


# -- thresholds -------------------------------------------------------------------------------------------------------


def exact(scores, keep):
    finite = np.sort(scores[np.isfinite(scores)])[::-1]
    return float(finite[kept_count(len(finite), keep) - 1])


def test_the_threshold_is_an_exact_order_statistic_for_any_division_into_blocks():
    scores = np.random.default_rng(1).normal(0, 0.3, 5001).astype(np.float32)
    scores[:40] = scores[40]  # ties
    scores[50:60] = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -1e-40, 1, -1, 3e38)
    finite = scores[np.isfinite(scores)]
    few = np.float32([0.1, 0.2, 0.3])
    cases = [(scores, parts, RelevanceRules(keep=keep), exact(scores, keep)) for keep, parts in ((0.001, 7), (0.3, 1))]
    cases.append((few, 1, RelevanceRules(min_score=0.25), 0.25))
    cases.append((few, 3, RelevanceRules(min_score=0.15, keep=0.3), float(np.float32(0.3))))
    with test_pipeline.TestPipeline() as pipeline:  # one for all: starting it is what takes time
        for i, (values, parts, rules, expected) in enumerate(cases):
            blocks = pipeline | f"Blocks{i}" >> beam.Create(np.array_split(values, parts))
            assert_that(blocks | f"Threshold{i}" >> RelevanceThreshold(rules), equal_to([expected]), f"Check{i}")
    for keep in (0.001, 0.3, 0.5, 1.0):
        _, decisions = relevance_decisions(pa.table({"relevance": finite}), exact(scores, keep))
        assert decisions.count(None) >= kept_count(len(finite), keep) > sum(finite > np.float32(exact(scores, keep)))


def test_order_statistics_from_histograms_and_their_edges():
    scores = np.random.default_rng(2).normal(0, 0.3, 1000).astype(np.float32)
    for keep in (0.15, 0.5, 1.0):
        bucket, rank = locate(score_histogram(scores), kept_count(1000, keep))
        assert threshold_at(bucket, locate(score_histogram(scores, bucket), rank)[0]) == exact(scores, keep)
    assert threshold_at(*locate(score_histogram(np.float32([np.nan])), 0)) == -np.inf
    assert kept_count(10, 0.3) == 3 and kept_count(1000, 0.1) == 100 and kept_count(3, 0.5) == 2
    with pytest.raises(UserError, match="keep=0"):
        RelevanceRules(keep=0)


def test_decisions_by_the_threshold():
    _, decisions = relevance_decisions(pa.table({"relevance": np.float32([0.25, 0.125, np.nan])}), 0.25)
    assert decisions == [None, ("relevance", 0.125, 0.25), ("unscored", "", 0.25)]


def test_histograms_of_parts_add_up():
    scores = np.random.default_rng(3).normal(size=500).astype(np.float32)
    whole = score_histogram(scores)
    assert whole.sum() == 500
    np.testing.assert_array_equal(whole, score_histogram(scores[:123]) + score_histogram(scores[123:]))
