"""Classification with trained weights: zero-shot, linear probe, few-shot, fine-tuning with the UniCL loss or a head."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.classes import (
    DEFAULT_EVAL_OPS,
    EVAL_OPS,
    METRICS,
    ClassIndex,
    as_labelled,
    choose_templates,
    dataset_name,
    hold_out,
    open_classes,
    open_images,
    shipped_class_names,
)
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import train_stream
from florence_jax.data.records import Source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.classification import Classification, check_metric
from florence_jax.evaluators.fewshot import FewShot, flip_pair
from florence_jax.evaluators.finetuning import Forgetting, Interpolated
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.probe import LinearProbe
from florence_jax.evaluators.zero_shot import ZeroShot, class_embeddings
from florence_jax.losses.unicl import unicl
from florence_jax.models.flops import forward_flops
from florence_jax.params.layer_decay import layer_decay_rules
from florence_jax.params.weights import make_description
from florence_jax.tasks.encoder import Encoder, record_model, set_epochs
from florence_jax.tasks.pretrain import LOGIT_SCALE_RANGE

TRAINED = ("finetune_unicl", "finetune_linear")
PROTOCOLS = ("zeroshot", "probe", "fewshot", *TRAINED)
HEAD_INITS = ("zeros", "text")


class Classify:
    """The `Task` of configs/classify.py.

    Raises:
      UserError: for missing weights, an unknown protocol, source, class name, template, metric or option.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        if config.protocol not in PROTOCOLS:
            raise UserError(f"config.protocol={config.protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
        self.trains = config.protocol in TRAINED
        self.linear = config.protocol == "finetune_linear"
        self.encoder = Encoder(config.init, config.model.overrides, config.text.tokenizer, config.precision)
        record_model(config, self.encoder)
        self._open_sources()
        self._check()
        self.predict = self.encoder.predict | {"flip_pair": flip_pair(self.encoder.predict["features"])}
        if self.linear:
            self.predict["logits"] = self._logits
        self._embedders: dict[str, Embedder] = {}
        flops = forward_flops(self.encoder.model.config)
        self.flops_per_example = 3.0 * (flops["image"] + (0 if self.linear else flops["text"]))
        if self.trains:
            self._set_schedule()
        else:
            config.batch_size = jax.device_count()  # nothing is trained: any size that fits the mesh

    def _open_sources(self) -> None:
        config = self.config
        source = open_images(config.data)
        dataset = dataset_name(config.data) or config.classes.replace("/", "")
        spec = config.classes or (dataset if dataset in shipped_class_names() else "")
        self.classes = open_classes(source, spec, config.label_field)
        test = config.test or {"emoji:train": "emoji:new_style"}.get(config.data, "")
        self.train_source: Source = source
        if not self.trains and config.protocol != "probe":
            self.test_source = open_images(test) if config.test else source
        elif test:
            self.test_source = open_images(test)
        else:
            self.train_source, self.test_source = hold_out(source, self.classes, config.holdout, config.seed)
        self.templates = choose_templates(config.templates, dataset)
        self.metric = config.metric or ("voc_map" if self.classes.multi else METRICS.get(dataset, "top1"))
        res = self.encoder.model.config.res
        self.train_ops = config.image.train_ops.format(res=res)
        self.eval_ops = (config.image.eval_ops or EVAL_OPS.get(dataset, DEFAULT_EVAL_OPS)).format(res=res)

    def _check(self) -> None:
        config = self.config
        check_metric(self.metric, self.classes, config.data)
        if config.protocol in ("zeroshot", "finetune_unicl") or self._text_head:
            if not self.encoder.has_text:
                raise UserError(
                    f"{config.init} holds no text tower, which protocol {config.protocol!r} needs for the class names; "
                    "use mode=probe or finetune_linear"
                )
            _ = self.encoder.tokenizer  # raises where nobody named it
        if config.head_init not in HEAD_INITS:
            raise UserError(f"config.head_init={config.head_init!r} is unknown; choose 'zeros' or 'text'")
        if config.protocol == "finetune_unicl" and self.classes.multi:
            raise UserError("finetune_unicl needs one class an image; use mode=finetune_linear for several")
        if not all(0 <= alpha < 1 for alpha in config.wise_ft):
            raise UserError(f"config.wise_ft={config.wise_ft}: shares of the fine-tuned weights from 0 to below 1")
        if self.linear and config.wise_ft and not self._text_head:
            raise UserError("config.wise_ft with a linear head needs --config.head_init=text: a zero head is no start")

    @property
    def _text_head(self) -> bool:
        return self.linear and self.config.head_init == "text"

    def _set_schedule(self) -> None:
        """Turns epochs into steps, and layer decay into rules by path."""
        config = self.config
        set_epochs(config, len(self.train_source))
        if not config.optim.lr_rules:
            shapes = jax.eval_shape(self.init, jax.random.key(0))
            frozen = self._frozen(shapes)
            rest = {name: tree for name, tree in shapes.items() if name not in frozen}
            rules = layer_decay_rules(rest, config.optim.layer_decay)
            config.optim.lr_rules = (*((rf"{name}(/.*)?", 0.0) for name in frozen), *rules)

    def _frozen(self, params: Any) -> list[str]:
        """Entries that a linear head's loss does not reach, and that weight decay must not reach either."""
        unused = {"text", "text_projection", "logit_scale"} | (set() if self._text_head else {"image_projection"})
        return [name for name in params if self.linear and name in unused]

    # -- model ------------------------------------------------------------------------------------------------------

    @property
    def description(self) -> dict[str, Any]:
        """Content of the `model.json` of a fine-tuning: the head takes the image's "pooled" features or "embedding"."""
        parts = {"towers": self.encoder.towers_part()}
        if self.linear:
            features = "embedding" if self._text_head else "pooled"
            parts["head"] = {"features": features, "multi": self.classes.multi, "entries": ["head"]}
        return make_description(
            self.config.task,
            parts,
            tokenizer=self.encoder.tokenizer_spec,
            classes=self.classes.first_names,
            source={"init": self.config.init, "data": self.config.data},
        )

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters of the towers; with a linear head also {"head": {"weight" (C, K), "bias" (K,)}}, zeros."""
        params = self.encoder.init(key)
        if not self.linear:
            return params
        sizes = self.encoder.model.config
        stages = 1 if sizes.image_tower == "vit" else len(sizes.depths)
        width = sizes.projection if self._text_head else sizes.image_width * 2 ** (stages - 1)
        return params | {
            "head": {
                "weight": jnp.zeros((width, len(self.classes)), jnp.float32),
                "bias": jnp.zeros((len(self.classes),), jnp.float32),
            }
        }

    def start(self, params: Any) -> Any:
        """The folder's parameters, and the head's start: zeros, or the class embeddings of the prompts.

        With the latter the head's first answers are the zero-shot ones (Wortsman et al. 2022; ELEVATER).
        """
        loaded = self.encoder.load(params, new=("head",) if self.linear else ())
        if not self.linear:
            return loaded
        head = jax.tree.map(jnp.zeros_like, params["head"])
        if self._text_head:
            mesh = jax.tree.leaves(params)[0].sharding.mesh
            weights = class_embeddings(self._embedder(mesh), loaded, self.classes.first_names, self.templates)
            head["weight"] = jax.device_put(weights.T, head["weight"].sharding)
        return loaded | {"head": head}

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UniCL over images and class prompts, labels being classes; or the cross entropy of the head."""
        inputs = {"image": self.encoder.normalise(batch["image"])}
        if not self.linear:
            inputs["text"] = batch["text"]
        out = self.encoder.model.apply(params, inputs, train=True, rngs={"drop_path": key})
        if not self.linear:
            loss, metrics = unicl(out["image/embedding"], out["text/embedding"], batch["label"], out["logit_scale"])
            return loss, metrics | {"logit_scale": out["logit_scale"]}
        logits = self._head(params, out)
        if self.classes.multi:
            judged = (batch["label"] >= 0).astype(jnp.float32)
            entropy = optax.sigmoid_binary_cross_entropy(logits, (batch["label"] > 0).astype(jnp.float32))
            return (entropy * judged).sum() / jnp.maximum(judged.sum(), 1.0), {}
        smooth = optax.smooth_labels(jax.nn.one_hot(batch["label"], len(self.classes)), self.config.label_smoothing)
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        return optax.softmax_cross_entropy(logits, smooth).mean(), {"accuracy": right}

    def project(self, params: Any) -> Any:
        """Clamps the logit scale to CLIP's range."""
        if "logit_scale" not in params:
            return params
        return params | {"logit_scale": jnp.clip(params["logit_scale"], *LOGIT_SCALE_RANGE)}

    def _head(self, params: Any, out: dict[str, jax.Array]) -> jax.Array:
        features = out["logit_scale"] * out["image/embedding"] if self._text_head else out["image/pooled"]
        product = jnp.matmul(features, params["head"]["weight"], precision="highest")
        return product + params["head"]["bias"][None]

    def _logits(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self._head(params, self.encoder.model.apply(params, {"image": self.encoder.normalise(batch["image"])}))

    # -- data -------------------------------------------------------------------------------------------------------

    def open_data(self) -> None:
        """Raises UserError for unknown ops; sources and classes are checked when the task is made."""
        for ops in (self.train_ops, self.eval_ops):
            parse_ops(ops, {})

    def train_stream(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Local batches {"image" uint8, "label" int32[, "text" int32], "corrupt" int32} from `start_step` on."""
        config = self.config
        prompt = "" if self.linear else "|class_prompt|tokenize"
        kept = "image, label" if self.linear else "image, text, label"
        return train_stream(
            [self.train_source],
            None,
            f"{self.train_ops}|class_label{prompt}|keep({kept})",
            {
                "classes": self.classes,
                "templates": self.templates,
                "tokenizer": None if self.linear else self.encoder.tokenizer,
            },
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.image.workers,
            on_corrupt=config.image.on_corrupt,
            cache=config.image.cache,
        )

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _embedder(self, mesh: Mesh, image: str = "image") -> Embedder:
        """One for each kind of image prediction, so that all evaluators share what is compiled."""
        if image not in self._embedders:
            predict = {"image": self.predict[image], "text": self.predict["text"]}
            tokenizer = self.encoder.tokenizer if self.encoder.speaks else None
            made = Embedder(predict, tokenizer, mesh, self.config.eval.batch_size)
            self._embedders[image] = made
        return self._embedders[image]

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Classification of the test set; with fine-tuning also of interpolated weights, and the zero-shot watch."""
        if self.config.protocol == "zeroshot":
            return [self._zero_shot("zero_shot", self.test_source, self.classes, self._embedder(mesh))]
        if self.config.protocol == "probe":
            return [self._probe(mesh)]
        if self.config.protocol == "fewshot":
            return [self._few_shot(mesh)]
        found: list[Evaluator] = [self._test_evaluator(mesh, "test")]
        for alpha in self.config.wise_ft:
            found.append(Interpolated(self._test_evaluator(mesh, f"test_wise{alpha:g}"), self.start, alpha))
        watch = self.config.forgetting
        if watch.source and self.encoder.speaks:
            source = open_images(watch.source)
            classes: ClassIndex = open_classes(source, watch.classes)
            inner = ZeroShot(
                "forgetting",
                source,
                classes,
                self.eval_ops,
                self._embedder(mesh),
                choose_templates("", dataset_name(watch.source)),
                on_corrupt="skip",
            )
            found.append(Forgetting(inner, self.start, watch.threshold))
        return found

    def _probe(self, mesh: Mesh) -> LinearProbe:
        config = self.config
        validation: Any = config.holdout
        if config.validation:
            validation = as_labelled(open_images(config.validation), self.classes)
        return LinearProbe(
            "probe",
            as_labelled(self.train_source, self.classes),
            as_labelled(self.test_source, self.classes),
            self.eval_ops,
            self._embedder(mesh, "features"),
            metric=self.metric,
            validation=validation,
            seed=config.seed,
            on_corrupt=config.image.on_corrupt,
            compare=config.probe.sklearn,
        )

    def _few_shot(self, mesh: Mesh) -> FewShot:
        options = self.config.fewshot
        return FewShot(
            "fewshot",
            as_labelled(self.test_source, self.classes),
            self.eval_ops,
            self._embedder(mesh, "flip_pair"),
            self.encoder.predict["features"],
            lambda params: {"image": params["image"]},
            mode=options.train,
            ways=options.ways,
            shots=options.shots,
            queries=options.queries,
            episodes=options.episodes,
            lanes=options.lanes,
            seed=self.config.seed,
        )

    def _test_evaluator(self, mesh: Mesh, name: str) -> Classification:
        if not self.linear:
            return self._zero_shot(name, self.test_source, self.classes, self._embedder(mesh))
        return Classification(
            name,
            self.test_source,
            self.classes,
            self.eval_ops,
            self._embedder(mesh, "logits"),
            lambda params, scores: lambda start, stop: scores[start:stop],
            self.metric,
            self.config.image.on_corrupt,
        )

    def _zero_shot(self, name: str, source: Source, classes: ClassIndex, embedder: Embedder) -> ZeroShot:
        on_corrupt = self.config.image.on_corrupt
        return ZeroShot(name, source, classes, self.eval_ops, embedder, self.templates, self.metric, on_corrupt)
