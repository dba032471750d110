"""How well a fusion tells which image a text belongs to, and finds words behind masks: on held-out pairs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.records import Source, record_thumbnail
from florence_jax.evaluators.base import Chart, SourceEvaluator
from florence_jax.evaluators.predictor import Predictor, image_counts
from florence_jax.page import figure_html

PAIRING_GROUP = 8  # rows of the set, within which the other image of a text is looked for; of a batch a multiple
WORST_SHOWN = 12  # pictures of each kind in the report


class MatchAndWords(SourceEvaluator):
    """ITM and MLM of held-out pairs.

    Each text is judged twice, beside its own image and beside another one of the set, that of one of the next rows,
    whose caption differs: half matches. Masked words are guessed twice likewise: what an image is worth shows beside a
    wrong one. Results: 'itm_accuracy' with its standard error 'itm_stderr', 'mlm_accuracy' (of masked words) with
    'mlm_stderr' and 'mlm_accuracy_other_image'; 'words', 'images', and 'unpaired', pairs that found no other image.

    Args:
      name: prefix of the results.
      source: pairs. ops, context: what makes a batch of them, see `tasks.vlp`.
      judge: (params, batch) -> "partner", "paired", and "match", "right_words", "words" of the heads that there are,
        see `tasks.vlp.match_and_words`.
      mesh: of the devices. batch_size: texts a call, made a multiple of `PAIRING_GROUP`.
      on_corrupt: 'skip' or 'error'.
    """

    charts: Sequence[Chart]

    def __init__(
        self,
        name: str,
        source: Source,
        ops: str,
        context: Mapping[str, Any],
        judge: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
        batch_size: int,
        on_corrupt: str = "skip",
    ):
        super().__init__(name, source)
        self.charts = (
            Chart(f"{name}: image-text match", {"": "itm_accuracy"}),
            Chart(
                f"{name}: masked words", {"right image": "mlm_accuracy", "another image": "mlm_accuracy_other_image"}
            ),
        )
        self._chance = {"itm_accuracy": 0.5}  # half of the texts match
        self._ops, self._context, self._on_corrupt = ops, dict(context), on_corrupt
        self._predictor = Predictor(judge, mesh, -(-batch_size // PAIRING_GROUP) * PAIRING_GROUP)

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        rows = list(
            self._predictor.rows(
                params, self._source, self._ops, self._context, host=("caption",), on_corrupt=self._on_corrupt
            )
        )
        found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        paired = found["paired"]
        results = image_counts(self._source, found["index"])
        results |= {"unpaired": float((~paired).sum())} if not paired.all() else {}
        self._report = []
        if "match" in found and paired.any():
            match = found["match"][paired]
            right = np.stack([match[:, 0] > 0.5, match[:, 1] <= 0.5], 1).mean(1)
            results |= {"itm_accuracy": float(right.mean()), "itm_stderr": error_of_mean(right)}
            self._report = [self._worst({name: values[paired] for name, values in found.items()})]
        if "words" in found and found["words"][paired].any():
            words, right = found["words"][paired], found["right_words"][paired]
            shares = right.sum(0) / words.sum()
            # Of a ratio of sums: by the deviations of the texts, each with all its words.
            error = np.sqrt(np.square(right[:, 0] - shares[0] * words).sum()) / words.sum()
            results |= {
                "mlm_accuracy": float(shares[0]),
                "mlm_stderr": float(error),
                "mlm_accuracy_other_image": float(shares[1]),
                "words": float(words.sum()),
            }
        return results

    def _worst(self, found: Mapping[str, np.ndarray]) -> str:
        """Texts that the model finds no match for their own image, and ones that it finds one for another's."""
        own, other = found["match"][:, 0], found["match"][:, 1]
        missed, taken = np.argsort(own, kind="stable")[:WORST_SHOWN], np.argsort(-other, kind="stable")[:WORST_SHOWN]
        parts = [f"<h2>{self.name}: the worst matches</h2><p>Captions that are not found to match their own image:</p>"]
        parts.append(self._tiles(found["caption"][missed], found["index"][missed], own[missed]))
        parts.append("<p>Captions that are found to match an image that is not theirs:</p>")
        parts.append(self._tiles(found["caption"][taken], found["partner"][taken], other[taken]))
        return "\n".join(parts)

    def _tiles(self, captions: np.ndarray, images: np.ndarray, match: np.ndarray) -> str:
        figures = [
            figure_html([record_thumbnail(self._source, int(image))], caption, f"match {share:.2f}")
            for caption, image, share in zip(captions, images, match, strict=True)
        ]
        return f'<div class="tiles">{"".join(figures)}</div>'


def error_of_mean(values: np.ndarray) -> float:
    """Of the mean of (n,) values; 0 of one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
