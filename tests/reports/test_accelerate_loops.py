"""Scripts without a Trainer, as open-instruct's and diffusers': no plan is made, and nothing changes for them."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import Case, Found, Scene


def _loop(scene: Scene) -> tuple[Any, Any, Found]:
    """A training loop by accelerate alone."""
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    settings = getattr(scene.given, "fsdp_plugin_args", None)
    plugin = FullyShardedDataParallelPlugin(**settings) if settings and scene.ranks > 1 else None
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = scene.model()
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-2, eps=1e-2)
    batches = torch.utils.data.DataLoader(scene.rows(even=True), batch_size=4 // scene.ranks)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(accelerator.gather(loss.detach().reshape(1)).mean()), float(norm)])
    return accelerator, model, {"losses": losses}


def save_with_accelerate(scene: Scene) -> Found:
    accelerator, model, found = _loop(scene)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(scene.folder, state_dict=state)
    whole = {} if scene.rank else {key: value.clone() for key, value in state.items()}
    return {**found, "state": whole, "file": scene.written()}


CASES = [
    Case(
        "a loop by accelerate",
        "https://github.com/allenai/open-instruct/blob/main/open_instruct/utils.py",
        "LoRA in an accelerate loop, saved as open-instruct's `save_with_accelerate` does.",
        save_with_accelerate,
        stock={"FSDP1": cases.EMPTY},
        alike=True,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_nothing_changes(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
