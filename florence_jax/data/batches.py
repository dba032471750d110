"""Records to batches: reading, the ops, bad records, stacking. What all processes and workers do alike."""

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from florence_jax.data.ops.captions import JOINED, Caption, Keep, Texts, parse_fields
from florence_jax.data.ops.image import read_pictures
from florence_jax.data.ops.registry import Op
from florence_jax.data.others import Others, PairOp
from florence_jax.data.records import PAYLOADS, BadRecord, Record, Source, evenly
from florence_jax.errors import UserError

Batch = dict[str, Any]  # arrays, and lists for the fields that stay on the host
# Tried in place of a record that cannot be used: those after it, then any of its source. A block of bad records is left
# by the second, and all of them bad means that nearly all of the source is.
NEIGHBOURS_TRIED, OTHERS_TRIED = 8, 64
BAD_TOLD = 5  # records that are named while training; the others are only counted
READ_AT_ONCE = 64  # records, where any usable one is looked for
STACKED = (np.ndarray, np.generic, int, float)
# Records looked at when a stream opens: at first, and at most where a field is not found.
FIRST_LOOK, LAST_LOOK = 16, 1024


class BatchMaker:
    """Makes batches of the records of some sources; can be pickled.

    Args:
      sources: at least one; records are numbered through all of them.
      ops: what makes an example of a record.
      seed: of the augmentations.
      on_corrupt: 'skip' or 'error'.
      batch_size: of the global batches that are trained on.
      host: fields that come as lists.
      cache: bytes of memory for what the ops before anything random give; 0: nothing is kept. What finds no room is
        made anew each time. Pictures are then decoded in full (`ops.image.UnreadJpeg`), kept or not.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        ops: Sequence[Op],
        *,
        seed: int,
        on_corrupt: str,
        batch_size: int = 1,
        host: Collection[str] = (),
        cache: int = 0,
    ):
        self._sources, self._starts = list(sources), starts_of(sources)
        self._fixed, self._ops = _split(ops) if cache else ([], list(ops))
        self._cache: dict[int, Record] | None = {} if cache else None
        self._room, self._full = cache, False
        self._batch_size = batch_size
        pairs = [k for k, op in enumerate(self._ops) if isinstance(op, PairOp)]
        if len(pairs) > 1:
            raise UserError(f"ops have {self._ops[pairs[1]].name!r} twice: one op alone can draw another record")
        self._pair = pairs[0] if pairs else None
        self._key = np.random.SeedSequence([seed, 1]).generate_state(2, np.uint64)
        self._on_corrupt, self._host = on_corrupt, tuple(host)
        self._bad: dict[str, BadRecord] = {}  # by key; of training only the first ones
        self._filler: Record | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None if self._cache is None else {}}

    def train(self, position: int, numbers: Sequence[int]) -> Batch:
        """The batch of these records, whose first is number `position` of the endless order of examples."""
        records, others = self._read_with_others(position, numbers)
        examples = []
        for row, (i, record) in enumerate(zip(numbers, records, strict=True)):
            examples.append(self._example(i, record, self._rng(position + row), others[row]))
        batch = stack(examples)
        return batch | padded_share(batch)

    def evaluate(self, rows: Sequence[int], any_row: int = 0) -> Batch:
        """The batch of these records of the one source, -1 for padding, with "mask" and "index".

        `any_row` and its followers are looked at for the shapes of a batch that is all padding.
        """
        present = [i for i in rows if i >= 0]
        found = dict(zip(present, self._read(present), strict=True))
        examples = [self._eval_example(i, found[i]) if i >= 0 else None for i in rows]
        filler = next((e for e in examples if e is not None), None) or self._any_example(any_row)
        batch = stack([filler if e is None else e for e in examples], self._host)
        mask = np.array([e is not None for e in examples])
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                value[~mask] = 0
            else:
                batch[name] = [v if there else None for v, there in zip(value, mask, strict=True)]
        return batch | {"mask": mask, "index": np.array(rows, np.int32)}

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

    def _read_with_others(
        self, position: int, numbers: Sequence[int]
    ) -> tuple[list[Record | BadRecord], Sequence[Others | None]]:
        """The records of a batch, and what each of its rows may draw; the first draws are read at once with them."""
        if self._pair is None:
            return self._read(numbers), [None] * len(numbers)
        op, ready = self._ops[self._pair], dict[int, Record | BadRecord]()
        assert isinstance(op, PairOp)

        def read(number: int) -> Record | BadRecord:
            if number not in ready:
                (ready[number],) = self._read([number])
            if isinstance(bad := ready[number], BadRecord):
                self._tell(self._source_of(number), bad)
            return ready[number]

        others = []
        for row, i in enumerate(numbers):
            source = self._source_of(i)
            rows, before = range(*self._starts[source : source + 2].tolist()), self._ops[: self._pair]
            place = position + row
            others.append(Others(self._key, place, self._batch_size, rows=rows, read=read, before=before))
        needed = [*numbers, *(o.ahead(i) for o, i in zip(others, numbers, strict=True) if op.needs_other(o))]
        ready.update(zip(needed, self._read(needed), strict=True))
        return [ready[i] for i in numbers], others

    def _apply_fixed(self, i: int, record: Record | BadRecord) -> Record | BadRecord:
        if self._cache is None or isinstance(record, BadRecord):
            return record
        try:
            made = read_pictures(_apply(self._fixed, record, self._rng(0)))
        except BadRecord as bad:
            return bad
        if (size := memory_of(made)) <= self._room:
            self._cache[i] = made
            self._room -= size
        elif not self._full:
            self._full = True
            logging.warning("the cache is full after %d records: others are made anew each time", len(self._cache))
        return made

    def _source_of(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _example(self, i: int, record: Record | BadRecord, rng: np.random.Generator, others: Others | None) -> Record:
        """The example of record `i`, or of a usable one in its place; see `NEIGHBOURS_TRIED`."""
        source = self._source_of(i)
        start, count = int(self._starts[source]), len(self._sources[source])
        for bad_count in range(1 + NEIGHBOURS_TRIED + OTHERS_TRIED):
            try:
                if isinstance(record, BadRecord):
                    raise record
                if others is not None:
                    others.start(i, record)
                return _apply(self._ops, record, rng, others) | {"corrupt": np.int32(bad_count)}
            except BadRecord as bad:
                self._tell(source, bad)
                last = bad
            near = bad_count < NEIGHBOURS_TRIED
            i = start + ((i + 1 - start) % count if near else int(rng.integers(count)))
            (record,) = self._read([i])
        raise UserError(
            f"{self._sources[source].name}: nearly all of its {count} records cannot be used: {bad_count + 1} were "
            f"tried for one example, {OTHERS_TRIED} of them at random; the last: {last}"
        )

    def _tell(self, source: int, bad: BadRecord) -> None:
        """Logs a record that cannot be used, the first ones; raises UserError under the policy 'error'."""
        if self._on_corrupt == "error":
            raise UserError(f"{self._sources[source].name}: {bad} (on_corrupt='skip' passes over it)") from bad
        if len(self._bad) < BAD_TOLD and bad.key not in self._bad:
            self._bad[bad.key] = bad
            more = "; more are only counted" if len(self._bad) == BAD_TOLD else ""
            logging.warning("%s: cannot be used: %s%s", self._sources[source].name, bad, more)

    def _eval_example(self, i: int, record: Record | BadRecord) -> Record | None:
        try:
            if isinstance(record, BadRecord):
                raise record
            return _apply(self._ops, record, self._rng(i))
        except BadRecord as bad:
            if self._on_corrupt == "error":
                raise UserError(f"{self._sources[0].name}: {bad}; repair or remove it") from bad
            self._bad[bad.key] = bad
            return None

    def _any_example(self, first: int) -> Record:
        """The first usable example from record `first` on, around the end of the source; looked for once."""
        if self._filler is not None:
            return self._filler
        source, last = self._sources[0], None
        for start in range(first, first + len(source), READ_AT_ONCE):
            rows = [j % len(source) for j in range(start, min(start + READ_AT_ONCE, first + len(source)))]
            for j, record in zip(rows, self._read(rows), strict=True):
                try:
                    if isinstance(record, BadRecord):
                        raise record
                    self._filler = _apply(self._ops, record, self._rng(j))
                    return self._filler
                except BadRecord as bad:
                    last = bad
        raise UserError(f"{source.name}: none of the {len(source)} records can be used; the last: {last}")

    def tell_skipped(self) -> None:
        """Logs how many records the evaluation passed over, in one line; nothing for none."""
        if self._bad:
            first = next(iter(self._bad.values()))
            logging.warning("%s: skipped %d records; %s", self._sources[0].name, len(self._bad), first)


def starts_of(sources: Sequence[Source]) -> np.ndarray:
    """int64 (len(sources) + 1,): the number of each source's first record, counted through all; then their sum."""
    return np.concatenate([[0], np.cumsum([len(source) for source in sources])])


