"""accelerate's FSDP plugin: what a user set on it, the plan that follows, and the flags that the plan sets."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.errors import PlanError, warn
from trainer_fsdp_patch.inspecting import inventory, tuning, units
from trainer_fsdp_patch.inspecting.sharing import gathers, shards, version_of
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.planning.plan import make_plan
from trainer_fsdp_patch.planning.prepared import Prepared

if TYPE_CHECKING:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch import nn
    from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

    from trainer_fsdp_patch.planning.plan import Plan

    Policy = MixedPrecision | MixedPrecisionPolicy

_ASKED = "_trainer_fsdp_patch_asked"
_IGNORED = "_trainer_fsdp_patch_ignored"
_POLICY = "_trainer_fsdp_patch_policy"


def remember_arguments(plugin: FullyShardedDataParallelPlugin, asked: dict[str, object]) -> None:
    """Keep what a user gave the FSDP plugin explicitly, so that it wins over a plan later.

    Nothing is checked and nothing changed before a plan is made. Whose run it is to be is not known yet.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, after its init.
        asked: names and values of the arguments it was given; None counts as not given.
    """
    plain = {
        name: value if isinstance(value, (bool, str)) else None for name, value in asked.items() if value is not None
    }
    setattr(plugin, _ASKED, plain)


def warn_of_flag(plugin: FullyShardedDataParallelPlugin, config: dict[str, object]) -> None:
    """Warn where `use_orig_params` is false for FSDP2, which has no such flag; the run itself stays right.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin.
        config: `fsdp_config` of the TrainingArguments.
    """
    asked = {**config, **getattr(plugin, _ASKED, {})}
    if version_of(plugin) == 2 and str(asked.get("use_orig_params")).lower() == "false":
        warn(
            "use_orig_params",
            "False is asked for with FSDP2, which always keeps the original parameters",
            "It has no effect, and the run is right without it",
            "Leave it out, or set fsdp_version to 1",
        )


def explicit_policy(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> Policy | None:
    """The plugin's mixed-precision policy where a user gave it, or None where accelerate or we made it.

    Args:
        accelerator: its `mixed_precision` says which policy accelerate makes by itself.
        plugin: accelerate's FullyShardedDataParallelPlugin.
    """
    policy: Policy | None = plugin.mixed_precision_policy
    if policy is None or policy is getattr(plugin, _POLICY, None):
        return None
    if "mixed_precision_policy" in getattr(plugin, _ASKED, ()):
        return policy
    default = copy.copy(plugin)
    default.mixed_precision_policy = None
    if accelerator.mixed_precision != "no":
        default.set_mixed_precision(accelerator.mixed_precision)
    return None if policy == default.mixed_precision_policy else policy


def user_ignored(plugin: FullyShardedDataParallelPlugin) -> str | Iterable[nn.Module] | None:
    """The user's ignored modules, also after we have put ours next to them."""
    ours, users = getattr(plugin, _IGNORED, (None, None))
    return users if ours is not None and plugin.ignored_modules is ours else plugin.ignored_modules


def unit_classes(plugin: FullyShardedDataParallelPlugin) -> Sequence[str] | None:
    """Class names of the units; None for the model's own, and none at all where units go by size."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    given = _users_policy(plugin)
    if given is None:
        # until accelerate 1.0: it reads the environment when it wraps
        by_class = os.environ.get("FSDP_AUTO_WRAP_POLICY") == "TRANSFORMER_BASED_WRAP"
        named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
        return (named.split(",") if named else None) if by_class else ()
    if getattr(given, "func", given) is not transformer_auto_wrap_policy:
        return ()
    classes = getattr(given, "keywords", {}).get("transformer_layer_cls")
    names = getattr(plugin, "transformer_cls_names_to_wrap", None)
    return [item.__name__ for item in classes] if classes else names


def _users_policy(plugin: FullyShardedDataParallelPlugin) -> Callable[..., bool] | None:
    """The plugin's wrap policy without what we have put around it."""
    return without_ours(plugin.auto_wrap_policy)


