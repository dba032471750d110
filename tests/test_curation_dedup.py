"""Clusters, representatives, benchmark copies, the stand-alone command and the perturbation table."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_curation_hashing import encode, scene

from florence_jax.curation.dedup import __main__ as dedup_files
from florence_jax.curation.dedup import clusters, hash_index, perturb
from florence_jax.curation.dedup.benchmarks import BenchmarkIndex
from florence_jax.curation.dedup.clusters import Views, hash_rows, representatives, split_components, total_order
from florence_jax.curation.dedup.components import union_find
from florence_jax.curation.dedup.join import HashRows
from florence_jax.curation.ingest.hashing import measure
from florence_jax.errors import UserError
from florence_jax.page import contact_sheet
from florence_jax.pictures import thumbnail
from florence_jax.tools.bench import __main__ as bench

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
ROOT = Path(__file__).parent.parent


def jpeg(image, quality=85):
    return encode(image, "JPEG", quality=quality)


def variants(image):
    """Re-encoded, resized, mirrored, framed and cropped copies."""
    width, height = image.size
    return {
        "quality": jpeg(image, 40),
        "small": jpeg(image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)),
        "flip": jpeg(ImageOps.mirror(image)),
        "frame": jpeg(ImageOps.expand(image, 20, (255, 255, 255))),
        "crop": jpeg(image.crop((width // 20, height // 20, width - width // 20, height - height // 20))),
        "grey": encode(image.convert("L")),
    }


@pytest.fixture(scope="module")
def collection():
    """Five scenes with six variants each, two exact copies, and ten other scenes: name -> bytes."""
    files = {}
    for seed in range(5):
        image = scene(240, 180, seed)
        files[f"s{seed}/original.png"] = encode(image)
        files |= {f"s{seed}/{name}.jpg": data for name, data in variants(image).items()}
    files["s0/copy.png"] = files["s0/original.png"]
    files["s1/copy.jpg"] = files["s1/quality.jpg"]
    return files | {f"other/{seed}.jpg": jpeg(scene(240, 180, 100 + seed)) for seed in range(10)}


@pytest.fixture(scope="module")
def measured(collection):
    return [measure(data) for data in collection.values()]


def test_clusters_are_the_planted_ones(collection, measured):
    labels, _, counts = clusters.cluster(measured, np.arange(len(measured)))
    groups = [name.split("/")[0] if name[0] == "s" else name for name in collection]
    expected = [groups.index(group) for group in groups]
    assert labels.tolist() == expected
    assert counts["exact_edges"] >= 2 and counts["low_detail"] == 0


def test_order_does_not_change_the_clusters(measured):
    order = np.random.default_rng(0).permutation(len(measured))
    labels, _, _ = clusters.cluster(measured, np.arange(len(measured)))
    shuffled, _, _ = clusters.cluster([measured[i] for i in order], np.argsort(np.arange(len(measured)))[order])
    together = labels[order][:, None] == labels[order]
    assert (together == (shuffled[:, None] == shuffled)).all()


def test_flat_pictures_are_equal_only_if_their_files_are():
    files = [encode(Image.new("RGB", (64, 64), (level,) * 3)) for level in (10, 10, 200)]
    labels, _, counts = clusters.cluster([measure(data) for data in files], np.arange(3))
    assert labels.tolist() == [0, 0, 2] and counts["low_detail"] == 3


def test_exact_edges():
    rids = np.array([7, 3, 9, 4, 1])
    edges = clusters.exact_edges(rids, np.array([[1, 2], [1, 2], [1, 3], [1, 2], [1, 3]]), np.array([0, 0, 5, 1, 5]))
    assert sorted(map(tuple, edges.tolist())) == [(1, 9), (3, 7)]
    assert clusters.exact_edges(np.zeros(0, np.int64)).shape == (0, 2)


def test_hash_rows_of_tuples_and_of_a_table(measured):
    as_table = [
        item | {"probes": [dict(zip(("kind", "h64", "h256"), p, strict=True)) for p in item["probes"]]}
        for item in measured
    ]
    a, b = hash_rows(range(len(measured)), measured), hash_rows(range(len(measured)), as_table)
    for name in ("rid", "h64", "h256", "probe"):
        assert (getattr(a, name) == getattr(b, name)).all()
    framed = hash_rows([0], [next(m for m in measured if m["probes"][0][0] == "trimmed")])
    assert framed.probe[:3].tolist() == [False, False, True]


def test_total_order_and_representatives():
    ranks = total_order(np.array([0, 1, 0, 0]), np.array([-5, -9, -7, -7]), np.array([3, 1, 2, 0]))
    assert ranks.tolist() == [2, 3, 1, 0]
    with pytest.raises(ValueError, match="not a total order"):
        total_order(np.array([1, 1]))
    node, size = representatives(np.array([0, 0, 2, 0]), ranks)
    assert node.tolist() == [3, 3, 2, 3] and size.tolist() == [3, 3, 1, 3]


def drifting(n, step):
    """Hashes of images 0 .. n-1, each `step` of 256 bits from its neighbour, all different ones."""
    bits = np.zeros((n, 256), np.uint8)
    for i in range(1, n):
        bits[i] = bits[i - 1]
        bits[i, (i - 1) * step % 256 : ((i - 1) * step % 256) + step] ^= 1
    h256 = np.packbits(bits, axis=1).view(np.uint64)
    return HashRows(np.arange(n), np.zeros(n, np.uint64), h256, np.zeros(n, bool))


def test_a_chain_is_split_around_its_representatives():
    rows = drifting(60, 4)
    labels, ranks, same = np.zeros(60, np.int64), np.arange(60), np.arange(60)
    views = Views.of(rows, 60)
    split = split_components(labels, ranks, views, same, max_d256=40)
    assert split.tolist() == [i // 11 * 11 for i in range(60)]  # 40 bits are ten steps
    assert (split_components(labels, ranks, views, same, max_d256=40, above=60) == 0).all()
    same[59] = 0  # an exact copy of the first stays with it
    assert split_components(labels, ranks, views, same, max_d256=40)[59] == 0


def test_distances_between_images():
    zero = np.zeros(4, np.uint64)
    h256 = np.stack([zero, zero + 1, zero + 3, zero])
    rows = HashRows(np.array([0, 0, 2, 2]), np.array([0, 1, 3, 1], np.uint64), h256, np.array([0, 1, 0, 1], bool))
    d64, d256 = Views.of(rows, 3).distances(0, np.array([0, 1, 2]))
    assert d64.tolist() == [0, 64, 1] and d256.tolist() == [0, 256, 0]
    assert Views.of(rows, 3).distances(2, np.array([0]), k=0)[0].tolist() == [1]


def test_benchmark_index(collection, measured, tmp_path):
    names = list(collection)
    held = {"a": [m for n, m in zip(names, measured, strict=True) if n == "s0/original.png"]}
    held["b"] = [m for n, m in zip(names, measured, strict=True) if n in ("s1/original.png", "other/3.jpg")]
    held["b"] = [*held["b"], measure(b"broken"), measure(encode(Image.new("L", (64, 64), 9)))]
    BenchmarkIndex.build(held).save(tmp_path / "index.npz")
    index = BenchmarkIndex.load(tmp_path / "index.npz")
    matches = index.query([*measured, measure(b"broken"), measure(encode(Image.new("L", (64, 64), 99)))])
    for name, match in zip([*names, "broken", "flat"], matches, strict=True):
        expected = {"s0": "a", "s1": "b", "other/3.jpg": "b"}
        assert (match and match["benchmark"]) == expected.get(name, expected.get(name.split("/")[0])), name
    found = dict(zip(names, matches, strict=False))
    assert found["s0/copy.png"]["kind"] == "exact" and found["s0/small.jpg"]["kind"] == "near"
    report = index.report(matches)
    assert report["a"] == {"images": 1, "exact": 2, "near": 6}
    assert report["b"] == {"images": 3, "exact": 2, "near": 7}
    with pytest.raises(UserError, match="'empty' has no readable picture"):
        BenchmarkIndex.build({"empty": [measure(b"broken")]})
    (tmp_path / "index.npz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not an index of benchmark pictures"):
        BenchmarkIndex.load(tmp_path / "index.npz")


@pytest.fixture
def folder(collection, tmp_path):
    for name, data in collection.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return tmp_path / "photos"


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments):
    return dedup_files.main([str(argument) for argument in arguments])


def test_command_on_a_folder(folder, tmp_path):
    """As a program, with processes of its own: they find what they run only outside of a package's `__main__`."""
    out = tmp_path / "runs" / "dedup"  # without --out
    command = [sys.executable, "-m", "florence_jax.curation.dedup", str(folder), "--workers=2"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts == json.loads((out / "counts.json").read_text())
    assert counts["pictures"] == counts["read_now"] == 48 and counts["unreadable"] == {"corrupt": 1}
    assert (counts["clusters_of_several"], counts["duplicates"], counts["largest_cluster"]) == (5, 32, 8)
    pairs = read_csv(out / "pairs.csv")
    assert len(pairs) == 32
    assert all(pair["representative"].split("/")[-2] == pair["duplicate"].split("/")[-2] for pair in pairs)
    assert {pair["representative"].split("/")[-1] for pair in pairs} <= {"original.png", "copy.png", "flip.jpg"}
    equal = [pair for pair in pairs if pair["equal_bytes"] == "True"]
    assert equal and all(pair["d64"] == pair["d256"] == "0" for pair in equal)
    clusters = read_csv(out / "clusters.csv")
    assert sum(row["is_representative"] == "True" for row in clusters) == 15
    assert [row["status"] for row in clusters if row["size"] == "0"] == ["corrupt"]
    sheet = (out / "contact_sheet.html").read_text()
    assert sheet.count("<section>") == 5 and sheet.count("data:image/") == 37
    assert not list(out.glob("*.tmp"))


def test_command_goes_on_from_an_index(folder, tmp_path, capsys):
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    assert run(folder, "--out", whole, "--workers", 1) == 0
    late = [folder / "s2", folder / "other"]
    for path in late:
        path.rename(tmp_path / path.name)
    assert run(folder, "--out", first, "--workers", 1) == 0
    for path in late:
        (tmp_path / path.name).rename(path)
    capsys.readouterr()
    assert run(folder, "--out", second, "--index", first / "index.npz", "--workers", 1, "--table", "parquet") == 0
    assert json.loads(capsys.readouterr().out)["read_now"] == 17
    columns = pq.read_table(second / "clusters.parquet").to_pylist()
    expected = {row["key"]: row["representative"] for row in read_csv(whole / "clusters.csv")}
    assert {row["key"]: row["representative"] for row in columns} == expected
    assert run(folder / "other", "--out", second, "--index", whole / "index.npz", "--workers", 1) == 0
    assert json.loads(capsys.readouterr().out)["duplicates"] == 32  # pictures of the earlier run count


def test_command_on_parquet(collection, tmp_path, capsys):
    import pyarrow as pa

    names = [name for name in collection if name[:2] in ("s0", "ot")]
    data = [collection[name] for name in names]
    tables = {
        "bytes": pa.table({"key": names, "image": data}),
        "struct": pa.table({"image": [{"bytes": d, "path": None} for d in data]}),
    }
    results = []
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        assert run(tmp_path / f"{name}.parquet", "--out", tmp_path / name, "--workers", 2, "--sheet", 1) == 0
        results.append(json.loads(capsys.readouterr().out))
        assert (tmp_path / name / "contact_sheet.html").read_text().count("base64") == 8
    assert results[0] == results[1] and results[0]["duplicates"] == 7
    assert read_csv(tmp_path / "struct" / "pairs.csv")[0]["representative"].endswith("struct.parquet#0")


def test_command_mistakes(folder, tmp_path, capsys):
    import pyarrow as pa

    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "keys.parquet")
    pq.write_table(pa.table({"key": ["a", "a"], "image": [b"", b""]}), tmp_path / "twice.parquet")
    pq.write_table(pa.table({"image": [{"path": "a.jpg"}]}), tmp_path / "struct.parquet")
    pq.write_table(pa.table({"path": [3]}), tmp_path / "numbers.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for arguments, message in (
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path / "empty",), "no pictures"),
        ((tmp_path / "keys.parquet",), "needs a column 'image' or 'path'"),
        ((tmp_path / "twice.parquet",), "occurs twice"),
        ((tmp_path / "struct.parquet",), "column 'image' holds struct<path: string>, not bytes, a struct with 'bytes'"),
        ((tmp_path / "numbers.parquet",), "column 'path' holds int64"),
        ((tmp_path / "text.parquet",), "neither a folder nor a parquet file"),
        ((folder, "--index", tmp_path / "text.parquet"), "not an index of an earlier run"),
        ((folder, "--workers", 0), "--workers"),
    ):
        out = tmp_path / "refused"
        assert run(*arguments, "--out", out, *([] if "--workers" in arguments else ["--workers", 1])) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not out.exists()


