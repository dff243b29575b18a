"""base_budget: which units stay full on each rank, what that costs and buys, and that it trains the same adapter."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import architectures
import checkpoints
import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS, fsdp2, packed
from test_plan import llama

import trainer_fsdp_patch
from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting import sharing
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.planning import expecting, residence
from trainer_fsdp_patch.testing import forks, recording, releases
from trainer_fsdp_patch.testing.case import Outcome

LAYERS = 4
COLLECTIVES = {
    1: {"0%": 2 * 4 + 1 + 2, "25%": 2 * 3 + 1 + 2, "50%": 2 * 2 + 1 + 2, "100%": 1},
    2: {"0%": 2 * 4 + 4 + 1, "25%": 2 * 3 + 3 + 1, "50%": 2 * 2 + 3 + 1, "100%": 1},
}
"""Two gathers for each layer that is left. One is FSDP1's root. FSDP2 gathers its embeddings twice, and head and root.

One more averages the adapter. FSDP1 has one for the norm of gradients, even of a model whose units are all frozen.
The share of a layer is less than 25 %, so that FSDP2's root, which is one norm, fits beside it.
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench of a Llama of four layers, of which a budget keeps some. It is written here, and others are as ever."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(architectures, "LAYERS", LAYERS)
        return Bench(tmp_path_factory.mktemp("deep"))


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("method", ["lora", "vera"])
@pytest.mark.parametrize("budget", ["0%", "25%", "50%", "100%"])
def test_any_budget_trains_what_one_process_does(deep: Bench, method: str, fsdp: int, budget: str) -> None:
    """Units, bytes at rest and gathered bytes are those of the plan, and collectives are counted by hand."""
    outcome, verdict = deep.cell(method, Setup(f"{fsdp}-{budget}", fsdp=fsdp, budget=budget), patched=True)
    assert verdict.right, verdict.error
    assert outcome.collectives == [COLLECTIVES[fsdp][budget]] * trial.STEPS
    assert outcome.footprint is not None
    assert dataclasses.replace(outcome.footprint, collectives=None) == outcome.planned


BEGINS = [
    ("gpt2 lora", Setup("f1", fsdp=1, budget="80%", amp="bf16")),
    ("gpt2 lora", Setup("f2 root", fsdp=2, budget="60%", amp="bf16", wrap="none")),
    ("bert lora", Setup("f1 size", fsdp=1, budget="60%", amp="bf16", wrap="size")),
    ("llava lora", Setup("f2", fsdp=2, budget="30%", amp="bf16")),
]
"""Embeddings of its own class, of the root, under a name of the head's, and of a part of the model."""


