"""The training stream, addressed by step, and the masked evaluation stream; host arrays to global arrays.

Row r of the global batch of step s is example s * batch_size + r of one endless order that depends only on the seed
and the data. Its augmentations are drawn from a generator keyed by that number. Hence any number of hosts or workers
gives the same global batches, bit for bit, and a resumed run needs only its step. So does a second record of the same
source that an op asks for (`others.PairOp`): it is drawn by that number too.

With buckets each bucket has such an order of its own, and whole global batches of them are mixed in proportion to their
records: which bucket step s has depends on the data alone, and all processes have the same shape at a step.

What is left of an example after the ops is in the batch, or an error: end the ops with `keep(...)`.
"""

import dataclasses
import errno
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np
from absl import logging

from florence_jax.data.batches import Batch, BatchMaker, check_fields, kept_ops, starts_of
from florence_jax.data.buckets import Bucket
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.registry import Op
from florence_jax.data.records import Source, Subset
from florence_jax.errors import UserError

if TYPE_CHECKING:
    import jax
POLICIES = ("skip", "error")
# Training ends where more than this share of the records that it drew cannot be used, judged from so many on.
MOST_REPLACED, DRAWN_TO_JUDGE = 0.5, 1000
CACHE_BYTES = 2 << 30  # of pictures kept in memory, of all workers of a process together
WORKER_DIED = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")  # grain's words
SHARED_MEMORY = "/dev/shm"
PROCESSOR_SECONDS = "processor_seconds"  # in a batch on its way to the `Stream`
FEWER_WORKERS = "fewer worker processes, --config.data.workers=N, or none, --config.data.workers=0"


class TrainData(NamedTuple):
    """What is trained on; `train_stream` opens it.

    Attributes:
      sources: at least one.
      weights: share of each source in every batch, up to a factor (kept to about 1%); None for equal shares.
      ops: op string, see `ops.parse.parse_ops`. With buckets, {height} and {width} in it are the bucket's.
      context: what the ops need, see there.
      buckets: see `buckets.make_buckets`; () for one shape of all batches. Records in none of them are not used.
    """

    sources: Sequence[Source]
    weights: Sequence[float] | None
    ops: str
    context: Mapping[str, Any]
    buckets: tuple[Bucket, ...] = ()


@dataclasses.dataclass(frozen=True)
class Process:
    """One of `count` processes: it has rows [index * b, (index + 1) * b) of a global batch, b its size / count."""

    index: int
    count: int


ALONE = Process(0, 1)


