"""The coverage campaign: how it counts, and two architectures from config to converted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


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


def row(**what: Any) -> dict[str, Any]:
    return {"task": "causal-lm", "class": "X", "kind": "x", "cores": 2, "sites": 2} | what


def test_what_differs_in_silence_is_counted(coverage: Any) -> None:
    equal = row(identity={"gaps": {"a": 1e-6, "b": 0.0}, "generate": "equal"})
    apart = row(identity={"gaps": {"a": 1e-6, "b": 2e-3}, "generate": "equal"})
    far = row(identity={"gaps": {"a": 1e-6, "long": 5e-4, "rounding": 8e-4}, "generate": "equal"})
    near = row(identity={"gaps": {"a": 1e-6, "long": 5e-4, "rounding": 3e-4}, "generate": "equal"})
    wrote = row(identity={"gaps": {"a": 1e-6}, "generate": "differs"})
    told = row(identity={"error": "the converted model differs"})
    found = script("coverage_report").summary([equal, apart, far, near, wrote, told])["causal-lm"]
    assert (found["identity_equal"], found["silently_different"]) == (3, 3)
    assert (found["generate_equal"], found["generate_differs"]) == (4, 1)


def test_cores_that_nobody_saw_lower_the_share(coverage: Any) -> None:
    hidden = row(cores=4, sites=1, refused={"a gate": 1}, identity={"gaps": {"a": 0.0}})
    failed = row(cores=2, sites=0, not_found="torch.export could not capture this model")
    unbuilt = row(not_built="no such config")
    found = script("coverage_report").summary([hidden, failed, unbuilt])["all"]
    assert (found["models"], found["cores"], found["verified"]) == (2, 6, 1)
    reasons = {
        reason: count for reason, count, _ in script("coverage_report").reasons([hidden, failed])
    }
    assert reasons["a gate"] == 1 and reasons["not seen in the graph"] == 2
    assert sum(reasons.values()) == 5


def test_the_committed_rows_keep_the_promises(coverage: Any) -> None:
    """No difference in silence, nothing found where there is no attention, a row for everything.

    And the shares that are aimed at: cores proven, models in which identity changes nothing.
    """
    results = json.loads((EXAMPLES / "results" / "coverage.json").read_text())
    rows = results["rows"]
    told = script("coverage_report").summary(rows)
    assert told["all"]["silently_different"] == 0
    assert told["causal-lm"]["share"] >= 0.97 and told["all"]["share"] >= 0.94
    assert told["all"]["identity_equal"] >= 0.95 * told["all"]["with_sites"] > 0
    found = [r["class"] for r in rows if r["kind"] in coverage.NO_ATTENTION and r.get("sites")]
    assert found == []
    assert {r["kind"] for r in rows if r.get("sites") == 0} >= set(coverage.NO_ATTENTION)
    measured = {(r["task"], r["class"]) for r in rows}
    tiny = script("tiny_models")
    if results["inputs"]["versions"]["transformers"] == transformers.__version__:
        for task in {task for task, _ in measured}:
            assert {(task, name) for _, name in tiny.architectures(task)} <= measured


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MambaForCausalLM"])
def test_an_architecture_measured(coverage: Any, name: str) -> None:
    kind = next(k for k, n in script("tiny_models").architectures("causal-lm") if n == name)
    found = coverage.measure("causal-lm", kind, name)
    assert found["sites"] == found["cores"] == (0 if kind in coverage.NO_ATTENTION else 2)
    if found["sites"]:
        assert script("coverage_report").equal(found) and found["identity"]["generate"] == "equal"


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


class Headed(nn.Module):
    """A block whose result is returned or not."""

    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.block, self.returned = Routed(), returned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        return y + x if self.returned else x


@pytest.mark.parametrize(("returned", "cores"), [(True, 2), (False, 0)])
def test_cores_that_nobody_reads_are_not_counted(returned: bool, cores: int) -> None:
    assert script("core_count").count_cores(Headed(returned), {"x": torch.randn(2, 6, 8)}) == cores
