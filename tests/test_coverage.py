"""The committed coverage table: what it must never show, and a spot check of its rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULTS = EXAMPLES / "results" / "coverage.json"


def script(name: str) -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def coverage() -> Any:
    return script("coverage")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["rows"]  # type: ignore[no-any-return]


def test_nothing_differs_without_a_word(coverage: Any, rows: list[dict[str, Any]]) -> None:
    assert [r["class"] for r in rows if r.get("sites") and coverage.different(r)] == []


def test_models_without_softmax_attention_have_no_sites(
    coverage: Any, rows: list[dict[str, Any]]
) -> None:
    known = [r for r in rows if r["kind"] in coverage.NO_ATTENTION and "not_built" not in r]
    assert len({r["kind"] for r in known}) >= 8
    assert [r["class"] for r in known if r.get("sites")] == []


def test_every_architecture_has_a_row(coverage: Any, rows: list[dict[str, Any]]) -> None:
    wanted = {(t, n) for t in script("tiny_models").TASKS for _, n in
              script("tiny_models").architectures(t)}  # fmt: skip
    assert wanted <= {(r["task"], r["class"]) for r in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "MambaForCausalLM", "ViTForImageClassification"]
)
def test_a_row_measured_again_is_the_same(
    coverage: Any, rows: list[dict[str, Any]], name: str
) -> None:
    row = next(r for r in rows if r["class"] == name)
    again = coverage.measure(row["task"], row["kind"], name)
    for key in ("cores", "sites", "kinds", "refused"):
        assert again.get(key) == row.get(key), key
    if row.get("sites"):
        assert coverage.equal(again) and coverage.equal(row)


class Routed(nn.Module):
    """A router's softmax scales experts; one softmax averages values; one SDPA call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(x @ x.transpose(-1, -2), -1)
        y = torch.dropout(scores, 0.0, False) @ x
        gate, _ = torch.softmax(x.mean(1), -1).topk(2)
        z = torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], y[:, None])
        return z[:, 0] * gate.sum()


def test_cores_are_counted_by_watching() -> None:
    count = script("core_count").count_cores
    assert count(Routed(), {"x": torch.randn(2, 6, 8)}) == 2
    assert count(nn.Softmax(-1), {"input": torch.randn(2, 3)}) == 0
