"""The bodies of the sparse nodes, and the torch ops they stand for, against a masked reference.

Long texts are fed in pieces on one state, in memory that holds something else before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx.checker  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from reattend.mixers.config import CoreConfig  # noqa: E402
from reattend.mixers.scores import attend  # noqa: E402
from reattend.patterns.pattern import HeadPattern  # noqa: E402
from reattend.targets.onnx.functions import (  # noqa: E402
    DOMAIN,
    OPSET,
    VERSION,
    Uses,
    function_proto,
    with_called,
)
from reattend.targets.onnx.sparse_ops import (  # noqa: E402
    pattern_attention,
    sink_window_attention,
)
from reattend.targets.onnx.sparse_translate import pattern_attributes  # noqa: E402

B, H, G, D, E, T = 2, 4, 2, 8, 6, 53
START = np.array([0, 7])
SCALE = 0.3
KINDS = {
    np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.bool_: TensorProto.BOOL,
}  # fmt: skip


@pytest.fixture(autouse=True)
def several_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens are more than one region of those that read the same rows."""
    monkeypatch.setattr("reattend.targets.onnx.fragments.TILE", 8)


def rows(seed: int = 0) -> list[np.ndarray]:
    """q, k, v of T tokens."""
    random = np.random.default_rng(seed)
    shapes = (B, H, T, D), (B, G, T, D), (B, G, T, E)
    return [random.standard_normal(s).astype(np.float32) for s in shapes]


def masked(pattern: HeadPattern, own: int, softcap: float) -> tuple[np.ndarray, np.ndarray]:
    """Every query's output by the pattern's own meaning, and which outputs are of real tokens."""
    kind = "sliding" if own else "causal"
    core = CoreConfig(
        heads=H, kv_heads=G, qk_head_dim=D, v_head_dim=E, scale=SCALE, pattern=kind, window=own,
        softcap=softcap,
    )  # fmt: skip
    place = torch.arange(T) - torch.from_numpy(START)[:, None]
    seen = pattern.sees(place[:, :, None], place[:, None], core)
    real = place >= 0
    q, k, v = (torch.from_numpy(x) for x in rows())
    y = attend(q, k, v, core, (seen | ~real[:, :, None])[:, None])
    return y.numpy(), real[:, None, :, None].numpy()


def one_node(
    name: str,
    values: dict[str, Any],
    outputs: list[str],
    attributes: Any,
    uses: Any = None,
    fixed: bool = False,
) -> Any:
    """A model of one node; `values`: its inputs as arrays, whose sizes vary if not `fixed`."""
    given = []
    for key, array in values.items():
        letters = list(array.shape) if fixed else [None] * array.ndim
        kind = KINDS.get(array.dtype.type, TensorProto.INT64)
        given.append(helper.make_tensor_value_info(key, kind, letters))
    kind = KINDS[next(iter(values.values())).dtype.type]
    own = attributes.get("sliding_window")
    uses = uses or Uses(capped=bool(attributes.get("softcap")), sliding=bool(own))
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node(name, list(values), outputs, domain=DOMAIN, **attributes)],
            "one_node", given,
            [
                helper.make_tensor_value_info(
                    o, TensorProto.INT64 if o == "blocks" else kind, [None] * 4
                )
                for o in outputs
            ],
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function_proto(n, uses) for n in with_called({name})], ir_version=11,
    )  # fmt: skip
    onnx.checker.check_model(made, full_check=True)
    return made


RUNTIMES = ("torch", "onnxruntime", "reference")


class Ring:
    """`SparseAttention` in one of the runtimes, with a state that was used before."""

    def __init__(
        self, runtime: str, dtype: Any, rules: dict[str, Any], sliding: bool = False
    ) -> None:
        self.runtime, self.rules = runtime, rules
        own = bool(rules["sliding_window"])
        self.uses = Uses(capped=bool(rules["softcap"]), sliding=own or sliding)
        size = rules["sinks"] + rules["window"]
        random = np.random.default_rng(1)
        self.state = [(9 * random.standard_normal((B, G, size, w))).astype(dtype) for w in (D, E)]
        self.run: Any = None
        if runtime == "onnxruntime":
            self.held = [onnxruntime.OrtValue.ortvalue_from_numpy(s) for s in self.state]

    def step(self, new: list[np.ndarray], total: int) -> np.ndarray:
        names = ("q", "key", "value", "past_key", "past_value", "kv_start", "kv_len")
        values = [*new, *self.state, START, np.full(B, total)]
        if self.runtime == "torch":
            tensors = [torch.from_numpy(x).float() for x in values[:5]]
            tensors += [torch.from_numpy(x) for x in values[5:]]
            y, *state = sink_window_attention(*tensors, **self.rules)
            self.state = [s.numpy().astype(new[0].dtype) for s in state]
            return y.numpy()
        feed: Any = dict(zip(names, values, strict=True))
        outputs = ["y", "present_key", "present_value"]
        if self.run is None:
            made = one_node("SparseAttention", feed, outputs, self.rules, self.uses)
            if self.runtime == "reference":
                self.run = ReferenceEvaluator(made)
            else:
                self.run = onnxruntime.InferenceSession(
                    made.SerializeToString(), providers=["CPUExecutionProvider"]
                )
        if self.runtime == "reference":
            y, *self.state = self.run.run(None, feed)
            return y
        binding = self.run.io_binding()  # one buffer is read and written, as a Session has it
        for key in (*names[:3], *names[5:]):
            binding.bind_cpu_input(key, feed[key])
        for key, out, value in zip(names[3:5], outputs[1:], self.held, strict=True):
            binding.bind_ortvalue_input(key, value)
            binding.bind_ortvalue_output(out, value)
        binding.bind_output("y")
        self.run.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