class Stream(Iterator[Batch]):
    """An iterator of batches that holds threads or processes: call `close`, or use it in a `with` statement.

    Args:
      iterator: of the batches.
      at_end: called once, when it is closed.

    Attributes:
      processor_seconds: that the threads or processes took to make the batches drawn so far; of a training stream.
    """

    def __init__(self, iterator: grain.DatasetIterator, at_end: Callable[[], None] | None = None):
        self._iterator, self._at_end = iterator, at_end
        self._drawn = self._replaced = 0  # records, of this process
        self.processor_seconds = 0.0

    def __next__(self) -> Batch:
        batch = self._next()
        self.processor_seconds += float(batch.pop(PROCESSOR_SECONDS, 0.0))
        if "corrupt" in batch:
            self._drawn += len(batch["corrupt"])
            self._replaced += int((batch["corrupt"] > 0).sum())
            if self._drawn >= DRAWN_TO_JUDGE and self._replaced > MOST_REPLACED * self._drawn:
                raise UserError(
                    f"{self._replaced / self._drawn:.0%} of the {self._drawn:,} records drawn so far cannot be used, "
                    f"more than {MOST_REPLACED:.0%}: mend the data (the first ones are named above)"
                )
        return batch

    def _next(self) -> Batch:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if died := WORKER_DIED.search(str(error)):
                raise UserError(_why_a_worker_died(-int(died[1]))) from error
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:  # of the shared memory: nothing else is written here
                raise UserError(_why_a_worker_died(signal.SIGBUS)) from error
            raise

    def close(self) -> None:
        """Ends the threads and worker processes; may be called twice."""
        self._iterator.close()
        if at_end := self._at_end:
            self._at_end = None
            at_end()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def train_stream(
    data: TrainData,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process: Process = ALONE,
    workers: int = 0,
    prefetch: int = 2,
    on_corrupt: str = "skip",
    cache: bool = False,
) -> Stream:
    """Endless batches of this process, from `start_step` on.

    Each source is shuffled anew every epoch; the sources are interleaved in fixed proportion to their weights. A bad
    record (`records.BadRecord`) is counted, logged with its key (the first ones) and replaced by one of the next usable
    records of its source (and bucket), or by any where it is in a block of bad ones ('skip'), or ends the stream
    ('error').

    Args:
      data: what is trained on.
      batch_size: global, a multiple of the number of processes.
      seed: of the order and the augmentations.
      start_step: first step.
      process: whose rows are wanted.
      workers: processes that make batches, 0 for threads in this process.
      prefetch: batches made ahead.
      on_corrupt: 'skip' or 'error'.
      cache: keep pictures in memory as the ops before anything random leave them, up to `CACHE_BYTES` on this machine.

    Returns:
      Batches of the arrays and numbers that the ops leave, stacked, e.g. {"image": uint8 (b, H, W, 3), "text": int32
      (b, L), "label": int32 (b, 2)}; "corrupt": int32 (b,), bad records passed over for each example; and where the ops
      leave "valid", "padded": float32 (b,), see `batches.padded_share`.

    Raises:
      UserError: for a wrong argument, or a field that an op reads and no record has; while iterating, for what the ops
        raise, for a field that cannot be stacked, for a bad record under 'error', and where more than half of the
        records cannot be used.
    """
    weights = _check_train(data, seed, start_step, workers, prefetch, on_corrupt)
    local = _local_size(batch_size, process)
    parts = _bucket_parts(data, weights, seed)
    for part in parts:
        check_fields(part.sources, part.ops)
        for op in part.ops:
            op.check(part.sources, batch_size)
    room = CACHE_BYTES // max(workers, 1) // len(parts) if cache else 0
    settings: dict[str, Any] = {"seed": seed, "on_corrupt": on_corrupt, "batch_size": batch_size, "cache": room}
    makers = [BatchMaker(part.sources, part.ops, **settings) for part in parts]
    # Only indices go through the order; records are read a batch at a time, at its end.
    orders = [_local_batches(part, local, process).map(_Numbered(k)) for k, part in enumerate(parts)]
    order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [part.weight for part in parts])
    batches = order.map_with_index(_MakeBatch(makers, local, process)).slice(slice(start_step, None))
    if not workers:
        options = grain.ReadOptions(num_threads=min(prefetch, 16), prefetch_buffer_size=prefetch)
        return Stream(iter(batches.to_iter_dataset(options)))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    ahead = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-max(prefetch, 1) // workers))
    return Stream(iter(batches.to_iter_dataset(options).mp_prefetch(ahead, worker_init_fn=_stay_with_the_trainer)))


def eval_stream(
    source: Source,
    ops: str,
    context: Mapping[str, Any],
    *,
    batch_size: int,
    process: Process = ALONE,
    buckets: Sequence[Bucket] = (),
    host: Collection[str] = (),
    on_corrupt: str = "error",
    prefetch: int = 2,
) -> Stream:
    """Every record once, in batches padded to full size; the same number of batches on every process.

    Args:
      source: what to go through.
      ops: op string without random image ops. A caption drawn from a list field depends on the row only.
      context: what the ops need.
      batch_size: global, a multiple of the number of processes; without buckets, row r of batch k is row
        k * batch_size + r of the source.
      process: whose rows are wanted.
      buckets: each row of the source in one of them; their batches come in the order of their first rows.
      host: fields that come as lists of what the ops leave, None where an example has none: texts, boxes, keys.
      on_corrupt: 'error', or 'skip' to mask the row of a bad record; how many there were is logged at the end.
      prefetch: batches made ahead.

    Returns:
      Batches as in `train_stream`, without "corrupt" and "padded", with "mask": bool (b,), False for padding and
      skipped rows (which are 0, and None in lists), and "index": int32 (b,), row in the source, -1 for padding.

    Raises:
      UserError: for a wrong argument, random ops, buckets that lack a row or have one twice; while iterating as in
        `train_stream`.
    """
    _local_size(batch_size, process)
    _check_policy(on_corrupt)
    if prefetch < 0:
        raise UserError(f"prefetch={prefetch} must not be negative")
    parsed = [parse_ops(text, context) for text in ops_of(ops, buckets)]
    for found in parsed:
        if drawn := [op.name for op in found if op.random]:
            raise UserError(
                f"ops {ops!r}: {drawn[0]!r} is random; evaluation needs fixed ops, such as resize|center_crop"
            )
        check_fields([source], found, host)
    makers = [BatchMaker([source], found, seed=0, on_corrupt=on_corrupt, host=host) for found in parsed]
    plan = _Plan(len(source), batch_size, process, buckets)
    make = _MakeEvalBatch(makers, plan)
    options = grain.ReadOptions(num_threads=min(prefetch, 16), prefetch_buffer_size=prefetch)

    def tell_skipped() -> None:
        for maker in makers:
            maker.tell_skipped()

    return Stream(iter(grain.MapDataset.range(plan.steps).map(make).to_iter_dataset(options)), tell_skipped)


