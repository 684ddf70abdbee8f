"""Checkpoints in DeepSeek's layout: loaded in a process that cannot import reattend."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import save_tiny
from deepseek_models import LLAMA3, YARN, gemma, granite, llama, pair, phi3, qwen2
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from reattend import convert, export
from reattend.cli import app
from reattend.errors import GateError, NothingFoundError
from reattend.targets.deepseek import Checkpoint
from reattend.targets.deepseek import export as module
from reattend.targets.deepseek.loaders import loaders

STRIDED = {"sites": "*", "to": "mla", "kv_keep": 0.5, "rope_select": "per-frequency",
           "rope_table": "strided"}  # fmt: skip
DATA = torch.randint(3, 97, (12, 24), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(2))


#: name -> (model, options on top of STRIDED, target, stored dtype, rope type that results)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str, str, str]] = {
    "gqa": (pair, {}, "deepseek", "float32", "default"),
    "gqa-v2": (pair, {}, "deepseek-v2", "float32", "default"),
    "mha": (lambda: llama(num_key_value_heads=4), {}, "deepseek", "float32", "default"),
    "llama3": (lambda: llama(rope_parameters=LLAMA3), {}, "deepseek", "float32", "llama3"),
    "yarn": (lambda: llama(rope_parameters=YARN), {}, "deepseek", "float32", "longrope"),
    "two slots": (
        llama, {"qk_rope_head_dim": 16, "kv_lora_rank": 10, "kv_keep": None,
                "rope_table": "free"}, "deepseek", "float32", "longrope",
    ),
    "biases": (qwen2, {}, "deepseek", "float32", "default"),
    "biases-v2": (qwen2, {}, "deepseek-v2", "float32", "default"),
    "low rank queries": (llama, {"q_lora_rank": 20}, "deepseek", "float32", "default"),
    "factors": (granite, {}, "deepseek", "float32", "default"),
    "fused": (phi3, {}, "deepseek", "float32", "default"),
    "gemma": (gemma, {}, "deepseek", "float32", "default"),
    "norm": (llama, {"latent_norm": "rms", "center": False}, "deepseek", "float64", "default"),
    "double": (pair, {}, "deepseek", "float64", "default"),
    "half": (pair, {}, "deepseek", "bfloat16", "default"),
}  # fmt: skip

#: what a user has: transformers, and no reattend
FRESH = """
import json, sys
sys.modules["reattend"] = None
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)

def wide_norms(model):
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            def run(x, m=module):
                y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
                return m.weight * y
            module.forward = run

found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    stored = load_file(folder / "expected.safetensors")
    dtype = stored["logits"].dtype
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "deepseek", dtype=dtype, output_loading_info=True
    )
    if dtype == torch.float64:
        wide_norms(model)
    with torch.no_grad():
        got = model(stored["ids"]).logits
        text = model.generate(stored["ids"], max_new_tokens=8, do_sample=False)
    found[folder.name] = {
        "class": type(model).__name__,
        "error": float((got - stored["logits"]).abs().max() / stored["logits"].abs().max()),
        "text": bool(torch.equal(text, stored["text"])),
        "info": sorted(k for k, v in info.items() if v),
    }
assert not any(m.split(".")[0] == "reattend" and sys.modules[m] for m in sys.modules)
print(json.dumps(found))
"""


def wide_norms(model: nn.Module) -> None:
    """As in `FRESH`: the model's own norms in the model's dtype."""
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, nn.RMSNorm):

            def run(x: torch.Tensor, m: Any = norm) -> torch.Tensor:
                y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
                return m.weight * y

            norm.forward = run  # type: ignore[method-assign]


SLOW = {"mha", "two slots", "low rank queries", "biases-v2", "half", "yarn", "fused", "gemma",
        "double"}  # fmt: skip
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]


@functools.cache
def converted(build: Callable[[], Any], *options: Any) -> Any:
    """A model by the plan `STRIDED` with more options; cast in place by whoever needs it."""
    torch.manual_seed(0)
    rule = {k: v for k, v in {**STRIDED, **dict(options)}.items() if v is not None}
    original = build().eval()
    for parameter in original.parameters():  # no constant may hide behind zeros and ones
        parameter.data += 0.1 * torch.randn_like(parameter)
    return convert(original, {"rules": [rule]}, data=DATA).model


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict[str, Checkpoint]]:
    """The cases that were asked for, exported, their logits and greedy text stored beside."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    names = {call.params["name"] for call in asked if call and call.params.get("name") in CASES}
    root = tmp_path_factory.mktemp("cases")
    torch.set_num_threads(1)
    checkpoints: dict[str, Checkpoint] = {}
    for name, (build, options, target, dtype, _) in CASES.items():
        if name not in {*names, "gqa"}:
            continue
        model = converted(build, *options.items()).to(getattr(torch, dtype))
        checkpoints[name] = export(model, target, out=root / name / "deepseek")
        if dtype == "float64":
            wide_norms(model)
        with torch.no_grad():
            logits = model.float()(IDS).logits if dtype == "bfloat16" else model(IDS).logits
            text = model.generate(IDS, max_new_tokens=8, do_sample=False)
        tensors = {"ids": IDS, "logits": logits.contiguous(), "text": text}
        save_file(tensors, root / name / "expected.safetensors")
    return root, checkpoints


