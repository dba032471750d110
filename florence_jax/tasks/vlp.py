"""Pretraining of a fusion on images with captions: do they match (ITM), and which words are masked (MLM)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.batches import check_fields, known_captions
from florence_jax.data.ops.captions import Caption, parse_fields
from florence_jax.data.ops.language import mask_places
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import TrainData
from florence_jax.data.records import Source
from florence_jax.data.sources.catalog import open_mixture, open_source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.vlp import PAIRING_GROUP, MatchAndWords
from florence_jax.losses.language import LossSums, masked_word_loss, match_loss
from florence_jax.losses.pairing import next_other, pair_in_batch, with_others
from florence_jax.models.base import Params
from florence_jax.tasks.base import make_identity, make_plan
from florence_jax.tasks.fusion import FusedTowers, describe_fusion, fusion_identity, open_fusion, summed
from florence_jax.tasks.fusion_task import FusionTask

NEGATIVES = ("dataset", "batch", "hard")
CAPTION_SCENES = "scene_captions:"
CAPTION_SPLITS = ("held_out", "new_style")  # splits to test on where nobody names any
OF_SUMS = {"loss": "mean", "accuracy": "accuracy"}  # of `LossSums`
MASK_FIELDS = ("masked_text", "places", "mask_targets")  # what op 'mask_words' adds


class VLP(FusionTask):
    """The `Task` of configs/vlp.py.

    Attributes:
      fusion: see there. train_ops, eval_ops: image ops at the model's size. captions: fields that texts are drawn from.

    Raises:
      UserError: for weights without a text tower, an unknown option, a batch too small for ITM.
    """

    name = "vlp"
    charts = (
        Chart("losses", {"match": "itm_loss", "masked words": "mlm_loss"}),
        Chart("accuracy", {"match": "itm_accuracy", "masked words": "mlm_accuracy"}),
    )

    def __init__(self, config: ConfigDict):
        self.config = config
        self._check()
        heads = [name for name in ("itm", "mlm") if config[name].weight]
        self.fusion = open_fusion(config, heads)
        res = str(self.fusion.encoder.model.config.res)
        self.train_ops = config.data.train_ops.replace("{res}", res)
        self.eval_ops = config.data.eval_ops.replace("{res}", res)
        for ops in (self.train_ops, self.eval_ops):
            parse_ops(ops, {})
        self.plan = make_plan(config)
        if config.itm.weight and self.plan.batch_size < 2:
            raise UserError("config.batch_size=1: an image and text that do not match need a batch of at least two")
        flops, passes = self.fusion.model.flops, len(heads)
        self.flops_per_example = 3.0 * (flops["image"] + passes * (flops["text"] + flops["fusion"]))

    def _check(self) -> None:
        config = self.config
        if config.itm.negatives not in NEGATIVES:
            raise UserError(f"config.itm.negatives={config.itm.negatives!r}: choose one of {', '.join(NEGATIVES)}")
        if config.itm.negatives == "hard" and config.language.init:
            raise UserError("config.itm.negatives=hard goes by the towers' similarity: RoBERTa has none; choose batch")
        if not config.itm.weight and not config.mlm.weight:
            raise UserError("config.itm.weight and config.mlm.weight are both 0: nothing is learned")

    @property
    def from_data(self) -> bool:
        """Whether images that do not match come with the batch."""
        return bool(self.config.itm.weight) and self.config.itm.negatives == "dataset"

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        options = ("init", "data.train", "itm.negatives", "itm.weight", "mlm.weight", "mlm.share", "mlm.whole_words")
        resolved = {"data.train_ops": self.train_ops, "data.eval_ops": self.eval_ops, "data.captions": self.captions}
        return make_identity(self.config, *options) | resolved | fusion_identity(self.fusion)

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return describe_fusion(self.name, self.fusion, self.config, eval_ops=self.eval_ops)

    # -- model ------------------------------------------------------------------------------------------------------

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """ITM of the texts as they are and MLM of the masked ones, over images that are each encoded once."""
        config, images = self.config, batch["image"]
        size = len(images)
        partner = match = None
        if self.from_data:
            rows, partner = with_others(match := batch["match"])
            images = jnp.concatenate([images, batch["other_image"][rows]])
        found = self.fusion.encode(params, images, "image" not in self.frozen, key, config.micro_batch.images)
        if config.itm.weight and not self.from_data:
            similarity = self._similarity(params, batch, found) if config.itm.negatives == "hard" else None
            labels = batch["label"], batch["caption_labels"]
            partner, match = pair_in_batch(jax.random.fold_in(key, 1), *labels, similarity)
        tokens = found["image_tokens"]
        inputs = {"text": batch["text"], "text_length": batch["text_length"], "own": tokens[:size]}
        inputs["example"] = jnp.arange(size)
        if config.mlm.weight:
            inputs |= {name: batch[name] for name in MASK_FIELDS}
        if match is not None:
            inputs |= {"match": match, "other": tokens[partner]}
        function = functools.partial(pass_sums, self.fusion, key=jax.random.fold_in(key, 2))
        sums = summed(function, params, inputs, config.micro_batch.texts)
        loss = sum(config[name].weight * total.mean for name, total in sums.items())
        metrics = {f"{name}_{told}": getattr(total, of) for name, total in sums.items() for told, of in OF_SUMS.items()}
        redrawn = {"redrawn": batch["redrawn"].sum().astype(jnp.float32)} if self.from_data else {}
        return loss, metrics | redrawn

    def _similarity(self, params: Params, batch: Mapping[str, jax.Array], found: Mapping[str, jax.Array]) -> jax.Array:
        """The towers' logits, (texts, images): without gradients, and of towers that learn something else by now."""
        still = jax.lax.stop_gradient(params)
        texts = self.fusion.encoder.predict["text"](still, dict(batch))
        return jnp.exp(still["logit_scale"]) * texts @ found["image/embedding"].T

    # -- data -------------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`."""
        size, model, of = self.plan.batch_size, self.fusion.encoder.model.config, jax.ShapeDtypeStruct
        mlm, length = self.config.mlm, self.fusion.text_length
        places = mask_places(length, mlm.share, mlm.whole_words)
        shapes = {
            "image": of((size, model.res, model.res, 3), jnp.uint8),
            "text": of((size, length), jnp.int32),
            "text_length": of((size,), jnp.int32),
            "corrupt": of((size,), jnp.int32),
        }
        shapes |= {"masked_text": of((size, length), jnp.int32)} if mlm.weight else {}
        shapes |= {name: of((size, places), jnp.int32) for name in MASK_FIELDS[1:]} if mlm.weight else {}
        if self.from_data:
            shapes |= {"other_image": shapes["image"], "match": of((size,), jnp.int32)}
            shapes["redrawn"] = of((size,), jnp.int32)
        elif self.config.itm.weight:
            captions = self.config.itm.captions
            shapes |= {"label": of((size, 2), jnp.int32), "caption_labels": of((size, captions, 2), jnp.int32)}
        return (shapes,)

    @functools.cached_property
    def mixture(self) -> tuple[list[Source], list[float]]:
        """Sources and weights of `config.data.train`."""
        return open_mixture(self.config.data.train)

    @property
    def sources(self) -> Sequence[Source]:
        """See `Suite`."""
        return self.mixture[0] if self.config.data.train else ()

    @functools.cached_property
    def captions(self) -> str:
        """Fields that a text is drawn from, with weights."""
        data = self.config.data
        if data.captions or not data.train:
            return data.captions or "caption=1"
        return known_captions(self.mixture[0])[0]

    @property
    def context(self) -> dict[str, Any]:
        """What the ops need."""
        return {"tokenizer": self.fusion.tokenizer}

    def text_ops(self, captions: str, fixed: bool = False) -> str:
        """Ops that make the texts of a record, and keep what is wanted; `fixed`: without draws, for an evaluation."""
        itm, mlm = self.config.itm, self.config.mlm
        ops, kept = [f"caption({captions})", "label"], ["image", "text", "text_length"]
        if fixed:
            kept += ["label", "caption"]
        elif self.from_data:
            ops, kept = [*ops, "other"], [*kept, "other_image", "match", "redrawn"]
        elif itm.weight:
            ops, kept = [*ops, f"caption_labels({itm.captions})"], [*kept, "label", "caption_labels"]
        ops.append("tokenize")
        if mlm.weight:
            ops.append(f"mask_words({mlm.share}, {mlm.whole_words}, {fixed})")
            kept += MASK_FIELDS
        return "|".join([*ops, f"keep({', '.join(kept)})"])

    def train_data(self) -> TrainData:
        """See `Task`; raises `UserError` also for an unknown caption field."""
        if not self.config.data.train:
            raise UserError("nothing to train on: give --config.data.train=DATA")
        sources, weights = self.mixture
        check_fields(sources, [Caption(**parse_fields(self.captions))])
        return TrainData(sources, weights, f"{self.train_ops}|{self.text_ops(self.captions)}", self.context)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """ITM and MLM on held-out pairs: of scenes on their held-out splits, else on `config.data.test`."""
        specs = [spec.strip() for spec in self.config.data.test.split("|") if spec.strip()]
        if not specs and self.config.data.train.startswith(CAPTION_SCENES):
            specs = [f"{CAPTION_SCENES}{split}" for split in CAPTION_SPLITS]
        if not specs:
            logging.warning("nothing is evaluated: give held-out pairs with --config.data.test=DATA")
        return [self._evaluator(spec, number, mesh) for number, spec in enumerate(specs)]

    def _evaluator(self, spec: str, number: int, mesh: Mesh) -> Evaluator:
        name = spec.split(":")[1] if spec.startswith(CAPTION_SCENES) else f"test{number or ''}"
        data, source = self.config.data, open_source(spec)
        (field, *_) = parse_fields(data.captions or known_captions([source])[0])  # of several an op would draw
        ops = f"{self.eval_ops}|{self.text_ops(f'{field}=1', fixed=True)}"
        judge, size = functools.partial(match_and_words, self.fusion), self.config.eval.batch_size
        return MatchAndWords(name, source, ops, self.context, judge, mesh, size, data.on_corrupt)


