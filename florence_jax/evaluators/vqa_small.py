"""What a small network learns of the same questions in the same time, without any pretraining."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from florence_jax.data.answers import AnswerVocabulary
from florence_jax.data.ops.questions import MADE_OF_QUESTIONS
from florence_jax.data.pipeline import TrainData, train_stream
from florence_jax.data.sources.question_groups import QuestionGroups
from florence_jax.data.tokenizers import Tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.predictor import Predictor
from florence_jax.evaluators.vqa_scores import judge_answers, standard_error
from florence_jax.losses.language import class_loss
from florence_jax.models.base import Params
from florence_jax.models.picture_words import PictureWordsConfig, build_picture_words

ADAM_RATE = 5e-4  # Adam's, easy-VQA's own
QUESTIONS_A_STEP = 64  # about, and at least those of one picture


class SmallNetwork:
    """The network of `models.picture_words`, trained when it is first asked for, on the questions of a training.

    Args:
      train: pictures with questions, see `data.sources.question_groups`.
      picture_ops: of a record, up to its "image"; '{res}' in them is the network's.
      match: of the answers, see op 'each_question'.
      tokenizer: of the questions. vocabulary: the answers.
      seconds: how long it learns, without compilation. seed: of its order and parameters.

    Raises:
      UserError: for less than 0 seconds, or several processes, which would not stop at the same step.
    """

    def __init__(
        self,
        train: QuestionGroups,
        picture_ops: str,
        match: str,
        tokenizer: Tokenizer,
        vocabulary: AnswerVocabulary,
        seconds: float,
        seed: int,
    ):
        if seconds < 0:
            raise UserError(f"config.small_network.seconds={seconds} must be above 0, or 0 for none")
        if jax.process_count() > 1:
            raise UserError("config.small_network.seconds is for one process: leave it 0 where there are several")
        self.vocabulary, self.context = vocabulary, {"tokenizer": tokenizer, "answers": vocabulary}
        config = PictureWordsConfig(len(vocabulary), tokenizer.masked_vocab_size, tokenizer.length)
        self.model = build_picture_words(config)
        self.picture_ops = picture_ops.replace("{res}", str(config.res))
        made = ", ".join(name for name in MADE_OF_QUESTIONS if name != "left_out")
        ops = f"{self.picture_ops}|each_question({train.places}, {match})|keep(image, {made})"
        self._data = TrainData([train], None, ops, self.context)
        self._batch_size = min(max(QUESTIONS_A_STEP // train.places, 1), len(train))
        self._seconds, self._seed = seconds, seed

    def logits(self, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        """float32 (B, Q, answers) of pictures uint8 with Q questions each."""
        res, image = self.model.config.res, batch["image"]
        image = jax.image.resize(image.astype(jnp.float32), (len(image), res, res, 3), "linear") / 255 - 0.5
        return self.model.apply(params, {"image": image} | {name: batch[name] for name in ("text", "text_length")})[
            "answer_logits"
        ]

    @functools.cached_property
    def params(self) -> Params:
        """Of the trained network."""
        optimizer = optax.adam(ADAM_RATE)

        def loss(params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
            scores = batch["answer_scores"]
            best = jnp.take_along_axis(batch["answer_labels"], scores.argmax(-1)[..., None], axis=-1)[..., 0]
            labels = jnp.where(batch["asked"], best, -1)
            return class_loss(self.logits(params, batch).reshape(-1, len(self.vocabulary)), labels.reshape(-1)).mean

        @jax.jit
        def step(params: Params, state: Any, batch: Mapping[str, jax.Array]) -> tuple[Params, Any, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        params = jax.jit(self.model.init)(jax.random.key(self._seed))
        state, steps, ends = optimizer.init(params), 0, 0.0
        with train_stream(self._data, batch_size=self._batch_size, seed=self._seed, cache=True) as stream:
            for batch in stream:
                batch.pop("corrupt")
                params, state, value = step(params, state, batch)
                value.block_until_ready()  # else far more steps would be asked for than the time has
                ends, steps = ends or time.monotonic() + self._seconds, steps + 1
                if time.monotonic() >= ends:
                    break
        print(
            f"small network: {steps:,} steps of {self._batch_size} pictures in {self._seconds:g} s, last loss "
            f"{float(value):.3f}",
            flush=True,
        )
        return params


class SmallNetworkAnswers(Evaluator):
    """The same questions answered by a `SmallNetwork`.

    Results: 'small_network_accuracy', 'small_network_accuracy_stderr'; measured once.

    Args:
      name: of the evaluator that it stands beside.
      source: pictures with questions, see `data.sources.question_groups`.
      network: trained for this when it is first asked.
      mesh, batch_size: see `Predictor`.
    """

    def __init__(self, name: str, source: QuestionGroups, network: SmallNetwork, mesh: Mesh, batch_size: int):
        self.name, self._source, self._network = name, source, network
        made = f"each_question({source.places}, targets=False)|keep(image, text, text_length, questions)"
        self._ops = f"{network.picture_ops}|{made}"

        def best(params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            return {"answers": network.logits(params, batch).argmax(-1)}

        self._predictor = Predictor(best, mesh, batch_size)
        self._results: dict[str, float] = {}

    def run(self, params: Any) -> dict[str, float]:
        """See the class; what is trained does not matter."""
        del params
        if self._results:
            return self._results
        asked, said = [], []
        rows = self._predictor.rows(
            self._network.params, self._source, self._ops, self._network.context, host=("questions",),
            on_corrupt="skip", what=f"{self.name} small network",
        )  # fmt: skip
        for row in rows:
            asked += row["questions"]
            said += [self._network.vocabulary.answers[k] for k in row["answers"][: len(row["questions"])].tolist()]
        judged = judge_answers(asked, said)
        if len(judged.accuracy):
            accuracy = float(judged.accuracy.mean())
            self._results = {
                "small_network_accuracy": accuracy,
                "small_network_accuracy_stderr": standard_error(judged),
            }
        return self._results
