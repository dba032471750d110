"""Classification with trained weights that are not trained further: zero-shot, linear probe, few-shot."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.classes import (
    EVAL_OPS,
    METRICS,
    ClassIndex,
    ClassNames,
    as_labelled,
    choose_templates,
    dataset_name,
    hold_out,
    load_class_names,
    open_classes,
    open_images,
    shipped_class_names,
)
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import Source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import OF_IMAGES, Evaluator, Payload
from florence_jax.evaluators.classification import Classification, check_metric
from florence_jax.evaluators.fewshot import FewShot, flip_pair
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.probe import PROBE_HINT, LinearProbe
from florence_jax.evaluators.retrieval import open_retrieval
from florence_jax.evaluators.zero_shot import ZeroShot
from florence_jax.models.base import Params
from florence_jax.params.weights import make_description
from florence_jax.tasks.base import Suite, make_identity, model_identity
from florence_jax.tasks.encoder import open_encoder
from florence_jax.tasks.linear_head import ENTRY
from florence_jax.tasks.recipe import LARGE, OWN_OPS, PAPER_OPS

# Held-out images of the embedded set, where nobody names any.
OWN_TEST = {"emoji:train": "emoji:new_style"}


class ClassificationSuite(Suite):
    """What the protocols of configs/classify.py share: weights, labelled images, class names, prompts, metric.

    Attributes:
      train_source, test_source: labelled images; None where the configuration names none.
      classes: of the images. templates: for the prompts of their names.

    Raises:
      UserError: for missing weights, an unknown source, class name, template, metric or option.
    """

    name = "classify"
    needs_text = False  # of the weights
    learns = True  # from images of `data.train`
    prompted = False  # whether the weights learn prompts of the class names
    payload: Payload = OF_IMAGES
    probe_class = LinearProbe
    without_text = "use protocol=probe or finetune_linear"  # what one can do with weights without a text tower

    def __init__(self, config: ConfigDict):
        self.config = config
        self.encoder = open_encoder(config)
        self._check_text()
        self._open_sources()
        if self.classes is not None:
            check_metric(self.metric, self.classes, config.data.train or config.data.test)
        self.predict = self.encoder.predict | {"flip_pair": flip_pair(self.encoder.predict["features"])}
        self._embedders: dict[str, Embedder] = {}

    def _check_text(self) -> None:
        if self.needs_text and not self.encoder.has_text:
            raise UserError(
                f"{self.config.init} holds no text tower, which protocol {self.config.protocol!r} needs to read "
                f"texts; {self.without_text}"
            )
        if self.needs_text:
            _ = self.encoder.tokenizer  # raises where nobody named it

    def _open_sources(self) -> None:
        config, data = self.config, self.config.data
        if data.train and not self.learns:
            raise UserError(f"protocol {config.protocol!r} trains nothing: give the images as --config.data.test=DATA")
        spec = data.train or data.test
        dataset = dataset_name(spec) or config.classes.replace("/", "")
        names = config.classes or (dataset if dataset in shipped_class_names() else "")
        self.train_source: Source | None = self._open(data.train) if data.train else None
        test = data.test or self._own_test(data.train)
        self.test_source: Source | None = self._open(test) if test else None
        self.classes = self._open_classes(names)
        if self.train_source is not None and self.classes is not None and not test:
            self.train_source, self.test_source = hold_out(self.train_source, self.classes, config.holdout, config.seed)
        self.templates = choose_templates(config.templates, dataset, self.encoder.description.templates)
        multi = self.classes is not None and self.classes.multi
        self.metric = config.metric or ("voc_map" if multi else METRICS.get(dataset, "top1"))
        res = str(self.encoder.model.config.res)
        train_ops, eval_ops = self._usual_ops(dataset)
        self.train_ops = (data.train_ops or train_ops).replace("{res}", res)
        self.eval_ops = (data.eval_ops or eval_ops).replace("{res}", res)
        for ops in (self.train_ops, self.eval_ops):
            parse_ops(ops, {})

    def _open(self, spec: str) -> Source:
        """Labelled data by name."""
        return open_images(spec)

    def _own_test(self, train: str) -> str:
        """Held-out data for training data where nobody names any; '': a part of them."""
        return OWN_TEST.get(train, "")

    def _usual_ops(self, dataset: str) -> tuple[str, str]:
        """Ops of training and of evaluation where the configuration has none; {res}: of the model."""
        large = self.train_source is None or len(self.train_source) >= LARGE
        return PAPER_OPS if large else OWN_OPS, EVAL_OPS.get(dataset, self.encoder.eval_ops)

    def _open_classes(self, names: str) -> ClassIndex | None:
        """Of the images, or without any, as where a step is only compiled, of the class names alone."""
        source = self.train_source or self.test_source
        if source is not None:
            found = open_classes(source, names, self.config.label_field)
            if self.learns and len(found) < 2 and not found.multi:
                raise UserError(
                    f"{self.config.data.train} has one class only, {found.first_names[0]!r}: a classifier needs at "
                    "least two, one sub-folder of pictures for each"
                )
            return found
        return ClassIndex(load_class_names(names).names, {}) if names else None

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`. The seed draws the images that are held out."""
        data = ("data.train", "data.test", "holdout", "seed", "classes", "label_field", "templates")
        resolved = {"text.tokenizer": self.encoder.tokenizer_spec, "data.eval_ops": self.eval_ops}
        return make_identity(self.config, "protocol", "init", *data) | resolved | model_identity(self.encoder.model)

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return make_description(
            self.name,
            self.parts(),
            tokenizer=self.encoder.tokenizer_spec,
            classes=self.classes.names if self.classes is not None else (),
            source={"init": self.config.init, "data": self.config.data.train},
            templates=self.templates if self.prompted else (),
        )

    @property
    def sources(self) -> Sequence[Source]:
        """See `Suite`."""
        return [source for source in (self.train_source, self.test_source) if source is not None]

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """The parts of the model."""
        return {"towers": self.encoder.towers_part()}

    def load(self, mesh: Mesh) -> Params:
        """The weights of `config.init`."""
        return self.encoder.load_on(mesh, self.config.mesh.sharding_rules)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Those of the protocol, and retrieval on `config.eval.source` where one is given."""
        found, pairs = self.protocol_evaluators(mesh), self.config.eval.source
        if pairs and not self.encoder.can_embed_text:
            raise UserError(f"config.eval.source={pairs}: retrieval needs weights with a text tower and its tokenizer")
        if pairs:
            found.append(open_retrieval("held_out", pairs, self.eval_ops, self.embedder(mesh)))
        return found

    @property
    def tested(self) -> tuple[Source, ClassIndex]:
        """The test images and their classes.

        Raises:
          UserError: there are none.
        """
        if self.test_source is None or self.classes is None:
            raise UserError("no images to evaluate on: give --config.data.test=DATA")
        return self.test_source, self.classes

    @abc.abstractmethod
    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """What the protocol measures on the test images."""

    def embedder(self, mesh: Mesh, image: str = "image") -> Embedder:
        """One for each kind of image prediction, so that all evaluators share what is compiled."""
        if image not in self._embedders:
            predict = {"image": self.predict[image], "text": self.predict["text"]}
            tokenizer = self.encoder.tokenizer if self.encoder.can_embed_text else None
            self._embedders[image] = Embedder(predict, tokenizer, mesh, self.config.eval.batch_size, self.payload)
        return self._embedders[image]

    def by_head(self, name: str, mesh: Mesh, source: Source | None = None) -> Classification:
        """Classification of images, by default the test images, by the scores of a head."""
        images, classes = self.tested
        return Classification(
            name,
            source or images,
            classes,
            self.eval_ops,
            self.embedder(mesh, "logits"),
            lambda params, scores: lambda start, stop: scores[start:stop],
            self.metric,
            self.config.data.on_corrupt,
        )

    def zero_shot(self, name: str, mesh: Mesh, source: Source | None = None) -> ZeroShot:
        """Zero-shot classification of images, by default the test images."""
        images, classes = self.tested
        return ZeroShot(
            name,
            source or images,
            classes,
            self.eval_ops,
            self.embedder(mesh),
            self.templates,
            self.metric,
            self.config.data.on_corrupt,
        )

    def linear_probe(
        self,
        name: str,
        mesh: Mesh,
        train: Source,
        held: Source | None = None,
        compare: bool = False,
        image: str = "features",
        ops: str = "",
        hint: str | None = PROBE_HINT,
    ) -> LinearProbe:
        """A linear probe of the test images by the prediction `image`; C is chosen on `held`, or a part of `train`."""
        images, classes = self.tested
        return self.probe_class(
            name,
            as_labelled(train, classes),
            as_labelled(images, classes),
            ops or self.eval_ops,
            self.embedder(mesh, image),
            metric=self.metric,
            validation=self.config.holdout if held is None else as_labelled(held, classes),
            seed=self.config.seed,
            on_corrupt=self.config.data.on_corrupt,
            compare=compare,
            hint=hint,
        )


class ZeroShotSuite(ClassificationSuite):
    """Zero-shot classification of `config.data.test`."""

    needs_text, learns = True, False

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        return [self.zero_shot("zero_shot", mesh)]


class HeadSuite(ClassificationSuite):
    """The linear classifier that `config.init` holds (of protocol finetune_linear), on `config.data.test`.

    Raises:
      UserError: as `ClassificationSuite`; for weights without a classifier, other class names, images that do not fit.
    """

    learns = False

    def __init__(self, config: ConfigDict):
        if config.classes:
            raise UserError("config.classes: the classes are those of the weights; leave it out")
        super().__init__(config)
        self.head = self.encoder.known_head
        if self.classes is not None and self.classes.multi != self.head.multi:
            kinds = ("one class an image", "several classes an image")
            raise UserError(
                f"the classifier of {config.init} gives {kinds[self.head.multi]}, but {config.data.test} has "
                f"{kinds[self.classes.multi]}"
            )

    def _open_classes(self, names: str) -> ClassIndex | None:
        """The classifier's, joined to the labels of the images by name."""
        known = self.encoder.description
        given = ClassNames(known.classes, known.names)
        return None if self.test_source is None else open_classes(self.test_source, given, self.config.label_field)

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """The parts of the model."""
        return super().parts() | {ENTRY: self.head.part()}

    def load(self, mesh: Mesh) -> Params:
        """The weights of `config.init`, with the classifier."""
        return self.encoder.load_on(mesh, self.config.mesh.sharding_rules, head=True)

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        return [self.by_head("test", mesh)]


class ProbeSuite(ClassificationSuite):
    """A linear probe: logistic regression on the features of `config.data.train`."""

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        config = self.config
        if self.train_source is None:
            raise UserError("a probe needs images to learn from: give --config.data.train=DATA")
        held = open_images(config.validation) if config.validation else None
        return [self.linear_probe("probe", mesh, self.train_source, held, compare=config.probe.sklearn)]


class FewShotSuite(ClassificationSuite):
    """Episodes of few-shot classification on `config.data.test`."""

    learns = False

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        options = ("fewshot.train", "fewshot.ways", "fewshot.shots", "fewshot.queries", "fewshot.episodes")
        return {**super().identity, **make_identity(self.config, *options)}

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        options = self.config.fewshot
        episodes = FewShot(
            "fewshot",
            as_labelled(*self.tested),
            self.eval_ops,
            self.embedder(mesh, "flip_pair"),
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
        return [episodes]
