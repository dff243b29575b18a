"""Units by size: what a policy that sees sizes alone would cut out of the modules that need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup
from faults import FLAVOURS, fsdp2, skip_without_reference
from test_plan import llama

from trainer_fsdp_patch.inspecting import inventory, units
from trainer_fsdp_patch.planning.plan import make_plan
from trainer_fsdp_patch.testing import case, forks, trial

BLOCK = "LlamaDecoderLayer"


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
    barred = named(model, units.cannot_be_unit(model))
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
    barred = named(model, units.cannot_be_unit(model))
    assert {"base_model.model.embed_tokens", "base_model.model"} <= barred
    assert "base_model.lm_head" not in barred


@pytest.mark.skipif(not METHODS["shadow"].exists, reason="this peft has no Shadow")
def test_a_block_may_be_a_unit_and_what_adapts_it_may_not() -> None:
    model = METHODS["shadow"](llama())
    parts = named(model, lambda module: id(module) in units.parts(model))
    layer = "base_model.model.model.layers.0"
    assert layer in parts
    assert not {f"{layer}.base_layer", f"{layer}.base_layer.mlp.up_proj"} & parts


@pytest.mark.skipif(not METHODS["shadow"].exists, reason="this peft has no Shadow")
def test_so_may_a_block_below_activation_checkpointing() -> None:
    """Shadow's layers, around blocks, have no tensor for a unit to hook: such units stayed gathered in the backward."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = METHODS["shadow"](llama())
    layers = [module for module in model.modules() if type(getattr(module, "base_layer", None)).__name__ == BLOCK]
    for layer in layers:
        layer.base_layer = checkpoint_wrapper(layer.base_layer)
    found = units.parts(model)
    assert layers
    assert {(id(layer) in found, id(layer.base_layer) in found) for layer in layers} == {(True, False)}


@pytest.mark.parametrize("method", [name for name in ("vera", "randlora", "vblora", "lily") if METHODS[name].exists])
def test_what_fsdp_ignores_does_not_decide_where_a_unit_ends(method: str) -> None:
    """All layers share projections, dictionaries or trainable tensors, and each is a unit all the same."""
    model = METHODS[method](llama())
    aside = {placement.tensor.name for placement in make_plan(model).ignored}
    ignored = {id(slot.tensor) for slot in inventory.named_tensors(model) if slot.name in aside}
    barred = named(model, units.cannot_be_unit(model, ignored))
    assert not {name for name in barred if name.endswith(("layers.0", "layers.1"))}


def unit_names(method: str, setup: Setup, base: str, folder: str, rank: int) -> case.Outcome:
    """FSDP2's units after a step, each with the number of parameters that it owns."""
    from torch.distributed.fsdp import FSDPModule
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    given.max_steps = 1
    model = METHODS[method](METHODS[method].load(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=METHODS[method].dataset(trial.BATCH))
    trainer.train()
    found = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
    return case.Outcome(extra={"units": found})


@fsdp2
@pytest.mark.parametrize(
    ("method", "units"),
    [("lora", 5), ("vera", 5), ("vblora", 5), ("tinylora", 5), ("llama_tied lora_tokens", 5), ("t5 vera", 5)],
)
def test_fsdp2_shards_layer_by_layer(bench: Bench, tmp_path: Path, method: str, units: int) -> None:
    """The root, two layers (four in T5, whose embeddings stay at the root), embeddings and head."""
    if not METHODS[method].exists:
        pytest.skip(f"this peft has no {method}")
    base = bench.base_of(METHODS[method].architecture)
    outcomes = forks.launch(unit_names, method, Setup("units"), base, str(tmp_path), ranks=2)
    assert not outcomes[0].error, outcomes[0].extra
    assert len(outcomes[0].extra["units"]) == units, outcomes[0].extra["units"]
