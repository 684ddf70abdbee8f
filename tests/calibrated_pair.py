"""A tiny teacher and its students, for tests of calibration."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mla_blocks import PAPER
from torch import nn

from reattend.data import Dataset
from reattend.finder import find_attention
from reattend.install.adapter import install, replace_module
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.plan_sections import Calibrate
from reattend.statistics import collect
from reattend.weights import build_dense

VOCABULARY = 61
SETTINGS = Calibrate(tokens=6000, batch_size=4, seq_len=24, lr=1e-2)
SHORT = Calibrate(tokens=1500, batch_size=4, seq_len=24)


def data(rows: int, seed: int, padded: bool = False) -> Dataset:
    order = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, 24), generator=order)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(0, rows, 2):
            mask[row, 13 + row % 7 :] = 0
    return Dataset([{"input_ids": ids, "attention_mask": mask}], description="random", seed=0)


def convert(teacher: nn.Module, rank: int | None) -> nn.Module:
    """Every block to MLA of that rank (0: the exact setting), or to the normal form (None).

    The normal form shares its weights with the teacher.
    """
    found = find_attention(teacher)
    assert len(found.sites) == 2
    look = dict(teacher.named_parameters()).__getitem__
    dense = {
        s.path: (build_dense(s.spec, look, s.hidden_size, s.memory_size), s.binding)
        for s in found.sites
    }
    tensors = [*teacher.parameters(), *teacher.buffers()]
    student = copy.deepcopy(teacher, {id(t): t for t in tensors})
    needs = dict.fromkeys(dense, frozenset({"attention"}))
    rows = data(8, 1).batches(4)
    seen = collect(teacher, dense, rows, needs=needs) if rank is not None else {}
    for path, (block, binding) in dense.items():
        mixer: Any = block
        if rank is not None:
            exact = ToMla().exact_setting(block.config)
            # The published start leaves training the most to recover.
            options = exact
            if rank:
                options = MlaOptions(kv_lora_rank=rank, qk_rope_head_dim=4, **PAPER)
            mixer = ToMla().build(block, seen[path], options).mixer
        mixer.to(next(teacher.parameters()).dtype)
        replace_module(student, path, install(student.get_submodule(path), mixer, binding))
    return student


def tiny_teacher() -> Any:
    """A random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def teacher_and_students() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Teacher, MLA student, identity student; tests copy before they train."""
    teacher = tiny_teacher()
    return teacher, convert(teacher, 8), convert(teacher, None)


def fresh(student: nn.Module) -> nn.Module:
    return copy.deepcopy(student)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
