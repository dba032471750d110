"""Buckets: several shapes of a batch, the same at a step for any number of processes; host fields; padded pixels."""

import collections
import itertools

import numpy as np
import pytest

from florence_jax.data.batches import padded_share
from florence_jax.data.buckets import Bucket, make_buckets, nearest_sizes
from florence_jax.data.pipeline import Process, TrainData, eval_stream, train_stream
from florence_jax.data.records import BadRecord, BaseSource, without_payloads
from florence_jax.errors import UserError

SIZES = [(4, 8), (8, 4), (6, 6)]
OPS = "decode|flip|resize_exact({height}, {width})|keep(image, number)"


class Records(BaseSource):
    """Pictures of many shapes in memory; records of the numbers in `bad` cannot be read."""

    def __init__(self, count, first=0, name="shapes", bad=()):
        self.name, self.bad = name, bad
        rng = np.random.default_rng(first)
        shapes = rng.integers(4, 12, (count, 2))
        self.rows = [
            {
                "key": f"r{i}",
                "number": i,
                "image": rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
                "height": int(h),
                "width": int(w),
                "words": [f"word {i}"] * (i % 3),
            }
            for i, (h, w) in enumerate(shapes, first)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord(f"r{index}", "broken")
        return self.rows[index]

    def metadata(self):
        return map(without_payloads, self.rows)


def take(stream, count):
    with stream:
        return list(itertools.islice(stream, count))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


@pytest.fixture(scope="module")
def data():
    # Not fewer: grain's shuffle of a handful of records takes milliseconds an index.
    sources = [Records(300), Records(120, first=1000, name="others")]
    return TrainData(sources, [1, 2], OPS, {}, make_buckets(sources, SIZES))


def batches(data, count, **options):
    return take(train_stream(data, **({"batch_size": 4, "seed": 3} | options)), count)


def test_nearest_size_by_aspect_then_area():
    sizes = [(100, 200), (200, 400), (100, 100), (300, 100)]
    shapes = [(60, 120), (1000, 2000), (9, 8), (90, 31), (149, 300), (50, 500)]
    assert nearest_sizes(np.array(shapes), sizes).tolist() == [0, 1, 2, 3, 1, 0]
    rng = np.random.default_rng(0)
    shapes = rng.integers(1, 500, (200, 2))
    for (h, w), chosen in zip(shapes, nearest_sizes(shapes, sizes), strict=True):  # as a sentence says it
        distance = [round(abs(np.log(w / h) - np.log(b / a)), 9) for a, b in sizes]
        near = [k for k in range(4) if distance[k] == min(distance)]
        assert chosen == min(near, key=lambda k: abs(np.log(h * w) - np.log(sizes[k][0] * sizes[k][1])))


def test_buckets_have_each_record_once(data):
    assert np.sort(np.concatenate([bucket.rows for bucket in data.buckets])).tolist() == list(range(420))
    assert [bucket.size for bucket in data.buckets] == SIZES
    only = make_buckets(data.sources[:1], [(6, 6), (1, 1000)])
    assert [bucket.size for bucket in only] == [(6, 6)] and len(only[0].rows) == 300


def test_every_batch_is_of_one_bucket_and_all_are_used_in_proportion(data):
    numbers = [collections.Counter() for _ in SIZES]
    used = collections.Counter()
    rows = [row["number"] for source in data.sources for row in source.rows]
    for batch in batches(data, 300):
        k = SIZES.index(batch["image"].shape[1:3])
        used[k] += 1
        numbers[k].update(batch["number"].tolist())
    for k, bucket in enumerate(data.buckets):
        assert set(numbers[k]) == {rows[i] for i in bucket.rows}
        # Sources keep their weights: 1 to 2, whatever the buckets.
        share = sum((1 / 300 if i < 300 else 2 / 120) / 3 for i in bucket.rows)
        assert abs(used[k] / 300 - share) < 0.02
    second = sum(count for found in numbers for number, count in found.items() if number >= 1000)
    assert abs(second / 1200 - 2 / 3) < 0.02


def test_same_for_any_processes_workers_and_start(data):
    whole = batches(data, 24)
    assert len({batch["image"].shape for batch in whole}) == 3
    for count in (2, 4):
        parts = [batches(data, 24, process=Process(i, count)) for i in range(count)]
        assert all(len({part["image"].shape for part in step}) == 1 for step in zip(*parts, strict=True))
        joined = [{n: np.concatenate([p[n] for p in step]) for n in step[0]} for step in zip(*parts, strict=True)]
        assert_same(joined, whole)
    for start in (1, 17):
        assert_same(batches(data, 24 - start, start_step=start), whole[start:])
    assert_same(batches(data, 7, start_step=17, workers=1), whole[17:])
    assert any((a["number"] != b["number"]).any() for a, b in zip(batches(data, 24, seed=4), whole, strict=True))


def test_records_in_no_bucket_are_counted(data, caplog):
    part = data.buckets[0]
    take(train_stream(data._replace(buckets=(part,)), batch_size=4, seed=0), 1)
    assert f"{420 - len(part.rows)} of 420 records are in no bucket and are not used" in caplog.text
    caplog.clear()
    several = (*data.buckets, *(bucket._replace(size=(16, 16)) for bucket in data.buckets[1:]))
    take(train_stream(data._replace(buckets=several), batch_size=4, seed=0), 1)
    assert "in no bucket" not in caplog.text  # each record counts once, also in buckets of several scales


def test_a_bad_record_is_replaced_within_its_bucket():
    source = Records(300, bad=range(30))
    data = TrainData([source], None, OPS, {}, make_buckets([source], SIZES))
    inside = {size: set(rows.tolist()) for rows, size in data.buckets}
    found = batches(data, 40)
    assert sum(batch["corrupt"].sum() for batch in found) > 0
    assert all(set(batch["number"].tolist()) <= inside[batch["image"].shape[1:3]] - set(range(30)) for batch in found)


def test_mistakes(data):
    with pytest.raises(UserError, match="{height} is the size of a bucket, and there are none"):
        train_stream(data._replace(buckets=()), batch_size=4, seed=0)
    for rows in ([], [-1], [420]):
        with pytest.raises(UserError, match="bucket of 4 x 8 pixels needs rows from 0 to 419"):
            train_stream(data._replace(buckets=(Bucket(np.array(rows, int), (4, 8)),)), batch_size=4, seed=0)
    for sizes in ([], [(4, 4), (4, 4)], [(0, 4)]):
        with pytest.raises(UserError, match="buckets need different sizes"):
            make_buckets(data.sources, sizes)
    source = Records(5)
    del source.rows[3]["width"]
    with pytest.raises(UserError, match="1 records have no 'width' and 'height', the first is record 3"):
        make_buckets([source], SIZES)
    for rows in (range(4), [0, 1, 2, 3, 4, 4]):
        with pytest.raises(UserError, match="each row of the source once"):
            eval_stream(source, OPS.replace("flip|", ""), {}, batch_size=4, buckets=[Bucket(np.array(rows), (4, 8))])


def test_padded_share():
    batch = {"image": np.zeros((2, 10, 20, 3), np.uint8), "valid": np.array([[10, 20], [5, 10]])}
    np.testing.assert_allclose(padded_share(batch)["padded"], [0, 0.75])
    assert padded_share({"image": batch["image"]}) == {}
    frames = {"images": np.zeros((1, 2, 10, 20, 3), np.uint8), "valid": np.array([[[10, 20], [5, 20]]])}
    np.testing.assert_allclose(padded_share(frames)["padded"], [0.25])


def test_a_stream_of_padded_pictures_says_what_is_padding(data):
    ops = "decode|resize_long(8)|pad_image({height}, {width})|keep(image, valid)"
    found = batches(data._replace(ops=ops, buckets=make_buckets(data.sources, [(8, 8)])), 5)
    assert {batch["image"].shape for batch in found} == {(4, 8, 8, 3)}
    for batch in found:
        np.testing.assert_allclose(batch["padded"], 1 - batch["valid"].prod(1) / 64, rtol=1e-6)
        assert (batch["valid"].max(1) == 8).all() and batch["padded"].max() > 0


# -- evaluation -------------------------------------------------------------------------------------------------------

EVAL_OPS = "decode|resize_exact({height}, {width})|keep(image, number, key, words)"


def evaluate(source, **options):
    options = {"batch_size": 4, "host": ("key", "words"), "buckets": make_buckets([source], SIZES)} | options
    return take(eval_stream(source, EVAL_OPS, {}, **options), 99)


def test_evaluation_in_buckets_with_host_fields():
    source = Records(22, bad=(3, 7))
    with pytest.raises(UserError, match="record 'r3': broken"):
        evaluate(source)
    whole = evaluate(source, on_corrupt="skip")
    seen = {}
    for batch in whole:
        assert batch["image"].shape[1:3] in SIZES and len(batch["mask"]) == 4
        for r, (row, there) in enumerate(zip(batch["index"], batch["mask"], strict=True)):
            if there:
                seen[int(row)] = (batch["number"][r], batch["key"][r], batch["words"][r])
            else:
                assert row in (-1, 3, 7) and batch["key"][r] is None and not batch["image"][r].any()
    assert seen == {i: (i, f"r{i}", [f"word {i}"] * (i % 3)) for i in range(22) if i not in (3, 7)}
    parts = [evaluate(source, on_corrupt="skip", process=Process(i, 2)) for i in range(2)]
    for a, b, both in zip(*parts, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([a["index"], b["index"]]), both["index"])
        np.testing.assert_array_equal(np.concatenate([a["image"], b["image"]]), both["image"])
        assert a["key"] + b["key"] == both["key"]


def test_a_text_that_is_no_host_field_is_an_error():
    with pytest.raises(UserError, match="field 'words' is a list"):
        evaluate(Records(5), host=("key",))
    with pytest.raises(UserError, match="no record has the field 'kye'"):
        evaluate(Records(5), host=("kye", "key", "words"))


class Endless(BaseSource):
    """Three billion records; says so if somebody walks over them."""

    name = "endless"

    def __len__(self):
        return 3_000_000_000

    def __getitem__(self, index):
        return {"key": str(index), "half": index // 2}

    def metadata(self):
        raise AssertionError("a walk over all records")


def test_three_billion_records_start_like_three():
    data = TrainData([Endless()], None, "keep(half)", {})
    (first,) = batches(data, 1, start_step=10**6)
    assert len(set(first["half"])) == 4 and first["half"].max() > 2**29
    (part,) = take(eval_stream(Endless(), "keep(half)", {}, batch_size=4), 1)
    assert part["half"].tolist() == [0, 0, 1, 1]
