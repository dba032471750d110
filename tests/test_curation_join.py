"""The covering design finds every pair, the join loses none, and components are those of union-find."""

import itertools

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from curation_tools import ONE_PROCESS

from florence_jax.curation.dedup import components, join, rounds
from florence_jax.curation.dedup.join import HashRows, Join, block_edges, candidate_edges, covering_tables
from florence_jax.curation.table import load_array, read_table
from florence_jax.errors import UserError
from florence_jax.files import read_json


def random_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    wide = rng.integers(0, 2**64, (n, 4), np.uint64)
    return HashRows(np.arange(n), rng.integers(0, 2**64, n, np.uint64), wide, np.zeros(n, bool))


def plant(rows, pairs, k, seed=1):
    """Makes row 2i + 1 a copy of row 2i with k bits of h64 changed."""
    rng = np.random.default_rng(seed)
    bits = np.uint64(1) << np.argsort(rng.random((pairs, 64)), axis=1)[:, :k].astype(np.uint64)
    rows.h64[1 : 2 * pairs : 2] = rows.h64[: 2 * pairs : 2] ^ np.bitwise_or.reduce(bits, axis=1)
    rows.h256[1 : 2 * pairs : 2] = rows.h256[: 2 * pairs : 2]
    return np.stack([np.arange(0, 2 * pairs, 2), np.arange(1, 2 * pairs, 2)], axis=1)


def all_pairs(rows, k, max_d256):
    """The ten-line reference: every pair by brute force."""
    left, right = np.triu_indices(len(rows), 1)
    near = np.bitwise_count(rows.h64[left] ^ rows.h64[right]) <= k
    near &= ~(rows.probe[left] & rows.probe[right])
    left, right = left[near], right[near]
    near = np.bitwise_count(rows.h256[left] ^ rows.h256[right]).sum(axis=1) <= max_d256
    near &= rows.rid[left] != rows.rid[right]
    return np.stack([rows.rid[left[near]], rows.rid[right[near]]], axis=1)


