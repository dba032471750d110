"""What --help says about a configuration: its docstring, and every option with its value and its comment.

The comments are those of the source: behind or above the line that gives an option its first value, in the file of the
configuration or in what it builds upon.
"""

import ast
import importlib.util
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

HEADING = "Options, with their values here:"
OPTION_WIDTH = 44  # of an option, before its comment
LINE_WIDTH = 118
MOST_UNSET = 3  # options of a group that are listed one by one though they are None
CONTINUED = re.compile(r" {9}(?=--)")  # a line of a docstring that a backslash joined to the next one


def help_text(path: str, config: ConfigDict) -> str:
    """The docstring of a configuration's file, then a line for each option of `config`, which is of that file."""
    said = ast.get_docstring(ast.parse(Path(path).read_text("utf-8"))) or path
    comments = option_comments(path)
    options = [line for name, value, note in _options(config) for line in _rows(name, value, comments, note)]
    return "\n".join([CONTINUED.sub(r" \\\n        ", said), "", HEADING, "", *options])


def _options(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, value, note) of every option; those of a group that are not set, where they are many, are one."""
    unset = [name for name in config if config[name] is None]
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            yield from _options(value, f"{prefix}{name}.")
        elif len(unset) <= MOST_UNSET or name not in unset:
            yield prefix + name, f"'{value}'" if isinstance(value, str) else repr(value), ""
    if len(unset) > MOST_UNSET:
        yield f"{prefix}NAME", "None", f"NAME: {', '.join(unset)}"


def _rows(name: str, value: str, comments: Mapping[str, str], note: str) -> list[str]:
    """An option, and its comment beside it or, where it is long, below."""
    option = f"--config.{name}={value}"
    rows = textwrap.wrap(
        comments.get(name, note), LINE_WIDTH - OPTION_WIDTH, break_long_words=False, break_on_hyphens=False
    )
    first = f"{option:<{OPTION_WIDTH}}{rows.pop(0)}" if rows and len(option) < OPTION_WIDTH else option
    return [first, *(" " * OPTION_WIDTH + row for row in rows)]


def option_comments(path: str) -> Mapping[str, str]:
    """{dotted name: comment} of the options that the function get_config of a file makes."""
    file = _File(path)
    found: dict[str, str] = {}
    if "get_config" in file.functions:
        file.read_function("get_config", found)
    for name in file.functions:  # what its helpers change, where nothing was said before
        file.read_function(name, found)
    return found


class _File:
    """A Python file with its comments by line."""

    def __init__(self, path: str):
        text = Path(path).read_text("utf-8")
        self.functions: dict[str, ast.FunctionDef] = {}
        self._imported: dict[str, tuple[str, str]] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self._imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        self._behind: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                where = self._behind if token.line[: token.start[1]].strip() else self._alone
                where[token.start[0]] = token.string.lstrip("# ").rstrip()

    def read_function(self, name: str, found: dict[str, str], prefix: str = "") -> None:
        """Adds the comments of the options that a function sets, in its order; what is there already stays."""
        if name in self.functions:
            built = []  # last: what is built upon says less than what is done with it
            for node in ast.walk(self.functions[name]):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                            if option := _dotted(part):
                                self._add(prefix + option, node.lineno, node, node.value, found)
                            elif isinstance(part, ast.Name):
                                built.append(node.value)
                elif isinstance(node, ast.Return) and node.value is not None:
                    built.append(node.value)
            for value in built:
                self._read_value(value, found, prefix)
        elif name in self._imported:
            module, original = self._imported[name]
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin and spec.origin.endswith(".py"):
                _File(spec.origin).read_function(original, found, prefix)

    def _read_value(self, value: ast.expr, found: dict[str, str], prefix: str) -> None:
        """Adds the comments inside a dict, or of the function that makes it."""
        if isinstance(value, ast.Dict):
            for key, inner in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant):
                    self._add(f"{prefix}{key.value}", key.lineno, inner, inner, found)
        elif isinstance(value, ast.BinOp):
            self._read_value(value.left, found, prefix)
            self._read_value(value.right, found, prefix)
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            if value.func.id == ConfigDict.__name__:
                for argument in value.args:
                    self._read_value(argument, found, prefix)
            else:
                self.read_function(value.func.id, found, prefix)

    def _add(self, option: str, first: int, node: Any, value: ast.expr, found: dict[str, str]) -> None:
        """The comment of the lines `first` to the end of `node`, or above them; then those inside of `value`."""
        last = first if isinstance(value, ast.Dict) else node.end_lineno
        behind = [self._behind[line] for line in range(first, last + 1) if line in self._behind]
        above, line = [], first - 1
        while line in self._alone:
            above.insert(0, self._alone[line])
            line -= 1
        if text := " ".join(above + behind):
            found.setdefault(option, text)
        self._read_value(value, found, f"{option}.")


def _dotted(node: ast.expr) -> str:
    """'a.b' of `config.a.b`; '' for what is not an attribute of a variable."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join(names) if isinstance(node, ast.Name) else ""
