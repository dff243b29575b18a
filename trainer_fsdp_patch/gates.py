"""Which calls of a wrapped function are ours: those of a run under FSDP whose model was planned.

Each patch names one of these; every other call goes upstream as it came, arguments included. A gate is asked with the
instance of the wrapped method and the arguments of the call by name. The instance of a function is None.
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.loading import reading, streaming
from trainer_fsdp_patch.packing.packed import none_packed
from trainer_fsdp_patch.packing.units import has_packed
from trainer_fsdp_patch.patching.wrapping import Gate, Kwargs
from trainer_fsdp_patch.planning.prepared import any_prepared, none_prepared, prepared_by, prepared_for, prepared_with
from trainer_fsdp_patch.preparing import fsdp2
from trainer_fsdp_patch.resuming import latest


class Planned:
    """A gate that is shut while this process has no planned model, whatever the call.

    Args:
        gate: asked where there is one.
    """

    shut = staticmethod(none_prepared)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __call__(self, instance: object, arguments: Kwargs) -> bool:
        return self._gate(instance, arguments)


def model(name: str = "model") -> Gate:
    """A planned model, wrapped or not, is the argument of that name.

    Args:
        name: of the argument.
    """
    return Planned(lambda instance, arguments: prepared_for(arguments.get(name)) is not None)


def part(name: str = "model") -> Gate:
    """The argument of that name is a planned model or a module inside one.

    Args:
        name: of the argument.
    """
    return Planned(lambda instance, arguments: prepared_with(arguments.get(name)) is not None)


def around(name: str = "module") -> Gate:
    """The argument of that name is a planned model, a module inside one, or a module that has one inside.

    Args:
        name: of the argument.
    """

    def gate(instance: object, arguments: Kwargs) -> bool:
        module: Any = arguments.get(name)
        if not inventory.is_module(module):
            return False
        return prepared_with(module) is not None or any(prepared_for(item) is not None for item in module.modules())

    return Planned(gate)


class OfPacked(Planned):
    """A gate that is shut while this process has no packed layer."""

    shut = staticmethod(none_packed)


@OfPacked
def packed_unit(instance: object, arguments: Kwargs) -> bool:
    """The method is of a unit of FSDP, of either version, that holds a packed layer of a planned model."""
    return has_packed(instance)


@Planned
def instance_planned(instance: object, arguments: Kwargs) -> bool:
    """The method is of a planned model."""
    return prepared_for(instance) is not None


@Planned
def instance_inside(instance: object, arguments: Kwargs) -> bool:
    """The method is of a planned model or of a module inside one."""
    return prepared_with(instance) is not None


@Planned
def trainer(instance: object, arguments: Kwargs) -> bool:
    """The method is of a Trainer whose model was planned."""
    return prepared_by(instance) is not None


def fsdp_trainer(instance: object, arguments: Kwargs) -> bool:
    """The method is of a Trainer that runs under FSDP, or whose base transformers has sharded, with an adapter.

    The model is the argument `model` where there is one, else the Trainer's.
    """
    model = arguments["model"] if "model" in arguments else getattr(instance, "model", None)
    if not inventory.is_module(model):
        return False
    under = getattr(instance, "is_fsdp_enabled", False) is True or inventory.is_native(model)
    return under and (prepared_for(model) is not None or inventory.has_adapter(model))


def resumes_from_the_last(instance: object, arguments: Kwargs) -> bool:
    """Such a Trainer is asked to resume from its last checkpoint, whichever that is."""
    return arguments.get("resume_from_checkpoint") is True and fsdp_trainer(instance, {})


def resuming(instance: object, arguments: Kwargs) -> bool:
    """Such a Trainer is looking for its last checkpoint."""
    return latest.SEARCHING.get() is not None


sharding = Planned(fsdp2.is_sharding)
"""accelerate is making units of FSDP2 of a planned model."""


def loads_quantized(instance: object, arguments: Kwargs) -> bool:
    """A quantized model is loaded for FSDP by one rank of a machine, as `cpu_ram_efficient_loading` asks."""
    return streaming.is_asked(arguments.get("hf_quantizer"))


def reads_quantized(instance: object, arguments: Kwargs) -> bool:
    """The same, where the quantizer is a part of the argument `load_config`."""
    return streaming.is_asked(getattr(arguments.get("load_config"), "hf_quantizer", None))


def is_being_read(instance: object, arguments: Kwargs) -> bool:
    """`model` is such a one, whose tensors transformers sets one after the other."""
    return reading.is_read(arguments.get("model"))


def is_inside_reading(instance: object, arguments: Kwargs) -> bool:
    """The call is made while such a one is read from a file."""
    return reading.is_inside()


def quantized_waits(instance: object, arguments: Kwargs) -> bool:
    """`model` is such a one, which no plan has taken over."""
    given = arguments.get("model")
    return not streaming.none_loaded() and inventory.is_module(given) and bool(streaming.loaded(given))


def finds_batch_size(instance: object, arguments: Kwargs) -> bool:
    """Such a Trainer looks for a batch size that fits into memory."""
    asked = getattr(getattr(instance, "args", None), "auto_find_batch_size", False) is True
    return asked and fsdp_trainer(instance, {})


@Planned
def accelerator(instance: object, arguments: Kwargs) -> bool:
    """The method is of an Accelerator that has prepared a planned model."""
    held = getattr(instance, "_models", None)
    return isinstance(held, list) and any(prepared_for(item) is not None for item in held)


def saved_model(instance: object, arguments: Kwargs) -> bool:
    """The method is of an Accelerator, and `model` is planned, or has an adapter that FSDP is yet to wrap."""
    model = arguments.get("model")
    if prepared_for(model) is not None:
        return True
    plugin = getattr(getattr(instance, "state", None), "fsdp_plugin", None)
    return plugin is not None and inventory.is_module(model) and inventory.is_unwrapped_adapter(model)


@Planned
def any_model(instance: object, arguments: Kwargs) -> bool:
    """This process has a planned model."""
    return any_prepared()
