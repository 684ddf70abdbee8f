"""Reports to test with. Every number is made up; it only has to look like a real run."""

from __future__ import annotations

import io
import math
from typing import Any

from reattend.report import Report

HOSTILE = '</title><script>alert("x")</script>|`*_[a](javascript:1)\n# b & <img src=x>'


def site(layer: int, /, **changes: Any) -> dict[str, Any]:
    """One made-up site of a small Llama, converted to latent attention."""
    width, context = 128, 1024
    lost = 0.004 * abs(6 - layer) ** 1.3
    energy = [1 - math.exp(-(rank + 1) / (7 + 1.5 * (5 - layer))) for rank in range(width)]
    entry: dict[str, Any] = {
        "path": f"model.layers.{layer}.self_attn",
        "action": "converted",
        "layer": layer,
        "verified": True,
        "spec": {
            "heads": 8,
            "kv_heads": 2,
            "hidden": 256,
            "qk_width": 32,
            "v_width": 32,
            "rotary_width": 32,
        },
        "conversion": "mla",
        "options": {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "balance": True},
        "exactness": "bounded",
        "cost": {
            "before": _cost(128, 163_840, context),
            "after": _cost(64, 158_720, context),
        },
        "error": {
            "output_relative": lost,
            "output_bound": lost * 2.3,
            "discarded_energy": 1 - energy[47],
            "rank": 48,
            "energy_kept": energy,
            "rotary_energy_kept": 0.93 - 0.01 * layer,
        },
        "owner": {"path": f"model.layers.{layer}.self_attn", "class_name": "LatentAttention"},
    }
    return {**entry, **changes}


def _cost(width: int, parameters: int, context: int) -> dict[str, Any]:
    return {
        "cache_numbers_per_token": width,
        "cache_bytes_per_token": 2 * width,
        "parameters": parameters,
        "flops_per_token": 2.0 * parameters + 4.0 * width * context,
        "context": context,
    }


def kept(layer: int) -> dict[str, Any]:
    """A made-up site that a rule of the plan leaves alone."""
    same = _cost(128, 163_840, 1024)
    return site(
        layer,
        action="kept",
        conversion="",
        options={},
        exactness=None,
        error=None,
        owner=None,
        reason="rule 1 keeps layer 0",
        cost={"before": same, "after": same},
    )


def sample(**changes: Any) -> Report:
    """A made-up but complete report."""
    fields: dict[str, Any] = {
        "reattend_version": "0.1.0",
        "model": {
            "name": "synthetic-llama",
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "parameters_before": 5_573_888,
            "parameters_after": 5_548_288,
            "source_hash": "sha256:" + "0123456789abcdef" * 4,
        },
        "plan": {
            "version": 1,
            "rules": [
                {"layers": [0], "to": "keep"},
                {"sites": "*", "to": "mla", "kv_lora_rank": 48, "qk_rope_head_dim": 16},
            ],
            "verify": {"max_ppl_increase": 0.05},
        },
        "sites": [kept(0), *(site(layer) for layer in range(1, 6))],
        "parity": [
            _parity("identity, float64", "attention output, region / rebuilt", 3e-14, 1e-12, 9e-15),
            _parity("prefill", "logits, expanded / absorbed form", 4.1e-6, 6e-5, 7.5e-6),
            _parity("cached decode", "logits, cached / uncached", 5.0e-6, 6e-5, 7.5e-6),
            _parity("left padding", "logits, padded / unpadded", 3.7e-6, 6e-5, 7.5e-6),
        ],
        "quality": {
            "data": "heldout",
            "tokens": 20_480,
            "context": 512,
            "rows": [
                _row("original", "original", 1536, 27.31, None, None, (0.64, 0.91, 0.55)),
                _row(
                    "mla, statistics only", "intermediate", 896, 33.9, 0.21, 0.79, (0.4, 0.7, 0.3)
                ),
                _row(
                    "mla, 200,000 tokens", "converted", 896, 28.02, 0.032, 0.924, (0.61, 0.88, 0.5)
                ),
                _row("sliding window 298", "yardstick", 896, 29.5, 0.07, 0.9, (0.31, 0.22, 0.1)),
                _row("int8 cache", "yardstick", 816, 27.33, 0.001, 0.991, (0.64, 0.91, 0.55)),
                _row("int4 cache", "yardstick", 432, 28.9, 0.05, 0.9, (0.55, 0.8, 0.42)),
            ],
        },
        "calibration": {
            "data": "calibration",
            "stages": [
                {"name": "statistics", "tokens": 65_536},
                {
                    "name": "layerwise",
                    "tokens": 100_000,
                    "loss_name": "relative squared error",
                    "loss": [[4000 * i, 0.09 * math.exp(-i / 6) + 0.011] for i in range(26)],
                },
                {
                    "name": "end-to-end",
                    "tokens": 100_000,
                    "loss_name": "KL, nats per token",
                    "loss": [
                        [4000 * i, 0.15 * math.exp(-i / 9) + 0.032 + 0.004 * math.sin(2.1 * i)]
                        for i in range(26)
                    ],
                },
            ],
        },
        "gates": [
            {
                "name": "max_ppl_increase",
                "limit": 0.05,
                "value": 0.025998,
                "verdict": "pass",
            },
            {
                "name": "min_recall_copy",
                "limit": 0.6,
                "value": 0.61,
                "relation": ">=",
                "verdict": "pass",
            },
        ],
        "provenance": {
            "weights": {"model.safetensors": "sha256:" + "ab" * 32},
            "plan": "sha256:" + "cd" * 32,
            "data": {"calibration": "sha256:" + "ef" * 32, "heldout": "sha256:" + "12" * 32},
            "seeds": {"calibrate": 0, "verify": 1},
            "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        },
        "notes": ["Synthetic example: every number on this page is made up."],
    }
    return Report.model_validate({**fields, **changes})


def _parity(
    name: str, compared: str, relative: float, limit: float, floor: float
) -> dict[str, Any]:
    return {
        "name": name,
        "compared": compared,
        "verdict": "pass" if relative <= limit else "fail",
        "shape": [2, 67, 4096],
        "max_abs": relative * 8,
        "relative": relative,
        "cosine": 1.0,
        "top1": 1.0,
        "tolerance": limit,
        "noise_floor": floor,
    }


def _row(
    name: str,
    role: str,
    size: int,
    ppl: float,
    kl: float | None,
    top1: float | None,
    recall: tuple[float, float, float],
) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "cache_bytes_per_token": size,
        "ppl": ppl,
        "kl": kl,
        "top1": top1,
        "recall": dict(zip(("copy", "passkey", "multi_key"), recall, strict=True)),
    }


def bare(**changes: Any) -> Report:
    """The least a report can say."""
    return Report.model_validate({"model": {"architecture": "Net", "dtype": "float32"}, **changes})


def console(report: Report, width: int = 120) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(report.summary())
    return out.getvalue()
