"""Import of METER and RoBERTa: every tensor of a file is used or named, and comes to the place of its name."""

import json
import re

import jax
import numpy as np
import pytest
from golden import bert_layer_shapes, bert_params, fill, swin_shapes, transformer_shapes
from safetensors.numpy import save_file
from test_roberta import IDS, LENGTHS
from test_roberta import shapes as roberta_shapes
from test_roberta_tokenizer import MERGES, vocabulary

from florence_jax.errors import UserError
from florence_jax.models.roberta import Roberta, RobertaConfig
from florence_jax.params.weights import describe
from florence_jax.tools.import_torch.__main__ import main
from florence_jax.tools.import_torch.convert import convert
from florence_jax.tools.import_torch.families import FAMILIES
from florence_jax.tools.import_torch.roberta import BERT_LAYER, ROBERTA_RENAMES

WIDTH, ANSWERS = 8, ("yes", "no", "2")
LAYERS = 3


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def classifier(name, inputs, classes):
    w = 2 * WIDTH
    return linear(f"{name}.0", w, inputs) | norm(f"{name}.1", w) | linear(f"{name}.3", classes, w)


def meter_shapes(tower, heads):
    """Of a tiny METER on a Swin (16 channels at last) or a CLIP's ViT of 3 blocks (its fourth is left out)."""
    w = WIDTH
    shapes = {f"vit_model.{name}": shape for name, shape in swin_shapes().items()}
    if tower == "clip":
        vit = {
            "class_embedding": (16,), "conv1.weight": (16, 3, 8, 8), "positional_embedding": (10, 16),
            **norm("ln_pre", 16), **norm("ln_post", 16), **transformer_shapes(16, 3, "transformer."),
        }  # fmt: skip
        shapes = {f"vit_model.visual.{name}": shape for name, shape in vit.items()}
        unread = {"token_embedding.weight": (9, 8), "positional_embedding": (7, 8), **norm("ln_final", 8)}
        shapes |= {f"vit_model.{name}": shape for name, shape in unread.items()}
    shapes |= {f"text_transformer.{name}": shape for name, shape in roberta_shapes().items()}
    shapes |= linear("text_transformer.pooler.dense", 8, 8) | {"text_transformer.embeddings.position_ids": (1, 10)}
    shapes |= linear("cross_modal_text_transform", w, 8) | linear("cross_modal_image_transform", w, 16)
    shapes |= linear("cross_modal_text_pooler.dense", w, w) | linear("cross_modal_image_pooler.dense", w, w)
    shapes["token_type_embeddings.weight"] = (3 if "nlvr2" in heads else 2, w)
    layer = bert_layer_shapes(w).items()
    for stream in ("text", "image"):
        names = (f"cross_modal_{stream}_layers.{i}" for i in range(LAYERS))
        shapes |= {f"{name}.{part}": shape for name in names for part, shape in layer}
    known = {
        "mlm": linear("mlm_score.transform.dense", w, w) | norm("mlm_score.transform.LayerNorm", w)
        | {"mlm_score.decoder.weight": (20, w), "mlm_score.bias": (20,)},
        "itm": linear("itm_score.fc", 2, 2 * w),
        "vqa": classifier("vqa_classifier", 2 * w, len(ANSWERS)),
        "nlvr2": classifier("nlvr2_classifier", 4 * w, 2),
        "snli_ve": classifier("snli_classifier", 2 * w, 3),
        "rank": linear("rank_output", 1, 2 * w),
    }  # fmt: skip
    for head in heads:
        shapes |= known[head]
    return shapes


def state(tower, heads):
    return {name: value.astype(np.float32) for name, value in fill(meter_shapes(tower, heads), 0.2).items()}


