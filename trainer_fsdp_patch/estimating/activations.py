"""What a forward and a backward pass keep, by running both on tensors without data.

Autograd, autocast and checkpointing do what they do in training, so that no formula is needed and every architecture
will do. torch's fake tensors have shapes and no bytes. Every storage is counted from its birth to its end, but those of
parameters, their gradients, and buffers, which exist before. Of layers of one make, three or four are run instead of
eighty: each one more adds the same.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer_fsdp_patch import casts
from trainer_fsdp_patch.estimating import fakes
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.planning.plan import SHARD, Plan
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from torch import nn

FOLDED = 3
"""Layers of one make that are always run: one that begins, one that ends, and one in between."""


class Activations(NamedTuple):
    """Bytes of a rank.

    Attributes:
        kept: at the end of the forward pass, for the backward pass.
        forward: the most that is alive at once in the forward pass.
        backward: the most that is alive at once in the backward pass.
    """

    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The most that is alive at once in both."""
        return max(self.forward, self.backward)


class Batch(NamedTuple):
    """What a forward pass gets.

    Attributes:
        rows: of a rank's micro-batch; length: tokens of a row, without padding.
    """

    rows: int
    length: int


def measure(model: nn.Module, plan: Plan, batch: Batch, *, checkpointing: bool, fold: bool = True) -> Activations:
    """Bytes that one forward and one backward pass take beyond parameters, gradients and buffers.

    Args:
        model: with an adapter, on meta; it is left as it was.
        plan: of the model, for the dtypes in which units compute.
        batch: of one rank.
        checkpointing: whether each layer is recomputed in the backward pass.
        fold: whether layers of one make are run a few times only.

    Raises:
        Exception: whatever the model's forward raises that cannot work without data.
    """
    with _checkpointed(model, checkpointing):
        if not fold:
            return _run(model, plan, batch)
        makes = _makes(model, plan)
        counts = Counter(makes.values())
        fewest = {make: min(count, FOLDED) for make, count in counts.items()}
        with _only(model, makes, fewest):
            total = _run(model, plan, batch)
        sums = list(total)
        for make, count in counts.items():
            if count > FOLDED:
                with _only(model, makes, fewest | {make: FOLDED + 1}):
                    more = _run(model, plan, batch)
                # Each pass has its own rise: autocast keeps copies of what trains until the forward ends.
                rises = (after - before for after, before in zip(more, total, strict=True))
                sums = [size + (count - FOLDED) * rise for size, rise in zip(sums, rises, strict=True)]
        return Activations(*sums)


def _makes(model: nn.Module, plan: Plan) -> dict[str, Hashable]:
    """The make of each layer that is a unit and an item of a list, by name."""
    from torch import nn

    homes = {home for home, _ in (*(plan.units or ()), *plan.resident) if home}
    found: dict[str, Hashable] = {}
    for name, module in model.named_modules():
        inside = [f"{name}.{key}" for key in module._modules] if isinstance(module, nn.ModuleList) else []
        if inside and homes.issuperset(inside):
            listed = [value for config in _configs(model) for value in _listed(config, len(inside)).values()]
            for place, (key, child) in enumerate(zip(inside, module, strict=True)):
                found[key] = (name, *(str(value[place]) for value in listed), *_make(child))
    return found


def _make(layer: nn.Module) -> tuple[Hashable, ...]:
    """What tells a layer from others: tensors, classes, and settings but for numbers, which may count layers."""
    tensors = [(name, tuple(item.shape), item.dtype, item.requires_grad) for name, item in layer.named_parameters()]
    settings = [
        (name, type(part), key, str(value) if isinstance(value, (str, bool)) else type(value))
        for name, part in layer.named_modules()
        for key, value in sorted(vars(part).items())
        if value is None or isinstance(value, (str, bool, int, float))
    ]
    return (*tensors, *settings)


def _listed(config: object, layers: int) -> dict[str, Any]:
    """Settings of a configuration that have an entry for each layer, such as layer_types."""
    values = vars(config)
    return {key: value for key, value in values.items() if isinstance(value, (list, tuple)) and len(value) == layers}


@contextlib.contextmanager
def _only(model: nn.Module, makes: dict[str, Hashable], wanted: dict[Hashable, int]) -> Iterator[None]:
    """A model with as many layers of each make as are wanted, the first ones."""
    left = dict(wanted)
    kept = set()
    for name, make in makes.items():
        if left[make] > 0:
            left[make] -= 1
            kept.add(name)
    lists = {name.rpartition(".")[0] for name in makes}
    with contextlib.ExitStack() as stack:
        for name in lists:
            layers: Any = model.get_submodule(name)
            places = [place for place, key in enumerate(layers._modules) if f"{name}.{key}" in kept]
            for config in _configs(model):
                listed = _listed(config, len(layers))
                cut = {key: [value[place] for place in places] for key, value in listed.items()}
                stack.enter_context(shadowed(config, **cut))
        for name in lists:
            layers = model.get_submodule(name)
            some = {key: child for key, child in layers._modules.items() if f"{name}.{key}" in kept}
            fewer = {str(place): child for place, child in enumerate(some.values())}
            stack.enter_context(shadowed(layers, _modules=fewer))
        yield


def _configs(model: nn.Module) -> list[Any]:
    configs = [config for config in (getattr(module, "config", None) for module in model.modules()) if config]
    return list({id(config): config for config in configs if hasattr(config, "__dict__")}.values())


@contextlib.contextmanager
def _checkpointed(model: Any, checkpointing: bool) -> Iterator[None]:
    """Layers that are recomputed, as accelerate's wrapper has it for FSDP."""
    if not checkpointing:
        yield
        return
    # until transformers 5.23
    new = hasattr(model, "activation_checkpointing_enable")
    prefix = "activation" if new else "gradient"
    getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False, "preserve_rng_state": False})
    try:
        yield
    finally:
        getattr(model, f"{prefix}_checkpointing_disable")()


