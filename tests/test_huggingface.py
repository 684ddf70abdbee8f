"""The checkpoint: transformers' own path loads it with reattend imported, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from safetensors import safe_open

from reattend import convert, load
from reattend.errors import ModelError

IDS = torch.tensor([[5, 9, 13, 21, 34, 55, 89, 3]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    rule = {"layers": [1], "to": "mla", "kv_lora_rank": 14, "qk_rope_head_dim": 8}
    plan = {"rules": [rule, {"sites": "*", "to": "dense"}]}
    out = tmp_path_factory.mktemp("saved") / "out"
    result = convert(
        zoo_models.build("llama"), plan=plan, data=torch.randint(3, 97, (8, 40)), out=out
    )
    return result.model, out


def fresh(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter; `folder` is its first argument."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip


PRINT = f"""
import torch
ids = torch.tensor({IDS.tolist()})
with torch.no_grad():
    print("SUM", repr(float(model(input_ids=ids).logits.double().abs().sum())))
print("IDS", model.generate(ids, max_new_tokens=9, do_sample=False).tolist())
"""


def expected_lines(model: Any) -> list[str]:
    with torch.no_grad():
        total = float(model(input_ids=IDS).logits.double().abs().sum())
    ids = model.generate(IDS, max_new_tokens=9, do_sample=False).tolist()
    return [f"SUM {total!r}", f"IDS {ids}"]


@pytest.mark.daily
@pytest.mark.parametrize(
    "opening",
    [
        "import reattend, sys\nmodel = reattend.load(sys.argv[1])",
        "import reattend, sys\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])",
        "import sys\nfrom transformers import AutoModelForCausalLM\nimport reattend\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map='cpu')",
    ],
    ids=["load", "auto", "auto-before-reattend"],
)
def test_a_fresh_process_computes_the_same(saved: tuple[Any, Path], opening: str) -> None:
    model, out = saved
    done = fresh("import torch\ntorch.set_num_threads(1)\n" + opening + PRINT, out)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [x for x in done.stdout.splitlines() if x.startswith(("SUM", "IDS"))]
    assert printed == expected_lines(model)


def test_without_reattend_it_fails_to_load(saved: tuple[Any, Path]) -> None:
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = fresh(code, saved[1])
    assert done.returncode != 0
    assert "reattend" in done.stderr


def test_the_folder_names_what_it_holds(saved: tuple[Any, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["model_type"] == "reattend"
    assert config["architectures"] == ["ReattendLlamaForCausalLM"]
    assert config["reattend"]["base_model_type"] == "llama"
    kinds = {s["path"]: s["kind"] for s in config["reattend"]["sites"]}
    assert kinds == {
        "model.layers.0.self_attn": "dense", "model.layers.1.self_attn": "latent",
    }  # fmt: skip
    with safe_open(saved[1] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.1.self_attn.mixer.kv_a_proj_with_mqa.weight" in names
    assert not any(".self_attn.q_proj" in n for n in names)


@pytest.mark.smoke
def test_the_headless_model_loads_too(saved: tuple[Any, Path]) -> None:
    from transformers import AutoModel

    model, out = saved
    body = AutoModel.from_pretrained(out)
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        assert (body(input_ids=IDS).last_hidden_state - expected).abs().max() <= 1e-6


@pytest.mark.smoke
def test_dtype_is_kept_and_can_be_asked_for(saved: tuple[Any, Path]) -> None:
    assert next(load(saved[1]).parameters()).dtype == torch.float32
    half = load(saved[1], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.generate(IDS, max_new_tokens=3, do_sample=False)


@pytest.mark.slow
def test_tied_embeddings_stay_tied(shipped_path: Path, tmp_path: Path) -> None:
    result = convert(shipped_path, plan="identity", out=tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert next(result.model.parameters()).dtype == torch.bfloat16


@pytest.mark.smoke
def test_saving_again_round_trips(saved: tuple[Any, Path], tmp_path: Path) -> None:
    load(saved[1]).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert expected_lines(again) == expected_lines(saved[0])


def test_a_newer_format_is_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    load(saved[1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["reattend"]["format"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="format 99"):
        load(tmp_path)
