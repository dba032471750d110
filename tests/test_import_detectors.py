"""Import of detectors: the published blocks' numbers through each naming, folders that detect, and every refusal."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import block_shapes, cosx, embed_shapes, fill, sinx
from PIL import Image
from safetensors.numpy import save_file
from test_deform_conv import GOLDEN
from test_dyhead import BLOCK, SIZES
from tiny_images import run_main

from florence_jax.data.buckets import nearest_sizes
from florence_jax.errors import UserError
from florence_jax.inference import Florence
from florence_jax.inference.detector import DetectorAnswerer
from florence_jax.models.deform_conv import deform_conv
from florence_jax.models.detector import Pyramid, resolve_detector
from florence_jax.models.dyhead import DyHeadBlock, DyReLU
from florence_jax.params.sharding import make_mesh
from florence_jax.params.weights import describe
from florence_jax.tasks import answerer_class
from florence_jax.tasks.detector import Detector
from florence_jax.tasks.encoder import Encoder
from florence_jax.tools.import_torch.__main__ import main
from florence_jax.tools.import_torch.convert import convert
from florence_jax.tools.import_torch.detectors import COCO_IDS, DetectorFamily, buckets_for
from florence_jax.tools.import_torch.families import FAMILIES

WIDTH, CLASSES, WINDOW = 16, 80, 4
# The parts of a block of mmdetection; its fully connected layers are 1x1 convolutions, its DCNs have no bias.
MMDET_BLOCK = {
    "DyConv.0.conv": "spatial_conv_high.conv", "DyConv.0.bn": "spatial_conv_high.norm",
    "DyConv.1.conv": "spatial_conv_mid.conv", "DyConv.1.bn": "spatial_conv_mid.norm",
    "DyConv.2.conv": "spatial_conv_low.conv", "DyConv.2.bn": "spatial_conv_low.norm",
    "offset": "spatial_conv_offset", "AttnConv.1": "scale_attn_module.1",
    "relu.fc.0": "task_attn_module.conv1.conv", "relu.fc.2": "task_attn_module.conv2.conv",
}  # fmt: skip
MMDET_FPN = {"fpn_lateral": "lateral_convs", "fpn_output": "fpn_convs", "top_block.p": "fpn_convs"}
MMDET_HEAD = {"cls_logits": "atss_cls", "bbox_pred": "atss_reg", "centerness": "atss_centerness"}
COARSE = {"dyhead": "flat", "glip": "flat", "mmdet": "topleft"}


def golden_blocks():
    """Two blocks in the authors' names: that of the golden numbers; and one with the tensors of the goldens of its
    parts, in the first channels."""
    shapes = {
        "AttnConv.1.bias": (1,), "AttnConv.1.weight": (1, 16, 1, 1), "offset.bias": (27,),
        "offset.weight": (27, 16, 3, 3), "relu.fc.0.bias": (4,), "relu.fc.0.weight": (4, 16), "relu.fc.2.bias": (64,),
        "relu.fc.2.weight": (64, 4),
    }  # fmt: skip
    for i in range(3):
        shapes |= {f"DyConv.{i}.{name}": (16,) for name in ("bn.bias", "bn.weight", "conv.bias")}
        shapes[f"DyConv.{i}.conv.weight"] = (16, 16, 3, 3)
    first = fill(shapes, 0.3)
    second = {name: np.zeros(shape) for name, shape in shapes.items()}
    for i, (*_, weight, _, _) in enumerate(GOLDEN[1:]):  # high, mid, low
        second[f"DyConv.{i}.conv.weight"][0, 0] = np.reshape(weight, (3, 3))
    second["relu.fc.2.bias"].reshape(4, 16)[:, :4] = np.linspace(-4, 4, 16).reshape(4, 4)
    return [first, second]


@functools.cache
def dyhead_state():
    """A tiny detector in the authors' names."""
    shapes = embed_shapes("patch_embed.", 4, 3, 8)
    for i, heads in enumerate((1, 2, 4, 8)):
        for j in range(2):
            shapes |= block_shapes(8 * 2**i, heads, WINDOW, f"layers.{i}.blocks.{j}.")
        if i < 3:
            merging = {"norm.bias": (32 * 2**i,), "norm.weight": (32 * 2**i,)}
            merging["reduction.weight"] = (16 * 2**i, 32 * 2**i)
            shapes |= {f"layers.{i}.downsample.{name}": shape for name, shape in merging.items()}
            shapes |= {f"norm{i + 1}.{name}": (16 * 2**i,) for name in ("weight", "bias")}
    shapes = {f"backbone.backbone.bottom_up.{name}": shape for name, shape in shapes.items()}
    convolutions = {f"fpn_lateral{i}": (WIDTH, 16 << i - 3, 1, 1) for i in (3, 4, 5)}
    convolutions |= dict.fromkeys(
        [*(f"fpn_output{i}" for i in (3, 4, 5)), "top_block.p6", "top_block.p7"], (16, 16, 3, 3)
    )
    convolutions = {f"backbone.backbone.{name}": shape for name, shape in convolutions.items()}
    convolutions |= {
        f"head.{name}": (rows, WIDTH, 1, 1)
        for name, rows in dict(cls_logits=CLASSES, bbox_pred=4, centerness=1).items()
    }
    for name, shape in convolutions.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = fill(shapes, 0.2) | {f"head.scales.{i}.scale": np.array([1 + 0.1 * i]) for i in range(5)}
    state["head.cls_logits.bias"] = state["head.cls_logits.bias"] - 2
    blocks = enumerate(golden_blocks())
    return state | {f"backbone.dyhead_tower.{i}.{name}": value for i, block in blocks for name, value in block.items()}


