"""`KeptAttention`: states of what later queries may see, if it is more than sinks and a window.

The node and its torch op against a masked reference, on states that held something else before;
sizes that are enough for any text; models whose states move to larger buffers while they decode.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_tiny import VOCABULARY, sequences, torch_logits
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from test_onnx_sparse_functions import (  # noqa: E402
    PIECES,
    RUNTIMES,
    SCALE,
    START,
    B,
    D,
    E,
    G,
    T,
    masked,
    one_node,
    rows,
)

from reattend import convert  # noqa: E402
from reattend.mixers.config import CoreConfig  # noqa: E402
from reattend.mixers.sparse_config import HeadClass, SparseConfig  # noqa: E402
from reattend.patterns.pattern import HeadPattern  # noqa: E402
from reattend.targets.onnx import Session, export_onnx  # noqa: E402
from reattend.targets.onnx.buffers import StateSpec  # noqa: E402
from reattend.targets.onnx.functions import Uses  # noqa: E402
from reattend.targets.onnx.kept_body import KEPT  # noqa: E402
from reattend.targets.onnx.layout import StateTensor  # noqa: E402
from reattend.targets.onnx.sparse_layout import sparse_form  # noqa: E402
from reattend.targets.onnx.sparse_ops import kept_attention  # noqa: E402
from reattend.targets.onnx.sparse_translate import kept_attributes  # noqa: E402

STATES = ("ring_key", "ring_value", "kept_key", "kept_value")
GIVEN = ("past_ring_key", "past_ring_value", "past_key", "past_value")
PATTERNS: dict[str, Any] = {
    "elastic": {"sinks": 2, "window": 3, "window_slope": 0.3},
    "short elastic": {"window": -3, "window_slope": 0.25},
    "stride": {"window": 4, "stride": {"period": 3, "offset": 1, "block": 4}},
    "columns": {"sinks": 1, "window": 2, "columns": (0, 7, 20)},
    "all": {
        "sinks": 1, "window": 2, "window_slope": 0.1, "columns": (5,),
        "stride": {"period": 4, "block": 2},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def several_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens are more than one region of those that read the same rows."""
    monkeypatch.setattr("reattend.targets.onnx.fragments.TILE", 8)


class Node:
    """The node in one of the runtimes, with states that were used before."""

    def __init__(self, runtime: str, pattern: HeadPattern, own: int, dtype: Any = np.float32):
        self.runtime, self.pattern = runtime, pattern
        self.rules: Any = {"scale": SCALE, "sliding_window": own, "softcap": 0.0}
        ring = max(1, pattern.window + int(pattern.window_slope * T))
        kept = int(pattern.by_key(torch.arange(T)).sum()) + 1
        random = np.random.default_rng(1)
        sizes = (ring, D), (ring, E), (kept, D), (kept, E)
        self.states = [(9 * random.standard_normal((B, G, *size))).astype(dtype) for size in sizes]
        self.run: Any = None
        self.held = [onnxruntime.OrtValue.ortvalue_from_numpy(s) for s in self.states]

    def step(self, new: list[np.ndarray], total: int) -> np.ndarray:
        values = [*new, *self.states, START, np.full(B, total)]
        names = ("q", "key", "value", *GIVEN, "kv_start", "kv_len")
        if self.runtime == "torch":
            tensors = [torch.from_numpy(x) for x in values]
            pattern = self.pattern.model_dump_json()
            y, *self.states = (
                x.numpy() for x in kept_attention(*tensors, pattern=pattern, **self.rules)
            )
            return y
        feed: Any = dict(zip(names, values, strict=True))
        if self.run is None:
            given = tuple(self.pattern.model_dump(exclude_defaults=True))
            uses = Uses(terms=given, capped=False, sliding=bool(self.rules["sliding_window"]))
            rules = self.rules | kept_attributes(self.pattern)
            made = one_node(KEPT, feed, ["y", *STATES], rules, uses)
            self.run = (
                ReferenceEvaluator(made)
                if self.runtime == "reference"
                else onnxruntime.InferenceSession(
                    made.SerializeToString(), providers=["CPUExecutionProvider"]
                )
            )
        if self.runtime == "reference":
            y, *self.states = self.run.run(None, feed)
            return y
        binding = self.run.io_binding()  # one buffer is read and written, as a Session has it
        for name in (*names[:3], *names[7:]):
            binding.bind_cpu_input(name, feed[name])
        for name, out, value in zip(GIVEN, STATES, self.held, strict=True):
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(out, value)
        binding.bind_output("y")
        self.run.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("own", [0, 9])
@pytest.mark.parametrize("name", PATTERNS)
def test_pieces_of_a_text_equal_the_mask(name: str, own: int, runtime: str) -> None:
    pattern = HeadPattern(**PATTERNS[name])
    want, real = masked(pattern, own, 0.0)
    for pieces in PIECES:
        node, at, got = Node(runtime, pattern, own), 0, []
        for n in pieces:
            new = [np.ascontiguousarray(x[:, :, at : at + n]) for x in rows()]
            at += n
            got.append(node.step(new, at))
        y = np.concatenate(got, 2)
        assert np.isfinite(y).all()
        assert np.abs(np.where(real, y - want, 0)).max() <= 1e-5, pieces


