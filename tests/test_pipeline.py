"""The streams: the same global batches for any split of the work, resume by step, bad records, masks."""

import collections
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from stream_tools import (
    CONTEXT,
    NUMBER_OPS,
    OPS,
    ROOT,
    CharTokenizer,
    ListSource,
    assert_same,
    joined,
    number_batches,
    numbers,
    pairs,
    take,
)

from florence_jax.data import pipeline
from florence_jax.data.batches import LAST_LOOK, check_fields
from florence_jax.data.ops.captions import Caption
from florence_jax.data.pipeline import (
    Process,
    Stream,
    TrainData,
    eval_stream,
    kept_in_memory,
    to_global,
    train_stream,
)
from florence_jax.data.records import BadRecord
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError

# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_array_record(str(folder / "a.array_record"), pairs(11, "a"))
    write_array_record(
        str(folder / "b.array_record"), [*pairs(5, "b"), {"key": "bad", "image": b"x", "caption": "b bad"}]
    )
    return [open_source(str(folder / "a.array_record")), open_source(str(folder / "b.array_record"))]


def stream_of(sources, **options):
    return train_stream(TrainData(sources, [2, 1], OPS, CONTEXT), **({"batch_size": 8, "seed": 5} | options))


def test_batches(two_sources):
    batches = take(stream_of(two_sources), 6)
    assert {name: (value.shape, value.dtype) for name, value in batches[0].items()} == {
        "image": ((8, 8, 8, 3), np.uint8),
        "text": ((8, 12), np.int32),
        "label": ((8, 2), np.int32),
        "corrupt": ((8,), np.int32),
    }
    assert sum(batch["corrupt"].sum() for batch in batches) > 0
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 48  # augmented anew each epoch


def test_same_for_any_number_of_processes(two_sources):
    whole = take(stream_of(two_sources), 5)
    for count in (2, 4):
        parts = [take(stream_of(two_sources, process=Process(i, count)), 5) for i in range(count)]
        assert_same(joined(parts), whole)


def test_same_for_any_prefetch_and_with_cache(two_sources):
    whole = take(stream_of(two_sources), 6)
    for options in ({"prefetch": 0}, {"prefetch": 5}, {"cache": True}):
        assert_same(take(stream_of(two_sources, **options), 6), whole)


def test_same_with_worker_processes_and_a_late_start(two_sources):
    whole = take(stream_of(two_sources, process=Process(1, 2)), 7)
    stream = stream_of(two_sources, process=Process(1, 2), workers=2, start_step=2)
    assert_same(take(stream, 5), whole[2:])
    assert stream.processor_seconds > 0


def test_resume_is_exact_and_seed_matters(two_sources):
    whole = take(stream_of(two_sources), 9)
    for start in (1, 4, 8):
        assert_same(take(stream_of(two_sources, start_step=start), 9 - start), whole[start:])
    other = take(stream_of(two_sources, seed=6), 1)[0]
    assert (other["image"] != whole[0]["image"]).any()
    far = take(stream_of(two_sources, start_step=10**9), 2)
    assert_same(take(stream_of(two_sources, start_step=10**9 + 1), 1), far[1:])


def digest(batches):
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            found.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
            found.update(np.ascontiguousarray(batch[name]).tobytes())
    return found.hexdigest()[:32]


def test_golden_order_and_draws():
    """A run that is resumed with a newer version goes on with the batches it would have had."""

    def source(count, first):
        rng = np.random.default_rng(first)
        return ListSource(
            [
                {
                    "image": rng.integers(0, 256, (4, 4, 3), dtype=np.uint8),
                    "caption": f"name {i}",
                    "tags": [f"tag {i % 3}", "any"],
                    "number": i,
                }
                for i in range(first, first + count)
            ]
        )

    ops = "decode|flip|caption(caption=2, tags=1)|prompt|tokenize|keep(image, text, number)"
    tools = {"tokenizer": CharTokenizer(), "templates": ("the {}", "a {}!")}
    data = TrainData([source(11, 0), source(5, 100)], [2, 1], ops, tools)
    for start, golden in ((0, "0ff70416c96eaa47d51c97d1aebfc6c7"), (7, "7a849f05259c8efb3abe326543f2b93e")):
        batches = take(train_stream(data, batch_size=8, seed=5, start_step=start), 4)
        assert digest(batches) == golden, batches[0]["number"]


def test_epochs_cover_everything_in_new_orders():
    flat = np.concatenate(number_batches([numbers(10)], 10)).reshape(4, 10)
    for epoch in flat:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in flat}) == 4
    # Another seed is not the same sequence one epoch on.
    other = np.concatenate(number_batches([numbers(10)], 10, seed=4)).reshape(4, 10)
    assert not {tuple(epoch) for epoch in flat} & {tuple(epoch) for epoch in other}