def glip_name(name):
    for pattern, new in (
        (r"backbone\.backbone\.bottom_up\.", "backbone.body."),
        (r"backbone\.backbone\.fpn_lateral(\d)", lambda m: f"backbone.fpn.fpn_inner{int(m[1]) - 1}"),
        (r"backbone\.backbone\.fpn_output(\d)", lambda m: f"backbone.fpn.fpn_layer{int(m[1]) - 1}"),
        (r"backbone\.backbone\.top_block\.", "backbone.fpn.top_blocks."),
        (r"backbone\.dyhead_tower\.(\d)\.", lambda m: f"rpn.head.dyhead_tower.{3 * int(m[1]) + 2}."),
        (r"head\.(?=cls|bbox|cent|scales)", "rpn.head."),
    ):
        name = re.sub(f"^{pattern}", new, name)
    return f"module.{name}"


def glip_state():
    """With what belongs to its language; its pictures are blue, green, red."""
    state = {glip_name(name): value for name, value in dyhead_state().items()}
    stem = "module.backbone.body.patch_embed.proj.weight"
    state[stem] = state[stem][:, ::-1]
    language = {
        "language_backbone.body.model.embeddings.word_embeddings.weight": (9, 6),
        "language_backbone.body.model.encoder.layer.0.output.dense.bias": (6,),
        "rpn.head.dyhead_tower.0.b_attn.gamma_v": (16,), "rpn.head.dyhead_tower.1.attention.self.query.weight": (6, 6),
        "rpn.head.dyhead_tower.3.b_attn.attn.v_proj.bias": (6,), "rpn.head.bias0": (1,), "rpn.head.log_scale": (1,),
        "rpn.head.dot_product_projection_text.weight": (16, 6), "rpn.head.bias_lang": (6,),
    }  # fmt: skip
    anchors = {f"rpn.anchor_generator.cell_anchors.{i}": (1, 4) for i in range(5)}
    return state | {f"module.{name}": np.ones(shape) for name, shape in (language | anchors).items()}


