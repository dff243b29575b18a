"""Large trainable tensors: the rule by which they are sharded, and that they train, save and resume beside replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import peft
import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS, equals_one_process, where
from methods import ON_LLAMA
from test_plan import llama

import trainer_fsdp_patch
from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.planning import budget
from trainer_fsdp_patch.preparing import fsdp_plugin
from trainer_fsdp_patch.testing import forks, releases
from trainer_fsdp_patch.testing.case import Outcome

HEAD = "base_model.model.lm_head.modules_to_save.default.weight"
side_by_side = where("accelerate>=1.15.dev0", "torch>=2.13.dev0")


def sharded(method: str, **settings: Any) -> set[str]:
    plan = trainer_fsdp_patch.plan(METHODS[method](llama()), **settings)
    return {item.tensor.name for item in plan.sharded}


def test_a_small_adapter_is_replicated() -> None:
    assert sharded("lora_head") == set()
    assert sharded("lora_head", adapter_placement="replicate", adapter_budget=0) == set()


@side_by_side
def test_the_largest_tensors_are_sharded_until_the_others_fit() -> None:
    """The head costs 96 x 64 x (4 + 4 + 8) bytes on each rank, and all of LoRA's tensors 8 x 4 x 64 x 16."""
    lora = 8 * 4 * 64 * 16
    assert sharded("lora_head", adapter_budget=lora) == {HEAD}
    assert sharded("lora_head", adapter_budget=lora + 96 * 64 * 16) == set()
    assert len(sharded("lora_head", adapter_budget=lora - 1)) == 2
    assert len(sharded("lora_head", adapter_placement="shard")) == 9


def test_fsdp1_shards_whole_modules_alone_and_says_why_not_more() -> None:
    plan = trainer_fsdp_patch.plan(METHODS["lora_head"](llama()), fsdp_version=1, adapter_placement="shard")
    assert {item.tensor.name for item in plan.sharded} == {HEAD}
    [reason] = plan.reasons
    assert reason.startswith("1 of 9 trainable tensors are sharded")
    assert "FSDP1 would give its unit's frozen weights a gradient" in reason
    assert sharded("lora_head", fsdp_version=1, adapter_placement="shard", use_orig_params=False) == set()


@side_by_side
def test_what_several_units_share_is_replicated() -> None:
    """VBLoRA's bank is a child of every layer; its logits are not."""
    found = sharded("vblora", adapter_placement="shard")
    assert len(found) == 8
    assert not any("vector_bank" in name for name in found)


LEARNERS = [
    name
    for name, method in ON_LLAMA.items()
    if method.exists and issubclass(getattr(peft, method.config), peft.PromptLearningConfig)
]


@side_by_side
@pytest.mark.parametrize("method", LEARNERS)
def test_what_peft_computes_to_save_it_is_replicated(method: str) -> None:
    """The save of sharded ones ended with "mixed torch.Tensor and DTensor" after all of the training."""
    plan = trainer_fsdp_patch.plan(METHODS[method](llama()), adapter_placement="shard")
    assert plan.sharded == ()
    assert "peft saves what its module makes of it" in plan.reasons[-1]


@side_by_side
@pytest.mark.parametrize("method", ["adalora", "adalora_schedule", "adamss", "adamss_schedule"])
def test_what_a_schedule_reads_is_replicated(bench: Bench, method: str) -> None:
    """AdaLora reads all layers after their forwards: "The size of tensor a (2) must match". AdaMSS had ranks wait."""
    if not METHODS[method].exists:
        pytest.skip(f"this peft has no {method}")
    plan = trainer_fsdp_patch.plan(METHODS[method](llama()), adapter_placement="shard")
    assert plan.sharded == ()
    assert "its tuner reads it outside of its layer" in plan.reasons[-1]
    assert bench.cell(method, Setup("f2 schedule", placement="shard"), patched=True)[1].error == ""


@side_by_side
def test_a_head_next_to_a_schedule_is_sharded() -> None:
    """What stays replicated are AdaLora's layers, and not all that its tuner has in it."""
    config = peft.AdaLoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], total_step=10)
    plan = trainer_fsdp_patch.plan(peft.get_peft_model(llama(), config), adapter_placement="shard")
    assert {item.tensor.name for item in plan.sharded} == {HEAD}


def rows_alone(model: Any) -> Any:
    """LoRA and a head of which a user trains the first rows alone, as new tokens."""
    model = METHODS["lora_head"](model)
    weight = model.get_parameter(HEAD)
    weight.register_hook(lambda gradient: gradient * (torch.arange(len(gradient), device=gradient.device) < 8)[:, None])
    return model


