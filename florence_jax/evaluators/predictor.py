"""Predictions for every record of a source, over all devices and hosts; on top, embeddings of images and texts."""

import pickle
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from florence_jax.data.buckets import Bucket
from florence_jax.data.pipeline import Batch, Process, eval_stream, to_global
from florence_jax.data.records import Source
from florence_jax.data.tokenizers import Tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.base import OF_IMAGES, Payload
from florence_jax.params.sharding import batch_sharding, replicated

COMPILED = " with compilation"  # said of a speed that could not be measured without it
OWN = ("index", "mask")  # fields that a batch's rows are known by
Predict = Callable[[Any, dict[str, jax.Array]], jax.Array]


class Predictor:
    """Runs a prediction function over whole sources; every process gets the results of all rows.

    While the devices work on one batch the host reads the next and hands out the one before. One compilation for each
    shape of a batch, that is one for each bucket.

    Args:
      predict: pure function (params, batch) -> {name: array with the batch's rows first}; the batch has what the ops
        leave, "mask" and "index".
      mesh: device mesh.
      batch_size: global records a call; raised to a multiple of the number of devices.
    """

    def __init__(
        self, predict: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]], mesh: Mesh, batch_size: int
    ):
        self.mesh, self.batch_size = mesh, -(-batch_size // mesh.size) * mesh.size

        # The results go to every host: only numbers that all hosts have can be aggregated alike on all of them.
        def run(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            found = dict(predict(params, batch))
            if taken := [name for name in OWN if name in found]:
                raise ValueError(f"a prediction cannot be named {taken[0]!r}")
            return found | {name: batch[name] for name in OWN}

        self._run = jax.jit(run, out_shardings=replicated(mesh))

    def rows(
        self,
        params: Any,
        source: Source,
        ops: str,
        context: Mapping[str, Any],
        *,
        host: Collection[str] = (),
        buckets: Sequence[Bucket] = (),
        on_corrupt: str = "error",
        what: str = "",
    ) -> Iterator[Mapping[str, Any]]:
        """What the function gives for each record, in the order of the source; all processes must take every row.

        Args:
          params: of the model.
          source, ops, context, host, buckets, on_corrupt: see `data.pipeline.eval_stream`.
          what: name on the progress bar; '' for the source's.

        Yields:
          For each usable record "index", its row in the source, the arrays of the prediction without the batch axis,
          and the host fields as the ops leave them. Host fields of other processes' rows are sent to this one, pickled.
          With buckets, rows wait in memory until those before them are there.

        Raises:
          UserError: as `eval_stream`.
        """
        stream = eval_stream(
            source,
            ops,
            context,
            batch_size=self.batch_size,
            process=Process(jax.process_index(), jax.process_count()),
            buckets=buckets,
            host=host,
            on_corrupt=on_corrupt,
        )
        waiting: dict[int, Mapping[str, Any] | None] = {}
        after = 0
        with stream:
            for columns, skipped in self._batches(params, stream, host, what or source.name, len(source), "record"):
                waiting |= dict.fromkeys(skipped)
                for place, index in enumerate(columns["index"].tolist()):
                    waiting[index] = {name: values[place] for name, values in columns.items()} | {"index": index}
                while after in waiting:
                    if (row := waiting.pop(after)) is not None:
                        yield row
                    after += 1

    def batches(
        self,
        params: Any,
        batches: Iterable[Batch],
        *,
        host: Collection[str] = (),
        what: str = "",
        total: int = 0,
        unit: str = "record",
    ) -> Iterator[dict[str, Any]]:
        """What the function gives for each batch, whole columns at once; `rows` is made of this.

        Args:
          params: of the model.
          batches: this process's rows of each global batch, as `data.pipeline.eval_stream` gives them.
          host: their fields that are lists.
          what, total, unit: of the progress bar.

        Yields:
          {"index": (n,), rows in the source, ascending; each output (n, ...); each host field a list of n}, on all
          processes, for the n rows of a batch that are neither padding nor skipped.
        """
        return (columns for columns, _ in self._batches(params, batches, host, what, total, unit))

    def _batches(
        self, params: Any, batches: Iterable[Batch], host: Collection[str], what: str, total: int, unit: str
    ) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """(columns, rows that were skipped) of each batch."""
        sharding, ahead = batch_sharding(self.mesh), None
        hidden = not sys.stderr.isatty() or jax.process_index() > 0
        with tqdm(desc=what, total=total, unit=unit, leave=False, disable=hidden) as bar:
            for batch in batches:
                lists = {name: batch[name] for name in host}
                arrays = {name: value for name, value in batch.items() if name not in lists}
                out = self._run(params, to_global(arrays, sharding))  # returns before it is computed
                if ahead is not None:
                    yield self._fetch(*ahead, bar)
                ahead = out, arrays["index"], lists
            if ahead is not None:
                yield self._fetch(*ahead, bar)

    def _fetch(
        self, out: dict[str, jax.Array], index: np.ndarray, lists: dict[str, list[Any]], bar: tqdm
    ) -> tuple[dict[str, Any], list[int]]:
        columns: dict[str, Any] = jax.device_get(out)
        rows, mask = columns["index"], columns.pop("mask")
        # On a TPU slice the devices of a host need not be neighbours in the mesh: then the rows come in its order.
        order = np.argsort(rows, kind="stable")
        order = order[mask[order]]
        columns = {name: value[order] for name, value in columns.items()}
        if lists:
            columns |= _gather_lists(index, lists, columns["index"])
        bar.update(len(order))
        return columns, rows[~mask & (rows >= 0)].tolist()


def _gather_lists(index: np.ndarray, lists: Mapping[str, list[Any]], rows: np.ndarray) -> dict[str, list[Any]]:
    """The lists of all processes in the order of `rows`, from those of this process's rows `index`."""
    parts = [(index.tolist(), lists)]
    if jax.process_count() > 1:
        data = np.frombuffer(pickle.dumps(parts[0]), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        # A power of two: few shapes, few compilations.
        room = 1 << int(sizes.max() - 1).bit_length()
        sent = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
        parts = [pickle.loads(part[:size].tobytes()) for part, size in zip(sent, sizes, strict=True)]
    places = {row: (k, i) for k, (found, _) in enumerate(parts) for i, row in enumerate(found)}
    chosen = [places[row] for row in rows.tolist()]
    return {name: [parts[k][1][name][i] for k, i in chosen] for name in lists}


class Embedder:
    """Embeds sources of images and lists of texts with a task's prediction functions, over all devices and hosts.

    Args:
      predict: 'image' and, for texts, 'text': pure functions (params, batch) -> (B, D), see `tasks.base.Task`.
      tokenizer: of the text tower; None if only images are embedded.
      mesh: device mesh.
      batch_size: global images, or texts, a call; a multiple of the number of devices. One shape, one compilation.
      payload: what 'image' takes instead of images.
    """

    def __init__(
        self,
        predict: Mapping[str, Predict],
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        batch_size: int,
        payload: Payload = OF_IMAGES,
    ):
        self._tokenizer, self.payload = tokenizer, payload
        self._compiled_towers: set[str] = set()
        self._told: set[str] = set()
        self._towers: dict[str, Predictor] = {
            name: Predictor(_with_label(predict[name]), mesh, batch_size)
            for name in ("image", "text")
            if name in predict
        }
        self.mesh = mesh
        self.batch_size = next(iter(self._towers.values())).batch_size

    def images(
        self,
        params: Any,
        source: Source,
        ops: str,
        context: dict[str, Any] | None = None,
        on_corrupt: str = "error",
        quiet: bool = False,
        keys: bool = False,
    ) -> dict[str, np.ndarray]:
        """Embeds every image of a source.

        Args:
          params: of the model.
          source, ops, context, on_corrupt: see `data.pipeline.eval_stream`; the ops leave "image" and perhaps "label".
          quiet: do not print images per second.
          keys: also give the records' keys, which the ops leave.

        Returns:
          "embedding" float32 (N, D), "index" int32 (N,), row in the source, "label" (N, ...) where the ops leave one,
          and "key" (N,) of texts where they are wanted; N is the number of readable records.

        Raises:
          UserError: for embeddings that are not finite, or as `eval_stream`.
        """
        host = ("key",) if keys else ()
        stream = eval_stream(
            source,
            ops,
            context or {},
            batch_size=self.batch_size,
            process=Process(jax.process_index(), jax.process_count()),
            host=host,
            on_corrupt=on_corrupt,
        )
        with stream:
            return self._gather("image", params, stream, source.name, len(source), quiet, host)

    def texts(self, params: Any, texts: Sequence[str], what: str = "texts") -> np.ndarray:
        """Embeds texts: float32 (len(texts), D). `what` names them on the progress bar.

        Those that are longer than the model's are cut; how many is told once for each `what`.

        Raises:
          UserError: for a text without tokens, or embeddings that are not finite.
        """
        batches = self._text_batches(texts, -(-len(texts) // self.batch_size))
        found = self._gather("text", params, batches, what, len(texts), quiet=True, host=())["embedding"]
        if what not in self._told and jax.process_index() == 0:
            self._told.add(what)
            self._tell_cut(texts, what)
        return found

    def _tell_cut(self, texts: Sequence[str], what: str) -> None:
        assert self._tokenizer is not None, "texts need a tokenizer"
        most = self._tokenizer.length
        long = [text for text in texts if len(text) + 3 > most or not text.isascii()]  # others fit for sure
        if cut := sum(len(self._tokenizer.encode(text)) > most for text in long):
            print(f"{what}: {cut:,} of {len(texts):,} are cut to the {most} tokens that the model sees", flush=True)

    def _text_batches(self, texts: Sequence[str], steps: int) -> Iterator[dict[str, np.ndarray]]:
        local = self.batch_size // jax.process_count()
        assert self._tokenizer is not None, "texts need a tokenizer"
        for step in range(steps):
            start = step * self.batch_size + jax.process_index() * local
            rows = self._tokenizer.encode_batch(texts[start : start + local])
            present = len(rows)
            yield {
                "text": np.pad(rows, ((0, local - present), (0, 0))),
                "text_length": np.pad(self._tokenizer.lengths(rows), (0, local - present), constant_values=1),
                "mask": np.arange(local) < present,
                "index": np.arange(start, start + local, dtype=np.int32),
            }

    def _gather(
        self,
        tower: str,
        params: Any,
        batches: Iterable[Batch],
        what: str,
        total: int,
        quiet: bool,
        host: Collection[str],
    ) -> dict[str, np.ndarray]:
        outputs, counted = [], 0
        began = started = time.perf_counter()
        for out in self._towers[tower].batches(params, batches, host=host, what=what, total=total, unit=tower):
            outputs.append(out)
            if tower not in self._compiled_towers:
                self._compiled_towers.add(tower)
                began, counted = time.perf_counter(), len(out["index"])
        if not quiet and jax.process_index() == 0 and what not in self._told:  # once, not at each evaluation
            self._told.add(what)
            rest = total - counted
            count, since, note = (rest, began, "") if rest > 0 else (total, started, COMPILED)
            plural = self.payload.plural
            short = "img" if self.payload is OF_IMAGES else plural
            print(f"{what}: {total} {plural}, {count / (time.perf_counter() - since):.0f} {short}/s{note}", flush=True)
        found = {
            name: np.concatenate([np.asarray(out[name], object if name in host else None) for out in outputs])
            for name in outputs[0]
        }
        # What is not a number is never larger than anything: ranks and metrics would call it right.
        if bad := int((~np.isfinite(found["embedding"])).reshape(len(found["index"]), -1).any(1).sum()):
            raise UserError(
                f"{what}: {bad} of {len(found['index'])} {tower}s have embeddings that are not finite: the weights are "
                "broken, take an earlier checkpoint or import them again"
            )
        return found


def image_counts(source: Source, index: np.ndarray, plural: str = OF_IMAGES.plural) -> dict[str, float]:
    """For results: 'images' that were read, and where some were not, 'skipped' ones.

    Args:
      source: what was gone through.
      index: (N,), its rows that were read, see `Embedder.images`.
      plural: what is counted instead of images.
    """
    skipped = len(source) - len(index)
    return {plural: float(len(index))} | ({"skipped": float(skipped)} if skipped else {})


def _with_label(function: Predict) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
    def predict(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        label = {"label": batch["label"]} if "label" in batch else {}
        return {"embedding": function(params, batch)} | label

    return predict
