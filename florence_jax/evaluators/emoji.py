"""Evaluation on the held-out splits of the embedded emoji set: zero-shot groups and names, retrieval."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from florence_jax.data.prompts import TEMPLATES
from florence_jax.data.records import record_thumbnail
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.embedded import EMOJI_SPLITS
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.metrics import recall_chance, recalls, retrieval_chance
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.retrieval import matches_report, positive_ranks, two_way_recalls
from florence_jax.evaluators.zero_shot import class_embeddings

# Names have few words each but there are many of them: seven prompts a name, chosen before any was tried.
NAME_TEMPLATES = (
    "{}",
    "{}.",
    "a photo of a {}.",
    "a drawing of a {}.",
    "a rendering of a {}.",
    "art of the {}.",
    "itap of a {}.",
)


class EmojiSplit(Evaluator):
    """One held-out split. Results, all shares of the pictures:

    'group_top1': the nearest of the 8 groups by prompt ensembles; 'name_top1', 'name_r@5', 'name_r@10': the right name
    among the first 1, 5, 10 of the candidates by prompt ensembles; 'i2t_r@k', 't2i_r@k': retrieval between the
    pictures and the bare names of the split.

    Args:
      split: 'new_style' (candidates: all names of the set) or 'new_names' (candidates: the names of the split).
      ops: image ops that give the model's input size.
      embedder: of the model.
    """

    def __init__(self, split: str, ops: str, embedder: Embedder):
        self.name = split
        self.charts = (Chart(f"{split}: right at first", {"group": "group_top1", "name": "name_top1"}),)
        self._source, self._embedder = open_source(f"emoji:{split}"), embedder
        self._ops = f"{ops}|keep(image)"
        rows = list(self._source.metadata())
        if split == "new_names":
            candidates = {row["caption"] for row in rows}
        else:
            sources = [open_source(f"emoji:{name}") for name in EMOJI_SPLITS]
            candidates = {row["caption"] for source in sources for row in source.metadata()}
        self._names = sorted(candidates)
        self._groups = sorted({row["group"] for row in open_source("emoji:train").metadata()})
        self._name_ids = np.array([self._names.index(row["caption"]) for row in rows])
        self._group_ids = np.array([self._groups.index(row["group"]) for row in rows])
        one = np.ones(1)
        self._chance = {"group_top1": 1 / len(self._groups)}
        self._chance |= {
            name: recall_chance(one, len(self._names), k) for name, k in (("name_top1", 1), ("name_r@5", 5))
        }
        self._chance |= {"name_r@10": recall_chance(one, len(self._names), 10)}
        self._chance |= retrieval_chance(self._name_ids, np.unique(self._name_ids))
        self._report: list[str] = []

    @property
    def chance(self) -> Mapping[str, float]:
        """What guessing scores."""
        return self._chance

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        images = self._embedder.images(params, self._source, self._ops)["embedding"]
        groups = class_embeddings(self._embedder, params, self._groups, TEMPLATES)
        names = class_embeddings(self._embedder, params, self._names, NAME_TEMPLATES)
        present = np.unique(self._name_ids)
        texts = self._embedder.texts(params, [self._names[i] for i in present], f"{self.name} names")
        group_ranks = positive_ranks(images, groups, self._group_ids, np.arange(len(groups)))
        name_ranks = positive_ranks(images, names, self._name_ids, np.arange(len(names)))
        results = {"group_top1": float((group_ranks == 0).mean()), "name_top1": float((name_ranks == 0).mean())}
        results |= recalls(name_ranks, "name_", (5, 10))
        results |= two_way_recalls(images, texts, self._name_ids, present)
        pictures = [record_thumbnail(self._source, i) for i in range(len(self._source))]
        self._report = [matches_report(self.name, images, pictures, self._name_ids, names, self._names)]
        return results

    def report(self) -> list[str]:
        """Grids image -> names and name -> images."""
        return self._report
