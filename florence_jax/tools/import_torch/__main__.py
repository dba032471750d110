"""Converts public PyTorch weights into a checkpoint folder of this project.

    python -m florence_jax.tools.import_torch --from=swin --file=swin_tiny_patch4_window7_224.pth --out=DIR
    python -m florence_jax.tools.import_torch --from=unicl --file=yfcc14m.pth --out=DIR --res=384
    python -m florence_jax.tools.import_torch --from=clip --file=ViT-B-32.pt --out=DIR
    python -m florence_jax.tools.import_torch --from=openclip --file=open_clip_model.safetensors --out=DIR

swin: Swin classifiers in Microsoft's or timm's naming (only the image tower: there is no text). unicl: UniCL, KLITE.
clip: OpenAI's CLIP with a ViT, its TorchScript files or a state dict. openclip: OpenCLIP's ViT models; an
`open_clip_config.json` beside the file is read for what weights do not show (activation, heads, normalisation). Both
also take the naming of Hugging Face's transformers (CLIPModel).

Sizes are read from the tensors' shapes. `--res` adapts the weights to other images: bias tables (also with `--window`;
default res / 32) and position embeddings are interpolated. The folder goes to `--config.init`; its model.json names the
variant and the options that rebuild the model.
"""

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.coswin import embedded_size
from florence_jax.models.florence import build
from florence_jax.models.resize import resize_bias_tables, resize_position_embedding
from florence_jax.models.sizes import VARIANTS, ModelConfig, resolve_config
from florence_jax.models.vit import check_patches
from florence_jax.models.windows import stage_window
from florence_jax.params.rules import path_string
from florence_jax.params.weights import make_description, save_pretrained
from florence_jax.tools.import_torch.files import read_state_dict
from florence_jax.tools.import_torch.names import (
    DROPPED,
    FAMILIES,
    canonical_names,
    from_transformers,
    source_name,
    to_our_layout,
    torch_shape,
)

# Width of an attention head by the width of the tower, where OpenCLIP's is not 64: its ViT-H, ViT-g and ViT-bigG.
VIT_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}
BASE_VARIANT = {"swin": "Swin-T", "unicl": "Swin-T", "clip": "ViT-B-32", "openclip": "ViT-B-32"}


def convert(
    state: Mapping[str, np.ndarray],
    family: str,
    *,
    options: Mapping[str, Any] | None = None,
    res: int | None = None,
    window: int | None = None,
) -> tuple[ModelConfig, dict[str, Any], list[str]]:
    """Our parameters from a PyTorch state dict.

    Args:
      state: tensors by name, in PyTorch's layouts.
      family: one of `FAMILIES`.
      options: fields of `ModelConfig` that override what the shapes say, such as `text_heads`.
      res, window: adapt to this image size (pixels) and attention window (tokens); default as in the file.

    Returns:
      The configuration, the parameters (float32 numpy arrays; with 'swin' only {"image"}) in the layout that its model
      has, and the names of the tensors that were dropped.

    Raises:
      UserError: one message that lists every missing, unknown, ambiguous and mis-shaped tensor.
    """
    state = from_transformers(state) if family in ("clip", "openclip") else state
    if np.size(state.get("logit_scale", ())) == 1:  # OpenCLIP has an option that makes it (1,)
        state = {**state, "logit_scale": np.reshape(state["logit_scale"], ())}
    names = canonical_names(state, family)
    shapes = {name: np.shape(state[found[0]]) for name, found in names.items()}
    dropped = [name for name in names if DROPPED.fullmatch(name)]
    sizes = {**_sizes(shapes, family), **(options or {})}
    config = _nearest_variant(resolve_config(BASE_VARIANT[family], **sizes))
    targets = _targets(config, family)
    tower = "vit" if config.image_tower == "vit" else "swin"
    sources = {source_name(path, tower): path for path in targets}
    if len(sources) != len(targets):
        raise AssertionError("two parameters have one source name")  # a mistake in the name tables, not the user's
    _check(names, shapes, {name: torch_shape(path, targets[path]) for name, path in sources.items()}, dropped, family)
    params: dict[str, Any] = {}
    for name, path in sources.items():
        *parents, leaf = path.split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = to_our_layout(path, np.asarray(state[names[name][0]], np.float32))
    config, params = _resize(config, params, res, window)
    return config, _stack(params), sorted(original for name in dropped for original in names[name])


