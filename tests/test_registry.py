"""Conversions by name: our own, unknown ones, and one from an installed package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reattend.errors import EXIT_REFUSED, ModelError, PlanError
from reattend.mixers.kinds import build_mixer
from reattend.passes.rewrite import registry

PACKAGE = Path(__file__).resolve().parent.parent / "examples" / "conversion_package"

#: Prints one JSON line: what happened at each number of heads. A fresh Python, so that nothing is
#: registered beforehand.
CONVERT = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import reattend
from reattend.errors import ReattendError

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=61, hidden_size=48, intermediate_size=56, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=6, max_position_embeddings=64,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(1, 61, (2, 9))

@torch.no_grad()
def tried(kv_heads):
    plan = {"rules": [{"sites": "*", "to": "mean-gqa", "kv_heads": kv_heads}]}
    try:
        result = reattend.convert(model, plan=plan, out=f"{sys.argv[1]}/{kv_heads}")
    except ReattendError as problem:
        return {"exit_code": problem.exit_code, "text": str(problem)}
    expected, got = model(ids).logits, result.model(ids).logits
    used = result.model(ids[:, :5], use_cache=True).past_key_values
    cached = result.model(ids[:, 5:], past_key_values=used, use_cache=True).logits
    weight = model.model.layers[1].self_attn.k_proj.weight
    pooled = weight.unflatten(0, (kv_heads, 4 // kv_heads, 6)).mean(1).flatten(0, 1)
    mixer = result.model.model.layers[1].self_attn.mixer
    site = result.report.sites[1]
    cost = (site.cost.before, site.cost.after)
    return {
        "conversion": site.conversion,
        "cache": [c.cache_numbers_per_token for c in cost],
        "cached_heads": used.layers[1].keys.shape[1],
        "gap": float((got - expected).abs().max()),
        "cached_gap": float((cached - got[:, 5:]).abs().max()),
        "mean_gap": float((mixer.k_proj.weight - pooled).abs().max()),
    }

print(json.dumps({kv_heads: tried(kv_heads) for kv_heads in (2, 3, 4)}))
"""

LOAD = """
import json, sys
import torch, reattend
model = reattend.load(sys.argv[1])
mixer = model.model.layers[0].self_attn.mixer
model(torch.arange(6)[None])
print(json.dumps({"kv_heads": mixer.config.core.kv_heads}))
"""


def in_fresh_python(code, *arguments, path=None):
    """The JSON that `code` prints last."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds nothing but the example package, installed by pip."""
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--target", str(target), str(source)),
        ],
        check=True,
    )
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the conversions with the package go."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def made(installed, folder):
    """What came of 2, 3 and 4 key/value heads where the package is installed."""
    return in_fresh_python(CONVERT, folder, path=installed)


def test_own_conversions_are_listed_and_import_lazily():
    assert {"dense", "mla"} <= set(registry.conversion_names())
    code = (
        "import json, sys; from reattend.passes.rewrite.registry import conversion_names;"
        "conversion_names(); print(json.dumps('reattend.passes.rewrite.mla' in sys.modules))"
    )
    assert in_fresh_python(code) is False
    for name in ("dense", "mla"):
        assert registry.conversion(name).name == name


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(PlanError, match="did you mean 'mla'"):
        registry.conversion("mlaa")


def test_a_package_cannot_replace_our_own(monkeypatch):
    class Entry:
        name, value = "mla", "json:loads"

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry])
    assert registry.conversion("mla").__name__ == "ToMla"


def test_without_the_package_its_name_is_unknown():
    code = (
        "import json; from reattend.passes.rewrite.registry import conversion_names;"
        "print(json.dumps(conversion_names()))"
    )
    assert "mean-gqa" not in in_fresh_python(code)


@pytest.mark.slow
def test_an_installed_package_converts(made):
    two = made["2"]
    assert two["conversion"] == "mean-gqa"
    assert two["cache"] == [4 * 12, 2 * 12]
    assert two["cached_heads"] == 2
    assert two["mean_gap"] < 1e-6
    assert two["gap"] > 1e-3, "half the heads were averaged away and nothing changed"
    assert two["cached_gap"] < 1e-5


def test_what_it_made_loads_without_the_package(made, folder):
    assert in_fresh_python(LOAD, folder / "2") == {"kv_heads": 2}


def test_its_exact_setting_is_exact(made):
    assert made["4"]["gap"] < 1e-5
    assert made["4"]["cached_heads"] == 4


def test_its_refusal_is_reported_as_ours_are(made, folder):
    assert made["3"]["exit_code"] == EXIT_REFUSED
    assert "kv_heads 3 does not divide 4" in made["3"]["text"]
    assert not (folder / "3").exists()


def test_a_mixer_of_a_package_is_built_by_its_name(tmp_path, monkeypatch):
    """Checkpoints name kinds of mixers; a package says which class is one, by entry point."""
    (tmp_path / "parrot_mixer.py").write_text(
        "class Parrot:\n    @staticmethod\n    def from_config(config):\n        return [config]\n"
    )
    info = tmp_path / "parrot_mixer-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot-mixer\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[reattend.mixers]\nparrot = parrot_mixer:Parrot\n")
    with pytest.raises(ModelError, match="'parrot', which is not installed"):
        build_mixer("parrot", {"a": 1})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_mixer("parrot", {"a": 1}) == [{"a": 1}]
