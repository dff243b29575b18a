"""Optimizers that projects make for adapters: LoRA+, LoRA-FA, groups by name."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import Case, Found, Scene


def _trained(scene: Scene, kind: type) -> Found:
    trainer = scene.trainer(kind=kind)
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def lora_plus(scene: Scene) -> Found:
    import torch
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    class LoraPlus(Trainer):  # type: ignore[misc]
        def create_optimizer(self, *args: Any) -> Any:
            if self.optimizer is None:
                rates = {"lr": 1e-2, "eps": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1}
                self.optimizer = create_loraplus_optimizer(self.model, torch.optim.AdamW, **rates)
            return self.optimizer

    return _trained(scene, LoraPlus)


def lora_plus_assigned(scene: Scene) -> Found:
    import torch
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    class Assigned(Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            rates = {"lr": 1e-2, "eps": 1e-2, "loraplus_lr_ratio": 4.0}
            self.optimizer = create_loraplus_optimizer(self.model, torch.optim.AdamW, **rates)

    return _trained(scene, Assigned)


def lora_fa(scene: Scene) -> Found:
    from peft.optimizers import create_lorafa_optimizer
    from transformers import Trainer

    class LoraFa(Trainer):  # type: ignore[misc]
        def create_optimizer(self, *args: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = create_lorafa_optimizer(self.model, r=4, lora_alpha=8, lr=1e-2)
            return self.optimizer

    return _trained(scene, LoraFa)


def groups_by_name(scene: Scene) -> Found:
    import torch
    from transformers import Trainer

    class Grouped(Trainer):  # type: ignore[misc]
        def create_optimizer(self, *args: Any) -> Any:
            decayed = self.get_decay_parameter_names(self.model)
            named = [(name, item) for name, item in self.model.named_parameters() if item.requires_grad]
            groups = [
                {
                    "params": [item for name, item in named if ("layers.0." in name) == first and name in decayed],
                    "weight_decay": 0.5,
                    "lr": rate,
                }
                for first, rate in ((True, 1e-2), (False, 2e-2))
            ]
            assert sum(len(group["params"]) for group in groups) == len(named)
            self.optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-2)
            return self.optimizer

    return _trained(scene, Grouped)


CASES = [
    Case(
        "LoRA+ in create_optimizer",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/1352",
        "`create_optimizer` returns peft's LoRA+ optimizer with its own rates and decay.",
        lora_plus,
        stock={"FSDP1": "/loss/1 is"},
    ),
    Case(
        "LoRA+ assigned",
        "https://github.com/MakazhanAlpamys/Soup/pull/738",
        "The optimizer is assigned to `trainer.optimizer` before `train()`.",
        lora_plus_assigned,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "LoRA-FA",
        "https://github.com/huggingface/peft/pull/2468",
        "peft's LoRA-FA optimizer, which has a step of its own for pairs of lora_A and lora_B.",
        lora_fa,
        stock={"FSDP1": "/loss/", "FSDP2": "mixed torch.Tensor and DTensor"},
    ),
    Case(
        "groups by name",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/3403",
        "`create_optimizer` makes groups by the names of layers, with rates and decay of their own.",
        groups_by_name,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
