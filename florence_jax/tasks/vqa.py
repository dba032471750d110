"""Question answering: a fusion of image and text with a head of answers, trained on questions; answers to others."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.answers import MATCHES, AnswerVocabulary
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.questions import MADE_OF_QUESTIONS, OF_QUESTIONS
from florence_jax.data.pipeline import TrainData
from florence_jax.data.records import Source
from florence_jax.data.sources.question_groups import QuestionGroups, picture_numbers
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.vqa import VqaEvaluator
from florence_jax.evaluators.vqa_small import SmallNetwork, SmallNetworkAnswers
from florence_jax.evaluators.vqa_towers import TowersOnly, of_questions
from florence_jax.losses.language import LossSums, answer_loss
from florence_jax.models.base import Params
from florence_jax.tasks.base import Suite, make_identity, make_plan
from florence_jax.tasks.fusion import (
    FusedTowers,
    describe_fusion,
    fusion_identity,
    grown_towers,
    open_fusion,
    summed,
    towers_folder,
)
from florence_jax.tasks.fusion_task import FusionTask
from florence_jax.tasks.questions import MOST_PLACES, QuestionSets
from florence_jax.tasks.recipe import question_recipe

ANSWER_HEAD = "vqa"
ANSWERED = ("image", *OF_QUESTIONS)  # what an answer is made of
UNNAMED_ANSWERS = tuple(f"answer {number}" for number in range(3129))  # of a model that is only compiled


class VqaSuite(Suite):
    """Answers of a trained model to the questions of `config.data.test`.

    Attributes:
      sets: the questions. fusion: the model. vocabulary: its answers. train_ops, eval_ops: image ops at its size.

    Raises:
      UserError: for weights that answer no questions, a list of other answers, questions that are not there.
    """

    name = "vqa"

    def __init__(self, config: ConfigDict):
        self.config = config
        self.sets = self._open_sets()
        self.fusion = open_fusion(config, (ANSWER_HEAD,), self._answers())
        self.vocabulary = AnswerVocabulary(self.fusion.answers)
        res = str(self.fusion.encoder.model.config.res)
        self.eval_ops = (config.data.eval_ops or self.fusion.part.get("eval_ops", "")).replace("{res}", res)
        self.train_ops = config.data.train_ops.replace("{res}", res)
        for ops in (self.train_ops, self.eval_ops):
            parse_ops(ops, {})

    def _open_sets(self) -> QuestionSets:
        if self.config.data.train:
            raise UserError("protocol 'eval' trains nothing: give the questions as --config.data.test=DATA")
        if not self.config.data.test:
            raise UserError("no questions to answer: give --config.data.test=DATA")
        return QuestionSets(self.config)

    def _answers(self) -> Sequence[str]:
        """() for those of the folder."""
        if self.config.answers.file:
            raise UserError(
                f"config.answers.file={self.config.answers.file}: a trained model has answers of its own, which are in "
                "its folder; leave it empty, or train with the list"
            )
        return ()

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        given = make_identity(self.config, "protocol", "init", "data.train", "data.test", "blind")
        return given | {"data.eval_ops": self.eval_ops} | fusion_identity(self.fusion)

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return describe_fusion(self.name, self.fusion, self.config, eval_ops=self.eval_ops)

    @property
    def sources(self) -> Sequence[Source]:
        """See `Suite`."""
        return () if self.sets.train is None else (self.sets.train,)

    def load(self, mesh: Mesh) -> Params:
        """The trained model of `config.init`."""
        return self.fusion.load_on(mesh, self.config.mesh.sharding_rules)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """VQA's accuracy on each of the test sets, the prior beside it."""
        return [self.answered(name, source, mesh) for name, source in self.sets.tests.items()]

    def answered(self, name: str, source: Source, mesh: Mesh) -> VqaEvaluator:
        """VQA's accuracy on a source; its questions about a picture share the encoding of it."""
        groups, ops, batch = self.grouped(source)
        train = [] if self.sets.train is None else [self.sets.train]
        asked, on_corrupt = (self.context, ANSWERED, self.answer), self.config.data.on_corrupt
        return VqaEvaluator(groups, ops, *asked, mesh, batch, self.vocabulary, name, train, on_corrupt)

    def grouped(self, source: Source) -> tuple[QuestionGroups, str, int]:
        """Questions by picture, the ops that make `ANSWERED` of them, and how many pictures are looked at at once."""
        places = min(int(np.bincount(picture_numbers(source)).max()), MOST_PLACES)
        ops = f"{self.eval_ops}|each_question({places}, targets=False)"
        return QuestionGroups(source, places), ops, max(self.config.eval.batch_size // places, 1)

    @property
    def context(self) -> dict[str, Any]:
        """What the ops need."""
        return {"tokenizer": self.fusion.tokenizer, "answers": self.vocabulary}

    def answer(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """{"answer_logits" (B, Q, A), "attention" (B, Q, T)} of pictures with Q questions each."""
        tokens = self.fusion.encode(params, self.seen(batch["image"]))["image_tokens"]
        texts = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in OF_QUESTIONS}
        out = self.fusion.fuse(params, {"image_tokens": tokens} | texts)
        rows = batch["text"].shape[:2]
        return {name: out[name].reshape(*rows, -1) for name in ("answer_logits", "attention")}

    def seen(self, image: jax.Array) -> jax.Array:
        """What the model is shown of pictures uint8 (B, H, W, 3): them, or blind, the mean colour instead of all."""
        if not self.config.blind:
            return image
        colour = np.round(255 * np.array(self.fusion.encoder.model.config.image_mean)).astype(np.uint8)
        return jnp.broadcast_to(jnp.asarray(colour)[None, None, None], image.shape)


class Vqa(VqaSuite, FusionTask):
    """Training on the questions of `config.data.train`, on the fusion of `config.init`, or on its towers alone.

    Attributes:
      places: questions of an image that share its encoding; a batch has so many of each of its images.

    Raises:
      UserError: as `VqaSuite`; for answers that do not make a vocabulary, too few images to hold any out.
    """

    charts = (Chart("loss", {"": "loss"}), Chart("accuracy in training", {"": "accuracy"}))

    def __init__(self, config: ConfigDict):
        if config.answers.match not in MATCHES:
            raise UserError(f"config.answers.match={config.answers.match!r}: choose one of {', '.join(MATCHES)}")
        super().__init__(config)
        self.places = self.sets.places(config.questions_per_image)
        self.groups = None if self.sets.train is None else QuestionGroups(self.sets.train, self.places)
        images = None if self.groups is None else len(self.groups)
        self.plan = make_plan(
            config, images, question_recipe(images, self.places, self.fusion.trained, config.batch_size)
        )
        flops = self.fusion.model.flops
        self.flops_per_example = 3.0 * (flops["image"] + self.places * (flops["text"] + flops["fusion"]))

    def _open_sets(self) -> QuestionSets:
        return QuestionSets(self.config)

    def _answers(self) -> Sequence[str]:
        if self.sets.train is None:
            return () if self.config.init else UNNAMED_ANSWERS
        vocabulary = self.sets.vocabulary(self.config.answers)
        if jax.process_index() == 0:
            for note in vocabulary.notes:
                print(note, flush=True)
        return vocabulary.answers

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`. The answers are those of the data."""
        options = make_identity(self.config, "holdout", "answers.match", "data.train_ops")
        return {**super().identity, **options, "answers": list(self.fusion.answers), "questions_per_image": self.places}

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Each of the test sets; beside it what the towers know without a fusion, and what a small network learns."""
        found: list[Evaluator] = []
        small = self._small_network()
        for name, source in self.sets.tests.items():
            found += self._with_towers(name, source, mesh)
            if small is not None:
                tested, _, batch = self.grouped(source)
                found.append(SmallNetworkAnswers(name, tested, small, mesh, batch))
        return found

    def _small_network(self) -> SmallNetwork | None:
        config, seconds = self.config, self.config.small_network.seconds
        if not seconds or self.groups is None:
            return None
        data = (self.groups, config.data.train_ops, config.answers.match)
        return SmallNetwork(*data, self.fusion.tokenizer, self.vocabulary, seconds, config.seed)

    def _with_towers(self, name: str, source: Source, mesh: Mesh) -> Sequence[Evaluator]:
        evaluator, config, groups = self.answered(name, source, mesh), self.config, self.groups
        folder = config.towers_only.init or towers_folder(self.fusion, config.init)
        if not folder or groups is None or not config.towers_only.pictures or config.blind:
            return [evaluator]
        encoder, load = grown_towers(folder, self.fusion.encoder)
        read = of_questions(encoder.predict["text"])

        def embed(params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            image = encoder.predict["image"](params, {"image": batch["image"]})
            return {"image": image, "text": read(params, batch)}

        tested, ops, batch = self.grouped(source)
        train, _, _ = self.grouped(self.sets.train) if self.sets.train is not None else (groups, "", 0)
        given = (self.context, embed, load, mesh, batch, self.vocabulary, config.towers_only.pictures)
        return [evaluator, TowersOnly(name, tested, train, ops, *given)]

    # -- model ------------------------------------------------------------------------------------------------------

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Binary cross entropy summed over the answers, the mean over the questions of the global batch."""
        micro, image = self.config.micro_batch, self.seen(batch["image"])
        found = self.fusion.encode(params, image, "image" not in self.frozen, key, micro.images)
        rows = {name: batch[name] for name in MADE_OF_QUESTIONS if name in batch and name != "left_out"}
        rows |= {"own": found["image_tokens"], "example": jnp.arange(len(image))}
        function = functools.partial(question_sums, self.fusion, key=jax.random.fold_in(key, 2))
        sums = summed(function, params, rows, micro.texts)
        left_out = batch["left_out"].sum().astype(jnp.float32)
        told = {"accuracy": sums.accuracy, "questions": sums.number, "questions_left_out": left_out}
        return sums.mean, told

    # -- data -------------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`. A row is an image with its questions."""
        size, places, model = self.plan.batch_size, self.places, self.fusion.encoder.model.config
        of = jax.ShapeDtypeStruct
        shapes = {
            "image": of((size, model.res, model.res, 3), jnp.uint8),
            "text": of((size, places, self.fusion.text_length), jnp.int32),
            "text_length": of((size, places), jnp.int32),
            "answer_labels": of((size, places, 10), jnp.int32),
            "answer_scores": of((size, places, 10), jnp.float32),
            "asked": of((size, places), jnp.bool_),
            "left_out": of((size,), jnp.int32),
            "corrupt": of((size,), jnp.int32),
        }
        return (shapes,)

    def train_data(self) -> TrainData:
        """See `Task`."""
        if self.groups is None:
            raise UserError("nothing to train on: give --config.data.train=DATA")
        ask = f"each_question({self.places}, {self.config.answers.match})"
        ops = f"{self.train_ops}|{ask}|keep(image, {', '.join(MADE_OF_QUESTIONS)})"
        return TrainData([self.groups], None, ops, self.context)


def question_sums(
    fusion: FusedTowers, params: Params, rows: Mapping[str, jax.Array], key: jax.Array | None = None
) -> LossSums:
    """Loss of the questions about some images: each image is encoded once, and each question draws its own dropout.

    Args:
      fusion, params: of the model.
      rows: of n images with Q questions each: "own" (n, T, C), tokens of the images, "example" (n,), and
        `MADE_OF_QUESTIONS` (n, Q, ...).
      key: of dropout; None: as in evaluation.
    """
    places = rows["text"].shape[1]

    def flat(name: str) -> jax.Array:
        return rows[name].reshape(-1, *rows[name].shape[2:])

    examples = rows["example"][:, None] * places + jnp.arange(places)[None]
    inputs = {"image_tokens": rows["own"], "example": examples.reshape(-1)}
    inputs |= {name: flat(name) for name in ("text", "text_length")}
    out = fusion.fuse(params, inputs, key is not None, key)
    return answer_loss(out["answer_logits"], flat("answer_labels"), flat("answer_scores"), flat("asked"))
