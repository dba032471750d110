"""Image-text retrieval with trained weights: the pretraining task, started from a checkpoint folder."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.records import Source
from florence_jax.data.sources.catalog import open_mixture, open_source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.retrieval import open_retrieval
from florence_jax.params.weights import checkpoint_folder, load_parameters
from florence_jax.tasks.encoder import Encoder, record_model, set_epochs
from florence_jax.tasks.pretrain import Pretrain


class Retrieve(Pretrain):
    """The `Task` of configs/retrieve.py.

    Raises:
      UserError: as `Pretrain`, and for missing weights or ones without a text tower.
    """

    def __init__(self, config: ConfigDict):
        encoder = Encoder(config.init, config.model.overrides, config.text.tokenizer, config.precision)
        if not encoder.has_text:
            raise UserError(f"{config.init} holds no text tower: retrieval needs weights of both towers")
        _ = encoder.tokenizer  # raises where nobody named it
        if not config.eval.source:
            raise UserError("retrieval needs pairs to search: give them with --config.eval.source=DATA")
        record_model(config, encoder)
        if config.mode == "train":
            sources, _ = open_mixture(config.data.train)
            config.data.captions = config.data.captions or _caption_field(sources[0])
            set_epochs(config, sum(len(source) for source in sources))
        else:
            config.data.train = config.eval.source  # nothing is trained
            config.data.captions = config.data.captions or _caption_field(open_source(config.eval.source))
        super().__init__(config)

    def start(self, params: Any) -> Any:
        """The parameters of `config.init`: the moving average where that run kept one, as everywhere but in training
        that goes on.
        """
        return load_parameters(checkpoint_folder(self.config.init), params)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Retrieval on `config.eval.source`."""
        embedder = Embedder(self.predict, self.tokenizer, mesh, self.config.eval.batch_size)
        source, ops = open_source(self.config.eval.source), self.config.data.eval_image_ops
        return [open_retrieval("held_out", source, ops, embedder)]


def _caption_field(source: Source) -> str:
    """'captions=1' where the records have that list, else 'caption=1'."""
    first = next(iter(source.metadata()), {})
    return "captions=1" if isinstance(first.get("captions"), list) else "caption=1"
