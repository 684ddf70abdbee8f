"""The Markdown tables of whole models, and of what their layers share."""

from __future__ import annotations

from typing import Any

from table import digits

GOAL = 10.6  # x the decode throughput of the original, TransMLA's figure


def model_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/model.py` as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines = [
        f"{results['device']}, {results['date']}, {versions}, `{results['command']}`: random bf16"
        f" weights, a decode step as a CUDA graph; latent rank {results['rank']} +"
        f" {results['rope']}.",
        "",
        "| shape | attention | at | batch | context | cache bytes per token | ms per step |"
        " tokens/s |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        told = f"{row.get('refused', '')} |"
        if "step_ms" in row:
            told = f"{row['step_ms']:.1f} | {row['tokens_per_s']:.0f}"
        shape = row.get("shape", "llama-2-7b")  # the only one there was
        lines.append(
            f"| {shape} | {row['model']} | {row['at']} | {row.get('batch', '')} |"
            f" {row['context']} | {row.get('cache_bytes_per_token', '')} | {told} |"
        )
    ratios = "; ".join(f"{name}: x{ratio:.2f}" for name, ratio in results["times_faster"].items())
    goal = [
        f"{name}: {'reached' if ratio >= GOAL else 'missed'} (x{ratio:.2f})"
        for name, ratio in results["times_faster"].items()
        if "equal memory" in name and ("llama-2-7b, 8192" in name or "llama" not in name)
    ]
    told = f"Goal of x{GOAL} at equal memory, Llama-2-7B, 8192 tokens, over {'; '.join(goal)}."
    return "\n".join([*lines, "", f"Tokens per second, latent over {ratios}.", "", told])


def families_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/families.py` as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    making = ("build_s", "convert_s", "device_peak_gb")
    names = (*making, "prefill_ms", "batch", "step_ms", "tokens_per_s")
    lines = [
        f"{results['device']}, {results['date']}, {versions}, `{results['command']}`: random bf16"
        " weights made on the device, converted once per family, run by transformers' own forward"
        " and caches.",
        "",
        f"| shape | family | context | at | {' | '.join(names)} |",
        "|---|---|---:|---|" + "---:|" * len(names),
    ]
    for row in results["rows"]:
        told = [str(row.get(name, "")) for name in names]
        if "refused" in row:
            told[-1] = row["refused"]
        first = (row["shape"], row["family"], str(row.get("context", "")), row.get("at", ""))
        lines.append(f"| {' | '.join((*first, *told))} |")
    return "\n".join(lines)


def layout_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/layout_cpu.py` as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    layers = results["rows"][0]["layout_layers"]
    lines = [
        f"CPU, {results['threads']} thread, {results['date']}, {versions},"
        f" `{results['command']}`: processor ms to build the block layouts of a new length for"
        f" {layers} layers together, that divided by the layers, and what a layer takes to find"
        " them again.",
        "",
        "| problem | patterns | blocks listed | first prompt | per layer | again, per layer |",
        "|---|" + "---:|" * 5,
    ]
    for row in results["rows"]:
        first, each = row["layout_first_ms"], row["layout_first_ms"] / layers
        lines.append(
            f"| {row['case']} | {row['patterns']} | {row['entries']} | {first:.1f} |"
            f" {digits(each)} | {row['layout_again_ms']:.4f} |"
        )
    return "\n".join(lines)
