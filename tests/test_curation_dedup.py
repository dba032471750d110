"""Clusters, representatives, benchmark copies, the stand-alone command and the perturbation table."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from test_curation_hashing import encode, scene

from florence_jax.curation.dedup import __main__ as dedup_files
from florence_jax.curation.dedup import clusters, drawings, hash_index, perturb
from florence_jax.curation.dedup.benchmarks import BenchmarkIndex
from florence_jax.curation.dedup.clusters import representatives, star_clusters, total_order
from florence_jax.curation.dedup.components import union_find
from florence_jax.curation.dedup.join import DEFAULT_JOIN, HashRows
from florence_jax.curation.dedup.views import VIEW_CHANGES, Views, hash_rows
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
    """Pictures 0 .. n-1 of one look, their hashes each `step` of 256 bits from the neighbour's, all different ones."""
    bits = np.zeros((n, 256), np.uint8)
    for i in range(1, n):
        bits[i] = bits[i - 1]
        bits[i, (i - 1) * step % 256 : ((i - 1) * step % 256) + step] ^= 1
    h256 = np.packbits(bits, axis=1).view(np.uint64)
    rows = HashRows(np.arange(n), np.zeros(n, np.uint64), h256, np.zeros(n, bool))
    numbers = np.arange(n)
    identity = np.stack([numbers, numbers], axis=1).astype(np.uint64)
    look = np.zeros((n, 16, 16), np.uint8), np.full((n, 2, 8, 8), 128, np.uint8)
    return Views(rows, np.arange(n + 1), numbers, np.zeros(n, np.int64), *look, np.zeros(n), identity)


