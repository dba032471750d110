"""RoBERTa in the naming of Hugging Face's transformers."""

from florence_jax.tools.import_torch.names import Renames

# Parts of a layer of transformers' BERT, RoBERTa and BridgeTower, which METER's are too: all of them, in order, to
# names whose layer is ours already. Queries, keys and values are parts of one tensor.
BERT_LAYER: Renames = (
    (r"\.attention\.self\.query\.(\w+)$", r".self_attention.qkv.\1#0"),
    (r"\.attention\.self\.key\.(\w+)$", r".self_attention.qkv.\1#1"),
    (r"\.attention\.self\.value\.(\w+)$", r".self_attention.qkv.\1#2"),
    (r"\.crossattention\.self\.query\.", ".cross_attention.q."),
    (r"\.crossattention\.self\.key\.(\w+)$", r".cross_attention.kv.\1#0"),
    (r"\.crossattention\.self\.value\.(\w+)$", r".cross_attention.kv.\1#1"),
    (r"\.attention\.output\.dense\.", ".self_attention.output."),
    (r"\.attention\.output\.LayerNorm\.", ".self_attention.norm."),
    (r"\.crossattention\.output\.dense\.", ".cross_attention.output."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_attention.norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"(?<!_attention)\.output\.dense\.", ".fc2."),
    (r"(?<!_attention)\.output\.LayerNorm\.", ".norm."),
)
# Of the names of a RobertaModel without its prefix.
ROBERTA_RENAMES: Renames = (
    (r"^embeddings\.word_embeddings\.weight$", "roberta.token_embedding"),
    (r"^embeddings\.position_embeddings\.weight$", "roberta.position_embedding"),
    (r"^embeddings\.token_type_embeddings\.weight$", "roberta.type_embedding"),
    (r"^embeddings\.LayerNorm\.", "roberta.norm."),
    (r"^encoder\.layer\.(\d+)\.", r"roberta.layer\1."),
    *BERT_LAYER,
)
