"""What a problem of the kernel benchmark is: op, shape, dtype, options, and its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from reattend.kernels.configs import DECODE_QUERIES

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CHUNK = 64  # tokens of a chunk, in the arithmetic of linear attention


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: what it stands for.
        op: name of the op, without its namespace.
        b: batch.
        h: query heads.
        g: KV heads (1 for latent).
        n: new tokens.
        m: cached tokens, the new ones included; the capacity is the same.
        d: head width, or latent rank, or features of linear attention (values are as wide).
        rope: rotary width (latent only).
        dtype: of queries and cache.
        page: rows of a page of the cache; 0: it is not paged.
        pattern: of sparse attention, see `patterns.py`.
        share: of KV groups that a query uses (routed).
        decay: of linear attention: none, ``head`` or ``feature``.
        backward: whether the gradient is timed too.
        goals: what of the issue it is measured for, see `goals.py`.
    """

    name: str
    op: str
    b: int
    h: int
    g: int
    n: int
    m: int
    d: int
    rope: int = 0
    dtype: str = "bfloat16"
    page: int = 0
    pattern: str = ""
    share: float = 1.0
    decay: str = ""
    backward: bool = False
    goals: tuple[str, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether a decode kernel runs it."""
        return self.n <= DECODE_QUERIES

    @property
    def size(self) -> int:
        """Bytes per number."""
        return BYTES[self.dtype]

    @property
    def kernel(self) -> str:
        """Op, phase and width class, as the sweep's grid lists them."""
        op = self.op.partition("_")[0]
        classes = (128, 256, 512) if op == "latent" else (64, 128, 256)
        width = min(w for w in classes if w >= self.d)
        return f"{op} {'decode' if self.decodes else 'prefill'} {width}"

    @property
    def used(self) -> int:
        """KV groups that a query uses."""
        return round(self.share * self.g)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of a head without a pattern (causal)."""
        return self.n * self.m - self.n * (self.n - 1) // 2

    @property
    def flops(self) -> int:
        """Arithmetic without a pattern: 2 per multiply-add; of softmax, scores and average.

        Of linear attention: making and reading the state, and the pairs inside of a chunk.
        """
        if self.op == "linear_attention":
            per_token = 2 * self.d * self.d + min(CHUNK, self.n) * self.d
            return 2 * self.b * self.h * self.n * per_token
        per_pair = 2 * (2 * self.d + self.rope)
        return self.b * self.h * self.used // self.g * self.pairs * per_pair

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache that are read without a pattern.

        Of linear attention: of the state (fp32), read and written.
        """
        if self.op == "linear_attention":
            return 2 * 4 * self.b * self.g * self.d * self.d
        latent = self.op == "latent_attention"
        groups = self.used if self.decodes else self.g
        row = self.d + self.rope if latent else 2 * groups * self.d
        return self.size * self.b * self.m * row


def new_bytes(case: Case) -> int:
    """Bytes of queries and output, and of new keys, values and decays of linear attention."""
    numbers = case.b * case.h * case.n * (2 * case.d + case.rope)
    if case.op == "linear_attention":
        numbers += case.b * case.g * case.n * 2 * case.d
        each = {"": 0, "head": 1, "feature": case.d}[case.decay]
        return case.size * numbers + 4 * case.b * case.g * case.n * each
    return case.size * numbers


def bytes_of(case: Case) -> int:
    """Bytes of every input read once and of the output written once, without a pattern."""
    return case.cache_bytes + new_bytes(case)
