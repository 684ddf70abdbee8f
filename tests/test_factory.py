"""`package.module:factory` and `file.py:factory` on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from reattend import load
from reattend.cli import app
from reattend.errors import ArgumentError, ModelError
from reattend.factory import build, names_factory, read_inputs

CODE = """
import torch
from neighbour import WIDTH
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.attn = Attention()
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids) + self.attn(self.embed(ids)))

def make():
    torch.manual_seed(1)
    return Model()

class Makers:
    make = staticmethod(make)

number = 3

def nothing():
    return 3

def failing():
    raise KeyError("no such size")

def asking(size):
    return Model()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 32\n")
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    ids = torch.arange(2 * 17).reshape(2, 17) % 50
    save_file({"ids": ids}, tmp_path / "inputs.safetensors")
    return tmp_path


def reattend(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("given", "yes"),
    [
        ("a.b:c", True), ("a:B.c", True), ("/x/y.py:make", True), ("./y.py:make", True),
        ("some/folder", False), ("org/name", False), ("y.py", False), ("a.b", False),
        ("org/name:make", False), ("a.b:", False), (":make", False), ("a b:c", False),
    ],
)  # fmt: skip
def test_only_the_explicit_spelling_names_code(given: str, yes: bool) -> None:
    assert names_factory(given) is yes


def test_a_folder_of_that_name_stays_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "os:getcwd").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not names_factory("os:getcwd")


def test_find_and_convert_a_hand_written_module(folder: Path) -> None:
    model = f"{folder / 'mine.py'}:make"
    before = list(sys.path)
    weights = build(model).state_dict()
    changed = {k: v + 1 for k, v in weights.items() if k != "head.weight"}  # tied to embed.weight
    save_file(changed, folder / "weights.safetensors")
    given = ["--inputs", folder / "inputs.safetensors"]
    found = reattend("find", model, *given, "--json")
    assert found.exit_code == 0, found.output
    assert [s["path"] for s in json.loads(found.stdout)["sites"]] == ["attn"]
    out = folder / "out"
    rule = "--set", "calibrate.statistics_tokens=64"
    done = reattend(
        "convert", model, *given, "--weights", folder / "weights.safetensors", "--plan",
        "identity", "--out", out, *rule,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    original = build(model, folder / "weights.safetensors")
    converted = load(out, model=build(model))
    ids = torch.arange(2 * 9).reshape(2, 9)
    with torch.no_grad():
        assert torch.allclose(converted(ids), original(ids), atol=1e-5)
        assert not torch.allclose(build(model)(ids), original(ids), atol=1e-2)
    assert sys.path == before


def test_statistics_come_from_a_batch_of_tensors(folder: Path) -> None:
    plan = folder / "plan.yaml"
    plan.write_text("version: 1\nrules: [{sites: '*', to: mla, kv_lora_rank: 24}]\n")
    done = reattend(
        "convert", f"{folder / 'mine.py'}:Makers.make", "--inputs", folder / "inputs.safetensors",
        "--data", folder / "inputs.safetensors", "--plan", plan, "--out", folder / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def test_a_module_by_its_dotted_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="there is no such module"):
        build("mine:make")
    monkeypatch.syspath_prepend(folder)
    assert type(build("mine:make")).__name__ == "Model"


WRONG = {
    "no such file": ("absent.py:make", "no such Python file"),
    "no such attribute": ("mine.py:mak", "did you mean 'make'"),
    "not callable": ("mine.py:number", "not callable"),
    "no module": ("mine.py:nothing", "returns a int"),
    "raises": ("mine.py:failing", "KeyError: 'no such size'"),
    "needs arguments": ("mine.py:asking", "called without arguments"),
    "import fails": ("broken.py:make", "ZeroDivisionError"),
    "import leaves": ("leaving.py:make", "SystemExit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_factories_are_named(folder: Path, case: str) -> None:
    spelled, words = WRONG[case]
    with pytest.raises(ArgumentError, match=words):
        build(f"{folder / spelled}")
    result = reattend("find", f"{folder / spelled}")
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_inputs_and_weights_must_fit(folder: Path) -> None:
    spelled = f"{folder / 'mine.py'}:make"
    model = build(spelled)
    result = reattend("find", spelled)
    assert result.exit_code == 2
    assert "--inputs FILE.safetensors" in result.stderr
    save_file({"idz": torch.zeros(2, 3)}, folder / "bad.safetensors")
    with pytest.raises(ArgumentError, match="did you mean 'ids'"):
        read_inputs(folder / "bad.safetensors", model)
    (folder / "cut.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(ArgumentError, match="not a readable safetensors file"):
        read_inputs(folder / "cut.safetensors", model)
    with pytest.raises(ModelError, match="the module has no idz"):
        build(spelled, folder / "bad.safetensors")
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    del whole["attn.out.bias"]
    save_file(whole, folder / "bad.safetensors")
    with pytest.raises(ModelError, match="it lacks attn.out.bias"):
        build(spelled, folder / "bad.safetensors")
    save_file({**whole, "attn.out.bias": torch.zeros(3)}, folder / "bad.safetensors")
    with pytest.raises(ModelError, match=r"attn.out.bias is \(3,\), the module's \(32,\)"):
        build(spelled, folder / "bad.safetensors")


def test_weights_are_for_factories_only(tiny_path: Path, folder: Path) -> None:
    result = reattend("find", tiny_path, "--weights", folder / "inputs.safetensors")
    assert result.exit_code == 2
    assert "--weights is for a module that a factory makes" in result.stderr


def test_inputs_of_a_model_folder(tiny_path: Path, folder: Path) -> None:
    ids = torch.arange(3 * 13).reshape(3, 13)
    save_file({"input_ids": ids + 1000}, folder / "inputs.safetensors")
    outside = reattend("find", tiny_path, "--inputs", folder / "inputs.safetensors")
    assert outside.exit_code == 3
    assert "does not run on the example inputs" in outside.stderr
    save_file({"input_ids": ids % 8}, folder / "inputs.safetensors")
    found = reattend("find", tiny_path, "--inputs", folder / "inputs.safetensors")
    assert found.exit_code == 0, found.output
    assert "2 found, 0 not understood" in found.stdout
