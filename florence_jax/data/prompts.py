"""Prompt templates, and the prompts they make of captions and class names."""

from collections.abc import Sequence

import numpy as np

from florence_jax.errors import UserError

# CLIP's 80 templates for ImageNet, and the bare name, which UniCL (Yang et al. 2022) adds in training.
TEMPLATES = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
    "{}.",
)
_ARTICLES = ("a photo of a {}.", "a photo of the {}.")
_CIFAR = tuple(
    f"a {kind}photo of {article} {{}}."
    for article in ("a", "the")
    for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
) + tuple(f"a photo of {article} {size} {{}}." for article in ("a", "the") for size in ("small", "big"))
# Things drawn, made or photographed, each with "a" and with "the": CLIP's for Caltech-101.
_DEPICTED = tuple(
    template.format(article)
    for article in ("a", "the")
    for template in (
        "a photo of {} {{}}.",
        "a painting of {} {{}}.",
        "{} plastic {{}}.",
        "a sculpture of {} {{}}.",
        "a sketch of {} {{}}.",
        "a tattoo of {} {{}}.",
        "{} toy {{}}.",
        "a rendition of {} {{}}.",
        "{} embroidered {{}}.",
        "{} cartoon {{}}.",
        "{} {{}} in a video game.",
        "{} plushie {{}}.",
        "{} origami {{}}.",
        "art of {} {{}}.",
        "graffiti of {} {{}}.",
        "a drawing of {} {{}}.",
        "a doodle of {} {{}}.",
    )
)
_OVERHEAD = tuple(
    f"{kind} of {article}{{}}."
    for article in ("", "a ", "the ")
    for kind in (f"{source} {what}" for what in ("imagery", "photo", "view") for source in ("satellite", "aerial"))
)
_ACTIONS = tuple(
    f"a {kind} of {article} person {verb}{{}}."
    for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
    for article in ("a", "the")
    for kind in ("photo", "video", "example", "demonstration")
)
# Data set name (TFDS's where it has one, without "/") -> CLIP's templates for zero-shot classification on it.
# Of the names of actions.
VIDEO_PROMPTS = ("a video of a person {}.", "a video of {}.", "a person {}.")
TEMPLATE_SETS = {
    "default": TEMPLATES,
    "imagenet2012": TEMPLATES[:80],
    "name": ("{}",),
    "birdsnap": ("a photo of a {}, a type of bird.",),
    "caltech101": _DEPICTED,
    "cars196": (
        *_ARTICLES,
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "country211": (
        "a photo i took in {}.",
        "a photo i took while visiting {}.",
        "a photo from my home country of {}.",
        "a photo from my visit to {}.",
        "a photo showing the country of {}.",
    ),
    "dtd": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "fer2013": (
        "a photo of a {} looking face.",
        "a photo of a face showing the emotion: {}.",
        "a photo of a face looking {}.",
        "a face that looks {}.",
        "they look {}.",
        "look at how {} they are.",
    ),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "food101": ("a photo of {}, a type of food.",),
    "gtsrb": tuple(f'a {kind} photo of a "{{}}" traffic sign.' for kind in ("zoomed in", "centered", "close up")),
    "hateful_memes": ("a {}.",),
    "kitti": ("{}",),
    "mnist": ('a photo of the number: "{}".',),
    "oxford_flowers102": ("a photo of a {}, a type of flower.",),
    "oxford_iiit_pet": ("a photo of a {}, a type of pet.",),
    "patch_camelyon": ("this is a photo of {}",),
    "rendered_sst2": ("a {} review of a movie.",),
    "resisc45": _OVERHEAD,
    "stl10": _ARTICLES,
    "sun397": _ARTICLES,
    "ucf101": _ACTIONS,
    "voc2007": ("a photo of a {}.",),
}


def template_set(name: str) -> tuple[str, ...]:
    """Returns the templates of a data set, e.g. `template_set("food101")`; 'voc/2007' is 'voc2007'.

    Raises:
      UserError: for a name that is not in TEMPLATE_SETS.
    """
    plain = name.replace("/", "")
    if plain not in TEMPLATE_SETS:
        raise UserError(f"no prompt templates for {name!r}; known sets: {', '.join(TEMPLATE_SETS)}")
    return TEMPLATE_SETS[plain]


def apply_prompt(caption: str, rng: np.random.Generator, templates: Sequence[str] = TEMPLATES) -> str:
    """Puts a caption of one or two words into a template drawn uniformly; returns longer ones as they are.

    Florence does so in the first stage of pretraining only (pass no templates in the others). As in UniCL, commas are
    removed from the caption and "+" becomes a space; labels must be made from the caption before this.

    Raises:
      UserError: for a template without exactly one '{}'.
    """
    if not templates or len(caption.split()) not in (1, 2):
        return caption
    return _fill(templates[int(rng.integers(len(templates)))], _class_name(caption))


def class_prompts(name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """All prompts of a class name of any length, for the zero-shot ensemble: one per template, in order.

    Raises:
      UserError: for an empty name, no templates, or a template without exactly one '{}'.
    """
    if not templates:
        raise UserError("class_prompts needs at least one template; ('{}',) gives the bare name")
    text = _class_name(name)
    if not text:
        raise UserError(f"class name {name!r} is empty")
    return [_fill(template, text) for template in templates]


def _class_name(name: str) -> str:
    plain = " ".join(name.replace(",", "").replace("+", " ").split())
    return plain or name.strip()  # a name such as "+" is kept


def _fill(template: str, name: str) -> str:
    before, slot, after = template.partition("{}")
    if not slot or "{}" in after:
        raise UserError(f"prompt template {template!r} must have '{{}}' exactly once, for the name")
    return f"{before}{name}{after}"
