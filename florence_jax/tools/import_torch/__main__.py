"""Converts public PyTorch weights into a checkpoint folder of this project.

    python -m florence_jax.tools.import_torch --from=swin --file=swin_tiny_patch4_window7_224.pth --out=DIR
    python -m florence_jax.tools.import_torch --from=unicl --file=yfcc14m.pth --out=DIR --res=384
    python -m florence_jax.tools.import_torch --from=clip --file=ViT-B-32.pt --out=DIR
    python -m florence_jax.tools.import_torch --from=openclip --file=open_clip_model.safetensors --out=DIR
    python -m florence_jax.tools.import_torch --from=dyhead --file=dyhead_swint_atss_fpn_2x_ms.pth --out=DIR
    python -m florence_jax.tools.import_torch --from=meter --file=meter_clip16_288_roberta_vqa.ckpt --out=DIR
    python -m florence_jax.tools.import_torch --from=videoswin --file=swin_base_patch244_window877.pth --out=DIR
    python -m florence_jax.tools.import_torch --from=roberta --file=roberta-base/model.safetensors --out=DIR

Sizes are read from the tensors' shapes. What they do not show, the activation and the heads of a ViT, is read from
open_clip_config.json, config.json and preprocessor_config.json beside the file, or known by the file's name; else
--set activation=quick_gelu, --set 'heads=(12,)' and --set text_heads=8 say it. `--res` adapts the weights to other
images: bias tables (also with `--window`; default res / 32) and position embeddings are interpolated. A detector's
classes are COCO's or Objects365's, by their number, or those of `--set classes=FILE`. The answers of a METER that was
trained on questions are those of answers.txt or vqa_dict.json beside it or of `--set answers=FILE`, RoBERTa's tokenizer
is tokenizer.json or vocab.json beside it or `--set tokenizer=FILE`. The folder goes to
`--config.init`; its model.json names the variant and the options that rebuild the model, and how pictures are made for
it. A tensor is read when it is written, so that the memory is a few times that of the largest.
"""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from florence_jax.command_line import enter, exit_code
from florence_jax.errors import UserError
from florence_jax.files import with_home
from florence_jax.params.weights import make_description, save_pretrained
from florence_jax.tools.import_torch.convert import convert
from florence_jax.tools.import_torch.families import FAMILIES
from florence_jax.tools.import_torch.files import read_state_dict

_SHOWN = 8  # names of dropped tensors on the terminal


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """'text_heads=2' or 'text_pooling=first' to {name: value}; raises `UserError` without '='."""
    options = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: write NAME=VALUE, for example --set text_causal=False")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def run(args: argparse.Namespace) -> None:
    """Converts `args.file` into `args.out` and says what was done; raises `UserError`."""
    family, file = FAMILIES[args.family], Path(args.file)
    state = read_state_dict(args.file)
    try:
        found = convert(state, family, file=file, options=parse_options(args.set), res=args.res, window=args.window)
    except UserError as error:
        raise UserError(f"{file.name}: {error}") from error
    source = {"from": args.family, "file": file.name, "dropped": found.dropped}
    parts = family.parts(found.config, list(found.params), found.evaluation)
    description = make_description(
        family.task,
        parts,
        tokenizer=family.tokenizer(found.config),
        classes=family.classes(found.config),
        source=source,
    )
    save_pretrained(args.out, found.params, description)
    count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    told = "; ".join(
        f"{'' if name == 'towers' else f'{name}: '}"
        + (f"variant {part['variant']}, " if "variant" in part else "")
        + (" ".join(f"{option}={value}" for option, value in part["overrides"].items()) or "no options")
        for name, part in parts.items()
        if "overrides" in part
    )
    print(f"{args.out}: {told}; {count / 1e6:.2f} M parameters from {len(state)} tensors")
    for note in found.notes:
        print(note)
    more = f" and {len(found.dropped) - _SHOWN} more, see model.json" if len(found.dropped) > _SHOWN else ""
    print(f"dropped: {', '.join(found.dropped[:_SHOWN]) or 'nothing'}{more}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.tools.import_torch",
        description=__doc__,
        epilog="\n".join(f"{family.name}: {family.about}." for family in FAMILIES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="family", required=True, choices=FAMILIES, help="whose weights")
    parser.add_argument("--file", required=True, help=".safetensors, TorchScript, or torch.save's file")
    parser.add_argument("--out", required=True, help="new checkpoint folder, or bucket URL")
    parser.add_argument("--res", type=int, help="image size in pixels to adapt to")
    parser.add_argument("--window", type=int, help="Swin: attention window to adapt to; default with --res: res / 32")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a model option the file does not show"
    )
    return exit_code(lambda: run(parser.parse_args(with_home(argv))))


if __name__ == "__main__":
    enter(main)
