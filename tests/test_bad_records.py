"""Records that cannot be used: counted and replaced in training, also whole blocks; a limit; an error if wanted."""

import numpy as np
import pytest
from absl import logging
from stream_tools import (
    CONTEXT,
    NUMBER_OPS,
    OPS,
    ListSource,
    assert_same,
    number_batches,
    numbers,
    pairs,
    picture,
    take,
)

from florence_jax.data.pipeline import (
    TrainData,
    train_stream,
)
from florence_jax.data.sources.folder import FolderSource
from florence_jax.errors import UserError


def test_bad_records_are_counted_and_replaced_by_the_next():
    bad = (2, 3, 9)
    good = take(train_stream(TrainData([numbers(10)], None, NUMBER_OPS, {}), batch_size=10, seed=1), 3)
    with_bad = take(train_stream(TrainData([numbers(10, bad=bad)], None, NUMBER_OPS, {}), batch_size=10, seed=1), 3)
    replaced = {2: (4, 2), 3: (4, 1), 9: (0, 1)}
    for a, b in zip(good, with_bad, strict=True):
        for wanted, got, count in zip(a["number"], b["number"], b["corrupt"], strict=True):
            assert (got, count) == replaced.get(int(wanted), (wanted, 0))
        assert a["corrupt"].sum() == 0 and b["corrupt"].sum() == 4


@pytest.mark.parametrize(
    "broken",
    [
        {"image": b"x"},
        {"image": picture(0)[:80]},
        {"caption": ""},
        {"caption": "&#x20;"},
        {"caption": "y" * 10_001},
        {"caption": "\ud800"},
        {"caption": None},
    ],
)
def test_every_kind_of_bad_record(broken, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    records = pairs(4)
    records[1] = records[1] | broken
    source = ListSource(records, "src")
    ops = OPS.replace("(caption=2, tags=1)", "")
    batches = take(train_stream(TrainData([source], None, ops, CONTEXT), batch_size=4, seed=0, prefetch=0), 2)
    assert [batch["corrupt"].sum() for batch in batches] == [1, 1]
    lines = [line for line in lines if line.startswith("src: ")]  # others: threads of streams closed just before
    assert len(lines) == 1 and "record 'r1'" in lines[0]  # named once, counted each time
    with pytest.raises(UserError, match="src: record 'r1': .*on_corrupt='skip'") as error:
        take(train_stream(TrainData([source], None, ops, CONTEXT), batch_size=4, seed=0, on_corrupt="error"), 1)
    assert "\n" not in str(error.value)


def test_nothing_usable():
    source = numbers(5, bad=range(5))
    with pytest.raises(UserError, match="numbers0: nearly all of its 5 records cannot be used: .*'n.': broken"):
        number_batches([source], 1)


def test_a_block_of_bad_records_is_passed_over():
    """1 % of the records, one after the other: any worker, process or resumed run passes over them alike."""
    bad = range(500, 620)
    data = TrainData([numbers(2000, bad=bad)], None, NUMBER_OPS, {})
    options = {"batch_size": 200, "seed": 1}
    batches = take(train_stream(data, **options), 12)
    assert_same(take(train_stream(data, **options, start_step=10, workers=1), 2), batches[10:])
    found = np.concatenate([batch["number"] for batch in batches])
    first_after = np.bincount(found, minlength=2000)[620]
    assert not set(found.tolist()) & set(bad) and first_after < 20  # 1.2, and those of the last eight bad ones


def test_more_than_half_of_the_records_bad_ends_training():
    data = TrainData([numbers(300, bad=range(200))], None, NUMBER_OPS, {})
    with train_stream(data, batch_size=100, seed=1) as stream:
        for _ in range(9):
            next(stream)
        with pytest.raises(UserError, match=r"6\d% of the 1,000 records drawn so far cannot be used, more than 50%"):
            next(stream)


def test_missing_files_of_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    rows = [{"key": "a.png", "caption": "here"}, {"key": "gone.png", "caption": "gone"}]
    source = FolderSource(str(tmp_path), rows)
    ops = "decode|resize_exact(4)|caption|label|keep(image, label)"
    (batch,) = take(train_stream(TrainData([source], None, ops, CONTEXT), batch_size=4, seed=0), 1)
    assert batch["corrupt"].sum() == 2 and len(np.unique(batch["label"], axis=0)) == 1
