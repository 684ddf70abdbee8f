"""Routed heads in ONNX: the node means what the torch op means; a model gives torch's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_models import decoder, prompts
from moh_blocks import shaken

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from test_onnx_sparse_functions import one_node  # noqa: E402

from reattend import convert  # noqa: E402
from reattend.kernels.routed_attention.reference import routed_attention  # noqa: E402
from reattend.targets.onnx import Session, export_onnx  # noqa: E402
from reattend.targets.onnx.layout import routed_form  # noqa: E402
from reattend.targets.onnx.routed_body import FEW, STRETCH  # noqa: E402

B, H, G, D, E, MORE = 3, 8, 4, 8, 5, 12
RULES: dict[str, dict[str, Any]] = {
    "causal": {}, "full": {"causal": 0}, "window": {"sliding_window": 3},
    "softcap": {"softcap": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("units", [G, H])
@pytest.mark.parametrize("n", [1, FEW + 3, STRETCH + 7])
def test_the_body_means_what_the_torch_op_means(n: int, units: int, rule: str) -> None:
    """Row 1 is padded, row 2 has only padding before its last queries; a unit that nobody uses."""
    attributes = {"scale": 0.3, "causal": 1, "sliding_window": 0, "softcap": 0.0} | RULES[rule]
    random = np.random.default_rng(0)
    shapes = {"q": (B, H, n, D), "key": (B, G, n + MORE, D), "value": (B, G, n + MORE, E)}
    for dtype, limit in ((np.float32, 1e-5), (np.float16, 1e-2)):
        feed = {k: random.standard_normal(s).astype(dtype) for k, s in shapes.items()}
        feed["active"] = random.random((B, units, n)) < 0.5
        feed["active"][0, 1] = False
        feed["kv_start"], feed["kv_len"] = np.array([0, 9, n + 3]), np.full(3, n + 6)
        made = one_node("RoutedAttention", feed, ["y"], attributes)
        tensors = [torch.from_numpy(v) for v in feed.values()]
        tensors = [t.float() if t.is_floating_point() else t for t in tensors]
        expected = routed_attention(*tensors, **attributes | {"causal": bool(attributes["causal"])})
        run = onnxruntime.InferenceSession(made.SerializeToString())
        got = [run.run(None, feed)[0]]
        if dtype == np.float32 and rule == "window":
            got.append(ReferenceEvaluator(made).run(None, feed)[0])
        for y in got:
            assert np.abs(y - expected[0].numpy()).max() <= limit * (1 + np.abs(y).max())


PLAN: dict[str, Any] = {
    "rules": [
        {"layers": [0], "to": "moh", "shared": 1, "top_k": 1, "select_shared": "first"},
        {
            "layers": [1], "heads": [1, 2, 3], "to": "moh", "shared": 1, "top_k": 1,
            "route": "head", "gate": "hard", "router": "qnorm", "select_shared": "first",
        },
        {"layers": [1], "to": "dense"},
    ]
}  # fmt: skip


def test_a_model_generates_what_torch_generates(tmp_path: Path) -> None:
    """By group and weighed, and by head of some groups."""
    model: Any = convert(decoder("llama", layers=2, groups=4), plan=PLAN).model
    shaken(model)
    made = export_onnx(model, tmp_path / "out")
    assert made.max_error <= 1e-4
    layers = made.manifest.layers
    assert [x.op for x in layers] == ["RoutedAttention", "Attention", "RoutedAttention"]
    assert "50% of the heads" in layers[0].saves and not layers[1].saves
    whole = model.model.layers[0].self_attn.mixer.config.model_copy(update={"top_k": 3})
    assert routed_form(whole) == ("Attention", "")
    assert made.manifest.checks[-1].prefill > FEW
    ids, mask = prompts()
    run = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **run)
    got = Session(made.path).generate(ids.numpy(), mask.numpy(), max_new_tokens=6)
    assert np.array_equal(got, expected.numpy())
