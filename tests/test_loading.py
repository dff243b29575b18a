"""A quantized base that one rank of a machine loads: what each rank holds on the way, and what the run makes of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cells import Bench, Setup, reference_of, trial
from faults import FLAVOURS, packed, where
from launched import KINDS, LOADS, READ, TRAINS, load, marked, quantized_bytes, ranks_load
from ranks import on_ranks
from test_benchmarks import ROOT
from test_benchmarks import load as load_benchmark

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.inspecting.leaves import leaves
from trainer_fsdp_patch.loading import moving, reading, restoring, streaming
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing import choosing
from trainer_fsdp_patch.testing import cpu, forks
from trainer_fsdp_patch.testing.case import Outcome, compare

pytestmark = packed


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    # How many random numbers the loading of a base has drawn depends on who has written its files.
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))


def vera(model: Any) -> Any:
    from peft import VeraConfig, get_peft_model

    return get_peft_model(model, VeraConfig(r=8, target_modules=["q_proj", "o_proj"]))


def dora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_dora=True))


for method in (lora, vera, dora):
    method.load = load  # type: ignore[attr-defined]

READERS = [fsdp for fsdp in FLAVOURS if fsdp == 1 or versions.at_least("accelerate", "1.8.0")]
"""Versions of FSDP under which one CPU rank may load for others; accelerate before broadcasts on CUDA alone."""

MORE_KINDS = [kind for kind in KINDS if kind not in ("4bit", "8bit", "torchao")]
USUAL = [(lora, "4bit"), (vera, "4bit-double"), (lora, "8bit"), (vera, "torchao"), (lora, "quanto"), (dora, "4bit")]
READ_CASES = [(lora, "aqlm"), (lora, "fp8"), (vera, "fp8"), (lora, "own")]
LONG_CASES = [
    *((method, kind) for method in (lora, vera) for kind in KINDS if (method, kind) not in USUAL),
    (dora, "torchao"),
]
CASES = [
    *(marked(kind, TRAINS, method) for method, kind in (*USUAL, *READ_CASES)),
    *(marked(kind, TRAINS, method, long=True) for method, kind in LONG_CASES),
]
"""DoRA reads the weight while it is made, which 8-bit and quanto do not allow on a CPU."""


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_run_is_right(bench: Bench, tmp_path: Path, method: Any, kind: str, fsdp: int) -> None:
    if fsdp not in READERS:
        pytest.skip("no FSDP2 that broadcasts to CPU ranks with these releases")
    setup = Setup(f"f{fsdp}-{kind}", fsdp=fsdp, ram_efficient=fsdp == 2, dtype="bfloat16", **{**KINDS, **READ}[kind])
    one = trial.run(reference_of(setup), method, bench.base, tmp_path / "one", ranks=1, patched=False)
    if one.error and not versions.at_least("peft", "0.21.0"):
        pytest.skip(f"one process does not train either: {one.error[:80]}")
    assert not one.error, one.extra
    outcome = trial.run(setup, method, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))


class Hands:
    """Has FSDP1 hand rank 0's bytes out on a CPU."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        from accelerate.state import AcceleratorState

        plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
        if plugin is not None:
            cpu.hand_out(plugin)


def handed(model: Any) -> Any:
    """LoRA, with a callback that changes the plugin."""
    from transformers import TrainerCallback

    handed.callbacks = lambda: [type("Handing", (Hands, TrainerCallback), {})()]  # type: ignore[attr-defined]
    return lora(model)


handed.load = load  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [marked(kind, TRAINS, long=kind in MORE_KINDS) for kind in KINDS])
def test_fsdp1_hands_out_what_one_rank_has(bench: Bench, tmp_path: Path, kind: str) -> None:
    setup = Setup(f"f1-{kind}", fsdp=1, dtype="bfloat16", **KINDS[kind])
    one = trial.run(reference_of(setup), lora, bench.base, tmp_path / "one", ranks=1, patched=False)
    outcome = trial.run(setup, handed, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))


