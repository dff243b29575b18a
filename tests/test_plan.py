"""Plans of tiny models: roles, placements, flags and their reasons; meta tensors and no process group."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import peft
import pytest
import torch
from cells import METHODS, ON_LLAMA
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import trainer_fsdp_patch
from trainer_fsdp_patch import sizes
from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.names import canonical


def llama(device: str = "cpu") -> Any:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, **sizes))


def roles(plan: Any) -> dict[str, str]:
    return {item.tensor.name: item.tensor.role for item in plan.placements}


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A")
@pytest.mark.parametrize("method", [method for method in ON_LLAMA if method != "xlora"])
def test_the_adapter_is_replicated_and_the_base_sharded(method: str) -> None:
    model = METHODS[method](llama())
    plan = trainer_fsdp_patch.plan(model)
    for item in plan.placements:
        tensor = item.tensor
        assert (tensor.role == "adapter") == tensor.trainable
        if tensor.role in ("adapter", "projection"):
            assert tensor.owned or method == "adaption_prompt", "its prompts sit in a module of the base"
            assert item.placement == "replicate"
        elif tensor.kind == "parameter":
            # What two layers share, as replicated ones do, can be in neither unit.
            assert (tensor.role, item.placement) == ("base", "replicate" if "shared by" in item.reason else "shard")
    base = sum(
        item.tensor.nbytes for item in plan.placements if (item.tensor.role, item.tensor.kind) == ("base", "parameter")
    )
    assert base == sum(p.numel() * 4 for p in llama().parameters())
    assert plan.nbytes("replicate", "base") < base / 2


def test_vera_in_detail() -> None:
    plan = trainer_fsdp_patch.plan(METHODS["vera"](llama()))
    found = {item.tensor.name: item.tensor for item in plan.placements}
    projection = found["base_model.vera_A.default"]
    assert (projection.kind, projection.role, len(projection.names)) == ("buffer", "projection", 1)
    assert found["base_model.model.model.layers.1.self_attn.q_proj.vera_lambda_b.default"].role == "adapter"
    assert plan.use_orig_params is None
    assert plan.summary() == "shard 337.2 KiB (21 base); replicate 5.2 KiB (8 adapter, 2 base, 2 projection)"


def test_a_plan_is_printed_in_a_few_lines() -> None:
    plan = trainer_fsdp_patch.plan(METHODS["vera"](llama()), ranks=2)
    text = str(plan).splitlines()
    assert text[0] == f"FSDP2 on 2 ranks: {plan.summary()}."
    assert re.fullmatch(
        r"\d+\.\d KiB of parameters on each rank between steps, and at most \d+\.\d KiB of gathered units\.", text[1]
    )
    assert text[2].startswith(f"{plan.traffic[0]} gathers in forward and backward, of ")
    assert repr(plan) == f"<Plan for FSDP2: {plan.summary()}>"
    many = dataclasses.replace(plan, reasons=tuple(map(str, range(20))))
    assert len(str(many).splitlines()) == 10
    assert len(repr(many)) < 200


def test_a_plan_of_units_by_size_says_nothing_of_gathers() -> None:
    plan = dataclasses.replace(trainer_fsdp_patch.plan(METHODS["lora"](llama()), ranks=2), units=None, traffic=None)
    assert "gather" not in str(plan)


def test_what_of_the_base_stays_whole_is_said_with_its_bytes() -> None:
    plan = trainer_fsdp_patch.plan(METHODS["lora_replicated"](llama()))
    [cost] = plan.costs()
    tensors = [item.tensor for item in plan.placements if item.placement == "replicate"]
    taken = sum(item.nbytes for item in tensors if item.role == "base" and item.kind == "parameter")
    assert cost.startswith(f"{sizes.size(taken)} of the base full on each rank: shared by 2")
    assert trainer_fsdp_patch.plan(METHODS["lora"](llama())).costs() == []


def test_a_plan_reads_meta_tensors_and_changes_nothing() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = peft.get_peft_model(llama("meta"), config, low_cpu_mem_usage=True)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    plan = trainer_fsdp_patch.plan(model, fsdp_version=1, mixed_precision="bf16")
    assert len(plan.ignored) == 4
    assert (plan.use_orig_params, plan.param_dtype, plan.autocast) == (True, "bfloat16", "bfloat16")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_modules_to_save_and_the_frozen_original() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    config = peft.VeraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    found = roles(trainer_fsdp_patch.plan(peft.get_peft_model(model, config)))
    assert found["base_model.model.classifier.modules_to_save.default.weight"] == "adapter"
    assert found["base_model.model.classifier.original_module.weight"] == "base"


def test_an_inactive_adapter_is_replicated_too() -> None:
    model = METHODS["lora"](llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    plan = trainer_fsdp_patch.plan(model)
    other = [item for item in plan.placements if ".other." in item.tensor.name]
    assert {(item.tensor.role, item.placement) for item in other} == {("projection", "replicate")}


def test_the_smaller_part_of_a_mixed_fsdp1_unit_stays_whole() -> None:
    """QLoRA recipes cast the norms to fp32 and leave the rest in bf16; FSDP1 takes one dtype a unit."""
    model = llama().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model = METHODS["lora"](model)
    odd = [item for item in trainer_fsdp_patch.plan(model, fsdp_version=1).ignored if item.tensor.role == "base"]
    assert len(odd) == 5
    assert all("FSDP1 takes one dtype" in item.reason and "norm" in item.tensor.name for item in odd)
    assert not [item for item in trainer_fsdp_patch.plan(model).ignored if item.tensor.role == "base"]


def test_units_by_size_count_as_one() -> None:
    """Where units go by size, nobody knows which dtypes meet, so one dtype is sharded in the whole model."""
    model = llama()
    for parameter in model.model.layers[0].parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model = METHODS["lora"](model)
    assert not [item for item in trainer_fsdp_patch.plan(model, fsdp_version=1).ignored if item.tensor.role == "base"]
    alone = trainer_fsdp_patch.plan(model, fsdp_version=1, units=())
    assert len([item for item in alone.ignored if item.tensor.role == "base"]) == 9


def packed(dtype: torch.dtype) -> Any:
    """LoRA on a base one of whose weights is stored as bitsandbytes stores 4 bits."""
    model = METHODS["lora"](llama())
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(2048, 1).to(dtype), requires_grad=False)
    layer.weight.quant_state = object()
    return model


def test_integer_storage_is_replicated() -> None:
    plan = trainer_fsdp_patch.plan(packed(torch.uint8))
    [item] = [item for item in plan.placements if item.tensor.role == "quantized"]
    assert (item.placement, "stored as uint8" in item.reason) == ("replicate", True)


def test_float_storage_decides_the_dtype_of_units() -> None:
    plan = trainer_fsdp_patch.plan(packed(torch.float32), mixed_precision="bf16")
    assert (plan.param_dtype, plan.autocast) == ("float32", "bfloat16")
    assert plan.reasons[0].startswith("param_dtype is float32, not bfloat16")
    assert trainer_fsdp_patch.plan(packed(torch.bfloat16), mixed_precision="bf16").reasons == ()


def test_a_users_param_dtype_that_would_change_packed_bytes_is_refused() -> None:
    with pytest.raises(PlanError, match=r"The cast would change the packed bytes\. Use float32 for both"):
        trainer_fsdp_patch.plan(packed(torch.float32), mixed_precision="bf16", param_dtype="bfloat16")


def test_ignored_modules_of_the_user() -> None:
    model = METHODS["vera"](llama())
    plan = trainer_fsdp_patch.plan(model, ignored_modules=".*mlp")
    users = {item.tensor.name for item in plan.placements if item.reason == "in the user's ignored_modules"}
    assert len(users) == 6
    assert all(".mlp." in name for name in users)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fsdp_version": 3}, "fsdp_version: 3. No plan was made. Use one of 1, 2."),
        ({"mixed_precision": "int8"}, "mixed_precision: 'int8'. No plan was made. Use one of 'no', 'bf16'"),
        ({"ignored_modules": "("}, "ignored_modules: '(' is no regular expression"),
    ],
)
def test_unknown_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(PlanError) as raised:
        trainer_fsdp_patch.plan(METHODS["vera"](llama()), **settings)
    assert str(raised.value).startswith(expected)
    assert raised.value.setting == next(iter(settings))


def test_canonical_names() -> None:
    for name in ("_fsdp_wrapped_module.a._checkpoint_wrapped_module.b.weight", "_orig_mod.a.b.weight", "a.b.weight"):
        assert canonical(name) == "a.b.weight"
    assert canonical("_fsdp_wrapped_module") == ""
    assert canonical("my_orig_mod.a") == "my_orig_mod.a"
