"""Fine-tuning for classification: with the UniCL loss on class prompts, or with a linear head."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.classes import ClassIndex
from florence_jax.data.pipeline import TrainData
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.classification import Classification
from florence_jax.evaluators.finetuning import Forgetting, Interpolated
from florence_jax.evaluators.zero_shot import class_embeddings, open_zero_shot
from florence_jax.losses.unicl import unicl
from florence_jax.models.base import Params
from florence_jax.params.layer_decay import layer_decay_rules
from florence_jax.params.rules import Policy
from florence_jax.params.sharding import param_shardings
from florence_jax.tasks.base import Task, frozen_parts, make_plan
from florence_jax.tasks.classify import ClassificationSuite
from florence_jax.tasks.encoder import text_inputs
from florence_jax.tasks.linear_head import ENTRY, LinearHead
from florence_jax.tasks.pretrain import IN_BATCH, LOGIT_SCALE, clamp_logit_scale

HEAD_INITS = ("zeros", "text")


class FineTune(ClassificationSuite, Task):
    """What both ways share: the plan, the layers' learning rates, the evaluators."""

    unused: tuple[str, ...] = ()  # entries of the parameters that the loss does not reach

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        if not all(0 <= alpha < 1 for alpha in config.wise_ft):
            raise UserError(f"config.wise_ft={config.wise_ft}: shares of the fine-tuned weights from 0 to below 1")
        if config.wise_ft and not config.init:
            raise UserError("config.wise_ft mixes in the first weights: give them with --config.init=DIR")
        self.plan = make_plan(config, None if self.train_source is None else len(self.train_source))

    @functools.cached_property
    def policy(self) -> Policy:
        """What the loss does not reach is frozen, the rest has layer decay."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        rest = {name: tree for name, tree in shapes.items() if name not in self.unused}
        frozen = ((rf"{name}(/.*)?", 0.0) for name in self.unused)
        return Policy(lr=(*frozen, *layer_decay_rules(rest, self.config.optim.layer_decay)))

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """See `frozen_parts`."""
        return frozen_parts(self, self.config)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return {**super().identity, "data.train_ops": self.train_ops}

    def encode(self, params: Params, inputs: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """The towers' outputs in training."""
        train = "image" not in self.frozen
        return self.encoder.model.apply(params, inputs, train=train, rngs={"drop_path": key})

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of the towers."""
        return self.encoder.init(key)

    def start(self, params: Params) -> Params:
        """The folder's parameters."""
        return self.encoder.load(params)

    def project(self, params: Params) -> Params:
        """Clamps the logit scale to CLIP's range."""
        return clamp_logit_scale(params)

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`."""
        size, res = self.plan.batch_size, self.encoder.model.config.res
        shapes = {
            "image": jax.ShapeDtypeStruct((size, res, res, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
            "corrupt": jax.ShapeDtypeStruct((size,), jnp.int32),
        }
        return (shapes,)

    def train_data(self) -> TrainData:
        """Images with their classes."""
        if self.train_source is None:
            raise UserError("nothing to train on: give --config.data.train=DATA")
        ops = f"{self.train_ops}|class_label|keep(image, label)"
        return TrainData([self.train_source], None, ops, {"classes": self.classes})

    # -- evaluation -------------------------------------------------------------------------------------------------

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """Classification of the test set, also by interpolated weights, and the zero-shot watch."""
        config, watch = self.config, self.config.forgetting
        found: list[Evaluator] = [self.test_evaluator("test", mesh)]
        for alpha in config.wise_ft:
            found.append(Interpolated(self.test_evaluator(f"test_wise{alpha:g}", mesh), self.start, alpha))
        if watch.source and self.encoder.can_embed_text and config.init:
            embedder = self.embedder(mesh)
            inner = open_zero_shot("forgetting", watch.source, self.eval_ops, embedder, watch.classes, "skip")
            found.append(Forgetting(inner, self.start, watch.threshold))
        return found

    def test_evaluator(self, name: str, mesh: Mesh) -> Classification:
        """Of the test images."""
        return self.zero_shot(name, mesh)


class FineTuneUniCL(FineTune):
    """The paper's way: no new head, each image against the prompts of all classes in the batch.

    Raises:
      UserError: as `ClassificationSuite`; for data with several classes an image.
    """

    needs_text = True
    charts = (*IN_BATCH, LOGIT_SCALE)

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        if self.classes is not None and self.classes.multi:
            raise UserError("finetune_unicl needs one class an image; use protocol=finetune_linear for several")
        self.flops_per_example = 3.0 * sum(self.encoder.model.flops.values())

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`."""
        (shapes,) = super().batches
        length = self.encoder.model.config.text_length
        text = {
            "text": jax.ShapeDtypeStruct((self.plan.batch_size, length), jnp.int32),
            "text_length": jax.ShapeDtypeStruct((self.plan.batch_size,), jnp.int32),
        }
        return ({**shapes, **text},)

    def train_data(self) -> TrainData:
        """Images with a prompt of their class."""
        data = super().train_data()
        ops = f"{self.train_ops}|class_label|class_prompt|tokenize|keep(image, text, text_length, label)"
        context = {**data.context, "templates": self.templates, "tokenizer": self.encoder.tokenizer}
        return data._replace(ops=ops, context=context)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UniCL over images and class prompts, labels being classes."""
        inputs = {"image": self.encoder.normalise(batch["image"]), **text_inputs(batch)}
        out = self.encode(params, inputs, key)
        labels = batch["label"][:, None]
        loss, metrics = unicl(out["image/embedding"], out["text/embedding"], labels, out["logit_scale"])
        return loss, metrics | {"logit_scale": out["logit_scale"]}


