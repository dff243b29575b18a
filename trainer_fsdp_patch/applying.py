"""Applies a plan to a model in the Trainer's hands, and keeps what later steps need to know of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch import checkpoint, inventory, planning, sync
from trainer_fsdp_patch.errors import AdapterError, PlanError, TrainerFsdpPatchWarning, message
from trainer_fsdp_patch.prepared import Prepared, keep, prepared_for

if TYPE_CHECKING:
    from trainer_fsdp_patch.planning import Plan

logger = logging.getLogger("trainer_fsdp_patch")

_ASKED = "_trainer_fsdp_patch_asked"
_IGNORED = "_trainer_fsdp_patch_ignored"
_POLICY = "_trainer_fsdp_patch_policy"
_LOCAL = {"auto_mapping", "base_model_name_or_path", "revision"}
"""Entries of an adapter's configuration that may differ between machines."""


def record(plugin: Any, asked: dict[str, Any]) -> None:
    """Keep what a user gave the FSDP plugin explicitly, so that it wins over a plan later.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, after its init.
        asked: names and values of the arguments it was given; None counts as not given.

    Raises:
        PlanError: an argument can never be right; nothing is prepared yet.
    """
    setattr(plugin, _ASKED, {name for name, value in asked.items() if value is not None})
    if isinstance(plugin.ignored_modules, str):
        planning.expression(plugin.ignored_modules)
    elif plugin.ignored_modules is not None:
        plugin.ignored_modules = planning.modules_only(plugin.ignored_modules)
    if plugin.fsdp_version == 2 and asked.get("use_orig_params") is False:
        _warn_orig_params()


def _warn_orig_params() -> None:
    text = message(
        "use_orig_params",
        "False is asked for with FSDP2, which always keeps the original parameters",
        "It has no effect, and the run is right without it",
        "Leave it out, or set fsdp_version to 1",
    )
    warnings.warn(text, TrainerFsdpPatchWarning, stacklevel=4)


def prepare(trainer: Any, model: Any) -> Prepared | None:
    """Plan and apply, once for each model, before accelerate wraps it.

    Args:
        trainer: a Trainer whose accelerator exists.
        model: the model that accelerate is about to prepare.

    Returns:
        The prepared model's record, or None where there is nothing for us to do: no FSDP, no adapter.

    Raises:
        PlanError: the model is wrapped already, or a setting contradicts the plan.
        AdapterError: the ranks do not hold the same adapter.
    """
    if not getattr(trainer, "is_fsdp_enabled", False):
        return None
    accelerator = trainer.accelerator
    prepared = prepared_for(model)
    if prepared is not None or not inventory.has_adapter(model):
        return prepared
    refuse_wrapped(model)
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and str((trainer.args.fsdp_config or {}).get("use_orig_params")).lower() == "false":
        _warn_orig_params()
    explicit = explicit_policy(accelerator, plugin)
    plan = plan_for(model, accelerator, plugin, explicit)
    prepared = Prepared(model, plan, data_parallel_groups(accelerator))
    agree(prepared)
    checkpoint.expect(model, prepared)
    place(prepared, accelerator.device)
    _set_flags(prepared, plugin, explicit)
    prepared.watch()
    keep(model, prepared)
    if accelerator.is_main_process:
        logger.info("FSDP%d: %s.", plan.fsdp_version, plan.summary())
        for reason in plan.reasons:
            logger.info("FSDP%d: %s.", plan.fsdp_version, reason)
    return prepared


def refuse_wrapped(model: Any) -> None:
    """Refuse a model that FSDP wrapped before we could plan.

    Raises:
        PlanError: its adapter is already inside FSDP's units.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded or any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise PlanError(
            message(
                type(model).__name__,
                f"already wrapped by FSDP{2 if sharded else 1} when the Trainer prepares it",
                "Its adapter is inside the units and cannot be taken out",
                "Give the Trainer the bare model and call trainer_fsdp_patch.patch() before training starts",
            ),
            setting="model",
        )


def explicit_policy(accelerator: Any, plugin: Any) -> Any:
    """The plugin's mixed-precision policy where a user gave it, or None where accelerate or we made it."""
    policy = plugin.mixed_precision_policy
    if policy is None or policy is getattr(plugin, _POLICY, None):
        return None
    if "mixed_precision_policy" in getattr(plugin, _ASKED, ()):
        return policy
    default = copy.copy(plugin)
    default.mixed_precision_policy = None
    if accelerator.mixed_precision != "no":
        default.set_mixed_precision(accelerator.mixed_precision)
    return None if policy == default.mixed_precision_policy else policy


