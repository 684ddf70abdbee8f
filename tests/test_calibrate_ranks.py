"""Two processes (gloo) calibrate to what one process calibrates to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reattend.calibrate.ranks import Ranks
from reattend.calibrate.stream import Batch

SCRIPT = """
import copy, os, sys, torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from reattend.calibrate import calibrate
from reattend.data import Dataset
from reattend.finder import find_attention
from reattend.install.adapter import install, replace_module
from reattend.plan_sections import Calibrate
from reattend.weights import build_dense

torch.set_num_threads(1)
torch.manual_seed(5)
config = LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                     initializer_range=0.25)
teacher = LlamaForCausalLM(config).eval()
student = copy.deepcopy(teacher)
for site in find_attention(teacher).sites:
    look = dict(teacher.named_parameters()).__getitem__
    mixer = build_dense(site.spec, look, site.hidden_size, site.memory_size, copy=True)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    old = student.get_submodule(site.path)
    replace_module(student, site.path, install(old, mixer, site.binding))
ids = torch.randint(1, 61, (33, 12))
mask = torch.ones_like(ids)
mask[::3, 7:] = 0
data = Dataset([{"input_ids": ids, "attention_mask": mask}], description="random")
told = []
results = calibrate(teacher, student, data, Calibrate(tokens=1000, batch_size=4), seed=0,
                    on_event=told.append)
rank = os.environ.get("RANK", "0")
assert bool(told) == (rank == "0")
losses = {f"loss/{r.name}": torch.tensor(r.loss[-1][1]) for r in results}
save_file({**student.state_dict(), **losses}, f"{sys.argv[1]}/{rank}.safetensors")
if "WORLD_SIZE" in os.environ:
    torch.distributed.destroy_process_group()
"""


def run(folder: Path, world: int) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1"}
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in range(world):
        own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder)], env={**common, **own},
                stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for process in running:
        _, text = process.communicate(timeout=240)
        assert process.returncode == 0, text[-3000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    (alone,) = run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2)
    assert first.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        if not name.startswith("loss/"):
            assert torch.equal(first[name], second[name]), name


def test_rows_are_shared_out_without_loss_or_repetition() -> None:
    batch = Batch({"input_ids": torch.arange(5)[:, None]}, 5)
    ranks = Ranks(torch.device("cpu"))
    ranks.world = 3
    seen = []
    for rank in range(3):
        ranks.rank = rank
        inputs, silent = ranks.share(batch)
        assert not silent
        seen += inputs["input_ids"].flatten().tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_process_without_rows_runs_along_silently() -> None:
    ranks = Ranks(torch.device("cpu"))
    ranks.world, ranks.rank = 3, 2
    inputs, silent = ranks.share(Batch({"input_ids": torch.arange(2)[:, None]}, 2))
    assert silent
    assert len(inputs["input_ids"]) == 1
