"""Image-text relevance by trained weights, or by any callable, through Beam's RunInference.

A record that cannot be scored (a picture that does not decode, an empty caption) becomes a dead letter with its reason,
always the same ones. Anything else that goes wrong, such as a device out of memory, is raised, so that the runner tries
the bundle again: the outcome must not depend on the machine.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import apache_beam as beam
import jax
import jax.numpy as jnp
import numpy as np
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference

from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError
from florence_jax.params.checkpoint import newest_step
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks.encoder import Encoder

# {"image": encoded bytes, "caption": str}
ScorerPair = Mapping[str, Any]
# {"relevance": float[, "embedding": float32 (D,)]}
Scores = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a record has no prediction."""

    reason: str


class JaxModel(Protocol):
    """What `JaxModelHandler` runs.

    Attributes:
      params: tree of arrays; an argument of the compiled function, since constants would be compiled into it.
    """

    params: Any

    def prepare(self, example: Any) -> dict[str, np.ndarray]:
        """One example as arrays whose shapes and dtypes are always the same, on the host.

        Raises:
          UserError (or BadRecord): for an example that cannot be used; it becomes a `Failure`.
        """

    def apply(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Pure function of stacked examples, (B, ...) to (B, ...); a row must not depend on the other rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A model with its compiled function, as Beam keeps it in a process.

    Attributes:
      model: gives `prepare` and `params`.
      apply: `model.apply`, compiled.
    """

    model: JaxModel
    apply: Callable[[Any, dict[str, np.ndarray]], dict[str, jax.Array]]


class JaxModelHandler(ModelHandler[Any, "Scores | Failure", Compiled]):
    """Beam model handler for JAX: every batch is padded to one size, so that XLA compiles once.

    On one kind of device a score does not depend on the batch that Beam puts an example in. Another batch size is
    another compiled function, and may differ in the last bits: keep it with the thresholds in the configuration.

    Args:
      load: makes the model; called once a process, and pickled, so give a module-level function or a dataclass.
      batch_size: of the compiled function.

    Raises:
      UserError: for a batch size below 1.
    """

    def __init__(self, load: Callable[[], JaxModel], batch_size: int = 64):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        super().__init__(min_batch_size=batch_size, max_batch_size=batch_size)
        self._load, self._batch_size = load, batch_size

    def load_model(self) -> Compiled:
        """The model and its compiled function."""
        model = self._load()
        return Compiled(model, jax.jit(model.apply))

    def run_inference(
        self, batch: Sequence[Any], model: Compiled, inference_args: dict[str, Any] | None = None
    ) -> list[Scores | Failure]:
        """One result for each example, in order: a dict with a row of each output, or a `Failure`."""
        results: list[Any] = [_prepared(model.model, example) for example in batch]
        good = [i for i, result in enumerate(results) if not isinstance(result, Failure)]
        for start in range(0, len(good), self._batch_size):
            places = good[start : start + self._batch_size]
            padded = places + places[-1:] * (self._batch_size - len(places))
            stacked = {name: np.stack([results[i][name] for i in padded]) for name in results[places[0]]}
            outputs = {name: np.asarray(value) for name, value in model.apply(model.model.params, stacked).items()}
            for row, place in enumerate(places):
                results[place] = _finite({name: value[row] for name, value in outputs.items()})
        return results

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        """For Beam's metrics: bytes of the encoded images."""
        return sum(len(example.get("image", b"")) for example in batch if isinstance(example, Mapping))

    def get_metrics_namespace(self) -> str:
        """For Beam's metrics."""
        return "florence_jax"


def _prepared(model: JaxModel, example: Any) -> dict[str, np.ndarray] | Failure:
    try:
        return model.prepare(example)
    except UserError as error:
        return _failure(error)


def _failure(error: UserError) -> Failure:
    return Failure(error.reason if isinstance(error, BadRecord) else str(error))


def _finite(outputs: Mapping[str, np.ndarray]) -> Scores | Failure:
    """Outputs of one example, scalars as float; a Failure if one is not finite."""
    if bad := [name for name, value in outputs.items() if not np.isfinite(value).all()]:
        return Failure(f"{bad[0]} is not finite")
    return {name: float(value) if value.ndim == 0 else np.array(value) for name, value in outputs.items()}


class CallableModelHandler(ModelHandler[ScorerPair, "Scores | Failure", Callable]):
    """Beam model handler for any function of images and captions.

    Args:
      function: (list of encoded images, list of captions) -> (N,) scores, float32 after this. If it raises UserError
        (or BadRecord) on several pairs it is called again on each, to find the bad ones; a pair on which it does so
        alone is a dead letter. Any other exception, such as that of a lost connection, is raised.
      batch_size: most pairs a call.
    """

    def __init__(self, function: Callable[[list[bytes], list[str]], Sequence[float]], batch_size: int = 64):
        super().__init__(max_batch_size=batch_size)
        self._function = function

    def load_model(self) -> Callable:
        """The function, in an object that Beam can hold a weak reference to, as it cannot to a built-in one."""
        return functools.partial(self._function)

    def run_inference(
        self, batch: Sequence[ScorerPair], model: Callable, inference_args: dict[str, Any] | None = None
    ) -> list[Scores | Failure]:
        """One result for each pair, in order."""
        try:
            scores = np.asarray(model([p["image"] for p in batch], [p["caption"] for p in batch]), np.float32)
        except UserError as error:
            if len(batch) == 1:
                return [_failure(error)]
            return [self.run_inference([pair], model)[0] for pair in batch]
        if scores.shape != (len(batch),):
            raise UserError(
                f"the relevance function gave shape {scores.shape} for {len(batch)} pairs: one score a pair"
            )
        return [_finite({"relevance": score}) for score in scores]

    def get_num_bytes(self, batch: Sequence[ScorerPair]) -> int:
        """For Beam's metrics: bytes of the encoded images."""
        return sum(len(pair["image"]) for pair in batch)


class ScorePairs(beam.PTransform):
    """(uid, pair) -> {"scores": (uid, Scores), "failures": (uid, reason)}, every uid in exactly one of them.

    Args:
      handler: a `JaxModelHandler` over pairs, or a `CallableModelHandler`.
    """

    def __init__(self, handler: ModelHandler):
        super().__init__()
        self._handler = handler

    def expand(self, pairs: beam.PCollection) -> Any:
        """Applies the model and sorts the results."""
        results = pairs | "Infer" >> RunInference(KeyedModelHandler(self._handler))
        is_failure = results | "Sort" >> beam.Partition(lambda result, _: int(isinstance(result[1], Failure)), 2)
        failures = is_failure[1] | "Reasons" >> beam.MapTuple(lambda uid, failure: (uid, failure.reason))
        return {"scores": is_failure[0], "failures": failures}


# -- the project's model ----------------------------------------------------------------------------------------------


class PairModel:
    """Cosine of the two embeddings of a pair; a `JaxModel`.

    Args:
      encoder: gives the towers, the tokenizer and the image ops.
      params: its parameters.
      embeddings: also give the image embedding, for `select.cluster_t`.
    """

    def __init__(self, encoder: Encoder, params: Any, embeddings: bool = False):
        self.params, self._predict, self._embeddings = params, encoder.predict, embeddings
        self._ops, self._tokenizer = parse_ops(encoder.eval_ops, {}), encoder.tokenizer

    def prepare(self, example: ScorerPair) -> dict[str, np.ndarray]:
        """{"image": uint8 (res, res, 3), "text": int32 (L,), "text_length": int32 ()}.

        Raises:
          UserError: for a bad image or caption.
        """
        decoded: dict[str, Any] = {"image": example["image"], "key": ""}
        for image_op in self._ops:
            decoded = image_op(decoded, np.random.default_rng(0))  # evaluation ops draw nothing
        text = self._tokenizer(example["caption"])
        return {"image": decoded["image"], "text": text, "text_length": self._tokenizer.lengths(text)}

    def apply(self, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{"relevance": float32 (B,)} and, if asked for, "embedding": float32 (B, D)."""
        image, text = self._predict["image"](params, batch), self._predict["text"](params, batch)
        return {"relevance": jnp.sum(image * text, axis=-1)} | ({"embedding": image} if self._embeddings else {})


@dataclasses.dataclass(frozen=True)
class CheckpointLoader:
    """Loads weights that embed pictures and texts, of a run or imported; give it to `JaxModelHandler`.

    Attributes:
      folder: workdir of a run, its checkpoints/, or a folder of florence_jax.tools.import_torch.
      tokenizer: see `data.tokenizers.load_tokenizer`; '' for the one that the folder names.
      step: of the newest checkpoint when the scoring was planned; None if that does not matter.
      embeddings: as in `PairModel`.
    """

    folder: str
    tokenizer: str = ""
    step: int | None = None
    embeddings: bool = False

    def __call__(self) -> PairModel:
        """The model on the first local device, with the moving average of the weights where the folder keeps one.

        Raises:
          UserError: if there are no such weights, no text tower, no tokenizer, or another checkpoint than `step` is the
            newest by now: scores of two checkpoints cannot be compared.
        """
        encoder = Encoder(self.folder, tokenizer=self.tokenizer)
        if not encoder.has_text:
            raise UserError(f"{self.folder} has no text tower: relevance needs weights with both towers")
        if not encoder.tokenizer_spec:
            raise UserError(
                f"{self.folder} does not say which tokenizer it was trained with: give it with "
                "--config.relevance.tokenizer=FILE (CLIP, OpenCLIP and UniCL: bpe_simple_vocab_16e6.txt.gz)"
            )
        params = encoder.load_on(make_mesh(1, 1, jax.local_devices()[:1]))
        newest = newest_step(encoder.description.folder)
        if self.step is not None and newest != self.step:
            raise UserError(f"{self.folder} has a new checkpoint, {newest} after {self.step}: run again")
        return PairModel(encoder, params, self.embeddings)
