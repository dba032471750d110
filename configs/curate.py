"""Data curation: from raw image-text pairs to a training set.

    python -m florence_jax.curation.main --config=configs/curate.py                # the project's own raw sample
    python -m florence_jax.curation.main --config=configs/curate.py --input=my_pictures --workdir=runs/my_curated
    python -m florence_jax.curation.main --config=configs/curate.py:preset=florence --workdir=gs://bucket/fld \
        --input='web=gs://bucket/crawl/*.tar' --config.scores.relevance=checkpoint:gs://bucket/pretrain \
        --runner=FlinkRunner --beam='--flink_master=host:8081'
    python -m florence_jax.main --config=configs/pretrain.py --config.data.train=runs/curate/output

Arguments: preset = sample | own | florence | coyo | datacomp_basic; runlocal = the sample. Without one it is `own`
where there is an input, and else `sample`. The first command takes under a minute on two CPU cores. The last three
state published rules, and have not been run by this project.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError

PRESETS = ("sample", "own", "florence", "coyo", "datacomp_basic")
BY_INPUT = "by input"  # the sample's rules; `curation.main` takes those of `own` where there is an input


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for an argument string such as 'preset=coyo'."""
    given = parse_arg(arg, preset=BY_INPUT, runlocal=False)
    if given.runlocal:
        given.preset = "sample"
    rules = dict(zip(PRESETS, (_sample, _own, _florence, _coyo, _datacomp_basic), strict=True)) | {BY_INPUT: _sample}
    if given.preset not in rules:
        raise UserError(f"unknown preset {given.preset!r}; known: {', '.join(PRESETS)}")
    config = ConfigDict({"preset": given.preset} | _input() | _decisions() | _output())
    rules[given.preset](config)
    return config


def _input() -> dict:
    """Reading, measuring and the decisions about one picture or caption."""
    return {
        "inputs": "",  # NAME=PATH, several joined by '|'; --input overrides it. '': the project's own raw sample
        "workdir": "runs/curate",  # --workdir overrides it
        "seed": 0,
        "parts": 0,  # of the table of scores; 0: by the number of input splits
        "max_edges_in_memory": 200_000_000,  # between near-duplicates, of one worker; more are joined in rounds
        "measure": {
            "rows_per_split": 8192,
            "max_pixels": 64_000_000,  # as the header states them; more is a decompression bomb
            "max_bytes": 64_000_000,
            "max_aspect": 100.0,
            "animated": False,  # True: an animation is measured by its first frame
            "extra_fields": (),  # further fields of the raw pairs to keep
            "retry": (),  # statuses, such as ('missing', 'unreadable'), whose splits are measured again
        },
        "validity": {"drop": ()},  # of 'cmyk', 'alpha', 'orientation'
        "size": {"min_side": 200, "max_aspect": 3.0, "min_bytes": 5120, "max_bytes": 0},
        "near_duplicates": {
            "k": 4,  # bits of 64: 2, 4 or 6
            # Bits of 256. At 40, dedup.perturb misses its goal for gamma 1.5 (k = 6), with as few false pairs.
            "max_d256": 44,
            "hot_bucket": 50_000,
            "window": 256,
            "min_detail": 0.5,  # grey levels; flatter pictures are compared as exact copies only
        },
        "text": {"preset": "labels", "languages": (), "cap": 0},  # cap: pairs a caption, 0 for no cap
    }


def _decisions() -> dict:
    """Scores and the decisions that need them."""
    return {
        "scores": {  # field:NAME, module:function or checkpoint:FOLDER of a run or of imported weights
            "relevance": "",
            "nsfw": "",
            "learner_loss": "",
            "reference_loss": "",
        },
        "relevance": {
            "min_score": placeholder(float),
            "keep": 1.0,
            "tokenizer": "",  # of imported weights, whose folder does not name one
        },
        "selection": {
            "t": 0,  # pairs a metadata query, 0 for no balancing
            "metadata": "",  # file with one query a line
            "keep_unmatched": False,
            "min_bits": 0.0,
            "clusters": 0,  # of the image embeddings
            "cluster_t": 0,
            "min_gap": placeholder(float),
        },
        "post_filter": {
            # Patterns such as 'cc-by-*'; () for all. The public domain is allowed where CC-BY is.
            "licences": (),
            "blocked_domains": (),
            "max_nsfw": placeholder(float),
            "personal": ("mail", "phone", "card"),
            "hash_list": "",  # file of MD5, SHA-1, SHA-256 or PDQ hashes
            "takedown": "",  # file of 'uid HEX', 'url URL' or 'hash HEX'
            "robots": "",  # JSON file: host to robots.txt
            "tdmrep": "",  # JSON file: host to tdmrep.json
            "opt_out": {"agents": ()},
        },
        "decontamination": {"benchmarks": ConfigDict(), "min_detail": 0.0},  # name to folder of pictures
    }


def _output() -> dict:
    """What is written."""
    return {
        "output": {
            "formats": ("array_record",),  # also 'parquet', 'webdataset'
            "shards": 0,  # 0: a power of two, for records_per_shard
            "records_per_shard": 4096,
            "face_detector": "",  # module:function that gives boxes to blur
            "name": "curated",
            "description": "Image-text pairs curated with florence_jax.",
            "licence": "",  # URL, for the metadata
            "url": "",  # where the data set is described, for the metadata
        },
        "report": {"examples": 6},  # pictures a reason
    }


def _sample(config: ConfigDict) -> None:
    """The project's own sample: drawings of 64 pixels with one- to three-word captions."""
    config.measure.rows_per_split = 128
    config.measure.extra_fields = ("keywords", "group")
    config.size.min_side = 32
    config.size.min_bytes = 100
    config.text.languages = ("en",)
    config.text.cap = 20
    config.post_filter.licences = ("cc-by-*", "cc0-*")
    config.post_filter.blocked_domains = ("blocked.example",)
    config.output.records_per_shard = 512
    config.output.name = "florence_jax-sample"


def _own(config: ConfigDict) -> None:
    """Pictures that somebody chose: what cannot be used goes, and copies; no rule on licences, languages, small files.

    Rights, opt-outs of publishers and personal data in captions are looked at as everywhere.
    """
    config.size.min_side = 32
    config.size.min_bytes = 0
    config.size.max_aspect = 10.0


def _florence(config: ConfigDict) -> None:
    """Yuan et al. 2021, section 2.1: hash near-duplicates, small images, image-text relevance, balanced sampling.

    The paper gives no thresholds: those of ALIGN (Jia et al. 2021) stand in, as it says that it filters like ALIGN.
    Set scores.relevance, and for the balanced sampling selection.t and selection.metadata.
    """
    config.text.preset = "align"
    config.text.cap = 1000
    config.relevance.keep = 0.3


def _coyo(config: ConfigDict) -> None:
    """COYO-700M (Byeon et al. 2022): 200 pixels, 5 KB, aspect 3, captions of 3 to 256 words seen at most 10 times.

    COYO drops captions that occur more often; here the first ten stay, since shared captions are UniCL's labels.
    """
    config.text.preset = "coyo"
    config.text.cap = 10


def _datacomp_basic(config: ConfigDict) -> None:
    """DataComp's basic filter (Gadre et al. 2023): English, over 2 words and 5 characters, 200 pixels, aspect 3."""
    config.text.preset = "datacomp_basic"
    config.text.languages = ("en",)
    config.size.min_bytes = 0