def test_tiny_source():
    assert np.concatenate(number_batches([numbers(1)], 2)).tolist() == [0] * 8


def test_mixture_proportions_hold_in_every_stretch():
    sources = [numbers(7), numbers(50, first=100)]
    flat = np.concatenate(number_batches(sources, 50, weights=[3, 1]))
    from_second = flat >= 100
    assert from_second.sum() == 50
    assert all(4 <= from_second[i : i + 20].sum() <= 6 for i in range(0, 200, 20))
    # Each source goes through its own epochs.
    assert sorted(flat[from_second]) == list(range(100, 150))
    assert collections.Counter(flat[~from_second][:70]) == {i: 10 for i in range(7)}
    equal = np.concatenate(number_batches(sources, 5)) >= 100
    assert equal.sum() == 10


def test_reads_are_batched(two_sources):
    class Counting:
        def __init__(self, source):
            self.source, self.name, self.calls = source, source.name, []

        def __len__(self):
            return len(self.source)

        def __getitems__(self, indices):
            self.calls.append(len(indices))
            return self.source.__getitems__(indices)

        def metadata(self):
            return self.source.metadata()

    source = Counting(two_sources[0])
    stream = train_stream(TrainData([source], None, OPS, CONTEXT), batch_size=8, seed=0, prefetch=0)
    assert len(source.calls) == 1  # looking for the fields of the ops
    source.calls.clear()
    take(stream, 3)
    assert len(source.calls) == 3 and sum(source.calls) <= 24


def test_cache_reads_once():
    source = ListSource(pairs(6))
    stream = train_stream(TrainData([source], None, OPS, CONTEXT), batch_size=6, seed=0, cache=True, prefetch=0)
    source.reads.clear()
    take(stream, 4)
    assert source.reads == {i: 1 for i in range(6)}


def test_a_full_cache_changes_nothing(monkeypatch, caplog):
    """Room for a few of the shrunk pictures."""
    data = TrainData([ListSource(pairs(6))], None, f"decode|shrink(2, times=2)|{OPS.partition('|')[2]}", CONTEXT)
    assert kept_in_memory(data) == "what decode|shrink leaves, up to 2.0 GiB"
    plain = take(train_stream(data, batch_size=6, seed=0), 3)
    monkeypatch.setattr(pipeline, "CACHE_BYTES", 1000)
    data.sources[0].reads.clear()
    assert_same(take(train_stream(data, batch_size=6, seed=0, cache=True, prefetch=0), 3), plain)
    reads = collections.Counter(data.sources[0].reads.values())
    assert len(reads) == 2 and max(reads) == min(reads) + 2  # once in three batches, or each time
    assert sum("the cache is full" in message for message in caplog.messages) == 1


def test_cache_keeps_texts_random():
    source = ListSource([{**record, "tags": ["a", "b", "c", "d"]} for record in pairs(6)])
    ops = "decode|texts('tags=1', sampling=0.0)|keep(text)"
    data = TrainData([source], None, ops, CONTEXT)
    batches = take(train_stream(data, batch_size=6, seed=0, cache=True, prefetch=0), 4)
    plain = take(train_stream(data, batch_size=6, seed=0, prefetch=0), 4)
    assert len({text.tobytes() for batch in batches for text in batch["text"]}) >= 4  # tags, and prompts
    assert all(np.array_equal(a["text"], b["text"]) for a, b in zip(batches, plain, strict=True))


def test_fields_of_the_ops_are_looked_for_in_few_records():
    sources = [ListSource(pairs(40)), ListSource([*pairs(40), {"key": "x", "caption": "x", "late": ["y"]}])]
    check_fields(sources, [Caption(caption=1.0)])
    assert all(sum(source.reads.values()) == 8 for source in sources)
    check_fields(sources, [Caption(caption=1.0, late=1.0, late_joined=1.0)])
    with pytest.raises(UserError, match=r"no record has the field 'gone'; fields: caption.*\(81 records of list, list"):
        check_fields(sources, [Caption(caption=1.0, gone=1.0)])
    large = numbers(5 * LAST_LOOK)
    with pytest.raises(UserError, match=f"'gone'.*{LAST_LOOK} records"):
        check_fields([large], [Caption(caption=1.0, gone=1.0)])
    assert LAST_LOOK <= len(large.reads) <= LAST_LOOK + 16 and max(large.reads) == len(large) - 1  # all over it
    check_fields([numbers(3, bad=range(3))], [Caption(gone=1.0)])  # the stream will say that none is usable


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_worker_processes_outlive_a_sigterm_but_not_the_trainer(tmp_path, end):
    code = f"""
import multiprocessing, os, signal
from absl import flags
from florence_jax.data.pipeline import TrainData, train_stream
from florence_jax.data.sources.catalog import open_source
if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain reads one
    data = TrainData([open_source("emoji:new_names")], None, "decode|keep(image)", {{}})
    stream = train_stream(data, batch_size=4, seed=0, workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    for _ in range(20):
        next(stream)
    print("ready", flush=True)
    {end}
"""
    (tmp_path / "trainer.py").write_text(code)
    command, environment = [sys.executable, tmp_path / "trainer.py"], os.environ | {"PYTHONPATH": str(ROOT)}
    # Comes back only when the worker, which holds the pipe too, has ended.
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, env=environment)
    assert done.returncode in (0, -signal.SIGKILL) and done.stdout


