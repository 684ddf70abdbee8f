"""Memory and seconds of converting a 1B-shaped model on the CPU, stage by stage.

    OMP_NUM_THREADS=1 python examples/memory.py --out examples/results/memory.json

The model is random: sizes are those of Llama 3.2 1B (16 layers, hidden 2048, 8 key/value heads of
64, vocabulary 128256), in bfloat16. Memory does not depend on the number of tokens, so few are
read. Beside what was measured stands the limit set for a conversion, weights + 2 layers +
statistics, and, computed, what it would take to keep all activations, as the published
implementation does before it solves. `--table` prints the table of the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import campaign

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
#: fixed sizes: `auto` ones would measure every layer at many sizes, which takes hours here
RULE = {"sites": "*", "to": "mla", "kv_keep": 0.5}
#: tokens the published implementation reads by default: 128 rows of 256
PUBLISHED_TOKENS = 128 * 256
MIB = 1 << 20


def make(folder: Path) -> None:
    """The random model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.to_empty(device="cpu")
    model.tie_weights()
    noise = torch.randn(1 << 22) * 0.02  # every tensor begins elsewhere in it
    for number, parameter in enumerate(model.parameters()):
        parts = parameter.data.flatten().split(len(noise))
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
            continue
        for place, part in enumerate(parts):
            part.copy_(noise.roll(977 * number + 61 * place)[: len(part)])
    rotary = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1, "vocab_size": 8}))
    model.model.rotary_emb = rotary.model.rotary_emb
    model.save_pretrained(folder)


def convert(folder: Path, out: Path, rows: int, seq_len: int) -> dict[str, Any]:
    """Convert in this process; what `run.json` holds of it, and sizes."""
    import torch
    import transformers

    import reattend
    import reattend.targets.huggingface  # (loaded code is no growth)

    transformers.utils.logging.disable_progress_bar()
    plan = {"rules": [RULE], "calibrate": {"statistics_tokens": rows * seq_len, "seq_len": seq_len}}
    order = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (rows, seq_len), generator=order)
    run = reattend.convert(str(folder), plan, data=ids, out=out).run
    assert run is not None
    stages = [
        {"name": s.name, "seconds": round(s.seconds, 1), "bytes": s.peak_bytes - run.baseline_bytes}
        for s in run.stages
        if s.peak_bytes is not None
    ]
    return {"baseline": run.baseline_bytes, "stages": stages, "threads": run.threads}


def child(*words: object) -> str:
    """This script in a process of its own, so that nothing it leaves behind is counted."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
    )  # fmt: skip
    return done.stdout


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of weights, of one layer, and of the statistics that `mla` wants, from shapes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from reattend import find_attention
    from reattend.plan import Plan
    from reattend.predict_statistics import moments_bytes
    from reattend.preflight import preflight

    small = {**SHAPE, "num_hidden_layers": 1, "vocab_size": 64}
    with torch.device("cpu"):
        one = LlamaForCausalLM(LlamaConfig(**small)).to(torch.bfloat16)
    (choice,) = preflight(find_attention(one), Plan.load({"rules": [RULE]}))
    layer = sum(p.numel() * p.element_size() for p in one.model.layers[0].parameters())
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    layers = SHAPE["num_hidden_layers"]
    return {"weights": weights, "layer": layer, "statistics": layers * moments_bytes(choice)}


def activations(tokens: int) -> int:
    """Bytes of the keys, values and queries of all layers for that many tokens, as stored."""
    groups, heads, d = (
        SHAPE[k] for k in ("num_key_value_heads", "num_attention_heads", "head_dim")
    )
    return 2 * tokens * SHAPE["num_hidden_layers"] * (2 * groups + heads) * d


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    known, tokens = results["sizes"], results["rows"] * results["seq_len"]
    limit = known["weights"] + 2 * known["layer"] + known["statistics"]
    lines = ["| stage | seconds | peak memory |", "|---|---|---|"]
    for stage in results["stages"]:
        lines.append(f"| {stage['name']} | {stage['seconds']:.1f} | {_mib(stage['bytes'])} |")
    worst = max(results["stages"], key=lambda stage: stage["bytes"])
    seconds = sum(stage["seconds"] for stage in results["stages"])
    lines += [
        f"| whole run | {seconds:.1f} | {_mib(worst['bytes'])} |",
        f"| limit: weights + 2 layers + statistics | | {_mib(limit)} |",
        f"| published: all activations kept, {PUBLISHED_TOKENS:,} tokens (computed) | the same "
        f"passes | {_mib(known['weights'] + activations(PUBLISHED_TOKENS))} |",
        f"| likewise, 262,144 tokens (computed) | the same passes | "
        f"{_mib(known['weights'] + activations(1 << 18))} |",
        "",
        f"A random model of the sizes of Llama 3.2 1B, bfloat16, to `mla` at {RULE['kv_keep']:g} "
        f"of the cache with fixed sizes; {results['date']}, {results['device']}, other processes "
        f"beside it. Text: {tokens:,} tokens in rows of {results['seq_len']}, an eighth of them "
        f"held back to measure on, the others for statistics. Memory: "
        f"over the process before the model is opened ({_mib(results['baseline'])}). Weights "
        f"{_mib(known['weights'])}, a layer {_mib(known['layer'])}, statistics "
        f"{_mib(known['statistics'])} whatever the number of tokens. Command: "
        f"`{results['command']}`",
    ]
    return "\n".join(lines)


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("memory.work"), help="5 GiB go here")
    parser.add_argument("--out", type=Path, default=Path("examples/results/memory.json"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--table", action="store_true", help="print the table of the file")
    parser.add_argument("--step", choices=("make", "convert"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    model = args.work / "model"
    if args.table:
        print(table(json.loads(args.out.read_text())))
        return 0
    if args.step == "make":
        make(model)
        return 0
    if args.step == "convert":
        print(json.dumps(convert(model, args.work / "out", args.rows, args.seq_len)))
        return 0
    shape = ["--work", args.work, "--rows", args.rows, "--seq-len", args.seq_len]
    if not (model / "config.json").exists():
        child("--step", "make", *shape)
    found = json.loads(child("--step", "convert", *shape).splitlines()[-1])
    results = {
        "schema": 1,
        "date": datetime.date.today().isoformat(),
        "device": f"cpu, {found['threads']} thread(s)",
        "versions": campaign.versions(),
        "command": f"python examples/memory.py --rows {args.rows} --seq-len {args.seq_len}",
        "rows": args.rows,
        "seq_len": args.seq_len,
        "sizes": sizes(model),
        **found,
    }
    campaign.write(args.out, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
