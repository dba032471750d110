"""What two towers know of the answer to a question without a fusion: logistic regression on their embeddings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.answers import AnswerVocabulary, majority_answer, normalise_answer
from florence_jax.data.records import Record, Source, Subset, evenly
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.predictor import Predictor
from florence_jax.evaluators.solvers.logistic import LogisticRegression
from florence_jax.evaluators.vqa_scores import judge_answers, standard_error

CHOICES_OF_C = (0.1, 1.0, 10.0, 100.0, 1000.0)
HELD_FOR_C = 5  # every fifth question


class TowersOnly(Evaluator):
    """The same questions answered from the embeddings of picture and question and their product.

    The regression is fitted once, on some questions of the training set, with their majority answers as classes; C is
    chosen on a fifth of them. Results: 'towers_accuracy', 'towers_accuracy_stderr'.

    Args:
      name: of the evaluator that it stands beside.
      source, train: pictures with questions, see `data.sources.question_groups`.
      ops, context: that make "image", "text", "text_length" of a record; without keep.
      embed: pure function (params, batch) -> {"image" (B, D), "text" (B, Q, D)}, unit vectors.
      load: gives the parameters of the towers on the devices of a mesh.
      mesh, batch_size: see `Predictor`.
      vocabulary: the answers.
      pictures: of the training set that are used, at most.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        train: Source,
        ops: str,
        context: Mapping[str, Any],
        embed: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
        load: Callable[[Mesh], Any],
        mesh: Mesh,
        batch_size: int,
        vocabulary: AnswerVocabulary,
        pictures: int,
    ):
        self.name, self._vocabulary, self._load, self._mesh = name, vocabulary, load, mesh
        self._train = Subset(train, evenly(len(train), pictures), train.name)
        self._source, self._context = source, context
        self._ops = f"{ops}|keep(image, text, text_length, questions)"
        self._predictor = Predictor(embed, mesh, batch_size)
        self._results: dict[str, float] = {}

    def run(self, params: Any) -> dict[str, float]:
        """See the class; what is trained does not matter."""
        del params
        if not self._results:
            towers = self._load(self._mesh)
            features, records = self._features(towers, self._train)
            numbers = [self._vocabulary.number(normalise_answer(majority_answer(record))) for record in records]
            labels = np.array(numbers, np.int32)
            weights, bias = self._fit(features[labels >= 0], labels[labels >= 0])
            tested, asked = self._features(towers, self._source)
            best = (tested @ weights + bias[None]).argmax(1)
            judged = judge_answers(asked, [self._vocabulary.answers[number] for number in best])
            if len(judged.accuracy):
                accuracy = float(judged.accuracy.mean())
                self._results = {"towers_accuracy": accuracy, "towers_accuracy_stderr": standard_error(judged)}
        return self._results

    def _features(self, params: Any, source: Source) -> tuple[np.ndarray, list[Record]]:
        """float32 (N, 3 D) of the questions, and their records."""
        features: list[np.ndarray] = []
        records: list[Record] = []
        rows = self._predictor.rows(
            params, source, self._ops, self._context, host=("questions",), on_corrupt="skip", what=f"{self.name} towers"
        )
        for row in rows:
            image, scale = row["image"], np.sqrt(row["image"].shape[-1])
            for text, record in zip(row["text"], row["questions"], strict=False):  # places may be left over
                features.append(scale * np.concatenate([image, text, scale * image * text]))
                records.append(record)
        return np.stack(features), records

    def _fit(self, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (3 D, K) and bias (K,)."""
        held = np.arange(len(labels)) % HELD_FOR_C == 0
        classes = len(self._vocabulary)
        fits = LogisticRegression(features[~held], labels[~held], classes, self._mesh).fit(CHOICES_OF_C)
        right = [
            float((fits.scores(k, features[held]).argmax(1) == labels[held]).mean()) for k in range(len(CHOICES_OF_C))
        ]
        best = LogisticRegression(features, labels, classes, self._mesh).fit([CHOICES_OF_C[int(np.argmax(right))]])
        return best.weights[0], best.bias[0]


def of_questions(embed: Callable[[Any, dict[str, jax.Array]], jax.Array]) -> Callable[..., jax.Array]:
    """A function of texts (B, L) for (B, Q, L): gives (B, Q, D)."""

    def run(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        names: Sequence[str] = ("text", "text_length")
        flat = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in names}
        found = embed(params, flat)
        return found.reshape(*batch["text"].shape[:2], -1)

    return run