class KillsItsWorker(ListSource):
    """Ends the process that reads record 0, as the system does."""

    def __init__(self, records, number):
        super().__init__(records)
        self.number = number

    def __getitems__(self, indices):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), self.number)
        return super().__getitems__(indices)


@pytest.mark.parametrize(
    "number,said",
    [
        (signal.SIGKILL, r"killed by the system, as it does when memory runs out: use fewer .*data\.workers=0"),
        (signal.SIGBUS, r"shared memory /dev/shm \(\d+ MB\) .* is full: .*--shm-size=8g.*data\.workers=0"),
    ],
)
def test_a_worker_that_the_system_kills_is_explained(number, said):
    source = KillsItsWorker([{"key": str(i), "number": i} for i in range(8)], number)
    with train_stream(TrainData([source], None, NUMBER_OPS, {}), batch_size=4, seed=0, workers=2) as stream:
        with pytest.raises(UserError, match=said) as error:
            next(stream)
    assert "\n" not in str(error.value)


# -- evaluation -------------------------------------------------------------------------------------------------------


EVAL_OPS = "decode|resize(8)|center_crop(8)|caption|label|tokenize|keep(image, text, label)"


def flatten(batches):
    """Rows of the source, in order, and what the batches have for them."""
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    mask = whole.pop("mask")
    return {name: value[mask] for name, value in whole.items()}, mask


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (4, 1), (4, 2), (8, 4), (16, 2), (48, 4), (48, 16)])
def test_evaluation_covers_each_record_once(batch_size, count):
    source = ListSource(pairs(10))
    reference = take(eval_stream(source, EVAL_OPS, CONTEXT, batch_size=10), 99)
    assert len(reference) == 1 and reference[0]["mask"].all()
    parts = [
        take(
            eval_stream(source, EVAL_OPS, CONTEXT, batch_size=batch_size, process=Process(i, count)),
            99,
        )
        for i in range(count)
    ]
    batches = joined(parts)
    assert len(batches) == -(-10 // batch_size)
    assert all(value.shape[0] == batch_size for batch in batches for value in batch.values())
    rows, mask = flatten(batches)
    assert mask.sum() == 10 and mask[:10].all()
    np.testing.assert_array_equal(rows["index"], np.arange(10))
    np.testing.assert_array_equal(rows["image"], reference[0]["image"])
    np.testing.assert_array_equal(rows["label"], reference[0]["label"])
    last = batches[-1]
    assert (last["index"][~last["mask"]] == -1).all() and not last["image"][~last["mask"]].any()
    assert {name: value.dtype for name, value in last.items()} == {
        "image": np.uint8,
        "text": np.int32,
        "label": np.int32,
        "mask": np.bool_,
        "index": np.int32,
    }


def test_evaluation_of_list_captions_depends_on_the_row_only():
    source = ListSource(pairs(9))
    ops = EVAL_OPS.replace("caption", "caption(tags=1)")
    (a, _), (b, _) = (flatten(take(eval_stream(source, ops, CONTEXT, batch_size=b), 9)) for b in (9, 2))
    np.testing.assert_array_equal(a["text"], b["text"])
    assert len(np.unique(a["label"], axis=0)) > 2


def test_bad_records_in_evaluation(caplog):
    records = pairs(5)
    records[0] = records[0] | {"image": b"x"}
    records[3] = BadRecord("r3", "broken")
    source = ListSource(records)
    with pytest.raises(UserError, match="list: record 'r0'.*corrupt image"):
        take(eval_stream(source, EVAL_OPS, CONTEXT, batch_size=5), 1)
    batches = take(eval_stream(source, EVAL_OPS, CONTEXT, batch_size=2, on_corrupt="skip"), 9)
    assert [batch["mask"].tolist() for batch in batches] == [[False, True], [True, False], [True, False]]
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, -1]]
    broken = ListSource([BadRecord("r", "broken")] * 3)
    with pytest.raises(UserError, match="list: none of the 3 records can be used; the last: record 'r': broken"):
        take(eval_stream(broken, "keep(image)", {}, batch_size=2, on_corrupt="skip"), 9)
    late = numbers(300, bad=range(290))
    batches = take(eval_stream(late, NUMBER_OPS, {}, batch_size=20, on_corrupt="skip"), 20)
    assert [int(batch["mask"].sum()) for batch in batches] == [0] * 14 + [10]
    assert [line for line in caplog.messages if "skipped" in line][-1].startswith("numbers0: skipped 290 records; ")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "process": Process(0, 4)}, "batch size 6 does not divide by the 4 processes"),
        ({"batch_size": 0}, "batch size 0"),
        ({"process": Process(2, 2)}, "process 2 of 2"),
        ({"process": Process(-1, 1)}, "process -1 of 1"),
        ({"seed": -1}, "seed=-1"),
        ({"start_step": -1}, "start_step=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"on_corrupt": "ignore"}, "on_corrupt='ignore' is unknown; choose 'skip' or 'error'"),
        ({"weights": [1, 2]}, "1 data sources need as many positive weights"),
        ({"weights": [0]}, "positive weights"),
        ({"weights": [float("nan")]}, "positive weights"),
        ({"sources": []}, "at least one"),
        ({"ops": "deocde"}, "unknown op 'deocde'"),
        ({"ops": "caption(caption=1, tgas=2)"}, "field 'tgas'; fields: caption, key, number"),
        (
            {"ops": "keep(number)|caption"},
            r"'caption' reads caption, which keep\(number\) before it drops",
        ),
    ],
)
def test_mistakes_in_training(options, message):
    data = TrainData([numbers(5)], None, NUMBER_OPS, {})
    fields = {name: options[name] for name in options if name in TrainData._fields}
    rest = {"batch_size": 4, "seed": 0} | {name: options[name] for name in options if name not in fields}
    with pytest.raises(UserError, match=message) as error:
        train_stream(data._replace(**fields), **rest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": "decode|rrc(8)"}, "'rrc' is random; evaluation needs fixed ops"),
        ({"batch_size": 3, "process": Process(0, 2)}, "does not divide"),
        ({"on_corrupt": "x"}, "unknown"),
        ({"prefetch": -1}, "negative"),
        ({"ops": "caption(tgas=2)"}, "field 'tgas'"),
    ],
)
def test_mistakes_in_evaluation(options, message):
    arguments = {"source": numbers(5), "ops": NUMBER_OPS, "context": {}, "batch_size": 4}
    with pytest.raises(UserError, match=message):
        eval_stream(**(arguments | options))


