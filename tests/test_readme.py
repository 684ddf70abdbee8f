"""The documents say what is so: the code runs, the tables are the JSON's, the files exist."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reattend import errors

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/math/mla.md", "docs/math/sparse.md",
    "docs/math/linear.md", "docs/math/moh.md", "docs/math/heads.md", "docs/deepseek.md",
)  # fmt: skip


def blocks(language):
    """The fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def tiny_checkout(tmp_path, shipped_path, monkeypatch):
    """A working folder where the shipped model's path holds a tiny random one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "examples" / "models" / "pycode-gqa"
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_path / name, folder)
    text = (shipped_path / "calibration.txt").read_text("utf-8")
    (folder / "calibration.txt").write_text(text[:40_000], "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_block_runs(tiny_checkout, capsys):
    (code,) = blocks("python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    result, model = names["result"], names["model"]
    assert [s.action for s in result.report.sites] == ["converted", "converted"]
    assert "pycode-gqa" in capsys.readouterr().out
    assert sorted(p.name for p in tiny_checkout.iterdir()) == ["converted", "examples"]
    same = zip(result.model.parameters(), model.parameters(), strict=True)
    assert all(bool((a == b).all()) for a, b in same)


def test_the_plan_in_the_readme_is_a_plan(tmp_path):
    from reattend import Plan

    (text,) = blocks("yaml")
    file = tmp_path / "plan.yaml"
    file.write_text(text, "utf-8")
    plan = Plan.load(file)
    paths = [f"model.layers.{i}.self_attn" for i in range(4)]
    assert [rules[0].to for rules in plan.assign(paths).values()] == ["keep", "mla", "mla", "keep"]


def script(name):
    """A module of examples/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("mark", "name", "file", "document"),
    [
        ("headline", "headline", "quality", "README.md"),
        ("results", "quality", "quality", "README.md"),
        ("recovery-cpu", "recovery", "recovery_cpu", "README.md"),
        ("recovery", "recovery", "recovery", "README.md"),
        ("mla", "mla_table", "mla_table", "README.md"),
        ("mla-qwen2", "mla_table", "mla_table_qwen2", "README.md"),
        ("mla-qwen3", "mla_table", "mla_table_qwen3", "README.md"),
        ("memory", "memory", "memory", "README.md"),
        ("latent-norm", "latent_norm", "latent_norm", "docs/deepseek.md"),
        ("coverage", "coverage", "coverage", "README.md"),
        ("sparse", "sparse_table", "sparse_table", "README.md"),
        ("sparse-recall", "sparse_recall", "sparse_recall", "README.md"),
        ("sparse-images", "sparse_images", "sparse_images", "README.md"),
        ("sparse-diffusion", "sparse_diffusion", "sparse_diffusion", "README.md"),
        ("linear", "linear_table", "linear_table", "README.md"),
        ("linear-images", "linear_images", "linear_images", "docs/math/linear.md"),
        ("gate", "gate_table", "gate_table", "docs/math/sparse.md"),
        ("moh", "moh_table", "moh_table", "docs/math/moh.md"),
        ("heads", "heads_table", "heads_table", "docs/math/heads.md"),
        ("encoder", "encoder_table", "encoder_table", "docs/math/moh.md"),
    ],
)
def test_a_committed_table_is_that_of_its_json(mark, name, file, document, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as when run as a script
    begin, end = f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->"
    page = (ROOT / document).read_text("utf-8")
    assert page.count(begin) == page.count(end) == 1
    shown = page.partition(begin)[2].partition(end)[0].strip()
    file = ROOT / "examples" / "results" / f"{file}.json"
    if not file.exists():
        assert not re.search(r"\d", shown), "numbers without the results they come from"
        return
    results = json.loads(file.read_text("utf-8"))
    made = script(name).table(results).strip()
    assert shown == made, f"paste what `python examples/{name}.py --table` prints"
    for fact in ("device", "date", "command"):
        assert results[fact] in shown


def test_the_readme_is_short_until_it_is_opened():
    """Wide tables are folded, in a form that shows as tables; numbers in titles are theirs."""
    folds = re.findall(r"^<details>\n(.*?)^</details>$", README, re.MULTILINE | re.DOTALL)
    assert len(folds) == README.count("<details>") >= 7
    for fold in folds:
        title, _, content = fold.partition("</summary>\n\n")
        assert title.startswith("<summary>") and "\n" not in title and content, title
        missing = [n for n in re.findall(r"\d[\d.,]*\d|\d", title) if n not in content]
        assert not missing, title
    shown = re.sub(r"^<details>.*?^</details>$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert shown.count("\n") <= 150
    heads = {h.lower().replace(" ", "-") for h in re.findall(r"^## (.*)$", shown, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", shown)) <= heads
    assert shown.count(":begin -->") == 1, "one table of results; the others are folded"


def test_the_readme_names_every_conversion():
    from reattend.passes.rewrite.registry import conversion_names

    table = README.partition("## What attention can become\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == conversion_names()


def files_named_in(document):
    """Relative paths in backticks or links that claim to be files or folders of the repository."""
    text = re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", text)
    linked = [t for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t and t[0] != "#"]
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    return {n for n in named if n.split("/")[0] in top} | set(linked)


def test_the_heads_found_keep_what_is_far_and_a_window_does_not():
    """At half of the cache: 95 % of the recall of each kind, in the committed table."""
    rows = json.loads((ROOT / "examples/results/sparse_recall.json").read_text("utf-8"))["rows"]
    recall = {row["name"]: row["recall"] for row in rows}

    def kept(name):
        return [sum(recall[name][kind]) / sum(whole) for kind, whole in recall["original"].items()]

    for name in ("moa", "duo-attention", "head-sparse", "head-elastic", "retrieval", "instant"):
        assert min(kept(f"{name} 50 %")) >= 0.95, name
        assert recall[f"{name} 50 %"]["key-value"][-1] >= 0.95 * recall["original"]["key-value"][-1]
    assert min(kept("a-shape 50 %")) < 0.8
    assert recall["a-shape 50 %"]["key-value"][-1] == 0


@pytest.mark.parametrize("model", ["mla_table", "mla_table_qwen2", "mla_table_qwen3"])
def test_transmla_loses_least_in_every_cell_of_its_table(model):
    """And at a quarter of the rotary pairs at most a quarter of what the published method does."""
    quality = json.loads((ROOT / f"examples/results/{model}.json").read_text("utf-8"))["quality"]
    found = {
        (cell["preset"], cell["size"]): cell["row"]["ppl"] if cell["row"] else float("inf")
        for cell in quality["peers"]
    }
    presets, sizes = ({names[i] for names in found} for i in (0, 1))
    assert len(sizes) == 7 and len(presets) == 5 and len(found) == 35
    for size in sizes:
        assert min(presets, key=lambda p: found[p, size]) == "transmla", size
    start, size = quality["rows"][0]["ppl"], "1/4 of pairs"
    paper = found["transmla-paper", size] - start
    assert 4 * (found["transmla", size] - start) <= paper


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_a_document_names_exist(document):
    named = files_named_in((ROOT / document).read_text("utf-8"))
    assert named, "no file was recognised: the test would pass on anything"
    missing = sorted(n for n in named if not (ROOT / n).exists())
    assert not missing


def test_the_test_of_names_can_fail():
    assert files_named_in("`converter/nowhere.py` and [x](docs/no.md)") == {
        "converter/nowhere.py",
        "docs/no.md",
    }


def test_architecture_names_the_exit_codes_of_the_catalogue():
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d) \|", text, re.MULTILINE)}
    assert listed == {v for k, v in vars(errors).items() if k.startswith("EXIT_")}


def test_architecture_names_the_stages_and_types_that_exist():
    """Every `Name` in the table of types is defined in the file beside it."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    assert len(rows) >= 8
    for name, file in rows:
        assert re.search(rf"^class {name}\b", (ROOT / file).read_text("utf-8"), re.MULTILINE), name


def test_the_demo_leaves_nothing_for_git():
    run = subprocess.run(
        ["git", "check-ignore", "-q", "demo-out/report.html"], cwd=ROOT, check=False
    )
    if run.returncode == 128:
        pytest.skip("not a git checkout")
    assert run.returncode == 0