def pass_sums(
    fusion: FusedTowers, params: Params, rows: Mapping[str, jax.Array], key: jax.Array | None = None
) -> dict[str, LossSums]:
    """Losses of some examples: masked texts and texts as they are, in one call of the fusion.

    Args:
      fusion, params: of the model.
      rows: "text", "text_length", "example", "own" (n, T, C), tokens of their images; for MLM "masked_text", "places",
        "mask_targets"; for ITM "match" and "other", tokens of the images that stand beside the texts.
      key: of dropout; None: as in evaluation.
    """
    masked, plain = "mask_targets" in rows, "match" in rows
    texts = [rows[name] for name, there in (("masked_text", masked), ("text", plain)) if there]
    tokens = [rows[name] for name, there in (("own", masked), ("other", plain)) if there]
    passes = len(texts)
    inputs = {
        "text": beside(*texts),
        "text_length": jnp.repeat(rows["text_length"], passes),
        "image_tokens": beside(*tokens),
        "example": beside(*(passes * rows["example"] + number for number in range(passes))),
    }
    inputs |= {"places": rows["places"]} if masked else {}
    out = fusion.fuse(params, inputs, key is not None, key)
    sums = {"mlm": masked_word_loss(out["mlm_logits"], rows["mask_targets"])} if masked else {}
    return sums | ({"itm": match_loss(out["itm_logits"][passes - 1 :: passes], rows["match"])} if plain else {})