#: pieces of the text: at once; single steps, and chunks shorter and longer than the window on a
#: ring that has turned
PIECES = ([T], [1, 1, 5, *[1] * 13, 3, 11, 1, 18], [5, 2, 13, 1, 1, 31])
RULES = {
    "window": (0, 4, 0, 0.0),
    "sinks": (2, 5, 0, 0.0),
    "more sinks than window": (6, 3, 0, 0.0),
    "block with a window": (2, 5, 8, 0.0),
    "softcap": (1, 16, 0, 2.0),
    "beside a block with a window": (2, 5, 0, 0.0),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", RULES)
def test_sinks_and_window_on_a_ring(case: str, runtime: str) -> None:
    sinks, window, own, softcap = RULES[case]
    rules = {"scale": SCALE, "sinks": sinks, "window": window}
    rules |= {"sliding_window": own, "softcap": softcap}
    want, real = masked(HeadPattern(sinks=sinks, window=window), own, softcap)
    for pieces in PIECES:
        ring, at, got = Ring(runtime, np.float32, rules, "beside" in case), 0, []
        for n in pieces:
            new = [np.ascontiguousarray(x[:, :, at : at + n]) for x in rows()]
            at += n
            got.append(ring.step(new, at))
        y = np.concatenate(got, 2)
        assert np.isfinite(y).all()
        assert np.abs(np.where(real, y - want, 0)).max() <= 1e-5, pieces


def test_sinks_and_window_in_float16() -> None:
    rules = {"scale": SCALE, "sinks": 2, "window": 5, "sliding_window": 0, "softcap": 0.0}
    want, real = masked(HeadPattern(sinks=2, window=5), 0, 0.0)
    ring, at, got = Ring("onnxruntime", np.float16, rules), 0, []
    for n in PIECES[1]:
        got.append(ring.step([x[:, :, at : at + n].astype(np.float16) for x in rows()], at + n))
        at += n
    assert got[0].dtype == np.float16
    assert np.abs(np.where(real, np.concatenate(got, 2) - want, 0)).max() <= 1e-2


PATTERNS: dict[str, Any] = {
    "elastic": {"sinks": 2, "window": 3, "window_slope": 0.7},
    "short elastic": {"window": -3, "window_slope": 0.25},
    "stride": {"window": 4, "stride": {"period": 3, "offset": 1, "block": 4}},
    "powers": {"sinks": 1, "window": 2, "powers": {"block": 3}},
    "listed": {"columns": (0, 7, 20), "slashes": (0, 5, 11)},
}


@pytest.mark.parametrize("own", [0, 9])
@pytest.mark.parametrize("name", PATTERNS)
def test_any_pattern_over_a_state_of_every_row(name: str, own: int) -> None:
    pattern = HeadPattern(**PATTERNS[name])
    want, real = masked(pattern, own, 0.0)
    q, k, v = rows()
    spare = np.full((B, G, 3, 1), 50, np.float32)  # capacity that no token has reached
    key, value = (np.concatenate([x, spare + 0 * x[:, :, :3]], 2) for x in (k, v))
    rules: Any = {"scale": SCALE, "sliding_window": own, "softcap": 0.0}
    runs: Any = {}
    for at, n in ((0, T), (10, 30), (0, 6), *((at, 1) for at in (0, 6, 7, 8, 29, T - 1))):
        end = np.full(B, at + n)
        values = [np.ascontiguousarray(q[:, :, at : at + n]), key, value, START, end]
        feed: Any = dict(zip(("q", "key", "value", "kv_start", "kv_len"), values, strict=True))
        if not runs:
            rules_here = rules | pattern_attributes(pattern)
            uses = Uses(terms=tuple(PATTERNS[name]), capped=False, sliding=bool(own))
            made = one_node("PatternAttention", feed, ["y"], rules_here, uses)
            runs["onnxruntime"] = onnxruntime.InferenceSession(
                made.SerializeToString(), providers=["CPUExecutionProvider"]
            )
            runs["reference"] = ReferenceEvaluator(made)
        tensors: list[Tensor] = [torch.from_numpy(x) for x in values]
        found = {"torch": pattern_attention(*tensors, pattern=pattern.model_dump_json(), **rules)}
        found |= {runtime: run.run(None, feed)[0] for runtime, run in runs.items()}
        part = slice(at, at + n)
        for runtime, y in found.items():
            assert np.isfinite(np.asarray(y)).all()
            error = np.where(real[:, :, part], np.asarray(y) - want[:, :, part], 0)
            assert np.abs(error).max() <= 1e-5, (runtime, at, n)
