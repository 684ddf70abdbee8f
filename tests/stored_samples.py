"""How the samples in `tests/data` were made: one of every format that reattend writes.

    python tests/stored_samples.py

writes what is missing there, each under the number of the format that today's code writes. A
sample that exists is never written again: it stands for the files that users already have.

    plan-1.yaml        every key of a plan (written by hand)
    report-1.json      a report; every number in it is made up
    run-1.json         times and memory
    out-1/             a finished output folder with its fingerprint.json; the hashes are made up
    checkpoint-1/      a Llama with mixed and with latent layers
    around-1/          a Llama whose layer is written out: programs around the mixer
    graph-1/           a module that is not from transformers, rewritten as a graph
    onnx-1/            the Llama of checkpoint-1 as ONNX with its manifest, operator domain 1
    logits-1/          what these computed when they were written
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import around_models
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
IDS = torch.tensor([[5, 9, 13, 21, 3, 30, 11], [7, 8, 6, 2, 19, 4, 4]])
#: the names of the checkpoints, with their input
CHECKPOINTS = ("checkpoint", "around", "graph")
MIXED = {
    "rules": [
        {"layers": [0], "heads": [1], "to": "mla", "kv_lora_rank": 6, "qk_rope_head_dim": 2},
        {"layers": [0], "to": "dense"},
        {"sites": "*", "to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 4},
    ]
}
MLA = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 4}]}


class Inline(nn.Module):
    """Attention that no submodule holds: loading it needs this class as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


def inline() -> Inline:
    torch.manual_seed(0)
    return Inline().eval()


def logits(model: Any, name: str) -> Tensor:
    """[2, 7, V] for the sample's input."""
    with torch.no_grad():
        return model(ids=IDS) if name == "graph" else model(IDS, use_cache=False).logits


def converted(name: str) -> Any:
    """What is stored as the checkpoint of this name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from reattend import convert

    if name == "graph":
        data = [{"ids": torch.randint(0, 32, (4, 24))}]
        rule = {"sites": "*", "to": "mla", "kv_lora_rank": 12, "qk_rope_head_dim": 0}
        return convert(inline(), plan={"rules": [rule]}, inputs={"ids": IDS}, data=data).model
    torch.manual_seed(0)
    if name == "around":
        model = around_models.llama(around_models.InlinedLayer)
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
        return convert(model, plan=MLA, data=torch.randint(3, 97, (8, 40))).model
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    data = torch.randint(3, 32, (8, 40))
    return convert(LlamaForCausalLM(config).eval(), plan=MIXED, data=data).model


def write_run(path: Path) -> None:
    from reattend.report import Run
    from reattend.report.run import StageRun

    stages = (
        StageRun(name="statistics", seconds=1.5, peak_bytes_predicted=1200, peak_bytes=1100),
        StageRun(name="layerwise", seconds=9.0, reused=True),
    )
    run = Run(
        started="2001-02-03T04:05:06Z", finished="2001-02-03T04:06:07Z", host="synthetic",
        platform="Linux", device="cpu", threads=2, command=("convert", "model"),
        paths={"out": "somewhere"}, stages=stages,
    )  # fmt: skip
    path.write_bytes(run.to_json().encode())


INPUTS = {"weights": "0" * 64, "plan": "1" * 64, "data": "none", "seed": "0", "reattend": "0.1.0"}


def write_out(folder: Path) -> None:
    from reattend.workdir import Workdir

    with Workdir.open(folder, INPUTS) as work:
        work.publish_bytes("plan.json", b"{}\n")
        work.publish_bytes("run.json", b"{}\n")
        work.finish()


def write_checkpoint(name: str, folder: Path, number: int) -> None:
    from reattend.publishing import write_checkpoint as write

    model = converted(name)
    folder.mkdir()
    write(model, None, folder)
    expected = folder.parent / f"logits-{number}"
    expected.mkdir(exist_ok=True)
    save_file({"logits": logits(model, name)}, expected / f"{name}.safetensors")


def write_onnx(folder: Path, checkpoint: Path) -> None:
    from reattend import export

    with tempfile.TemporaryDirectory() as made:
        artifact = export(checkpoint, out=Path(made) / "out")
        folder.mkdir()
        for file in ("manifest.json", "model.onnx", "model.onnx.data"):
            (folder / file).write_bytes((artifact.path / file).read_bytes())


def stored_logits(folder: Path, name: str) -> Tensor:
    return load_file(folder / f"{name}.safetensors")["logits"]


def main() -> None:
    from reattend.install.stored import FORMAT
    from reattend.outdir import VERSION
    from reattend.report.run import SCHEMA as RUN
    from reattend.targets.onnx.manifest import SCHEMA as MANIFEST

    torch.set_num_threads(1)
    if not (run := DATA / f"run-{RUN}.json").exists():
        write_run(run)
    if not (out := DATA / f"out-{VERSION}").exists():
        write_out(out)
    for name in CHECKPOINTS:
        if not (folder := DATA / f"{name}-{FORMAT}").exists():
            write_checkpoint(name, folder, FORMAT)
    if not (onnx := DATA / f"onnx-{MANIFEST}").exists():
        write_onnx(onnx, DATA / f"checkpoint-{FORMAT}")


if __name__ == "__main__":
    main()