def kept_in_memory(data: TrainData) -> str:
    """What a stream with a cache keeps, for people: 'decode|shrink, up to 2.0 GiB'."""
    kept = kept_ops(parse_ops(ops_of(data.ops, data.buckets)[0], data.context))
    return f"what {'|'.join(kept) or 'reading'} leaves, up to {CACHE_BYTES / 2**30:.1f} GiB"


def to_global(batch: Mapping[str, np.ndarray], sharding: "jax.sharding.Sharding") -> dict[str, "jax.Array"]:
    """This process's rows of each array (b, ...) -> global arrays (b * processes, ...), `sharding` over the rows."""
    import jax  # here, so that worker processes, which make batches only, do not load it

    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_train(
    data: TrainData, seed: int, start_step: int, workers: int, prefetch: int, on_corrupt: str
) -> list[float]:
    if not data.sources:
        raise UserError("training needs at least one data source")
    weights = [1.0] * len(data.sources) if data.weights is None else [float(w) for w in data.weights]
    if len(weights) != len(data.sources) or not all(0 < w < float("inf") for w in weights):
        raise UserError(f"{len(data.sources)} data sources need as many positive weights, not {weights}")
    for name, value in (("seed", seed), ("start_step", start_step), ("workers", workers), ("prefetch", prefetch)):
        if value < 0:
            raise UserError(f"{name}={value} must not be negative")
    _check_policy(on_corrupt)
    return weights


def _check_policy(on_corrupt: str) -> None:
    if on_corrupt not in POLICIES:
        raise UserError(f"on_corrupt={on_corrupt!r} is unknown; choose 'skip' or 'error'")


def _local_size(batch_size: int, process: Process) -> int:
    if not 0 <= process.index < process.count:
        raise UserError(f"process {process.index} of {process.count}: the index must be from 0 to count - 1")
    if batch_size < 1 or batch_size % process.count:
        raise UserError(f"batch size {batch_size} does not divide by the {process.count} processes; use a multiple")
    return batch_size // process.count


def ops_of(ops: str, buckets: Sequence[Bucket]) -> list[str]:
    """The op string of each bucket; of no buckets, itself. Raises UserError for {height} or {width} without them."""
    if not buckets:
        if found := next((name for name in ("{height}", "{width}") if name in ops), None):
            raise UserError(f"ops {ops!r}: {found} is the size of a bucket, and there are none: give sizes of buckets")
        return [ops]
    return [ops.replace("{height}", str(b.size[0])).replace("{width}", str(b.size[1])) for b in buckets]


def _stay_with_the_trainer(worker: int, workers: int) -> None:
    """For a worker process: it ends when the trainer has, however that ended, and not before.

    SIGTERM, Ctrl-C and SIGHUP may come to the whole process group, while the trainer still needs batches up to the step
    at which it saves. grain's own end is SIGKILL.
    """
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        trainer = multiprocessing.parent_process()
        assert trainer is not None  # this is a worker process
        trainer.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True, name="trainer").start()


def _why_a_worker_died(number: int) -> str:
    """One line with the fix, for the number of the signal that ended a worker process (or minus its exit code)."""
    if number == signal.SIGKILL:
        return (
            "a worker process that makes batches was killed by the system, as it does when memory runs out: use "
            f"{FEWER_WORKERS}, a smaller batch, or a machine (or container, job) with more memory"
        )
    if number == signal.SIGBUS:
        size = shutil.disk_usage(SHARED_MEMORY).total / 2**20 if os.path.exists(SHARED_MEMORY) else 0
        return (
            f"the shared memory {SHARED_MEMORY} ({size:.0f} MB) through which worker processes give batches is full: "
            f"give the container more (docker run --shm-size=8g, or --ipc=host), or use {FEWER_WORKERS}"
        )
    return f"a worker process that makes batches ended by itself ({_code(number)}): see why with {FEWER_WORKERS}"