class FineTuneLinear(FineTune):
    """A linear head on the features, from zeros; or on the embedding, from the class embeddings of the prompts.

    With the latter the head's first answers are the zero-shot ones (Wortsman et al. 2022; ELEVATER).

    Raises:
      UserError: as `ClassificationSuite`; for an unknown `config.head_init`.
    """

    charts = (Chart("accuracy of the head on the batch", {"": "accuracy"}),)

    def __init__(self, config: ConfigDict):
        if config.head_init not in HEAD_INITS:
            raise UserError(f"config.head_init={config.head_init!r} is unknown; choose 'zeros' or 'text'")
        self.from_text = self.needs_text = config.head_init == "text"
        others = ("text", "text_projection", "logit_scale")
        self.unused = others if self.from_text else (*others, "image_projection")
        super().__init__(config)
        if config.wise_ft and not self.from_text:
            raise UserError("config.wise_ft with a linear head needs --config.head_init=text: a zero head is no start")
        if self.from_text and not config.init:
            raise UserError("config.head_init='text' needs weights, --config.init=DIR")
        self.predict["logits"] = self._logits
        self.flops_per_example = 3.0 * self.encoder.model.flops["image"]

    @property
    def _known_classes(self) -> ClassIndex:
        if self.classes is None:
            raise UserError("how many classes has the head? Give --config.data.train=DATA, or --config.classes=NAMES")
        return self.classes

    @functools.cached_property
    def head(self) -> LinearHead:
        """What is trained on top of the towers."""
        known = self._known_classes
        return LinearHead(len(known), "embedding" if self.from_text else "pooled", known.multi)

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """Towers, and the head."""
        return super().parts() | {ENTRY: self.head.part()}

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of the towers, and of the head, zeros."""
        return super().init(key) | {ENTRY: self.head.init(self.encoder.model.config)}

    def start(self, params: Params) -> Params:
        """The folder's parameters, and the head's start."""
        loaded = self.encoder.load(params, new=(ENTRY,))
        places = jax.tree.map(lambda leaf: leaf.sharding, params[ENTRY])
        return loaded | {ENTRY: self._first_head(loaded, places["weight"].mesh, places)}

    def load(self, mesh: Mesh) -> Params:
        """As `start`: what is evaluated before anything is trained."""
        loaded, shapes = super().load(mesh), jax.eval_shape(self.init, jax.random.key(0))
        places = param_shardings(shapes, mesh, policy=self.config.mesh.sharding_rules)
        return loaded | {ENTRY: self._first_head(loaded, mesh, places[ENTRY])}

    def _first_head(self, loaded: Params, mesh: Mesh, places: Params) -> Params:
        """Zeros or class embeddings, each leaf where `places` says."""
        head: Params = self.head.init(self.encoder.model.config)
        if self.from_text:
            names = self._known_classes.names
            head["weight"] = class_embeddings(self.embedder(mesh), loaded, names, self.templates).T
        return jax.device_put(head, places)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross entropy of the head; with several classes an image, of each class against the rest."""
        inputs = {"image": self.encoder.normalise(batch["image"])}
        logits = self.head.logits(params, self.encode(params, inputs, key))
        if self._known_classes.multi:
            known = (batch["label"] >= 0).astype(jnp.float32)
            entropy = optax.sigmoid_binary_cross_entropy(logits, (batch["label"] > 0).astype(jnp.float32))
            return (entropy * known).sum() / jnp.maximum(known.sum(), 1.0), {}
        smooth = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[1]), self.config.label_smoothing)
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        return optax.softmax_cross_entropy(logits, smooth).mean(), {"accuracy": right}

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`."""
        (shapes,) = super().batches
        if not self._known_classes.multi:
            return (shapes,)
        targets = jax.ShapeDtypeStruct((self.plan.batch_size, len(self._known_classes)), jnp.int8)
        return ({**shapes, "label": targets},)

    def test_evaluator(self, name: str, mesh: Mesh) -> Classification:
        """By the head's scores."""
        return self.by_head(name, mesh)

    def _logits(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        out = self.encoder.model.apply(params, {"image": self.encoder.normalise(batch["image"])})
        return self.head.logits(params, out)