@pytest.mark.parametrize(
    ("records", "ops", "message"),
    [
        ([{"x": np.zeros((4, 5))}, {"x": np.zeros((4, 6))}], "", r"'x' has different shapes \(4, 5\) and \(4, 6\)"),
        ([{"x": 1, "y": 2}, {"x": 1}], "", "some records have no field 'y'"),
        ([{"x": 1}, {"x": 2}], "keep(image)", "no record has the field 'image'"),
        ([{"x": 1, "name": "a"}, {"x": 2, "name": "b"}], "", r"field 'name' is a str.*keep\(...\)"),
        ([{"x": 1, "boxes": [[1, 2, 3, 4]]}] * 2, "keep(x, boxes)", "field 'boxes' is a list"),
        ([{"x": 1, "image": b"abc"}] * 2, "", "field 'image' is a bytes"),
        ([{"x": np.array(["a"])}] * 2, "", "field 'x' is an array of <U1"),
        ([{"x": None}] * 2, "", "field 'x' is a NoneType"),
    ],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_nothing_is_dropped_without_a_word(records, ops, message, prefetch):
    with pytest.raises(UserError, match=message):
        take(train_stream(TrainData([ListSource(records)], None, ops, {}), batch_size=2, seed=0, prefetch=prefetch), 1)


def test_stream_closes():
    stream = train_stream(TrainData([numbers(5)], None, NUMBER_OPS, {}), batch_size=2, seed=0)
    assert isinstance(stream, Stream) and iter(stream) is stream
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_to_global():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = {"image": np.arange(16 * 12, dtype=np.uint8).reshape(16, 2, 2, 3), "label": np.arange(16, dtype=np.int32)}
    out = to_global(batch, sharding)
    assert out["image"].sharding == sharding and out["image"].addressable_shards[0].data.shape == (2, 2, 2, 3)
    for name, value in batch.items():
        assert out[name].dtype == value.dtype
        np.testing.assert_array_equal(out[name], value)


def test_embedded_set_through_the_whole_stream():
    source = open_source("emoji:new_names")
    ops = OPS.replace("caption=2, tags=1", "caption=3, keywords=1")
    batches = take(
        train_stream(TrainData([source], None, ops, CONTEXT), batch_size=31, seed=0),
        7,
    )
    assert not sum(batch["corrupt"].sum() for batch in batches)
    assert len({label.tobytes() for batch in batches for label in batch["label"]}) > 200
