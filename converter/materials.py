"""The data of one run: what statistics and training read, and what is held back to measure on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reattend.data import Dataset, load_data, self_data
from reattend.data_text import BLOCK_BYTES, pieces_of_path
from reattend.errors import DataError
from reattend.held_out import read_held_out
from reattend.host import beside
from reattend.inputs import is_hf
from reattend.plan import Plan
from reattend.preflight import longest_text
from reattend.running import evaluation
from reattend.source import Source
from reattend.source_load import read_tokenizer

#: Rows held back for measuring quality (never calibrated on), and their largest share.
HELD_ROWS, HELD_SHARE = 16, 8


@dataclass
class Materials:
    """Datasets by use; None where a run does not need one.

    `recall` are rows for the recall probes, where they are not those of `held_out`. `fingerprint`
    identifies the data in the run's fingerprint; `own` marks sequences sampled from the model
    itself, `apart` that `held_out` is a text of its own.
    """

    statistics: Dataset | None = None
    training: Dataset | None = None
    held_out: Dataset | None = None
    recall: Dataset | None = None
    own: bool = False
    apart: bool = False
    fingerprint: str = "none"
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int | None:
        """Rows of real data, those held back included; None where there are none."""
        if self.own or self.training is None:
            return None
        held = 0 if self.held_out is None or self.apart else self.held_out.rows
        return self.training.rows + held


def check_data(plan: Plan, data: Any) -> None:
    """Before the model is opened: what can be known to be wrong with the data.

    Raises:
        DataError: training or a gate needs real text and none was given, or the file is missing,
            empty, or not text.
    """
    chosen = plan.calibrate.data if data is None else data
    if chosen is None or (isinstance(chosen, str) and chosen == "self"):
        _refuse_own(plan)
    elif isinstance(chosen, str | Path):
        next(pieces_of_path(chosen), None)
    if plan.verify.data is not None:
        next(pieces_of_path(plan.verify.data), None)


def text_block(plan: Plan, data: Any) -> int:
    """Bytes of text that are tokenised at a time; 0 for tensors and the model's own samples."""
    chosen = plan.calibrate.data if data is None else data
    if isinstance(chosen, str | Path) and str(chosen) != "self":
        path = Path(chosen)
        return min(BLOCK_BYTES, path.stat().st_size) if path.is_file() else BLOCK_BYTES
    if isinstance(chosen, list | tuple) and all(isinstance(item, str) for item in chosen):
        return min(BLOCK_BYTES, max(map(len, chosen), default=0))
    return 0


def load_materials(source: Source, plan: Plan, data: Any, *, seed: int, needed: bool) -> Materials:
    """Read, split and bound the data.

    Args:
        data: what the user passed; None falls back to the plan's, then to the model's own text.
        needed: some conversion asks for statistics.

    Raises:
        DataError: training or a gate needs real data, or none can be made.
    """
    materials = _given(source, plan, data, seed, needed)
    if plan.verify.data is not None and is_hf(source.model):
        apart = read_held_out(source, plan, seed)
        for rows in filter(None, (apart.rows, apart.recall)):
            check_ids(rows, source.model)
            check_length(rows, source.model)
        materials.held_out, materials.recall, materials.apart = apart.rows, apart.recall, True
        materials.fingerprint += "+" + apart.fingerprint
    return materials


