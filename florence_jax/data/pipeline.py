"""The training stream, addressed by step, and the masked evaluation stream; host arrays to global arrays.

Row r of the global batch of step s is example s * batch_size + r of one endless order that depends only on the seed
and the sources. Its augmentations are drawn from a generator keyed by that number. Hence any number of hosts or workers
gives the same global batches, bit for bit, and a resumed run needs only its step.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np
from absl import logging

from florence_jax.data.ops.captions import Caption, Texts
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.registry import Op
from florence_jax.data.records import BadRecord, Record, Source
from florence_jax.errors import UserError

if TYPE_CHECKING:
    import jax
Batch = dict[str, np.ndarray]
POLICIES = ("skip", "error")
# Bad neighbours tried for one example; more means that something is wrong with the source, not with single records.
MAX_BAD_IN_A_ROW = 100
STACKED = (np.ndarray, np.generic, int, float)


class TrainData(NamedTuple):
    """What is trained on; `train_stream` opens it.

    Attributes:
      sources, weights, ops, context: see `train_stream`.
    """

    sources: Sequence[Source]
    weights: Sequence[float] | None
    ops: str
    context: Mapping[str, Any]


class Stream(Iterator[Batch]):
    """An iterator of batches that holds threads or processes: call `close`, or use it in a `with` statement."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        """Ends the threads and worker processes; may be called twice."""
        self._iterator.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def train_stream(
    sources: Sequence[Source],
    weights: Sequence[float] | None,
    ops: str,
    context: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    on_corrupt: str = "skip",
    cache: bool = False,
) -> Stream:
    """Endless batches of this process, from `start_step` on.

    Each source is shuffled anew every epoch; the sources are interleaved in fixed proportion to their weights. A bad
    record (`sources.BadRecord`) is counted, logged with its key and replaced by the next usable record of its source
    ('skip'), or ends the stream ('error').

    Args:
      sources: at least one.
      weights: share of each source in every batch, up to a factor (kept to about 1%); None for equal shares.
      ops: op string, see `transforms.parse_ops`.
      context: what the ops need, see there.
      batch_size: global, a multiple of `process_count`.
      seed: of the order and the augmentations.
      start_step: first step.
      process_index, process_count: this host gets rows [i * b, (i + 1) * b) of the global batch, b its size / count.
      workers: processes that make batches, 0 for threads in this process.
      prefetch: batches made ahead.
      on_corrupt: 'skip' or 'error'.
      cache: keep decoded images in memory (of each worker); for sources much smaller than memory.

    Returns:
      Batches of the arrays and numbers that the ops leave, stacked, e.g. {"image": uint8 (b, H, W, 3), "text": int32
      (b, L), "label": int32 (b,)}, and "corrupt": int32 (b,), bad records passed over for each example.

    Raises:
      UserError: for a wrong argument; while iterating, for what the ops raise, for images that cannot be stacked, for a
        bad record under 'error', and for 100 bad records in a row.
    """
    weights = _check_train(sources, weights, seed, start_step, workers, prefetch, on_corrupt)
    local = _local_size(batch_size, process_index, process_count)
    parsed = parse_ops(ops, context)
    check_caption_fields(sources, _drawn_fields(parsed))
    make = _MakeBatch(sources, parsed, seed=seed, size=local, on_corrupt=on_corrupt, cache=cache)
    # Only indices go through the order; records are read a batch at a time, at its end.
    order = _order(sources, weights, seed)
    batches = order.batch(local, drop_remainder=True, batch_fn=list).map_with_index(make)
    batches = batches.slice(slice(start_step * process_count + process_index, None, process_count))
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
    process_index: int = 0,
    process_count: int = 1,
    on_corrupt: str = "error",
    prefetch: int = 2,
) -> Stream:
    """Every record once, in order, in batches padded to full size; the same number of batches on every process.

    Args:
      source: what to go through.
      ops: op string without random image ops. A caption drawn from a list field depends on the row only.
      context: what the ops need.
      batch_size: global, a multiple of `process_count`; row r of batch k is row k * batch_size + r of the source.
      process_index, process_count: as in `train_stream`.
      on_corrupt: 'error', or 'skip' to log a bad record and mask its row.
      prefetch: batches made ahead.

    Returns:
      Batches as in `train_stream`, without "corrupt", with "mask": bool (b,), False for padding and skipped rows
      (which are 0), and "index": int32 (b,), row in the source, -1 for padding.

    Raises:
      UserError: for a wrong argument, random ops; while iterating as in `train_stream`.
    """
    local = _local_size(batch_size, process_index, process_count)
    parsed = parse_ops(ops, context)
    if drawn := [op.name for op in parsed if op.random]:
        raise UserError(f"ops {ops!r}: {drawn[0]!r} is random; evaluation needs fixed ops, such as resize|center_crop")
    _check_policy(on_corrupt)
    if prefetch < 0:
        raise UserError(f"prefetch={prefetch} must not be negative")
    check_caption_fields([source], _drawn_fields(parsed))
    make = _MakeEvalBatch([source], parsed, seed=0, size=local, on_corrupt=on_corrupt)
    steps = -(-len(source) // batch_size)
    batches = grain.MapDataset.range(process_index, steps * process_count, process_count).map(make)
    options = grain.ReadOptions(num_threads=min(prefetch, 16), prefetch_buffer_size=prefetch)
    return Stream(iter(batches.to_iter_dataset(options)))


def to_global(batch: Mapping[str, np.ndarray], sharding: "jax.sharding.Sharding") -> dict[str, "jax.Array"]:
    """This process's rows of each array (b, ...) -> global arrays (b * processes, ...), `sharding` over the rows."""
    import jax  # here, so that worker processes, which make batches only, do not load it

    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_train(
    sources: Sequence[Source],
    weights: Sequence[float] | None,
    seed: int,
    start_step: int,
    workers: int,
    prefetch: int,
    on_corrupt: str,
) -> list[float]:
    if not sources:
        raise UserError("training needs at least one data source")
    weights = [1.0] * len(sources) if weights is None else [float(w) for w in weights]
    if len(weights) != len(sources) or not all(0 < w < float("inf") for w in weights):
        raise UserError(f"{len(sources)} data sources need as many positive weights, not {weights}")
    for name, value in (("seed", seed), ("start_step", start_step), ("workers", workers), ("prefetch", prefetch)):
        if value < 0:
            raise UserError(f"{name}={value} must not be negative")
    _check_policy(on_corrupt)
    return weights


