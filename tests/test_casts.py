"""VeRA's projections are cast once for all layers: same bits, fewer copies, and no trace in the model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import trainer_fsdp_patch
from trainer_fsdp_patch import casts

METHOD = {"vera": "VeraConfig", "pvera": "PveraConfig"}


class Casts(TorchDispatchMode):  # type: ignore[misc]
    """Number of casts of matrices to bf16."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.name() == "aten::_to_copy" and result.dim() == 2 and result.dtype == torch.bfloat16:
            self.total += 1
        return result


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = ((8, 8), (8, 8), (8, 6), (6, 8), (8, 8))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in sizes)
        self.checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def made(method: str = "vera") -> Any:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, METHOD[method]):
        pytest.skip(f"this peft has no {METHOD[method]}")
    torch.manual_seed(0)
    config = getattr(peft, METHOD[method])(r=4, target_modules=r"layers\.\d", projection_prng_key=1)
    model = peft.get_peft_model(Layers(), config)
    for name, item in model.named_parameters():
        if "lambda" in name:
            item.data = torch.randn(item.shape, generator=torch.Generator().manual_seed(len(name))) / 10
    return model


def step(model: Any, x: torch.Tensor, low: Any = torch.bfloat16) -> tuple[list[torch.Tensor], int]:
    """Output and gradients of a step under autocast, and the number of casts of matrices in its forward."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", low, enabled=low is not None), Casts() as counted:
        output = model(x)
    output.float().square().sum().backward()
    return [output, *(item.grad.clone() for item in model.parameters() if item.grad is not None)], counted.total


@pytest.mark.parametrize("low", [torch.bfloat16, None], ids=["autocast", "fp32"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", METHOD)
def test_the_bits_are_those_without_copies(method: str, checkpointed: bool, low: Any) -> None:
    bare, model, x = made(method), made(method), torch.randn(3, 5, 8)
    casts.watch(model)
    for item in (bare, model):
        item.base_model.model.checkpointed = checkpointed
    theirs, many = step(bare, x, low)
    ours, few = step(model, x, low)
    assert len(ours) > 10 * (method == "vera")
    assert all(map(torch.equal, ours, theirs))
    # Five layers have five weights of their own, and ten slices of four shapes: two of A, two of B.
    assert (many - few) == (6 if low else 0)
    assert bool(len(casts._copies())) == (low is not None)
    trainer_fsdp_patch.unpatch()
    assert len(casts._copies()) == 0


def test_what_is_written_or_put_in_place_of_projections_is_seen() -> None:
    bare, model, x = made(), made(), torch.randn(3, 5, 8)
    casts.watch(model)
    for write in (
        lambda layers: layers[0].vera_A["default"].mul_(2),
        lambda layers: layers[0].vera_B["default"].data.mul_(2),
        lambda layers: layers[0].vera_A.update({"default": layers[0].vera_A["default"] + 1}),
        lambda layers: layers.bfloat16(),
        lambda layers: layers.float(),
    ):
        for item in (bare, model):
            write(item.base_model.model.layers)
        # As the model's forward and the step before it do.
        casts.forget()
        assert all(map(torch.equal, step(model, x)[0], step(bare, x)[0]))


def test_the_model_has_no_trace_of_copies() -> None:
    bare, model, x = made(), made(), torch.randn(3, 5, 8)
    before = list(model.state_dict())
    casts.watch(model)
    step(model, x)
    assert list(model.state_dict()) == before
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        model(torch.randn(3, 5, 7))
    for layer in model.base_model.model.layers:
        assert not vars(layer).keys() & {"vera_A", "vera_B"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, step(other, x)[0], step(bare, x)[0]))
    with torch.autocast("cpu", torch.bfloat16), model.disable_adapter(), bare.disable_adapter():
        assert torch.equal(model(x), bare(x))


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ranks_train_the_same_bits(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, fsdp: int
) -> None:
    setup = Setup("casts", fsdp=fsdp, amp="bf16", checkpointing=checkpointing)
    files = []
    for name in ("with", "without"):
        outcome = trial.run(setup, METHODS["vera"], bench.base, tmp_path / name)
        assert not outcome.error, outcome.extra
        files.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        monkeypatch.setattr(casts, "watch", lambda model: None)
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
