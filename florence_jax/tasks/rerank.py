"""Retrieval by two towers, its first results put in order by a fusion."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.rerank import Reranking
from florence_jax.models.base import Params
from florence_jax.tasks.base import Suite, make_identity
from florence_jax.tasks.fusion import describe_fusion, fusion_identity, grown_towers, open_fusion, towers_folder

MATCHING = "itm"


class RerankSuite(Suite):
    """Re-ranking of `config.eval.source` by the fusion of `config.init`.

    Raises:
      UserError: for weights without a head of matches, and where there is nothing to search.
    """

    name = "vqa"

    def __init__(self, config: ConfigDict):
        self.config = config
        if not config.eval.source:
            raise UserError("re-ranking needs pairs to search: give them with --config.eval.source=DATA")
        self.fusion = open_fusion(config, ())
        if MATCHING not in self.fusion.heads:
            raise UserError(
                f"{config.init} holds no head of matches: give weights of configs/vlp.py with --config.init=DIR"
            )
        res = str(self.fusion.encoder.model.config.res)
        ops = config.data.eval_ops or self.fusion.part.get("eval_ops", "decode|resize_exact({res})")
        self.eval_ops = ops.replace("{res}", res)
        self.towers = config.rerank.towers or towers_folder(self.fusion, config.init)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        given = make_identity(self.config, "protocol", "init", "eval.source", "rerank.k")
        resolved = {"rerank.towers": self.towers, "data.eval_ops": self.eval_ops}
        return given | resolved | fusion_identity(self.fusion)

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return describe_fusion(self.name, self.fusion, self.config, eval_ops=self.eval_ops)

    def load(self, mesh: Mesh) -> Params:
        """The fusion of `config.init`."""
        return self.fusion.load_on(mesh, self.config.mesh.sharding_rules)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """R@k before and after."""
        config = self.config
        encoder, load = grown_towers(self.towers, self.fusion.encoder)
        embedder = Embedder(encoder.predict, encoder.tokenizer, mesh, config.eval.batch_size)
        return [
            Reranking(
                "rerank",
                open_source(config.eval.source),
                self.eval_ops,
                embedder,
                load,
                self.fusion.tokenizer,
                self._encode,
                self._score,
                mesh,
                config.eval.batch_size,
                config.rerank.k,
                config.data.on_corrupt,
            )
        ]

    def _encode(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {"tokens": self.fusion.encode(params, batch["image"])["image_tokens"]}

    def _score(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        inputs = {name: batch[name] for name in ("image_tokens", "text", "text_length")}
        logits = self.fusion.fuse(params, inputs)["itm_logits"]
        return {"score": logits[:, 1] - logits[:, 0]}
