"""What the test of every patch module does: canary, identity after undo, and the fault with and without it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cells import METHODS, Bench, Setup, has, reference_of

import trainer_fsdp_patch
from trainer_fsdp_patch import devices, versions
from trainer_fsdp_patch.patching import registry, wrapping
from trainer_fsdp_patch.testing import case, forks, releases, trial

PROJECTED = ("vera", "pvera", "randlora", "frod")
FLAVOURS = [1, 2] if releases.has_fsdp2() else [1]
"""Versions of FSDP that this stack trains on the devices that are here."""

fsdp2 = pytest.mark.skipif(2 not in FLAVOURS, reason="no FSDP2 with these releases and devices")

packed = pytest.mark.skipif(not releases.has_bitsandbytes(), reason="no bitsandbytes with these releases and devices")


def _refusal() -> str:
    """Why the installed transformers adds no adapter of the installed peft, or ""."""
    from transformers.integrations import peft as integration

    try:
        integration.check_peft_version(min_version=integration.MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return ""


takes_adapters = pytest.mark.skipif(bool(_refusal()), reason=_refusal() or "it adds adapters")
"""transformers 5.24 asks for peft 0.22, which has not been released, in `add_adapter` alone."""

STORAGES = ["uint8", "bfloat16", "8bit"]
"""Of quantized bases: the usual 4-bit one, one that FSDP can shard itself, and integers of 8 bits."""

NO_SHARDS = [
    *((method, Setup("f2-ram", ram_efficient=True), "has no attribute 'device_mesh'") for method in PROJECTED),
    ("vera", Setup("f2-8bit", dtype="bfloat16", storage="8bit"), "no attribute 'CB'"),
]
"""Runs in which accelerate's fsdp2_prepare_model takes buffers or 8-bit layers for shards, and how they end."""


def where(*requirements: str) -> pytest.MarkDecorator:
    """Mark of a test whose fault needs other releases beside those of its patch's range."""
    found = {requirement: versions.installed(versions.package_of(requirement)) for requirement in requirements}
    missing = [name for name, version in found.items() if version is None or not versions.matches(name, version)]
    return pytest.mark.skipif(bool(missing), reason=f"only with {', '.join(missing)}")


def canary(name: str) -> None:
    """The seams exist with the declared parameters, take one layer of ours, and are restored to identity."""
    patch = registry.find(name)
    module = importlib.import_module(patch.target)
    assert patch.seams
    before = [wrapping.resolve(module, seam.path) for seam in patch.seams]
    trainer_fsdp_patch.patch(name)
    trainer_fsdp_patch.patch(name)
    assert patch.status().state == "applied"
    for parent, attribute, original in before:
        assert type(vars(parent)[attribute]) is wrapping.PatchWrapper
        assert vars(parent)[attribute].__wrapped__ is original
        assert wrapping.depth(vars(parent)[attribute]) == 1
    trainer_fsdp_patch.unpatch()
    for parent, attribute, original in before:
        assert vars(parent)[attribute] is original
    assert patch.issue.startswith("https://")
    assert patch.effect.endswith(".")


def fault(bench: Bench, method: str, setup: Setup, expected: str) -> None:
    """Stock fails with `expected` on these versions, and the patched run equals one process."""
    skip_without_reference(bench, method, setup)
    _, stock = bench.cell(method, setup, patched=False)
    assert expected in stock.error
    _, patched = bench.cell(method, setup, patched=True)
    assert patched.right, patched.error


def skip_without_reference(bench: Bench, method: str, setup: Setup) -> None:
    """Skip a test whose method this peft lacks, or that one process cannot train either."""
    if not has(method):
        pytest.skip(f"this peft has no {method}")
    missing = bench.has_reference(method, setup)
    if missing:
        pytest.skip(f"one process does not train {method} either: {missing}")


def fault_without(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, setup: Setup, expected: str
) -> None:
    """The same where stock does not come as far: with all other patches it fails with `expected`."""
    skip_without_reference(bench, method, setup)
    with monkeypatch.context() as context:
        context.setenv(registry.DISABLE, name)
        _, others = bench.cell(method, setup, patched=True)
    assert expected in others.error
    _, patched = bench.cell(method, setup, patched=True)
    assert patched.right, patched.error


def with_trainable_norms(model: Any) -> Any:
    """LoRA, and norms that a user unfroze: trained, but part of no adapter."""
    model = METHODS["lora"](model)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.requires_grad_(True)
    return model


