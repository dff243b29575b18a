"""`generate()` of a model in training: as a forward of FSDP's root, with ranks in step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from trainer_fsdp_patch.names import unwrap
from trainer_fsdp_patch.planning.prepared import prepared_for
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel


def enable(accelerator: Accelerator, results: object) -> None:
    """Make `generate()` work on the planned models among what accelerate has prepared.

    FSDP gathers the root unit, such as embeddings and head, in the root's forward only, and `generate()`
    goes past it. Ranks also have to go on until the last one has its end-of-sequence token.

    Args:
        accelerator: the run's.
        results: what its `prepare` returns.
    """
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel

    for model in results if isinstance(results, Sequence) else [results]:
        if not isinstance(model, nn.Module) or prepared_for(model) is None:
            continue
        inner = _owner(unwrap(model))
        # peft's classes have a generate() of their own, also around models that have none.
        if not (hasattr(model, "generate") and hasattr(inner, "generate")):
            continue
        if not isinstance(vars(inner).get("generate"), _InStep):
            vars(inner)["generate"] = _InStep(cast("Callable[..., object]", inner.generate), accelerator)
        if isinstance(model, FullyShardedDataParallel):
            vars(model)["generate"] = functools.partial(_as_forward, model)
        else:
            _register(model)


class _InStep:
    """transformers' `generate()` with `synced_gpus` unless the caller says otherwise, under the run's autocast."""

    def __init__(self, upstream: Callable[..., object], accelerator: Accelerator) -> None:
        self.upstream, self.accelerator = upstream, accelerator

    def __call__(self, *args: object, **kwargs: object) -> object:
        # A model's own generate() gets what its caller gives; transformers' has the argument by name.
        if "synced_gpus" in inspect.signature(self.upstream).parameters:
            kwargs.setdefault("synced_gpus", self.accelerator.num_processes > 1)
        with self.accelerator.autocast():
            return self.upstream(*args, **kwargs)


def _owner(model: nn.Module) -> nn.Module:
    """The transformers model below peft's, whose `generate` it calls."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def _as_forward(root: FullyShardedDataParallel, *args: object, **kwargs: object) -> object:
    # FSDP gathers its root in the root's forward only, so all of `generate()` runs as that forward. Inside, the model
    # has its own forward back: `generate()` calls it for each token.
    inner = root._fsdp_wrapped_module
    before = vars(inner).get("forward", inner.forward)

    def forward(*args: object, **kwargs: object) -> object:
        with shadowed(inner, forward=before):
            generate = cast("Callable[..., object]", inner.generate)
            return generate(*args, **kwargs)

    with shadowed(inner, forward=forward):
        return root(*args, **kwargs)


def _register(model: nn.Module) -> None:
    """What transformers does itself from 5.0 on."""
    from torch.distributed import fsdp

    register = getattr(fsdp, "register_fsdp_forward_method", None)
    if register is not None and "generate" not in vars(model):
        register(model, "generate")
