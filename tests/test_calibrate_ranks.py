"""Two processes (gloo) calibrate to what one process calibrates to, replicated and sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reattend.calibrate import shards
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.stream import Batch
from reattend.errors import ArgumentError

State = dict[str, torch.Tensor]
SCRIPT = """
import copy, os, sys, torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from reattend.calibrate import calibrate, shards
from reattend.data import Dataset
from reattend.finder import find_attention
from reattend.install.adapter import install, replace_module
from reattend.plan_sections import Calibrate
from reattend.weights import build_dense
from reattend.workdir import Workdir

torch.set_num_threads(1)
torch.manual_seed(5)
config = LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                     tie_word_embeddings=True, initializer_range=0.25)
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
folder, lora, die = sys.argv[1], int(sys.argv[2]) or None, int(sys.argv[3])
rank = os.environ.get("RANK", "0")
told, shares = [], []
unshard = shards.unshard

def look_before(model):
    for p in model.parameters():
        shares.append(p.to_local().numel() / p.numel())
    unshard(model)

import reattend.calibrate.end_to_end
reattend.calibrate.end_to_end.unshard = look_before

def tell(event):
    told.append(event)
    if event.stage == "end-to-end" and die and event.done >= die:
        os._exit(9)

settings = Calibrate(tokens=1000, batch_size=4, lora_rank=lora)
work = Workdir.open(f"{folder}/out", {}) if rank == "0" else None
results = calibrate(teacher, student, data, settings, seed=0, on_event=tell, workdir=work)
assert bool(told) == (rank == "0")
if "WORLD_SIZE" in os.environ and os.environ.get("ACCELERATE_USE_FSDP"):
    # a share of nearly every parameter, never all of one
    assert shares and sum(shares) / len(shares) < 0.6 and max(shares) < 1, shares
else:
    assert not shares
resumed_at = next(e.done for e in told if e.stage == "end-to-end") if told else 0
losses = {f"loss/{r.name}": torch.tensor(r.loss[-1][1]) for r in results if rank == "0"}
save_file({**{n: t.clone() for n, t in student.state_dict().items()}, **losses,
           "resumed_at": torch.tensor(resumed_at)}, f"{folder}/{rank}.safetensors")
if "WORLD_SIZE" in os.environ:
    torch.distributed.destroy_process_group()
"""


def launch(
    folder: Path, world: int, *, sharded: bool = False, lora: int = 0, die: int = 0
) -> tuple[int, str]:
    """Exit status and messages; under torchrun where there are several processes."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    done = subprocess.run(
        [sys.executable, *(several if world > 1 else []), script, folder, str(lora), str(die)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **fsdp},
        timeout=240, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stderr


def run(folder: Path, world: int, *, sharded: bool = False, lora: int = 0) -> list[State]:
    code, told = launch(folder, world, sharded=sharded, lora=lora)
    assert code == 0, told[:6000] + told[-3000:]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], State]:
    """What one process makes, by LoRA rank (0: full weights)."""
    made: dict[int, State] = {}

    def get(lora: int) -> State:
        if lora not in made:
            made[lora] = run(tmp_path_factory.mktemp("alone") / "one", 1, lora=lora)[0]
        return made[lora]

    return get


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], list[State]]:
    """What two processes make, by whether they share the weights out, and LoRA rank."""
    made: dict[tuple[bool, int], list[State]] = {}

    def get(sharded: bool, lora: int) -> list[State]:
        asked = sharded, lora
        if asked not in made:
            made[asked] = run(tmp_path_factory.mktemp("two") / "all", 2, sharded=sharded, lora=lora)
        return made[asked]

    return get


def assert_same_up_to_rounding(got: list[State], expected: State) -> None:
    for name, tensor in expected.items():
        if name == "resumed_at":
            continue
        torch.testing.assert_close(got[0][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        if not name.startswith("loss/"):
            assert torch.equal(got[0][name], got[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("sharded", "lora"), [(False, 0), (True, 0), (True, 2)])
def test_two_processes_equal_one(
    sharded: bool,
    lora: int,
    alone: Callable[[int], State],
    together: Callable[[bool, int], list[State]],
) -> None:
    assert_same_up_to_rounding(together(sharded, lora), alone(lora))


@pytest.mark.slow
def test_sharded_and_killed_it_resumes_from_one_ordinary_checkpoint(
    alone: Callable[[int], State],
    together: Callable[[bool, int], list[State]],
    tmp_path: Path,
) -> None:
    whole = together(True, 0)
    code, _ = launch(tmp_path / "two", 2, sharded=True, die=400)
    assert code != 0
    work = tmp_path / "two" / "out.partial" / "work" / "calibrate"
    slot = json.loads((work / "end-to-end.json").read_text())["slot"]
    stored = load_file(work / f"end-to-end.{slot}.safetensors")
    weights = {n.removeprefix("weight/"): t for n, t in stored.items() if n.startswith("weight/")}
    assert weights
    for name, tensor in weights.items():  # whole, as one process would have written them
        assert tensor.shape == alone(0)[name].shape
        assert stored[f"mean/{name}"].shape == stored[f"square/{name}"].shape == tensor.shape
        assert bool(stored[f"mean/{name}"].any()), name
    both = run(tmp_path / "two", 2, sharded=True)
    assert int(both[0]["resumed_at"]) > 100
    for name, tensor in whole[0].items():
        if name != "resumed_at":
            assert torch.equal(both[0][name], tensor), name


@pytest.mark.slow
def test_convert_under_torchrun_publishes_once(
    tiny_path: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """The command line as a user starts it: one result, like that of one process; again: done."""
    plan = tmp_path / "plan.yaml"
    calibrate = {"seq_len": 64, "statistics_tokens": 1024, "tokens": 1200, "batch_size": 4}
    rules = [{"sites": "*", "to": "mla", "kv_keep": 0.5}]
    plan.write_text(json.dumps({"version": 1, "rules": rules, "calibrate": calibrate}))

    def convert(out: Path, before: list[str], **environment: str) -> str:
        done = subprocess.run(
            [
                sys.executable, *before, "-m", "reattend", "convert", tiny_path, "--plan", plan,
                "--data", tiny_text, "--out", out, "--json",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=240,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    told = convert(tmp_path / "two", torchrun, **fsdp)
    assert json.loads(told)["totals"]["converted"] == 2  # one report, not one per process
    convert(tmp_path / "one", [])
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert convert(tmp_path / "two", torchrun, **fsdp) == told
    assert {p.name for p in tmp_path.iterdir()} == {"plan.yaml", "one", "two"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "FSDP2 only"),
        ({"FSDP_VERSION": "1"}, "FSDP2 only"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=false"),
    ],
)
def test_other_forms_of_fsdp_are_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    assert not shards.wanted()
    for name, value in {"ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=message):
        shards.wanted()


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