def memory_of(value: Any) -> int:
    """About how many bytes a record, or a field of one, takes in memory."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, Image.Image):
        return value.width * value.height * (4 if len(value.getbands()) > 1 else 1)  # as Pillow keeps RGB
    if isinstance(value, dict):
        return sum(map(memory_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(memory_of, value))
    return sys.getsizeof(value)


def kept_ops(ops: Sequence[Op]) -> list[str]:
    """Names of the ops whose result a cache keeps: those before the first that is random (or draws a caption)."""
    return [op.name for op in _split(ops)[0]]


def _apply(ops: Sequence[Op], example: Record, rng: np.random.Generator, others: Others | None = None) -> Record:
    for op in ops:
        if others is not None and isinstance(op, PairOp):
            example = op.pair(example, rng, others)
        else:
            example = op(example, rng)
    return example


def _split(ops: Sequence[Op]) -> tuple[list[Op], list[Op]]:
    """The ops before the first that is random (or draws a caption), and the rest."""
    fixed = list(itertools.takewhile(lambda op: not op.random and not isinstance(op, (Caption, Texts)), ops))
    return fixed, list(ops[len(fixed) :])


# -- stacking ---------------------------------------------------------------------------------------------------------


def stack(examples: Sequence[Record], host: Collection[str] = ()) -> Batch:
    """Arrays and numbers of the examples along a new first axis; the fields named in `host` as lists.

    A host field that an example lacks is None there.

    Raises:
      UserError: for any other field that is no array or number, that only some examples have, or whose shapes differ.
    """
    names = {name: None for example in examples for name in example if name not in host}
    batch: Batch = {name: _stack_field(name, [example.get(name) for example in examples]) for name in names}
    return batch | {name: [example.get(name) for example in examples] for name in host}


def _stack_field(name: str, values: Sequence[Any]) -> np.ndarray:
    if (wrong := next((value for value in values if not _stackable(value)), STACKED)) is not STACKED:
        if wrong is None and any(value is not None for value in values):
            raise UserError(f"some records have no field {name!r}; end the ops with keep(image, text, label)")
        raise UserError(
            f"field {name!r} is {_kind(wrong)}, which is no part of a batch: end the ops with keep(...) of the fields "
            "that are wanted, such as keep(image, label), or name it as a host field where there are such"
        )
    try:
        stacked = np.stack(values)
    except ValueError as error:
        shapes = sorted({np.shape(value) for value in values})
        raise UserError(
            f"{name!r} has different shapes {shapes[0]} and {shapes[-1]} in one batch; end the image ops with one "
            "fixed size, such as resize(224)|center_crop(224), pad it to one shape, or leave it out with keep(...)"
        ) from error
    # What JAX would do to them without a word.
    return stacked.astype({"int64": np.int32, "float64": np.float32}.get(stacked.dtype.name, stacked.dtype), copy=False)


def _stackable(value: Any) -> bool:
    return isinstance(value, STACKED) and (not hasattr(value, "dtype") or value.dtype.kind in "biufc")


def _kind(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def padded_share(batch: Mapping[str, Any]) -> Batch:
    """{"padded": float32 (b,)}, the share of each example's pixels that is padding; {} where the ops leave no "valid".

    "valid", int32 (b, 2) or (b, K, 2), is the true height and width of a picture, of all frames of a video, or of each
    of K pictures of an example, as op 'pad_image' leaves it; the pictures are (b, ..., height, width, channels).
    """
    pictures = next((batch[name] for name in PAYLOADS if name in batch), None)
    if pictures is None or "valid" not in batch:
        return {}
    share = 1 - np.asarray(batch["valid"], np.float64).prod(-1) / np.prod(pictures.shape[-3:-1])
    return {"padded": share.reshape(len(share), -1).mean(1).astype(np.float32)}


# -- checks -----------------------------------------------------------------------------------------------------------


def check_fields(sources: Sequence[Source], ops: Sequence[Op], host: Collection[str] = ()) -> None:
    """Looks for the fields that the ops read: a mistyped one may only make captions rarer, silently.

    Few records are read, spread over the sources, and more (1,024 at most) only where a field is not found among them:
    the cost does not grow with the data.

    Args:
      sources: whose records the ops take; a field of one of them is enough.
      ops: in order; what an op adds is there for those after it.
      host: fields that are wanted beside those of the ops.

    Raises:
      UserError: for a field that no record looked at has.
    """
    known: set[str] = set()
    wanted: set[str] | None = None
    looked = 0
    for records in _samples(sources):
        looked = len(records)  # the second time with those of the first
        for record in records:
            known |= record.keys() | {f"{name}_joined" for name, value in record.items() if isinstance(value, list)}
        wanted = _wanted_fields(ops, host, records) if wanted is None else wanted
        if wanted is not None and wanted <= known:
            return
    if known and wanted and (missing := sorted(wanted - known)):
        names = ", ".join(source.name for source in sources)
        raise UserError(
            f"no record has the field {missing[0]!r}; fields: {', '.join(sorted(known))} ({looked} records of {names} "
            "were looked at)"
        )


def known_captions(sources: Sequence[Source], extra: str = "") -> list[str]:
    """The caption fields of each text of a picture, where nobody named any; see `ops.captions.parse_fields`.

    Few records are looked at. It is "captions=1" where they have that list, "caption=1" where they have not, and both
    where only some have it; then `extra`, where a record has one of its fields.
    """
    records = next(_samples(sources))
    several = [bool(record.get("captions")) for record in records]
    first = "captions=1" if several and all(several) else "captions=1,caption=1" if any(several) else "caption=1"
    fields = [name.removesuffix(JOINED) for name in parse_fields(extra)] if extra else []
    return [first, extra] if any(record.get(name) for record in records for name in fields) else [first]


def _samples(sources: Sequence[Source]) -> Iterator[list[Record]]:
    """Readable records: a few of each source, then more, spread evenly."""
    for count in (FIRST_LOOK, LAST_LOOK):
        each = max(count // len(sources), 1)
        records: list[Record] = []
        for source in sources:
            rows = evenly(len(source), each).tolist()
            records += [row for row in source.__getitems__(rows) if not isinstance(row, BadRecord)]
        yield records


def _wanted_fields(ops: Sequence[Op], host: Collection[str], records: Iterable[Record]) -> set[str] | None:
    """Fields that a record must have for the ops: those they read and that no op before adds.

    What an op adds is seen by running it. Where no record is usable they are the fields up to the op that says so; None
    where there is no record.
    """
    wanted: set[str] | None = None
    for record in records:
        made: set[str] = set()
        wanted, example = set(), record
        try:
            for number, op in enumerate(ops):
                _check_kept(ops[:number], op, example, record)
                wanted |= op.reads - made
                before, example = example, op(example, np.random.default_rng(0))
                made |= {name for name, value in example.items() if before.get(name) is not value}
        except BadRecord:
            continue
        except UserError:
            if wanted <= record.keys():
                raise
        return wanted | (set(host) - made)
    return wanted


def _check_kept(before: Sequence[Op], op: Op, example: Record, record: Record) -> None:
    """Raises UserError where an op before this one has dropped all that it reads of the record."""
    names = {name.removesuffix(JOINED) for name in op.reads}
    keep = next((step for step in before if isinstance(step, Keep)), None)
    if keep is not None and not names & example.keys() and (dropped := sorted(names & record.keys())):
        kept = f"keep({', '.join(keep.names)})"
        raise UserError(f"op {op.name!r} reads {' or '.join(dropped)}, which {kept} before it drops: put that last")
