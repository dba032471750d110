"""Small raw pairs and configurations for the tests of curation."""

import copy
import functools
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms import userstate
from PIL import Image

from configs.curate import get_config
from florence_jax.curation.main import beam_options

# Building its pipelines, Beam parses the same few arguments 2,650 times a run and looks at the signatures of the same
# functions 1,700 times: half of the time of a run on sixty pairs. Here each is done once.
PARSED, PARSE = {}, PipelineOptions.view_as


def view_as(self, kind):
    """`PipelineOptions.view_as` with arguments that were parsed before."""
    key = kind, None if self._flags is None else tuple(self._flags)
    if key not in PARSED:
        PARSED[key] = copy.deepcopy(PARSE(self, kind)._visible_options)
    view = kind.__new__(kind)
    view._flags, view._visible_options, view._all_options = self._flags, copy.deepcopy(PARSED[key]), self._all_options
    for name in view._visible_option_list():
        self._all_options.setdefault(name, getattr(view._visible_options, name))
    return view


PipelineOptions.view_as = view_as
userstate.get_dofn_specs = functools.cache(userstate.get_dofn_specs)


def picture(number, size=(96, 80), kind="PNG", **options):
    """A picture that only another one of the same number resembles."""
    rng = np.random.default_rng([7, number])
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


def pairs(count, first=0):
    return [
        {
            "key": f"{i:04d}",
            "image": picture(i),
            "caption": f"thing number {i} on a table",
            "url": f"https://a.example/{i}",
        }
        for i in range(first, first + count)
    ]


def write_parquet(path, rows, group=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({name for row in rows for name in row})
    pq.write_table(pa.table({n: [row.get(n) for row in rows] for n in names}), str(path), row_group_size=group)
    return str(path)


def small_config(inputs, **changes):
    """The sample's configuration as a dict; changes as section={name: value} or name=value."""
    config = copy.deepcopy(get_config().to_dict())
    config |= {"inputs": str(inputs), "parts": 3}
    config["post_filter"]["licences"] = ()
    config["text"]["languages"] = ()
    config["measure"]["rows_per_split"] = 16
    config["output"]["shards"] = 2
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return config


def stamps(folder, pattern):
    """Which file each name is: another one once it has been written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(folder).glob(pattern)}


ONE_PROCESS = beam_options("DirectRunner", 1, "")