def _check_policy(on_corrupt: str) -> None:
    if on_corrupt not in POLICIES:
        raise UserError(f"on_corrupt={on_corrupt!r} is unknown; choose 'skip' or 'error'")


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise UserError(f"process {process_index} of {process_count}: the index must be from 0 to count - 1")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch size {batch_size} does not divide by the {process_count} processes; use a multiple")
    return batch_size // process_count


def check_caption_fields(sources: Sequence[Source], fields: Iterable[str]) -> None:
    """Looks for each caption field, as far as needed: a mistyped one would only make captions rarer, silently.

    Raises:
      UserError: for a field that no record has.
    """
    wanted = set(fields)
    known: set[str] = set()
    for record in itertools.chain.from_iterable(source.metadata() for source in sources):
        known |= record.keys() | {f"{name}_joined" for name, value in record.items() if isinstance(value, list)}
        if wanted <= known:
            return
    if known and (missing := sorted(wanted - known)):
        raise UserError(f"no record has the caption field {missing[0]!r}; fields: {', '.join(sorted(known))}")


def _drawn_fields(ops: Sequence[Op]) -> set[str]:
    return {name for op in ops if isinstance(op, (Caption, Texts)) for name in op.fields}


def _stay_with_the_trainer(worker: int, workers: int) -> None:
    """For a worker process: it ends when the trainer has, however that ended, and not before.

    SIGTERM and Ctrl-C may come to the whole process group, while the trainer still needs batches up to the step at
    which it saves. grain's own end is SIGKILL.
    """
    del worker, workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        trainer = multiprocessing.parent_process()
        assert trainer is not None  # this is a worker process
        trainer.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True, name="trainer").start()


# -- making batches ---------------------------------------------------------------------------------------------------