def _code(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"exit code {-number}"


# -- the order --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A bucket as a data set of its own: its records of each source, their weights and shuffles, its ops and share."""

    sources: list[Source]
    weights: list[float]
    seeds: np.ndarray
    ops: list[Op]
    weight: float


def _bucket_parts(data: TrainData, weights: Sequence[float], seed: int) -> list[_Part]:
    # Distinct, unrelated seeds: grain shuffles epoch e with seed + e, so neighbouring seeds would share epochs.
    ops = [parse_ops(text, data.context) for text in ops_of(data.ops, data.buckets)]
    if not data.buckets:
        seeds = np.random.SeedSequence(seed).generate_state(len(data.sources))
        return [_Part(list(data.sources), list(weights), seeds, ops[0], 1.0)]
    starts = starts_of(data.sources)
    used = np.zeros(len(data.sources), np.int64)  # rows of each source in all buckets
    anywhere = np.zeros(starts[-1], bool)  # a record may be in several, of other scales
    for bucket in data.buckets:
        rows, counts = _rows_by_source(bucket, starts)
        used, anywhere[rows] = used + counts, True
    if left := len(anywhere) - int(anywhere.sum()):
        logging.warning("%d of %d records are in no bucket and are not used", left, len(anywhere))
    parts = []
    for k, bucket in enumerate(data.buckets):
        rows, counts = _rows_by_source(bucket, starts)
        there = np.flatnonzero(counts).tolist()
        bounds = np.concatenate([[0], np.cumsum(counts)])
        sources: list[Source] = [
            Subset(data.sources[i], rows[bounds[i] : bounds[i + 1]] - starts[i], data.sources[i].name) for i in there
        ]
        shares = [weights[i] * counts[i] / used[i] for i in there]
        seeds = np.random.SeedSequence([seed, 2, k]).generate_state(len(there))
        parts.append(_Part(sources, shares, seeds, ops[k], sum(shares)))
    return parts


def _rows_by_source(bucket: Bucket, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bucket's rows, sorted, and how many of them each source has."""
    rows = np.sort(np.asarray(bucket.rows, np.int64))
    if not len(rows) or rows[0] < 0 or rows[-1] >= starts[-1]:
        raise UserError(
            f"the bucket of {bucket.size[0]} x {bucket.size[1]} pixels needs rows from 0 to {starts[-1] - 1}: make the "
            "buckets of the data they are used with"
        )
    return rows, np.diff(np.searchsorted(rows, starts))


def _local_batches(part: _Part, local: int, process: Process) -> grain.MapDataset:
    """Record numbers of this process's rows of the part's global batches 0, 1, ..."""
    starts = starts_of(part.sources)
    orders = [
        grain.MapDataset.range(int(starts[k]), int(starts[k + 1])).shuffle(seed=int(part.seeds[k])).repeat()
        for k in range(len(part.sources))
    ]
    order = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, part.weights)
    batches = order.batch(local, drop_remainder=True, batch_fn=list)
    return batches.slice(slice(process.index, None, process.count))


class _Numbered:
    """Record numbers -> (number of the bucket, record numbers); can be pickled."""

    def __init__(self, bucket: int):
        self._bucket = bucket

    def __call__(self, numbers: Sequence[int]) -> tuple[int, Sequence[int]]:
        return self._bucket, numbers


class _MakeBatch:
    """(step, (bucket, record numbers)) -> batch; can be pickled."""

    def __init__(self, makers: Sequence[BatchMaker], local: int, process: Process):
        self._makers, self._local, self._process = makers, local, process

    def __call__(self, step: int, numbered: tuple[int, Sequence[int]]) -> Batch:
        began, (bucket, numbers) = time.thread_time(), numbered
        batch = self._makers[bucket].train((step * self._process.count + self._process.index) * self._local, numbers)
        return batch | {PROCESSOR_SECONDS: np.float64(time.thread_time() - began)}


class _Plan:
    """Which rows this process has in batch k of an evaluation, and of which bucket."""

    def __init__(self, total: int, batch_size: int, process: Process, buckets: Sequence[Bucket]):
        self._total, self._size, self._process = total, batch_size, process
        self._batches: list[tuple[int, np.ndarray]] = []
        for k, bucket in enumerate(buckets):
            rows = np.sort(np.asarray(bucket.rows, np.int64))
            self._batches += [(k, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        self._batches.sort(key=lambda batch: int(batch[1][0]))
        if buckets:
            seen = np.bincount(np.concatenate([rows for _, rows in self._batches]), minlength=total)
            if len(seen) != total or (seen != 1).any():
                raise UserError("buckets of an evaluation must have each row of the source once: use make_buckets")
        self.steps = len(self._batches) if buckets else -(-total // batch_size)

    def __call__(self, step: int) -> tuple[int, list[int], int]:
        """(bucket, rows of this process with -1 for padding, first row of the whole batch)."""
        if self._batches:
            bucket, rows = self._batches[step]
        else:
            bucket, rows = 0, np.arange(step * self._size, min((step + 1) * self._size, self._total))
        local = self._size // self._process.count
        mine = rows[self._process.index * local : (self._process.index + 1) * local].tolist()
        return bucket, mine + [-1] * (local - len(mine)), int(rows[0])


class _MakeEvalBatch:
    """Number of a batch -> this process's rows of it; can be pickled."""

    def __init__(self, makers: Sequence[BatchMaker], plan: _Plan):
        self._makers, self._plan = makers, plan

    def __call__(self, step: int) -> Batch:
        bucket, rows, first = self._plan(step)
        return self._makers[bucket].evaluate(rows, first)
