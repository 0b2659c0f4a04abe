"""Fused norms: the sums of the norms that they stand for, under the same names."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.norms import FusedRmsNorm, fuse_norms
from tests.tiny import llama_folder, t5_folder


@pytest.mark.parametrize(("make", "loader", "norms"), [
    (t5_folder, AutoModelForSeq2SeqLM, 2 * 2 + 1 + 3 * 2 + 1), (llama_folder, AutoModelForCausalLM, 2 * 2 + 1),
])  # fmt: skip
def test_a_model_with_fused_norms_is_the_same_model(make: object, loader: object, norms: int, tmp_path: Path) -> None:
    make(tmp_path)  # type: ignore[operator]
    plain, fused = (loader.from_pretrained(tmp_path).eval() for _ in range(2))  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in (*plain.parameters(), *fused.parameters()):
            parameter.add_(0.01)  # so that norms scale
    kept = dict(fused.named_parameters())
    assert fuse_norms(fused) == norms
    assert fuse_norms(fused) == 0
    assert {name: id(value) for name, value in fused.named_parameters()} == {
        name: id(value) for name, value in kept.items()
    }
    ids = torch.tensor([[1, 4, 5, 6]])
    inputs = {"input_ids": ids, "labels": ids}
    wanted, found = plain(**inputs), fused(**inputs)
    assert torch.allclose(wanted.logits, found.logits, atol=1e-5)
    wanted.loss.backward()
    found.loss.backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name


def test_the_result_is_in_the_arithmetic_of_what_reads_it() -> None:
    fused, states = FusedRmsNorm(LlamaRMSNorm(8).bfloat16()), torch.randn(2, 8)
    assert fused(states).dtype == torch.float32
    assert fused(states.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(states).dtype == torch.bfloat16
