"""The embedding of images and texts over all devices and hosts, which most evaluators need."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from florence_jax.data.pipeline import Process, eval_stream, to_global
from florence_jax.data.records import Source
from florence_jax.data.tokenizers import Tokenizer
from florence_jax.errors import UserError
from florence_jax.params.sharding import batch_sharding, replicated

COMPILED = " with compilation"  # said of a speed that could not be measured without it
Predict = Callable[[Any, dict[str, jax.Array]], jax.Array]


class Embedder:
    """Embeds sources of images and lists of texts with a task's prediction functions, over all devices and hosts.

    Args:
      predict: 'image' and, for texts, 'text': pure functions (params, batch) -> (B, D), see `tasks.base.Task`.
      tokenizer: of the text tower; None if only images are embedded.
      mesh: device mesh.
      batch_size: global images, or texts, a call; a multiple of the number of devices. One shape, one compilation.
    """

    def __init__(self, predict: dict[str, Predict], tokenizer: Tokenizer | None, mesh: Mesh, batch_size: int):
        self.mesh, self.batch_size = mesh, -(-batch_size // mesh.size) * mesh.size
        self._tokenizer = tokenizer
        self._compiled_towers: set[str] = set()
        self._run = {name: self._compiled(predict[name]) for name in ("image", "text") if name in predict}

    def _compiled(self, function: Predict) -> Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]:
        # The results go to every host: only numbers that all hosts have can be aggregated alike on all of them.
        def run(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            rest = {name: batch[name] for name in ("index", "label", "mask") if name in batch}
            return rest | {"embedding": function(params, batch)}

        return jax.jit(run, out_shardings=replicated(self.mesh))

    def images(
        self,
        params: Any,
        source: Source,
        ops: str,
        context: dict[str, Any] | None = None,
        on_corrupt: str = "error",
        quiet: bool = False,
    ) -> dict[str, np.ndarray]:
        """Embeds every image of a source.

        Args:
          params: of the model.
          source, ops, context, on_corrupt: see `data.pipeline.eval_stream`; the ops leave "image" and perhaps "label".
          quiet: do not print images per second.

        Returns:
          "embedding" float32 (N, D), "index" int32 (N,), row in the source, and "label" (N,) where the ops leave one;
          N is the number of readable records.

        Raises:
          UserError: for embeddings that are not finite, or as `eval_stream`.
        """
        stream = eval_stream(
            source,
            ops,
            context or {},
            batch_size=self.batch_size,
            process=Process(jax.process_index(), jax.process_count()),
            on_corrupt=on_corrupt,
        )
        with stream:
            return self._gather("image", params, stream, source.name, len(source), quiet)

    def texts(self, params: Any, texts: Sequence[str], what: str = "texts") -> np.ndarray:
        """Embeds texts: float32 (len(texts), D). `what` names them on the progress bar.

        Raises:
          UserError: for a text without tokens, or embeddings that are not finite.
        """
        batches = self._text_batches(texts, -(-len(texts) // self.batch_size))
        return self._gather("text", params, batches, what, len(texts), quiet=True)["embedding"]

    def _text_batches(self, texts: Sequence[str], steps: int) -> Iterator[dict[str, np.ndarray]]:
        local = self.batch_size // jax.process_count()
        for step in range(steps):
            start = step * self.batch_size + jax.process_index() * local
            rows = self._tokenizer.encode_batch(texts[start : start + local])
            present = len(rows)
            yield {
                "text": np.pad(rows, ((0, local - present), (0, 0))),
                "mask": np.arange(local) < present,
                "index": np.arange(start, start + local, dtype=np.int32),
            }

    def _gather(
        self, tower: str, params: Any, batches: Iterator[dict[str, np.ndarray]], what: str, total: int, quiet: bool
    ) -> dict[str, np.ndarray]:
        sharding, outputs = batch_sharding(self.mesh), []
        hidden = not sys.stderr.isatty() or jax.process_index() > 0
        started, counted = time.perf_counter(), 0
        began = started
        with tqdm(desc=what, total=total, unit=tower, leave=False, disable=hidden) as bar:
            for batch in batches:
                out = jax.device_get(self._run[tower](params, to_global(batch, sharding)))
                mask = out.pop("mask")
                outputs.append({name: value[mask] for name, value in out.items()})
                bar.update(int(mask.sum()))
                if tower not in self._compiled_towers:
                    self._compiled_towers.add(tower)
                    began, counted = time.perf_counter(), int(mask.sum())
        if not quiet and jax.process_index() == 0:
            rest = total - counted
            count, since, note = (rest, began, "") if rest > 0 else (total, started, COMPILED)
            print(f"{what}: {total} images, {count / (time.perf_counter() - since):.0f} img/s{note}", flush=True)
        # On a TPU slice the devices of a host need not be neighbours in the mesh: then the rows come in its order.
        order = np.argsort(np.concatenate([out["index"] for out in outputs]), kind="stable")
        found = {name: np.concatenate([out[name] for out in outputs])[order] for name in outputs[0]}
        # What is not a number is never larger than anything: ranks and metrics would call it right.
        if bad := int((~np.isfinite(found["embedding"])).reshape(len(order), -1).any(1).sum()):
            raise UserError(
                f"{what}: {bad} of {len(order)} {tower}s have embeddings that are not finite: the weights are broken, "
                "take an earlier checkpoint or import them again"
            )
        return found
