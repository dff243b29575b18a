"""Every quantizer of transformers: what its layers keep goes through FSDP bit for bit, and the page says what is so."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from typing import Any

import keeper
import pytest
import stored
import torch
from faults import FLAVOURS, where
from test_benchmarks import ROOT
from test_packed_bases import KINDS
from torch import nn

import trainer_fsdp_patch
from trainer_fsdp_patch import support, versions
from trainer_fsdp_patch.bits import same_bits
from trainer_fsdp_patch.inspecting.leaves import leaves
from trainer_fsdp_patch.packing import choosing
from trainer_fsdp_patch.planning.plan import Plan, make_plan
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

pytestmark = where("transformers>=5.24", "torch>=2.8")

PACKAGES = {"aqlm": "aqlm", "auto-round": "auto_round_extension", "vptq": "vptq"}
"""Layers that transformers does not carry itself, by the package that has them."""

HERE = [name for name in stored.LAYERS if importlib.util.find_spec(PACKAGES.get(name, "torch"))]


class Unit(nn.Module):
    """A frozen layer of plain numbers, and a quantized layer that is compared where it would compute."""

    def __init__(self, name: str, dtype: torch.dtype, *, runs: bool) -> None:
        super().__init__()
        self.name, self.runs = name, runs
        self.frozen = nn.Linear(stored.WIDTH, stored.WIDTH, dtype=dtype).requires_grad_(False)
        self.layer = stored.layer(name)
        self.first = {
            leaf.path: leaf.tensor.detach().clone()
            for leaf in leaves(self.layer)
            # A bias is a number as any other: FSDP takes it, and may cast it.
            if leaf.path != "bias" and leaf.tensor.numel()
        }

    def compare(self, when: str) -> None:
        keeper.RUNS.append(when)
        now = {leaf.path: leaf.tensor for leaf in leaves(self.layer)}
        keeper.FOUND += [
            f"{self.name}: {path} in {when}" for path, was in self.first.items() if not same_bits(now[path], was)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = keeper.Compared.apply(self.frozen(x), self)
        return self.layer(x) if self.runs else x


def planned(model: nn.Module, fsdp: int, mixed: str) -> Plan:
    """The plan of two ranks, applied as far as quantized layers are concerned."""
    taken = choosing.inventory.take(model)
    plan = make_plan(model, fsdp_version=fsdp, mixed_precision=mixed, units=["Unit"], ranks=2, inventory=taken)
    choosing.pack_layers(taken, plan.packed, torch.device("cpu"))
    return plan


def wrap(unit: nn.Module, fsdp: int, low: torch.dtype | None, ignored: set[str], prefix: str) -> nn.Module:
    """A unit of FSDP without what the plan ignores, as the Trainer would have it."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

    out = {parameter for name, parameter in unit.named_parameters() if f"{prefix}.{name}" in ignored}
    if fsdp == 2:
        policy = MixedPrecisionPolicy(param_dtype=low, output_dtype=torch.float32)
        fully_shard(unit, mp_policy=policy, ignored_params=out)
        return unit
    precision = MixedPrecision(param_dtype=low, cast_forward_inputs=True) if low else None
    return FullyShardedDataParallel(
        unit, use_orig_params=True, device_id=torch.device("cpu"), ignored_states=list(out), mixed_precision=precision
    )


def wrapped(model: nn.Sequential, fsdp: int, mixed: str) -> Plan:
    plan = planned(model, fsdp, mixed)
    ignored = {item.tensor.name for item in plan.ignored}
    low = torch.bfloat16 if mixed == "bf16" else None
    for index in range(1, len(model)):
        model[index] = wrap(model[index], fsdp, low, ignored, str(index))
    return plan


def enter() -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainer_fsdp_patch.patch()


def keeps_its_bytes(fsdp: int, rank: int) -> Outcome:
    """Two steps and an evaluation of all layers, one a unit, in bf16, into which FSDP casts what it is given."""
    enter()
    units = [Unit(name, torch.bfloat16, runs=False) for name in HERE]
    model = nn.Sequential(nn.Linear(stored.WIDTH, stored.WIDTH), *units)
    plan = wrapped(model, fsdp, "bf16")
    for _ in range(2):
        model(torch.randn(2, stored.WIDTH)).float().sum().backward()
    with torch.no_grad():
        model.eval()(torch.randn(2, stored.WIDTH))
    packed = {HERE[int(name.partition(".")[0]) - 1] for name in plan.packed}
    torch.distributed.destroy_process_group()
    return Outcome(extra={"found": keeper.FOUND, "runs": keeper.RUNS, "packed": packed})


