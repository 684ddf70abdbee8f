"""The bodies of nodes that choose keys, and the torch op they stand for, in one go and in pieces.

Long texts are fed in pieces on one state, in memory that holds something else before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from test_onnx_sparse_functions import SCALE, START, B, D, E, G, H, T, one_node, rows  # noqa: E402

from reattend.mixers.config import CoreConfig, RotaryConfig  # noqa: E402
from reattend.mixers.selecting.methods import method  # noqa: E402
from reattend.patterns.pattern import HeadPattern  # noqa: E402
from reattend.targets.onnx.functions import Uses, function_proto  # noqa: E402
from reattend.targets.onnx.selected_body import KINDS  # noqa: E402
from reattend.targets.onnx.selected_layout import attributes, selected_form  # noqa: E402
from reattend.targets.onnx.selected_ops import selected_attention  # noqa: E402

#: single steps, and chunks that begin and end inside of blocks
PIECES = ([T], [1, 2, 5, *[1] * 13, 3, 11, 1, 17], [5, 2, 13, 1, 1, 31])
BLOCKS = {"kind": "blocks", "block": 4}
GATE = {"kind": "gate", "block": 5, "gate_dim": 3}
POOLED = {**BLOCKS, "queries": "pooled"}
LINES = {
    "kind": "vertical-slash", "columns": 4, "slashes": 5, "last_queries": 6, "first_columns": 1,
    "last_slashes": 2,
}  # fmt: skip
#: so few that their rows are gathered
FEW = {**LINES, "columns": 3, "slashes": 2}
ATTENDED = {**BLOCKS, "key": "attended", "first": 1, "last": 2}
LABELS = {"kind": "channels", "share": 0.3, "phase": "both"}
CHUNKS = {
    "kind": "segments", "window": 2, "apart": 3, "longest": 7, "local": 4, "hidden": 5,
}  # fmt: skip
#: pattern, window of the block, softcap
CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "moba": ({"select": {**BLOCKS, "topk": 3}}, 0, 0.0),
    "moba beside sinks and a window": (
        {"select": {**BLOCKS, "topk": 2}, "sinks": 3, "window": 6}, 0, 0.0,
    ),
    "moba in a block with a window": ({"select": {**BLOCKS, "topp": 0.6}}, 14, 1.5),
    "moba, own block only": ({"select": {**BLOCKS, "topk": 1}}, 0, 0.0),
    "gate": ({"select": {**GATE, "ratio": 0.4}}, 0, 0.0),
    "gate with a threshold": ({"select": {**GATE, "threshold": 0.2}, "window": 3}, 0, 2.0),
    "labels": ({"select": {"kind": "channels", "share": 0.3, "topk": 5}}, 0, 0.0),
    "labels of prompts too": (
        {"select": {**LABELS, "ratio": 0.2}, "sinks": 1}, 20, 0.0,
    ),
    "so many labels of prompts": ({"select": {**LABELS, "topk": 5}}, 0, 1.5),
    "labels of prompts by share": ({"select": {**LABELS, "topp": 0.4}, "window": 3}, 20, 1.5),
    "pooled": ({"select": {**POOLED, "ratio": 0.3}}, 0, 0.0),
    "pooled, beside a window": ({"select": {**POOLED, "topp": 0.6}, "window": 7}, 30, 1.5),
    "pooled with a threshold": ({"select": {**POOLED, "threshold": 0.1}}, 0, 0.0),
    "anchored": ({"select": {**BLOCKS, "topk": 4, "first": 1, "last": 2}}, 0, 0.0),
    "anchored with a threshold": (
        {"select": {**BLOCKS, "threshold": 0.15, "first": 2}, "window": 3}, 40, 1.5,
    ),
    "attended": ({"select": {**ATTENDED, "topk": 5}}, 0, 0.0),
    "attended, few of many": ({"select": {**ATTENDED, "ratio": 0.1}, "sinks": 6}, 30, 1.5),
    "values": ({"select": {"kind": "values", "topk": 6}}, 0, 0.0),
    "values beside a window": (
        {"select": {"kind": "values", "ratio": 0.2}, "sinks": 1, "window": 4}, 25, 2.0,
    ),
    "chunks": ({"select": {**CHUNKS, "topk": 20}}, 0, 0.0),
    "chunks beside sinks": (
        {"select": {**CHUNKS, "apart": 0, "theta": 1.2, "ratio": 0.5}, "sinks": 3}, 35, 1.5,
    ),
    "lines": ({"select": LINES}, 0, 0.0),
    "few lines": ({"select": {**FEW, "columns": 4}}, 0, 0.0),
    "few lines in a block with a window": ({"select": FEW, "sinks": 2, "window": 4}, 26, 1.5),
    "lines, capped": ({"select": {**LINES, "last_queries": 3}, "sinks": 2}, 0, 2.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def several_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that choose alike are more than one region, those of a block more than one tile."""
    monkeypatch.setattr("reattend.targets.onnx.fragments.RUN", 8)
    monkeypatch.setattr("reattend.targets.onnx.fragments.TILE", 4)