@contextlib.contextmanager
def _casting(model: nn.Module) -> Iterator[None]:
    """VeRA's projections cast once for all layers, as a planned run has it."""
    copies: dict[Hashable, torch.Tensor] = {}

    def corner(tensor: torch.Tensor, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        # That of `casts` asks tensors for their addresses, which those without data have not.
        part, dtype = tensor[: shape[0], : shape[1]], casts.autocast_dtype(device.type)
        if dtype is None or part.dtype == dtype or tensor.requires_grad:
            return part
        return copies.setdefault((id(tensor), shape), part.to(dtype))

    handles = []
    for module in model.modules():
        if {"vera_A", "vera_B"} <= module._modules.keys() or {"pvera_A", "pvera_B"} <= module._modules.keys():
            handles.append(module.register_forward_pre_hook(casts.show))
            handles.append(module.register_forward_hook(casts.hide, always_call=True))
    try:
        with shadowed(casts, corner=corner):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, plan: Plan, batch: Batch) -> Activations:
    import torch

    was_training = model.training
    model.train()
    with fakes.fake_tensors(allow_real=True), contextlib.ExitStack() as stack:
        for owner, replaced in _as_with_data():
            stack.enter_context(shadowed(owner, **replaced))
        counting, count = _counting()
        stack.enter_context(_filled(model, plan, count.known))
        given = inputs(model, batch)
        amp = None if plan.autocast is None else getattr(torch, plan.autocast)
        with counting, _casting(model):
            with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
                found = model(**given)
            loss = found["loss"] if "loss" in found else found[0].float().mean()
            del found
            kept, forward = count.now, count.peak
            count.peak = kept
            loss.backward()
    model.train(was_training)
    return Activations(kept, forward, count.peak)


def _as_with_data() -> Iterator[tuple[Any, dict[str, Callable[..., Any]]]]:
    """What has transformers go the way of a training step; releases that lack a function have no other way."""
    import torch
    from transformers.utils import import_utils

    if hasattr(import_utils, "is_fake_tensor"):
        # It makes masks of fake tensors that it makes of no others.
        yield import_utils, {"is_fake_tensor": lambda tensor: False}
    try:
        from transformers.integrations import moe
    except ImportError:
        return
    if hasattr(moe, "_can_use_grouped_mm"):
        # torch has the shapes of this product for bf16 alone. The other way keeps the same for the backward pass.
        yield moe, {"_can_use_grouped_mm": lambda values, weight, offsets: weight.dtype is torch.bfloat16}
    # until transformers 5.23
    if hasattr(moe, "_grouped_mm_fallback") and not hasattr(moe, "_grouped_mm_fallback_bwd"):
        yield moe, {"_grouped_mm": fakes.grouped(moe._grouped_mm)}


@contextlib.contextmanager
def _filled(model: nn.Module, plan: Plan, known: set[int]) -> Iterator[None]:
    """Fake tensors in the place of all of the model's, in the dtypes in which they compute."""
    import torch

    placements = {item.tensor.name: item for item in plan.placements}
    replaced = []

    def forget(tensor: torch.Tensor) -> None:
        tensor.grad = None

    try:
        for slots in inventory.take(model).shared():
            old, parameter = slots[0].tensor, slots[0].kind == "parameter"
            dtype = old.dtype
            planned = placements.get(slots[0].name)
            # The tensors of packed layers are not in the plan.
            sharded = not old.requires_grad if planned is None else planned.placement == SHARD
            if parameter and dtype.is_floating_point and sharded and plan.param_dtype:
                dtype = getattr(torch, plan.param_dtype)
            new: torch.Tensor = torch.empty(old.shape, dtype=dtype, device="cpu")
            if parameter:
                new = torch.nn.Parameter(new, old.requires_grad)
                if old.requires_grad:
                    new.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call, unused-ignore]
            known.add(new.untyped_storage()._cdata)
            for slot in slots:
                replaced.append((slot, old))
                slot.holder[slot.key] = new
        yield
    finally:
        for slot, old in replaced:
            slot.holder[slot.key] = old


def inputs(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass that has a loss.

    Args:
        model: with or without an adapter.
        batch: of one rank.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, config, shape = type(base).__name__, base.config, (batch.rows, batch.length)
    name = getattr(base, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        given = {name: torch.zeros((batch.rows, config.num_channels, *size))}
    else:
        given = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    words = ("CausalLM", "ConditionalGeneration", "LMHead", "MaskedLM", "TokenClassification")
    if any(word in kind for word in words):
        given["labels"] = torch.zeros(shape, dtype=torch.int64)
    elif "Classification" in kind:
        given["labels"] = torch.zeros(batch.rows, dtype=torch.int64)
    elif "QuestionAnswering" in kind:
        given |= {f"{side}_positions": torch.zeros(batch.rows, dtype=torch.int64) for side in ("start", "end")}
    return given


class _Count:
    """Bytes alive now, and the most so far; `known` are storages that count no more."""

    def __init__(self) -> None:
        self.now, self.peak = 0, 0
        self.known: set[int] = set()

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = storage.nbytes()
            self.known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, storage._cdata, size)

    def _end(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _counting() -> tuple[contextlib.AbstractContextManager[object], _Count]:
    """A context that counts what operations make, and its count."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    count = _Count()

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
                # Models ask whether a mask has padding, and whether rows are packed. None has, and none are.
                return True
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor):
                    count.see(tensor)
            return made

    return Counting(), count  # type: ignore[no-untyped-call, unused-ignore]
