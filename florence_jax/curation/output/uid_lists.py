"""Lists of uids as text files, written by workers."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa

from florence_jax.curation.blocks import Repartition, by_identifier
from florence_jax.files import filesystem, write_bytes


class WriteUids(beam.PTransform):
    """Tables with "uid" -> text files of one uid a line, divided by ranges of uids; gives the number of uids.

    Read in the order of their names, the files hold the uids sorted.

    Args:
      pattern: path with a place for the number of the file, such as 'folder/{:05d}.txt'.
      count: files.
    """

    def __init__(self, pattern: str, count: int):
        super().__init__()
        self._pattern, self._count = pattern, count

    def expand(self, tables: beam.PCollection[pa.Table]) -> beam.PCollection[int]:
        """One shuffle. The one number comes after the last file; a range without uids gets an empty file."""
        numbers = functools.partial(by_identifier, column="uid", count=self._count)
        joined = {
            "every": tables.pipeline | "Files" >> beam.Create([(number, None) for number in range(self._count)]),
            "uids": tables | "ByUid" >> Repartition(numbers),
        }
        write = functools.partial(_write_uids, pattern=self._pattern)
        return joined | beam.CoGroupByKey() | beam.MapTuple(write) | "Add" >> beam.CombineGlobally(sum)


def _write_uids(number: int, joined: Mapping[str, Iterable[Any]], pattern: str) -> int:
    uids = [uid for table in joined["uids"] for uid in table["uid"].to_pylist()]
    write_bytes(pattern.format(number), "".join(f"{uid}\n" for uid in uids).encode())
    return len(uids)


def remove_other_lists(pattern: str, count: int) -> None:
    """Removes from the folder of `pattern`, which holds nothing else, the lists of a run with another `count`."""
    fs, folder = filesystem(pattern.rpartition("/")[0])
    wanted = {pattern.format(number).rpartition("/")[2] for number in range(count)}
    for path in fs.ls(folder, detail=False):
        if path.rpartition("/")[2] not in wanted:
            fs.rm_file(path)
