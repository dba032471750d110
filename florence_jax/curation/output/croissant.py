"""Metadata of the output: Croissant (JSON-LD, MLCommons) and a datasheet (Gebru et al. 2021) with what is known."""

from collections.abc import Mapping
from typing import Any

from florence_jax.files import write_bytes, write_json

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataBiases": "cr:dataBiases",
    "dataCollection": "cr:dataCollection",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "personalSensitiveInformation": "cr:personalSensitiveInformation",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
MEDIA_TYPES = {
    ".array_record": "application/octet-stream",
    ".array_record.meta": "application/octet-stream",
    ".parquet": "application/x-parquet",
    ".tar": "application/x-tar",
}
# Fields of the parquet shards: name, type, what it is.
RECORD_FIELDS = (
    ("key", "sc:Text", "uid: 128-bit hash of the source's name and the key in it"),
    ("image", "sc:ImageObject", "encoded image"),
    ("caption", "sc:Text", "caption as found"),
    ("text_id", "sc:Text", "128-bit hash of the normalised caption"),
    ("url", "sc:Text", "where the image was found"),
    ("licence", "sc:Text", "licence as stated by the source"),
    ("source", "sc:Text", "name of the source"),
    ("members", "sc:Integer", "near-duplicates that the pair stands for, itself included"),
)


def write_croissant(path: str, about: Mapping[str, Any], output: Mapping[str, Any], today: str) -> None:
    """Writes croissant.json beside the shards: a file object with checksum for each, a record set for parquet.

    Args:
      path: of the file.
      about: "name", "description", "licence" and "url" of the configuration.
      output: manifest with "files", "records" and "root".
      today: ISO date.
    """
    files = [
        {
            "@type": "cr:FileObject",
            "@id": name,
            "name": name,
            "contentUrl": name,
            "contentSize": f"{facts['bytes']} B",
            "encodingFormat": next(kind for suffix, kind in MEDIA_TYPES.items() if name.endswith(suffix)),
            "sha256": facts["sha256"],
        }
        for name, facts in sorted(output["files"].items())
    ]
    parquet = sorted(name for name in output["files"] if name.endswith(".parquet"))
    document = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": about["name"],
        "description": f"{about['description']} {output['records']} pairs.",
        "license": about["licence"] or "https://spdx.org/licenses/NOASSERTION",
        "citeAs": "Yuan et al. 2021, Florence: A New Foundation Model for Computer Vision, arXiv:2111.11432",
        "datePublished": today,
        "version": f"1.0.0+{output['root'][:12]}",
        "distribution": files,
        "recordSet": [_record_set(name) for name in parquet],
    }
    if about["url"]:
        document["url"] = about["url"]
    write_json(path, document)


def _record_set(file: str) -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{file}/{name}",
            "name": name,
            "description": text,
            "dataType": kind,
            "source": {"fileObject": {"@id": file}, "extract": {"column": name}},
        }
        for name, kind, text in RECORD_FIELDS
    ]
    return {"@type": "cr:RecordSet", "@id": f"records/{file}", "name": f"records/{file}", "field": fields}


def write_datasheet(path: str, config: Mapping[str, Any], summary: Mapping[str, Any], today: str) -> None:
    """Writes DATASHEET.md: what this program knows of the data; the questions it cannot answer are listed as open."""
    lines = [
        f"# {config['output']['name']}",
        "",
        f"Written by florence_jax {summary['version']} on {today}; configuration {summary['config']}, content",
        f"{summary['root']}.",
        "",
        "## Composition",
        "",
        f"- {summary['records']:,} image-text pairs from {summary['rows']:,} raw pairs.",
        f"- Raw pairs whose key occurred before in their source, not counted above: {summary['repeated_keys']:,}.",
        f"- Input files that could not be read to their end: {len(summary['damaged_inputs']):,}.",
        "- Fields: key, image, caption, captions, text_id, url, licence, source, source_key, members.",
        "",
        "## Collection",
        "",
        f"- Sources: {config['inputs']}",
        "",
        "## Preprocessing",
        "",
        "| Stage | Pairs that came | Left for | Kept |",
        "|---|---|---|---|",
    ]
    for stage in summary["stages"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in stage["reasons"].items()) or "-"
        lines.append(f"| {stage['stage']} | {stage['came']:,} | {reasons} | {stage['kept']:,} |")
    lines += ["", "## Share dropped by slice", ""]
    for name, rows in summary["slices"].items():
        shown = ", ".join(f"{row['value'] or 'unknown'} {row['dropped']:.0%} of {row['pairs']:,}" for row in rows[:8])
        lines.append(f"- {name}: {shown}")
    lines += [
        "",
        "## Rights and personal data",
        "",
        f"- Licences allowed: {', '.join(config['post_filter']['licences']) or 'all'}.",
        f"- Pairs removed for personal data in the caption: {', '.join(config['post_filter']['personal']) or 'none'}.",
        f"- Faces are {'blurred' if config['output']['face_detector'] else 'not blurred'}.",
        f"- Pairs that match a list of known pictures: {summary['quarantined']:,}; nothing but their uids is kept.",
        "- A takedown by uid, URL or hash rewrites the shards with the pair, and no other.",
        "",
        "## Not known to this program",
        "",
        "Who collected the raw pairs and why, whether people depicted consented, and for what uses the data is unfit.",
        "Whoever publishes the data must say.",
        "",
    ]
    write_bytes(path, "\n".join(lines).encode())
