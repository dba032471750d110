"""configs/video.py: trained on a folder of clips, tested, used from its folder alone; by names and by texts."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_images import run_main
from video_files import encode, moving_frames

from configs.video import get_config
from florence_jax.data.classes import ClassIndex
from florence_jax.data.records import ListSource
from florence_jax.errors import UserError
from florence_jax.evaluators.base import all_charts, evaluate
from florence_jax.evaluators.retrieval import positive_ranks
from florence_jax.evaluators.video import ActionRecognition, dual_softmax_ranks, reversed_classes, within_pair
from florence_jax.inference import Florence
from florence_jax.params.rules import path_string
from florence_jax.params.sharding import make_mesh
from florence_jax.predict import main as predict
from florence_jax.tasks import create_suite, create_task
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.video_tower import VideoTower
from florence_jax.tools.index import main as index_main

pytest.importorskip("av")
CLIPS = 4  # of each class
FLAGS = ["--config=configs/video.py:runlocal", "--config.eval.batch_size=8", "--config.video.shuffled=True"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folder of clips of 10 frames, eight of two classes; one of them is damaged."""
    folder = tmp_path_factory.mktemp("clips")
    for name, step in (("moves_left", -1), ("moves_right", 1)):
        (folder / name).mkdir()
        for i in range(CLIPS):
            file = encode(moving_frames(10, seed=i)[::step])
            (folder / name / f"{i}.mp4").write_bytes(file)
    (folder / "moves_left" / "4.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def trained(clips, weights, tmp_path_factory):
    """Workdir of a run."""
    workdir = tmp_path_factory.mktemp("video") / "run"
    data = f"--config.data.train={clips}", f"--config.data.test={clips}"
    assert run_main(*FLAGS, *data, f"--config.init={weights}", f"--workdir={workdir}") == 0
    return workdir


def changed_config(arg="runlocal", **changes):
    config = get_config(arg)
    config.update_from_flattened_dict(changes)
    return config


def test_a_run_tests_by_views_and_says_what_it_left_out(trained, capsys):
    result = json.loads((trained / "result.json").read_text())
    assert result["eval/test/videos"] == 2 * CLIPS and result["eval/test/skipped"] == 1
    assert {"eval/test/top1", "eval/test/top1_1x1", "eval/test/within_pair", "eval/test/top1_error"} <= result.keys()
    assert "eval/test_shuffled/top1" in result
    page = (trained / "report.html").read_text()
    assert "clips x crops" in page and "moves left" in page
    assert "cell query wide" in page and 'class="bar"' in page
    parts = json.loads((trained / "checkpoints" / "model.json").read_text())["parts"]
    assert parts["video"] == {
        "overrides": {"frames": 4},
        "sampling": {"interval": 2, "clips": 2, "crops": 1},
        "entries": ["video"],
    }


def test_only_the_video_tower_learned(trained, weights):
    before = Encoder(weights).load_on(make_mesh(-1, 1))
    after = VideoTower(Encoder(str(trained))).load_on(make_mesh(-1, 1))
    start = VideoTower(Encoder(weights)).load_on(make_mesh(-1, 1))["video"]
    jax.tree.map(np.testing.assert_array_equal, {name: after[name] for name in before}, before)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), start, after["video"])
    assert all(jax.tree.leaves(changed)), changed


def test_noise_that_is_blind_to_frames_that_stand_still(weights):
    tower = VideoTower(Encoder(weights), {"frames": 4})
    shapes = jax.eval_shape(tower.model.init_video, jax.random.key(0))
    plain = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape), shapes)
    noisy = tower.model.with_direction(plain, 0.5, jax.random.key(0))
    changed = {
        path_string(path)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(noisy), strict=True)
        if (np.asarray(a) != np.asarray(b)).any()
    }
    assert changed == {name for name in changed if name.endswith(("_embed/kernel", "bias_table"))} and len(changed) == 3
    kernel = [tree["stage0_embed"]["kernel"].sum(0) for tree in (plain, noisy)]
    np.testing.assert_allclose(*kernel, rtol=1e-5)


