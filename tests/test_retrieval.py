"""Ranks, recalls and chance levels against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.errors import UserError
from florence_jax.evaluators import retrieval
from florence_jax.evaluators.metrics import recall_chance, recalls, retrieval_chance
from florence_jax.evaluators.retrieval import positive_ranks, positive_ranks_reference, two_way_recalls


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_tiles_and_chunks_equal_the_definition(monkeypatch):
    monkeypatch.setattr(retrieval, "QUERY_CHUNK", 16)
    monkeypatch.setattr(retrieval, "TARGET_TILE", 8)
    rng = np.random.default_rng(0)
    queries, targets = unit(rng, 37, 6), unit(rng, 29, 6)
    query_ids, target_ids = rng.integers(0, 9, 37), rng.integers(0, 9, 29)
    expected = positive_ranks_reference(queries, targets, query_ids, target_ids)
    np.testing.assert_array_equal(positive_ranks(queries, targets, query_ids, target_ids), expected)


def test_memory_of_100_000_queries_among_500_000_targets():
    tiles, tile, width = -(-500_000 // retrieval.TARGET_TILE), retrieval.TARGET_TILE, 512
    chunk = retrieval.QUERY_CHUNK

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    arguments = (shape(chunk, width), shape(chunk, dtype=jnp.int32), shape(tiles, tile, width))
    lowered = jax.jit(retrieval.rank_chunk).lower(*arguments, shape(tiles, tile, dtype=jnp.int32))
    memory = lowered.compile().memory_analysis()
    # On a device: all targets (1 GB), and a few tiles of similarities (64 MB each). The whole matrix would be 200 GB.
    assert memory.argument_size_in_bytes < 1.1e9
    assert memory.temp_size_in_bytes < 4 * chunk * tile * 4


def test_a_collapsed_model_scores_at_the_bottom():
    same = np.ones((5, 3), np.float32) / np.sqrt(3, dtype=np.float32)
    ranks = positive_ranks(same, same, np.arange(5), np.arange(5))
    np.testing.assert_array_equal(ranks, 4)


def test_any_of_several_captions_counts():
    images, texts = np.eye(2, dtype=np.float32), np.array([[0, 1], [1, 0], [0.6, 0.8]], np.float32)
    # Image 0 owns texts 0 (far) and 1 (nearest); image 1 owns text 2, behind text 0.
    results = two_way_recalls(images, texts, np.array([0, 1]), np.array([0, 0, 1]))
    assert results["i2t_r@1"] == 0.5 and results["i2t_r@5"] == 1.0
    np.testing.assert_allclose(results["t2i_r@1"], 2 / 3)


def test_query_without_a_right_target_is_never_found():
    eye = np.eye(3, dtype=np.float32)
    ranks = positive_ranks(eye, eye, np.array([0, 1, 7]), np.arange(3))
    np.testing.assert_array_equal(ranks, [0, 0, 3])
    assert recalls(ranks, "x_", (1, 3)) == {"x_r@1": 2 / 3, "x_r@3": 2 / 3}


def test_chance_equals_simulation():
    rng = np.random.default_rng(0)
    right, total, k = np.array([1, 3, 0]), 12, 5
    found = [[(rng.permutation(total)[:k] < r).any() for r in right] for _ in range(4000)]
    np.testing.assert_allclose(recall_chance(right, total, k), np.mean(found), atol=0.02)
    chance = retrieval_chance(np.array([0, 0, 1]), np.array([0, 1]))
    assert chance["i2t_r@1"] == 0.5 and chance["t2i_r@5"] == 1.0
    np.testing.assert_allclose(chance["t2i_r@1"], 0.5 * (2 / 3 + 1 / 3))


def test_nothing_to_search_is_an_error():
    with pytest.raises(UserError, match="0 targets"):
        positive_ranks(np.ones((1, 2), np.float32), np.ones((0, 2), np.float32), np.zeros(1), np.zeros(0))
