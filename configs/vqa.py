"""Question answering: a fusion of image and text that answers questions, on scenes or on questions of your own.

    python -m florence_jax.main --config=configs/vqa.py --config.init=runs/vlp                # on scenes (laptop)
    python -m florence_jax.main --config=configs/vqa.py --config.data.train=my_folder --config.init=DIR
    python -m florence_jax.main --config=configs/vqa.py:recipe=paper --config.init=DIR \
        --config.data.train=vqa:QUESTIONS.json:ANNOTATIONS.json:train2014
    python -m florence_jax.main --config=configs/vqa.py:protocol=eval --config.init=runs/vqa \
        --config.data.test=my_folder

Data with questions: a folder with questions.jsonl (lines of image, question, answer or answers), vqa:QUESTIONS.json
[:ANNOTATIONS.json]:IMAGES, scene_questions:SPLIT; see docs/vision_language.md. `--config.init` is the workdir of a run:
of configs/vlp.py (the default), or one with both towers, whose fusion then begins anew. Results are in
WORKDIR/result.json, answers_NAME.json (as VQA's server takes it) and report.html.

Arguments: protocol = train | eval (a trained model on config.data.test) | nlvr2 (is a sentence true of two pictures?
data nlvr2:FILE.json:IMAGES) | snli_ve (does a picture entail a sentence? data snli_ve:FILE.jsonl:IMAGES) | rerank
(retrieval on config.eval.source, its first k put in order by a fusion of configs/vlp.py);
recipe = paper (10 epochs, 8e-6; what it leaves open is METER's; never run here); without one, batch, epochs and
learning rate follow the number of images; variant = size of the towers, for a preflight without weights; res = side of
the picture in pixels; runlocal.

A preflight (florence_jax.tools.aot_compile) needs neither weights nor data: --config.init= and variant=NAME.
"""

from ml_collections import ConfigDict, config_dict

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.train.defaults import common, fusion_overrides, model_overrides

PROTOCOLS = ("train", "eval", "nlvr2", "snli_ve", "rerank")
RECIPES = ("", "paper")


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'recipe=paper,variant=H'."""
    given = parse_arg(arg, protocol="train", recipe="", variant="", res=0, runlocal=False)
    for name, value, known in (("protocol", given.protocol, PROTOCOLS), ("recipe", given.recipe, RECIPES)):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}; known: {', '.join(filter(None, known))}")
    trains = given.protocol not in ("eval", "rerank")
    config = common("runs/vqa" if given.protocol == "train" else f"runs/vqa_{given.protocol}")
    config.task, config.protocol, config.mode = "vqa", given.protocol, "train" if trains else "eval"
    config.init = "runs/vqa" if given.protocol == "eval" else "runs/vlp"
    _model(config, given.variant)
    config.micro_batch = {"images": 0, "texts": 0}  # so many of a device at once; 0: all. Texts: with their questions
    config.data.train = "scene_questions:train" if given.protocol == "train" else ""
    config.data.test = ""  # several joined by '|'; '': `holdout` of the images of data.train; of scenes held-out ones
    config.holdout = 0.2  # share (from 1 on: number) of the images that are kept for testing
    config.data.train_ops = "decode|resize_exact({res})"  # no flips, no colours: both would change answers
    config.data.eval_ops = "" if not trains else "decode|resize_exact({res})"  # '': those of the weights
    config.language = {  # what reads the texts
        "init": "",  # a folder with RoBERTa (import_torch --from=roberta); '': that of config.init, or its text tower
        "length": config_dict.placeholder(int),  # tokens of a text; of a text tower config.model.overrides.text_length
    }
    if given.protocol == "rerank":
        config.eval.source = "scene_captions:held_out"
        config.rerank = {
            "k": 16,  # of each query, found by the towers
            "towers": "",  # weights of the towers; '': where config.init has its own from
        }
    config.text = {"tokenizer": ""}
    config.batch_size = config_dict.placeholder(int)  # images, each with its questions. None: by the number of images
    config.epochs = config_dict.placeholder(int)
    config.total_steps = 0  # above 0 it overrides epochs
    config.eval.every, config.eval.batch_size = 0, 64
    config.optim.learning_rate = config_dict.placeholder(float)
    config.optim.warmup_steps = config_dict.placeholder(int)  # at most a tenth of the steps
    config.optim.schedule, config.optim.final_fraction = "linear", 0.0
    config.optim.weight_decay = 0.01
    if given.recipe:
        _paper(config)
    if given.res:
        config.model.overrides.update(res=given.res, window=None)
    if given.runlocal:
        _runlocal(config)
    return config


def _model(config: ConfigDict, variant: str) -> None:
    """The model, its answers, and what stands beside it."""
    config.model = {"variant": variant, "overrides": model_overrides()}  # as config.init says
    config.fusion = {
        "variant": "",  # see models/fusion.py; '': the folder's, else by the size of the towers
        "overrides": fusion_overrides(),
        "begin": "joint",  # of a fresh one: in the joint space of the towers, where that fits; or 'random' (METER)
        "fusion_lr": 5.0,  # learning rate of the fusion over that of the towers,
        "head_lr": 50.0,  # of the head of answers
        "freeze": "both",  # towers that are not trained: image | text | both
    }
    config.answers = {
        "file": "",  # a list to choose from, a line each; '': made of the answers that are trained on
        "min_count": config_dict.placeholder(int),  # questions that an answer must be of; None: 9, of a small set 2
        "match": "normalised",  # or 'raw', as METER has it: only answers written as in the list count
    }
    config.questions_per_image = 0  # that share its encoding; 0: as many as most images have, at most 8
    config.blind = False  # the mean colour instead of the picture: what questions alone are worth
    config.towers_only = {  # beside the model: logistic regression on the embeddings of picture and question
        "init": "",  # of the towers; '': where config.init has its own from
        "pictures": 1000,  # of data.train that it is fitted on, with their questions; 0: not done
    }
    # Beside the model: convolutions times a bag of words, trained on the same questions for so long; 0: not done.
    config.small_network = {"seconds": 0.0}


def _paper(config: ConfigDict) -> None:
    """10 epochs at 8e-6, 3,129 answers, 1,000 images held out (Florence, section 3.4); the rest is METER's."""
    config.workdir += "_paper"
    config.model.overrides.update(res=576, text_length=50)
    config.fusion.begin, config.fusion.freeze = "random", ""
    config.data.train, config.holdout = "", 1000
    config.data.train_ops = config.data.eval_ops = "decode|resize({res})|center_crop({res})"
    config.answers.min_count = 9
    config.epochs, config.optim.learning_rate = 10, 8e-6


def _runlocal(config: ConfigDict) -> None:
    """Two minutes."""
    config.batch_size, config.data.workers, config.eval.batch_size = 8, 0, 8
    config.total_steps, config.log.every, config.towers_only.pictures = 2, 1, 20
    config.workdir += "_runlocal"