def test_predict_tells_seconds_of_long_videos(trained, clips, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "long.mp4").write_bytes(encode(moving_frames(45)))
    (tmp_path / "in" / "short.mp4").write_bytes((clips / "moves_left" / "0.mp4").read_bytes())
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    assert predict([f"--init={trained}", f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--top=2"]) == 0
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = [row["second"] for row in rows if row["file"] == "long.mp4"]
    assert seconds == ["", "", "0", "1", "2", "3"]  # 4.5 seconds, clips of .8
    assert [row["second"] for row in rows if row["file"] == "short.mp4"] == ["", ""]
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file"] for entry in found["videos"]] == ["long.mp4", "short.mp4"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<figure class="pair">') == 2 and page.count('class="bar"') == 4
    assert page.count("<th>second</th>") + page.count('<th class="n">second</th>') == 1  # of the long one
    assert [entry["file"] for entry in found["unread"]] == ["broken.mp4"]


def test_an_index_of_videos(trained, clips, tmp_path, capsys):
    """Found by a picture that is a frame of one of them; what could not be read is told."""
    index, page = tmp_path / "index", tmp_path / "found.html"
    made = ["embed", f"--init={trained}", f"--videos={clips / 'moves_left'}", "--tower=video", f"--out={index}"]
    assert index_main(made) == 0
    assert f"{CLIPS} videos in" in capsys.readouterr().out
    assert json.loads((index / "index.json").read_text())["unread"] == ["4.mp4"]
    assert index_main(["query", f"--index={index}", "--text=left", "--k=2", f"--html={page}"]) == 0
    assert page.read_text().count("data:image/webp") == 2


def test_florence_recognises_and_embeds(trained, clips):
    model = Florence(trained)
    path, frames = clips / "moves_left" / "0.mp4", moving_frames(6)
    ((best, _),) = model.recognise([path])
    assert {best[0], _[0]} == {"moves left", "moves right"}
    vectors = model.embed_videos([path, path.read_bytes(), frames, np.repeat(frames[:1], 6, 0)], frames=3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    np.testing.assert_allclose(vectors[3], model.embed_images([frames[0]])[0], atol=1e-5)
    np.testing.assert_allclose(model.classify_videos([frames], ["left", "right"]).sum(1), 1, atol=1e-6)
    with pytest.raises(UserError, match="one video: give"):
        model.embed_videos(frames)


@pytest.mark.parametrize("protocol", ["eval", "probe", "retrieval"])
def test_protocols(protocol, trained, clips):
    data = "data.train" if protocol == "probe" else "data.test"
    changes = {data: str(clips), "init": str(trained), "video.tower": "image"}
    if protocol == "probe":
        changes["data.test"] = str(clips)
    suite = create_suite(changed_config(f"protocol={protocol},runlocal", **changes))
    mesh = make_mesh(-1, 1)
    evaluators = suite.evaluators(mesh)
    results = evaluate(evaluators, suite.load(mesh))
    drawn = {name for chart in all_charts(evaluators) for name in chart.series.values()}
    assert drawn <= results.keys() and ("eval/test/within_pair" in drawn) == (protocol == "eval")
    assert {value for name, value in results.items() if name.endswith("/videos")} == {2.0 * CLIPS}
    if protocol == "retrieval":
        assert 1 <= results["eval/test/t2v_median_rank"] <= 2 * CLIPS and "eval/test/v2t_r@1" in results
    else:
        assert any(name.endswith("/top1") for name in results)
        assert {name: value for name, value in results.items() if name.endswith("/within_pair")}


def test_fine_tuning_for_retrieval(trained, clips, tmp_path):
    """The video tower, the text tower and what joins them learn; the image tower does not, the classifier goes."""
    data = f"--config.data.train={clips}", f"--config.data.test={clips}", f"--config.init={trained}"
    assert run_main("--config=configs/video.py:protocol=finetune,runlocal", *data, f"--workdir={tmp_path}") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["eval/test/videos"] == 2 * CLIPS and 1 <= result["eval/test/t2v_median_rank"] <= 2 * CLIPS
    before, after = (VideoTower(Encoder(str(folder))) for folder in (trained, tmp_path))
    assert before.classes and not after.classes
    first, last = (tower.load_on(make_mesh(-1, 1)) for tower in (before, after))
    jax.tree.map(np.testing.assert_array_equal, first["image"], last["image"])
    for name in ("video", "text", "text_projection", "image_projection"):
        assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(p[name]) for p in (first, last)), strict=True)), (
            name
        )
    with pytest.raises(UserError, match="this protocol trains the video tower"):
        create_suite(changed_config("protocol=finetune", init=str(trained), **{"video.tower": "image"}))