def test_a_chain_is_cut_into_stars():
    views, join = drifting(60, 4), dataclasses.replace(DEFAULT_JOIN, max_d256=40)
    labels, ranks = np.zeros(60, np.int64), np.arange(60)
    assert star_clusters(labels, ranks, views, join).tolist() == [i // 11 * 11 for i in range(60)]  # 40 bits: ten steps
    two = np.repeat([0, 30], 30)  # components do not meet
    assert star_clusters(two, ranks, views, join).tolist() == [i // 30 * 30 + i % 30 // 11 * 11 for i in range(60)]
    views.identity[59] = views.identity[0]  # an exact copy of the first stays with it
    assert star_clusters(labels, ranks, views, join)[59] == 0
    assert star_clusters(np.zeros(0, np.int64), np.zeros(0, np.int64), drifting(0, 4), join).shape == (0,)


def star_reference(labels, ranks, views, join):
    """One picture after the other: the best of those left takes what is near it."""
    left, result = sorted(range(len(labels)), key=lambda i: ranks[i]), labels.copy()
    while left:
        near = views.compare(np.full(len(left), left[0]), np.array(left), join).near & (labels[left] == labels[left[0]])
        members = [i for i, is_near in zip(left, near, strict=True) if is_near]
        result[members] = min(members)
        left = [i for i in left if i not in members]
    return result


def test_stars_are_those_of_the_reference(measured):
    views, ranks = Views.of(measured), np.random.default_rng(1).permutation(len(measured))
    components = union_find(clusters.near_edges(np.arange(len(measured)), measured)[0], len(measured))
    for labels in (np.zeros(len(measured), np.int64), components):
        expected = star_reference(labels, ranks, views, DEFAULT_JOIN)
        assert (star_clusters(labels, ranks, views, DEFAULT_JOIN) == expected).all()


def compare(*pictures):
    """The first picture with each of the others."""
    views = Views.of([measure(encode(picture)) for picture in pictures])
    others = np.arange(1, len(pictures))
    return views.compare(np.zeros_like(others), others, DEFAULT_JOIN)


def test_views_of_a_photograph_agree():
    """Each kind of view with the picture that it stands for, framed ones too."""
    image = scene(240, 180, 3)
    cut = image.crop((10, 7, 230, 173))  # 8 % of each side
    light = image.point([round(0.75 * i + 20) for i in range(256)] * 3)
    pictures = [image, ImageOps.mirror(image), cut, ImageOps.expand(image, 20, (255, 255, 255)), light]
    found = compare(*pictures, image.convert("L"), scene(240, 180, 4))
    assert found.near.tolist() == [True] * 5 + [False]
    assert [VIEW_CHANGES[i][:4] for i in found.change[:4]] == ["flip", "crop", "", ""]
    assert (found.doubt <= 1).all() and found.doubt[0] == 0.5 and found.colour[4] > 20
    framed = compare(pictures[3], ImageOps.expand(ImageOps.mirror(image), 30, (250, 250, 250)), cut)
    assert framed.near.all() and framed.luma.max() < 24


def heart(colour, shape="heart", side=120):
    """A drawing on white."""
    image = Image.new("RGB", (side, side), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.pieslice((10, 15, 62, 67), 150, 360, fill=colour)
    draw.pieslice((58, 15, 110, 67), 180, 390, fill=colour)
    draw.polygon([(12, 50), (108, 50), (60, 110)], fill=colour)
    for top in range(5, 115, 22):
        draw.rectangle((2, top, 118, top + 2), fill=(70, 70, 70))
        draw.rectangle((top, 2, top + 2, 118), fill=(70, 70, 70))
    if shape == "pips":
        draw.rectangle((50, 45, 70, 65), fill=(255, 255, 255))
    return image


def test_drawings_of_other_colours_and_contents_are_others():
    red = heart((200, 30, 40))
    others = [heart((30, 60, 200)), heart((240, 130, 140)), heart((90, 90, 90)), heart((200, 30, 40), "pips")]
    same = [red.resize((60, 60), Image.Resampling.LANCZOS), ImageOps.expand(red, 15, (255, 255, 255))]
    assert compare(red, *others, *same).near.tolist() == [False] * 4 + [True] * 2
    arrow = Image.new("RGB", (120, 90), (255, 255, 255))
    ImageDraw.Draw(arrow).polygon([(10, 30), (60, 30), (60, 10), (110, 45), (60, 80), (60, 60), (10, 60)], (20, 90, 30))
    views = Views.of([measure(encode(picture)) for picture in (arrow, ImageOps.mirror(arrow))])
    assert views.flatness.min() > 0.65 and not compare(arrow, ImageOps.mirror(arrow)).near.any()


def test_colours_do_not_split_what_a_file_format_changes():
    """By the pipeline: two hearts, each as PNG and as JPEG, are two clusters whose hashes alone are one."""
    files = [encode(heart(colour)) for colour in ((200, 30, 40), (30, 60, 200))]
    files += [jpeg(heart(colour), 60) for colour in ((200, 30, 40), (30, 60, 200))]
    pictures = [measure(data) for data in files]
    labels, edges, _ = clusters.cluster(pictures, np.arange(4))
    assert labels.tolist() == [0, 1, 0, 1] and union_find(edges, 4).tolist() == [0] * 4


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
    assert sheet.count("<section>") == 5 and sheet.count("data:image/") == 35  # equal files are one
    assert sheet.count("2 equal files") == 2 and counts["equal_files"] == len(equal)
    doubts = [float(pair["doubt"]) for pair in pairs]
    assert all(0 <= doubt <= 1 for doubt in doubts) and {pair["view"] for pair in pairs} >= {"same", "mirrored"}
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
        assert (tmp_path / name / "contact_sheet.html").read_text().count("base64") == 7
    assert results[0] == results[1] and results[0]["duplicates"] == 7
    assert read_csv(tmp_path / "struct" / "pairs.csv")[0]["representative"].endswith("struct.parquet#0")


def test_command_on_odd_folders(collection, tmp_path, capsys):
    """Nothing to compare, nothing that can be read, links, names that are not UTF-8: each ends well."""
    data = collection["other/1.jpg"]
    files = {
        "one": {b"a.jpg": data},
        "broken": {b"a.jpg": b"text"},
        "odd": {b"caf\xe9.jpg": data, b"<b>.jpg": data + b" "},
    }
    for name, inside in files.items():
        (tmp_path / name).mkdir()
        for file, content in inside.items():
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / name), file))).write_bytes(content)
    (tmp_path / "odd" / "link").symlink_to(tmp_path / "one")
    (tmp_path / "odd" / "loop").symlink_to(tmp_path / "odd")
    (tmp_path / "odd" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    expected = {"one": (1, 0, {}), "broken": (1, 0, {"unsupported": 1}), "odd": (3, 2, {})}
    for name, (pictures, duplicates, unreadable) in expected.items():
        assert run(tmp_path / name, "--out", tmp_path / "out", "--workers", 1, "--table", "parquet") == 0
        counts = json.loads(capsys.readouterr().out)
        assert (counts["pictures"], counts["duplicates"], counts["unreadable"]) == (pictures, duplicates, unreadable)
    assert counts["passed_over"] == {"not a file": 1}
    keys = pq.read_table(tmp_path / "out" / "clusters.parquet")["key"].to_pylist()
    assert any(key.endswith("caf\\udce9.jpg") for key in keys)
    sheet = (tmp_path / "out" / "contact_sheet.html").read_text()
    assert "&lt;b&gt;.jpg" in sheet and str(tmp_path) not in sheet and "2 equal files" in sheet


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
        for name in ("status", "width", "bytes", "stamp", "h64", "image_id", "probes", "detail", "aspect", "look"):
            assert loaded[key][name] == item[name]


def test_contact_sheet_escapes_and_shows_what_it_can():
    pictures = [(thumbnail(encode(scene(20, 20))), "<b>", "<c>"), ("", "x", "")]
    page = contact_sheet("<t>", "&", [("<s>", [("g", pictures)]), ("empty", [("g", [])])])
    assert all(f"&lt;{letter}&gt;" in page for letter in "tsbc") and page.count("<img") == 1 and "empty" not in page
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


def test_drawings_are_told_apart_and_found_again():
    colours = drawings.SIGN_COLOURS
    made = {f"{text} {i}": drawings.sign(text, colours[i]) for text in "BKP8" for i in range(2)}
    cards = {f"{rank} {suit}": drawings.card(rank, suit) for rank in ("A", "3", "4") for suit in ("hearts", "spades")}
    result = drawings.run({"signs": drawings.with_copies(made), "cards": drawings.with_copies(cards)})
    for counts in result.values():
        chains, found = counts["chains"], counts["clusters"]
        assert chains["wrong"] > 0 == found["wrong"] and found["recall"] >= chains["recall"] - 0.05 > 0.8
        assert found["largest"] <= 3
    labels = np.array([0, 0, 2, 0])
    assert drawings.count_wrong(np.array(["a", "b", "a", "a"]), labels, True) == {
        "duplicates": 2,
        "wrong": 1,
        "largest": 3,
        "recall": 0.5,
    }


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
