"""Classes of sentences about pictures: NLVR2 (true or false of two), SNLI-VE (entailment, neutral, contradiction)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.answers import AnswerVocabulary
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import TrainData
from florence_jax.data.question_files import NLVR2_CLASSES, SNLI_VE_CLASSES
from florence_jax.data.records import Source
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.joined_questions import open_questions
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.vqa import VqaEvaluator
from florence_jax.losses.language import LossSums, class_loss
from florence_jax.models.base import Params
from florence_jax.tasks.base import make_identity, make_plan
from florence_jax.tasks.fusion import FusedTowers, describe_fusion, fusion_identity, open_fusion, summed
from florence_jax.tasks.fusion_task import FusionTask
from florence_jax.tasks.recipe import question_recipe

SENTENCE_OPS = "caption(question=1)|tokenize"
OF_SENTENCES = ("image", "text", "text_length")


class SentenceTask(FusionTask):
    """Training of a head of classes on the fusion of `config.init`.

    Attributes:
      head: name of the head. classes: their names. pictures: of a sentence.

    Raises:
      UserError: for weights without both towers, an unknown option.
    """

    name = "vqa"
    head: str
    classes: Sequence[str]
    pictures = 1
    charts = (Chart("loss", {"": "loss"}), Chart("accuracy in training", {"": "accuracy"}))

    def __init__(self, config: ConfigDict):
        self.config = config
        self.train_source: Source | None = open_questions(config.data.train) if config.data.train else None
        types = {"token_types": 1 + self.pictures}
        self.fusion = open_fusion(config, (self.head,), (), types)
        res = str(self.fusion.encoder.model.config.res)
        self.train_ops, self.eval_ops = (
            ops.replace("{res}", res) for ops in (config.data.train_ops, config.data.eval_ops)
        )
        for ops in (self.train_ops, self.eval_ops):
            parse_ops(ops, {})
        examples = None if self.train_source is None else len(self.train_source)
        self.plan = make_plan(config, examples, question_recipe(examples, 1, self.fusion.trained, config.batch_size))
        flops = self.fusion.model.flops
        self.flops_per_example = 3.0 * (flops["text"] + self.pictures * (flops["image"] + flops["fusion"]))

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        given = make_identity(self.config, "protocol", "init", "data.train", "data.test")
        resolved = {"data.train_ops": self.train_ops, "data.eval_ops": self.eval_ops}
        return given | resolved | fusion_identity(self.fusion)

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        own = {"eval_ops": self.eval_ops, "sentence_classes": list(self.classes)}
        return describe_fusion(self.name, self.fusion, self.config, **own)

    @property
    def sources(self) -> Sequence[Source]:
        """See `Suite`."""
        return () if self.train_source is None else (self.train_source,)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross entropy of the classes."""
        micro, image = self.config.micro_batch, batch["image"]
        pictures = image.reshape(-1, *image.shape[-3:])
        found = self.fusion.encode(params, pictures, "image" not in self.frozen, key, micro.images)
        tokens = found["image_tokens"]
        rows = {name: batch[name] for name in ("text", "text_length", "class_id")}
        rows |= {"own": tokens.reshape(len(image), -1, *tokens.shape[1:]), "example": jnp.arange(len(image))}
        function = functools.partial(self._sums, key=jax.random.fold_in(key, 2))
        sums = summed(function, params, rows, micro.texts)
        return sums.mean, {"accuracy": sums.accuracy}

    def _sums(self, params: Params, rows: Mapping[str, jax.Array], key: jax.Array) -> LossSums:
        return class_loss(read_sentences(self.fusion, params, rows, key)[f"{self.head}_logits"], rows["class_id"])

    # -- data -------------------------------------------------------------------------------------------------------

    def _ops(self, ops: str) -> str:
        """Of pictures, and of the text."""
        around = f"both_pictures|{ops}|stack(image)" if self.pictures > 1 else ops
        return f"{around}|{SENTENCE_OPS}"

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`."""
        size, model, of = self.plan.batch_size, self.fusion.encoder.model.config, jax.ShapeDtypeStruct
        several = (self.pictures,) if self.pictures > 1 else ()
        shapes = {
            "image": of((size, *several, model.res, model.res, 3), jnp.uint8),
            "text": of((size, self.fusion.text_length), jnp.int32),
            "text_length": of((size,), jnp.int32),
            "class_id": of((size,), jnp.int32),
            "corrupt": of((size,), jnp.int32),
        }
        return (shapes,)

    @property
    def context(self) -> dict[str, Any]:
        """What the ops need."""
        return {"tokenizer": self.fusion.tokenizer}

    def train_data(self) -> TrainData:
        """See `Task`."""
        if self.train_source is None:
            raise UserError("nothing to train on: give --config.data.train=DATA")
        ops = f"{self._ops(self.train_ops)}|keep({', '.join((*OF_SENTENCES, 'class_id'))})"
        return TrainData([self.train_source], None, ops, self.context)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Accuracy on the sentences of `config.data.test`."""
        specs = [spec.strip() for spec in self.config.data.test.split("|") if spec.strip()]
        train = [] if self.train_source is None else [self.train_source]
        asked = (self._ops(self.eval_ops), self.context, OF_SENTENCES, self.answer, mesh, self.config.eval.batch_size)
        vocabulary, on_corrupt = AnswerVocabulary(self.classes), self.config.data.on_corrupt
        return [
            VqaEvaluator(open_source(spec), *asked, vocabulary, f"test{number or ''}", train, on_corrupt)
            for number, spec in enumerate(specs)
        ]

    def answer(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """{"answer_logits" (B, K)} of the classes, and of one picture "attention" (B, T)."""
        image = batch["image"]
        tokens = self.fusion.encode(params, image.reshape(-1, *image.shape[-3:]))["image_tokens"]
        rows = {name: batch[name] for name in OF_SENTENCES[1:]}
        rows["own"] = tokens.reshape(len(image), -1, *tokens.shape[1:])
        out = read_sentences(self.fusion, params, rows)
        looked = {"attention": out["attention"]} if self.pictures == 1 else {}
        return {"answer_logits": out[f"{self.head}_logits"]} | looked


class Nlvr2(SentenceTask):
    """Is a sentence true of two pictures?"""

    head, classes, pictures = "nlvr2", NLVR2_CLASSES, 2


class SnliVe(SentenceTask):
    """Does a picture entail a sentence, contradict it, or neither?"""

    head, classes = "snli_ve", SNLI_VE_CLASSES


def read_sentences(
    fusion: FusedTowers, params: Params, rows: Mapping[str, jax.Array], key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The fusion's outputs for n sentences.

    Args:
      fusion, params: of the model.
      rows: "own" (n, P, T, C), tokens of the P pictures of each sentence, "text" (n, L), "text_length", "example" (n,).
      key: of dropout; None: as in evaluation.
    """
    own = rows["own"]
    count, pictures = own.shape[:2]
    inputs = {name: rows[name] for name in ("text", "text_length", "example") if name in rows}
    inputs["image_tokens"] = own.reshape(-1, *own.shape[2:])
    if pictures > 1:
        first = pictures * jnp.arange(count)
        inputs |= {"image_index": first, "image2_index": first + 1}
    return fusion.fuse(params, inputs, key is not None, key)
