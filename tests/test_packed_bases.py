"""Quantized bases under FSDP: what a rank holds, and what users do with them before, during and after training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import quantizers
import torch
from cells import METHODS, Bench, Setup, reference_of, trial
from compressed import FORMATS
from faults import FLAVOURS, fsdp2, packed, where
from test_benchmarks import ROOT, load

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome, compare

sys.path.append(str(ROOT / "benchmarks"))
QUANTIZED = load("quantized")

FOUR: dict[str, Any] = {"dtype": "bfloat16", "storage": "uint8"}
KINDS = list(QUANTIZED.KINDS)

pytestmark = [packed, where("peft>=0.20", "transformers>=5.1", "accelerate>=1.15")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The benchmark's model."""
    folder = tmp_path_factory.mktemp("quantized")
    [outcome] = forks.launch(lambda rank: Outcome(folder=QUANTIZED.write_base(folder)), ranks=1)
    return outcome.folder


def cases() -> list[Any]:
    """Every quantizer on two ranks, and other numbers of ranks of one; the rest is long."""
    every = [(kind, fsdp, ranks) for kind in KINDS for fsdp in (1, 2) for ranks in (2, 3, 4)]
    usual = {case for case in every if case[2] == 2} | {("4bit", 1, 3), ("4bit", 2, 4)}
    return [case if case in usual else pytest.param(*case, marks=pytest.mark.long) for case in every]


@pytest.mark.parametrize(("kind", "fsdp", "ranks"), cases())
def test_a_rank_holds_its_share(base: str, kind: str, fsdp: int, ranks: int) -> None:
    """At most 1.02 of the quantized bytes over the ranks, more than the same run holds that replicates none of them."""
    if fsdp not in FLAVOURS:
        pytest.skip("no FSDP2 with these releases and devices")
    if kind == "aqlm":
        pytest.importorskip("aqlm")
    ours, before = (QUANTIZED.run(kind, fsdp, ranks, way, base) for way in ("sharded", "replicated"))
    assert ours.error == before.error == "", ours.extra
    total: Any = before.extra["quantized"]
    full: Any = before.extra["full"]
    assert full > 500_000
    # FSDP has taken what of AQLM's layers are plain numbers: codebooks and scales.
    assert full == total or (kind == "aqlm" and full < total)
    # Offsets and other tensors of a few bytes stay on each rank.
    assert ours.extra["full"] <= 4096  # type: ignore[operator]
    rest = before.extra["base"] - full - (total - full) / ranks
    assert ours.extra["base"] - rest <= 1.02 * total / ranks
    assert ours.extra["collectives"] == before.extra["collectives"]
    if ranks == 2:
        assert_on_page(kind, fsdp, before, ours)


def test_a_layer_that_is_a_unit_holds_its_share(bench: Bench) -> None:
    """FSDP1 puts the flat parameter on such a layer. A copy of it in full had come in its place."""
    pytest.importorskip("optimum.quanto")
    bf16: dict[str, Any] = {"dtype": "bfloat16", "amp": "bf16"}
    setup = Setup("f1 flat size", fsdp=1, quantizer="quanto-int8", wrap="size", use_orig_params=False, **bf16)
    outcome, verdict = bench.cell("lora", setup, patched=True)
    assert verdict.right, verdict.error
    assert outcome.footprint is not None
    assert outcome.planned is not None
    assert outcome.footprint.rest == outcome.planned.rest