def user_ignored(plugin: Any) -> Any:
    """The user's ignored modules, also after we have put ours beside them."""
    ours, users = getattr(plugin, _IGNORED, (None, None))
    return users if ours is not None and plugin.ignored_modules is ours else plugin.ignored_modules


def plan_for(model: Any, accelerator: Any, plugin: Any, policy: Any) -> Plan:
    """Plan from accelerate's plugin.

    Args:
        model: with its adapter.
        accelerator: the run's.
        plugin: accelerate's FullyShardedDataParallelPlugin.
        policy: the user's own mixed-precision policy, or None.

    Raises:
        PlanError: a setting contradicts the model.
    """
    dtype = getattr(policy, "param_dtype", None)
    plan = planning.make_plan(
        model,
        fsdp_version=plugin.fsdp_version,
        mixed_precision=accelerator.mixed_precision,
        use_orig_params=plugin.use_orig_params,
        ignored_modules=user_ignored(plugin),
        param_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        units=plugin.transformer_cls_names_to_wrap,
    )
    buffers = getattr(policy, "buffer_dtype", None)
    for item in plan.set_aside:
        stored = item.tensor.dtype
        rounds = buffers is not None and "float" in stored and stored != str(buffers).removeprefix("torch.")
        if rounds and item.tensor.kind == "buffer":
            raise PlanError(
                message(
                    "mixed_precision_policy.buffer_dtype",
                    f"{buffers} would be forced on {item.tensor.name}, which is {stored}",
                    "The projection would be rounded, and saved rounded",
                    "Leave buffer_dtype None",
                ),
                setting="mixed_precision_policy",
            )
    return plan


def data_parallel_groups(accelerator: Any) -> list[Any]:
    """Process groups over which gradients are averaged, one for each dimension that FSDP works on.

    Raises:
        PlanError: tensor parallelism splits the adapter itself.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if parallelism is None or mesh is None:
        return [None]
    if getattr(parallelism, "tp_enabled", False):
        raise PlanError(
            message(
                "parallelism_config.tp_size",
                f"{parallelism.tp_size} beside FSDP",
                "A replicated adapter next to tensor-parallel layers is not supported",
                "Use tp_size=1, or switch the patches off",
            ),
            setting="parallelism_config",
        )
    return [mesh[name].get_group() for name in parallelism.fsdp_dim_names]


def agree(prepared: Prepared) -> None:
    """Compare the adapter's make-up across ranks before a tensor is moved.

    Raises:
        AdapterError: on all ranks, naming the first tensor or setting that differs.
    """
    import torch.distributed as dist

    items: list[tuple[str, Any]] = []
    for adapter, config in getattr(prepared.model(), "peft_config", {}).items():
        values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        items += [(f"peft_config[{adapter!r}].{key}", _plain(values[key])) for key in sorted({*values} - _LOCAL)]
    tensors = [item.tensor for item in prepared.plan.set_aside]
    items += [(tensor.name, (tensor.shape, tensor.dtype, tensor.role)) for tensor in tensors]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items)
    first = dict(everyone[0])
    for rank, others in enumerate(everyone):
        other = dict(others)
        for name in (*first, *other):
            if first.get(name, "absent") != other.get(name, "absent"):
                raise AdapterError(
                    message(
                        name,
                        f"{first.get(name, 'absent')} on rank 0 and {other.get(name, 'absent')} on rank {rank}",
                        "One adapter cannot be trained from different ones",
                        "Give every rank the same adapter configuration",
                    ),
                    tensor=name,
                )


def _plain(value: Any) -> str:
    """Text that is the same in every process, whatever the order of sets and the address of objects."""
    return json.dumps(
        value,
        sort_keys=True,
        default=lambda other: sorted(map(str, other)) if isinstance(other, (set, frozenset)) else type(other).__name__,
    )


def place(prepared: Prepared, device: Any) -> None:
    """Move what is set aside to the device and give every rank rank 0's bits, objects unchanged.

    Quantized layers are moved with their module, which keeps their quantization state, and are not
    broadcast: every rank has loaded the same ones.
    """
    import torch

    model = prepared.model()
    for name, _, _, module, tensor, _ in inventory.named_tensors(model):
        if prepared.roles.get(name) == inventory.QUANTIZED and tensor.device != device:
            module.to(device)
    prepared.refresh()
    shared = []
    for name, tensor in zip(prepared.names, prepared.tensors, strict=True):
        if prepared.roles[name] == inventory.QUANTIZED:
            continue
        if tensor.is_meta:
            tensor.data = torch.empty_like(tensor, device=device)
        elif tensor.device != device:
            tensor.data = tensor.data.to(device)
        shared.append(tensor)
    sync.broadcast(shared)
    sync.compare(prepared.names, prepared.tensors, "after the broadcast")


def _set_flags(prepared: Prepared, plugin: Any, explicit: Any) -> None:
    """Dtypes and ignored modules on accelerate's plugin; FSDP1 takes the latter as modules."""
    import torch

    plan = prepared.plan
    policy = plugin.mixed_precision_policy
    if policy is not None and explicit is None:
        dtype = None if plan.param_dtype is None else getattr(torch, plan.param_dtype)
        # FSDP1 would round RoPE tables and projections in place, FSDP2 the loss: None leaves both alone.
        spared = {"buffer_dtype": None} if plan.fsdp_version == 1 else {"output_dtype": None}
        policy = dataclasses.replace(policy, param_dtype=dtype, reduce_dtype=dtype, **spared)
        plugin.mixed_precision_policy = policy
        setattr(plugin, _POLICY, policy)
    if plan.fsdp_version == 1:
        users = user_ignored(plugin)
        plugin.ignored_modules = _ignored(prepared)
        setattr(plugin, _IGNORED, (plugin.ignored_modules, users))