def test_index_round_trip(measured, tmp_path):
    pictures = {f"k{i}": item | {"stamp": i} for i, item in enumerate([*measured[:3], measure(b"broken")])}
    hash_index.save(tmp_path / "i.npz", pictures)
    loaded = hash_index.load_index(tmp_path / "i.npz")
    for key, item in pictures.items():
        for name in ("status", "width", "bytes", "stamp", "h64", "image_id", "probes", "detail", "aspect"):
            assert loaded[key][name] == item[name]


def test_contact_sheet_escapes_and_shows_what_it_can():
    page = contact_sheet("<t>", "&", [("g", [(thumbnail(encode(scene(20, 20))), "<b>"), ("", "x")])])
    assert "&lt;t&gt;" in page and "&lt;b&gt;" in page and page.count("<img") == 1
    assert thumbnail(b"broken") == ""


def test_perturbation_table_tells_recall_from_failure(monkeypatch):
    wanted = ("JPEG 50", "horizontal flip", "centred crop 17 %", "rotation 90 degrees", "letterbox")
    monkeypatch.setattr(perturb, "CHANGES", tuple(c for c in perturb.CHANGES if c[1][0] in wanted))
    originals = [*(scene(240, 180, seed) for seed in range(8)), Image.new("RGB", (120, 120))]
    result = perturb.recall_table(originals)
    assert (result["originals"], result["low_detail"], result["pairs"]) == (8, 1, 56)
    recall = {line["change"]: line["recall"][6] for line in result["changes"]}
    assert recall.pop("rotation 90 degrees") == 0
    assert min(recall.values()) == 1
    assert all(set(line["false_pairs"].values()) == {0} for line in result["changes"])
    assert "rotation 90 degrees" in perturb.render(result)