def test_in_float16() -> None:
    pattern = HeadPattern(**PATTERNS["all"])
    want, real = masked(pattern, 0, 0.0)
    node, at, got = Node("onnxruntime", pattern, 0, np.float16), 0, []
    for n in PIECES[1]:
        got.append(node.step([x[:, :, at : at + n].astype(np.float16) for x in rows()], at + n))
        at += n
    assert got[0].dtype == np.float16
    assert np.abs(np.where(real, np.concatenate(got, 2) - want, 0)).max() <= 1e-2


CORE = CoreConfig(heads=2, kv_heads=2, qk_head_dim=8, v_head_dim=8, scale=1.0)
SIZED = [
    *PATTERNS.values(), {"window": 1, "window_slope": 0.137}, {"sinks": 4, "window_slope": 0.7},
    {"window": 9, "stride": {"period": 7, "offset": 3, "block": 5}},
]  # fmt: skip


def block(seen: HeadPattern, **core: Any) -> SparseConfig:
    """A block whose heads all have one pattern."""
    return SparseConfig.model_construct(
        core=CORE.model_copy(update=core), evict=True,
        classes=(HeadClass(kv_heads=(0, 1), pattern=seen),),
    )  # fmt: skip


@pytest.mark.parametrize("given", SIZED, ids=str)
def test_states_hold_what_is_needed_and_hardly_more(given: Any) -> None:
    pattern = HeadPattern(**given)
    config = block(pattern)
    form = sparse_form("here", config, config.classes[0])
    assert form.op == KEPT
    ring = StateTensor(0, "key", 2, 8, form.rows, form.block, form.per_block, form.ring)
    extra = form.extra[0]
    kept = StateTensor(0, extra.name, 2, 8, extra.rows, extra.block, extra.per_block)
    for capacity in (*range(1, 130), 1000, 4096, 100_000):
        (_, _, ring_rows, _), (_, _, kept_rows, _) = (x.shape(1, capacity) for x in (ring, kept))
        wide = max(1, pattern.window + int(pattern.window_slope * capacity))
        many = int(pattern.by_key(torch.arange(capacity)).sum()) + 1
        assert wide <= ring_rows <= 1.01 * wide + 64
        assert many <= kept_rows <= many + extra.rows + 2 * extra.block
        for tensor, size in ((ring, ring_rows), (kept, kept_rows)):
            spec = StateSpec("", "", tuple(tensor.letters), tensor.ring)
            assert spec.sizes(1, capacity)[2] == size


def test_which_patterns_keep_every_row() -> None:
    for given, words in (
        ({"window": 3, "powers": {"block": 2}}, "not KV-monotone"),
        ({"sinks": 2, "window_slope": 0.8}, "nearly all"),
        ({"window": 3, "window_slope": 0.4, "stride": {"period": 2}}, "nearly all"),
    ):
        config = block(HeadPattern(**given))
        form = sparse_form("here", config, config.classes[0])
        assert form.op == "PatternAttention"
        assert words in form.saves
    pattern = HeadPattern(sinks=1, window=30, window_slope=0.1)
    config = block(pattern, pattern="sliding", window=20)
    form = sparse_form("here", config, config.classes[0])
    assert (form.op, form.rows, form.per_block) == (KEPT, 20, 0)


PLAN: dict[str, Any] = {
    "rules": [{
        "sites": "*", "to": "sparse", "pattern": {"sinks": 2, "window": 4, "window_slope": 0.2},
        "head_patterns": [{
            "kv_heads": [1],
            "pattern": {"window": 5, "stride": {"period": 3, "block": 2}},
        }],
    }]
}  # fmt: skip


def test_a_text_that_outgrows_its_buffers(tmp_path: Path) -> None:
    """Rings are laid out anew for their new size, kept rows stay where they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model: Any = convert(LlamaForCausalLM(config).eval(), plan=PLAN).model
    session = Session(export_onnx(model, tmp_path / "out").path, threads=1)
    length = 300
    ids, mask = sequences(2, length, padding=5)
    cuts = [0, 7, 8, 9, 40, 41, 255, 256, 257, 258, 290, *range(291, length + 1)]
    got = [session.prefill(ids[:, :7].numpy(), mask[:, :7].numpy())]
    sizes = {session.states.capacity}
    for begin, end in list(pairwise(cuts))[1:]:
        got.append(session.step(ids[:, begin:end].numpy()))
        sizes.add(session.states.capacity)
    assert sizes == {7, 256, 512}
    expected = torch_logits(model, ids, mask)
    assert np.abs(np.concatenate(got, 1) - expected)[mask.bool().numpy()].max() <= 1e-4
    whole = 2 * 2 * 2 * 512 * 8 * 4  # batch, keys and values, heads, capacity, width, bytes
    assert session.states.bytes() <= 0.4 * whole
    again = session.prefill(ids[:, :50].numpy(), mask[:, :50].numpy())  # on buffers in use
    assert np.abs(again - expected[:, :50])[mask[:, :50].bool().numpy()].max() <= 1e-4
