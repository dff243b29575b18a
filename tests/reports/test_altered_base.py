"""An initialization that alters the base, without a seed before the model: every rank trains over rank 0's base.

The user asks for `init_lora_weights="pissa_niter_1"`, which draws random numbers. Stock shards another base on each
rank, beside rank 0's adapter; DDP hands out rank 0's model: https://github.com/huggingface/peft/issues/1626.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import Bench, Setup, reference_of
from checkpoints import failure
from faults import FLAVOURS, fsdp2, packed

from trainer_fsdp_patch import bits, devices, versions
from trainer_fsdp_patch.testing import case, forks, trial
from trainer_fsdp_patch.testing.case import Outcome


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def with_pissa(model: Any) -> Any:
    """As many random numbers as a rank happened to draw before."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank())
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa_niter_1")
    return get_peft_model(model, config)


def with_another_base(model: Any) -> Any:
    """Weights that no file holds, and an adapter; one of the tensors is the same everywhere."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.dim() == 2 and "down_proj" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter))
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))


def decomposed(name: str) -> Any:
    """LoRA by an initialization that decomposes the base's weights; one with data of its own on each rank."""

    def configure(model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(rank())
        rows = [{"input_ids": torch.randint(1, trial.VOCABULARY, (1, 24))} for _ in range(2)]
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
        if name == "loftq":
            return get_peft_model(
                model,
                LoraConfig(**settings, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
            )
        if name == "corda":
            from peft.tuners.lora.config import CordaConfig
            from peft.tuners.lora.corda import preprocess_corda

            config = LoraConfig(**settings, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
            preprocess_corda(model, config, run_model=lambda: [model(**row) for row in rows])
            return get_peft_model(model, config)
        if name == "eva":
            from peft import EvaConfig, initialize_lora_eva_weights

            config = LoraConfig(**settings, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
            model = get_peft_model(model, config)
            batches = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
            initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)
            return model
        return get_peft_model(model, LoraConfig(**settings, init_lora_weights=name))

    configure.__name__ = name
    return configure


# peft's LoftQ moves weights to an accelerator by name.
on_gpu = pytest.mark.skipif(devices.kind() == "cpu", reason="peft decomposes for LoftQ on an accelerator only")
NAMED: list[Any] = ["olora"]
if versions.at_least("peft", "0.15.0"):
    has_attrs = pytest.mark.skipif(importlib.util.find_spec("attr") is None, reason="peft's CorDA imports attrs")
    NAMED += [pytest.param("loftq", marks=on_gpu), pytest.param("corda", marks=has_attrs), "eva"]

SETUPS = [
    Setup("f1", fsdp=1),
    Setup("f1-flat", fsdp=1, use_orig_params=False),
    Setup("f1-b16", fsdp=1, dtype="bfloat16"),
    Setup("f2"),
    Setup("f2-ram", ram_efficient=True),
    Setup("f2-hybrid", hybrid=True, ranks=4),
]
if not versions.at_least("transformers", "5.10.0"):
    # Older releases are asked for hybrid shards in other ways, and their other ranks have no weights to decompose.
    SETUPS = [setup for setup in SETUPS if not setup.hybrid and not setup.ram_efficient]
SETUPS = [setup for setup in SETUPS if setup.fsdp in FLAVOURS]


def error(setup: Setup, configure: Any, bench: Bench, folder: Path, *, patched: bool = True) -> str:
    one = trial.run(reference_of(setup), configure, bench.base, folder / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    return case.compare(trial.run(setup, configure, bench.base, folder / "ranks", patched=patched), one, setup).error


@pytest.mark.parametrize("configure", [with_pissa, with_another_base], ids=lambda item: item.__name__)
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_ranks_train_over_one_base(bench: Bench, tmp_path: Path, setup: Setup, configure: Any) -> None:
    assert error(setup, configure, bench, tmp_path) == ""


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("name", NAMED)
def test_by_name(bench: Bench, tmp_path: Path, name: str, fsdp: int) -> None:
    assert error(Setup(f"f{fsdp}", fsdp=fsdp), decomposed(name), bench, tmp_path) == ""


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_stock_trains_over_several(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    assert error(Setup(f"f{fsdp}", fsdp=fsdp), with_another_base, bench, tmp_path, patched=False)


def with_another_packed_base(model: Any) -> Any:
    """A 4-bit base that each rank has quantized from other weights."""
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(rank())
    for module in list(model.modules()):
        for layer in list(module.children()):
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                dense = torch.randn(layer.out_features, layer.in_features) * 0.1
                weight = bitsandbytes.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", module=layer)
                layer.weight = weight.to("cpu")
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))


@packed
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_packed_weights(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    setup = Setup(f"f{fsdp}-4bit", fsdp=fsdp, storage="uint8", dtype="bfloat16")
    assert error(setup, with_another_packed_base, bench, tmp_path) == ""


def prepare(change: Any, setup: Setup, base: str, folder: str, ranks: int, rank: int) -> Outcome:
    """Up to the first step, with collectives and passes over the base counted."""
    from cells import METHODS
    from transformers import Trainer

    given = trial.enter(setup, folder, ranks, patched=True)
    model = METHODS["lora"](trial.load_base(base, setup))
    change(model)
    seen: list[int] = []
    upstream = bits.fingerprint

    def fingerprint(tensor: Any) -> Any:
        seen.append(id(tensor))
        return upstream(tensor)

    bits.fingerprint = fingerprint
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(12))
    trainer.train()
    return Outcome(extra={"frozen": sum(not item.requires_grad for item in model.parameters()), "seen": len(seen)})


def test_another_shape_is_refused(bench: Bench, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        if rank() == 1:
            model.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(97, 64), requires_grad=False)

    outcomes = forks.launch(prepare, change, Setup("f1", fsdp=1), bench.base, str(tmp_path), 2, ranks=2)
    for outcome in outcomes:
        assert outcome.error.startswith("AdapterError: base_model.model.model.embed_tokens.weight: torch.float32 [9")
        assert "on rank 0, and not so on rank 1" in outcome.error


@fsdp2
def test_a_base_that_fsdp_hands_out_is_not_read(bench: Bench, tmp_path: Path) -> None:
    """What rank 0 alone has loaded is broadcast anyhow; FSDP1 does so on GPUs only."""
    counts = []
    for efficient in (False, True):
        setup = Setup("f2", ram_efficient=efficient)
        outcomes = forks.launch(prepare, lambda model: None, setup, bench.base, str(tmp_path), 2, ranks=2)
        assert failure(outcomes) == ""
        counts.append(outcomes[0].extra["seen"])
    assert counts[0] > counts[1]
