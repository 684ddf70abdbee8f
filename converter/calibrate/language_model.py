"""Stage 2 without a teacher: the next-token loss of the text, as TransMLA trains.

What it minimises is not the distance to the original: it also teaches what the text has and the
original does not know, or forgets what the text lacks. It is the baseline that distillation has
to beat, and the way to fine-tune a converted model on text of your own. The same weights are
trained as in every stage.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reattend.calibrate.end_to_end import EndToEnd
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.sites import call_arguments, logits, real_tokens
from reattend.calibrate.stage import counted
from reattend.calibrate.working import Working
from reattend.errors import ArgumentError
from reattend.mixers.base import Mixer


class LanguageModel(EndToEnd):
    """Mean -log p(next token) of the student, over tokens whose predecessor is real too."""

    loss_name: ClassVar[str] = "next-token loss in nats per token"

    def __init__(self, working: Working, ranks: Ranks) -> None:
        _check(working.student)
        super().__init__(working, ranks)

    def accumulate(self, inputs: dict[str, Tensor], silent: bool) -> dict[str, Tensor]:
        """See `Stage.accumulate`."""
        arguments = call_arguments(self.working.student, inputs)
        ids_BN = arguments.get("input_ids")
        guess_BNV = logits(self.working.student(**arguments))
        if not isinstance(ids_BN, Tensor) or guess_BNV is None or guess_BNV.dim() != 3:
            raise _unfit(self.working.student, "it gives no logits for rows of input_ids")
        labels_BN = next_tokens(ids_BN, counted(real_tokens(arguments, ids_BN), ids_BN, silent))
        (count,) = self.ranks.sum((labels_BN >= 0).sum())
        total = nn.functional.cross_entropy(
            guess_BNV.flatten(0, 1), labels_BN.flatten(), ignore_index=-1, reduction="sum"
        )
        loss = total / count.clamp_min(1)
        self.backward(loss, self.working.student, silent)
        (told,) = self.ranks.sum(loss.detach())
        return {"": told}

    def blame(self, group: str) -> str:
        """See `Stage.blame`."""
        return "output"


def next_tokens(ids_BN: Tensor, real_BN: Tensor | None) -> Tensor:
    """What every position has to predict, -1 where nothing counts: [B, N].

    Args:
        ids_BN: token ids.
        real_BN: True where a token counts; None counts all.
    """
    labels_BN = torch.full_like(ids_BN, -1)
    labels_BN[:, :-1] = ids_BN[:, 1:]
    if real_BN is not None:
        labels_BN[:, :-1].masked_fill_(~(real_BN[:, :-1] & real_BN[:, 1:]), -1)
        labels_BN[:, -1] = -1
    return labels_BN


def _check(student: nn.Module) -> None:
    """Refuse models whose tokens see what they would have to predict."""
    config: Any = getattr(student, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise _unfit(student, "its tokens are those of an encoder and of a decoder")
    for path, module in student.named_modules():
        if isinstance(module, Mixer):
            configs: list[Any] = [group.config for group in module.head_groups]
            if any(config.core.pattern == "full" for config in configs):
                raise _unfit(student, f"the attention of {path} sees later tokens")


def _unfit(student: nn.Module, why: str) -> ArgumentError:
    return ArgumentError(
        "calibrate.loss: lm needs a causal language model",
        where=type(student).__name__,
        why=why,
        next_step="calibrate with loss: distill",
    )