def assert_on_page(kind: str, fsdp: int, *outcomes: Outcome) -> None:
    """The counts of a run without and with packed layers are those of docs/quantized-bases.md."""
    if any(map(versions.newer_than_tested, ("torch", "transformers", "accelerate", "peft"))):
        return
    page = (ROOT / "docs" / "quantized-bases.md").read_text().splitlines()
    [line] = [line for line in page if line.startswith(f"| {kind} | FSDP{fsdp} | 2 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    for place, name in ((4, "base"), (5, "gathered"), (6, "nbytes")):
        fresh = [QUANTIZED._number(name, [outcome]) for outcome in outcomes]
        assert cells[place].split(" / ")[1:] == fresh, name


@pytest.mark.parametrize("storage", ["uint8", "8bit"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_resuming(bench: Bench, fsdp: int, storage: str) -> None:
    setup = Setup(f"f{fsdp}-{storage}", fsdp=fsdp, dtype="bfloat16", storage=storage)
    assert bench.resumed(METHODS["lora"], setup, f"lora-{storage}", patched=True) == ""


WAYS = {
    "f1-hybrid": {"fsdp": 1, "hybrid": True, "ranks": 4},
    "f2-hybrid": {"hybrid": True, "ranks": 4},
    "f1-no-wrap": {"fsdp": 1, "wrap": "none"},
    "f2-size": {"wrap": "size"},
    "f1-size": {"fsdp": 1, "wrap": "size"},
    "f2-ram": {"ram_efficient": True},
    "f1-flat": {"fsdp": 1, "use_orig_params": False},
    "f2-ac": {"activation_checkpointing": True},
    "f1-gradient-checkpointing": {"fsdp": 1, "checkpointing": True},
    "f2-accumulation": {"accumulation": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_layouts(bench: Bench, way: str) -> None:
    setup = Setup(f"{way}-4bit", **{**FOUR, **WAYS[way]})
    if setup.fsdp not in FLAVOURS:
        pytest.skip("no FSDP2 with these releases and devices")
    outcome, verdict = bench.cell("vera", setup, patched=True)
    assert verdict.right, verdict.error
    assert outcome.footprint is not None
    assert (outcome.footprint.replicated, outcome.footprint.statistics) == (0, 0)


@pytest.mark.parametrize("ram", [False, True])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_fp8(bench: Bench, fsdp: int, ram: bool) -> None:
    """FSDP2 would have to cast such weights for their unit, and FSDP1 flattens other dtypes apart."""
    if ram and fsdp == 1:
        pytest.skip("accelerate takes it for FSDP1 on a GPU only")
    setup = Setup(f"f{fsdp}-fp8", fsdp=fsdp, dtype="bfloat16", quantizer="fp8", ram_efficient=ram)
    outcome, verdict = bench.cell("lora", setup, patched=True)
    assert verdict.right, verdict.error
    assert outcome.footprint is not None
    # Scales of layers that are this small.
    assert outcome.footprint.replicated <= 128


@pytest.mark.parametrize("method", ["lora", "vera"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_aqlm(bench: Bench, fsdp: int, method: str) -> None:
    """LoRA gives the codes of each layer that it adapts a second name there."""
    pytest.importorskip("aqlm")
    setup = Setup(f"f{fsdp}-aqlm", fsdp=fsdp, dtype="bfloat16", quantizer="aqlm")
    outcome, verdict = bench.cell(method, setup, patched=True)
    assert verdict.right, verdict.error
    assert outcome.footprint is not None
    assert (outcome.footprint.replicated, outcome.footprint.statistics) == (0, 0)


compressed = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="no compressed-tensors with these releases"
)
ON_EACH = [(method, fsdp, kind) for method in ("lora", "vera") for fsdp in FLAVOURS for kind in FORMATS]


@compressed
@pytest.mark.parametrize(
    ("method", "fsdp", "kind"),
    [case if case[2] == "int4" else pytest.param(*case, marks=pytest.mark.long) for case in ON_EACH],
)
def test_a_compressed_base_is_sharded_dequantized(bench: Bench, method: str, fsdp: int, kind: str) -> None:
    """transformers has it dequantized for training; no rank keeps a full copy."""
    setup = Setup(f"f{fsdp}-{kind}", fsdp=fsdp, dtype="bfloat16", quantizer=f"compressed-{kind}-dequantized")
    outcome, verdict = bench.cell(method, setup, patched=True)
    assert verdict.right, verdict.error
    assert outcome.footprint is not None
    assert (outcome.footprint.replicated, outcome.footprint.statistics) == (0, 0)


@compressed
@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.long)])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_base_that_is_rebuilt_in_its_first_forward_is_refused(bench: Bench, fsdp: int, kind: str) -> None:
    """One process trains it, with all of it full. Under FSDP stock ends inside of torch."""
    setup = Setup(f"f{fsdp}-{kind}-kept", fsdp=fsdp, dtype="bfloat16", quantizer=f"compressed-{kind}")
    assert bench.reference("lora", reference_of(setup)).error == ""
    outcome, _ = bench.cell("lora", setup, patched=True)
    assert outcome.error.startswith("PlanError: base_model.model.model.layers.0.self_attn.k_proj: a torch Linear that")
    assert "Load the base with dequantize=True in its quantization config" in outcome.error


@compressed
def test_peft_takes_no_layers_that_keep_int4_compressed(bench: Bench) -> None:
    """Under a name of their own: what peft asks them for is `weight`."""
    setup = Setup("kept", fsdp=0, dtype="bfloat16", quantizer="compressed-int4")
    for method in ("lora", "vera"):
        assert "no attribute 'weight'" in bench.reference(method, reference_of(setup)).error


def everything(trainer: Any, folder: Path) -> dict[str, Any]:
    """Evaluate, train, evaluate, and gather the full model by hand."""
    for module in trainer.model.modules():
        # bitsandbytes' kernel for evaluation on some CPUs, which packed layers do without, rounds otherwise.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    tensors = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    # In one process and by FSDP1 alike: without a prefix of the adapter's wrappers.
    kept = {key: value for key, value in tensors.items() if "lora" not in key} if tensors else {}
    return {"before": before, "after": after, "tensors": {key: checked(value) for key, value in kept.items()}}


def checked(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, tuple(value.shape), value.detach().contiguous().view(-1).view(torch.uint8).tolist()[:4096]


@pytest.mark.parametrize("storage", ["uint8", "8bit"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_full_state_dict_is_what_one_process_has(bench: Bench, fsdp: int, storage: str) -> None:
    """Under the quantizer's own names, bit for bit; losses before and after training are equal."""
    setup = Setup(f"f{fsdp}-{storage}", fsdp=fsdp, dtype="bfloat16", storage=storage)
    scene = checkpoints.Scene(bench)
    outcomes, one = scene.run(everything, setup, patched=True), scene.one(everything, setup)
    assert checkpoints.failure(outcomes) == "", outcomes[0].extra
    ours, wanted = outcomes[0].extra, one.extra
    for name in ("before", "after"):
        assert ours[name] == pytest.approx(wanted[name], rel=1e-3)
    assert set(ours["tensors"]) == set(wanted["tensors"])  # type: ignore[call-overload]
    assert any("absmax" in key or key.endswith("SCB") for key in ours["tensors"])  # type: ignore[attr-defined]
    for key, value in wanted["tensors"].items():  # type: ignore[attr-defined]
        assert ours["tensors"][key] == value, key  # type: ignore[index]


def casts(trainer: Any, folder: Path) -> dict[str, Any]:
    """Train, and cast the model as `fp16_full_eval` does."""
    trainer.train()
    before = [parameter.dtype for parameter in trainer.model_wrapped.parameters()]
    try:
        trainer.model_wrapped.to(torch.float16)
        said = "nothing"
    except Exception as error:
        said = str(error)
    same = before == [parameter.dtype for parameter in trainer.model_wrapped.parameters()]
    return {"said": said, "same": same, "loss": trainer.evaluate()["eval_loss"]}


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_cast_of_packed_bytes_is_refused_and_the_run_goes_on(bench: Bench, fsdp: int) -> None:
    setup = Setup(f"f{fsdp}-cast", fsdp=fsdp, **FOUR)
    outcomes = checkpoints.Scene(bench).run(casts, setup, patched=True)
    for outcome in outcomes:
        assert outcome.error == "", outcome.extra
        assert "would be cast to torch.float16" in str(outcome.extra["said"])
        assert outcome.extra["same"]
        assert outcome.extra["loss"] == outcome.extra["loss"]


def prepared(model: Any) -> Any:
    """As QLoRA's recipe has it."""
    from peft import prepare_model_for_kbit_training

    return METHODS["lora"](prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_prepare_model_for_kbit_training(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    from faults import equals_one_process

    equals_one_process(bench, prepared, Setup(f"f{fsdp}-kbit", fsdp=fsdp, **FOUR), tmp_path)


def trained(trainer: Any, folder: Path) -> dict[str, Any]:
    trainer.train()
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


@pytest.mark.long
@pytest.mark.parametrize("storage", ["uint8", "8bit"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_torch_compile(bench: Bench, fsdp: int, storage: str) -> None:
    """Dynamo goes through FSDP1's hooks; what shows and hides layers is left alone by it."""
    setup = Setup(f"f{fsdp}-{storage}", fsdp=fsdp, dtype="bfloat16", storage=storage)
    scene = checkpoints.Scene(bench)
    outcomes = scene.run(trained, setup, patched=True, torch_compile=True)
    assert checkpoints.failure(outcomes) == "", outcomes[0].extra
    assert outcomes[0].extra["losses"] == pytest.approx(scene.one(trained, setup).extra["losses"], rel=1e-3)


@fsdp2
@pytest.mark.parametrize("storage", ["uint8", "8bit"])
def test_merging_in_a_fresh_process(bench: Bench, storage: str, tmp_path: Path) -> None:
    """The saved adapter is loaded on the quantized base, merged and unloaded."""
    setup = Setup(f"f2-{storage}", dtype="bfloat16", storage=storage)
    outcome, verdict = bench.cell("lora", setup, patched=True)
    assert verdict.right, verdict.error
    results = [
        forks.launch(merged, reference_of(setup), bench.base, folder, ranks=1)[0]
        for folder in (outcome.folder, bench.reference("lora", reference_of(setup)).folder)
    ]
    assert results[0].error == "", results[0].extra
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-2)


def merged(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    from peft import PeftModel

    from trainer_fsdp_patch.testing import trial

    model = PeftModel.from_pretrained(trial.load_base(base, setup), folder).merge_and_unload()
    [row] = trial.dataset(1)
    batch = {key: value[None] for key, value in row.items()}
    with torch.no_grad():
        return Outcome(losses=[float(model(**batch).loss)])


class Offloads:
    """Has FSDP2 keep its shards in main memory, not pinned, for there is no accelerator."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        from accelerate.state import AcceleratorState
        from torch.distributed.fsdp import CPUOffloadPolicy

        plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
        if plugin is not None:
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)


@fsdp2
@pytest.mark.parametrize(
    ("kind", "efficient"),
    [
        ("4bit", True),
        ("8bit", False),
        ("torchao int8", True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("4bit", False), ("8bit", True), ("gptq", True))),
    ],
)
def test_shards_in_main_memory(bench: Bench, tmp_path: Path, kind: str, efficient: bool) -> None:
    from transformers import AutoModelForCausalLM, TrainerCallback

    def configure(model: Any) -> Any:
        return METHODS["lora"](model)

    configure.load = lambda folder, setup: quantizers.load(folder, setup, AutoModelForCausalLM)
    configure.callbacks = lambda: [type("Offloading", (Offloads, TrainerCallback), {})()]
    setup = Setup("f2-offload", dtype="bfloat16", ram_efficient=efficient, **QUANTIZED.KINDS[kind])
    one = trial.run(reference_of(setup), configure, bench.base, tmp_path / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    outcome = trial.run(setup, configure, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))
