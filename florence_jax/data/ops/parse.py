"""Op strings, such as 'decode|rrc(224, scale=(0.5, 1))|flip|caption|label|tokenize', as ops."""

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from florence_jax.data.ops import (
    affine,
    answers,
    boxes,
    captions,
    crops,
    image,
    labels,
    language,
    questions,
    rand_augment,
    resizes,
    video,
)
from florence_jax.data.ops.geometry import link_warps
from florence_jax.data.ops.registry import OPS, Op
from florence_jax.errors import UserError

# Importing a module registers its ops.
MODULES = (affine, answers, boxes, captions, crops, image, labels, language, questions, rand_augment, resizes, video)


def parse_ops(spec: str, context: Mapping[str, Any]) -> list[Op]:
    """Parses 'a|b(1, x=(2, 3))|c' into ops.

    Args:
      spec: ops joined by '|', with literal arguments; bare words in arguments are strings. '' is no op at all.
      context: what ops need beside their arguments: "tokenizer" (data.tokenizers.Tokenizer),
        "templates" (sequence of str, may be empty), "classes" (data.classes.ClassIndex), "class_sets" (bool
        (S, K), see data.box_classes), "answers" (data.answers.AnswerVocabulary).

    Raises:
      UserError: for a syntax error, an unknown op, a wrong argument, or something that `context` lacks.
    """
    if not spec.strip():
        return []
    try:
        node = ast.parse(spec.strip(), mode="eval").body
    except SyntaxError as error:
        raise UserError(f"ops {spec!r}: cannot parse; write them as 'decode|rrc(224)|flip'") from error
    calls = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        calls.append(node.right)
        node = node.left
    calls.append(node)
    ops = [_make_op(call, spec, context) for call in reversed(calls)]
    image.link_pictures(ops)
    try:
        link_warps(ops)
        language.link_captions(ops)
    except UserError as error:
        raise UserError(f"ops {spec!r}: {error}") from error
    return ops


def _make_op(node: ast.expr, spec: str, context: Mapping[str, Any]) -> Op:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise UserError(f"ops {spec!r}: {ast.unparse(node)!r} is not an op; write them as 'decode|rrc(224)|flip'")
    name = call.func.id
    if name not in OPS:
        raise UserError(f"ops {spec!r}: unknown op {name!r}; known: {', '.join(sorted(OPS))}")
    parameters = inspect.signature(OPS[name]).parameters
    try:
        args = [_literal(arg) for arg in call.args]
        kwargs = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        if "context" in parameters:
            kwargs["context"] = context
        return OPS[name](*args, **kwargs)
    except (TypeError, ValueError) as error:  # UserError is a ValueError
        usage = ", ".join(str(p) for p in parameters.values() if p.name != "context")
        raise UserError(f"op {ast.unparse(node)!r}: {error}; usage: {name}({usage})") from error


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UserError(f"{ast.unparse(node)!r} is neither a number, a tuple nor a name") from error
