"""Units by size: what a policy that sees sizes alone would cut out of the modules that need it."""

from __future__ import annotations

from typing import Any

import pytest
from faults import FLAVOURS, skip_without_reference
from matrix import METHODS, Bench, Setup
from test_plan import llama

from trainer_fsdp_patch import units


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize(
    "method", ["adaption_prompt", "prompt", "cpt", "lora_embedding", "lora_replicated", "shadow", "llama_tied lora"]
)
def test_units_by_size(bench: Bench, method: str, fsdp: int) -> None:
    """Adapters that read below the layer they adapt, share modules with the base or hand on more than tensors."""
    setup = Setup(f"f{fsdp} size", fsdp=fsdp, wrap="size")
    skip_without_reference(bench, method, setup)
    _, verdict = bench.cell(method, setup, patched=True)
    assert verdict.right, verdict.error


def named(model: Any, barred: Any) -> set[str]:
    return {name for name, module in model.named_modules() if name and barred(module)}


def test_what_an_adapter_reads_stays_with_it() -> None:
    model = METHODS["lora"](llama())
    layer = "base_model.model.model.layers.0"
    barred = named(model, units.barred(model))
    assert f"{layer}.self_attn.q_proj.base_layer" in barred
    assert not {layer, f"{layer}.self_attn", f"{layer}.self_attn.q_proj", f"{layer}.mlp.up_proj"} & barred


@pytest.mark.parametrize("method", ["lora", "mixed", "adaption_prompt", "prompt"])
def test_models_and_tuners_go_past_their_children_and_their_layers_may_be_units(method: str) -> None:
    model = METHODS[method](llama())
    parts = named(model, lambda module: id(module) in units.parts(model))
    assert "base_model" in parts
    layers = [name for name in dict(model.named_modules()) if name.endswith(("layers.0", "layers.0.mlp.up_proj"))]
    assert len(layers) == 2
    assert not parts & set(layers)


def test_a_module_with_two_parents_is_no_unit_nor_is_one_of_them() -> None:
    model = METHODS["prompt"](llama())
    barred = named(model, units.barred(model))
    assert {"base_model.model.embed_tokens", "base_model.model"} <= barred
    assert "base_model.lm_head" not in barred


@pytest.mark.skipif(not METHODS["shadow"].exists, reason="this peft has no Shadow")
def test_a_block_may_be_a_unit_and_what_adapts_it_may_not() -> None:
    model = METHODS["shadow"](llama())
    parts = named(model, lambda module: id(module) in units.parts(model))
    layer = "base_model.model.model.layers.0"
    assert layer in parts
    assert not {f"{layer}.base_layer", f"{layer}.base_layer.mlp.up_proj"} & parts
