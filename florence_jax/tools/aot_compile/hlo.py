"""The text of a compiled program: its computations, what calls what, and how often."""

import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_CALLED = re.compile(r"(condition|body|calls|to_apply|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_CONSTANT = re.compile(r"= s(?:32|64)\[\]\S* constant\((\d+)\)")
# A kernel's own notes, of several lines.
_NOTES = re.compile(r"kernel_metadata=\{\s*([^{}]*?)\s*\}")


class Program:
    """The computations of a module.

    Args:
      text: of the optimised module (`compiled.as_text()`).

    Attributes:
      lines: the instructions of each computation, by its name.
      entry: the name of the one that is run.
    """

    def __init__(self, text: str):
        self.lines: dict[str, list[str]] = {}
        self.entry = ""
        self._limits: dict[str, int] = {}  # the largest integer constant of a computation
        current = ""
        for line in _NOTES.sub(lambda found: f"kernel_metadata={{{found[1]}}}", text).splitlines():
            if line and not line[0].isspace():
                if match := _COMPUTATION.match(line):
                    current = match[1]
                    self.lines[current] = []
                    self.entry = current if line.startswith("ENTRY") else self.entry
            elif current and " = " in line:
                if match := _CONSTANT.search(line):
                    self._limits[current] = max(int(match[1]), self._limits.get(current, 0))
                self.lines[current].append(line)

    def called(self, line: str) -> list[tuple[str, int]]:
        """(computation, executions) of those that an instruction calls.

        The trips of a loop are as many as the compiler noted, or as its condition compares with (a scan counts up from
        0).
        """
        if "=%" not in line and "computations=" not in line:
            return []
        roles = [(match[1], match[2]) for match in _CALLED.finditer(line)]
        for match in _BRANCHES.finditer(line):
            roles += [("branch", name) for name in re.findall(r"[\w.\-]+", match[1])]
        conditions = [name for role, name in roles if role == "condition"]
        trips = 1
        if conditions:
            noted = _TRIPS.search(line)
            trips = int(noted[1]) if noted else self._limits.get(conditions[0], 1)
        return [(name, trips) for _, name in roles]
