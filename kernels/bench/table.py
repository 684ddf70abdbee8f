"""The Markdown tables of the committed results: no number is typed by hand."""

from __future__ import annotations

from typing import Any

HEAD = ("problem (bf16)", "ms", "eager ms", "floor ms", "of floor", "rate", "peers: ms (ours is)")


def peer_cell(row: dict[str, Any]) -> str:
    """Every peer: its time and how many times faster ours is; for another cache, the bytes."""
    parts = []
    for name, peer in row.get("peers", {}).items():
        if "refused" in peer:
            parts.append(f"{name}: refused")
            continue
        text = f"{name}: {peer['ms']:.3f} (x{peer['times_faster']:.2f}"
        if "original" in name:
            text += f", bytes x{peer['bytes_ratio']:.2f}"
        if peer.get("eager"):
            text += ", no graph"
        parts.append(text + ")")
    return "; ".join(parts)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    if "refused" in row:
        return (row["case"], *[""] * (len(HEAD) - 2), f"refused: {row['refused']}")
    by_bytes = row["bound"] == "bytes"
    rate = f"{row['gb_per_s']:.0f} GB/s" if by_bytes else f"{row['tflops']:.0f} TFLOP/s"
    return (
        row["case"],
        f"{row['ms']:.4f}" + (" (no graph)" if row.get("eager") else ""),
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


def decode_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/onnx_decode.py` as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    held = [result["cache_bytes_per_token"] for result in results["results"]]
    names = [name for name in held[0] if all(name in row for row in held)]
    lines = [
        f"ONNX Runtime on a CPU ({results['machine']}), {results['threads']} thread,"
        f" {results['date']}, python {results['python']}, {versions}, `{results['command']}`:"
        " processor ms per decoded token, batch 1, float32, 6 layers of width 256 with 8 heads of"
        " 32; in brackets the time relative to the original by transformers' own exporter"
        " (GroupQueryAttention over a cache of fixed size).",
        "",
        f"| KV heads | context | {' | '.join(names)} |",
        "|---:|" + "---:|" * (len(names) + 1),
    ]
    for result in results["results"]:
        for context, row in by_context(result):
            base = row.get("transformers", row["original"])["cpu"]
            shown = (f"{row[n]['cpu']:.2f} (x{row[n]['cpu'] / base:.2f})" for n in names)
            lines.append(f"| {result['kv_heads']} | {context} | {' | '.join(shown)} |")
        size = (str(result["cache_bytes_per_token"][n]) for n in names)
        lines.append(f"| {result['kv_heads']} | cache bytes/token | {' | '.join(size)} |")
    return "\n".join([*lines, "", decode_verdict(results)])


def by_context(result: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The measured rows of one model, short contexts first."""
    return sorted((int(context), row) for context, row in result["ms_per_token"].items())


def decode_verdict(results: dict[str, Any]) -> str:
    """What the ratios to transformers' export amount to, the bad ones included."""
    parts = []
    names = dict.fromkeys(
        name
        for result in results["results"]
        for _, row in by_context(result)
        for name in row
        if not name.startswith("transformers")
    )
    for variant in sorted(names):
        ratios = {
            f"{result['kv_heads']} KV heads, {context} tokens": row[variant]["cpu"]
            / row["transformers"]["cpu"]
            for result in results["results"]
            for context, row in by_context(result)
            if variant in row and "transformers" in row
        }
        if not ratios:  # that exporter failed; the JSON says how
            continue
        worst = max(ratios, key=lambda cell: ratios[cell])
        faster = sum(ratio <= 1 for ratio in ratios.values())
        parts.append(
            f"`{variant}` in {faster} of {len(ratios)} cells (worst x{ratios[worst]:.2f}: {worst})"
        )
    return f"As fast as `transformers` or faster: {'; '.join(parts)}."


def sparse_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/sparse_cpu.py` as Markdown."""
    what = (
        "`reattend::sparse_attention`, batch 1, float32, 8 heads of 64, 4 sinks and a window of 256"
        " (dense heads where the name says so)"
    )
    return peers_table(results, what, ("sdpa-mask", "sdpa-causal", "flex"))


def routed_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/routed_cpu.py` as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    shares = list(results["rows"][0]["routed"])
    lines = [
        f"CPU, {results['threads']} thread, {results['date']}, {versions},"
        f" `{results['command']}`: processor ms of attention, batch 1, float32; in brackets"
        " how many times faster that is than all heads in SDPA, and the share of keys"
        " and values read. FLOPs counted are exactly the share of the heads.",
        "",
        f"| problem | SDPA, all heads | {' | '.join(f'ours, {s} used' for s in shares)} |",
        "|---|" + "---:|" * (len(shares) + 1),
    ]
    for row in results["rows"]:
        shown = []
        for share in shares:
            cell = row["routed"][share]
            read = "" if cell["kv_bytes"] is None else f", {cell['kv_bytes']:.0%}"
            shown.append(f"{digits(cell['cpu_ms'])} (x{cell['times_faster']:.2f}{read})")
        lines.append(f"| {row['case']} | {digits(row['dense']['cpu_ms'])} | {' | '.join(shown)} |")
    return "\n".join(lines)


def linear_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/linear_cpu.py` as Markdown."""
    return softmax_table(results, "attention", ("sdpa", "causal softmax attention in SDPA"))


def onnx_linear_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/onnx_linear.py` as Markdown."""
    what = "one layer's attention in ONNX Runtime, states and feature maps included"
    return softmax_table(results, what, ("gqa", "the softmax original, GroupQueryAttention"))


def onnx_presets_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/onnx_presets.py` as Markdown."""
    what = "two whole layers in ONNX Runtime, projections included"
    return softmax_table(results, what, ("original", "the original with GroupQueryAttention"))


def softmax_table(results: dict[str, Any], what: str, base: tuple[str, str]) -> str:
    """Rows of `ms` and `times_faster` than one of them, `base`: its name and words for it."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    names = list(results["rows"][0]["times_faster"])
    lines = [
        f"CPU, {results['threads']} thread, {results['date']}, {versions},"
        f" `{results['command']}`: processor ms of {what}, batch 1, float32, 8 query heads of 64;"
        f" in brackets how many times faster that is than {base[1]}.",
        "",
        f"| problem | {base[0]} | {' | '.join(names)} |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for row in results["rows"]:
        ms, ratio = row["ms"], row["times_faster"]
        shown = [
            f"{digits(ms[name]['cpu_ms'])} (x{ratio[name]:.2f})" if name in ratio else ""
            for name in names
        ]
        lines.append(f"| {row['case']} | {digits(ms[base[0]]['cpu_ms'])} | {' | '.join(shown)} |")
    return "\n".join(lines)


def onnx_sparse_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/onnx_sparse.py` as Markdown."""
    what = (
        "one layer's attention in ONNX Runtime, batch 1, float32, 8 heads of 64 (4 sinks and a"
        " window of 256; elastic, s2 and power as in the plans)"
    )
    return peers_table(results, what, ("mask", "causal", "gqa", "gqa-window"))


def onnx_encoder_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/onnx_encoder.py` as Markdown."""
    what = (
        "one layer's attention over 4096 tokens in ONNX Runtime, no states, batch 1, float32, 8"
        " heads of 64; mask: our node under a mask, theirs: the standard operator under it"
    )
    return peers_table(results, what, ("mask", "theirs", "full"))


def onnx_selected_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/onnx_selected.py` as Markdown."""
    what = (
        "one layer's attention to one decoded token, or to 512 new ones, in ONNX Runtime, states"
        " written, batch 1, float32, 8 heads of 64, selectors as in the plans of these names"
    )
    return peers_table(results, what, ("dense", "gqa"))


def onnx_routed_table(results: dict[str, Any]) -> str:
    """The results of `python kernels/bench/onnx_routed.py` as Markdown."""
    what = (
        "one layer's attention in ONNX Runtime, batch 1, float32, 32 heads of 64; ours: the"
        " gathered body, dense: all heads computed and hidden, which is what calls of up to 16"
        " queries take"
    )
    return peers_table(results, what, ("dense", "gqa"))


def digits(ms: float) -> str:
    """Milliseconds for people."""
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def peers_table(results: dict[str, Any], what: str, peers: tuple[str, ...]) -> str:
    """Rows of `ms` and `times_faster` on a CPU."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines = [
        f"CPU, {results['threads']} thread, {results['date']}, {versions},"
        f" `{results['command']}`: processor ms of {what}; in brackets how many times faster ours"
        " is.",
        "",
        f"| problem | density | ours | {' | '.join(peers)} |",
        "|---|" + "---:|" * (len(peers) + 2),
    ]
    for row in results["rows"]:
        ms, ratio = row["ms"], row["times_faster"]
        shown = [
            f"{digits(ms[name]['cpu_ms'])} (x{ratio[name]:.2f})" if name in ms else ""
            for name in peers
        ]
        first = f"| {row['case']} | {row['density']:.1%} | {digits(ms['ours']['cpu_ms'])} | "
        lines.append(first + " | ".join(shown) + " |")
    return "\n".join(lines)
