"""base_budget "auto": what a rank has room for, from a meter that is put in the device's place."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, reference_of, trial
from faults import FLAVOURS
from test_plan import llama

import trainer_fsdp_patch
from trainer_fsdp_patch import sizes
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.measuring.memory import Room
from trainer_fsdp_patch.planning import expecting
from trainer_fsdp_patch.testing import case

LAYER = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64)
"""Bytes of a layer of the models of plans."""


def budget_of(room: Room, **settings: Any) -> Any:
    return trainer_fsdp_patch.plan(METHODS["lora"](llama()), base_budget="auto", room=room, ranks=2, **settings)


def needed(fsdp: int, **settings: Any) -> int:
    """Bytes beside the budget: at rest, gathered, and a gradient and two moments of fp32 for each value that trains."""
    model = METHODS["lora"](llama())
    taken = expecting.footprint(trainer_fsdp_patch.plan(model, ranks=2, fsdp_version=fsdp, **settings), 2)
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    assert taken.gathered
    return taken.rest + taken.gathered + trained * 12


@pytest.mark.parametrize("fsdp", [1, 2])
def test_what_is_left_beside_all_else_is_the_budget(fsdp: int) -> None:
    least = needed(fsdp)
    for more, layers in ((LAYER // 2 - 1, 0), (LAYER // 2, 1), (LAYER - 1, 1), (LAYER, 2)):
        # A tenth of the device and the activations are not to be had.
        room = Room(free=least + more + 100 + 50, total=1000, activations=50)
        plan = budget_of(room, fsdp_version=fsdp)
        assert sum("layers" in home for home, _ in plan.resident) == layers
        assert plan.reasons[0].startswith(f"base_budget auto ({sizes.size(more)}): ")


def test_no_room_is_no_budget() -> None:
    plan = budget_of(Room(free=0, total=0, activations=0))
    assert plan.resident == ()
    assert "auto (0 B): 0 of 5 units" in plan.reasons[0]


def test_where_gathers_are_not_known_all_of_the_base_counts() -> None:
    base = sum(item.numel() * 4 for item in llama().parameters())
    room = Room(free=needed(2) + base // 2, total=0, activations=0)
    assert len(budget_of(room).resident) == 5
    assert len(budget_of(room, units=()).resident) < 5


def test_a_plan_by_hand_asks_the_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "meter", lambda device: (2**40, 2**40))
    assert len(trainer_fsdp_patch.plan(METHODS["lora"](llama()), base_budget="auto", ranks=2).resident) == 5
    monkeypatch.setattr(memory, "meter", lambda device: (0, 2**40))
    assert trainer_fsdp_patch.plan(METHODS["lora"](llama()), base_budget="auto", ranks=2).resident == ()


def test_the_machine_is_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    _, total = memory.measured(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    free, part = memory.measured(torch.device("cpu"))
    assert part == total // 4
    assert 0 < free <= part


def test_what_torch_keeps_of_an_accelerator_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        mem_get_info = staticmethod(lambda device: (100, 1000))
        memory_reserved = staticmethod(lambda device: 70)
        memory_allocated = staticmethod(lambda device: 30)
        max_memory_allocated = staticmethod(lambda device: 45)
        reset_peak_memory_stats = staticmethod(lambda device: resets.append(device))

    resets: list[Any] = []
    monkeypatch.setattr(torch, "xpu", Module)
    assert memory.measured(torch.device("xpu")) == (140, 1000)
    assert memory.left(torch.device("xpu")) == (125, 1000), "of 170 bytes 45 were in use at once"
    assert resets == [torch.device("xpu")]


def test_what_a_rank_holds_of_the_model_is_free_to_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "meter", lambda device: (1000, 5000))
    nbytes = sum(item.numel() * 4 for item in llama().parameters())
    assert memory.room(llama(), torch.device("cpu")).free == 1000 + nbytes
    assert memory.room(llama("meta"), torch.device("cpu")).free == 1000


class Given:
    """TrainingArguments, as far as an estimate reads them."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_activations_by_hand() -> None:
    model = llama()
    model.config._attn_implementation = "sdpa"
    model.config.max_position_embeddings = 10**6
    rows = Given(per_device_train_batch_size=3, max_length=10)
    # Two layers of 17 values for each of 64 features in fp32, and logits over 96 words.
    assert memory.activations(model, 0, rows) == 30 * (2 * 17 * 64 * 4 + 96 * 12)
    rows.bf16 = True
    assert memory.activations(model, 0, rows) == 30 * (2 * 17 * 64 * 2 + 96 * 10)
    rows.gradient_checkpointing = True
    assert memory.activations(model, 0, rows) == 30 * ((2 + 17) * 64 * 2 + 96 * 10)
    model.config._attn_implementation = "eager"
    assert memory.activations(model, 0, rows) == 30 * (((2 + 17) * 64 + 3 * 4 * 10) * 2 + 96 * 10)
    model.config._attn_implementation = "sdpa"
    assert memory.activations(model, 0) == 4096 * (2 * 17 * 64 * 4 + 96 * 12)
    model.config.max_position_embeddings = 64
    assert memory.activations(model, 0) == 64 * (2 * 17 * 64 * 4 + 96 * 12)
    assert memory.activations(torch.nn.Linear(2, 2), 1000) == 250


def lesser(model: Any) -> Any:
    """LoRA where rank 0 has room for both layers, and rank 1 for one."""
    model = METHODS["lora"](model)
    fsdp = int(os.environ["TEST_FSDP"])
    taken = expecting.footprint(trainer_fsdp_patch.plan(model, ranks=2, fsdp_version=fsdp, base_budget=0), 2)
    held = sum(item.numel() * 4 for item in model.parameters())
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    layers = 1 if os.environ.get("RANK") == "1" else 2
    needs = taken.rest + int(taken.gathered or 0) + trained * 12 - held + layers * LAYER // 2
    memory.meter = lambda device: (needs, 0)
    memory.activations = lambda *_: 0
    memory.gauge = lambda device: (0, 0)
    return model


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_the_rank_with_the_least_room_decides(
    bench: Bench, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, fsdp: int
) -> None:
    monkeypatch.setenv("TEST_FSDP", str(fsdp))
    setup = Setup("auto", fsdp=fsdp, budget="auto")
    outcome = trial.run(setup, lesser, bench.base, tmp_path)
    verdict = case.compare(outcome, bench.reference("lora", reference_of(setup)), setup)
    assert verdict.right, verdict.error
    assert outcome.footprint is not None
    assert outcome.planned is not None
    assert outcome.footprint.replicated == outcome.planned.replicated
    assert LAYER <= outcome.footprint.replicated < 2 * LAYER