def test_what_does_not_fit_is_said(weights, clips, tmp_path, caplog):
    with pytest.raises(UserError, match="holds no classifier of actions"):
        create_suite(changed_config("protocol=eval", init=weights, **{"data.test": str(clips)}))
    with pytest.raises(UserError, match="crops are 1 or 3"):
        create_suite(changed_config("protocol=zeroshot", init=weights, **{"video.crops": 2, "data.test": str(clips)}))
    sizes = {"model.variant": "ti", "video.overrides.frames": 8, "data.train_ops": "clip(8)|flip(0.5, field=video)"}
    sizes["data.train"] = ""
    with pytest.raises(UserError, match="how many classes"):
        create_task(changed_config(init="", **sizes)).init(jax.random.key(0))
    (tmp_path / "names.txt").write_text("push left\npush right\nsit\n")
    (tmp_path / "list.txt").write_text("".join(f"{path} {i}\n" for i, path in enumerate(sorted(clips.glob("*/*.mp4")))))
    listed = {"data.train": str(tmp_path / "list.txt"), "classes": str(tmp_path / "names.txt")}
    with pytest.raises(UserError, match="moves_left/3.mp4 is of class 3, there are names of 3, from 0 on"):
        create_task(changed_config(init=weights, **listed))
    task = create_task(changed_config(init="", classes=str(tmp_path / "names.txt"), **sizes))
    assert task.batches[0]["video"].shape == (8, 8, 32, 32, 3)
    assert "changes 2 of the classes, such as 'push left'" in caplog.text


def test_motion_clips_are_the_usual_data(weights):
    """Tested on other objects, styles and backgrounds, encoded; also shuffled in time, and frame by frame."""
    task = create_task(changed_config("", init=weights))
    assert (len(task.train_source), task.test_source.name) == (32_000, "motions:new_names::h264")
    assert task.tower.sampling == {"interval": 2, "clips": 1, "crops": 1} and task.reverses
    assert (task.plan.total_steps, task.plan.batch_size) == (2000, 16)
    assert [found.name for found in task.evaluators(make_mesh(-1, 1))] == ["test", "test_shuffled", "test_frames"]


def test_a_batch_with_reversals(weights, tmp_path):
    """Each clip is beside its reverse, of the class that is that; a class without one counts once."""
    (tmp_path / "names.txt").write_text("moves left\nmoves right\nsits\n")
    given = {"init": weights, "data.train": "", "classes": str(tmp_path / "names.txt"), "video.reversed": True}
    task = create_task(changed_config("", **given, **{"total_steps": 1}))
    frames = np.arange(2 * 3 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 3, 2, 2, 3)
    found = task._with_reversals({"video": jnp.asarray(frames), "label": jnp.array([1, 2])})
    expected = [frames[0], frames[0, ::-1], frames[1], frames[1, ::-1]]
    np.testing.assert_array_equal(found["video"], np.stack(expected))
    assert found["label"][:3].tolist() == [1, 0, 2] and found["counted"].tolist() == [1, 1, 1, 0]
    params, pooled = {"video_head": {"weight": jnp.eye(64), "bias": jnp.zeros(64)}}, jnp.ones((4, 64))
    dropped = np.asarray(task.tower.logits(params, pooled, jax.random.key(0), found["example"]))
    np.testing.assert_array_equal(dropped[::2], dropped[1::2])
    assert (dropped[0] != dropped[2]).any() and (dropped == 0).any()
    (tmp_path / "names.txt").write_text("runs\nsits\n")
    with pytest.raises(UserError, match="no class is another's reversal"):
        create_task(changed_config("", **given, **{"total_steps": 1}))


