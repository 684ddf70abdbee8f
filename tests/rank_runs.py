"""Calibrations of a tiny model in several processes: `python rank_runs.py FOLDER NAME...` is one.

A run is named after its form (`RUNS`); `NAME@400` dies at 400 tokens of the end-to-end stage, and
`convert` is the command line, twice. One start of the processes makes all the runs it is asked for.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: whether the weights are shared out, and the LoRA rank (0: full weights)
RUNS = {"replicated": (False, 0), "whole": (True, 0), "killed": (True, 0), "lora": (True, 2)}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
DEAD = 9


def teacher() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
        initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_student(folder: Path) -> None:
    """The normal form of the teacher's blocks, moved away from it."""
    from reattend import convert
    from reattend.calibrate.working import mixer_parameters

    student = convert(teacher(), plan="identity").model
    for parameter in mixer_parameters(student).values():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    student.save_pretrained(folder)


def calibrated(folder: Path, name: str, lora: int, die: int = 0) -> None:
    """Train, and save what every process holds afterwards to `NAME.RANK.safetensors`."""
    from reattend import load
    from reattend.calibrate import calibrate
    from reattend.data import Dataset
    from reattend.plan_sections import Calibrate
    from reattend.workdir import Workdir

    order = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (33, 12), generator=order)
    mask = torch.ones_like(ids)
    mask[::3, 7:] = 0
    data = Dataset([{"input_ids": ids, "attention_mask": mask}], description="random")
    rank, told = os.environ.get("RANK", "0"), []

    def tell(event: Any) -> None:
        told.append(event)
        if event.stage == "end-to-end" and die and event.done >= die:
            os._exit(DEAD)

    settings = Calibrate(tokens=1000, batch_size=4, lora_rank=lora or None)
    work = Workdir.open(folder / name, {}) if rank == "0" else None
    student = load(folder / "student")
    results = calibrate(teacher(), student, data, settings, seed=0, on_event=tell, workdir=work)
    assert bool(told) == (rank == "0")
    stored = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    if told:
        stored |= {f"loss/{r.name}": torch.tensor(r.loss[-1][1]) for r in results}
        resumed = next(e.done for e in told if e.stage == "end-to-end")
        stored["resumed_at"] = torch.tensor(resumed)
    save_file(stored, folder / f"{name}.{rank}.safetensors")


def convert(folder: Path) -> None:
    """`reattend convert` with `arguments.json`, and again; `convert.RANK.json`: what it printed."""
    from typer.testing import CliRunner

    from reattend.cli import app

    arguments, told = json.loads((folder / "arguments.json").read_text()), []
    for _ in range(2):
        done = CliRunner().invoke(app, ["convert", *arguments, "--out", str(folder / "converted")])
        assert done.exit_code == 0, done.output
        told.append(done.stdout)
    (folder / f"convert.{os.environ['RANK']}.json").write_text(json.dumps(told))


def launch(folder: Path, *names: str) -> None:
    """Two processes under torchrun that make these runs together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, folder, *names], env={**os.environ, **QUIET},
        timeout=240, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:6000] + done.stderr[-3000:]


def launch_to_die(folder: Path, *names: str) -> None:
    """The same, the last run killed; without torchrun, which starts twice as slowly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {**QUIET, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in ("0", "1"):
        environment = {**os.environ, **given, "RANK": rank, "LOCAL_RANK": rank}
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(folder), *names]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    try:
        first = started[0].wait(240)
    finally:
        for process in started:
            process.kill()
    told = "".join((folder / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    assert first == DEAD, told


def main(folder: Path, names: list[str]) -> None:
    from reattend.calibrate import end_to_end, shards

    torch.set_num_threads(1)
    shares: list[float] = []

    def unshard(model: Any) -> None:
        shares.extend(p.to_local().numel() / p.numel() for p in model.parameters())
        shards.unshard(model)

    end_to_end.unshard = unshard
    for asked in names:
        name, _, die = asked.partition("@")
        sharded, lora = RUNS.get(name, (True, 0))
        shares.clear()
        for key, value in FSDP.items():
            os.environ.pop(key, None)
            if sharded:
                os.environ[key] = value
        if name == "convert":
            convert(folder)
        else:
            calibrated(folder, name, lora, int(die or 0))
        if sharded:  # a share of nearly every parameter, never all of one
            assert shares and sum(shares) / len(shares) < 0.6 and max(shares) < 1, shares
        else:
            assert not shares


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    torch.distributed.destroy_process_group()