@pytest.mark.parametrize(("method", "setup"), [cell for cell in BEGINS if cell[1].fsdp in FLAVOURS])
def test_under_mixed_precision_a_forward_begins_in_a_unit(bench: Bench, method: str, setup: Setup) -> None:
    """Where embeddings alone stayed full, what they gave had another dtype than the layers, and a norm refused it."""
    assert bench.cell(method, setup, patched=True)[1].error == ""
    whole = dataclasses.replace(setup, name=f"{setup.name} whole", budget="100%")
    outcome, verdict = bench.cell(method, whole, patched=True)
    assert (verdict.error, outcome.footprint.sharded if outcome.footprint else None) == ("", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fsdp", [1, 2])
def test_what_is_stored_as_it_is_computed_may_stay_full(dtype: str, fsdp: int) -> None:
    """No layer fits, and the embeddings would."""
    model = METHODS["lora"](llama().to(getattr(torch, dtype)))
    plan = trainer_fsdp_patch.plan(model, fsdp_version=fsdp, mixed_precision="bf16", base_budget="20%", ranks=2)
    resident = {name for _, names in plan.resident for name in names}
    assert any("embed_tokens" in name for name in resident) == (dtype == "bfloat16")


@fsdp2
@pytest.mark.parametrize("efficient", [False, pytest.param(True, marks=pytest.mark.long)])
def test_layers_that_read_their_weight_to_save_it_stay_full(deep: Bench, efficient: bool) -> None:
    """quanto's; accelerate takes a state dict while FSDP2 does not see what stays full."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto comes with the extra clients")
    setup = Setup("f2 quanto", fsdp=2, budget="60%", quantizer="quanto-int8", ram_efficient=efficient)
    assert deep.cell("lora", setup, patched=True)[1].error == ""


@packed
@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("storage", ["bfloat16", pytest.param("uint8", marks=pytest.mark.long)])
def test_packed_weights_count_their_own_bytes(deep: Bench, storage: str, fsdp: int) -> None:
    setup = Setup(f"4bit-{storage}-{fsdp}", fsdp=fsdp, dtype="bfloat16", amp="bf16", storage=storage, budget="50%")
    outcome, verdict = deep.cell("lora", setup, patched=True)
    assert verdict.right, verdict.error
    assert outcome.footprint is not None
    assert outcome.planned is not None
    assert outcome.footprint.rest == outcome.planned.rest
    if storage == "bfloat16":
        assert outcome.collectives == [COLLECTIVES[fsdp]["50%"]] * trial.STEPS


KINDS: dict[str, dict[str, Any]] = {
    "amp": {"amp": "bf16"},
    "bf16": {"dtype": "bfloat16", "amp": "bf16"},
    "accumulate": {"accumulation": 3, "checkpointing": True, "clip": 0.01},
    "checkpointing": {"activation_checkpointing": True},
    "size": {"wrap": "size"},
    "none": {"wrap": "none"},
    "hybrid": {"ranks": 4, "hybrid": True},
    "ram": {"ram_efficient": True},
}


@pytest.mark.long
@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("budget", ["50%", "100%"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_runs(deep: Bench, kind: str, budget: str, fsdp: int) -> None:
    if kind == "ram" and fsdp == 1:
        pytest.skip("FSDP1 broadcasts on accelerators only")
    if kind == "hybrid" and not releases.at_least("transformers", "5.10.0"):
        pytest.skip("older releases are asked for this in other ways")
    setup = Setup(f"{kind}-{fsdp}-{budget}", fsdp=fsdp, budget=budget, **KINDS[kind])
    _, verdict = deep.cell("vera", setup, patched=True)
    assert verdict.right, verdict.error


@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_run_without_a_unit_resumes(bench: Bench, fsdp: int, sharded: bool) -> None:
    """FSDP1 asks its first unit how to read the optimizer's checkpoint, and failed with StopIteration."""
    setup = Setup("resumed", fsdp=fsdp, budget="100%", sharded_checkpoint=sharded)
    assert checkpoints.interrupted(checkpoints.Scene(bench), setup, patched=True) == ""


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_evaluation_first(bench: Bench, fsdp: int) -> None:
    scene = checkpoints.Scene(bench)
    assert checkpoints.evaluated(scene, Setup("evaluated", fsdp=fsdp, budget="100%"), patched=True) == ""


def uneven(model: Any) -> Any:
    """LoRA where each rank's environment has another budget."""
    os.environ[residence.ENVIRONMENT] = "100%" if os.environ.get("RANK") == "1" else "50%"
    return METHODS["lora"](model)


def test_ranks_with_other_budgets_are_refused(bench: Bench, tmp_path: Path) -> None:
    outcome = trial.run(Setup("uneven", fsdp=FLAVOURS[-1]), uneven, bench.base, tmp_path)
    assert outcome.error.startswith("AdapterError: base_budget: ")
    assert outcome.error.endswith("Give every rank the same base_budget.")


def inside(setup: Setup, strategy: str, base: str, folder: str, rank: int) -> Outcome:
    """FSDP's modules and units after a step, and its collectives."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    if strategy:
        given.fsdp_plugin_args |= (
            {"reshard_after_forward": False} if setup.fsdp == 2 else {"sharding_strategy": strategy}
        )
    model = METHODS["lora"](trial.load_base(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    with recording.counter()() as counted:
        trainer.train()
    kinds = [
        type(module).__name__
        for module in trainer.model_wrapped.modules()
        if isinstance(module, FullyShardedDataParallel) or footprint.state_of(module) is not None
    ]
    units = len(footprint.units(trainer.model_wrapped))
    return Outcome(extra={"modules": len(kinds), "units": units, "collectives": counted.total})


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize(("budget", "modules", "units"), [("50%", 3, 3), ("100%", 1, 0)])
def test_no_empty_unit_is_made(deep: Bench, tmp_path: Path, fsdp: int, budget: str, modules: int, units: int) -> None:
    """Of four layers two are left, and the root. FSDP2 has head and embeddings too, and nothing in its root."""
    setup = Setup("inside", fsdp=fsdp, budget=budget)
    [outcome, _] = forks.launch(inside, setup, "", deep.base, str(tmp_path), ranks=2)
    assert not outcome.error, outcome.extra
    more = 2 if (fsdp, budget) == (2, "50%") else 0
    assert outcome.extra["modules"] == modules + more
    assert outcome.extra["units"] == units + more - bool(more)


@pytest.mark.skipif(not releases.at_least("transformers", "5.1.0"), reason="older releases are asked in other ways")
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_what_stays_gathered_after_the_forward_is_still_spared_its_gather(
    deep: Bench, tmp_path: Path, fsdp: int
) -> None:
    counts = []
    for budget in ("", "50%"):
        setup = Setup("kept", fsdp=fsdp, budget=budget)
        arguments = (setup, "SHARD_GRAD_OP", deep.base, str(tmp_path / f"kept{budget}"))
        [outcome, _] = forks.launch(inside, *arguments, ranks=2)
        assert not outcome.error, outcome.extra
        counts.append(outcome.extra["collectives"])
    # One gather of each of two layers in each step, and of FSDP2's root.
    assert counts[0] - counts[1] == trial.STEPS * (2 + (fsdp == 2))


@pytest.mark.skipif(not releases.at_least("transformers", "5.1.0"), reason="older releases are asked in other ways")
def test_a_base_that_is_not_split_has_no_budget(deep: Bench, tmp_path: Path) -> None:
    setup = Setup("whole", fsdp=1, budget="50%")
    [outcome, _] = forks.launch(inside, setup, "NO_SHARD", deep.base, str(tmp_path), ranks=2)
    assert not outcome.error, outcome.extra
    assert outcome.extra["units"] == LAYERS + 1


def planned(budget: int | str | None, **settings: Any) -> Any:
    return trainer_fsdp_patch.plan(METHODS["lora"](llama()), base_budget=budget, **{"ranks": 2, **settings})


LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
"""Elements of a layer of the models of plans."""


def test_layers_come_first_and_the_root_with_what_is_left() -> None:
    layer = LAYER * 4 // 2
    for budget, resident in (
        (layer - 1, {""}),
        (layer, {"base_model.model.model.layers.1"}),
        (2 * layer, {"base_model.model.model.layers.0", "base_model.model.model.layers.1"}),
        ("100%", {"", "base_model.model.model.layers.0", "base_model.model.model.layers.1"}),
    ):
        plan = planned(budget, fsdp_version=1)
        assert {home for home, _ in plan.resident} == resident


def test_what_fits_beside_the_layers_is_kept_too() -> None:
    """The root of FSDP2 is one norm."""
    assert {home for home, _ in planned(LAYER * 2 + 128).resident} == {"", "base_model.model.model.layers.1"}


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize("budget", [0, 100_000, 200_000, "0.2MB", "150KiB"])
def test_a_rank_holds_no_more_than_the_budget_beyond_its_shards(budget: int | str, fsdp: int, ranks: int) -> None:
    before, after = (planned(value, fsdp_version=fsdp, ranks=ranks) for value in (None, budget))
    cost = expecting.footprint(after, ranks).rest - expecting.footprint(before, ranks).rest
    assert 0 <= cost <= residence.limit(budget, 0)
    assert bool(after.resident) == (cost > 0)


def test_a_share_is_one_of_the_base_on_any_number_of_ranks() -> None:
    kept = [{home for home, _ in planned("45%", fsdp_version=1, ranks=ranks).resident} for ranks in (2, 4, 64)]
    assert kept == [{"base_model.model.model.layers.1"}] * 3


def test_layers_are_spread_evenly() -> None:
    assert residence.spread(12, 6) == [1, 3, 5, 7, 9, 11]
    assert residence.spread(12, 3) == [2, 6, 10]
    assert all(len(set(residence.spread(7, kept))) == kept for kept in range(8))


def test_a_tied_parameter_counts_once_and_in_the_root() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, **sizes))
    plan = trainer_fsdp_patch.plan(METHODS["lora"](model), fsdp_version=1, ranks=2, base_budget="100%")
    [head] = [home for home, names in plan.resident for name in names if "embed" in name or "lm_head" in name]
    assert head == ""
    assert expecting.footprint(plan, 2).replicated == sum(item.numel() * 4 for item in llama().parameters()) - 96 * 256


@pytest.mark.parametrize("fsdp", [1, 2])
def test_units_that_stay_gathered_are_all_there_when_the_forward_ends(fsdp: int) -> None:
    plan = planned(None, fsdp_version=fsdp)
    full = sum(item.numel() * 4 for item in llama().parameters())
    assert expecting.footprint(plan, 2, gathers=1).gathered == full
    assert expecting.footprint(plan, 2).gathered < full


def test_the_plan_says_what_is_resident_and_what_that_buys() -> None:
    plan = planned("45%", fsdp_version=1)
    assert plan.reasons == (
        "base_budget 45%: 1 of 3 units stay full on each rank, which costs it 72.2 KiB beyond their shards; "
        "a step gathers 3 instead of 5 times, and 337.2 KiB of 626.2 KiB",
    )
    assert plan.summary().endswith("; 1 units of the base resident")
    assert any(line.endswith(residence.REASON) for line in plan.costs())
    assert planned(None).reasons == ()
    [text] = planned("50%", units=()).reasons
    assert text.endswith("beyond their shards"), "where units go by size, gathers are not known"
    [text] = planned("50%", fsdp_version=1, gathers=1).reasons
    assert "gathers 2 instead of 3 times" in text
    [text] = planned("50%", ranks=1).reasons
    assert text == "base_budget 50% is without effect: FSDP does not split the base here"


def test_which_settings_gather_a_layer_once() -> None:
    from accelerate import FullyShardedDataParallelPlugin

    for value, gathers in (("FULL_SHARD", 2), ("SHARD_GRAD_OP", 1), ("HYBRID_SHARD", 2), ("HYBRID_SHARD_ZERO2", 1)):
        assert sharing.gathers(FullyShardedDataParallelPlugin(fsdp_version=1, sharding_strategy=value)) == gathers
    for value, gathers in ((True, 2), (False, 1)):
        assert sharing.gathers(FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=value)) == gathers
    # As transformers 5.3 asks for FSDP2; accelerate goes by the second.
    both = {"sharding_strategy": "full_shard", "reshard_after_forward": False}
    assert sharing.gathers(FullyShardedDataParallelPlugin(fsdp_version=2, **both)) == 1


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [(0, 0), ("0", 0), ("8GiB", 2**33), ("500 MB", 5 * 10**8), ("1.5kib", 1536), ("25%", 25), ("100 %", 100)],
)
def test_texts_of_budgets(text: int | str, nbytes: int) -> None:
    assert residence.limit(text, 100) == nbytes


@pytest.mark.parametrize("value", [-1, True, 1.5, "", "much", "8G", "101%", "-5%", "1e9", ["8GiB"]])
def test_what_is_no_budget(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    text = "base_budget: .*No plan was made. Give bytes, such as"
    with pytest.raises(PlanError, match=text) as caught:
        planned(value)
    assert caught.value.setting == "base_budget"
    with pytest.raises(PlanError, match=text):
        trainer_fsdp_patch.patch(base_budget=value)
    assert all(item.state in ("unused", "skipped") for item in trainer_fsdp_patch.status())
    if isinstance(value, str) and value:
        monkeypatch.setenv(residence.ENVIRONMENT, value)
        with pytest.raises(PlanError, match=text):
            planned(None)


def test_a_call_wins_over_patch_and_patch_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(residence.ENVIRONMENT, "100%")
    assert len(planned(None).resident) == 5
    trainer_fsdp_patch.patch(base_budget="0%")
    trainer_fsdp_patch.patch()
    assert len(planned(None).resident) == 0
    assert len(planned("100%").resident) == 5
    trainer_fsdp_patch.unpatch()
    assert len(planned(None).resident) == 5
    monkeypatch.delenv(residence.ENVIRONMENT)
    assert len(planned(None).resident) == 0