def test_within_pair_counts_ties_as_wrong():
    scores = np.array([[3, 1, 9], [2, 2, 0], [1, 2, 0], [0, 0, 1.0]])
    found = within_pair(scores, np.array([0, 1, 1, 2]), np.array([1, 0, -1]))
    assert found == {"within_pair": pytest.approx(2 / 3), "within_pair_error": pytest.approx((2 / 9 / 3) ** 0.5)}
    assert within_pair(scores, np.array([2, 2, 2, 2]), np.array([1, 0, -1])) == {}


def test_reversed_classes():
    names = ["Moves left", "moves_right", "turn anti-clockwise", "turn clockwise", "from left to right", "grow", "sit"]
    assert reversed_classes(names).tolist() == [1, 0, 3, 2, -1, -1, -1]
    assert reversed_classes(["from left to right", "from right to left"]).tolist() == [1, 0]


class Embedded:
    """Stands for an embedder: gives probabilities (N, views, K)."""

    def __init__(self, found, labels):
        from florence_jax.evaluators.video import OF_VIDEOS

        self.payload, self._found = OF_VIDEOS, {"embedding": found, "label": labels, "index": np.arange(len(labels))}
        self._found["key"] = [str(i) for i in range(len(labels))]

    def images(self, *args, **options):
        return self._found


def test_views_are_averaged_after_the_softmax():
    """Three crops of two clips; the first video is right with all views only, the second with one clip only."""
    rng = np.random.default_rng(0)
    found = rng.dirichlet(np.ones(6), (40, 6)).astype(np.float32)
    labels = rng.integers(0, 6, 40)
    classes = ClassIndex([(f"class {i}",) for i in range(6)], {})
    source = ListSource("videos", [np.zeros((2, 8, 8, 3), np.uint8)] * 40, "video")
    given = ActionRecognition("t", source, classes, "views(2, 2)", Embedded(found, labels), 2, 3)
    results = given.run(None)
    views = {"": found, "_2x1": found[:, 4:], "_1x1": found[:, 5:]}  # crop * clips + clip; the last crop is the middle
    for name, chosen in views.items():
        best = chosen.mean(1).argsort(1)[:, ::-1]
        assert results[f"top1{name}"] == pytest.approx((best[:, 0] == labels).mean())
        assert results[f"top5{name}"] == pytest.approx((best[:, :5] == labels[:, None]).any(1).mean())
    assert results["top1_error"] == pytest.approx((results["top1"] * (1 - results["top1"]) / 40) ** 0.5)
    told = ActionRecognition("t", source, classes, "views(2, 2)", Embedded(found, labels), 2, 3, hint=None)
    assert told.run(None) == results  # a test that is meant to be near chance, of which no warning is made
    assert "near chance" in "".join(given.report()) and "near chance" not in "".join(told.report())


def test_dual_softmax_knows_the_other_queries():
    queries, targets = np.eye(3, dtype=np.float32), np.array([[0.9, 0.8, 0], [0, 0.5, 0], [0, 0, 1]], np.float32)
    ids = np.arange(3)
    assert positive_ranks(queries, targets, ids, ids).tolist() == [0, 1, 0]
    assert dual_softmax_ranks(queries, targets, ids, ids, 10.0).tolist() == [0, 0, 0]
