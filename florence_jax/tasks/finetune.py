"""Fine-tuning for classification: with the UniCL loss on class prompts, or with a linear head."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.classes import ClassIndex, hold_out, open_images
from florence_jax.data.pipeline import TrainData
from florence_jax.data.records import Source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.classification import Classification
from florence_jax.evaluators.finetuning import BesideProbe, Forgetting, Interpolated, Validation
from florence_jax.evaluators.probe import Fitted, LinearProbe
from florence_jax.evaluators.zero_shot import class_embeddings, open_zero_shot
from florence_jax.losses.unicl import unicl
from florence_jax.models.base import Params
from florence_jax.params.layer_decay import layer_decay_rules
from florence_jax.params.rules import Policy
from florence_jax.params.sharding import param_shardings
from florence_jax.tasks.base import EpochSelection, Task, frozen_parts, make_identity, make_plan
from florence_jax.tasks.classify import ClassificationSuite
from florence_jax.tasks.encoder import text_inputs
from florence_jax.tasks.linear_head import ENTRY, LinearHead, feature_width
from florence_jax.tasks.pretrain import IN_BATCH, LOGIT_SCALE, clamp_logit_scale
from florence_jax.tasks.recipe import LARGE, fine_tuning_recipe

HEAD_INITS = ("probe", "zeros", "text")
KEPT = ("best", "last")
CHOSEN_BY = "validation"  # prefix of the results that the parameters are chosen by


class FineTune(ClassificationSuite, Task):
    """What both ways share: the plan, the layers' learning rates, held-out images, the probe beside, the evaluators.

    Below `recipe.LARGE` images, and where `config.keep` or `config.validation` says so, the parameters that are kept
    are those which are best on held-out images. There the results of a linear probe of the first weights stand beside
    the fine-tuned ones.

    Attributes:
      validation_source: the held-out images, or None.

    Raises:
      UserError: as `ClassificationSuite`; for an unknown `config.keep`, and where no image can be held out.
    """

    unused: tuple[str, ...] = ()  # entries of the parameters that the loss does not reach

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.small = self.train_source is not None and len(self.train_source) < LARGE
        self._fitted: Fitted | None = None
        self._probed: Mapping[str, float] | None = None
        self.validation_source = self._hold_out()
        if self.validation_source is not None:
            # Of images that the weights were trained on the start remembers more than it knows.
            seen = not config.validation and self.encoder.description.source.get("data") == config.data.train
            images = len(self.validation_source)
            self.selection = EpochSelection(
                f"eval/{CHOSEN_BY}/{self.metric}", images, start=bool(config.init) and not seen
            )
        if not all(0 <= alpha < 1 for alpha in config.wise_ft):
            raise UserError(f"config.wise_ft={config.wise_ft}: shares of the fine-tuned weights from 0 to below 1")
        if config.wise_ft and not config.init:
            raise UserError("config.wise_ft mixes in the first weights: give them with --config.init=DIR")
        examples = None if self.train_source is None else len(self.train_source)
        recipe = fine_tuning_recipe(examples, feature_width(self.encoder.model.config), config.batch_size)
        self.plan = make_plan(config, examples, recipe)

    def _hold_out(self) -> Source | None:
        """The images to choose parameters by, which are taken from those to train on where the user names none."""
        config = self.config
        if config.keep not in ("", *KEPT):
            raise UserError(f"config.keep={config.keep!r} is unknown; choose 'best' or 'last'")
        by_default = "best" if self.small or config.validation else "last"
        if self.train_source is None or self.classes is None or (config.keep or by_default) == "last":
            return None
        if config.validation:
            return open_images(config.validation)
        instead = "--config.validation=DATA, or --config.keep=last"
        self.train_source, held = hold_out(self.train_source, self.classes, config.holdout, config.seed, instead)
        return held

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
        options = make_identity(self.config, "validation", "keep")
        return {**super().identity, **options, "data.train_ops": self.train_ops}

    @property
    def sources(self) -> Sequence[Source]:
        """See `Suite`."""
        return [*super().sources, *([] if self.validation_source is None else [self.validation_source])]

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
        """Of the test images, also by a probe and by interpolated weights, of those held out; the zero-shot watch."""
        config, watch = self.config, self.config.forgetting
        test, source = self.classification("test", mesh), self.validation_source
        found: list[Evaluator] = [test]
        if self.small and config.init:
            found = [BesideProbe(test, lambda params: self._probe_results(mesh))]
        if source is not None:
            found.append(Validation(self.classification(CHOSEN_BY, mesh, source)))
        for alpha in config.wise_ft:
            found.append(Interpolated(self.classification(f"test_wise{alpha:g}", mesh), self.start, alpha))
        if watch.source and self.encoder.can_embed_text and config.init:
            embedder = self.embedder(mesh)
            inner = open_zero_shot("forgetting", watch.source, self.eval_ops, embedder, watch.classes, "skip")
            found.append(Forgetting(inner, self.start, watch.threshold))
        return found

    def classification(self, name: str, mesh: Mesh, source: Source | None = None) -> Classification:
        """Of the images of `source`, by default the test images."""
        return self.zero_shot(name, mesh, source)

    # -- the probe --------------------------------------------------------------------------------------------------

    def _probe(self, mesh: Mesh) -> LinearProbe:
        assert self.train_source is not None
        return self.linear_probe("probe", mesh, self.train_source, self.validation_source)

    def probe_fit(self, mesh: Mesh, towers: Params) -> Fitted:
        """The linear probe of the first weights, which is fitted once."""
        if self._fitted is None:
            self._fitted = self._probe(mesh).fit(towers)
        return self._fitted

    def _probe_results(self, mesh: Mesh) -> Mapping[str, float]:
        """Its results on the test images."""
        if self._probed is None:
            towers = self.encoder.load_on(mesh, self.config.mesh.sharding_rules)
            self._probed = self._probe(mesh).measure(towers, self.probe_fit(mesh, towers))
        return self._probed


class FineTuneUniCL(FineTune):
    """The paper's way: no new head, each image against the prompts of all classes in the batch.

    Raises:
      UserError: as `ClassificationSuite`; for data with several classes an image.
    """

    needs_text = prompted = True
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
    """A linear head on the features; or on the embedding, from the class embeddings of the prompts.

    On the features it starts from a linear probe, so that its first answers are the probe's and the features are not
    distorted by a head that knows nothing (Kumar et al. 2022), or from zeros. From class embeddings its first answers
    are the zero-shot ones (Wortsman et al. 2022; ELEVATER).

    Raises:
      UserError: as `ClassificationSuite`; for an unknown `config.head_init`.
    """

    charts = (Chart("accuracy of the head on the batch", {"": "accuracy"}),)

    def __init__(self, config: ConfigDict):
        if config.head_init not in ("", *HEAD_INITS):
            raise UserError(f"config.head_init={config.head_init!r} is unknown; choose 'probe', 'zeros' or 'text'")
        self.from_text = self.needs_text = config.head_init == "text"
        others = ("text", "text_projection", "logit_scale")
        self.unused = others if self.from_text else (*others, "image_projection")
        super().__init__(config)
        self.head_init = config.head_init or ("probe" if self.small and config.init else "zeros")
        if config.wise_ft and self.head_init == "zeros":
            raise UserError(
                "config.wise_ft with a linear head needs --config.head_init=probe or text: a zero head is no start"
            )
        if self.head_init != "zeros" and not config.init:
            raise UserError(f"config.head_init={self.head_init!r} needs weights, --config.init=DIR")
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
        """As `head_init` says, each leaf where `places` says."""
        head: Params = self.head.init(self.encoder.model.config)
        if self.head_init == "probe":
            fitted = self.probe_fit(mesh, {name: tree for name, tree in loaded.items() if name != ENTRY})
            # What is chosen on held-out images must not start from a fit of them.
            fit = fitted.final if self.validation_source is None else fitted.chosen
            head = {"weight": fit.weights[0], "bias": fit.bias[0]}
        elif self.from_text:
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

    def classification(self, name: str, mesh: Mesh, source: Source | None = None) -> Classification:
        """By the head's scores."""
        return self.by_head(name, mesh, source)

    def _logits(self, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        out = self.encoder.model.apply(params, {"image": self.encoder.normalise(batch["image"])})
        return self.head.logits(params, out)
