"""RoBERTa against the numbers of Hugging Face's transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import bert_layer_shapes, bert_params, fill

from florence_jax.errors import UserError
from florence_jax.models.cross_attention import CrossLayer, key_bias
from florence_jax.models.dropout import drop_examples
from florence_jax.models.roberta import ROBERTAS, Roberta, RobertaConfig, resolve_roberta
from florence_jax.tools.import_torch.roberta import BERT_LAYER, ROBERTA_RENAMES

SIZES = RobertaConfig(layers=2, width=8, heads=2, mlp_ratio=2, vocabulary=20, positions=10, length=5)
IDS, LENGTHS = jnp.array([[0, 5, 7, 19, 2], [0, 3, 2, 1, 1]]), jnp.array([5, 3])


def shapes():
    """Of the tensors of a tiny RobertaModel."""
    tables = {"word": (20, 8), "position": (10, 8), "token_type": (1, 8)}
    found = {f"embeddings.{name}_embeddings.weight": shape for name, shape in tables.items()}
    found |= {f"embeddings.LayerNorm.{name}": (8,) for name in ("weight", "bias")}
    for i in range(2):
        found |= {f"encoder.layer.{i}.{name}": shape for name, shape in bert_layer_shapes(8, cross=False).items()}
    return found


def params():
    filled = bert_params(fill(shapes(), 0.3), ROBERTA_RENAMES)["roberta"]
    return {"params": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), filled)}


def test_golden():
    """States of transformers' RobertaModel (5.24, float64)."""
    got = jax.jit(Roberta(SIZES).apply)(params(), IDS, LENGTHS)
    expected = [2.28158849, 0.38227220, 0.22242708, -1.03012701, -0.52259122, -1.04779367, 0.10738980, 0.14255875]
    np.testing.assert_allclose(got[0, 0], expected, atol=1e-5)
    expected = [2.29065745, 0.64609856, 0.22739917, -0.92761301, -0.62451599, -1.08833600, -0.02750604, 0.10844976]
    np.testing.assert_allclose(got[1, 2], expected, atol=1e-5)
    np.testing.assert_allclose([got[0].sum(), got[1, :3].sum()], [0.29975294, 0.35602190], atol=1e-4)
    # Padding is known by length, whatever its ids are.
    other = jax.jit(Roberta(SIZES).apply)(params(), jnp.pad(IDS.at[1, 3:].set(9), ((0, 0), (0, 2))), LENGTHS)
    np.testing.assert_allclose(other[0, :5], got[0], atol=1e-6)
    np.testing.assert_allclose(other[1, :3], got[1, :3], atol=1e-6)


def test_published_sizes():
    assert ROBERTAS["roberta-base"] == RobertaConfig(12, 768, 12)
    assert ROBERTAS["roberta-large"] == RobertaConfig(24, 1024, 16)
    shapes = jax.eval_shape(Roberta(resolve_roberta("roberta-base")).init, jax.random.key(0), IDS)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_055_040  # without its pooler
    with pytest.raises(UserError, match="texts of 9 tokens exceed the 8 places"):
        Roberta(SIZES).init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(UserError, match="choose one of roberta-base, roberta-large"):
        resolve_roberta("roberta-huge")


def test_dropout_is_of_the_example():
    run = jax.jit(
        lambda rows, ids: Roberta(SIZES).apply(params(), rows, None, drop_examples(jax.random.key(1), ids, 0.2))
    )
    rows, ids = jnp.tile(IDS[:1], (2, 1)), jnp.array([4, 9])
    one = run(rows, ids)
    np.testing.assert_allclose(run(rows, ids[::-1]), one[::-1], atol=1e-6)
    assert jnp.abs(one[0] - one[1]).max() > 0.01


def test_parity_with_transformers():
    """Random weights, a text with padding, and a cross layer of BridgeTower (METER's), to 1e-5."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    bridge = pytest.importorskip("transformers.models.bridgetower.modeling_bridgetower")
    rng = np.random.default_rng(0)

    def filled(module):
        return {name: rng.normal(0, 0.3, value.shape) for name, value in module.state_dict().items() if value.ndim}

    def load(module, state):
        module.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)
        return module.eval()

    theirs = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=10, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
        ),
        add_pooling_layer=False,
    ).double()  # fmt: skip
    state = filled(theirs)
    ids = np.array(IDS)
    want = load(theirs, state)(torch.tensor(ids), attention_mask=torch.tensor(ids != 1).long())
    ours = jax.tree.map(jnp.float32, bert_params(state, ROBERTA_RENAMES)["roberta"])
    got = jax.jit(Roberta(SIZES).apply)({"params": ours}, IDS, LENGTHS)
    real = np.array(IDS != 1)
    np.testing.assert_allclose(np.array(got)[real], want.last_hidden_state.detach().numpy()[real], atol=1e-5)

    config = bridge.BridgeTowerTextConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=16, layer_norm_eps=1e-12
    )
    theirs = bridge.BridgeTowerBertCrossLayer(config).double()
    state = filled(theirs)
    text, image = rng.standard_normal((2, 5, 8)), rng.standard_normal((2, 7, 8))
    mask = torch.tensor(np.where(real, 0.0, -1e4))[:, None, None]
    want = load(theirs, state)(torch.tensor(text), torch.tensor(image), attention_mask=mask)[0].detach().numpy()
    ours = bert_params({f".{name}": value for name, value in state.items()}, BERT_LAYER)[""]
    module, bias = CrossLayer(2, mlp_ratio=2), key_bias(LENGTHS, 5)
    apply = jax.jit(lambda p, x, y: module.apply({"params": p}, x, bias, None, y, None)[0])
    got = apply(jax.tree.map(jnp.float32, ours), jnp.float32(text), jnp.float32(image))
    np.testing.assert_allclose(np.array(got)[real], want[real], atol=1e-5)
