"""Trained weights from Python: embed pictures and texts, classify pictures by the names of classes.

    from florence_jax.inference import Florence

    model = Florence("runs/pretrain")
    images = model.embed_images(["cat.jpg", "dog.jpg"])  # (2, D) unit vectors
    texts = model.embed_texts(["a cat", "a dog"])
    cosines = images @ texts.T
    probabilities = model.classify(["cat.jpg"], ["cat", "dog", "horse"])
    answers = Florence("runs/mine").predict(["cat.jpg"])  # of weights fine-tuned for classes: [[("cat", .98)]]
    found = Florence("runs/detect").detect(["street.jpg"])  # [{"boxes": ..., "scores": ..., "labels": ..., "names"}]
    found = Florence("runs/proposals").detect(["street.jpg"], names=["cat", "traffic light"])
    answers = Florence("runs/vqa").answer(["street.jpg"], ["How many cars are there?"])  # [[("2", .9), ...]]
    matches = Florence("runs/vlp").match(["street.jpg"], ["two cars in a street"])  # [.97]

    actions = Florence("runs/video").recognise(["clip.mp4"])  # [[("juggling", .93), ...]]

`docs/colab.ipynb` does this in a notebook. For evaluations with metrics use `python -m florence_jax.main`.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from florence_jax.data.prompts import TEMPLATES, VIDEO_PROMPTS
from florence_jax.data.records import ListSource, Source
from florence_jax.errors import UserError
from florence_jax.evaluators.metrics import softmax
from florence_jax.evaluators.predictor import Embedder, Predictor
from florence_jax.evaluators.zero_shot import class_embeddings
from florence_jax.inference.answers import Beside, FusionReader
from florence_jax.inference.base import best_classes
from florence_jax.inference.detector import TOLD_FROM, BoxFinder, NamedBoxFinder
from florence_jax.inference.video import VideoReader
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks.detector import Detector
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.fusion import FusedTowers, text_ids

Picture = str | os.PathLike | Image.Image | np.ndarray
VideoLike = str | os.PathLike | bytes | np.ndarray


class Florence:
    """Weights on all devices of this process, ready to use.

    Texts and pictures are put through in batches of a power of two, up to `batch_size`, so that few sizes are compiled
    (each once, seconds to minutes).

    Args:
      init: workdir of a run, its `checkpoints/`, or a folder written by `florence_jax.tools.import_torch`; the moving
        average of the weights is taken where the run kept one.
      res: image size in pixels, if not the one trained with; bias tables and position embeddings are resized.
      tokenizer: as for `data.tokenizers.load_tokenizer`; needed for imported CLIP, OpenCLIP and UniCL weights,
        whose folder does not say.
      precision: compute dtype, 'float32' or 'bfloat16' (accelerators).
      batch_size: most pictures or texts a call of the model.

    Attributes:
      encoder: `tasks.encoder.Encoder`: the model, its configuration, and pure functions for use under `jax.jit`,
        `encoder.predict["image"](params, {"image": uint8 (B, H, W, 3)})`.
      params: nested dict of float32 arrays.

    Raises:
      UserError: for a folder without weights, or options that do not fit it.
    """

    def __init__(
        self,
        init: str | os.PathLike,
        res: int | None = None,
        tokenizer: str = "",
        precision: str = "float32",
        batch_size: int = 256,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.encoder = Encoder(os.fspath(init), {"res": res}, tokenizer, precision)
        self._mesh, self._batch_size = make_mesh(-1, 1), batch_size
        self.params = self.encoder.load_on(self._mesh, head=True)
        self._embedders: dict[tuple[str, int], Embedder] = {}

    def embed_images(self, images: Sequence[Picture]) -> np.ndarray:
        """Unit vectors in the joint space of pictures and texts.

        Args:
          images: N paths, PIL pictures, or uint8 arrays (H, W, 3), (H, W, 1) or (H, W); each is resized by its shorter
            side and cropped in the middle.

        Returns:
          float32 (N, D). Of weights without a projection (Swin classifiers): the image tower's features, made unit.

        Raises:
          UserError: for no pictures, or one that cannot be read, by its path or number.
        """
        return self.embed_source(_as_source(images), on_corrupt="error", quiet=True)["embedding"]

    def features(self, images: Sequence[Picture]) -> np.ndarray:
        """What the image tower gives before the projection, for a classifier of your own: float32 (N, C).

        Arguments and errors as for `embed_images`.
        """
        return self.embed_source(_as_source(images), on_corrupt="error", tower="features", quiet=True)["embedding"]

    def embed_source(
        self, source: Source, on_corrupt: str = "skip", tower: str = "image", quiet: bool = False
    ) -> dict[str, np.ndarray]:
        """Embeds a source (`data.sources.catalog.open_source`) of any length without holding its pictures in memory.

        Args:
          source: N records.
          on_corrupt: 'skip' leaves unreadable records out, 'error' raises.
          tower: 'image', or 'features' as the method of that name.
          quiet: do not print images per second.

        Returns:
          "embedding" float32 (n, D) and "index" int32 (n,), the rows of the n readable records.

        Raises:
          UserError: as above.
        """
        ops = f"{self.encoder.eval_ops}|keep(image)"
        embedder = self._embedder(tower, len(source))
        return embedder.images(self.params, source, ops, on_corrupt=on_corrupt, quiet=quiet)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of the same space: float32 (N, D).

        Raises:
          UserError: for no texts, one without words, weights without a text tower or without a known tokenizer.
        """
        _check_list(texts, "texts")
        self._check_text()
        return self._embedder("text", len(texts)).texts(self.params, list(texts))

    def classify(
        self,
        images: Sequence[Picture],
        names: Sequence[str | Sequence[str]],
        templates: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Zero-shot classification: the probabilities of K classes given by name.

        The softmax over classes of the trained logit scale times the cosines between a picture and each class, which
        is the mean of its prompts (CLIP; Florence section 3.1).

        Args:
          images: N pictures as for `embed_images`.
          names: K names, such as "golden retriever"; or several that mean the same, such as ("sofa", "couch").
          templates: prompts with one '{}' each; by default those that the weights were fine-tuned with, else the 80 of
            CLIP and one more.

        Returns:
          float32 (N, K), rows sum to 1.

        Raises:
          UserError: as `embed_images` and `embed_texts`; for a template without '{}'.
        """
        return softmax(self.embed_images(images) @ self._class_vectors(names, templates))

    def _class_vectors(self, names: Sequence[str | Sequence[str]], templates: Sequence[str] | None) -> np.ndarray:
        """float32 (D, K): what the vectors of pictures are multiplied with to give the logits of classes."""
        _check_list(names, "names")
        self._check_text()
        if templates is None:
            templates = self.encoder.description.templates or TEMPLATES
        prompts = len(templates) * sum(1 if isinstance(given, str) else len(given) for given in names)
        embedder = self._embedder("text", prompts)
        classes = class_embeddings(embedder, self.params, names, templates)
        return float(np.exp(self.params["logit_scale"])) * classes.T

    @property
    def classes(self) -> tuple[str, ...]:
        """The K classes that the weights were trained for, in the order of `probabilities`; () for none."""
        return self.encoder.description.classes

    def probabilities(self, images: Sequence[Picture]) -> np.ndarray:
        """Of the classes that the weights were trained for, by their linear head or else by the classes' prompts.

        Args:
          images: N pictures as for `embed_images`.

        Returns:
          float32 (N, K); rows sum to 1, but for a head of several classes an image, whose entries stand alone.

        Raises:
          UserError: as `classify`; for weights that were not trained for classes.
        """
        if self.encoder.head is None and self.classes:
            return self.classify(images, self.encoder.description.names)
        source = _as_source(images)
        _ = self.encoder.known_head
        logits = self.embed_source(source, on_corrupt="error", tower="logits", quiet=True)["embedding"]
        return self.encoder.known_head.probabilities(logits)

    def each_probability(
        self,
        source: Source,
        names: Sequence[str | Sequence[str]] = (),
        templates: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, str, np.ndarray]]:
        """As `probabilities`, or `classify` where names are given, of a source of any length.

        Yields:
          (row of the source, key, float32 (K,)) of each readable record, in order.

        Raises:
          UserError: as those.
        """
        vectors = self._class_vectors(names, templates) if names else None
        function = self.encoder.predict["logits" if vectors is None else "image"]
        size = min(self._batch_size, 1 << max(len(source) - 1, 0).bit_length())
        predictor = Predictor(lambda params, batch: {"out": function(params, batch)}, self._mesh, size)
        ops = f"{self.encoder.eval_ops}|keep(image, key)"
        for row in predictor.rows(self.params, source, ops, {}, host=("key",), on_corrupt="skip"):
            out = row["out"][None]
            found = self.encoder.known_head.probabilities(out) if vectors is None else softmax(out @ vectors)
            yield row["index"], row["key"], found[0]

    def predict(self, images: Sequence[Picture], top: int = 1) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each picture, with their probabilities, best first.

        Args:
          images: N pictures as for `embed_images`.
          top: classes given of each.

        Returns:
          N lists of (name, probability).

        Raises:
          UserError: as `probabilities`.
        """
        return [best_classes(row, self.classes, top) for row in self.probabilities(images)]

    def detect(
        self,
        images: Sequence[Picture],
        threshold: float = TOLD_FROM,
        top: int = 100,
        names: Sequence[str | Sequence[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """Objects in pictures, by the detector that the folder holds (configs/detect.py).

        Args:
          images: N pictures as for `embed_images`; each is looked at whole, at the size that the detector was trained
            with.
          threshold: least score of a box. top: most boxes of a picture.
          names: classes to look for, as `classify` takes them, which need not have been trained for: of a folder with
            a class-agnostic detector (recipe=proposals). None: the detector's own.

        Returns:
          N dicts, boxes best first: "boxes" float32 (n, 4), x1 y1 x2 y2 in pixels of the upright picture, "scores"
          float32 (n,), "labels" int32 (n,), numbers of classes, "names", n names of classes; of a detector that has
          learned attributes also "attributes", of each box a list of (name, probability) from .1 on, the likeliest
          first.

        Raises:
          UserError: as `embed_images`; for a folder without a detector, a threshold outside 0 to 1, a top below 1,
            names of a detector with classes of its own, no names, or one twice.
        """
        source, finder = _as_source(images), self._finder
        if names is not None:
            finder = self._named_finder
            self._named_finder.choose(names)
        told = finder.names
        return [
            {
                "boxes": found.boxes,
                "scores": found.scores,
                "labels": found.labels,
                "names": [told[label] for label in found.labels],
                **({} if found.attributes is None else {"attributes": found.attributes}),
            }
            for found in finder.boxes(source, threshold, top, on_corrupt="error")
        ]

    def answer(
        self, images: Sequence[Picture], questions: Sequence[str], top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Answers to questions about pictures, by a folder of configs/vqa.py.

        Args:
          images: N pictures as for `embed_images`; or one, for all questions. A path or an object that is there several
            times is encoded once.
          questions: N; or one, for all pictures.
          top: answers given of each.

        Returns:
          N lists of (answer, probability), best first. Each answer's probability is its own (a sigmoid): that it is
          right, as people gave it; those of one question do not add up to 1.

        Raises:
          UserError: as `embed_images`; for a folder without a head of answers, an empty question.
        """
        texts = self._beside(images, questions, "questions")
        return [said.best for said in self._fusion_reader.answers(texts, _checked_top(top), len(texts))]

    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> np.ndarray:
        """Whether texts belong to pictures, by a folder of configs/vlp.py.

        Args:
          images, texts: N of both, or one of one of them, as for `answer`.

        Returns:
          float32 (N,): probability of a match.

        Raises:
          UserError: as `answer`.
        """
        return self._fusion_reader.match(self._beside(images, texts, "texts"))

    def fill(self, images: Sequence[Picture], texts: Sequence[str], top: int = 5) -> list[list[tuple[str, float]]]:
        """The word behind a mask in a text beside a picture, by a folder of configs/vlp.py.

        Args:
          images, texts: N of both, or one of one of them, as for `answer`. Each text has '<mask>' once: it stands for a
            token of the vocabulary, which may be a part of a word.
          top: tokens given of each.

        Returns:
          N lists of (token, probability), best first; the probabilities of all tokens add up to 1.

        Raises:
          UserError: as `answer`; for a text without '<mask>', or with several.
        """
        return self._fusion_reader.words(self._beside(images, texts, "texts", masked=True), _checked_top(top))

    @functools.cached_property
    def _fusion_reader(self) -> FusionReader:
        """Loaded when it is first asked."""
        return FusionReader(FusedTowers(self._again()), self._batch_size)

    def _beside(self, images: Sequence[Picture], texts: Sequence[str], what: str, masked: bool = False) -> list[Beside]:
        _check_list(images, "images")
        _check_list(texts, what)
        if len(images) != len(texts) and 1 not in (len(images), len(texts)):
            raise UserError(
                f"{len(images)} images and {len(texts)} {what}: give as many of both, or one of one of them"
            )
        numbers = {_same(image): place for place, image in reversed(list(enumerate(images)))}
        different = sorted(numbers.values())
        source = _as_source([images[place] for place in different])
        rows = self._fusion_reader.pictures(source, on_corrupt="error")
        tokens = {place: row["tokens"] for place, row in zip(different, rows, strict=True)}
        ids = [self._ids(text, masked) for text in texts]
        return [
            Beside(tokens[numbers[_same(images[k % len(images)])]], *ids[k % len(texts)])
            for k in range(max(len(images), len(texts)))
        ]

    def _ids(self, text: str, masked: bool) -> tuple[np.ndarray, int, int]:
        """Ids of a text, their number, and the place of its mask."""
        tokenizer = self._fusion_reader.fused.tokenizer
        if not masked:
            return (*text_ids(tokenizer, text), 0)
        ids = tokenizer.with_masks(text)
        places = np.flatnonzero(ids == tokenizer.mask_id)
        if len(places) > 1:
            raise UserError(f"text {text!r} has {len(places)} masks: ask for one word at a time")
        return ids, int(tokenizer.lengths(ids)), int(places[0])

    @functools.cached_property
    def _finder(self) -> BoxFinder:
        """Loaded when it is first asked."""
        return BoxFinder(Detector(self._again()), self._batch_size)

    @functools.cached_property
    def _named_finder(self) -> NamedBoxFinder:
        """The same, for classes by name."""
        return NamedBoxFinder(self._again(), self._batch_size)

    def _again(self) -> Encoder:
        """The folder's towers as a detector takes them: of their own size."""
        return Encoder(
            self.encoder.description.folder, None, self.encoder.tokenizer_spec, self.encoder.model.config.dtype
        )

    def recognise(self, videos: Sequence[VideoLike], top: int = 5) -> list[list[tuple[str, float]]]:
        """Actions in videos, by the classifier that the folder holds (configs/video.py), best first.

        Args:
          videos: N paths, encoded bytes, or uint8 arrays (T, H, W, 3).
          top: classes given of each.

        Returns:
          N lists of (name, probability), means over several clips and crops of each video.

        Raises:
          UserError: for no videos, one that cannot be read, or a folder without such a classifier.
        """
        reader, names = self._reader, self._reader.classes
        found = reader.probabilities(_as_source(videos, "video"), "error")
        return [best_classes(row, names, top) for _, row in found]

    def embed_videos(self, videos: Sequence[VideoLike], frames: int | None = None, tower: str = "image") -> np.ndarray:
        """Unit vectors in the joint space of pictures and texts.

        Args:
          videos: as for `recognise`.
          frames: of each, evenly spread by time; None: 8, of the video tower as many as it was trained on.
          tower: 'image': the mean of the vectors of the frames; 'video': of the folder's video tower, or of one
            inflated from its image tower.

        Returns:
          float32 (N, D).

        Raises:
          UserError: as `recognise`; for another tower, and one that cannot be made of the image tower.
        """
        return self.embed_video_source(_as_source(videos, "video"), frames, tower, "error")["embedding"]

    def embed_video_source(
        self, source: Source, frames: int | None = None, tower: str = "image", on_corrupt: str = "skip"
    ) -> dict[str, np.ndarray]:
        """As `embed_videos`, of a source (`data.sources.video.open_clips`) of any length: what `embed_source` gives.

        Raises:
          UserError: as `embed_videos`; where none can be read.
        """
        return self._reader.vectors(source, frames, tower, on_corrupt)

    def classify_videos(
        self,
        videos: Sequence[VideoLike],
        names: Sequence[str | Sequence[str]],
        templates: Sequence[str] = VIDEO_PROMPTS,
        frames: int | None = None,
        tower: str = "image",
    ) -> np.ndarray:
        """Zero-shot classification of videos, as `classify` of pictures: float32 (N, K), rows sum to 1.

        Args:
          videos, frames, tower: as for `embed_videos`.
          names, templates: as for `classify`.
        """
        classes = self._class_vectors(names, templates)
        return softmax(self.embed_videos(videos, frames, tower) @ classes)

    @functools.cached_property
    def _reader(self) -> VideoReader:
        return VideoReader(self.encoder, self._batch_size, self.params)

    def _check_text(self) -> None:
        if not self.encoder.has_text:
            raise UserError(f"{self.encoder.description.folder} holds no text tower: it can embed no texts")
        _ = self.encoder.tokenizer  # raises where nobody named it

    def _embedder(self, tower: str, count: int) -> Embedder:
        size = min(self._batch_size, 1 << max(count - 1, 0).bit_length())
        if (tower, size) not in self._embedders:
            as_tower = "text" if tower == "text" else "image"
            tokenizer = self.encoder.tokenizer if tower == "text" else None
            functions = {as_tower: self.encoder.predict[tower]}
            self._embedders[tower, size] = Embedder(functions, tokenizer, self._mesh, size)
        return self._embedders[tower, size]


def _checked_top(top: int) -> int:
    if top < 1:
        raise UserError(f"top={top} must be at least 1")
    return top


def _same(image: Picture) -> Any:
    """Equal for pictures that are known to be the same."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else id(image)


def _check_list(values: Any, what: str) -> None:
    if isinstance(values, (str, bytes, os.PathLike, Image.Image)):
        raise UserError(f"{what} are given in a list, such as [{values!r}]")
    if not len(values):
        raise UserError(f"no {what} given")


def _as_source(images: Sequence[Picture | VideoLike], field: str = "image") -> Source:
    _check_list(images, f"{field}s")
    if isinstance(images, np.ndarray) and images.ndim < (4 if field == "image" else 5):
        many = "many as (N, H, W, 3)" if field == "image" else "many as (N, T, H, W, 3)"
        raise UserError(f"an array {images.shape} is one {field}: give [array], or {many}")
    return ListSource(f"{field}s", images, field)