ROTARY = RotaryConfig(inv_freq=(1.0, 0.3, 0.07))


def width_of(given: dict[str, Any]) -> int:
    """Of values: attended keys are multiplied with outputs."""
    return D if given["select"].get("key") == "attended" else E


def core_of(own: int, softcap: float, width: int = E) -> CoreConfig:
    return CoreConfig(
        heads=H, kv_heads=G, qk_head_dim=D, v_head_dim=width, scale=SCALE, softcap=softcap,
        pattern="sliding" if own else "causal", window=own,
    )  # fmt: skip


class Node:
    """A node with its states, in one of three runtimes."""

    def __init__(
        self, pattern: HeadPattern, core: CoreConfig, runtime: str, fixed: bool = False
    ) -> None:
        self.pattern, self.core, self.runtime, self.fixed = pattern, core, runtime, fixed
        self.form = selected_form("here", pattern, core)
        torch.manual_seed(3)
        assert pattern.select is not None
        weights = method(pattern.select, core, ROTARY).state_dict().values()
        self.weights = [torch.randn(w.shape) if w.is_floating_point() else w + 1 for w in weights]
        shapes = [(B, G, T, D), (B, G, T, core.v_head_dim)]
        for x in self.form.extra:
            shapes.append((B, G, x.rows or -(-T // x.block), x.width))
        random = np.random.default_rng(1)
        self.state = [(9 * random.standard_normal(s)).astype(np.float32) for s in shapes]
        self.run: Any = None

    def half(self) -> Node:
        """The same in float16."""
        self.state = [s.astype(np.float16) for s in self.state]
        self.weights = [w.half() if w.is_floating_point() else w for w in self.weights]
        return self

    def step(self, new: list[np.ndarray], total: int) -> np.ndarray:
        rules = {"scale": SCALE, "sliding_window": self.core.window, "softcap": self.core.softcap}
        ends = [START, np.full(B, total)]
        if self.runtime == "torch":
            given = [torch.from_numpy(x) for x in [*new, *self.state]]
            given += [torch.zeros(0)] * (7 - len(given))
            y, *state = selected_attention(
                *given, self.weights, *map(torch.from_numpy, ends), **rules,
                pattern=self.pattern.model_dump_json(), inv_freq=list(ROTARY.inv_freq),
            )  # fmt: skip
            self.state = [s.numpy() for s in state][: len(self.state)]
            return y.numpy()
        kept = ["key", "value", "more", "recent"][: len(self.state)]
        names = ["q", "key", "value", *(f"past_{x}" for x in kept)]
        weights = [w.numpy() for w in self.weights]
        names += [f"w{i}" for i in range(len(weights))] + ["kv_start", "kv_len"]
        feed: Any = dict(zip(names, [*new, *self.state, *weights, *ends], strict=True))
        outputs = ["y", *(f"present_{x}" for x in kept)]
        if self.run is None:
            more = attributes(self.pattern, ROTARY)
            budgets = tuple(n for n in Uses().budgets if getattr(self.pattern.select, n, None))
            uses = Uses(
                budgets=budgets,
                capped=bool(self.core.softcap),
                sliding=bool(self.core.window) or self.fixed,
            )
            made = one_node(self.form.op, feed, outputs, rules | more, uses, self.fixed)
            self.run = (
                ReferenceEvaluator(made)
                if self.runtime == "reference"
                else onnxruntime.InferenceSession(
                    made.SerializeToString(), providers=["CPUExecutionProvider"]
                )
            )
        y, *self.state = self.run.run(None, feed)
        return y


def given(core: CoreConfig) -> list[np.ndarray]:
    """Queries, keys and values, these as wide as they are to be."""
    q, k, v = rows()
    return [q, k, np.concatenate([v, k[..., E:]], 3)[..., : core.v_head_dim]]


def outputs(node: Node, pieces: list[int]) -> np.ndarray:
    at, got = 0, []
    for n in pieces:
        new = [np.ascontiguousarray(x[:, :, at : at + n]) for x in given(node.core)]
        at += n
        got.append(node.step(new, at))
    y = np.concatenate(got, 2)
    assert np.isfinite(y).all()
    return y


@pytest.mark.parametrize("case", CASES)
def test_what_is_chosen_in_one_go_and_in_pieces(case: str) -> None:
    said, own, softcap = CASES[case]
    pattern, core = HeadPattern.model_validate(said), core_of(own, softcap, width_of(said))
    real = np.arange(T) >= START[:, None]
    every = outputs(Node(HeadPattern.model_validate({**said, "window": T}), core, "torch"), [T])
    assert pattern.select is not None
    for pieces in PIECES[pattern.select.acts == "decode" :]:
        want = outputs(Node(pattern, core, "torch"), pieces)
        assert (
            np.abs(every - want)[
                real[:, None, :, None].repeat(H, 1).repeat(core.v_head_dim, 3)
            ].max()
            > 1e-2
        )
        for runtime in ("onnxruntime", "reference"):
            y = outputs(Node(pattern, core, runtime), pieces)
            error = np.where(real[:, None, :, None], y - want, 0)
            assert np.abs(error).max() <= 1e-5, (runtime, pieces)


@pytest.mark.parametrize("ratio", [0.05, 0.4])
def test_of_equal_labels_the_earlier_tokens_are_chosen(ratio: float) -> None:
    """Products of small whole numbers are equal for many tokens; values are not."""
    pattern = HeadPattern.model_validate({"select": {**LABELS, "ratio": ratio}})
    core = core_of(0, 0.0)
    q, k, v = given(core)
    new = [np.round(q), np.round(k), v]
    want = Node(pattern, core, "torch").step(new, T)
    y = Node(pattern, core, "onnxruntime").step(new, T)
    error = np.where((np.arange(T) >= START[:, None])[:, None, :, None], y - want, 0)
    assert np.abs(error).max() <= 1e-5


@pytest.mark.parametrize(
    "case", ["moba", "gate", "attended", "values", "chunks", "few lines", "labels of prompts too"]
)
def test_float16(case: str) -> None:
    """Rounding decides near ties differently, for few queries."""
    said, own, softcap = CASES[case]
    pattern, core = HeadPattern.model_validate(said), core_of(own, softcap, width_of(said))
    want = outputs(Node(pattern, core, "torch"), [T])
    new = [x.astype(np.float16) for x in given(core)]
    y = Node(pattern, core, "onnxruntime").half().step(new, T)
    assert y.dtype == np.float16
    apart = np.abs(y - want).max(-1)[(np.arange(T) >= START[:, None])[:, None].repeat(H, 1)]
    assert np.quantile(apart, 0.9) <= 1e-2


@pytest.mark.parametrize("case", ["moba", "gate"])
def test_a_step_reads_nothing_that_is_not_chosen(case: str) -> None:
    """Every row behind the two blocks that it may choose from holds no numbers."""
    select = {**CASES[case][0]["select"], "ratio": None, "topk": 2}
    block = select["block"]
    node = Node(HeadPattern.model_validate({"select": select}), core_of(block, 0.0), "onnxruntime")
    outputs(node, [T - 1])
    for state in node.state[:2]:
        state[:, :, : ((T - 1 - START[1]) // block - 1) * block] = np.nan
    new = [np.ascontiguousarray(x[:, :, T - 1 :]) for x in rows()]
    assert np.isfinite(node.step(new, T)).all()


def test_a_prompt_reads_nothing_that_no_line_shows() -> None:
    """Every value behind the first columns, and before the two blocks of the nearest, is none."""
    select = {**FEW, "first_columns": 3}
    node = Node(HeadPattern.model_validate({"select": select}), core_of(0, 0.0), "onnxruntime")
    n = 9
    outputs(node, [T - n])
    want = outputs(Node(node.pattern, node.core, "torch"), [T - n, n])[:, :, T - n :]
    for row, start in enumerate(START):
        node.state[1][row, :, 3 : ((T - n - start) // 4 - 1) * 4] = np.nan
    y = node.step([np.ascontiguousarray(x[:, :, T - n :]) for x in given(node.core)], T)
    assert np.abs(y - want).max() <= 1e-5


PROMPTS = ("moba", "gate", "anchored", "attended", "pooled", "values", "chunks", "lines")


@pytest.mark.parametrize("case", PROMPTS)
def test_sizes_may_be_fixed(case: str) -> None:
    """A runtime folds what depends on them; also without a window, in a file that has one."""
    said, own, softcap = CASES[case]
    pattern, core = HeadPattern.model_validate(said), core_of(own, softcap, width_of(said))
    y = outputs(Node(pattern, core, "onnxruntime", fixed=True), [23])
    want = outputs(Node(pattern, core, "torch"), [23])
    real = (np.arange(23) >= START[:, None])[:, None, :, None]
    assert np.abs(np.where(real, y - want, 0)).max() <= 1e-5


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_reads_nothing_that_was_not_written(case: str) -> None:
    said, own, softcap = CASES[case]
    pattern, core = HeadPattern.model_validate(said), core_of(own, softcap, width_of(said))
    node = Node(pattern, core, "onnxruntime")
    for held in node.state[:2]:
        held[:] = np.nan
    y = outputs(node, [23])
    want = outputs(Node(pattern, core, "torch"), [23])
    real = (np.arange(23) >= START[:, None])[:, None, :, None]
    assert np.abs(np.where(real, y - want, 0)).max() <= 1e-5


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_body_is_valid(name: str, capped: bool) -> None:
    body = function_proto(name, Uses(capped=capped))
    around = onnx.checker.C.CheckerContext()
    around.ir_version = 11
    around.opset_imports = {x.domain: x.version for x in body.opset_import}
    onnx.checker.check_function(body, around)