def added(model: Any) -> Any:
    """An adapter that transformers keeps itself, without a PeftModel."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    return model


def resumes(bench: Bench, configure: Callable[[Any], Any], setup: Setup, expected: str) -> None:
    """A stock run that is interrupted and resumed fails with `expected`, and a patched one ends as one process does."""
    name = getattr(configure, "__name__", "") + str(id(configure))
    assert expected in (bench.resumed(configure, setup, name, patched=False) or "right")
    assert bench.resumed(configure, setup, name, patched=True) == ""


def scene_fault(bench: Bench, scenario: Callable[..., str], setup: Setup, expected: str) -> None:
    """A scenario of `checkpoints`: stock loses something, in these words, and the patched run nothing."""
    scene = checkpoints.Scene(bench)
    stock = checkpoints.cell(scenario, scene, setup, patched=False)
    assert stock
    assert expected in stock
    assert checkpoints.cell(scenario, scene, setup, patched=True) == ""


def equals_one_process(bench: Bench, configure: Callable[[Any], Any], setup: Setup, folder: Path) -> None:
    """A model that is not one of the matrix's: patched ranks train and save what one process does."""
    one = trial.run(reference_of(setup), configure, bench.base, folder / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    verdict = case.compare(trial.run(setup, configure, bench.base, folder / "ranks"), one, setup)
    assert verdict.right, verdict.error


def units(classes: list[str] | None, patched: bool, setup: Setup, base: str, folder: str, rank: int) -> case.Outcome:
    """Classes of FSDP1's units after a run with LoRA, in a rank; `classes` is the user's own list."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=patched)
    if classes:
        given.fsdp_plugin_args["transformer_cls_names_to_wrap"] = classes
    trainer = Trainer(model=METHODS["lora"](trial.load_base(base, setup)), args=given, train_dataset=trial.dataset(12))
    trainer.train()
    found = [type(module.module).__name__ for module in FullyShardedDataParallel.fsdp_modules(trainer.model_wrapped)]
    return case.Outcome(extra={"units": sorted(found)})


def units_of(bench: Bench, folder: Path, classes: list[str] | None = None, *, patched: bool) -> list[str]:
    """The same from two ranks."""
    outcomes = forks.launch(units, classes, patched, Setup("u", fsdp=1), bench.base, str(folder), ranks=2)
    assert not outcomes[0].error, outcomes[0].extra
    return outcomes[0].extra["units"]


def runs_out(place: str, ranks: tuple[int, ...] = (0, 1), step: int = 0) -> checkpoints.Action:
    """Train where more than one row for each rank, of two, is too much.

    Args:
        place: of the error: in the forward of the second layer, or in the backward pass.
        ranks: those that run out.
        step: number of steps that are taken before.
    """

    def action(trainer: Any, folder: Path) -> dict[str, Any]:
        import torch

        layer = next(item for name, item in trainer.model.named_modules() if name.endswith("layers.1"))
        limit = trial.BATCH // 2 // trainer.args.world_size
        tried, failed = [], []

        def fails(gradient: Any = None) -> Any:
            failed.append(trainer.state.global_step)
            raise devices.out_of_memory()("CUDA out of memory. Tried to allocate 20.00 MiB")

        def before(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            tried.append(len(hidden))
            # One process comes to the same size by more tries, which must not train.
            late = trainer.state.global_step >= step or bool(failed)
            due = len(hidden) > limit and late and trainer.args.process_index in ranks
            if due and place == "forward":
                fails()
            if due and torch.is_grad_enabled():
                hidden.register_hook(fails)

        layer.register_forward_pre_hook(before, with_kwargs=True)
        trainer.args.auto_find_batch_size = True
        trainer.train()
        return {"tried": tried}

    return action


def cast(trainer: Any, folder: Path) -> dict[str, Any]:
    """Train, cast as `bf16_full_eval` does, and run a forward; tests/reports/test_full_eval.py has more."""
    import torch

    trainer.train()
    model = trainer.model_wrapped
    model.to(torch.bfloat16)
    model.eval()
    ids = torch.tensor([[5, 7, 11, 3]])
    with torch.no_grad():
        found = model(input_ids=ids.to(trainer.args.device)).logits
    return {"dtype": str(found.dtype), "logits": found.float().tolist()}


def cast_fault(bench: Bench, setup: Setup) -> None:
    """Stock ends with two dtypes in an operation, and the patched run with what one process gives."""
    import torch

    scene = checkpoints.Scene(bench)
    assert checkpoints.failure(scene.run(cast, setup, patched=False))
    outcomes = scene.run(cast, setup, patched=True)
    assert checkpoints.failure(outcomes) == "", outcomes[0].extra
    one = scene.one(cast, setup)
    for outcome in outcomes:
        assert outcome.extra["dtype"] == one.extra["dtype"]
        found, wanted = (torch.tensor(item.extra["logits"]) for item in (outcome, one))
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2


def packing_patch(fsdp: int) -> str:
    """Name of the patch by which units of a version of FSDP show their packed layers."""
    return {1: "torch_v2_2_packed_units", 2: "torch_v2_6_packed_groups"}[fsdp]


def _trained(bench: Bench, setup: Setup) -> case.Outcome:
    outcome, verdict = bench.cell("lora", setup, patched=True)
    assert verdict.right, verdict.error
    return outcome


def halves(bench: Bench, monkeypatch: pytest.MonkeyPatch, setup: Setup) -> None:
    """Without the patch a rank holds everything that is quantized; with it, its half on two ranks."""
    with monkeypatch.context() as context:
        context.setenv(registry.DISABLE, packing_patch(setup.fsdp))
        before = _trained(bench, setup).footprint
    after = _trained(bench, setup).footprint
    assert before is not None
    assert after is not None
    # Float storage is sharded in any case; then what is full are the scales.
    quantized = before.replicated + before.statistics
    assert quantized > 2500
    assert (after.replicated, after.statistics) == (0, 0)
    assert after.base - before.sharded <= 1.02 * quantized / 2
    assert after.collectives == before.collectives