def _given(source: Source, plan: Plan, data: Any, seed: int, needed: bool) -> Materials:
    """All but the text of `verify.data`, in whose favour no row is held back."""
    settings = plan.calibrate
    if data is None and settings.data not in (None, "self"):
        data = settings.data
    if data is None or (isinstance(data, str) and data == "self"):
        return _own(source, plan, seed, needed)
    if source.tokenizer is None and source.home is not None and text_block(plan, data):
        raise DataError(
            "Text data needs a tokenizer.",
            where=source.name,
            why=read_tokenizer(str(source.home), True, False)[1],
            next_step="copy the model's tokenizer files again, or pass token ids as tensors",
        )
    read = settings.statistics_tokens
    if settings.trains:
        read = max(read, min(settings.tokens, 4_000_000))
    whole = load_data(
        data, source.tokenizer, seq_len=settings.seq_len,
        tokens=read + HELD_ROWS * settings.seq_len, seed=seed,
    )  # fmt: skip
    check_ids(whole, source.model)
    check_length(whole, source.model)
    materials = Materials(fingerprint=whole.fingerprint)
    if not _has_ids(whole):
        check_runs(whole, source.model)
        materials.statistics = materials.training = whole
        return materials
    back = 0 if plan.verify.data is not None else min(HELD_ROWS, whole.rows // HELD_SHARE)
    held, rest = split(whole, back) if back else (None, whole)
    materials.training = rest
    materials.statistics = head(rest, max(1, settings.statistics_tokens // settings.seq_len))
    if headless(source.model):
        if plan.verify.gates:
            raise DataError(
                "the plan's gates are about a language model's answers, and this model gives none",
                where=type(source.model).__name__,
                next_step="leave out `verify`; the report has the error of every block",
            )
        return materials
    measured = is_hf(source.model)
    materials.held_out = held if measured else None
    if plan.verify.gates and not (measured and (held or plan.verify.data)):
        raise DataError(
            "the data is too short to hold rows back for the plan's gates",
            why=f"{whole.rows} rows of {settings.seq_len} tokens; {HELD_SHARE} or more are needed",
            next_step="give more text, or a smaller calibrate.seq_len",
        )
    return materials


def headless(model: Any) -> bool:
    """Whether a model of transformers predicts no token: it ends with hidden states (BertModel)."""
    body = is_hf(model) and model.base_model is model
    return bool(body and model.get_output_embeddings() is None)


def check_ids(data: Dataset, model: Any) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        DataError: naming the largest id.
    """
    known = _vocabulary(model) if _has_ids(data) else None
    if known is None:
        return
    largest = max((int(block["input_ids"].max()) for block in data.blocks), default=0)
    if largest >= known:
        raise DataError(
            "the data has token ids that the model does not know",
            where=data.description,
            why=f"the largest is {largest}; the model's embedding has {known} rows, from 0",
            next_step="use the tokenizer that belongs to this model",
        )


def check_runs(data: Dataset, model: torch.nn.Module) -> None:
    """Refuse batches that the model cannot be called with.

    Raises:
        DataError: with the model's own words.
    """
    batch = beside(model, next(iter(data.batches(2))))
    try:
        with evaluation(model), torch.no_grad():
            model(**batch)
    except Exception as problem:  # whatever a model's code makes of wrong arguments
        raise DataError(
            "the model cannot be run on a batch of the data",
            where=", ".join(f"{k} {tuple(getattr(v, 'shape', ()))}" for k, v in batch.items()),
            why=f"{type(problem).__name__}: {problem}"[:300],
            next_step="each batch is a dict of model(**batch)'s arguments",
        ) from problem


def check_length(data: Dataset, model: Any) -> None:
    """Refuse rows longer than the model can read: a table of positions ends, a rotation does not.

    Only rows longer than the config's own limit are tried, in one run of one row.

    Raises:
        DataError: naming both lengths.
    """
    longest = longest_text(model) if is_hf(model) and _has_ids(data) else None
    row = {name: tensor[:1] for name, tensor in data.blocks[0].items()} if longest else {}
    if longest is None or row["input_ids"].shape[1] <= longest:
        return
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(**{name: tensor.to(device) for name, tensor in row.items()})
    except (IndexError, RuntimeError) as problem:
        raise DataError(
            "the rows of the data are longer than the model reads",
            where="calibrate.seq_len",
            why=f"{row['input_ids'].shape[1]} tokens; its config says {longest} at most",
            next_step=f"set calibrate.seq_len to {longest} or less",
        ) from problem
    except (TypeError, ValueError):  # it wants further inputs: statistics will say which
        return


def _vocabulary(model: Any) -> int | None:
    """Rows of the model's embedding; None where it names none."""
    if not is_hf(model):
        return None
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # several embeddings, none of which is the one
        return None


def _own(source: Source, plan: Plan, seed: int, needed: bool) -> Materials:
    """No data: the model's own samples, for statistics only."""
    _refuse_own(plan)
    if not needed:
        return Materials()
    sampled = self_data(source.model, seed=seed)
    note = (
        "no data was given: statistics come from 64 sequences sampled from the original; "
        "pass data=<.txt, .jsonl or folder> to use real text"
    )
    return Materials(statistics=sampled, own=True, fingerprint=f"self:{seed}", notes=[note])


def _refuse_own(plan: Plan) -> None:
    if plan.calibrate.trains or (plan.verify.gates and plan.verify.data is None):
        what = "training needs" if plan.calibrate.trains else "the plan's verify gates need"
        raise DataError(
            f"{what} real text",
            why="no data was given, and a model cannot be judged or taught by its own samples",
            next_step="pass data=<.txt, .jsonl or folder> (--data on the command line)",
        )


def _has_ids(data: Dataset) -> bool:
    return all("input_ids" in block for block in data.blocks)


def split(data: Dataset, rows: int) -> tuple[Dataset, Dataset]:
    """`rows` rows at even distances, and the rest."""
    ids, mask = data.packed
    total = len(ids)
    pick = {i * total // rows for i in range(rows)} if rows else set()
    others = [i for i in range(total) if i not in pick]
    return _part(data, sorted(pick), "held back from"), _part(data, others, "the rest of")


def head(data: Dataset, rows: int) -> Dataset:
    """`rows` rows, evenly spaced over the data."""
    return data.take(rows)


def _part(data: Dataset, rows: list[int], word: str) -> Dataset:
    ids, mask = data.packed
    block = {"input_ids": ids[rows], "attention_mask": mask[rows]}
    return Dataset(
        [block], description=f"{len(rows)} rows {word} {data.description}", seed=data.seed
    )