def crowd(n, seed=0, low=8):
    """Hashes drawn from few values with few bits changed, so that buckets are large and chains long."""
    rng = np.random.default_rng(seed)
    flips = np.uint64(1) << rng.integers(0, 64, (n, 3)).astype(np.uint64)
    h64 = rng.integers(0, 2**64, low, np.uint64)[rng.integers(0, low, n)] ^ np.bitwise_xor.reduce(flips, axis=1)
    h256 = rng.integers(0, 2**64, (low, 4), np.uint64)[rng.integers(0, low, n)]
    return HashRows(rng.permutation(n) // 2, h64, h256, rng.random(n) < 0.4)


def test_numbers_of_tables():
    assert [len(covering_tables(k)) for k in (2, 4, 6)] == [3, 15, 84]
    with pytest.raises(UserError, match="distance 5"):
        covering_tables(5)


@pytest.mark.parametrize("k", [2, 4])
def test_every_error_pattern_leaves_a_key_intact(k):
    masks = covering_tables(k)
    for weight in range(1, k + 1):
        chosen = np.array(list(itertools.combinations(range(64), weight)), np.uint64)
        errors = np.bitwise_or.reduce(np.uint64(1) << chosen, axis=1)
        intact = np.zeros(len(errors), bool)
        for mask in masks:
            intact |= (errors & mask) == 0
        assert intact.all()


@pytest.mark.parametrize("k", [2, 4, 6])
@pytest.mark.parametrize("free", [(1 << 64) - 1, 0xFFFF_FFF0_00FF_F0FF])
def test_every_set_of_touched_blocks_leaves_a_key_intact(k, free):
    """The same proof for any k: a pattern matters only by the blocks it touches, at most one for each error."""
    blocks, chosen = join.DESIGNS[k]
    masks = covering_tables(k, free)
    parts = {}  # atoms: bits that are in the same tables
    for bit in range(64):
        if free >> bit & 1:
            parts.setdefault(tuple((masks >> np.uint64(bit) & np.uint64(1)).tolist()), 0)
            parts[tuple((masks >> np.uint64(bit) & np.uint64(1)).tolist())] |= 1 << bit
    assert len(parts) == blocks and sum(parts.values()) == free
    assert max(part.bit_count() for part in parts.values()) - min(part.bit_count() for part in parts.values()) <= 1
    for touched in itertools.combinations(parts.values(), k):
        assert any(int(mask) & sum(touched) == 0 for mask in masks)
    assert max(int(mask).bit_count() for mask in masks) <= 31


@pytest.mark.slow
def test_every_error_pattern_of_six():
    masks = covering_tables(6)
    for first in itertools.combinations(range(64), 3):  # 75 million patterns of six bits, a few thousand at a time
        rest = np.array(list(itertools.combinations(range(first[-1] + 1, 64), 3)), np.uint64).reshape(-1, 3)
        errors = np.bitwise_or.reduce(np.uint64(1) << rest, axis=1) | np.uint64(sum(1 << bit for bit in first))
        intact = np.zeros(len(errors), bool)
        for mask in masks:
            intact |= (errors & mask) == 0
        assert intact.all()


def test_compact_gathers_the_bits():
    h64 = random_rows(50).h64
    for mask in (0, 1, 1 << 63, 0xF0F0_0000_0000_00F1, 0b1011):
        bits = [b for b in range(64) if mask >> b & 1]
        expected = [sum((int(h) >> b & 1) << i for i, b in enumerate(bits)) for h in h64]
        assert join.compact(h64, mask).tolist() == expected


@pytest.mark.parametrize(("k", "n"), [(2, 20_000), (4, 50_000), (6, 20_000)])
def test_finds_all_planted_pairs(k, n):
    rows = random_rows(n)
    planted = plant(rows, 1000, k)
    edges, counts = candidate_edges(rows, Join(k=k))
    assert (edges == planted).all()
    assert counts["verified"] >= 1000 and counts["rows"] == n * len(covering_tables(k))


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_same_components_as_all_pairs(k, seed):
    rows = crowd(1500, seed, low=2 * k)
    reference = all_pairs(rows, k, 44)
    edges, counts = candidate_edges(rows, Join(k=k))
    assert len(reference) > 100 and counts["largest_bucket"] > join.SMALL_BUCKET
    assert (edges == components.star_edges(reference)).all()


def test_hot_buckets_lose_nothing():
    rows = crowd(1500)
    expected, _ = candidate_edges(rows)
    edges, counts = candidate_edges(rows, Join(hot_bucket=60))
    assert counts["rekeyed_rows"] > 0 and (edges == expected).all()
    assert "rekeyed_rows" not in candidate_edges(rows)[1]


def test_capped_buckets_are_counted_and_still_link_equal_hashes():
    rows = random_rows(400)
    same = HashRows(rows.rid, np.full(400, rows.h64[0]), np.repeat(rows.h256[:1], 400, axis=0), rows.probe)
    edges, counts = candidate_edges(same, Join(hot_bucket=100, window=2))
    assert counts["capped_rows"] > 0
    assert (edges[:, 0] == 0).all() and (edges[:, 1] == np.arange(1, 400)).all()


def test_partitions_and_order_do_not_matter():
    rows = crowd(800, 3)
    expected, counts = candidate_edges(rows)
    shuffled = rows.take(np.random.default_rng(0).permutation(len(rows)))
    edges, parted = candidate_edges(shuffled, partitions=5)
    assert (edges == expected).all()
    assert parted["rows"] == counts["rows"] and parted["verified"] == counts["verified"]


def test_a_block_is_a_share_of_a_table():
    rows, mask = crowd(500, 4), covering_tables(4)[7]
    whole, _ = block_edges(rows, mask)
    block = join.partition_of(rows.h64, mask, 3)
    parts = [block_edges(rows.take(block == i), mask)[0] for i in range(3)]
    assert len(set(block.tolist())) == 3
    assert (components.star_edges(np.concatenate(parts)) == whole).all()


def test_probes_meet_only_others():
    rows = random_rows(4)
    same = [np.repeat(values[:1], 4, axis=0) for values in (rows.h64, rows.h256)]
    edges, _ = candidate_edges(HashRows(np.array([5, 5, 7, 9]), *same, np.array([False, True, True, True])))
    assert edges.tolist() == [[5, 7], [5, 9]]
    edges, _ = candidate_edges(HashRows(np.array([5, 6, 7, 9]), *same, np.ones(4, bool)))
    assert not len(edges)


def test_join_of_nothing():
    edges, counts = candidate_edges(HashRows.concatenate([]))
    assert edges.shape == (0, 2) and counts["rows"] == 0


def test_many_pairs_are_reduced_on_the_way(monkeypatch):
    rows = crowd(600, 5)
    expected, _ = candidate_edges(rows)
    monkeypatch.setattr(join, "STAR_PAIRS", 100)
    assert (candidate_edges(rows)[0] == expected).all()


GRAPHS = {
    "none": lambda rng: (np.zeros((0, 2), np.int64), 5),
    "random": lambda rng: (rng.integers(0, 2000, (700, 2)), 2000),
    "path": lambda rng: (np.stack([np.arange(499), np.arange(1, 500)], axis=1), 500),
    "shuffled path": lambda rng: (rng.permutation(500)[np.stack([np.arange(499), np.arange(1, 500)], axis=1)], 500),
    "star": lambda rng: (np.stack([np.full(300, 77), np.arange(300)], axis=1), 300),
    "percolating": lambda rng: (rng.integers(0, 3000, (1650, 2)), 3000),  # mean degree 1.1
    "clusters": lambda rng: (np.concatenate([s + rng.integers(0, 20, (40, 2)) for s in range(0, 400, 20)]), 400),
}


def plain_union_find(edges, n):
    parent = list(range(n))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for a, b in edges.tolist():
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    return np.array([root(i) for i in range(n)])


def one_graph(rng):
    """Graphs of GRAPHS and a chain side by side: (edges, nodes)."""
    edges, n = [], 0
    names = ("random", "star", "percolating", "clusters")
    for part, size in [*(GRAPHS[name](rng) for name in names), chain(rng.permutation(60))]:
        edges.append(n + part)
        n += size
    return np.sort(np.concatenate(edges), axis=1), n


def chain(nodes):
    return np.stack([nodes[:-1], nodes[1:]], axis=1), len(nodes)


@pytest.mark.parametrize("name", GRAPHS)
def test_components_equal_union_find(name):
    edges, n = GRAPHS[name](np.random.default_rng(0))
    expected = plain_union_find(edges, n)
    assert (components.union_find(edges, n) == expected).all()
    stars = components.star_edges(edges)
    labels = np.arange(n)
    labels[stars[:, 1]] = stars[:, 0]
    assert (labels == expected).all() and (stars == components.distinct(stars[::-1])).all()


def clusters_of(folder, rows, parts, build):
    """(column "cluster" of all parts, sizes of the components) as a run writes them."""
    ends = np.linspace(0, rows, parts + 1).astype(int)
    ends[1] = ends[0]  # a part may be empty
    with beam.Pipeline(options=PipelineOptions(ONE_PROCESS)) as root:
        _ = build(root) | rounds.WriteClusters(str(folder), np.diff(ends).tolist())
    tables = [read_table(f"{folder}/part-{i:05d}.parquet") for i in range(parts)]
    assert [len(table) for table in tables] == np.diff(ends).tolist()
    return np.concatenate([table["cluster"].to_numpy() for table in tables]), read_json(f"{folder}/sizes.json")


def test_files_of_clusters_equal_union_find(tmp_path):
    """By one worker, and by rounds on Beam, which a restart goes on with; whatever the partitions."""

    def run(build):
        runs.append(build)
        with beam.Pipeline(options=PipelineOptions(ONE_PROCESS)) as root:
            build(root)

    edges, n = one_graph(np.random.default_rng(0))
    labels = plain_union_find(edges, n)
    members = np.bincount(labels, minlength=n)
    expected = np.where(members[labels] > 1, labels, -1)
    sizes = {str(size): count for size, count in zip(*np.unique(members[members > 1], return_counts=True), strict=True)}
    runs, folder, parts = [], str(tmp_path / "edges"), 3
    run(lambda root: root | beam.Create([edges[::2], edges[1::2]]) | rounds.WriteEdges(folder, parts))
    paths = rounds.edge_paths(folder)
    assert sum(len(load_array(path)) for path in paths) == len(components.distinct(edges))
    one = clusters_of(tmp_path, n, parts, lambda root: root | beam.Create([paths]) | beam.Map(rounds.stars_of_files))
    assert (one[0] == expected).all() and one[1] == sizes
    files = rounds.star_files(folder, parts, run)
    number = len(runs)
    assert 3 < number <= 10 and rounds.star_files(folder, parts, run) == files and len(runs) == number
    shared = clusters_of(tmp_path, n, 5, lambda root: root | beam.Create(files) | beam.Map(load_array))
    assert (shared[0] == expected).all() and shared[1] == sizes
    with pytest.raises(UserError, match="still changed in round 2; lower"):
        rounds.star_files(folder, parts, run, max_rounds=2)
    nothing = clusters_of(tmp_path / "none", 4, 2, lambda root: root | beam.Create([]))
    assert nothing[0].tolist() == [-1] * 4 and nothing[1] == {}


def star_rounds(edges):
    """(stars, rounds until nothing changes) of a graph in one partition."""
    for done in itertools.count(1):
        large = components.star_round(components.both_ways(edges), large=True)
        before, edges = edges, components.star_round(components.downward(large), large=False)
        if np.array_equal(before, edges):
            return edges, done


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_rounds_of_a_long_chain_grow_with_its_logarithm(order):
    n = 1 << 15
    nodes = np.arange(n) if order == "sorted" else np.random.default_rng(0).permutation(n)
    stars, done = star_rounds(chain(nodes)[0])
    assert done <= 17 and (stars[:, 0] == 0).all() and (stars[:, 1] == np.arange(1, n)).all()


def test_star_edges_need_few_rounds():
    edges, _ = GRAPHS["clusters"](np.random.default_rng(0))
    parts = [components.star_edges(part) for part in np.array_split(edges, 7)]  # as blocks of a join emit them
    assert star_rounds(np.concatenate(parts))[1] <= 5


def test_rounds_by_partition_of_the_nodes():
    edges, n = GRAPHS["percolating"](np.random.default_rng(1))
    whole = components.star_round(components.both_ways(edges), large=True)
    pairs = components.both_ways(edges)
    parts = [components.star_round(pairs[pairs[:, 0] % 4 == i], large=True) for i in range(4)]
    assert (components.distinct(np.concatenate(parts)) == whole).all()
    assert (whole == np.unique(whole, axis=0)).all()


@pytest.mark.slow
def test_ten_million_hashes():
    rows = random_rows(10_000_000)
    planted = plant(rows, 5000, 4)
    edges, counts = candidate_edges(rows)
    assert (edges == planted).all(), counts