def without_ours(policy: Any) -> Callable[..., bool] | None:
    """A wrap policy without what we have put around it; None stays.

    Args:
        policy: of FSDP1.
    """
    while getattr(policy, "func", None) in (_allowed, _or_own):
        policy = policy.keywords["policy"]
    users: Callable[..., bool] | None = policy
    return users


def plan_for(
    model: nn.Module,
    accelerator: Accelerator,
    plugin: FullyShardedDataParallelPlugin,
    policy: Policy | None,
    unsharded: str,
    taken: inventory.Inventory,
    room: memory.Room | None = None,
) -> Plan:
    """Plan from accelerate's plugin.

    Args:
        model: with its adapter.
        accelerator: the run's.
        plugin: accelerate's FullyShardedDataParallelPlugin.
        policy: the user's own mixed-precision policy, or None.
        unsharded: why no trainable tensor may be sharded, or "".
        taken: the model's inventory.
        room: what the rank with the least has room for, where base_budget asks for it.

    Raises:
        PlanError: a setting contradicts the model.
    """
    if isinstance(plugin.ignored_modules, Iterator):
        # accelerate is going to read it once more.
        plugin.ignored_modules = list(plugin.ignored_modules)
    dtype = getattr(policy, "param_dtype", None)
    plan = make_plan(
        model,
        fsdp_version=version_of(plugin),
        mixed_precision=accelerator.mixed_precision,
        use_orig_params=plugin.use_orig_params,
        ignored_modules=user_ignored(plugin),
        param_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        units=unit_classes(plugin),
        ranks=shards(accelerator, plugin),
        gathers=gathers(plugin),
        room=room,
        unsharded=unsharded,
        inventory=taken,
    )
    buffers = getattr(policy, "buffer_dtype", None)
    for item in plan.ignored:
        stored = item.tensor.dtype
        rounds = buffers is not None and "float" in stored and stored != str(buffers).removeprefix("torch.")
        if rounds and item.tensor.kind == "buffer":
            raise PlanError(
                "mixed_precision_policy.buffer_dtype",
                f"{buffers} would be forced on {item.tensor.name}, which is {stored}",
                "The projection would be rounded, and saved rounded",
                "Leave buffer_dtype None",
                setting="mixed_precision_policy",
            )
    return plan


def set_flags(prepared: Prepared, plugin: FullyShardedDataParallelPlugin, explicit: Policy | None) -> None:
    """Set dtypes and ignored modules on accelerate's plugin; FSDP1 takes the latter as modules.

    Args:
        prepared: record of the model, before FSDP wraps it.
        plugin: accelerate's FullyShardedDataParallelPlugin; it is changed.
        explicit: the user's own mixed-precision policy, which stays, or None.
    """
    import torch

    plan = prepared.plan
    _name_units(prepared.model(), plugin)
    policy = plugin.mixed_precision_policy
    if policy is not None and explicit is None:
        dtype = None if plan.param_dtype is None else getattr(torch, plan.param_dtype)
        # FSDP1 would round RoPE tables and projections in place, FSDP2 the loss: None leaves both alone.
        spared = {"buffer_dtype": None} if plan.fsdp_version == 1 else {"output_dtype": None}
        # What FSDP averages of an adapter it averages in fp32, as the rest of it is.
        reduced = torch.float32 if prepared.sharded_names and dtype is not None else dtype
        policy = dataclasses.replace(policy, param_dtype=dtype, reduce_dtype=reduced, **spared)
        plugin.mixed_precision_policy = policy
        setattr(plugin, _POLICY, policy)
    if plan.fsdp_version == 1:
        _wrap_policy(prepared, plugin)
        users = user_ignored(plugin)
        plugin.ignored_modules = _ignored(prepared)
        setattr(plugin, _IGNORED, (plugin.ignored_modules, users))