@pytest.mark.skipif(2 not in READERS, reason="no FSDP2 that broadcasts to CPU ranks with these releases")
def test_a_budget_keeps_layers_that_one_rank_has_loaded(bench: Bench, tmp_path: Path) -> None:
    """They are full on every rank, so that rank 0's bytes go to all before FSDP takes the rest."""
    setup = Setup("f2-budget", ram_efficient=True, dtype="bfloat16", storage="uint8", budget="50%")
    one = trial.run(reference_of(setup), lora, bench.base, tmp_path / "one", ranks=1, patched=False)
    outcome = trial.run(setup, lora, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))


LEFT = ("auto-round", "awq", "fbgemm_fp8", "gguf", "gptq", "higgs", "mxfp4", "sinq")
"""Quantizers of transformers 5.24 that go over their layers once all are loaded, or that no test here can load."""


def is_taken(kind: Any, *, dequantize: bool = False) -> bool:
    """Whether bases of a quantizer's class are taken while they are loaded."""
    quantizer = kind.__new__(kind)
    quantizer.quantization_config = SimpleNamespace(dequantize=dequantize)
    return streaming.sets_layers(quantizer)


@where("transformers>=5.24")
def test_quantizers_that_lay_weights_out_later_are_left_alone() -> None:
    """What a quantizer's class does after the loading decides, and no list of those that are taken."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert sorted(name for name, kind in AUTO_QUANTIZER_MAPPING.items() if not is_taken(kind)) == sorted(LEFT)
    assert not any(is_taken(kind, dequantize=True) for kind in AUTO_QUANTIZER_MAPPING.values())
    assert not streaming.is_asked(None)


@where("transformers>=5.0")
def test_a_program_s_quantizer_is_judged_by_what_it_does() -> None:
    from transformers.quantizers.quantizer_aqlm import AqlmHfQuantizer

    class Later(AqlmHfQuantizer):  # type: ignore[misc]
        def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
            return model

    def after(self: Any, model: Any, **kwargs: Any) -> None:
        """Its class has the name of one of transformers, which is known to do no harm."""

    after.__qualname__ = "Bnb4BitHfQuantizer._process_model_after_weight_loading"
    namesake = type("Bnb4BitHfQuantizer", (AqlmHfQuantizer,), {after.__qualname__.partition(".")[2]: after})
    assert is_taken(type("Own", (AqlmHfQuantizer,), {}))
    assert not is_taken(Later)
    assert not is_taken(namesake)
    assert not is_taken(SimpleNamespace)


@pytest.mark.parametrize("kind", [marked(kind, LOADS) for kind in ("aqlm", "fp8")])
def test_a_base_that_is_read_quantized_is_on_one_rank(bench: Bench, kind: str) -> None:
    """Of stock it is on both. What the second rank keeps is small, or plain numbers such as codebooks."""
    setup = Setup(f"f2-{kind}", ram_efficient=True, dtype="bfloat16", **READ[kind])
    stock = ranks_load(bench.base, setup, False, lambda model, rank: {"bytes": quantized_bytes(model)})
    ours = ranks_load(bench.base, setup, True, lambda model, rank: {"bytes": quantized_bytes(model)})
    assert stock[0]["bytes"] == stock[1]["bytes"] == ours[0]["bytes"]
    assert ours[1]["bytes"] < 0.5 * ours[0]["bytes"]


@where("transformers>=5.0", "accelerate>=1.8", "peft>=0.19")
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_program_s_quantizer_that_turns_weights_later_turns_them_on_every_rank(
    bench: Bench, tmp_path: Path, fsdp: int
) -> None:
    """Its weights have their bytes then. Were they taken, the second rank could not turn what it does not have."""
    setup = Setup(f"f{fsdp}-turning", fsdp=fsdp, ram_efficient=fsdp == 2, dtype="bfloat16", quantizer="written-turning")
    one = trial.run(reference_of(setup), lora, bench.base, tmp_path / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    outcome = trial.run(setup, lora, bench.base, tmp_path / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))


def test_files_that_are_read_at_once_leave_nothing_on_the_quantizer() -> None:
    """transformers before 5.0 reads files in threads where HF_ENABLE_PARALLEL_LOADING asks for it."""
    created: list[str] = []

    class Quantizer:
        def create_quantized_param(self, model: Any, value: Any, name: str) -> None:
            created.append(name)

    quantizer: Any = Quantizer()
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    def read(name: str, meanwhile: float) -> None:
        with reading.settled(model, quantizer):
            time.sleep(meanwhile)
            quantizer.create_quantized_param(model, None, name)

    threads = [threading.Thread(target=read, args=case) for case in (("0.weight", 0.3), ("1.weight", 0.0))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert created == ["0.weight", "1.weight"]
    assert vars(quantizer) == {}


def test_what_a_file_has_of_other_layers_leaves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is settled when its tensor is set, and all of them once more after the file. A CPU shows no move."""
    settled: list[str] = []
    monkeypatch.setattr(streaming, "settle", lambda model, name: settled.append(name))
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    quantizer: Any = SimpleNamespace(create_quantized_param=lambda model, value, name: None)
    with reading.settled(model, quantizer):
        quantizer.create_quantized_param(model, None, "0.weight.absmax")
        assert settled == ["0."]
    assert settled[1:] == [".", "0.", "1."]


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


