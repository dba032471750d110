"""Learning rates that fall towards the input (layer-wise decay, as in ELECTRA and BEiT), as rules by path."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from florence_jax.errors import UserError

Rule = tuple[str, float | tuple[float, ...]]


def layer_decay_rules(params: Mapping[str, Any], decay: float) -> tuple[Rule, ...]:
    """Rules for `optim.lr_rules`: decay^d for a layer that is d layers from the top of its tower.

    Each block of a tower is a layer; what comes before the blocks is one more, below them. The embeddings of later
    CoSwin stages belong to the block that follows. The last norm, the projections, a new head and the logit scale keep
    the whole learning rate. Blocks stacked by the scan get one factor each: the value is then a tuple along axis 0.

    Args:
      params: the parameters, or their shapes.
      decay: in (0, 1].

    Raises:
      UserError: for another decay.
    """
    if not 0 < decay <= 1:
        raise UserError(f"optim.layer_decay={decay}: must be above 0 and at most 1 (1: the same rate for all layers)")
    rules: list[Rule] = []
    for tower in ("image", "text", "video"):
        if tower not in params:
            continue
        parts = list(_parts(params[tower]))
        top = max(depth if isinstance(depth, int) else max(depth) for _, depth in parts) + 1
        for name, depth in parts:
            depths = (depth,) if isinstance(depth, int) else depth
            factors = tuple(decay ** (top - d) for d in depths)
            rules.append((f"{tower}/{re.escape(name)}/.*", factors[0] if isinstance(depth, int) else factors))
        bottom = [name for name in params[tower] if name.endswith(("_embedding", "patch_embed", "norm_pre"))]
        rules += [(f"{tower}/{re.escape(name)}(/.*)?", decay**top) for name in bottom]
    return (*rules, (".*", 1.0))


def _parts(tower: Mapping[str, Any]) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """(name below the tower, depth, from 1, of its block or of each of its stacked blocks), 0 for the first stem."""
    depth = 1
    for stage in range(1 + max((int(name[5]) for name in tower if name.startswith("stage")), default=-1)):
        yield f"stage{stage}_embed", depth if stage else 0
        if (stacked := f"stage{stage}_pairs") in tower:
            count = jax.tree.leaves(tower[stacked])[0].shape[0]
            yield f"{stacked}/plain", tuple(range(depth, depth + 2 * count, 2))
            yield f"{stacked}/shifted", tuple(range(depth + 1, depth + 2 * count, 2))
            depth += 2 * count
        for pair in range(sum(name.startswith(f"stage{stage}_pair") and name != stacked for name in tower)):
            yield f"stage{stage}_pair{pair}/plain", depth
            yield f"stage{stage}_pair{pair}/shifted", depth + 1
            depth += 2
    if "layers" in tower:
        count = jax.tree.leaves(tower["layers"])[0].shape[0]
        yield "layers", tuple(range(depth, depth + count))
    for layer in range(sum(re.fullmatch(r"layer\d+", name) is not None for name in tower)):
        yield f"layer{layer}", depth + layer
