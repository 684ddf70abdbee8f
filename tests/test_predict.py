"""Predictions beside what `run.json` measured, in a process of their own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.finder import find_attention
from reattend.plan import Plan
from reattend.predict import predict
from reattend.preflight import choose
from reattend.probe import probe

RUN = """
import json, sys, torch
torch.set_num_threads(1)
import transformers, reattend.targets.huggingface
from reattend import convert, pipeline
transformers.utils.logging.disable_progress_bar()
model, vocabulary, out, given, seq_len, more = sys.argv[1:]
plan = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]} | json.loads(more)
plan["calibrate"] = {"statistics_tokens": 4096, "tokens": 0, "batch_size": 4,
                     "seq_len": int(seq_len)} | plan.get("calibrate", {})
shape = (40, int(seq_len))
ids = torch.randint(0, int(vocabulary), shape, generator=torch.Generator().manual_seed(0))
data = {"ids": ids, "self": None}.get(given, given)
told = []
predict = pipeline.predict
def listen(*given, **named):
    told.append(predict(*given, **named))
    return told[-1]
pipeline.predict = listen
run = convert(model, plan, data=data, out=out).run
print(json.dumps({"base": run.baseline_bytes, "stages": [s.model_dump() for s in run.stages],
                  "seconds": {s.name: s.seconds for s in told[0].stages}}))
"""
EXPORT = """
import sys, torch
torch.set_num_threads(1)
import transformers, onnx, onnxruntime, onnxscript, reattend.targets.huggingface
from reattend import export, load
from reattend.memory import forget_peak, give_back, peak_memory
from reattend.predict_memory import exporting
give_back(), forget_peak()
base = peak_memory()
model = load(sys.argv[1])
export(model, out=sys.argv[2])
print(peak_memory() - base, exporting(model))
"""
#: What is predicted is what is alive; glibc would keep freed blocks of up to 32 MiB besides.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
STAGES = {"open", "find", "data", "statistics", "rewrite", "verify", "publish"}
TRAINS = {"layerwise", "end-to-end"}


def child(code: str, *arguments: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, **ALLOCATOR},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def compared(
    model: Path, vocabulary: int, out: Path, data: str = "ids", seq_len: int = 128, **more: Any
) -> tuple[dict[str, float], float]:
    """By stage, predicted over measured growth of memory; the same for the run's seconds."""
    told = json.loads(child(RUN, model, vocabulary, out, data, seq_len, json.dumps(more)))
    base, stages = told["base"], told["stages"]
    memory = {
        s["name"]: (s["peak_bytes_predicted"] - base) / (s["peak_bytes"] - base) for s in stages
    }
    return memory, sum(told["seconds"].values()) / sum(s["seconds"] for s in stages)


def off(found: dict[str, float]) -> dict[str, float]:
    """Stages whose prediction is off by more than 20 %."""
    return {n: r for n, r in found.items() if not 0.8 <= r <= 1.2}


def saved(folder: Path, dtype: str, **sizes: Any) -> Path:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_attention_heads=8,
        max_position_embeddings=512, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_every_stage_of_a_run_that_trains(tmp_path: Path) -> None:
    """Tens of MiB of weights, logits and moments each, so that noise is small beside them."""
    sizes = {"vocab_size": 8192, "num_hidden_layers": 3, "num_key_value_heads": 4}
    model = saved(tmp_path / "model", "float32", **sizes)
    memory, seconds = compared(model, 8192, tmp_path / "out", calibrate={"tokens": 1024})
    assert set(memory) == STAGES | TRAINS
    assert off(memory) == {}, memory
    assert 1 / 6 < seconds < 6, "a third to three times on a quiet machine; this one may be busy"


@pytest.mark.slow
@pytest.mark.parametrize("data", ["self", "heldout.txt"])
def test_memory_with_text_and_without_data(data: str, shipped_path: Path, tmp_path: Path) -> None:
    chosen = data if data == "self" else str(shipped_path / data)
    memory, _ = compared(shipped_path, 4096, tmp_path / "out", chosen, seq_len=128)
    assert set(memory) == STAGES
    assert off(memory) == {}, memory


@pytest.mark.slow
def test_memory_in_half_precision(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8192, "num_hidden_layers": 4, "num_key_value_heads": 8}
    model = saved(tmp_path / "model", "bfloat16", **sizes)
    memory, _ = compared(model, 8192, tmp_path / "out", calibrate={"tokens": 1024})
    assert off(memory) == {}, memory


@pytest.mark.slow
def test_memory_of_choosing_sizes_and_of_the_peers(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8192, "num_hidden_layers": 3, "num_key_value_heads": 4}
    model = saved(tmp_path / "model", "float32", **sizes)
    rule = {"sites": "*", "to": "mla", "kv_keep": 0.5, "kv_lora_rank": "auto"}
    rule["qk_rope_head_dim"] = "auto"
    memory, _ = compared(
        model, 8192, tmp_path / "out", rules=[rule], verify={"peers": ["transmla-paper", "care"]}
    )
    assert set(memory) == STAGES | {"choose"}
    assert off(memory) == {}, memory