class Tabled(torch.nn.Module):
    """A layer with a weight of its own, and a table that others hold too."""

    def __init__(self, table: torch.Tensor, first: int) -> None:
        super().__init__()
        weight = torch.arange(first, first + 4096) % 251
        self.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
        self.table = table


def test_a_table_of_several_layers_stays_theirs_and_comes_to_every_rank() -> None:
    """It is no part of what is packed, on any rank, so that FSDP does not hand it out."""

    def child(rank: int) -> Any:
        table = torch.arange(1000.0) if rank == 0 else torch.zeros(1000)
        layers = [Tabled(table, first) for first in (1, 2)]
        model = torch.nn.Sequential(*layers)
        for layer in layers if rank else ():
            moving.put(layer, list(moving.large(layer)), "meta")
        shared = layers[0].table.untyped_storage()._cdata == layers[1].table.untyped_storage()._cdata
        found = choosing.candidates(inventory.take(model), ())
        chosen = {item.name: (item.nbytes, "bfloat16") for item in found}
        choosing.pack_layers(inventory.take(model), chosen, torch.device("cpu"))
        restoring.restore(layers, torch.device("cpu"))
        restoring.fill(layers, torch.device("cpu"))
        stored = [layer.get_parameter(PACKED).view(torch.uint8).tolist() for layer in layers]
        return {"shared": shared, "chosen": chosen, "tables": [layer.table.tolist() for layer in layers], "is": stored}

    first, second = on_ranks(child, 2)
    assert first["shared"] is second["shared"] is True
    assert [size for size, _ in first["chosen"].values()] == [4096, 4096]
    assert first == second
    assert first["tables"] == [torch.arange(1000.0).tolist()] * 2


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


@where("transformers>=5.24")
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_no_rank_but_the_first_ever_has_the_base(fsdp: int, tmp_path: Path) -> None:
    """As the table of docs/quantized-bases.md has it: less than the base on the last rank, which no stock rank has."""
    benchmark = load_benchmark("loading")
    [written] = forks.launch(lambda rank: Outcome(folder=benchmark.write_base(tmp_path / "base", 16)), ranks=1)
    whole, ours = benchmark.peaks("4bit", fsdp, 2, True, written.folder)
    # What Python has not collected yet counts too, which differs by a unit from run to run.
    assert ours[1] < 0.95 * whole < ours[0]
    _, stock = benchmark.peaks("4bit", fsdp, 2, False, written.folder)
    assert not stock or min(stock) > whole
    page = (ROOT / "docs" / "quantized-bases.md").read_text().splitlines()
    [line] = [line for line in page if line.startswith(f"| FSDP{fsdp} | 2 | 4bit |")]
    cells = [int(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")[3:] if cell != "-"]
    assert cells == pytest.approx([whole, *stock[:1], ours[0], *stock[1:], ours[1]], rel=0.12)
