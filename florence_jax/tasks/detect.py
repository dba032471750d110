"""Detection: model, loss and boxes joined for the loop; a trained detector on other data."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.box_classes import class_sets_of, is_exhaustive
from florence_jax.data.buckets import make_buckets
from florence_jax.data.pipeline import TrainData
from florence_jax.data.records import Source, Subset, summary_of
from florence_jax.data.sources.agnostic import OBJECT, AgnosticBoxes
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.data.sources.detection import box_parts, open_boxes
from florence_jax.errors import UserError
from florence_jax.evaluators.attributes import AttributeAccuracy
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.coco import CocoEvaluator
from florence_jax.evaluators.coco_scores import need_pycocotools
from florence_jax.evaluators.finetuning import BesideStart, Forgetting, Interpolated
from florence_jax.losses.detection import assign_atss, detection_loss
from florence_jax.models.anchors import level_shapes
from florence_jax.models.base import Params
from florence_jax.models.detector import detector_flops
from florence_jax.params.layer_decay import layer_decay_rules
from florence_jax.params.rules import Policy, frozen_paths, lr_multipliers
from florence_jax.params.weights import make_description
from florence_jax.tasks.attributes import HEAD, Attributes, attributes_of_folder, attributes_of_source
from florence_jax.tasks.base import Suite, Task, make_identity, make_plan, model_identity
from florence_jax.tasks.class_sampler import ClassSampler
from florence_jax.tasks.detection_sizes import bucket_sizes, scaled_sizes
from florence_jax.tasks.detector import DETECTOR, Detector
from florence_jax.tasks.encoder import open_encoder
from florence_jax.tasks.recipe import detection_recipe

WHOLE_PICTURE = "decode|resize_fit({height}, {width})|pad_image({height}, {width})"
SCENES = "scenes:"
SCENES_SIZES = ((128, 128),)  # of scenes, where nobody says any: one, as each is compiled
OWN_SIDE = 256  # of other pictures: shorter side of the buckets
EPOCH_OF_SCENES = 1000  # as they are endless
UNKNOWN = ("ignore", "background")  # what classes are that nobody looked for in a picture
SCENES_TEST = ("held_out", "new_style")  # splits to test on where nobody names any
# What no loss of a detector reaches. It stays as it was, so that the folder can still be asked for other things.
UNREACHED = r"(text|text_projection|image_projection)/.*|logit_scale|logit_bias|image/norm/.*"
NAMELESS = tuple(f"class {number}" for number in range(80))  # of a detector that is only compiled


class DetectionSuite(Suite):
    """A trained detector, that of `config.init`, on `config.data.test`.

    All classes of the data are one where the detector is class-agnostic: as `config.detector.agnostic` says where it is
    trained, else where the folder's detector knows the class 'object' alone.

    Attributes:
      train_source: None where nothing is trained. test_sources: by the names of their evaluators.
      detector: see there. sizes: (height, width) of the buckets. eval_ops: of pictures that are looked at.

    Raises:
      UserError: for weights without a detector, data that are not there, sizes that do not fit.
    """

    name = "detect"

    def __init__(self, config: ConfigDict):
        self.config = config
        self.train_source: BoxSource | None = None
        self.test_sources: dict[str, BoxSource] = {}
        given, encoder = config.detector, open_encoder(config)
        known = tuple(encoder.description.parts.get(DETECTOR, {}).get("classes", ()))
        self._agnostic = given.agnostic or (not config.data.train and known == (OBJECT,))
        self._open_sources()
        nobodys = () if config.init else (OBJECT,) if given.agnostic else NAMELESS
        classes: Sequence[str] = getattr(self.train_source, "class_names", nobodys)
        self.detector = Detector(encoder, given.variant, classes, given.overrides, config.detections)
        part = {} if config.data.train else self.detector.part  # other data may want other sizes
        scenes = f"{config.data.train}{config.data.test}".startswith(SCENES)
        usual = () if given.res else part.get("sizes", SCENES_SIZES if scenes else ())
        multiple = self.detector.config.multiple
        self.eval_ops = config.data.eval_ops or part.get("eval_ops", WHOLE_PICTURE)
        self.sizes = bucket_sizes(given.sizes or usual, given.res or OWN_SIDE, multiple)

    def _open(self, spec: str, split: str) -> BoxSource:
        source = open_boxes(spec, split)
        return AgnosticBoxes(source) if self._agnostic else source

    def _open_sources(self) -> None:
        """Those of `config.data`."""
        if not self.config.data.test:
            raise UserError("no images to evaluate on: give --config.data.test=DATA")
        self._open_tests(self.config.data.test.split("|"))

    def _open_tests(self, specs: Sequence[str]) -> None:
        for spec in map(str.strip, specs):
            name = spec.split(":")[1] if spec.startswith(SCENES) else "test"
            if name in self.test_sources:
                name += str(len(self.test_sources) + 1)
            self.test_sources[name] = self._open(spec, "test")

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        resolved = {"detector.variant": self.detector.variant, "detector.sizes": [list(size) for size in self.sizes]}
        resolved |= {f"detector.{name}": value for name, value in sorted(self.detector.overrides.items())}
        given = make_identity(self.config, "protocol", "init", "data.train", "data.test")
        opened = [source for source in (self.train_source, *self.test_sources.values()) if source is not None]
        # Of scenes: a package that is installed in between would change them.
        grounds = {found["backgrounds"] for found in map(summary_of, opened) if "backgrounds" in found}
        classes: dict[str, Any] = {"classes": list(self.detector.classes), "data.eval_ops": self.eval_ops}
        classes |= {"backgrounds": sorted(grounds)} if grounds else {}
        return given | resolved | classes | model_identity(self.detector.encoder.model)

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`. The towers are those that came, in their own mode; the detector's part says what is its own."""
        sizes = [list(size) for size in self.sizes]
        own = self.detector.describe() | {"sizes": sizes, "eval_ops": self.eval_ops}
        if self.train_source is not None:
            own["category_ids"] = list(getattr(self.train_source, "category_ids", ()))
        return make_description(
            self.name,
            {"towers": self.detector.encoder.towers_part(), DETECTOR: own, **self.more_parts},
            tokenizer=self.detector.encoder.tokenizer_spec,
            source={"init": self.config.init, "data": self.config.data.train},
        )

    @property
    def more_parts(self) -> dict[str, Any]:
        """Parts of `model.json` beside the towers and the detector."""
        return {}

    @property
    def sources(self) -> Sequence[Source]:
        """See `Suite`."""
        return () if self.train_source is None else (self.train_source,)

    def load(self, mesh: Mesh) -> Params:
        """The trained detector of `config.init`, with its head for attributes."""
        rules = self.config.mesh.sharding_rules
        params = self.detector.load_on(mesh, rules)
        return params if self.attributes is None else params | self.attributes.load_on(mesh, rules)

    @functools.cached_property
    def attributes(self) -> Attributes | None:
        """The folder's head for attributes, if it has one."""
        return attributes_of_folder(self.detector)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """COCO's numbers on each of the test sets, and how well attributes are told."""
        return [*self.scored(mesh), *self.described(mesh)]

    def described(self, mesh: Mesh) -> list[Evaluator]:
        """How well attributes are told, on each of the test sets that has them."""
        if (head := self.attributes) is None:
            return []
        batch, on_corrupt = self.config.eval.batch_size, self.config.data.on_corrupt
        return [
            AttributeAccuracy(
                source,
                self.eval_ops,
                make_buckets([source], self.sizes),
                head.judge,
                mesh,
                batch,
                self.detector.classes,
                head.names,
                f"{name}_attributes",
                on_corrupt,
            )  # fmt: skip
            for name, source in self.test_sources.items()
            if getattr(source, "attribute_names", ())
        ]

    def scored(self, mesh: Mesh) -> list[CocoEvaluator]:
        """COCO's numbers on each of the test sets."""
        return [self.coco(name, source, mesh) for name, source in self.test_sources.items()]

    def coco(self, name: str, source: BoxSource, mesh: Mesh) -> CocoEvaluator:
        """COCO's numbers on a source."""
        ops, batch, on_corrupt = self.eval_ops, self.config.eval.batch_size, self.config.data.on_corrupt
        classes, detect = self.detector.classes, self.detector.detect
        train, buckets = [] if self.train_source is None else [self.train_source], make_buckets([source], self.sizes)
        return CocoEvaluator(source, ops, buckets, detect, mesh, batch, classes, name, train, on_corrupt)