def unfolded(value):
    """Inputs of a patch merging in mmdetection's order, by the steps of its own converter."""
    parts = value.reshape(*value.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
    return np.moveaxis(parts, -2, -1).reshape(value.shape)


def mmdet_item(name, value):
    if name.startswith("backbone.dyhead_tower."):
        _, _, number, *rest = name.split(".")
        part, leaf = ".".join(rest[:-1]), rest[-1]
        value = value[:, :, None, None] if part.startswith("relu.fc") and leaf == "weight" else value
        return f"neck.1.dyhead_blocks.{number}.{MMDET_BLOCK[part]}.{leaf}", value
    if name.startswith("head.scales."):
        return f"bbox_{name}", value[0]
    if name.startswith("head."):
        return re.sub(r"head\.(\w+)", lambda m: f"bbox_head.{MMDET_HEAD[m[1]]}", name), value
    if not name.startswith("backbone.backbone.bottom_up."):
        parts = re.fullmatch(r"backbone\.backbone\.(\D+)(\d)\.(\w+)", name)
        return f"neck.0.{MMDET_FPN[parts[1]]}.{int(parts[2]) - 3}.conv.{parts[3]}", value
    value = unfolded(value) if ".downsample." in name else value
    for old, new in {
        "backbone.backbone.bottom_up.": "backbone.", "patch_embed.proj.": "patch_embed.projection.",
        ".layers.": ".stages.", ".attn.": ".attn.w_msa.", ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
    }.items():  # fmt: skip
        name = name.replace(old, new)
    return name, value


def mmdet_state():
    items = (mmdet_item(name, value) for name, value in dyhead_state().items() if "conv.bias" not in name)
    indices = {f"backbone.stages.0.blocks.{i}.attn.w_msa.relative_position_index": np.zeros((16, 16)) for i in (0, 1)}
    return dict(items) | indices


STATES = {"dyhead": dyhead_state, "glip": glip_state, "mmdet": mmdet_state}
block_of = functools.cache(lambda coarse: jax.jit(DyHeadBlock(coarse).apply))


@pytest.fixture(autouse=True, scope="module")
def one_trace():
    """The shapes of the model are traced once: no option that differs between the families changes them."""
    traced, targets = {}, DetectorFamily.targets

    def known(self, config):
        key = config.tower, len(config.classes), config.variant, config.overrides["width"]
        if key not in traced:
            traced[key] = targets(self, config)
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectorFamily, "targets", known)
        yield


@functools.cache
def converted(family):
    """(configuration, parameters as arrays, dropped, notes)."""
    found = convert(STATES[family](), FAMILIES[family])
    return found.config, jax.tree.map(np.asarray, found.params), found.dropped, found.notes


@pytest.mark.parametrize("family", STATES)
def test_golden_block_through_the_importer(family):
    block = jax.tree.map(lambda leaf: leaf[0], converted(family)[1]["detector"]["blocks"])
    maps = cosx(1, 16, 8, 12), sinx(0.05, 1, 16, 4, 6), np.cos(0.21 * np.arange(96) + 1).reshape(1, 16, 2, 3)
    maps = tuple(np.float32(x).transpose(0, 2, 3, 1) for x in maps)
    canvases = tuple(np.pad(x, ((0, 0), (0, 4 >> i), (0, 8 >> i), (0, 0))) for i, x in enumerate(maps))
    valids = tuple(jnp.array([size]) for size in SIZES)
    levels = block_of(COARSE[family])({"params": block}, canvases, valids)[0]
    for got, (height, width), want in zip(levels, SIZES, BLOCK[COARSE[family]], strict=True):
        got = np.asarray(got, np.float64)[:, :height, :width].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got.ravel()[:2], want[:2], atol=2e-5)
        np.testing.assert_allclose(got.sum(), want[2], atol=1e-5 * np.abs(got).sum())


@pytest.mark.parametrize("family", STATES)
def test_golden_parts_through_the_importer(family):
    """Deformable convolutions and DyReLU whose golden tensors lie in the first channels of the second block."""
    block = jax.tree.map(lambda leaf: leaf[1], converted(family)[1]["detector"]["blocks"])
    x = np.zeros((1, 5, 5, 16), np.float32)
    x[..., 0] = np.arange(25).reshape(1, 5, 5)
    for part, (offset, mask, _, stride, want) in zip(("coarser", "same", "finer"), GOLDEN[1:], strict=True):
        side = 4 // stride + 1
        offsets = jnp.tile(jnp.array(offset), 9 * side * side).reshape(1, side, side, 18)
        mask = jnp.tile(jnp.array(mask, jnp.float32), side * side).reshape(1, side, side, 9)
        convolve = jax.jit(deform_conv, static_argnames=("stride", "form"))
        got = convolve(x, offsets, mask, block[part]["kernel"], block[part]["bias"], stride=stride, form="matrix")
        np.testing.assert_allclose(got[..., 0].ravel(), np.array(want.split(), float), rtol=1e-5)
    x = jnp.zeros(16).at[:4].set(jnp.array([-1, 2, 0.5, -3])).reshape(1, 1, 1, 16)
    got = jax.jit(DyReLU().apply)({"params": block["dyrelu"]}, x, x[:, 0, 0])
    np.testing.assert_allclose(got[0, 0, 0, :4], [0.311111, 1.022222, 0.722222, -0.644445], atol=1e-5)


