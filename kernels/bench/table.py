"""The Markdown tables of the committed results: no number is typed by hand."""

from __future__ import annotations

from typing import Any

HEAD = ("problem (bf16)", "ms", "eager ms", "floor ms", "of floor", "rate", "peers: ms (ours is)")


def peer_cell(row: dict[str, Any]) -> str:
    """Every peer: its time and how many times faster ours is; for another cache, the bytes."""
    parts = []
    for name, peer in row["peers"].items():
        if "refused" in peer:
            parts.append(f"{name}: refused")
            continue
        text = f"{name}: {peer['ms']:.3f} (x{peer['times_faster']:.2f}"
        if "original" in name:
            text += f", bytes x{peer['bytes_ratio']:.2f}"
        parts.append(text + ")")
    return "; ".join(parts)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    by_bytes = row["bound"] == "bytes"
    rate = f"{row['gb_per_s']:.0f} GB/s" if by_bytes else f"{row['tflops']:.0f} TFLOP/s"
    return (
        row["case"],
        f"{row['ms']:.4f}",
        f"{row['eager_ms']:.3f}",
        f"{row['floor_ms']:.4f}",
        f"{row['fraction_of_floor']:.0%} ({row['bound']})",
        rate,
        peer_cell(row),
    )


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: one line on the machine, then a row for every case."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    ceilings = results["ceilings"]
    passed = sum(row["ok"] for row in results["checks"])
    lines = [
        f"{results['device']}, {results['date']}, {versions}, `{results['command']}`. Measured"
        f" ceilings: copy {ceilings['copy_gb_per_s']:.0f} GB/s, bf16 matrix product"
        f" {ceilings['matmul_tflops']:.0f} TFLOP/s. Correct in {passed} of"
        f" {len(results['checks'])} checks.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|" + "---:|" * (len(HEAD) - 2) + "---|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in results["speed"]]
    return "\n".join(lines)


def model_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/model.py` as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    shape = results["shape"]
    lines = [
        f"{results['device']}, {results['date']}, {versions}, `{results['command']}`:"
        f" {shape['layers']} layers of width {shape['hidden']} with {shape['heads']} heads, random"
        f" bf16 weights; latent rank {results['rank']} + {results['rope']}.",
        "",
        "| attention | at | batch | context | cache bytes per token | ms per step | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['model']} | {row['at']} | {row['batch']} | {row['context']} |"
        f" {row['cache_bytes_per_token']} | {row['step_ms']:.1f} | {row['tokens_per_s']:.0f} |"
        for row in results["rows"]
    ]
    ratios = "; ".join(f"{name}: x{ratio:.2f}" for name, ratio in results["times_faster"].items())
    return "\n".join([*lines, "", f"Tokens per second, latent over {ratios}."])
