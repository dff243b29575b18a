"""Bases that transformers quantizes with gptqmodel: the package's own layers, loaded as users load them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import written
from cells import Bench, Setup, reference_of, trial
from faults import FLAVOURS, packed, where
from torch import nn

from trainer_fsdp_patch.testing.case import Outcome, compare

# Its import starts threads, and a process that has those forks no rank: each rank imports it.
here = pytest.mark.skipif(not importlib.util.find_spec("gptqmodel"), reason="gptqmodel is not installed")

pytestmark = [packed, here, where("peft>=0.20", "transformers>=5.16", "accelerate>=1.15")]

GROUP = 32


def laid_out(layer: nn.Linear, method: str) -> nn.Module:
    """The package's layer of a linear layer, rounded to the nearest of 16 values of its group."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    kind, symmetric = (TorchLinear, True) if method == "gptq" else (AwqTorchLinear, False)
    made = kind(4, GROUP, symmetric, False, layer.in_features, layer.out_features, False, register_buffers=True)
    groups = layer.weight.detach().reshape(layer.out_features, -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
    # Their kernels read scales of 16 bits. The offset is rounded too, for which the range is a value short.
    scales = ((high - low) / 14).clamp(min=1e-4).half().float()
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales).round()
    if symmetric:
        made.pack_original(layer, scales, zeros, made.g_idx)
    else:
        made.pack(layer, scales, zeros)
    return made


def write(base: str, method: str, folder: Path) -> None:
    """Write a base as the package does: its buffers, and a configuration of transformers."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for module in list(model.model.layers.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, key, laid_out(child, method))
    config = GPTQConfig(4, group_size=GROUP, format="gptq_v2") if method == "gptq" else AwqConfig(4, group_size=GROUP)
    written.save(model, config, folder)


def load(base: str, setup: Setup) -> Any:
    """Load a base as a user does; the first rank writes it where there is none."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    method, _, backend = setup.quantizer.partition("-")
    folder = Path(f"{base}-{method}")
    written.by_the_first(folder, lambda place: write(base, method, place))
    # What it selects otherwise on a CPU trains nothing, and says so.
    config = {"gptq": GPTQConfig, "awq": AwqConfig}[method](4, group_size=GROUP, backend=backend)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=getattr(torch, setup.dtype), quantization_config=config, attn_implementation="eager"
    )
    model.config.use_cache = False
    return model


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))


def vera(model: Any) -> Any:
    from peft import VeraConfig, get_peft_model

    return get_peft_model(model, VeraConfig(r=8, target_modules=["q_proj", "o_proj"]))


class First:
    """Evaluates once before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        rows = trial.dataset(2)
        model.eval()
        with torch.no_grad():
            model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        model.train()


def evaluated(model: Any) -> Any:
    """LoRA, in a run that evaluates first."""
    from transformers import TrainerCallback

    evaluated.callbacks = lambda: [type("Evaluating", (First, TrainerCallback), {})()]  # type: ignore[attr-defined]
    return lora(model)


for adapted in (lora, vera, evaluated):
    adapted.load = load  # type: ignore[attr-defined]

LOW: dict[str, Any] = {"dtype": "bfloat16"}
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"quantizer": "gptq-auto_trainable", **LOW},
    "awq": {"quantizer": "awq-auto_trainable", **LOW},
    "gptq-fp32": {"quantizer": "gptq-auto_trainable"},
    "awq-fp32": {"quantizer": "awq-auto_trainable"},
    "gptq-amp": {"quantizer": "gptq-auto_trainable", **LOW, "amp": "bf16"},
    "awq-amp": {"quantizer": "awq-auto_trainable", **LOW, "amp": "bf16"},
    "gptq-torch": {"quantizer": "gptq-gptq_torch", **LOW},
    "awq-torch": {"quantizer": "awq-torch_awq", **LOW},
    "awq-torch-fp32": {"quantizer": "awq-torch_awq"},
}
USUAL = [(lora, "gptq"), (vera, "awq")]
CASES = [
    case if case in USUAL else pytest.param(*case, marks=pytest.mark.long)
    for case in ((method, kind) for method in (lora, vera) for kind in KINDS)
]


def right(bench: Bench, folder: Path, setup: Setup, method: Any) -> tuple[Outcome, Outcome]:
    """What one process and patched ranks give, which is the same."""
    one = trial.run(reference_of(setup), method, bench.base, folder / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    outcome = trial.run(setup, method, bench.base, folder / "ranks")
    verdict = compare(outcome, one, setup)
    assert verdict.right, (verdict.error, outcome.extra.get("traceback"))
    return one, outcome


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_run_is_right_and_a_rank_holds_its_share(
    bench: Bench, tmp_path: Path, method: Any, kind: str, fsdp: int
) -> None:
    setup = Setup(f"f{fsdp}-{kind}", fsdp=fsdp, **KINDS[kind])
    one, outcome = right(bench, tmp_path, setup, method)
    stock = trial.run(setup, method, bench.base, tmp_path / "stock", patched=False)
    assert fsdp == 2 or not compare(stock, one, setup).right
    ours, theirs = outcome.footprint, stock.footprint
    assert ours is not None
    assert ours.replicated == 0
    # Zeros and tables of a few bytes stay; so do the scales that one kernel casts in its forward.
    assert ours.statistics <= (8192 if kind == "awq-torch" else 1024)
    if theirs is not None and kind != "awq-torch":
        assert theirs.statistics - ours.statistics == 2 * (ours.base - theirs.base) > 40_000


@pytest.mark.long
@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_layer_that_is_laid_out_anew_in_an_evaluation_is_full_and_right(
    bench: Bench, tmp_path: Path, kind: str, fsdp: int
) -> None:
    """Its kernel for evaluations keeps a layout of its own from then on, in training too."""
    setup = Setup(f"f{fsdp}-{kind}", fsdp=fsdp, **KINDS[kind])
    _, outcome = right(bench, tmp_path, setup, evaluated)
    assert outcome.footprint is not None
    assert outcome.footprint.statistics > 50_000
