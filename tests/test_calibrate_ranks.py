"""Two processes (gloo) calibrate to what one process calibrates to, replicated and sharded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import rank_runs
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from reattend.calibrate import shards
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.stream import Batch
from reattend.cli import app
from reattend.errors import ArgumentError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_text: Path) -> Path:
    """What two processes made in every form, the checkpoint of a killed run (`checkpoint`), and
    what one process makes (`alone`, `alone-lora`).
    """
    root = tmp_path_factory.mktemp("ranks")
    rank_runs.save_student(root / "student")
    rank_runs.launch_to_die(root, "replicated", "lora", "killed@400")
    shutil.copytree(root / "killed.partial" / "work" / "calibrate", root / "checkpoint")
    calibrate = {"seq_len": 64, "statistics_tokens": 1024, "tokens": 1200, "batch_size": 4}
    rules = [{"sites": "*", "to": "mla", "kv_keep": 0.5}]
    plan = root / "plan.yaml"
    plan.write_text(json.dumps({"version": 1, "rules": rules, "calibrate": calibrate}))
    arguments = [tiny_path, "--plan", plan, "--data", tiny_text, "--json"]
    (root / "arguments.json").write_text(json.dumps([str(word) for word in arguments]))
    rank_runs.launch(root, "killed", "whole", "convert")
    rank_runs.calibrated(root, "alone", 0)
    rank_runs.calibrated(root, "alone-lora", 2)
    return root


def made(folder: Path, name: str) -> State:
    """The trained weights of a run, equal in both processes; losses and the start of the second
    stage are the first one's.
    """
    first = load_file(folder / f"{name}.0.safetensors")
    for key, tensor in load_file(folder / f"{name}.1.safetensors").items():
        assert torch.equal(tensor, first[key]), key
    return first


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replicated", "whole", "lora"])
def test_two_processes_equal_one(name: str, folder: Path) -> None:
    together = made(folder, name)
    alone = load_file(folder / f"alone{'-lora' if name == 'lora' else ''}.0.safetensors")
    assert together.keys() == alone.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
def test_sharded_and_killed_it_resumes_from_one_ordinary_checkpoint(folder: Path) -> None:
    alone = load_file(folder / "alone.0.safetensors")
    slot = json.loads((folder / "checkpoint" / "end-to-end.json").read_text())["slot"]
    stored = load_file(folder / "checkpoint" / f"end-to-end.{slot}.safetensors")
    weights = {n.removeprefix("weight/"): t for n, t in stored.items() if n.startswith("weight/")}
    assert weights
    for name, tensor in weights.items():  # whole, as one process would have written them
        assert tensor.shape == alone[name].shape
        assert stored[f"mean/{name}"].shape == stored[f"square/{name}"].shape == tensor.shape
        assert bool(stored[f"mean/{name}"].any()), name
    whole, resumed = made(folder, "whole"), made(folder, "killed")
    assert int(resumed.pop("resumed_at")) > 100 > int(whole.pop("resumed_at"))
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.slow
def test_the_command_line_publishes_once(folder: Path, tmp_path: Path) -> None:
    """One result, like that of one process; again: nothing to do."""
    told, silence = (json.loads((folder / f"convert.{rank}.json").read_text()) for rank in (0, 1))
    assert json.loads(told[0])["totals"]["converted"] == 2  # one report, not one per process
    assert told[1] == told[0] and not any(silence)
    arguments = json.loads((folder / "arguments.json").read_text())
    alone = CliRunner().invoke(app, ["convert", *arguments, "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    one, two = (
        load_file(f / "model.safetensors") for f in (tmp_path / "one", folder / "converted")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert json.loads((folder / "converted" / "run.json").read_text())["processes"] == 2
    assert not (folder / "converted.partial").exists()


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