def _name_units(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """Name the model's own unit classes where some are not in it, such as a vision model's text layers.

    accelerate looks for each of `_no_split_modules`, and fails on the first that is absent.
    """
    names = list(getattr(model, "_no_split_modules", None) or ())
    # until accelerate 1.0: the plugin has no such field
    if unit_classes(plugin) is not None or not hasattr(plugin, "transformer_cls_names_to_wrap"):
        return
    here = {type(module).__name__ for module in model.modules()}
    present = [name for name in names if name in here]
    if present and len(present) < len(names):
        plugin.transformer_cls_names_to_wrap = present


def _wrap_policy(prepared: Prepared, plugin: FullyShardedDataParallelPlugin) -> None:
    """Keep FSDP1's units by size to modules that can be units, and add those of full modules that are trained."""
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    model, wanted = prepared.model(), set(prepared.sharded_names)
    plugin.auto_wrap_policy = _users_policy(plugin)
    plugin.set_auto_wrap_policy(model)
    by_size = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy) is size_based_auto_wrap_policy
    if plugin.auto_wrap_policy is not None and (by_size or prepared.plan.resident):
        ask = units.cannot_be_unit if by_size else units.has_nothing
        barred = ask(model, {id(tensor) for tensor in prepared.tensors})
        plugin.auto_wrap_policy = functools.partial(_allowed, policy=plugin.auto_wrap_policy, barred=barred)
    if not wanted:
        return
    named = model.named_parameters(remove_duplicate=False)
    sharded = {id(parameter) for name, parameter in named if canonical(name) in wanted}
    own = frozenset(
        id(module)
        for module in tuning.copied_modules(tuning.by_class(model.modules()))
        if any(id(parameter) in sharded for parameter in module.parameters())
    )
    plugin.auto_wrap_policy = functools.partial(_or_own, policy=plugin.auto_wrap_policy, own=own)


def _allowed(
    module: nn.Module,
    recurse: bool,
    nonwrapped_numel: int,
    *,
    policy: Callable[..., bool],
    barred: Callable[[nn.Module], bool],
) -> bool:
    """A wrap policy of torch's kind."""
    wanted = policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)
    return bool(wanted) and (recurse or not barred(module))


def _or_own(
    module: nn.Module, recurse: bool, nonwrapped_numel: int, *, policy: Callable[..., bool] | None, own: frozenset[int]
) -> bool:
    """A wrap policy of torch's kind."""
    wanted = not own.isdisjoint(map(id, module.modules())) if recurse else id(module) in own
    return wanted or (
        policy is not None and bool(policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel))
    )


def _ignored(prepared: Prepared) -> list[nn.Module]:
    """Modules for FSDP1 to ignore: those that hold nothing else than what is ignored, and one for the rest.

    FSDP1 ignores tensors by identity wherever they sit, but is told of them by modules. A module of our own names those
    that share theirs with base weights.
    """
    from torch import nn

    known = {id(tensor) for tensor in prepared.tensors}
    covering = []
    for module in prepared.model().modules():
        held = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
        # FSDP1 warns where it is to ignore its root, all of which is resident.
        if module is not prepared.model() and held and known.issuperset(held):
            covering.append(module)
    covered = {id(tensor) for module in covering for tensor in (*module.parameters(), *module.buffers())}
    # What is left shares its modules with base weights, which FSDP1 would ignore with them.
    # It is given in a module that is nobody's child. FSDP1 reads from it which tensors to ignore, and no more. Names in
    # it are numbers, for those of the model have dots.
    rest = nn.Module()
    for index, tensor in enumerate(prepared.tensors):
        if id(tensor) in covered:
            continue
        if isinstance(tensor, nn.Parameter):
            rest.register_parameter(f"parameter_{index}", tensor)
        else:
            rest.register_buffer(f"buffer_{index}", tensor)
    return [*covering, rest]