def _order(sources: Sequence[Source], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The endless order: numbers of records, counted through all sources."""
    starts = _starts(sources)
    # Distinct, unrelated seeds: grain shuffles epoch e with seed + e, so neighbouring seeds would share epochs.
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    parts = [
        grain.MapDataset.range(int(starts[k]), int(starts[k + 1])).shuffle(seed=int(seeds[k])).repeat()
        for k in range(len(sources))
    ]
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def _starts(sources: Sequence[Source]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(source) for source in sources])])


class _MakeBatch:
    """(number of a local batch, its record numbers) -> batch; can be pickled."""

    def __init__(
        self,
        sources: Sequence[Source],
        ops: Sequence[Op],
        *,
        seed: int,
        size: int,
        on_corrupt: str,
        cache: bool = False,
    ):
        self._sources, self._starts = list(sources), _starts(sources)
        self._fixed, self._ops = _split(ops) if cache else ([], list(ops))
        self._cache: dict[int, Record] | None = {} if cache else None
        self._key = np.random.SeedSequence([seed, 1]).generate_state(2, np.uint64)
        self._size, self._on_corrupt = size, on_corrupt

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None if self._cache is None else {}}

    def __call__(self, number: int, record_numbers: Sequence[int]) -> Batch:
        records = self._read(record_numbers)
        examples = []
        for row, (i, record) in enumerate(zip(record_numbers, records, strict=True)):
            examples.append(self._example(i, record, self._rng(number * self._size + row)))
        return _stack(examples)

    def _rng(self, position: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, position]))

    def _read(self, numbers: Sequence[int]) -> list[Record | BadRecord]:
        """Records by number, with the ops that come before anything random already applied if there is a cache."""
        found: dict[int, Record | BadRecord] = {}
        wanted: dict[int, list[int]] = {}
        for i in set(numbers):
            if self._cache is not None and i in self._cache:
                found[i] = self._cache[i]
            else:
                wanted.setdefault(self._source_of(i), []).append(i)
        for k, members in wanted.items():
            members.sort()
            rows = self._sources[k].__getitems__([i - int(self._starts[k]) for i in members])
            for i, record in zip(members, rows, strict=True):
                found[i] = self._apply_fixed(i, record)
        return [found[i] for i in numbers]

    def _apply_fixed(self, i: int, record: Record | BadRecord) -> Record | BadRecord:
        if self._cache is None or isinstance(record, BadRecord):
            return record
        try:
            self._cache[i] = _apply(self._fixed, record, self._rng(0))
        except BadRecord as bad:
            return bad
        return self._cache[i]

    def _source_of(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _example(self, i: int, record: Record | BadRecord, rng: np.random.Generator) -> Record:
        """The example of record `i`, or of the first usable one after it in its source."""
        source = self._source_of(i)
        start, count = int(self._starts[source]), len(self._sources[source])
        for bad_count in range(MAX_BAD_IN_A_ROW):
            try:
                if isinstance(record, BadRecord):
                    raise record
                return _apply(self._ops, record, rng) | {"corrupt": np.int32(bad_count)}
            except BadRecord as bad:
                if self._on_corrupt == "error":
                    raise UserError(f"{self._sources[source].name}: {bad} (on_corrupt='skip' passes over it)") from bad
                logging.log_every_n_seconds(logging.WARNING, "%s: skipped %s", 1, self._sources[source].name, bad)
                last = bad
            i = start + (i + 1 - start) % count
            (record,) = self._read([i])
        raise UserError(f"{self._sources[source].name}: {MAX_BAD_IN_A_ROW} unusable records in a row; the last: {last}")


class _MakeEvalBatch(_MakeBatch):
    """Number of a local batch (padding included) -> batch with "mask" and "index"; the one source is never shuffled."""

    def __call__(self, number: int) -> Batch:  # type: ignore[override]
        rows = range(number * self._size, (number + 1) * self._size)
        present = [i for i in rows if i < len(self._sources[0])]
        examples: list[Record | None] = [
            self._eval_example(i, r) for i, r in zip(present, self._read(present), strict=True)
        ]
        examples += [None] * (self._size - len(examples))
        filler = next((e for e in examples if e is not None), None) or self._any_example()
        batch = _stack([filler if e is None else e for e in examples])
        mask = np.array([e is not None for e in examples])
        for value in batch.values():
            value[~mask] = 0
        return batch | {
            "mask": mask,
            "index": np.array([i if i < len(self._sources[0]) else -1 for i in rows], np.int32),
        }

    def _eval_example(self, i: int, record: Record | BadRecord) -> Record | None:
        try:
            if isinstance(record, BadRecord):
                raise record
            return _apply(self._ops, record, self._rng(i))
        except BadRecord as bad:
            if self._on_corrupt == "error":
                raise UserError(f"{self._sources[0].name}: {bad}; repair or remove it") from bad
            logging.log_every_n_seconds(logging.WARNING, "%s: skipped %s", 1, self._sources[0].name, bad)
            return None

    def _any_example(self) -> Record:
        """For the shapes of a batch that is all padding."""
        for i in range(min(MAX_BAD_IN_A_ROW, len(self._sources[0]))):
            (record,) = self._read([i])
            if (example := self._eval_example(i, record)) is not None:
                return example
        raise UserError(f"{self._sources[0].name}: no usable record among the first {MAX_BAD_IN_A_ROW}")


def _apply(ops: Sequence[Op], example: Record, rng: np.random.Generator) -> Record:
    for op in ops:
        example = op(example, rng)
    return example


def _split(ops: Sequence[Op]) -> tuple[list[Op], list[Op]]:
    """The ops before the first that is random (or draws a caption), and the rest."""
    fixed = list(itertools.takewhile(lambda op: not op.random and not isinstance(op, (Caption, Texts)), ops))
    return fixed, list(ops[len(fixed) :])


def _stack(examples: Sequence[Record]) -> Batch:
    """Arrays and numbers of the examples along a new first axis; text and bytes are left out."""
    names = {name: None for example in examples for name, value in example.items() if isinstance(value, STACKED)}
    return {name: _stack_field(name, examples) for name in names}


def _stack_field(name: str, examples: Sequence[Record]) -> np.ndarray:
    if any(not isinstance(example.get(name), STACKED) for example in examples):
        raise UserError(f"some records have no field {name!r}; end the ops with keep(image, text, label)")
    try:
        values = np.stack([example[name] for example in examples])
    except ValueError as error:
        shapes = sorted({np.shape(example[name]) for example in examples})
        raise UserError(
            f"{name!r} has different shapes {shapes[0]} and {shapes[-1]} in one batch; end the image ops with one "
            "fixed size, such as resize(224)|center_crop(224)"
        ) from error
    # What JAX would do to them without a word.
    return values.astype({"int64": np.int32, "float64": np.float32}.get(values.dtype.name, values.dtype), copy=False)