@side_by_side
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_what_hooks_work_on_is_replicated(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """FSDP makes parameters of its own, without the hooks, and all rows were trained."""
    plan = trainer_fsdp_patch.plan(rows_alone(llama()), fsdp_version=fsdp, adapter_placement="shard")
    assert HEAD not in {item.tensor.name for item in plan.sharded}
    equals_one_process(bench, rows_alone, Setup("hooks", fsdp=fsdp, placement="shard"), tmp_path)


@side_by_side
@pytest.mark.skipif(not METHODS["osf"].exists, reason="this peft has no OSF")
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_projections_of_gradients_are_kept(bench: Bench, fsdp: int) -> None:
    """OSF projects gradients in hooks."""
    assert bench.cell("osf", Setup("hooks", fsdp=fsdp, placement="shard"), patched=True)[1].error == ""


@side_by_side
@pytest.mark.parametrize("method", ["prefix_mlp", pytest.param("p_tuning", marks=pytest.mark.long)])
def test_prompt_learners_are_saved_where_adapters_are_sharded(bench: Bench, method: str) -> None:
    assert bench.cell(method, Setup("f2 learner", placement="shard"), patched=True)[1].error == ""


@side_by_side
@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
def test_tokens_of_tied_embeddings_are_sharded(bench: Bench, sharded: bool) -> None:
    """The module that has them is a child of both embeddings, and a state dict has all of its names."""
    configure = METHODS["llama_tied lora_tokens"]
    if not configure.exists:
        pytest.skip("this peft trains no tokens of tied embeddings")
    setup = Setup("f2 tokens", placement="shard", sharded_checkpoint=sharded)
    assert bench.cell("llama_tied lora_tokens", setup, patched=True)[1].error == ""
    assert bench.resumed(configure, setup, "llama_tied lora_tokens", patched=True) == ""


def test_the_share_of_the_base_is_the_budget_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "FLOOR", 0)
    base = sum(parameter.numel() * 4 for parameter in llama().parameters())
    cost = sum(p.numel() * 16 for p in METHODS["lora_head"](llama()).parameters() if p.requires_grad)
    assert base / 8 < cost < base
    assert sharded("lora_head", fsdp_version=1, ranks=1) == set()
    assert sharded("lora_head", fsdp_version=1, ranks=8) == {HEAD}


@pytest.mark.parametrize(
    "settings",
    [{"adapter_placement": "split"}, {"adapter_budget": -1}, {"adapter_budget": "2GiB"}, {"adapter_budget": 1.5}],
)
def test_settings_that_are_none(settings: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(settings))):
        trainer_fsdp_patch.plan(METHODS["lora"](llama()), **settings)
    with pytest.raises(PlanError, match=next(iter(settings))):
        trainer_fsdp_patch.patch(**settings)
    assert all(item.state in ("unused", "skipped") for item in trainer_fsdp_patch.status())


def test_settings_of_patch_hold_until_unpatch() -> None:
    trainer_fsdp_patch.patch(adapter_placement="shard")
    trainer_fsdp_patch.patch()
    assert sharded("lora_head", fsdp_version=1) == {HEAD}
    trainer_fsdp_patch.unpatch()
    assert sharded("lora_head", fsdp_version=1) == set()


def held(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Elements of trainable parameters, and of their first moments, that a rank holds after training."""
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    model = METHODS["lora_head"](trial.load_base(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    local = [getattr(item, "_local_tensor", item) for group in optimizer.param_groups for item in group["params"]]
    moments = [
        getattr(state["exp_avg"], "_local_tensor", state["exp_avg"]).numel() for state in optimizer.state.values()
    ]
    return Outcome(extra={"parameters": sum(item.numel() for item in local), "moments": sum(moments)})


@side_by_side
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_head_next_to_its_trained_copy(bench: Bench, dtype: str) -> None:
    """By size it is a unit of its own, which no forward uses: "no attribute '_unsharded_param'" in the first step."""
    setup = Setup("idle", wrap="size", placement="shard", accumulation=3, dtype=dtype, amp="bf16")
    assert bench.cell("lora_head", setup, patched=True)[1].error == ""


@side_by_side
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_each_rank_holds_its_part_alone(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    lora, head = 8 * 4 * 64, 96 * 64
    for placement, whole in (("shard", head // 2), ("replicate", head)):
        setup = Setup("held", fsdp=fsdp, placement=placement)
        for outcome in forks.launch(held, setup, bench.base, str(tmp_path), ranks=2):
            assert not outcome.error, outcome.extra
            expected = whole + (lora // 2 if (fsdp, placement) == (2, "shard") else lora)
            assert outcome.extra == {"parameters": expected, "moments": expected}


@side_by_side
@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_resumed_run_ends_in_the_same_bits(bench: Bench, fsdp: int, sharded: bool) -> None:
    setup = Setup("resumed", fsdp=fsdp, placement="shard", sharded_checkpoint=sharded)
    scene = checkpoints.Scene(bench)
    assert checkpoints.interrupted(scene, setup, patched=True, configure=METHODS["lora_head"]) == ""


@side_by_side
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_evaluation_first(bench: Bench, fsdp: int) -> None:
    scene = checkpoints.Scene(bench)
    assert checkpoints.evaluated(scene, Setup("evaluated", fsdp=fsdp, placement="shard"), patched=True) == ""


def hybrid(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """The number of ranks of a shard that the plan was made for, and one that a run has counted."""
    upstream, made = fsdp_plugin.make_plan, []

    def make_plan(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["ranks"])
        return upstream(*args, **kwargs)

    fsdp_plugin.make_plan = make_plan
    outcome = trial.train(setup, METHODS["lora"], base, folder, setup.ranks, True, rank)
    [outcome.extra["shards"]] = made
    return outcome


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("groups", [False, True])
def test_the_ranks_of_one_copy_of_the_base_share_it(bench: Bench, tmp_path: Path, fsdp: int, groups: bool) -> None:
    if groups and not releases.at_least("transformers", "5.10.0"):
        pytest.skip("older releases are asked for this in other ways")
    setup = Setup("shards", fsdp=fsdp, ranks=4, hybrid=groups)
    outcomes = forks.launch(hybrid, setup, bench.base, str(tmp_path), ranks=4)
    assert not any(outcome.error for outcome in outcomes), outcomes[0].extra
    assert outcomes[0].extra["shards"] == outcomes[0].footprint.ranks
