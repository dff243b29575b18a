"""A quantized base that one rank of a machine loads: what each rank holds on the way, and what the run makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantizers
import torch
from cells import Bench, Setup, reference_of, trial
from faults import FLAVOURS, packed, where
from ranks import on_ranks
from test_benchmarks import load as load_benchmark

import trainer_fsdp_patch
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.inspecting.leaves import leaves, span
from trainer_fsdp_patch.loading import moving, restoring, streaming
from trainer_fsdp_patch.testing.case import compare

ALLOCATIONS = load_benchmark("allocations")

pytestmark = [packed, where("peft>=0.20", "transformers>=5.1", "accelerate>=1.15")]

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch` sets."""


def load(folder: str, setup: Setup) -> Any:
    """A base as a launched program loads it. On a CPU accelerate refuses this loading for FSDP1, so it is not told."""
    from transformers import AutoModelForCausalLM

    before = {name: os.environ.get(name) for name in LAUNCHED}
    if setup.fsdp:
        os.environ.update(LAUNCHED)
    model = quantizers.load(folder, setup, AutoModelForCausalLM)
    for name, value in before.items():
        if setup.fsdp == 1:
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return model


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))


def vera(model: Any) -> Any:
    from peft import VeraConfig, get_peft_model

    return get_peft_model(model, VeraConfig(r=8, target_modules=["q_proj", "o_proj"]))


def dora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_dora=True))


for method in (lora, vera, dora):
    method.load = load  # type: ignore[attr-defined]

KINDS: dict[str, dict[str, Any]] = {
    "4bit": {"storage": "uint8"},
    "4bit-double": {"storage": "uint8", "kind": "nf4 double"},
    "4bit-bf16": {"storage": "bfloat16"},
    "8bit": {"storage": "8bit"},
    "torchao": {"quantizer": "torchao-int8"},
    "quanto": {"quantizer": "quanto-int8"},
}


CASES = [*((method, kind) for method in (lora, vera) for kind in KINDS), (dora, "4bit"), (dora, "torchao")]
"""DoRA reads the weight while it is made, which 8-bit and quanto do not allow on a CPU."""


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_run_is_right(bench: Bench, tmp_path: Path, method: Any, kind: str, fsdp: int) -> None:
    if fsdp not in FLAVOURS:
        pytest.skip("no FSDP2 with these releases and devices")
    setup = Setup(f"f{fsdp}-{kind}", fsdp=fsdp, ram_efficient=fsdp == 2, dtype="bfloat16", **KINDS[kind])
    one = trial.run(reference_of(setup), method, bench.base, tmp_path / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    outcome = trial.run(setup, method, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))


class Hands:
    """Has FSDP1 hand rank 0's bytes out on a CPU, where accelerate and torch refuse it because NCCL cannot."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        from accelerate.state import AcceleratorState
        from torch.distributed.fsdp import _init_utils

        plugin = AcceleratorState().fsdp_plugin
        if plugin is not None:
            plugin.sync_module_states = True
            plugin.param_init_fn = lambda module: module.to_empty(device="cpu", recurse=False)
            _init_utils._check_module_states_for_sync_module_states = lambda states: None  # type: ignore[assignment]


def handed(model: Any) -> Any:
    """LoRA, with a callback that changes the plugin."""
    from transformers import TrainerCallback

    handed.callbacks = lambda: [type("Handing", (Hands, TrainerCallback), {})()]  # type: ignore[attr-defined]
    return lora(model)


handed.load = load  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp1_hands_out_what_one_rank_has(bench: Bench, tmp_path: Path, kind: str) -> None:
    setup = Setup(f"f1-{kind}", fsdp=1, dtype="bfloat16", **KINDS[kind])
    one = trial.run(reference_of(setup), lora, bench.base, tmp_path / "one", ranks=1, patched=False)
    outcome = trial.run(setup, handed, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))


def test_a_budget_keeps_layers_that_one_rank_has_loaded(bench: Bench, tmp_path: Path) -> None:
    """They are full on every rank, so that rank 0's bytes go to all before FSDP takes the rest."""
    setup = Setup("f2-budget", ram_efficient=True, dtype="bfloat16", storage="uint8", budget="50%")
    one = trial.run(reference_of(setup), lora, bench.base, tmp_path / "one", ranks=1, patched=False)
    outcome = trial.run(setup, lora, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))


def ranks_load(base: str, setup: Setup, patched: bool, then: Callable[[Any, int], Any]) -> list[Any]:
    """What a function gives of a base that each of two ranks has loaded."""

    def child(rank: int) -> Any:
        if patched:
            trainer_fsdp_patch.patch(strict=True)
        with ALLOCATIONS.Allocations() as meter:
            model = load(base, setup)
        result = then(model, rank)
        return {"peak": meter.peak, "live": meter.live, **result}

    return on_ranks(child, 2)


def quantized_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if moving.is_quantized(module)]


def quantized_bytes(model: Any) -> int:
    """Of memory that is there, each once."""
    here = {span(leaf.tensor) for layer in quantized_layers(model) for leaf in leaves(layer) if not leaf.tensor.is_meta}
    return sum(end - start for _, start, end in here)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "4bit-bf16"])