@pytest.fixture(scope="module")
def fresh(made: tuple[Path, dict[str, Checkpoint]]) -> dict[str, Any]:
    """What a process without reattend makes of all of them."""
    run = subprocess.run(
        [sys.executable, "-c", FRESH, str(made[0])], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_stock_class_gives_the_same_logits_and_text(
    name: str, fresh: Any, made: tuple[Path, dict[str, Checkpoint]]
) -> None:
    found = fresh[name]
    manifest = made[1][name].manifest
    version = "V2" if CASES[name][2].endswith("v2") else "V3"
    assert found["class"] == f"Deepseek{version}ForCausalLM"
    assert found["info"] == []  # no key missing, none too many
    dtype = CASES[name][3]
    limit = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.1}[dtype]
    assert found["error"] <= limit + manifest.norm_error
    assert found["text"] or dtype == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_says_what_was_written(name: str, made: Any) -> None:
    manifest = made[1][name].manifest
    assert manifest.rope_type == CASES[name][4]
    assert manifest.dtype == CASES[name][3]
    anchored = name != "norm"
    assert manifest.latent_norm == ("anchored" if anchored else "own")
    assert manifest.cache.exported == manifest.cache.kv_lora_rank + manifest.cache.qk_rope_head_dim
    assert manifest.cache.exported - manifest.cache.converted[0] in ((1, 2) if anchored else (0,))
    loads = {row.name.split()[0]: row.loads for row in manifest.loaders}
    assert loads["SGLang"] is (not anchored)
    assert not loads["vLLM"]  # 16 cached numbers, which none of its MLA layers takes
    files = {p.name for p in made[1][name].path.iterdir()}
    assert {"config.json", "model.safetensors", "deepseek.json"} <= files
    assert not any(f.endswith((".bin", ".pt", ".pkl")) for f in files)
    assert "reattend" not in (made[1][name].path / "config.json").read_text()


@pytest.mark.parametrize(
    ("rank", "rope", "takers"),
    [
        (512, 64, {"vLLM", "SGLang", "FlashMLA", "FlashInfer"}),
        (256, 64, {"vLLM", "SGLang", "FlashInfer"}),
        (448, 128, {"vLLM", "SGLang"}),
        (96, 32, {"SGLang"}),
    ],
)
def test_a_server_takes_the_shapes_its_kernels_are_built_for(
    rank: int, rope: int, takers: set[str]
) -> None:
    def loading(**other: bool) -> set[str]:
        given = {"biased": False, "plain_table": True, **other}
        rows = loaders("DeepseekV3ForCausalLM", rank=rank, rope=rope, version="v3", **given)
        return {row.name.split()[0] for row in rows if row.loads} - {"transformers"}

    assert loading() == takers
    assert loading(biased=True) == loading(plain_table=False) == set()


def test_the_class_caches_one_latent_and_one_rotated_key(made: Any) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(made[1]["gqa"].path)
    cache = model(IDS, use_cache=True).past_key_values
    widths = [layer.keys.shape[-1] + layer.values.shape[-1] for layer in cache.layers]
    assert widths == [17, 17] and cache.layers[0].keys.shape[1] == 1


def test_a_plan_lowers_to_it_with_tokenizer(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    plan = {"extends": "deepseek", "rules": [{**STRIDED, "balance": 1.0}]}
    result = convert(source, plan, data=DATA[:, :20] % 20, out=tmp_path / "out")
    folder = tmp_path / "out" / "deepseek"
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    stock = tf.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("3 and 1 make", return_tensors="pt").input_ids
    with torch.no_grad():
        error = (stock(ids).logits - result.model(ids).logits).abs().max()
    assert float(error) <= 1e-4
    again = tmp_path / "again"
    (tmp_path / "out" / "LICENSE").write_text("theirs")
    told = CliRunner().invoke(
        app, ["export", str(tmp_path / "out"), "--target", "deepseek", "--out", str(again)]
    )
    assert told.exit_code == 0 and "DeepseekV3ForCausalLM" in told.output
    assert (again / "LICENSE").read_text() == "theirs"
    one, two = (load_file(f / "model.safetensors") for f in (folder, again))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    export(tmp_path / "out", "deepseek", out=again)  # complete: nothing to do


def test_layers_of_several_sizes_are_padded_when_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rule = {**STRIDED, "kv_lora_rank": [12, 7], "qk_rope_head_dim": 8}
    del rule["kv_keep"]
    model = convert(pair().eval(), {"rules": [rule]}, data=DATA).model
    # a plain table of width 24 holds that of width 8 in every third slot, one of width 20 does not
    for pad, rank, rope, kind in (
        ("max", 13, 8, "default"), ("16+24", 16, 24, "default"), ("16+20", 16, 20, "longrope"),
    ):  # fmt: skip
        made = export(model, "deepseek", out=tmp_path / pad, pad=pad)
        cache = made.manifest.cache
        assert made.manifest.padded and made.max_error <= 1e-5
        assert (cache.kv_lora_rank, cache.qk_rope_head_dim) == (rank, rope)
        assert made.manifest.rope_type == kind
    assert cache.converted == [20, 15] and cache.exported == 36


def test_a_wrong_map_is_caught_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(pair).float()
    right = module.state_dict

    def wrong(*args: Any) -> Any:
        state, error = right(*args)
        name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
        state[name] = state[name].clone()
        state[name][-2:] = state[name][-2:].flip(0)  # one pair, real and imaginary swapped
        return state, error

    monkeypatch.setattr(module, "state_dict", wrong)
    with pytest.raises(GateError, match="does not give the converted model's logits"):
        export(model, "deepseek", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_converted_has_nothing_to_lower(tmp_path: Path) -> None:
    with pytest.raises(NothingFoundError, match="no converted attention layer"):
        export(llama(), "deepseek", out=tmp_path / "out")