@pytest.mark.parametrize("tower,heads", [("swin", ("mlm", "itm", "rank")), ("clip", ("vqa", "nlvr2", "snli_ve"))])
def test_meter(tower, heads, tmp_path):
    tensors = state(tower, heads)
    buffers = {"vit_model.layers.0.blocks.1.attn_mask": np.zeros((1,), np.float32)} if tower == "swin" else {}
    (tmp_path / "vqa_dict.json").write_text(json.dumps({str(i): answer for i, answer in enumerate(ANSWERS)}))
    found = convert(tensors | buffers, FAMILIES["meter"], file=tmp_path / "meter.ckpt")
    params = jax.tree.map(np.asarray, found.params)
    left = {name for name in tensors | buffers if re.search(r"pooler\.dense|position_ids|attn_mask", name)}
    left -= {name for name in left if "cross_modal" in name}
    if tower == "clip":
        left |= {name for name in tensors if re.match(r"vit_model\.(token|positional|ln_final)", name)}
    assert set(found.dropped) == left
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sizes == sum(value.size for name, value in tensors.items() if name not in left)
    for i in range(LAYERS):
        for stream in ("text", "image"):
            prefix = f"cross_modal_{stream}_layers.{i}"
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            want = bert_params(own, BERT_LAYER)[""]
            stack = params["fusion"]["co_attention"]["layers"][stream]
            jax.tree.map(lambda got, want, i=i: np.testing.assert_array_equal(got[i], want), stack, want)
    fusion, config = params["fusion"], found.config
    np.testing.assert_array_equal(fusion["text_input"]["kernel"], tensors["cross_modal_text_transform.weight"].T)
    np.testing.assert_array_equal(fusion["image_pooler"]["bias"], tensors["cross_modal_image_pooler.dense.bias"])
    assert config.heads == tuple(sorted(heads, key=["mlm", "itm", "vqa", "nlvr2", "snli_ve", "rank"].index))
    parts = FAMILIES["meter"].parts(config, list(params), found.evaluation)
    assert {name: part["entries"] for name, part in parts.items()} == {
        "towers": ["image"], "roberta": ["roberta"], "fusion": ["fusion"]
    }  # fmt: skip
    if tower == "swin":
        np.testing.assert_array_equal(fusion["mlm"]["kernel"], tensors["mlm_score.decoder.weight"].T)
        assert config.tower.depths == (2, 2) and config.tower.res == 32 and config.answers == ()
    else:
        np.testing.assert_array_equal(fusion["vqa"]["output"]["kernel"], tensors["vqa_classifier.3.weight"].T)
        np.testing.assert_array_equal(params["image"]["norm"]["scale"], tensors["vit_model.visual.ln_post.weight"])
        assert config.tower.depths == (3,) and config.tower.res == 24 and config.tower.image_activation == "quick_gelu"
        assert parts["fusion"]["eval_ops"] == "decode|resize(24)|center_crop(24)"
        assert parts["fusion"]["answers"] == list(ANSWERS) and parts["fusion"]["overrides"]["token_types"] == 3
        wider = convert(tensors, FAMILIES["meter"], file=tmp_path / "meter.ckpt", res=40)
        assert wider.params["image"]["position_embedding"].shape == (26, 16) and wider.config.tower.res == 40


def test_answers_of_a_file(tmp_path):
    tensors = state("clip", ("vqa",))
    with pytest.raises(UserError, match="does not name its 3 answers.*--set answers=FILE"):
        convert(tensors, FAMILIES["meter"], file=tmp_path / "meter.ckpt")
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    with pytest.raises(UserError, match=r"choose between 3 answers, .*answers\.txt names 2"):
        convert(tensors, FAMILIES["meter"], file=tmp_path / "meter.ckpt")
    del tensors["cross_modal_text_layers.1.output.dense.bias"]
    tensors["surprise"] = np.zeros(2, np.float32)
    (tmp_path / "answers.txt").write_text("yes\nno\n2\n")
    with pytest.raises(UserError, match=r"(?s)text_layers\.1\.output\.dense\.bias: missing.*surprise: unknown"):
        convert(tensors, FAMILIES["meter"], file=tmp_path / "meter.ckpt")


def test_roberta_command(tmp_path, capsys):
    """A file with the language model's head: its folder, and the same states as from the tensors themselves."""
    tensors = {name: value.astype(np.float32) for name, value in fill(roberta_shapes(), 0.3).items()}
    wrapped = {f"roberta.{name}": value for name, value in tensors.items()}
    wrapped |= {"lm_head.bias": np.zeros(20, np.float32), "roberta.pooler.dense.bias": np.zeros(8, np.float32)}
    save_file(wrapped, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta", "num_attention_heads": 2}))
    out = tmp_path / "out"
    command = ["--from=roberta", f"--file={tmp_path / 'model.safetensors'}", f"--out={out}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "dropped: lm_head.bias, pooler.dense.bias" in said and "roberta: variant roberta-base" in said
    part = describe(str(out)).parts["roberta"]
    config = RobertaConfig(**{**part["overrides"], "length": 5})
    assert (config.heads, config.width, config.layers, config.positions) == (2, 8, 2, 10)
    found = convert(tensors, FAMILIES["roberta"], options={"heads": 2})
    ours = jax.tree.map(np.asarray, found.params["roberta"])
    jax.tree.map(np.testing.assert_array_equal, ours, bert_params(tensors, ROBERTA_RENAMES)["roberta"])
    states = jax.jit(Roberta(config).apply)({"params": ours}, IDS, LENGTHS)
    np.testing.assert_allclose(states[0, 0, :2], [2.28158849, 0.38227220], atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))
    assert main([*command[:2], f"--out={tmp_path / 'again'}"]) == 2
    assert 'model_type="xlm-roberta", which is not supported' in capsys.readouterr().err


def test_a_tokenizer_of_other_weights(tmp_path):
    """It is found beside the file; one with more ids than the weights have rows is refused."""
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tensors = {name: value.astype(np.float32) for name, value in fill(roberta_shapes(), 0.3).items()}
    with pytest.raises(UserError, match=r"vocab\.json has 50265 ids, the weights 20 rows: it is of other weights"):
        convert(tensors, FAMILIES["roberta"], file=tmp_path / "model.safetensors", options={"heads": 2})
    rows = {"embeddings.word_embeddings.weight": np.zeros((50265, 8), np.float32)}
    found = convert(tensors | rows, FAMILIES["roberta"], file=tmp_path / "model.safetensors", options={"heads": 2})
    assert FAMILIES["roberta"].tokenizer(found.config) == str(tmp_path / "vocab.json")