def test_perturbation_command(tmp_path, capsys):
    assert perturb.main(["--images", str(tmp_path)]) == 2
    assert "no pictures" in capsys.readouterr().err
    scene(130, 100).save(tmp_path / "a.png")
    assert perturb.main(["--images", str(tmp_path), "--out", str(tmp_path / "table.json")]) == 0
    changes = json.loads((tmp_path / "table.json").read_text())["images"]["changes"]
    assert len(changes) == len(perturb.CHANGES) >= 30


@pytest.mark.slow
def test_recall_on_photographs():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    lines = perturb.recall_table(perturb.spread(perturb.bundled_pictures()["photographs"], 400))["changes"]
    goals = {
        **dict.fromkeys(("recompress", "resize", "grey", "blur", "noise"), (0.995, 0.995)),
        **dict.fromkeys(("light", "watermark", "crop 2 %"), (0.88, 0.98)),
        **dict.fromkeys(("flip", "frame"), (0.95, 0.95)),
        "crop": (0.80, 0.93),
    }
    for line in lines:
        low, high = goals.get(line["group"], (0, 0))
        assert line["recall"][4] >= low and line["recall"][6] >= high, line
        assert line["false_pairs"] == {4: 0, 6: 0}, line


def test_bench_prints_one_line(capsys, monkeypatch):
    from florence_jax.tools.bench import curate

    monkeypatch.setattr(curate, "beam_seconds", lambda folder, files, count: (None, None))
    arguments = "curate --image_size 200x150 --records 4 --images 8 --rounds 1 --block 20000"
    assert bench.main(arguments.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["hash_images_per_s_core"] > 0 and result["plain_ratio"] > 0 and result["beam_ratio"] is None
    assert result["measure_ratio"] is None
    assert result["join_found"] == result["join_planted"] and 0 < result["join_core_hours"] < 1000


def test_union_find_is_what_cluster_uses(measured):
    edges, _ = clusters.near_edges(np.arange(len(measured)), measured)
    labels, same, _ = clusters.cluster(measured, np.arange(len(measured)))
    assert (labels == union_find(edges, len(measured))).all() and (same == edges).all()