def test_one_rank_has_the_bytes(bench: Bench, kind: str) -> None:
    """Of stock both do. What the other one allocates at once is a layer, and what is not quantized."""
    setup = Setup(f"f2-{kind}", ram_efficient=True, dtype="bfloat16", **KINDS[kind])

    def bytes_of(model: Any, rank: int) -> dict[str, int]:
        small = [
            leaf for layer in quantized_layers(model) for leaf in leaves(layer) if leaf.tensor.nbytes <= moving.KEPT
        ]
        return {"quantized": quantized_bytes(model), "small": sum(leaf.tensor.nbytes for leaf in small)}

    stock = ranks_load(bench.base, setup, False, bytes_of)
    ours = ranks_load(bench.base, setup, True, bytes_of)
    assert stock[0]["quantized"] == stock[1]["quantized"] == ours[0]["quantized"]
    assert ours[1]["quantized"] <= ours[1]["small"]
    assert ours[1]["peak"] < ours[0]["peak"]
    assert ours[1]["live"] <= ours[0]["live"] - (stock[0]["quantized"] - ours[1]["small"])


def test_a_checkpoint_that_is_quantized_already(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's bytes are the file's, and the other rank has none."""

    def saved(rank: int) -> Any:
        model = load(bench.base, Setup("one", fsdp=0, dtype="bfloat16", storage="uint8", kind="nf4 double"))
        if rank == 0:
            model.save_pretrained(tmp_path / "quantized")
        return {key: value.flatten()[:99].tolist() for key, value in model.state_dict().items() if "absmax" in key}

    wanted, _ = on_ranks(saved, 2)
    monkeypatch.setattr(quantizers, "load", lambda folder, setup, kind: kind.from_pretrained(folder))
    plain = Setup("f2", ram_efficient=True, dtype="bfloat16")

    def bytes_of(model: Any, rank: int) -> dict[str, Any]:
        before = quantized_bytes(model)
        restoring.restore(streaming.loaded(model), torch.device("cpu"))
        state = {key: value.flatten()[:99].tolist() for key, value in model.state_dict().items() if "absmax" in key}
        return {"before": before, "after": quantized_bytes(model), "state": state, "left": len(streaming.loaded(model))}

    first, second = ranks_load(str(tmp_path / "quantized"), plain, True, bytes_of)
    assert second["before"] < first["before"]
    assert second["after"] == first["after"] == first["before"]
    assert second["state"] == first["state"] == wanted
    assert second["left"] == 0


def test_a_program_without_a_trainer_gets_all(bench: Bench) -> None:
    """`accelerator.prepare` hands out what no plan has taken over: the forward is that of rank 0."""
    setup = Setup("f2", ram_efficient=True, dtype="bfloat16", storage="uint8")

    def logits(model: Any, rank: int) -> dict[str, Any]:
        from accelerate import Accelerator

        ids = torch.arange(8).unsqueeze(0)
        waiting = len(streaming.loaded(model))
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        model = Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
        return {"waiting": waiting, "logits": model(input_ids=ids).logits.float().tolist()}

    first, second = ranks_load(bench.base, setup, True, logits)
    assert first["waiting"] == second["waiting"] > 0
    assert first["logits"] == second["logits"]


@pytest.mark.parametrize(
    "environment", [{}, {"ACCELERATE_USE_FSDP": "true"}, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}], ids=str
)
def test_a_model_that_is_not_loaded_for_fsdp_is_loaded_as_ever(
    bench: Bench, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup("f2", ram_efficient=True, dtype="bfloat16", storage="uint8")
    monkeypatch.setitem(globals(), "LAUNCHED", environment)
    first, second = ranks_load(bench.base, setup, True, lambda model, rank: {"bytes": quantized_bytes(model)})
    assert first["bytes"] == second["bytes"]


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", None])
def test_quantizers_that_lay_weights_out_later_are_left_alone(method: str | None) -> None:
    quantizer = None if method is None else SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    assert not streaming.is_asked(quantizer)


def test_the_same_bytes_under_two_names_stay_the_same() -> None:
    """8-bit layers have their weight as `CB` too; what is moved to meta and back is one memory."""
    layer = torch.nn.Module()
    weight = torch.nn.Parameter(torch.arange(4096, dtype=torch.int8), requires_grad=False)
    weight.CB = weight.data  # type: ignore[attr-defined]
    weight.rows = weight.data[:2048]  # type: ignore[attr-defined]
    layer.weight, layer.table = weight, torch.arange(2000)
    for device in ("meta", "cpu"):
        moving.put(layer, list(moving.large(layer)), device)
        assert {leaf.path: leaf.tensor.device.type for leaf in moving.large(layer)} == dict.fromkeys(
            ("weight", "weight.CB", "weight.rows", "table"), device
        )
        new: Any = layer.weight
        assert new.CB.untyped_storage()._cdata == new.untyped_storage()._cdata
        assert (new.CB.shape, new.rows.shape, new.rows.dtype) == ((4096,), (2048,), torch.int8)


def test_layers_without_bytes_are_copied_and_known_by_name() -> None:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    layer.to("cpu")
    layer._parameters["weight"] = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    moving.put(layer, list(moving.large(layer)), "meta")
    import copy

    for weight in (layer.weight, copy.deepcopy(layer).weight):
        assert weight.is_meta
        assert type(weight).__name__ == "Params4bit"
        assert isinstance(weight, bitsandbytes.nn.Params4bit)
        assert inventory.is_quantized(weight)
        assert weight.quant_state.shape == (64, 64)
    moving.put(layer, list(leaves(layer)), "cpu")
    assert type(layer.weight) is bitsandbytes.nn.Params4bit
