"""Units that mix trainable and frozen, two dtypes or packed integers cannot be flattened."""

from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup, has, trial
from faults import FLAVOURS, added, canary, equals_one_process, fault, fsdp2, packed, takes_adapters, where

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def test_canary() -> None:
    canary("transformers_v4_40_wrap_model")


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (Setup("f1-flat", fsdp=1, use_orig_params=False), "uniform `requires_grad`"),
        # https://github.com/huggingface/peft/pull/1706
        pytest.param(Setup("f1-bf16", fsdp=1, dtype="bfloat16"), "uniform dtype", marks=where("peft>=0.12.dev0")),
        pytest.param(
            Setup("f1-uint8", fsdp=1, dtype="bfloat16", storage="uint8"), "Cannot flatten integer dtype", marks=packed
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_vera_on_fsdp1(bench: Bench, setup: Setup, expected: str) -> None:
    fault(bench, "vera", setup, expected)


@where("peft>=0.12.dev0")
def test_dora_reads_a_sharded_weight(bench: Bench) -> None:
    fault(bench, "dora", Setup("f1", fsdp=1), "tuple index out of range")


@fsdp2
@pytest.mark.parametrize("method", ["vblora", "unilora", "tinylora"])
def test_a_parameter_shared_by_layers(bench: Bench, method: str) -> None:
    fault(bench, method, Setup("f2"), "Invariant encountered")


def with_fp32_norms(model: Any) -> Any:
    """What QLoRA recipes do before they add the adapter: norms and embeddings in fp32, the packed rest in bf16."""
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name or "lm_head" in name:
            parameter.data = parameter.data.float()
    return METHODS["lora"](model)


@packed
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_norms_in_another_dtype_than_the_packed_weights(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    setup = Setup("norms", fsdp=fsdp, dtype="bfloat16", storage="bfloat16", amp="bf16")
    if fsdp == 1:
        stock = trial.run(setup, with_fp32_norms, bench.base, tmp_path / "stock", patched=False)
        assert "uniform dtype" in stock.error
    equals_one_process(bench, with_fp32_norms, setup, tmp_path)


@takes_adapters
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_an_adapter_that_transformers_added(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    equals_one_process(bench, added, Setup("added", fsdp=fsdp), tmp_path)


def apart(model: Any) -> Any:
    """An adapter that each rank initialises from a seed of its own, as scripts without set_seed do."""
    import os

    model = METHODS["vera"](model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * int(os.environ.get("RANK", "0"))
    return model


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_ranks_that_start_apart_train_rank_0s_adapter(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    equals_one_process(bench, apart, Setup("apart", fsdp=fsdp), tmp_path)


def buffers(method: str, patched: bool, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Train, then say which floating-point buffers of the model lost bits on the way."""
    from transformers import Trainer

    from trainer_fsdp_patch.names import canonical

    given = trial.enter(setup, folder, 2, patched=patched)
    model = METHODS[method](trial.load_base(base, setup))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    trainer.train()
    after = {canonical(name): buffer for name, buffer in trainer.model.named_buffers()}
    changed = [name for name in before if not before[name].equal(after[name])]
    return Outcome(extra={"buffers": len(before), "changed": changed})


@pytest.mark.parametrize("method", [method for method in ("vera", "frod") if has(method)])
def test_buffers_keep_their_bits_under_mixed_precision(bench: Bench, tmp_path: Path, method: str) -> None:
    """Stock rounds rotary tables and projections to bf16 in place."""
    setup = Setup("buffers", fsdp=1, amp="bf16")
    [patched, _] = forks.launch(buffers, method, True, setup, bench.base, str(tmp_path), ranks=2)
    assert not patched.error, patched.extra
    assert patched.extra["buffers"] > 2
    assert patched.extra["changed"] == []
    [stock, _] = forks.launch(buffers, method, False, setup, bench.base, str(tmp_path), ranks=2)
    assert any("rotary_emb" in name for name in stock.extra["changed"])
    assert any(f"{method}_" in name for name in stock.extra["changed"])


@where("transformers>=5.10.dev0")
@pytest.mark.parametrize(
    ("method", "setup", "expected"),
    [
        ("llava vera", Setup("f1", fsdp=1), "Could not find the transformer layer class"),
        ("lora_replicated", Setup("f1", fsdp=1), "must match the size of tensor"),
        ("lora", Setup("f1-quanto", fsdp=1, quantizer="quanto-int8", dtype="bfloat16"), ""),
    ],
)
def test_units_that_a_model_cannot_have(bench: Bench, method: str, setup: Setup, expected: str) -> None:
    """Classes that are absent, weights that two units share, and weights that only look like floating point."""
    fault(bench, method, setup, expected)