class Detect(DetectionSuite, Task):
    """Training of a detector on the towers of `config.init`, or of a trained one further.

    Attributes:
      recipe: see `tasks.recipe`: what is taken where the configuration leaves it open.

    Raises:
      UserError: as `DetectionSuite`; for too few images to hold any out.
    """

    recipe = staticmethod(detection_recipe)
    charts = (
        Chart("losses", {"classes": "class_loss", "boxes": "box_loss", "centerness": "centerness_loss"}),
        Chart("positions that learn a box", {"": "positives"}),
    )

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        if not all(0 <= share < 1 for share in config.keep_zero_shot):
            raise UserError(
                f"config.keep_zero_shot={config.keep_zero_shot}: shares of the trained weights from 0 to below 1"
            )
        if not self.detector.trained and (config.keep_zero_shot or config.forgetting.source):
            raise UserError(
                "config.keep_zero_shot and config.forgetting compare with a first detector: give one with "
                f"--config.init=DIR; {config.init or 'no folder'} holds none"
            )
        self._groups = scaled_sizes(self.sizes, config.detector.scales, self.detector.config.multiple)
        examples = self._examples()
        recipe = self.recipe(examples, self.detector.config.width, config.batch_size)
        self.plan = make_plan(config, examples, recipe)
        counts = len(self.detector.classes)
        self.class_sampler = ClassSampler(self.train_source, counts, config.detector.sampled_classes)
        tower, seen = self.detector.encoder.model.config, self.class_sampler.per_step
        flops = [detector_flops(tower, self.detector.config, seen, *size) for group in self._groups for size in group]
        times = 3.0 if self.trains_tower else 1.0
        self.flops_per_example = sum(times * one["image"] + 3.0 * one["detector"] for one in flops) / len(flops)

    def _examples(self) -> int | None:
        """Pictures of an epoch. Of scenes, which are endless, what is said here."""
        if self.train_source is None:
            return None
        only_scenes = self.config.data.train.startswith(SCENES) and "|" not in self.config.data.train
        return EPOCH_OF_SCENES if only_scenes else len(self.train_source)

    def _open_sources(self) -> None:
        data = self.config.data
        if data.train:
            self.train_source = self._open(data.train, "train")
        if data.test:
            self._open_tests(data.test.split("|"))
        elif tests := [test for part in data.train.split("|") for test in _tests_of(part.strip())]:
            self._open_tests(tests)
        elif self.train_source is not None:
            self._hold_out(self.train_source)

    def _hold_out(self, source: BoxSource) -> None:
        """Takes a random share of the images, at least one, from those to train on; all records of an image."""
        same = getattr(source, "same", np.arange(len(source)))
        images = np.unique(same)
        share, count = self.config.holdout, len(images)
        if not 0 < share < 1:
            raise UserError(f"config.holdout={share} must be above 0 and below 1, or give --config.data.test=DATA")
        if count < 2:
            raise UserError(f"{source.name}: one image cannot be trained and tested on; give --config.data.test=DATA")
        chosen = np.random.default_rng(self.config.seed).permutation(count)[: max(round(share * count), 1)]
        is_held = np.isin(same, images[chosen])
        held, rest = np.flatnonzero(is_held), np.flatnonzero(~is_held)
        self.train_source = Subset(source, rest, f"{source.name} (train)")
        self.test_sources["test"] = Subset(source, held, f"{source.name} (held out)")

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`. The seed draws the images that are held out."""
        options = make_identity(
            self.config,
            "holdout",
            "seed",
            "data.train_ops",
            "detector.most_boxes",
            "detector.crowd",
            "detector.unknown",
            "detector.attributes",
        )
        return {**super().identity, **options, "detector.scales": list(self.config.detector.scales)}

    @property
    def more_parts(self) -> dict[str, Any]:
        """See `DetectionSuite`."""
        return {} if self.attributes is None else {HEAD: self.attributes.describe()}

    # -- model ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def attributes(self) -> Attributes | None:
        """The head for attributes that is trained, if any is."""
        if self.config.detector.attributes:
            return attributes_of_source(self.train_source, self.detector)
        if HEAD in self.detector.encoder.description.parts:
            logging.warning(
                "the head for attributes of %s is left out: config.detector.attributes=True trains it, on data with "
                "attributes",
                self.config.init,
            )
        return None

    @functools.cached_property
    def _shapes(self) -> Params:
        return jax.eval_shape(self.init, jax.random.key(0))

    @functools.cached_property
    def policy(self) -> Policy:
        """What the loss does not reach is frozen; the image tower has its own rate, which falls towards the input."""
        shapes, optim = self._shapes, self.config.optim
        rate = self.config.detector.tower_lr

        def times(factor: float | tuple[float, ...]) -> float | tuple[float, ...]:
            return tuple(rate * one for one in factor) if isinstance(factor, tuple) else rate * factor

        layers = layer_decay_rules({"image": shapes["image"]}, optim.layer_decay)
        tower = ((pattern, times(factor)) for pattern, factor in layers if pattern.startswith("image/"))
        return Policy(lr=((UNREACHED, 0.0), *tower))

    @functools.cached_property
    def trains_tower(self) -> bool:
        """Whether anything of the image tower but the norms of its maps is trained."""
        shapes = self._shapes
        frozen = frozen_paths(lr_multipliers(self.config.optim.lr_rules, shapes, self.policy))
        stages = jax.tree_util.tree_leaves_with_path(shapes["image"])
        names = (f"image/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path, _ in stages)
        return any(name.startswith("image/stage") and name not in frozen for name in names)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        params = self.detector.init(key)
        return params if self.attributes is None else params | self.attributes.init(jax.random.fold_in(key, 0))

    def start(self, params: Params) -> Params:
        """The folder's towers, and its detector and head for attributes where it holds one."""
        if self.attributes is None:
            return self.detector.load(params)
        rest = {name: leaf for name, leaf in params.items() if name != HEAD}
        return self.detector.load(rest) | self.attributes.load(params)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `detection_loss`; "boxes_cut" is the number of objects that the batch had no room for."""
        batch, drawn = self.class_sampler.draw(jax.random.fold_in(key, 0), batch)  # the key itself draws paths
        outputs = self.detector.outputs(params, batch, self.trains_tower, key)
        levels = tuple(height * width for height, width in level_shapes(*batch["image"].shape[1:3]))
        anchors, inside = outputs["detector/anchors"], outputs["detector/inside"]
        assigned = assign_atss(anchors, levels, batch["boxes"], batch["objects"], inside)
        loss, metrics = detection_loss(outputs, batch, levels, assigned)
        if self.attributes is not None:
            more, described = self.attributes.loss(params, outputs, batch, assigned[0])
            loss, metrics = loss + more, metrics | described
        return loss, metrics | drawn | {"boxes_cut": batch["boxes_cut"].sum().astype(jnp.float32)}

    # -- data -------------------------------------------------------------------------------------------------------

    @property
    def judges(self) -> bool:
        """Whether batches say of which classes people looked for in each picture, and the loss covers only those."""
        return self._ignores and self.train_source is not None and not is_exhaustive(self.train_source)

    @property
    def partly_boxed(self) -> bool:
        """Whether batches of a class-agnostic detector say in which pictures objects have no box."""
        return self._ignores and getattr(self.train_source, "partly_boxed", False)

    @property
    def _ignores(self) -> bool:
        """Whether what nobody looked for is unknown, and no background."""
        unknown = self.config.detector.unknown
        if unknown not in UNKNOWN:
            raise UserError(f"config.detector.unknown={unknown!r}: choose one of {', '.join(UNKNOWN)}")
        return unknown == "ignore"

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """One shape for each bucket of each scale."""
        rows, most = self.plan.batch_size, self.config.detector.most_boxes
        of = jax.ShapeDtypeStruct
        common = {
            "valid": of((rows, 2), jnp.int32),
            "boxes": of((rows, most, 4), jnp.float32),
            "class_ids": of((rows, most), jnp.int32),
            "objects": of((rows, most), jnp.bool_),
            "ignore": of((rows, most), jnp.bool_),
            "boxes_cut": of((rows,), jnp.int32),
            "corrupt": of((rows,), jnp.int32),
            "padded": of((rows,), jnp.float32),
        }
        if self.judges:
            common["judged"] = of((rows, len(self.detector.classes)), jnp.bool_)
        if self.partly_boxed:
            common["partly_boxed"] = of((rows,), jnp.bool_)
        if self.attributes is not None:
            common |= self.attributes.batch(rows, most)
        sizes = [size for group in self._groups for size in group]
        return tuple({"image": of((rows, *size, 3), jnp.uint8), **common} for size in sizes)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """As for a trained detector. Without pycocotools it is trained, and scored another time."""
        try:
            need_pycocotools()
        except UserError as error:
            logging.warning("what is trained is not scored: %s; then --config.mode=eval", error)
            return []
        return [*self._beside_start(self.scored(mesh)), *self.described(mesh), *self.watched(mesh)]

    def _beside_start(self, evaluators: Sequence[CocoEvaluator]) -> Sequence[Evaluator]:
        """With what the folder's detector scored before, where it knows classes of the run by name."""
        if not set(self.detector.part.get("classes", ())) & set(self.detector.classes):
            return evaluators
        what = f"the detector of {self.config.init}"
        return [BesideStart(evaluator, self.start, what) for evaluator in evaluators]

    def watched(self, mesh: Mesh) -> list[Evaluator]:
        """What the training costs elsewhere, and weights mixed with the first ones: on the test sets and on that."""
        config, sources = self.config, dict(self.test_sources)
        found: list[Evaluator] = []
        if config.forgetting.source:
            sources["forgetting"] = self._open(config.forgetting.source, "test")
            watched = self.coco("forgetting", sources["forgetting"], mesh)
            found.append(Forgetting(watched, self.start, config.forgetting.threshold, "config.keep_zero_shot"))
        return found + self.mixed(sources, mesh)

    def mixed(self, sources: Mapping[str, BoxSource], mesh: Mesh) -> list[Evaluator]:
        """COCO's numbers of weights mixed with the first ones, of each share of `config.keep_zero_shot`."""
        return [
            Interpolated(self.coco(f"{name}_wise{share:g}", source, mesh), self.start, share)
            for share in self.config.keep_zero_shot
            for name, source in sources.items()
        ]

    def train_data(self) -> TrainData:
        """Images with their boxes, by the shape of the images; each once for every scale."""
        if self.train_source is None:
            raise UserError("nothing to train on: give --config.data.train=DATA")
        sources = [self.train_source]
        given = self.config.detector
        pad = f"pad_boxes({given.most_boxes}, crowd={given.crowd}, judged={self.judges})"
        fields = ["image", "valid", "boxes", "class_ids", "objects", "ignore", "boxes_cut", *["judged"] * self.judges]
        fields += ["partly_boxed"] * self.partly_boxed
        fields += [] if self.attributes is None else self.attributes.batch(0, 0)
        ops = f"{self.config.data.train_ops}|{pad}|keep({', '.join(fields)})"
        context = {"class_sets": class_sets_of(self.train_source)} if self.judges else {}
        buckets = [bucket for group in self._groups for bucket in make_buckets(sources, group)]
        return TrainData(sources, None, ops, context, tuple(buckets))


def _tests_of(spec: str) -> list[str]:
    """The pictures that come with a source to be tested on."""
    if spec.startswith(SCENES):
        options = ":".join(["", *spec.split(":")[3:]])
        return [f"{SCENES}{split}:{options}" for split in SCENES_TEST]
    return [spec] if "test" in box_parts(spec) else []