def match_and_words(fusion: FusedTowers, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What `evaluators.vlp.MatchAndWords` asks of a batch: each text beside its own image and beside another."""
    tokens = fusion.encode(params, batch["image"])["image_tokens"]
    partner, found = next_other(batch["label"], batch["mask"], PAIRING_GROUP)
    rows = len(partner)
    inputs = {"image_tokens": beside(tokens, tokens[partner]), "text_length": jnp.repeat(batch["text_length"], 2)}
    results = {"partner": batch["index"][partner], "paired": found}
    if "itm" in fusion.heads:
        out = fusion.fuse(params, inputs | {"text": jnp.repeat(batch["text"], 2, axis=0)})
        results["match"] = jax.nn.softmax(out["itm_logits"])[:, 1].reshape(rows, 2)
    if "mlm" in fusion.heads:
        places, targets = (jnp.repeat(batch[name], 2, axis=0) for name in ("places", "mask_targets"))
        out = fusion.fuse(params, inputs | {"text": jnp.repeat(batch["masked_text"], 2, axis=0), "places": places})
        right = (out["mlm_logits"].argmax(-1) == targets) & (targets >= 0)
        results |= {"right_words": right.sum(1).reshape(rows, 2), "words": (batch["mask_targets"] >= 0).sum(1)}
    return results


def beside(*arrays: jax.Array) -> jax.Array:
    """(n, ...) each -> (k n, ...): row by row beside each other, so that a split of the rows over devices stays one."""
    return jnp.stack(arrays, 1).reshape(-1, *arrays[0].shape[1:]) if len(arrays) > 1 else arrays[0]