def _ignored(prepared: Prepared) -> list[Any]:
    """Modules for FSDP1 to ignore: those that hold nothing else than what is set aside, and one for the rest.

    FSDP1 ignores tensors by identity wherever they sit, but is told of them by modules; a module of
    our own names those that share theirs with base weights.
    """
    from torch import nn

    known = {id(tensor) for tensor in prepared.tensors}
    whole = []
    for module in prepared.model().modules():
        held = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
        if held and known.issuperset(held):
            whole.append(module)
    covered = {id(tensor) for module in whole for tensor in (*module.parameters(), *module.buffers())}
    rest = nn.Module()
    for index, tensor in enumerate(prepared.tensors):
        if id(tensor) in covered:
            continue
        if isinstance(tensor, nn.Parameter):
            rest.register_parameter(f"parameter_{index}", tensor)
        else:
            rest.register_buffer(f"buffer_{index}", tensor)
    return [*whole, rest]


def autocast_prepared(accelerator: Any, results: Sequence[Any]) -> None:
    """Run planned models under autocast and return fp32, as accelerate does for one process, DDP and FSDP1.

    Args:
        accelerator: the run's.
        results: what its `_prepare_fsdp2` returns, models among it.
    """
    from accelerate.utils import convert_outputs_to_fp32
    from accelerate.utils.modeling import get_mixed_precision_context_manager
    from torch import nn

    for model in results:
        if not isinstance(model, nn.Module) or prepared_for(model) is None:
            continue
        if accelerator.native_amp and "_original_forward" not in vars(model):
            # The attribute is accelerate's own mark, by which unwrap_model takes the autocast off again.
            vars(model)["_original_forward"] = model.forward
            context = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
            function = getattr(model.forward, "__func__", None)
            if function is None:
                model.forward = convert_outputs_to_fp32(context(model.forward))
            else:
                model.forward = MethodType(convert_outputs_to_fp32(context(function)), model)


def keep_rng_state(model: Any) -> None:
    """Make recomputation under activation checkpointing draw the noise of the first forward."""
    for module in model.modules():
        function = getattr(module, "checkpoint_fn", None)
        if isinstance(function, functools.partial) and function.keywords.get("preserve_rng_state") is False:
            keywords = {**function.keywords, "preserve_rng_state": True}
            vars(module)["checkpoint_fn"] = functools.partial(function.func, *function.args, **keywords)


def update_plugin(upstream: Callable[[Any, Any], None], model: Any, accelerator: Any) -> None:
    """Leave the plugin as the plan set it; models that are not ours go to the upstream function."""
    if prepared_for(model) is None:
        upstream(model, accelerator)
