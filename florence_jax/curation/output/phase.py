"""The output shards, their checksums and the root over all of them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam

from florence_jax.curation.output.shards import Writer, WriteShards, is_shard
from florence_jax.curation.run import Run
from florence_jax.files import filesystem, read_json, write_bytes


def write_output(run: Run, decisions: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the shards that are not there yet; removes those of other runs; checksums and their Merkle root."""
    folder, output = f"{run.workdir}/decisions", run.config["output"]
    writer = Writer(run.workdir, folder, output["formats"], output["face_detector"], decisions["shards"])
    counts = f"{run.workdir}/output/manifest/written.json"
    run.beam(lambda root: root | beam.Create(list(range(decisions["shards"]))) | WriteShards(writer, counts))
    manifests = [read_json(f"{run.workdir}/output/manifest/{i:05d}.json") for i in range(decisions["shards"])]
    files = {name: facts for manifest in manifests for name, facts in manifest["files"].items()}
    _remove_others(f"{run.workdir}/output", files, decisions["shards"])
    lines = [f"{facts['sha256']}  {name}\n" for name, facts in sorted(files.items())]
    write_bytes(f"{run.workdir}/output/SHA256SUMS", "".join(lines).encode())
    return {
        "records": sum(manifest["records"] for manifest in manifests),
        "files": files,
        "root": merkle_root([facts["sha256"] for _, facts in sorted(files.items())]),
        **read_json(counts),
    }


def _remove_others(folder: str, files: Mapping[str, Any], shards: int) -> None:
    fs, inner = filesystem(folder)
    for path in fs.ls(inner, detail=False):
        name = path.rpartition("/")[2]
        if is_shard(name) and name not in files:
            fs.rm_file(path)
    for path in fs.ls(f"{inner}/manifest", detail=False):
        number = path.rpartition("/")[2].removesuffix(".json")
        if number.isdigit() and int(number) >= shards:
            fs.rm_file(path)


def merkle_root(digests: Sequence[str]) -> str:
    """SHA-256 tree over hexadecimal digests in their order: one value that stands for the whole output."""
    level = [bytes.fromhex(digest) for digest in digests] or [b""]
    while len(level) > 1:
        level += level[-1:] if len(level) % 2 else []
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [hashlib.sha256(left + right).digest() for left, right in pairs]
    return level[0].hex()
