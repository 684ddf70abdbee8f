"""How far a model's output moves when some of its blocks are replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from reattend.at_once import vocabulary_of, without_logits
from reattend.calibrate.stage import finite_or_raise
from reattend.data import Dataset
from reattend.host import beside, device_of
from reattend.inputs import without_cache
from reattend.install.adapter import install, replace_module
from reattend.mixers.base import Mixer
from reattend.passes.rewrite.base import Answered, Gap
from reattend.preflight import Choice
from reattend.rewriting import around_of, shared_copy
from reattend.running import evaluation

#: Rows a divergence is measured on, and the most bytes of outputs kept for it.
ROWS, OUTPUT_BYTES = 4, 64 << 20
#: One model call's rows, which of their tokens are real, and what the original says of them.
Rehearsed = tuple[dict[str, Any], Tensor | None, Tensor]


class Divergence:
    """Mean KL(original || changed) over real tokens for models with logits, else the mean squared
    difference of the first output.

    Args:
        model: the original.
        choices: its sites by path; each has a module of its own.
        data: calibration rows.
        rehearsal: makes the rows it is measured on from the data's.
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Mapping[str, Choice],
        data: Dataset,
        rehearsal: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self.model, self.choices, self.data, self.rehearsal = model, choices, data, rehearsal
        self.target = shared_copy(model, owned=True)  # only ever run: nothing writes to either
        self.logits = True
        self.own: dict[tuple[int, int], Tensor] = {}  # the original's answers by length and row
        self.first = self._rehearsed(next(iter(data.batches(ROWS))))

    def __call__(self, path: str, mixer: Mixer) -> float:
        """The divergence with one site replaced."""
        with self._installed({path: copy.deepcopy(mixer)}), torch.no_grad():
            return float(self._gap(self.first))

    @contextmanager
    def trial(self, mixers: Mapping[str, Mixer]) -> Iterator[Gap]:
        """Calls that give the divergence on the next rows, with gradients of these mixers.

        They stand in a copy of the model meanwhile, themselves and not copies of them.
        """
        batches = cycle(self.data.batches(ROWS))
        with self._installed(mixers):
            yield lambda: self._gap(self._rehearsed(next(batches)))

    @contextmanager
    def answers(
        self, mixers: Mapping[str, Mixer], length: int, rows: int
    ) -> Iterator[Iterator[Answered]]:
        """Rows of `length` tokens, run one by one; these mixers stand in a copy of the model."""
        with self._installed(mixers):
            whole = islice(self._whole(length), rows)
            yield (self._answered(ids, (length, n)) for n, ids in enumerate(whole))

    @property
    def length(self) -> int:
        """Tokens of the calibration rows; 0 where they hold none."""
        ids = self.first[0].get("input_ids")
        return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else 0

    def _whole(self, length: int) -> Iterator[Tensor]:
        """The first `length` tokens [1, N] of every row that has as many."""
        for batch in self.data.batches(1):
            mask = batch.get("attention_mask")
            if mask is None or bool(mask[:, :length].all()):
                yield batch["input_ids"][:, :length]

    def _answered(self, ids_1N: Tensor, row: tuple[int, int]) -> Answered:
        """What original and changed model say of the second half; the original is asked once."""
        model = self.model
        batch = without_cache(model, beside(model, self.rehearsal({"input_ids": ids_1N})))
        ids_N = batch["input_ids"][0]
        half = len(ids_N) // 2
        place = half + kept_places(1, half - 1, vocabulary_of(model)).to(ids_N.device)
        kept = place
        if without_logits(model):
            batch, kept = {**batch, "logits_to_keep": place}, torch.arange(len(place))
        if row not in self.own:
            with torch.no_grad():
                self.own[row] = _outputs(model, batch)[0][0, kept].argmax(-1)
        logits_KV = _outputs(self.target, batch)[0][0, kept]
        return Answered(ids_N, place, logits_KV, self.own[row])

    @contextmanager
    def _installed(self, mixers: Mapping[str, Mixer]) -> Iterator[None]:
        owners = {path: self.target.get_submodule(path) for path in mixers}
        for path, mixer in mixers.items():
            site = self.choices[path].site
            assert site.binding is not None
            dtype = next(self.model.get_submodule(path).parameters()).dtype
            around = around_of(self.model, site)
            new = install(owners[path], mixer.to(dtype), site.binding, around)
            replace_module(self.target, path, new)
        try:
            yield
        finally:
            for path, owner in owners.items():
                replace_module(self.target, path, owner)

    def _rehearsed(self, given: dict[str, Any]) -> Rehearsed:
        """The rows, shortened so that outputs fit into `OUTPUT_BYTES`."""
        model = self.model
        batch = without_cache(model, beside(model, self.rehearsal(given)))
        mask = batch.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        tokens = next(v for v in batch.values() if isinstance(v, Tensor)).shape[:2]
        if without_logits(model) and len(tokens) == 2:
            # evenly spaced tokens of all rows rather than few rows: they share less context
            places = kept_places(*tokens, vocabulary_of(model)).to(device_of(model))
            if len(places) < tokens[1]:
                batch = {**batch, "logits_to_keep": places}
                real = None if real is None else real[:, places.to(real.device)]
        with torch.no_grad():
            reference, self.logits = _outputs(model, batch)
        fits = max(1, OUTPUT_BYTES // max(1, reference[:1].numel() * 4))
        if fits < len(reference):
            batch = {
                k: v[:fits] if isinstance(v, Tensor) and k != "logits_to_keep" else v
                for k, v in batch.items()
            }
            reference = reference[:fits].clone()
            real = None if real is None else real[:fits]
        finite_or_raise(reference, "the model's output", real)
        return batch, real, reference.log_softmax(-1) if self.logits else reference

    def _gap(self, rehearsed: Rehearsed) -> Tensor:
        batch, real, reference = rehearsed
        moved, _ = _outputs(self.target, batch)
        if self.logits:
            gap = (reference.exp() * (reference - moved.log_softmax(-1))).sum(-1)
        else:
            gap = (reference - moved).square().flatten(2).mean(-1)
        return (gap if real is None else gap[real.to(gap.device)]).double().mean()


def kept_places(rows: int, length: int, vocabulary: int) -> Tensor:
    """Positions whose logits are compared: all, or as many, evenly spaced, as `OUTPUT_BYTES`
    of float32 hold for all rows.

    The last token is among them; the first ones, which see little, come last in line.
    """
    most = max(1, OUTPUT_BYTES // max(1, 4 * rows * vocabulary))
    count = min(length, most)
    return length - 1 - torch.arange(count).flip(0) * length // count


def _outputs(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, bool]:
    """Logits, or the first tensor of the output, float32; and whether it is logits."""
    with evaluation(model):
        output = model(**batch)
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found.float(), True
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first.float(), False
