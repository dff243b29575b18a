"""The walk of a model: its names, parents and places are those that torch gives, whatever is shared."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from cells import METHODS, Bench  # noqa: F401
from test_plan import llama

from trainer_fsdp_patch import names
from trainer_fsdp_patch.inspecting import inventory, tuning, units, walk
from trainer_fsdp_patch.planning.plan import make_plan
from trainer_fsdp_patch.planning.prepared import canonical

EVERYTHING = [name for name in ("lora", "vera", "lora_replicated", "prompt", "lora_head", "mixed") if name in METHODS]


@pytest.mark.parametrize("method", EVERYTHING)
def test_a_walk_gives_what_torch_gives(method: str) -> None:
    model = METHODS[method](llama())
    taken = walk.take(model)
    assert Counter(map(id, taken.modules)) == Counter(map(id, model.modules()))
    assert taken.named(module for module in model.modules() if module._parameters) == unordered(taken, model)
    parents = Counter(id(child) for module in model.modules() for child in module._modules.values())
    assert [taken.parents_of(module) for module in taken.modules] == [parents[id(module)] for module in taken.modules]
    every_name: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        every_name.setdefault(id(parameter), set()).add(name)
    whole = inventory.take(model)
    further = whole.further_names()
    for slots in whole.shared():
        if slots[0].kind == "parameter":
            found = {slot.name for slot in slots}.union(further.get(slots[0].name, ()))
            assert found == every_name[id(slots[0].tensor)]


def unordered(taken: walk.Walk, model: Any) -> list[tuple[str, Any]]:
    """What torch names of the modules with parameters, breadth first unless names are several."""
    named = [(name, module) for name, module in model.named_modules() if module._parameters]
    several = {id(module) for _, module in taken.further}
    places = {id(module): place for place, module in enumerate(taken.modules)}
    single = several.isdisjoint(id(module) for _, module in named)
    return sorted(named, key=lambda item: places[id(item[1])]) if single else named


@pytest.mark.parametrize("method", EVERYTHING)
def test_what_is_above_a_module_and_what_is_a_part_of_a_unit(method: str) -> None:
    model = METHODS[method](llama())
    taken = walk.take(model)
    parts = units.parts(model)
    for module in taken.modules:
        above = {id(other) for other in model.modules() if other is not module and module in set(other.modules())}
        assert {id(other) for other in taken.above(module)} == above
        assert (id(module) in units.parts(model, taken, [module])) == (id(module) in parts)


def test_wrappers_have_the_name_of_what_they_wrap() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, key: str, inside: torch.nn.Module) -> None:
            super().__init__()
            self.add_module(key, inside)

    model: torch.nn.Module = torch.nn.Linear(2, 2)
    for key in names.WRAPPERS:
        model = Wrapped(key, torch.nn.Sequential(Wrapped(key, model)))
    found = inventory.take(model)
    assert [slot.name for slot in found.slots] == [canonical(name) for name, _ in model.named_parameters()]
    assert [slot.name for slot in found.slots] == ["0.0.0.weight", "0.0.0.bias"]


class Layer(torch.nn.Module):
    """A unit with some experts in it."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(experts))


def adapted(layers: int, experts: int) -> Any:
    """A model with LoRA in all of its layers."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(*(Layer(experts) for _ in range(layers)))
    return get_peft_model(model, LoraConfig(r=2, target_modules=r"\d+\.experts\.\d+"))


def calls(model: Any, **settings: Any) -> int:
    """Calls of functions, Python's and C's, that one plan takes; what is cached for each class is not counted."""
    made = Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        made[event] += 1

    make_plan(model, units=["Layer"], **settings)
    gc.disable()
    sys.setprofile(count)
    try:
        make_plan(model, units=["Layer"], **settings)
    finally:
        sys.setprofile(None)
        gc.enable()
    return made["call"] + made["c_call"]


@pytest.mark.parametrize("settings", [{"fsdp_version": 1}, {"fsdp_version": 2}, {"adapter_placement": "shard"}])
def test_each_further_module_costs_a_plan_as_much_as_the_last_one(settings: dict[str, Any]) -> None:
    """A plan is linear in layers and in experts: the number of calls is, to the last one."""
    for sizes in ([(2, 2), (2, 12), (2, 22)], [(2, 4), (12, 4), (22, 4)]):
        small, middle, large = (calls(adapted(*size), **settings) for size in sizes)
        assert 0 < large - middle == middle - small


def test_children_are_peft_s_by_class() -> None:
    model = METHODS["lora"](llama())
    layers = tuning.adapted(tuning.by_class(model.modules()))
    assert {type(layer).__name__ for layer in layers} >= {"Linear"}
    assert all("base_layer" in layer._modules for layer in layers if type(layer).__name__ == "Linear")
