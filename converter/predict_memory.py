"""Peak memory of every stage, from shapes and one probe: what the tensors alive at once add up to.

Counted: weights, working copies, moments, gradients, activations that autograd keeps, logits and
what the losses hold beside them, and constants for the libraries a stage loads (measured, below).
Not counted: memory that was freed and that the C library keeps for later inside one stage. glibc
keeps freed blocks of up to 32 MiB, so a run shows more than this while it trains;
`MALLOC_MMAP_THRESHOLD_=262144` in the environment shows what is counted (tests/test_predict.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from reattend.at_once import (
    LOGITS_BYTES,
    rows_within,
    tokens_at_once,
    vocabulary_of,
    without_logits,
)
from reattend.calibrate.relations import CHUNK
from reattend.divergence import ROWS
from reattend.materials import HELD_ROWS, HELD_SHARE
from reattend.plan import Plan
from reattend.predict_site import measuring_bytes, new_bytes, solving_bytes
from reattend.predict_statistics import (
    gram_width,
    moments_bytes,
    peer_bytes,
    sharing_bytes,
    spreading_bytes,
    training,
)
from reattend.preflight import Choice

MIB = 1 << 20
#: Measured on Linux with torch 2.13, transformers 5.23: loading; what stays of capture, and per
#: layer; first products; first gradients; first cached decoding; the report's page with its plots.
OPENING, CAPTURED, CAPTURED_LAYER = 17 * MIB, 12 * MIB, 5 * MIB
RUNNING, TRAINING, VERIFYING, PLOTTING = 12 * MIB, 4 * MIB, 18 * MIB, 52 * MIB
#: oneDNN keeps a kernel for every shape of a 16-bit product, and every decoded token has a new one.
KERNELS_OF_SHAPES = 20 * MIB
#: What the exporter, its graph and ONNX Runtime hold beside weights; measured as above.
EXPORTING = 117 * MIB
#: A tokenizer's memory per byte of the text it is given; measured. Half of it stays fragmented.
TOKENISING = 165
#: Rows and tokens of what the model samples for itself when no data is given.
OWN_ROWS, OWN_LENGTH, OWN_BATCH = 64, 256, 16


@dataclass(frozen=True)
class Sizes:
    """Numbers of one model and plan. Bytes unless they say otherwise."""

    weights: int
    element: int
    parameters: int
    vocabulary: int
    spared: bool  # whether the model can leave out all logits but the last token's
    widest: int  # output features of the widest layer below the head
    hidden: int
    layers: int
    heads: int
    saved: float  # numbers kept per token for a backward pass
    beside: int  # parameters that train with blocks and are other modules'

    def logits(self, tokens: int) -> int:
        """Of the model as it is stored."""
        return tokens * self.vocabulary * self.element

    def activations(self, tokens: int) -> int:
        """Of one layer without a backward pass."""
        return 3 * tokens * self.widest * self.element


def sizes_of(model: nn.Module, choices: list[Choice], saved: float) -> Sizes:
    """Read off the model; `saved` from `reattend.probe`."""
    parameters = list(model.parameters())
    vocabulary = vocabulary_of(model)
    outputs = [m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Linear)]
    beside = [model.get_submodule(path) for path in projections(choices)]
    return Sizes(
        weights=sum(p.numel() * p.element_size() for p in parameters),
        element=parameters[0].element_size(),
        parameters=sum(p.numel() for p in parameters),
        vocabulary=vocabulary,
        spared=bool(without_logits(model)),
        widest=max((n for n in outputs if n != vocabulary), default=0),
        hidden=max((c.config.hidden_size for c in choices), default=0),
        layers=len(choices),
        heads=max((c.config.core.heads for c in choices), default=0),
        saved=saved,
        beside=sum(p.numel() for m in beside for p in m.parameters()),
    )


def projections(choices: list[Choice]) -> list[str]:
    """Paths of what trains with converted blocks and is not theirs."""
    bindings = [c.site.binding for c in choices if c.action == "converted"]
    return [b.projection for b in bindings if b is not None and b.projection]


def row_length(plan: Plan, rows: int | None) -> int:
    """Tokens of a row of data; `rows` is None where the model samples its own."""
    return OWN_LENGTH if rows is None else plan.calibrate.seq_len


def held_rows(plan: Plan, rows: int | None) -> int:
    """Rows that are measured on: of the plan's own text, or held back."""
    if plan.verify.data is not None:
        return plan.verify.rows
    return 0 if rows is None else min(HELD_ROWS, rows // HELD_SHARE)


def memory(
    sizes: Sizes,
    converted: list[Choice],
    plan: Plan,
    rows: int | None,
    text: int,
    generates: bool,
    owned: bool,
) -> dict[str, int]:
    """Peak growth of every stage over the bare process, bytes.

    Args:
        sizes: of the original.
        converted: the sites that change.
        plan: decides data and stages.
        rows: rows of data; None: sampled from the model.
        text: bytes of text tokenised at a time.
        generates: the model is from transformers, so decoding is checked.
        owned: reattend loads the model; otherwise saving ends the sharing of weights with it.
    """
    calibrate, element = plan.calibrate, sizes.element
    width = max((gram_width(c) for c in converted), default=0)
    new = sum(new_bytes(c, element) for c in converted)
    block = max((c.before.parameters for c in converted), default=0)
    batch = calibrate.batch_size * row_length(plan, rows)
    base = sizes.weights + OPENING
    found: dict[str, float] = {}
    found["open"] = base
    base += CAPTURED + CAPTURED_LAYER * sizes.layers
    found["find"] = base + 6 * MIB + 22 * block
    cache = sum(c.before.cache for c in converted) * element
    own = OWN_BATCH * (OWN_LENGTH * cache + sizes.vocabulary * element)
    found["data"] = base + TOKENISING * text + (2 * own if rows is None and width else 0)
    base += RUNNING + TOKENISING * text // 2
    moments = sum(moments_bytes(c) for c in converted)
    scored = calibrate.batch_size if sizes.spared else batch
    running = sizes.logits(scored) + sizes.activations(batch)
    length = batch // calibrate.batch_size
    tokens = measuring_bytes(width, batch)
    tokens += spreading_bytes(converted, length)
    found["statistics"] = base + (running + moments + tokens if width else 0)
    sharing = sharing_bytes(sizes.vocabulary, converted, length, sizes.spared)
    if sharing:
        learns = any(c.conversion and c.conversion.learns(c.options) for c in converted)
        kept = max(4, element) * ROWS * length * sizes.saved if learns else 0
        found["choose"] = base + moments + solving_bytes(width) + sharing + kept
    # moments go as new weights come
    taught = max((training(c, length)[1] for c in converted), default=0.0)
    found["rewrite"] = base + max(moments, new) + solving_bytes(width) + taught
    base += new
    if calibrate.trains:
        trained = _training(sizes, converted, batch, plan)
        found |= {name: base + TRAINING + grown for name, grown in trained.items()}
        base += TRAINING
    longest = max(calibrate.seq_len, plan.verify.recall_tokens or 0)
    measuring = _verifying(sizes, held_rows(plan, rows), longest, generates)
    if plan.verify.peers and rows is not None:
        peers = new + sum(peer_bytes(c) for c in converted)
        measuring = peers + max(measuring, running + tokens, solving_bytes(width))
    base += KERNELS_OF_SHAPES if element == 2 else 0
    found["verify"] = base + VERIFYING + measuring
    copied = 0 if owned else sizes.weights
    found["publish"] = base + PLOTTING + copied
    return {name: int(value) for name, value in found.items()}


def exporting(model: nn.Module, dtype: Literal["float32", "float16"] = "float32") -> int:
    """Peak growth of `export` to ONNX over the process before it loaded the model, bytes.

    The model, a copy where the dtype differs, the graph, and the runtime's own copy of the
    weights while it is compared with torch.
    """
    parameters = list(model.parameters())
    held = sum(p.numel() * p.element_size() for p in parameters)
    target = (4 if dtype == "float32" else 2) * sum(p.numel() for p in parameters)
    copied = 0 if held == target else target
    return held + copied + target + EXPORTING


def _training(sizes: Sizes, converted: list[Choice], batch: int, plan: Plan) -> dict[str, float]:
    """Growth while a stage trains.

    Masters, gradients and two moments of what is trained, and two temporaries of AdamW's step;
    a float32 copy of a half-precision model; and, end to end, what autograd keeps, the logits of
    both models and their gradient, and one row of them five times inside the divergence.
    With LoRA this is an upper limit: the masters have neither gradients nor moments then.
    """
    wide = 4 * sizes.parameters if sizes.element < 4 else 0
    size = max(4, sizes.element)
    trained = size * (sum(c.after.parameters for c in converted) + sizes.beside)
    block = max(c.before.cache + 4 * c.config.hidden_size for c in converted)
    alone = batch * size * (3 * sizes.widest + 2 * block)
    if plan.calibrate.relations:  # queries, keys and values of both sides, with gradients
        alone += size * (6 * batch * block + 4 * CHUNK * plan.calibrate.seq_len)
    logits = size * batch * sizes.vocabulary
    row = size * plan.calibrate.seq_len * sizes.vocabulary
    kept = size * batch * (sizes.saved + sizes.layers * sizes.hidden)
    losses = max(3 * logits + 5 * row, 4 * logits)
    amounts = {
        "layerwise": max(6.0 * trained, 4 * trained + alone),
        "end-to-end": max(6.0 * trained, 4 * trained + kept + losses),
    }
    return {name: wide + amounts[name] for name in plan.calibrate.stages}


def _verifying(sizes: Sizes, held: int, seq_len: int, generates: bool) -> float:
    """Logits of a batch, or of both models for a stretch of it, and copies of some of them."""
    rows = rows_within(sizes.logits(seq_len), min(8, held) if held else 4)
    logits = sizes.logits(rows * seq_len)
    copied = min(seq_len, tokens_at_once(sizes.vocabulary)) if held else seq_len
    row = 4 * copied * sizes.vocabulary
    stretch = min(logits, LOGITS_BYTES) if sizes.spared else logits
    alive = max(logits + 2 * row, 2 * stretch + 3 * row) if held else logits + row
    wide = 4 * 8 * min(3 * 8, tokens_at_once(sizes.vocabulary)) * sizes.vocabulary  # float64
    decode = max(wide, sizes.logits(3 * 53)) if generates else 0
    scores = 8 * rows * sizes.heads * seq_len**2  # where torch's own kernel does not fit
    return max(alive, decode) + scores + sizes.activations(rows * seq_len)
