"""What is kept of a run while it trains: losses, collectives, footprint, and the adapter of each step."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.testing import case

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer


def counter() -> Any:
    """A context manager class that counts the collectives dispatched inside it, in `total`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        total = 0

        def __torch_dispatch__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
            self.total += function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function)
            return function(*args, **(kwargs or {}))

    return Count


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what a rank holds full of what is trained, by canonical name.

    They are in main memory: a parent that reads tensors of an accelerator begins its runtime, and can fork no more.

    Args:
        model: wrapped or not.
    """
    import torch

    return {
        canonical(name): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and type(parameter) is torch.nn.Parameter
    }


def recorder(tensors: list[inventory.TensorInfo]) -> Any:
    """A callback that keeps what is compared: losses, collectives, footprint and the adapter of each step.

    Args:
        tensors: of the model before it is wrapped.
    """
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        mode: Any
        watch: footprint.Watch
        watching: contextlib.ExitStack
        count = counter()

        def __init__(self) -> None:
            self.outcome = case.Outcome()
            self.running = 0.0

        def on_train_begin(
            self, args: object, state: object, control: object, model: nn.Module, **kwargs: object
        ) -> None:
            self.outcome.steps.append(trained(model))

        def on_step_begin(
            self, args: object, state: object, control: object, model: nn.Module, **kwargs: object
        ) -> None:
            self.mode, self.watch = self.count(), footprint.Watch(model, tensors)
            self.watching = contextlib.ExitStack()
            self.watching.enter_context(self.watch.watching())
            self.watching.enter_context(self.mode)

        def on_step_end(self, args: object, state: object, control: object, model: nn.Module, **kwargs: object) -> None:
            self.watching.close()
            self.outcome.collectives.append(self.mode.total)
            self.outcome.footprint = self.watch.footprint(self.mode.total, self.outcome.footprint)
            self.outcome.losses.append(self.running)
            self.running = 0.0
            self.outcome.steps.append(trained(model))

    return Recorder()


def trainer_class(recorder: Any) -> type[Trainer]:
    """Class of a Trainer that sums up the losses of a step.

    Args:
        recorder: gets them, added to its `running`.
    """
    from transformers import Trainer

    class RecordingTrainer(Trainer):  # type: ignore[misc]
        def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            recorder.running += float(loss)
            return loss

    return RecordingTrainer
