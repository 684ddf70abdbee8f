"""The public calls, as a user meets them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from transformers import AutoTokenizer

from reattend import Plan, Report, convert, export, load
from reattend.errors import ArgumentError, DataError, GateError, NothingFoundError, OutputError
from reattend.events import Event

MLA = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 14, "qk_rope_head_dim": 8}]}


def data() -> torch.Tensor:
    return torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(3))


def test_save_publishes_what_convert_would(tmp_path: Path) -> None:
    result = convert(zoo_models.build("llama"), plan=MLA, data=data())
    folder = result.save(tmp_path / "saved")
    assert {"config.json", "model.safetensors", "report.json", "report.html", "plan.json"} <= {
        f.name for f in folder.iterdir()
    }
    assert Report.load(folder) == result.report
    ids = data()[:1, :9]
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, result.model(ids).logits)


def test_what_belongs_to_the_original_goes_with_the_result(tiny_path: Path, tmp_path: Path) -> None:
    """Its licence, tokenizer, chat template and how it prepares images; not its other files."""
    model = Path(shutil.copytree(tiny_path, tmp_path / "model"))
    (model / "tokenizer_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(model)
    carried = ("LICENSE.txt", "NOTICE", "preprocessor_config.json")
    for name in (*carried, "train.log"):
        (model / name).write_text(f"{{}} {name}")
    first = convert(model, plan="identity", out=tmp_path / "out")
    again = convert(model, plan="identity", out=tmp_path / "out")
    for out in (tmp_path / "out", first.save(tmp_path / "a"), again.save(tmp_path / "b")):
        assert all((out / name).read_text() == f"{{}} {name}" for name in carried)
        assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
        assert (out / "generation_config.json").is_file()
        assert not (out / "train.log").exists()


def test_save_does_not_overwrite_unasked(tmp_path: Path) -> None:
    first = convert(zoo_models.build("llama"), plan="identity")
    second = convert(zoo_models.build("llama"), plan=MLA, data=data())
    first.save(tmp_path / "saved")
    with pytest.raises(OutputError):
        second.save(tmp_path / "saved")
    second.save(tmp_path / "saved", overwrite=True)
    assert Report.load(tmp_path / "saved") == second.report
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError):
        second.save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_complete_folder_is_not_computed_again(tmp_path: Path) -> None:
    model, events = zoo_models.build("llama"), []
    first = convert(model, plan=MLA, data=data(), out=tmp_path / "out")
    again = convert(model, plan=MLA, data=data(), out=tmp_path / "out", on_event=events.append)
    assert again.report == first.report
    assert "statistics" not in {e.stage for e in events}
    assert "already complete" in events[-1].message
    assert again.run is None


@pytest.mark.parametrize(
    ("part", "word"),
    [({"calibrate": {"tokens": 400}}, "training"), ({"verify": {"max_kl": 0.0}}, "max_kl")],
)
def test_what_needs_the_original_is_refused_in_place(
    part: dict[str, Any], word: str, tmp_path: Path
) -> None:
    model = zoo_models.build("llama")
    before = [type(m) for m in model.modules()]
    with pytest.raises(ArgumentError, match=rf"leaves no original[\s\S]*{word}"):
        convert(model, plan={**MLA, **part}, data=data(), inplace=True, out=tmp_path / "out")
    assert [type(m) for m in model.modules()] == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_text_of_few_different_tokens_converts_without_recall() -> None:
    rows = torch.randint(3, 12, (32, 128), generator=torch.Generator().manual_seed(4))
    plan = {**MLA, "calibrate": {"seq_len": 128}, "verify": {"max_kl": 100.0}}
    report = convert(zoo_models.build("llama"), plan=plan, data=rows).report
    assert any("9 different tokens" in note for note in report.notes)
    assert [g.verdict for g in report.gates] == ["pass"]


def test_events_tell_each_layer_and_end_where_they_said() -> None:
    events: list[Event] = []
    convert(zoo_models.build("llama"), plan=MLA, data=data(), on_event=events.append)
    rewritten = [e for e in events if e.stage == "rewrite" and e.site]
    assert [e.site for e in rewritten] == [f"model.layers.{i}.self_attn" for i in range(2)]
    last = {e.stage: e for e in events if e.total is not None}
    assert all(e.done == e.total for e in last.values())


@pytest.mark.slow
def test_without_data_the_model_reads_its_own_text() -> None:
    model = zoo_models.build("llama")
    result = convert(model, plan=MLA)
    assert result.report.calibration is not None
    assert result.report.calibration.data == "self"
    assert any("sampled from the original" in n for n in result.report.notes)
    with pytest.raises(DataError, match="needs real text"):
        convert(model, plan={**MLA, "calibrate": {"tokens": 1000}})


@pytest.mark.slow
def test_plans_come_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(Plan.load("identity").to_yaml())
    for plan in (
        "identity",
        Plan.load("identity"),
        file,
        {"rules": [{"sites": "*", "to": "dense"}]},
    ):
        assert convert(zoo_models.build("llama"), plan=plan).report.totals.converted == 2


def test_refusals_can_be_kept() -> None:
    rule: dict[str, Any] = {"sites": "*", "to": "mla", "kv_lora_rank": 30, "qk_rope_head_dim": 8}
    plan = {"rules": [{"layers": [0], "to": "dense"}, rule], "on_refusal": "keep"}
    report = convert(zoo_models.build("llama"), plan=plan, data=data()).report
    assert [s.action for s in report.sites] == ["converted", "refused"]
    assert "larger than possible" in report.sites[1].reason


def test_gates_judge_the_result() -> None:
    rows = torch.randint(3, 97, (32, 64), generator=torch.Generator().manual_seed(4))
    passing = {**MLA, "calibrate": {"seq_len": 64}, "verify": {"max_kl": 100.0}}
    report = convert(zoo_models.build("llama"), plan=passing, data=rows).report
    assert [g.verdict for g in report.gates] == ["pass"]
    failing = {**passing, "verify": {"max_kl": 0.0}}
    with pytest.raises(Exception, match="failed verification") as caught:
        convert(zoo_models.build("llama"), plan=failing, data=rows)
    assert getattr(caught.value, "exit_code", None) == 4


@pytest.mark.slow
def test_stages_of_a_run_whose_gate_failed_are_reused_and_marked(tmp_path: Path) -> None:
    rows = torch.randint(3, 97, (32, 64), generator=torch.Generator().manual_seed(4))
    plan = {**MLA, "calibrate": {"seq_len": 64, "tokens": 400}, "verify": {"max_kl": 0.0}}
    with pytest.raises(GateError):
        convert(zoo_models.build("llama"), plan=plan, data=rows, out=tmp_path / "out")
    plan = {**plan, "verify": {"max_kl": 100.0}}
    events: list[Event] = []
    made = {
        out: convert(
            zoo_models.build("llama"), plan=plan, data=rows, out=tmp_path / out,
            on_event=events.append if out == "out" else None,
        )
        for out in ("out", "fresh")
    }  # fmt: skip
    taken = ("statistics", "layerwise", "end-to-end")
    for out, result in made.items():
        assert result.run is not None
        marked = [s.name for s in result.run.stages if s.reused]
        assert marked == (list(taken) if out == "out" else [])
    told = {e.stage for e in events if e.message == "reused from the interrupted run"}
    assert told == set(taken)
    stored = [(tmp_path / out / "model.safetensors").read_bytes() for out in made]
    assert stored[0] == stored[1]


def test_yardsticks_stand_beside_the_result_on_request() -> None:
    rows = torch.randint(3, 97, (16, 64), generator=torch.Generator().manual_seed(4))
    plan = {**MLA, "calibrate": {"seq_len": 64}, "verify": {"yardsticks": True}}
    quality = convert(zoo_models.build("llama"), plan=plan, data=rows).report.quality
    assert quality is not None
    names = [r.name for r in quality.rows if r.role == "yardstick"]
    assert any("sliding window" in n for n in names)
    assert {"int8 KV cache", "int4 KV cache"} <= set(names)


def test_mistakes_are_named() -> None:
    model = zoo_models.build("llama")
    with pytest.raises(ArgumentError, match="models that reattend loads"):
        convert(model, plan="identity", dtype="float16")
    with pytest.raises(ArgumentError, match="not a model"):
        convert(42, plan="identity")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="unknown export target"):
        export(model, target="coreml", out="nowhere")
    with pytest.raises(NothingFoundError, match="no site would be converted"):
        convert(model, plan={"rules": [{"sites": "*", "to": "keep"}]})