@pytest.mark.slow
def test_memory_of_the_export(tmp_path: Path) -> None:
    from reattend import convert

    sizes = {"vocab_size": 16384, "num_hidden_layers": 4, "num_key_value_heads": 4}
    saved(tmp_path / "model", "float32", **sizes)
    convert(tmp_path / "model", plan="identity", out=tmp_path / "converted")
    measured, told = child(EXPORT, tmp_path / "converted", tmp_path / "onnx").split()
    assert 0.8 <= int(told) / int(measured) <= 1.2, (told, measured)


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = small().train()
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    ids = torch.randint(0, 64, (2, 23))
    one = probe(model, {"input_ids": ids}, ["model.layers.0.self_attn"])
    both = probe(model, {"input_ids": ids}, [f"model.layers.{i}.self_attn" for i in range(2)])
    assert one.tokens == 23
    assert 0 < one.saved <= both.saved
    assert one.seconds > 0
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training


def storage_uses(number: int) -> int:
    """Holders of a storage; the function is missing from torch's stubs."""
    library: Any = torch._C
    return int(library._storage_Use_Count(number))


def test_a_probe_holds_on_to_nothing() -> None:
    model = small()
    probe(model, {"input_ids": torch.randint(0, 64, (2, 23))}, ["model.layers.0.self_attn"])
    counts = {n: storage_uses(p.untyped_storage()._cdata) for n, p in model.named_parameters()}
    assert set(counts.values()) == {2}, counts  # the parameter, and the handle that asks


def predicted(model: Any, plan: dict[str, Any], rows: int | None = 40, owned: bool = True) -> Any:
    chosen, found = Plan.load(plan), looked_at(model)
    return predict(
        model, choose(found, chosen), chosen, found.capture.inputs, rows=rows, owned=owned
    )


@functools.lru_cache(maxsize=1)  # several plans for one model
def looked_at(model: Any) -> Any:
    return find_attention(model)


def small(**sizes: Any) -> Any:
    torch.manual_seed(0)
    given = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**given, **sizes})).eval()


def test_costs_are_those_of_the_converted_model() -> None:
    from reattend import convert

    model = small()
    plan = {"rules": [{"layers": 0, "to": "mla", "kv_keep": 0.5}, {"sites": "*", "to": "keep"}]}
    told = predicted(model, plan)
    result = convert(model, plan, data=torch.randint(0, 64, (8, 64)))
    assert told.parameters_before == sum(p.numel() for p in model.parameters())
    assert told.parameters_after == sum(p.numel() for p in result.model.parameters())
    totals = result.report.totals
    assert sum(s.cache_bytes_before for s in told.sites) == totals.cache_bytes_per_token_before
    assert sum(s.cache_bytes_after for s in told.sites) == totals.cache_bytes_per_token_after
    assert [s.action for s in told.sites] == ["converted", "kept"]


def test_what_costs_more_is_predicted_to() -> None:
    model = small()
    plan: dict[str, Any] = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]}
    base = predicted(model, plan)
    dense = predicted(model, {"rules": [{"sites": "*", "to": "dense"}]})
    published = Plan.load("transmla-paper").to_dict()  # little is measured, so training decides
    untrained = predicted(model, published)
    trained = predicted(model, {**published, "calibrate": {"tokens": 100_000}})
    chosen = predicted(model, Plan.load("transmla").to_dict())
    longer = predicted(model, {**plan, "calibrate": {"seq_len": 4096}})
    assert dense.peaks["statistics"] < base.peaks["statistics"] <= base.peak_bytes
    assert TRAINS.isdisjoint(base.peaks)
    assert trained.peaks["end-to-end"] > untrained.peaks["rewrite"]
    assert trained.seconds > untrained.seconds
    assert untrained.peaks["statistics"] < base.peaks["statistics"]
    assert base.peaks["rewrite"] < chosen.peaks["rewrite"]
    assert longer.peaks["verify"] > 4 * (base.peaks["verify"] - base.peaks["find"])
    assert predicted(model, plan, rows=None).to_dict()["peak_bytes"] > 0
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    live = predicted(model, plan, owned=False)
    assert live.peaks["publish"] == base.peaks["publish"] + weights  # saving ends the sharing


def test_rows_that_belong_together_are_timed_together() -> None:
    """A model that compares its first row with its second cannot run one alone."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids[0]) - self.table(ids[1])

    assert probe(Pair(), {"ids": torch.zeros(2, 5, dtype=torch.long)}, [""]).tokens == 5