@pytest.mark.parametrize("family", ["glip", "mmdet"])
def test_all_namings_give_the_same_parameters(family):
    """But for the biases of the convolutions, which mmdetection has none of."""
    want, got = (dict(jax.tree_util.tree_leaves_with_path(converted(name)[1])) for name in ("dyhead", family))
    assert want.keys() == got.keys()
    for path, value in want.items():
        names = [key.key for key in path]
        if family == "mmdet" and names[2] in ("coarser", "same", "finer") and names[3:] == ["bias"]:
            value = np.zeros_like(value)
        np.testing.assert_array_equal(got[path], value, err_msg=str(names))
    np.testing.assert_allclose(want[next(path for path in want if path[-2].key == "scales")], [1, 1.1, 1.2, 1.3, 1.4])


def test_what_is_left_out_is_counted():
    _, _, dropped, notes = converted("glip")
    assert len(dropped) == 9 + 5 and "rpn.head.dyhead_tower.0.b_attn.gamma_v" in dropped
    said = "; ".join(notes)
    for part in (
        "the language backbone, 2 tensors", "fuse pictures with language, 3 tensors", "compare places with words, 4",
        "last norm, which no detector has", "class layer of the file, which was never trained",
    ):  # fmt: skip
        assert part in said, said
    assert "the biases of the deformable convolutions: 0" in "; ".join(converted("mmdet")[3])
    assert len(converted("mmdet")[2]) == 2 and not converted("dyhead")[2]  # indices of tables


def test_options_and_classes_of_a_folder():
    parts = {name: FAMILIES[name].parts(converted(name)[0], ["image", "detector"], {}) for name in STATES}
    assert all(part["towers"]["entries"] == ["image"] for part in parts.values())
    found = {name: part["detector"] for name, part in parts.items()}
    common = dict(padding="published", width=16, blocks=2)
    for name, own in dict(
        dyhead=dict(coarse="flat"), glip=dict(coarse="flat", multiple=32), mmdet=dict(coarse="topleft", relu_p7=False)
    ).items():
        config = resolve_detector(found[name]["variant"], **found[name]["overrides"])
        assert {field: getattr(config, field) for field in (common | own)} == common | own
    assert [part["options"]["root"] for part in found.values()] == [False, True, False]
    assert found["dyhead"]["classes"][9] == "traffic light" and found["dyhead"]["category_ids"] == list(COCO_IDS)
    assert (COCO_IDS[11], COCO_IDS[-1], len(COCO_IDS)) == (13, 90, 80)
    assert found["glip"]["classes"][0] == "class 0"  # told by words


@pytest.mark.parametrize("short,longest", [(800, 1333), (1200, 2000), (100, 300), (890, 890), (64, 64)])
def test_every_picture_fits_into_its_bucket(short, longest):
    sizes = buckets_for(short, longest)
    assert all(side % 128 == 0 for size in sizes for side in size)
    rng = np.random.default_rng(0)
    shapes = np.exp(rng.uniform(-1.5, 1.5, (2000, 2)))
    scale = np.minimum(short / shapes.min(1), longest / shapes.max(1))
    resized = np.round(shapes * scale[:, None])
    assert (resized <= np.array(sizes)[nearest_sizes(shapes, sizes)]).all()


def test_the_coarsest_level_with_and_without_relu():
    """Of mmdetection's pyramid all of the level before counts, of the others' the positive part."""
    maps = tuple(np.float32(sinx(0.3, 1, side, side, 4)) for side in (4, 2, 1))
    valids = tuple(jnp.array([[side, side]]) for side in (4, 2, 1, 1, 1))
    params = jax.tree.map(
        lambda leaf: sinx(0.9, *leaf.shape), jax.eval_shape(Pyramid(16).init, jax.random.key(0), maps, valids)
    )
    levels = [jax.jit(Pyramid(16, relu_p7=relu).apply)(params, maps, valids) for relu in (True, False)]
    for ours, other in zip(*(found[:4] for found in levels), strict=True):
        np.testing.assert_array_equal(ours, other)
    p6, kernel = np.asarray(levels[0][3])[0, 0, 0], params["params"]["p7"]["kernel"][1, 1]
    for found, before in zip(levels, (np.maximum(p6, 0), p6), strict=True):
        np.testing.assert_allclose(found[4][0, 0, 0], before @ kernel + params["params"]["p7"]["bias"], rtol=1e-4)


