"""Time and memory of finding attention in 7B shapes, without weights and with weights on disk.

    python examples/find_scale.py --out examples/results/find_scale.json

Every row is a process of its own. `peak_gib` is its largest resident memory; `anonymous_gib` leaves
out pages of files. `seconds` go by on a machine that does other things too; `cpu_seconds` are
this process's. Weights on disk are opened by `find_attention` itself, which gives their pages
back (`converter/pages.py`): 32 layers take the memory of 8.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_ON_DISK = ((4, 2048), (8, 2048), (32, 2048), (8, 1024), (32, 1024))  # layers, width
GIB = 2.0**20  # of the kernel's kilobytes


def main() -> int:
    """Measure every row and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--row", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.row:
        print(json.dumps(measure(json.loads(given.row), given.threads)))
        return 0
    import torch
    import transformers

    table = [alone({"layers": n, "width": 4096}, given) for n in (2, 8, 32)]
    for layers, width in _ON_DISK:
        with tempfile.TemporaryDirectory() as folder:
            stored(layers, width, Path(folder))
            table.append(alone({"layers": layers, "width": width, "folder": folder}, given))
    result = {
        "command": "python examples/find_scale.py --out examples/results/find_scale.json",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": given.threads,
        "shape": "LlamaConfig: hidden `width`, MLP 2.69 times as wide, heads of 128, vocabulary "
        "32000, bfloat16",
        "rows": table,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def alone(row: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """One row in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", json.dumps(row)]
    command += ["--out", str(given.out), "--threads", str(given.threads)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    print(measured, flush=True)
    return measured


def measure(row: dict[str, Any], threads: int) -> dict[str, Any]:
    """Find the attention of one model, and what that took."""
    import torch
    import transformers

    from reattend import find_attention
    from reattend.hollow import empty

    torch.set_num_threads(threads)
    peak = Anonymous()
    begin, used = time.perf_counter(), time.process_time()
    model = empty(transformers.LlamaForCausalLM, config(row["layers"], row["width"]))
    found = find_attention(row.get("folder") or model)
    return {
        "layers": row["layers"],
        "width": row["width"],
        "weights": "safetensors on disk" if row.get("folder") else "meta",
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(found.sites),
        "verified": sum(s.verified for s in found.sites),
        "deferred": sum(bool(s.deferred) for s in found.sites),
        "refused": len(found.refused),
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "peak_gib": round(status("VmHWM") / GIB, 2),
        "anonymous_gib": round(peak.stop() / GIB, 2),
    }


def config(layers: int, width: int) -> Any:
    """Llama 2 7B's shape (width 4096), or a narrower one."""
    import transformers

    return transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=11008 * width // 4096,
        num_attention_heads=width // 128, num_key_value_heads=width // 128, dtype="bfloat16",
    )  # fmt: skip


def stored(layers: int, width: int, folder: Path) -> None:
    """A checkpoint of that shape with stand-ins for weights."""
    import torch
    import transformers
    from torch import nn

    from reattend.hollow import empty, stand_in

    torch.set_default_dtype(torch.bfloat16)
    model = empty(transformers.LlamaForCausalLM, config(layers, width))
    for number, (name, weight) in enumerate(list(model.named_parameters())):
        where, _, leaf = name.rpartition(".")
        made = stand_in(weight, number).clone(memory_format=torch.contiguous_format)
        setattr(model.get_submodule(where), leaf, nn.Parameter(made, requires_grad=False))
    model.save_pretrained(folder)  # type: ignore[operator]
    torch.set_default_dtype(torch.float32)


def status(name: str) -> int:
    """A number of this process as the kernel knows it, in kilobytes (not its parent's peak)."""
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith(name))
    return int(line.split()[1])


class Anonymous:
    """The largest anonymous memory of this process, looked at twenty times a second."""

    def __init__(self) -> None:
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, status("RssAnon"))

    def stop(self) -> int:
        """In kilobytes."""
        self.done.set()
        self.thread.join()
        return self.peak


if __name__ == "__main__":
    raise SystemExit(main())
