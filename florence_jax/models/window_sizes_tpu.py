"""How much of a map the kernel for TPUs computes at a time: what fits into the memory of a core."""

import dataclasses
import math

LANES = 128
EXAMPLES = 16  # of a step: the rows of a bfloat16 tile
MOST_SLOTS = 1280  # tokens of the windows that are computed together: more of them only take longer to compile
SPILLED = 4  # arrays of a window's logits that do not fit into registers
INTERPRETED_VMEM = 64 * 2**20  # as of v5p; where there is no chip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled for.

    Attributes:
      tokens: of a window. windows: of a map. batch: examples, a multiple of `EXAMPLES`.
      channels: C. head_width: channels of a head, a divisor of 128.
      lanes: channels of a step, a multiple of 128 that divides C.
      together: windows whose operations are interleaved, so that units do not wait for each other: a power of 2.
      runs: (length, first, end): the pieces first to end - 1 of a window have this many tokens, see `Places.pieces`.
      itemsize: bytes of an element.
      strided: windows are turned by `_turn`, else by its definition.
    """

    tokens: int
    windows: int
    batch: int
    channels: int
    head_width: int
    lanes: int
    together: int
    runs: tuple[tuple[int, int, int], ...]
    itemsize: int
    strided: bool = True

    @property
    def heads(self) -> int:
        """Heads side by side in 128 lanes."""
        return LANES // self.head_width

    @property
    def slots(self) -> int:
        """Rows of a head in stacked queries: its tokens, in whole tiles."""
        return -(-self.tokens // 16) * 16

    @property
    def queries(self) -> int:
        """Columns of the logits: (head, query)."""
        return self.heads * self.slots

    @property
    def per_word(self) -> int:
        """Tokens of an example that 32 bits hold."""
        return 4 // self.itemsize

    @property
    def rows(self) -> int:
        """Rows of 128 words that an example at work has: an odd multiple of 4, so that 8 examples are in 8 banks."""
        return (-(-self.tokens // self.per_word) + 3) // 8 * 8 + 4

    @property
    def groups(self) -> int:
        """Times 128 lanes of a step."""
        return self.lanes // LANES

    @property
    def chunks(self) -> int:
        """Steps that share a window of 16 examples."""
        return self.channels // self.lanes

    @property
    def steps(self) -> int:
        """Windows of 16 examples."""
        return self.windows * self.batch // EXAMPLES

    @property
    def at_work(self) -> tuple[int, int]:
        """Shape of the words of 16 examples' windows: example by example, of 16 bits those with even numbers first."""
        beyond = max(0, self.slots // self.per_word - self.rows)  # what is read of the last one
        return EXAMPLES * self.rows + beyond, LANES

    def vmem(self) -> int:
        """Bytes of a core's memory that the backward pass takes: two of each buffer, one of the windows at work."""
        buffers = 2 * 7 * self.lanes  # q, k, v, the output's gradient and theirs
        logits = -(-self.tokens // 8) * 8 * -(-self.queries // LANES) * LANES * 4
        tables = 2 * logits * (2 * self.groups + 1)
        spilled = SPILLED * self.together * logits
        return buffers * self.tokens * EXAMPLES * self.itemsize + 4 * 4 * math.prod(self.at_work) + tables + spilled


def choose_parts(sizes: Sizes) -> Sizes | None:
    """`sizes` with the most windows together, then the best parts of the channels, that fit; None: none does.

    The best parts leave the busiest core the least, then they are few: cores share parts, not windows.
    """
    memory, cores = core()
    whole, together = sizes.channels // LANES, min(EXAMPLES, 2 ** int(math.log2(max(1, MOST_SLOTS // sizes.slots))))
    parts = [n for n in range(1, whole + 1) if whole % n == 0]
    parts.sort(key=lambda n: (-(-n // cores) * (whole // n), n))
    while together:
        for n in parts:
            found = dataclasses.replace(sizes, lanes=sizes.channels // n, together=together)
            if found.vmem() <= memory * 7 // 8:
                return found
        together //= 2
    return None


def core() -> tuple[int, int]:
    """Bytes of memory of a core, and cores, of the chip that is compiled for."""
    from jax.experimental.pallas import tpu as pltpu  # here, because to import Pallas takes as long as half of JAX

    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # no TPU
        return INTERPRETED_VMEM, 1
    return info.vmem_capacity_bytes, info.num_cores