@functools.cache
def compared(fsdp: int) -> list[Outcome]:
    return forks.launch(keeps_its_bytes, fsdp, ranks=2)


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("name", HERE)
def test_a_layer_that_transformers_makes_keeps_its_bytes(name: str, fsdp: int) -> None:
    for outcome in compared(fsdp):
        extra: dict[str, Any] = outcome.extra
        assert outcome.error == "", extra
        assert name in extra["packed"]
        assert [text for text in extra["found"] if text.startswith(f"{name}: ")] == []
        assert (extra["runs"].count("forward"), extra["runs"].count("backward")) == (3 * len(HERE), 2 * len(HERE))


def computes(fsdp: int, rank: int) -> Outcome:
    """Outputs and gradients of layers with a forward for CPUs, next to those before they were packed."""
    enter()
    torch.compiler.set_stance("force_eager")
    differ = []
    for name in stored.RUN_HERE:
        torch.manual_seed(0)
        unit = Unit(name, torch.float32, runs=True)
        for key, parameter in unit.layer.named_parameters():
            # Gemma rounds what goes in and out where these say so, and nothing has a gradient then.
            if key.endswith("activation_scale"):
                unit.first[key] = parameter.data.zero_().clone()
        model = nn.Sequential(nn.Linear(stored.WIDTH, stored.WIDTH), unit)
        x = torch.randn(2, stored.WIDTH, generator=torch.Generator().manual_seed(rank))
        results = [step(model, x)]
        wrapped(model, fsdp, "no")
        results += [step(model, x) for _ in range(3)]
        differ += [name for result in results[1:] if not all(map(torch.equal, result, results[0]))]
        assert results[0][1].abs().sum() > 0
    torch.distributed.destroy_process_group()
    return Outcome(extra={"differ": differ, "found": keeper.FOUND})


def step(model: nn.Sequential, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    output = model(x)
    output.sum().backward()
    gradient = model[0].weight.grad
    assert isinstance(gradient, torch.Tensor)
    return output.detach(), gradient.clone()


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_layer_whose_forward_runs_here_computes_the_same(fsdp: int) -> None:
    for outcome in forks.launch(computes, fsdp, ranks=2):
        assert outcome.error == "", outcome.extra
        assert outcome.extra["differ"] == outcome.extra["found"] == []


TRAINED = {
    "bitsandbytes_4bit": ["4bit", "4bit double"],
    "bitsandbytes_8bit": ["8bit"],
    "hqq": ["hqq"],
    "torchao": ["torchao int8"],
    "quanto": ["quanto int8"],
    "gptq": ["gptq"],
    "awq": ["gptq"],
    "aqlm": ["aqlm"],
    "fp8": [],
    "compressed-tensors": [],
}
"""Quantizers whose bases are trained by the tests, and which of the kinds of tests/test_packed_bases.py those are.

FP8 and compressed-tensors have tests of their own there.
"""


FULL = {"sinq": "full"}
"""Quantizers whose layers no plan sees."""


def test_what_a_layer_keeps_in_plain_attributes_alone_stays_full() -> None:
    """FSDP reads parameters, and a plan parameters and buffers: such a layer is left as it is."""
    layer = stored.Attributes()
    model = nn.Sequential(nn.Linear(stored.WIDTH, stored.WIDTH).requires_grad_(False), layer)
    assert planned(model, 2, "no").packed == {}
    assert layer.W_q.nbytes == stored.WIDTH * stored.WIDTH // 2


def rows() -> dict[str, list[str]]:
    """The table of quantizers in the page: cells by transformers' name."""
    page = (ROOT / "docs" / "quantized-bases.md").read_text()
    table = page.partition("## Every quantizer of transformers")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `(.+?)` \|(.+)\|$", table, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


def test_the_page_says_of_each_quantizer_what_is_tested() -> None:
    kept = {key for key, _ in stored.LAYERS.values()}
    assert {kind for kinds in TRAINED.values() for kind in kinds} == set(KINDS)
    for name, (state, *_) in rows().items():
        known = "trained" if name in TRAINED else "bytes" if name in kept else FULL.get(name, "not tried")
        assert state == known, name


def test_the_page_knows_every_quantizer_of_transformers() -> None:
    from transformers.quantizers import auto

    pinned = support.PINNED["transformers"]
    if str(versions.installed("transformers")) != pinned:
        pytest.skip(f"the page is about transformers {pinned}")
    assert set(rows()) == set(auto.AUTO_QUANTIZER_MAPPING)


def test_the_trainer_refuses_those_that_the_page_says_it_refuses() -> None:
    """A property that says no, whatever the configuration: others depend on it."""
    from transformers.quantizers import auto

    for name, (_, trains, *_) in rows().items():
        kind = auto.AUTO_QUANTIZER_MAPPING[name]
        try:
            answer = kind.is_trainable.fget(object.__new__(kind))
        except (AttributeError, ImportError, importlib.metadata.PackageNotFoundError):
            answer = None
        assert trains in ("yes", "no", "depends"), name
        assert (trains == "no") == (answer is False), (name, answer)