@pytest.mark.parametrize(
    "family,state,options,message",
    [
        ("dyhead", glip_state, {}, "not a checkpoint of --from=dyhead: it has no tensor called backbone"),
        ("glip", mmdet_state, {}, "not a checkpoint of --from=glip"),
        ("mmdet", dyhead_state, {}, "not a checkpoint of --from=mmdet"),
        ("dyhead", lambda: {"backbone.bottom_up.res2.0.conv1.weight": np.ones(3)}, {}, "is a detector on a ResNet"),
        ("glip", lambda: {"roi_heads.box.x": np.ones(3)}, {}, "this is a two-stage detector"),
        ("dyhead", dyhead_state, {"classes": "voc2007"}, "tells 80 classes apart, --set classes=voc2007 names 20"),
        ("dyhead", dyhead_state, {"classes": 80 * ("cat",)}, "a name is there twice"),
        ("dyhead", dyhead_state, {"coarse": "none"}, "coarse='none': choose one of"),
        ("dyhead", dyhead_state, {"colour": 1}, "unknown model option colour"),
    ],
)
def test_mistakes_are_told(family, state, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        convert(state(), FAMILIES[family], options=options)


def test_what_does_not_fit_is_one_message():
    """By the file's own names: two missing, one unknown, one of another shape."""
    state = mmdet_state() | {"neck.2.x": np.ones(3), "bbox_head.atss_reg.weight": np.ones((4, 16, 3, 3))}
    del state["bbox_head.atss_centerness.bias"], state["neck.1.dyhead_blocks.1.spatial_conv_low.norm.bias"]
    with pytest.raises(UserError, match="4 mismatches") as error:
        convert(state, FAMILIES["mmdet"])
    for part in (
        "bbox_head.atss_centerness.bias: missing", "neck.1.dyhead_blocks.1.spatial_conv_low.norm.bias: missing",
        "neck.2.x: unknown, (3,)", "bbox_head.atss_reg.weight: (4, 16, 3, 3), should be (4, 16)",
    ):  # fmt: skip
        assert part in str(error.value)


def test_classes_that_nobody_names():
    state = dyhead_state()
    state = state | {f"head.cls_logits.{name}": state[f"head.cls_logits.{name}"][:7] for name in ("weight", "bias")}
    with pytest.raises(UserError, match="does not name its 7 classes: add --set classes=FILE with 7 names"):
        convert(state, FAMILIES["dyhead"])
    with pytest.raises(UserError, match="--res and --window are for towers alone"):
        FAMILIES["dyhead"].resolution(None, 64, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the import's command, with classes that a file names."""
    path = tmp_path_factory.mktemp("imported")
    state = {name: np.array(value, np.float32) for name, value in dyhead_state().items()}
    save_file(state, path / "tiny.safetensors")
    (path / "names.txt").write_text("\n".join(f"thing {number}" for number in range(CLASSES)))
    options = ["--set=short=64", "--set=longest=64", f"--set=classes={path}/names.txt"]
    assert main(["--from=dyhead", f"--file={path}/tiny.safetensors", f"--out={path}/out", *options]) == 0
    return str(path / "out")


def test_an_imported_folder_holds_a_detector_alone(folder):
    part = describe(folder).parts["detector"]
    assert answerer_class(describe(folder).task) is DetectorAnswerer  # what florence_jax.predict does with it
    assert part["sizes"] == [[128, 128]] and part["classes"][3] == "thing 3"
    assert part["category_ids"] == [*range(1, CLASSES + 1)]
    encoder = Encoder(folder)
    params = Detector(encoder).load_on(make_mesh(-1, 1))
    assert {"image", "detector"} == set(params) and not encoder.has_text
    want = converted("dyhead")[1]
    jax.tree.map(np.testing.assert_array_equal, params, want)


@pytest.mark.slow
def test_an_imported_folder_detects_and_is_evaluated(folder, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, size, np.uint8) for size in ((48, 64, 3), (90, 40, 3))]
    model = Florence(folder, batch_size=8)
    with pytest.raises(UserError, match="holds no text tower"):
        model.classify(pictures, ["cat", "dog"])
    found = model.detect(pictures, threshold=0.0, top=5)
    assert [len(one["boxes"]) for one in found] == [5, 5]
    lines = ["image,x1,y1,x2,y2,name"]
    for number, (one, picture) in enumerate(zip(found, pictures, strict=True)):
        height, width = picture.shape[:2]
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= (width, height, width, height)).all()
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        lines += [f"{number}.png,{','.join(map(str, one['boxes'][0]))},{one['names'][0]}"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    args = [f"--config.init={folder}", f"--config.data.test={tmp_path}", f"--workdir={tmp_path}/run"]
    assert run_main("--config=configs/detect.py:protocol=eval", "--config.eval.batch_size=8", *args) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())
