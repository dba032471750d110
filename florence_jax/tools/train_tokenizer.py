"""Trains a SentencePiece model on captions.

    python -m florence_jax.tools.train_tokenizer --corpus=captions.txt --vocab_size=32000 --out=tokenizer.model
    python -m florence_jax.tools.train_tokenizer --source=emoji:train --vocab_size=2000 --out=tokenizer.model

The corpus is a text file with one caption a line, or the text fields of a source; CLIP's prompt templates are added.
Texts are normalised as in training, sorted, and counted once each, so that the model depends only on the set of texts.
They are all held in memory: for a corpus beyond some ten million lines pass a sample. Bytes that no piece covers are
encoded one by one, so that any text can be encoded.

The second command makes the shipped florence_jax/data/emoji/tokenizer.model (sentencepiece 0.2.3). With 2,000 pieces
frequent words are whole and rare ones are split into parts that other training texts also have: the parts of held-out
names are then trained ones, and most of these occur in several texts.
"""

import argparse
import io
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from etils import epath

from florence_jax.command_line import enter, exit_code
from florence_jax.data.captions import normalise_caption
from florence_jax.data.prompts import TEMPLATES
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.tokenizers import SENTENCEPIECE_IDS
from florence_jax.errors import UserError
from florence_jax.files import with_home

TEXT_FIELDS = ("caption", "keywords", "group")


def train_pieces(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a unigram model (Kudo 2018) and returns it serialized.

    Args:
      texts: captions in any order; repeated and empty ones do not count.
      vocab_size: pieces, the 4 special ones and 256 for single bytes included.

    Raises:
      UserError: for no text, or a vocabulary too large or too small for it.
    """
    corpus = sorted({normalise_caption(text) for text in texts} - {""})
    if not corpus:
        raise UserError("the corpus has no text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            normalization_rule_name="identity",  # normalise_caption has done it
            byte_fallback=True,
            split_digits=True,
            num_threads=1,  # the pieces' scores are sums: their order must not vary
            minloglevel=2,
            **{f"{name}_id": i for name, i in SENTENCEPIECE_IDS.items()},
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1]
        raise UserError(f"cannot train {vocab_size} pieces on {len(corpus)} texts: {reason}") from error
    return model.getvalue()


def file_texts(path: str) -> list[str]:
    """The lines of a UTF-8 text file.

    Raises:
      UserError: if the file cannot be read.
    """
    try:
        return epath.Path(path).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the corpus {path}: {error}") from error


def source_texts(spec: str, fields: Sequence[str] = ()) -> Iterator[str]:
    """The texts in the given record fields (str or list of str) of a source, where a record has them.

    Without `fields`, in whichever of `TEXT_FIELDS` there are.

    Raises:
      UserError: for an unknown source, or a given field that none of its records has.
    """
    known: set[str] = set()
    for record in open_source(spec).metadata():
        known |= record.keys()
        for field in fields or TEXT_FIELDS:
            value = record.get(field)
            for text in value if isinstance(value, (list, tuple)) else [value]:
                if text and isinstance(text, str):
                    yield text
    if missing := [field for field in fields if field not in known]:
        raise UserError(f"{spec}: no record has the field {missing[0]!r}; fields: {', '.join(sorted(known))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", help="text file, one caption a line")
    what.add_argument("--source", help="data source, e.g. emoji:train")
    parser.add_argument("--fields", help=f"record fields of --source to take texts from ({','.join(TEXT_FIELDS)})")
    parser.add_argument("--vocab_size", type=int, default=2000)
    parser.add_argument("--out", required=True, help="file to write, *.model")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        if not args.out.endswith(".model"):
            raise UserError(f"--out={args.out}: the name must end in .model")
        fields = [field.strip() for field in args.fields.split(",")] if args.fields else ()
        texts = list(file_texts(args.corpus) if args.corpus else source_texts(args.source, fields))
        if not any(map(normalise_caption, texts)):
            raise UserError(f"{args.corpus or args.source} has no text")
        model = train_pieces([*texts, *(template.replace("{}", " ") for template in TEMPLATES)], args.vocab_size)
        epath.Path(args.out).write_bytes(model)
        print(f"wrote {args.out}: {args.vocab_size} pieces, {len(model)} bytes")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
