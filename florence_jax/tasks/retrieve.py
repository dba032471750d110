"""Image-text retrieval with trained weights: as they are, or trained further on pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.tokenizers import Tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.predictor import Embedder
from florence_jax.models.base import Model, Params
from florence_jax.params.weights import checkpoint_folder, load, make_description
from florence_jax.tasks.base import Plan, Suite, make_identity, make_plan, model_identity
from florence_jax.tasks.encoder import TOWER_RULES, Encoder, open_encoder
from florence_jax.tasks.pretrain import Pretrain, open_held_out


def open_towers(config: ConfigDict) -> Encoder:
    """Both towers of `config.init`.

    Raises:
      UserError: for missing weights or ones without a text tower, and where there is nothing to search.
    """
    encoder = open_encoder(config)
    if not encoder.has_text:
        raise UserError(f"{config.init} holds no text tower: retrieval needs weights of both towers")
    _ = encoder.tokenizer  # raises where nobody named it
    if not config.eval.source:
        raise UserError("retrieval needs pairs to search: give them with --config.eval.source=DATA")
    return encoder


class RetrievalSuite(Suite):
    """Zero-shot retrieval on `config.eval.source`.

    Raises:
      UserError: as `open_towers`.
    """

    name = "retrieve"

    def __init__(self, config: ConfigDict):
        if config.data.train:
            raise UserError("protocol 'zeroshot' trains nothing: give the pairs as --config.eval.source=DATA")
        self.config, self.encoder = config, open_towers(config)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        resolved = {"text.tokenizer": self.encoder.tokenizer_spec, "data.eval_ops": self.eval_ops}
        given = make_identity(self.config, "protocol", "init", "eval.source", "data.test")
        return given | resolved | model_identity(self.encoder.model)

    @property
    def eval_ops(self) -> str:
        """Image ops at the model's size: the configuration's, else those of the weights."""
        return (self.config.data.eval_ops or self.encoder.eval_ops).replace("{res}", str(self.encoder.model.config.res))

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        parts, source = {"towers": self.encoder.towers_part()}, {"init": self.config.init}
        return make_description(self.name, parts, tokenizer=self.encoder.tokenizer_spec, source=source)

    def load(self, mesh: Mesh) -> Params:
        """The weights of `config.init`."""
        return self.encoder.load_on(mesh, self.config.mesh.sharding_rules)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """See `pretrain.open_held_out`."""
        config, encoder = self.config, self.encoder
        embedder = Embedder(encoder.predict, encoder.tokenizer, mesh, config.eval.batch_size)
        return open_held_out(config, self.eval_ops, embedder)


class FineTuneRetrieval(Pretrain):
    """The pretraining task, started from trained weights and counted in epochs.

    Raises:
      UserError: as `Pretrain` and `open_towers`.
    """

    name = "retrieve"

    def open_model(self) -> tuple[Tokenizer, Model]:
        """The towers of `config.init`."""
        self.encoder = open_towers(self.config)
        self.default_eval_ops = self.encoder.eval_ops
        tokenizer = self.encoder.tokenizer
        assert tokenizer is not None  # `open_towers` wants texts
        return tokenizer, self.encoder.model

    def length(self) -> Plan:
        """In epochs of the training data."""
        known = bool(self.config.data.train)
        return make_plan(self.config, sum(len(source) for source in self.mixture[0]) if known else None)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return {**super().identity, **make_identity(self.config, "protocol")}

    @property
    def tokenizer_spec(self) -> str:
        """That of the weights, unless the configuration names one."""
        return self.encoder.tokenizer_spec

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return make_description(
            self.name,
            {"towers": self.encoder.towers_part()},
            tokenizer=self.tokenizer_spec,
            source={"init": self.config.init, "data": self.config.data.train},
        )

    def start(self, params: Params) -> Params:
        """The parameters of `config.init`: the moving average where that run kept one, as everywhere but in training
        that goes on.
        """
        return load(checkpoint_folder(self.config.init), params, TOWER_RULES, self.model.adapt)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """See `pretrain.open_held_out`."""
        embedder = Embedder(self.predict, self.tokenizer, mesh, self.config.eval.batch_size)
        return open_held_out(self.config, self.eval_ops, embedder)
