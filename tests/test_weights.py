"""What a checkpoint folder says of itself, and its parameters in another model by rules."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from florence_jax.errors import UserError
from florence_jax.models import florence
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.rules import path_string
from florence_jax.params.sharding import make_mesh, param_shardings, replicated
from florence_jax.params.weights import (
    MODEL_FILE,
    describe,
    load,
    load_optimizer,
    make_description,
    save_pretrained,
    write_description,
)

TOWERS = {"variant": "ti", "overrides": {"depths": (2, 2), "res": None}, "entries": ("image", "text")}


def test_a_description_is_read_as_it_was_written_and_brings_its_tokenizer(tmp_path):
    vocabulary, folder = tmp_path / "mine" / "vocab.json", tmp_path / "run" / "checkpoints"
    vocabulary.parent.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (vocabulary.parent / name).write_text(name)
    parts = {"towers": TOWERS, "head": {"features": "pooled", "entries": ["head"]}}
    names, source = [("cat", "kitty"), ("dog",)], {"init": "x"}
    given = make_description(
        "classify", parts, tokenizer=str(vocabulary), classes=names, source=source, templates=("a {}.", "{}!")
    )
    write_description(str(folder), given)
    for init in (folder, folder.parent):
        found = describe(str(init))
        assert found.task == "classify" and found.classes == ("cat", "dog") and found.source == source
        assert found.names == tuple(names) and found.templates == ("a {}.", "{}!")
        assert found.entries == ("image", "text", "head") and found.parts["head"]["features"] == "pooled"
        assert found.parts["towers"]["overrides"] == {"depths": [2, 2]}  # None: not given
        assert found.tokenizer == str(folder / "vocab.json")
    assert (folder / "merges.txt").read_text() == "merges.txt"
    assert json.loads((folder / MODEL_FILE).read_text())["tokenizer"]["given"] == str(vocabulary)


@pytest.mark.parametrize("tokenizer", ["", "sentencepiece", "gone.model"])
def test_a_tokenizer_without_a_file_is_named(tokenizer, tmp_path):
    write_description(str(tmp_path), make_description("pretrain", {"towers": TOWERS}, tokenizer=tokenizer))
    found = describe(str(tmp_path))
    assert (
        found.tokenizer == tokenizer
        and found.templates == ()
        and [path.name for path in tmp_path.iterdir()] == [MODEL_FILE]
    )


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "there is no .*model.json, which every run and import writes"),
        ("{", "model.json cannot be used"),
        ('{"format": 2}', "its format is 2, this version reads 1"),
        ('{"format": 1, "task": "pretrain"}', "model.json cannot be used .KeyError"),
    ],
)
def test_a_folder_that_does_not_say_what_it_holds(content, message, tmp_path):
    if content is not None:
        (tmp_path / MODEL_FILE).write_text(content)
    with pytest.raises(UserError, match=f"cannot tell which model .*{message}"):
        describe(str(tmp_path))


# -- parameters by rules ----------------------------------------------------------------------------------------------


def random_tree(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def targets(shapes, mesh):
    """Shapes with their places."""
    place = param_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place)


def leaves(tree):
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of three parts, one of which has an average of one leaf; and what it holds."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    params = {
        "image": {"kernel": jnp.arange(16.0).reshape(2, 8), "bias": jnp.ones(8)},
        "text": {"token_embedding": jnp.arange(12.0).reshape(6, 2)},
        "detector": {"kernel": jnp.full((4, 4), 7.0)},
    }
    checkpoints = Checkpoints(str(folder))
    checkpoints.save(3, {"params": params, "ema": {"image": {"kernel": 2 * params["image"]["kernel"]}}})
    checkpoints.close()
    return str(folder), params


def test_other_parts_are_left_and_the_rest_goes_to_its_place(saved):
    folder, params = saved
    mesh = make_mesh(4, 2)
    like = targets({name: params[name] for name in ("image", "text")}, mesh)
    found = load(folder, like, average=False)
    jax.tree.map(np.testing.assert_array_equal, found, {name: params[name] for name in ("image", "text")})
    assert found["image"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp")
    found = load(folder, like)  # the average, of what has one
    np.testing.assert_array_equal(found["image"]["kernel"], 2 * params["image"]["kernel"])
    np.testing.assert_array_equal(found["image"]["bias"], 1)


def test_only_what_is_needed_is_read(saved, monkeypatch):
    folder, params = saved
    reads, restore = [], Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, target, **k: reads.append(target) or restore(self, target, **k)
    )
    load(folder, targets({"image": params["image"]}, make_mesh(8, 1)))
    assert [sorted(leaves(target)) for target in reads] == [["ema/image/kernel", "params/image/bias"]]


def test_a_table_grows_and_a_new_leaf_keeps_its_values(saved, capsys):
    folder, params = saved
    fresh = {"text": {"token_embedding": jnp.full((8, 2), -1.0), "bias": jnp.full(3, 5.0)}}
    like = jax.device_put(fresh, param_shardings(fresh, make_mesh(1, 8)))
    rules = ((".*bias", "new"), (".*token_embedding", "adapt"), (".*", "read"))
    for _ in range(2):
        found = load(folder, like, rules, florence.build("ti").adapt)["text"]
    np.testing.assert_array_equal(found["token_embedding"][:6], params["text"]["token_embedding"])
    np.testing.assert_array_equal(found["token_embedding"][6:], -1)
    assert found["token_embedding"].sharding.spec == PartitionSpec("fsdp", None)
    assert found["bias"] is like["text"]["bias"]
    (line,) = capsys.readouterr().out.splitlines()  # once
    assert "0 parameters read, 1 adapted (text/token_embedding), 1 new (text/bias)" in line


def test_one_part_is_inflated_from_another(saved, capsys):
    """Of the average where there is one; both parts are read; what cannot be inflated is named."""
    folder, params = saved
    shapes = {"image": params["image"], "video": {"kernel": jnp.zeros((3, 2, 8)), "bias": jnp.zeros(8)}}
    like = targets(shapes, make_mesh(4, 2))
    rules = (("video/.*", "inflated"), (".*", "read"))

    def inflate(path, kernel, like):
        return np.stack([kernel / 3] * 3) if path == "video/kernel" and like.shape == (3, 2, 8) else None

    found = load(folder, like, rules, inflate=inflate)
    np.testing.assert_allclose(found["video"]["kernel"].sum(0), found["image"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(found["video"]["bias"], params["image"]["bias"])
    assert "2 parameters read, 2 inflated (video/bias, video/kernel)" in capsys.readouterr().out
    shapes["video"] = {"kernel": jnp.zeros((2, 2, 8)), "scale": jnp.zeros(8)}
    with pytest.raises(UserError, match=r"2 mismatches: image/scale: not in the checkpoint; video/kernel: \(2, 8\) in"):
        load(folder, targets(shapes, make_mesh(4, 2)), rules, inflate=inflate)


def test_all_mismatches_are_in_one_error(saved):
    folder, _ = saved
    shapes = {
        "image": {"kernel": jnp.ones((2, 6)), "scale": jnp.ones(2)},
        "text": {"token_embedding": jnp.ones((4, 2))},
        "head": {"weight": jnp.ones((2, 2))},
    }
    like = targets(shapes, make_mesh(8, 1))
    rules = (("head/.*", "new"), (".*embedding", "adapt"), ("image/.*", "read"))
    with pytest.raises(UserError) as error:
        load(folder, like, rules, florence.build("ti").adapt)
    for line in (
        "do not fit the model; 5 mismatches",
        "image/kernel: (2, 8) in the checkpoint, (2, 6) in the model",
        "image/scale: not in the checkpoint",
        "image/bias: not in the model",
        "text/token_embedding: (6, 2) in the checkpoint cannot be made (4, 2) of the model",
        "head/weight: new, but there are no values to take",
    ):
        assert line in str(error.value)
    with pytest.raises(UserError, match="text/token_embedding: no rule for it"):
        load(folder, like, (("image/.*", "read"), ("head/.*", "new")))
    with pytest.raises(UserError, match="unknown skip; choose of read, new, adapt"):
        load(folder, like, ((".*", "skip"),))


def test_classification_weights_start_a_detection_backbone(tmp_path):
    sizes = dict(image_width=32, depths=(2, 2, 2, 2), text_width=16, text_layers=1, text_heads=2, vocab_size=32)
    plain, detection = florence.build("ti", **sizes), florence.build("ti", size_mode="detection", **sizes)
    params = random_tree(jax.eval_shape(plain.init, jax.random.key(0)))
    towers = {"towers": {"variant": "ti", "overrides": sizes, "entries": list(params)}}
    save_pretrained(str(tmp_path / "w"), params, make_description("import", towers))
    fresh = random_tree(jax.eval_shape(detection.init, jax.random.key(0)))
    like = jax.device_put({"image": fresh["image"]}, replicated(make_mesh(8, 1)))
    rules = ((r"image/norm\d/.*", "new"), (r".*bias_table", "adapt"), (".*", "read"))
    found, before = leaves(load(str(tmp_path / "w"), like, rules, detection.adapt)), leaves(params)
    new = [name for name in found if name.startswith("image/norm") and name not in before]
    assert len(new) == 8
    for name, leaf in found.items():
        if name in new:
            np.testing.assert_array_equal(leaf, leaves(like)[name])
        elif leaf.shape == before[name].shape:
            np.testing.assert_array_equal(leaf, before[name])
        else:
            assert name.endswith("relative_position_bias_table") and np.isfinite(leaf).all()


def test_moments_of_what_was_frozen_start_at_zero(tmp_path):
    tree = {"a": {"kernel": jnp.ones((2, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda step: 1.0))
    (_, state) = optimizer.update({"a": tree["a"]}, optimizer.init({"a": tree["a"]}))
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, {"params": tree, "opt_state": state})
    checkpoints.close()
    mesh = replicated(make_mesh(8, 1))
    found = load_optimizer(str(tmp_path / "c"), jax.device_put(optimizer.init(tree), mesh))
    assert int(found[0].count) == 1 and int(found[1].count) == 0
    np.testing.assert_array_equal(found[0].mu["a"]["kernel"], state[0].mu["a"]["kernel"])
    np.testing.assert_array_equal(found[0].mu["b"]["kernel"], 0)
    half = load_optimizer(str(tmp_path / "c"), jax.device_put(optimizer.init({"a": tree["a"]}), mesh))
    np.testing.assert_array_equal(half[0].nu["a"]["kernel"], state[0].nu["a"]["kernel"])
    other = optax.chain(optax.clip(1.0), optimizer)
    with pytest.raises(UserError, match="is of another optimizer: it lacks 1/0/count"):
        load_optimizer(str(tmp_path / "c"), jax.device_put(other.init(tree), mesh))