def _targets(config: ModelConfig, family: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the unrolled model's parameters by path."""
    model = build(config.variant, **_differences(config, config.variant), scan=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if family == "swin":
        shapes = {"image": shapes["image"]}
    return {path_string(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}


def _check(
    names: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    dropped: Sequence[str],
    family: str,
) -> None:
    """Raises one `UserError` with all differences between a file and the model that its shapes describe."""
    lines = [f"{name}: missing, should be {wanted[name]}" for name in sorted(wanted.keys() - names.keys())]
    unknown = names.keys() - wanted.keys() - set(dropped)
    lines += [f"{name}: unknown, {shapes[name]}" for name in sorted(unknown)]
    lines += [f"{name}: {' and '.join(found)} both name it" for name, found in names.items() if len(found) > 1]
    lines += [
        f"{name}: {shapes[name]}, should be {wanted[name]}"
        for name in sorted(wanted.keys() & names.keys())
        if shapes[name] != wanted[name]
    ]
    if lines:
        raise UserError(
            f"the file does not fit --from={family}; {len(lines)} mismatches: {'; '.join(lines)}. Check --from and "
            "that the file is complete; sizes that shapes do not show can be given with --set NAME=VALUE"
        )


# -- sizes ---------------------------------------------------------------------------------------------------------


class _Shapes:
    """Reads sizes off the shapes; by majority, so that one damaged tensor is reported instead of believed."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], family: str):
        self._shapes, self.family = shapes, family

    def vote(self, pattern: str, value: Callable[[tuple[int, ...]], Any], rank: int) -> Any:
        """The most frequent `value(shape)` among the tensors of `rank` axes whose name matches."""
        found = [s for name, s in self._shapes.items() if re.fullmatch(pattern, name) and len(s) == rank and min(s)]
        if not found:
            first = ", ".join(list(self._shapes)[:3]) or "nothing"
            raise UserError(
                f"not a checkpoint of --from={self.family}: no tensor is named like {pattern} (it holds {first}, ...)"
            )
        return Counter(value(shape) for shape in found).most_common(1)[0][0]

    def count(self, pattern: str) -> int:
        """1 + the largest integer that group 1 of `pattern` matches; 0 if nothing matches."""
        return 1 + max((int(m[1]) for name in self._shapes if (m := re.fullmatch(pattern, name))), default=-1)


def _sizes(shapes: Mapping[str, tuple[int, ...]], family: str) -> dict[str, Any]:
    """Fields of `ModelConfig` that the shapes show."""
    found = _Shapes(shapes, family)
    sizes = _swin_sizes(found) if family in ("swin", "unicl") else _vit_sizes(found)
    if family == "swin":
        return sizes
    width, projection = found.vote(r"text_projection", tuple, 2)
    length = found.vote(r"text\.positional_embedding", lambda s: s[0], 2)
    return sizes | dict(
        text_width=width,
        projection=projection,
        text_length=length,
        text_layers=found.count(r"text\.resblocks\.(\d+)\..*"),
        text_heads=max(width // 64, 1),
        vocab_size=found.vote(r"text\.token_embedding\.weight", lambda s: s[0], 2),
        text_activation="gelu" if family == "openclip" else "quick_gelu",
    )


def _swin_sizes(found: _Shapes) -> dict[str, Any]:
    stages = found.count(r"image\.layers\.(\d+)\.blocks\..*")
    table = r"image\.layers\.{}\.blocks\.\d+\.attn\.relative_position_bias_table"
    fc1 = r"image\.layers\.\d+\.blocks\.\d+\.mlp\.fc1\.weight"
    window = found.vote(table.format(r"\d+"), lambda s: (round(s[0] ** 0.5) + 1) // 2, 2)
    return dict(
        image_width=found.vote(r"image\.layers\.0\.blocks\.\d+\.norm\d\.weight", lambda s: s[0], 1),
        depths=tuple(found.count(rf"image\.layers\.{i}\.blocks\.(\d+)\..*") for i in range(stages)),
        heads=tuple(found.vote(table.format(i), lambda s: s[1], 2) for i in range(stages)),
        mlp_ratio=found.vote(fc1, lambda s: s[0] / s[1], 2),
        window=window,
        res=4 * 2 ** (stages - 1) * window,  # the last map is one window, as in all published models
    )


def _vit_sizes(found: _Shapes) -> dict[str, Any]:
    width, patch = found.vote(r"image\.conv1\.weight", lambda s: (s[0], s[3]), 4)
    positions = found.vote(r"image\.positional_embedding", lambda s: s[0], 2)
    return dict(
        image_width=width,
        patch_size=patch,
        depths=(found.count(r"image\.resblocks\.(\d+)\..*"),),
        heads=(max(width // VIT_HEAD_WIDTH.get(width, 64), 1),),
        mlp_ratio=found.vote(r"image\.resblocks\.\d+\.mlp\.c_fc\.weight", lambda s: s[0] / s[1], 2),
        res=round(max(positions - 1, 1) ** 0.5) * patch,
        image_activation="gelu" if found.family == "openclip" else "quick_gelu",
    )


def _differences(config: ModelConfig, variant: str) -> dict[str, Any]:
    """The options that make `config` of the row `variant`."""
    row = resolve_config(variant)
    found = {name: value for name, value in config.items() if name != "variant" and value != row[name]}
    # What the row leaves open follows another field, and would not stay as it is beside a new value of that field.
    for name, followed in (("heads", "image_width"), ("window", "res")):
        if followed in found and name not in VARIANTS[variant]:
            found[name] = config[name]
    return found


def _nearest_variant(config: ModelConfig) -> ModelConfig:
    """The same sizes, written as the row of `VARIANTS` that needs the fewest options."""
    variant = min(VARIANTS, key=lambda name: len(_differences(config, name)))
    return resolve_config(variant, **_differences(config, variant))


# -- layout and resolution -----------------------------------------------------------------------------------------


def _resize(
    config: ModelConfig, params: dict[str, Any], res: int | None, window: int | None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Interpolates bias tables or position embeddings for another image size or window."""
    if config.image_tower == "vit":
        if window is not None:
            raise UserError("--window is for Swin; a ViT attends to the whole image")
        if res is None or res == config.res:
            return config, params
        check_patches(res, config.patch_size)
        table = resize_position_embedding(params["image"]["position_embedding"], res // config.patch_size)
        params = params | {"image": params["image"] | {"position_embedding": table}}
        return _replaced(config, res=res), params
    if res is None and window is None:
        return config, params
    res = config.res if res is None else res
    window = max(res // 32, 1) if window is None else window
    target = _replaced(config, res=res, window=window)
    side, windows = res, []
    for stage in range(len(target.depths)):
        side = embedded_size(side, stage, target.embedding)
        windows.append(stage_window(side, side, window, target.size_mode)[0])
    return target, params if set(windows) == {config.window} else resize_bias_tables(params, windows)


def _replaced(config: ModelConfig, **changes: Any) -> ModelConfig:
    return _nearest_variant(resolve_config(config.variant, **{**_differences(config, config.variant), **changes}))


def _stack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Unrolled blocks to the layout of the scan: `stage{i}_pair{j}` to `stage{i}_pairs`, `layer{j}` to `layers`."""
    out = dict(params)
    for tower in ("image", "text"):
        if tower not in out:
            continue
        blocks = dict(out[tower])
        groups: dict[str, list[str]] = {}
        for name in blocks:
            if (stem := name.rstrip("0123456789")).endswith(("_pair", "layer")):
                groups.setdefault(stem, []).append(name)
        for stem, members in groups.items():
            if len(members) > (2 if stem == "layer" else 1):
                members.sort(key=lambda name, stem=stem: int(name.removeprefix(stem)))
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[blocks.pop(name) for name in members])
                blocks[f"{stem}s"] = stacked
        out[tower] = blocks
    return out


# -- command line --------------------------------------------------------------------------------------------------


def open_clip_options(file: Path) -> dict[str, Any]:
    """What an `open_clip_config.json` beside `file` says and shapes do not: {} if there is none.

    Raises:
      UserError: a file that is not such a configuration.
    """
    path = file.with_name("open_clip_config.json")
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        model, preprocess = content["model_cfg"], content.get("preprocess_cfg", {})
        vision, text = model["vision_cfg"], model["text_cfg"]
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        options = dict(image_activation=activation, text_activation=activation)
        if "width" in vision and "head_width" in vision:
            options["heads"] = (vision["width"] // vision["head_width"],)
        if "heads" in text:
            options["text_heads"] = text["heads"]
        for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
            if theirs in preprocess:
                options[ours] = tuple(preprocess[theirs])
        return options
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a configuration of OpenCLIP: {error!r}; correct it or move it away") from error


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
    state = read_state_dict(args.file)
    options = open_clip_options(Path(args.file)) if args.family == "openclip" else {}
    options |= parse_options(args.set)
    config, params, dropped = convert(state, args.family, options=options, res=args.res, window=args.window)
    overrides = _differences(config, config.variant)
    source = {"from": args.family, "file": Path(args.file).name, "dropped": dropped}
    towers = {"variant": config.variant, "overrides": overrides, "entries": list(params)}
    save_pretrained(args.out, params, make_description("import", {"towers": towers}, source=source))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    given = " ".join(f"{name}={value}" for name, value in overrides.items()) or "no options"
    print(f"{args.out}: variant {config.variant}, {given}; {count / 1e6:.2f} M parameters from {len(state)} tensors")
    print(f"dropped: {', '.join(dropped) or 'nothing'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.tools.import_torch",
        description=__doc__,
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
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
