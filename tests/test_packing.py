"""Packed layers: every bit as it was in forward and backward, and nobody reads what FSDP has freed."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import keeper
import pytest
import torch
from faults import FLAVOURS
from keeper import Block, Head, Keeper
from torch import nn

import trainer_fsdp_patch
from trainer_fsdp_patch.errors import AdapterError, PlanError
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.inspecting.leaves import leaves
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing import choosing, planned, state_dict
from trainer_fsdp_patch.packing.packed import Packed, packed_layers, packed_of
from trainer_fsdp_patch.planning.plan import Plan, make_plan
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

CPU = torch.device("cpu")


def packed(layer: nn.Module, dtype: str = "bfloat16") -> Packed:
    """Pack a layer alone in a model, as a plan would."""
    model = nn.Sequential(layer)
    [candidate] = choosing.candidates(inventory.take(model), ())
    choosing.pack_layers(inventory.take(model), {candidate.name: (candidate.nbytes, dtype)}, CPU)
    record = packed_of(layer)
    assert record is not None
    return record


def stored(layer: nn.Module) -> torch.Tensor:
    return layer._parameters[PACKED].detach().clone().view(torch.uint8)  # type: ignore[union-attr]


def quantized(kind: str) -> nn.Module:
    """A layer of a quantizer as it is loaded."""
    from bitsandbytes import nn as bits

    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    if kind == "8bit":
        layer = bits.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bits.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")
    if kind.startswith("4bit"):
        layer = bits.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=kind.endswith("double"))
        layer.weight = bits.Params4bit(
            plain.weight.data.clone(), requires_grad=False, compress_statistics=kind.endswith("double")
        )
        return layer.to("cpu")
    return OTHERS[kind](plain)


def _torchao(plain: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(plain, Int8WeightOnlyConfig())
    return plain.requires_grad_(False)


def _quanto(plain: nn.Linear) -> nn.Module:
    from optimum import quanto

    layer = quanto.QLinear.from_module(plain, weights=quanto.qint8)
    layer.freeze()
    return layer.requires_grad_(False)


def _replaced(name: str, plain: nn.Linear) -> nn.Module:
    import quantizers

    return quantizers.REPLACED[name](plain)


OTHERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao": _torchao,
    "quanto": _quanto,
    "hqq": functools.partial(_replaced, "hqq"),
    "gptq": functools.partial(_replaced, "gptq"),
}
KINDS = ["4bit", "4bit-double", "8bit", *OTHERS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_same_and_saves_the_same(kind: str) -> None:
    layer = quantized(kind)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    wanted = layer(x)
    wanted.sum().backward()
    gradient, x.grad = x.grad, None
    before = {key: copy.deepcopy(value) for key, value in layer.state_dict().items()}
    record = packed(layer)
    full = stored(layer)
    for _ in range(3):
        # FSDP frees its storage and fills it again: views that were made once read what is there now.
        size = full.untyped_storage().nbytes()
        held = full.clone()
        full.untyped_storage().resize_(0)
        full.untyped_storage().resize_(size)
        full.copy_(held)
        record.show(full)
        output = layer(x)
        assert torch.equal(output, wanted)
        output.sum().backward()
        record.hide()
        assert torch.equal(x.grad, gradient)  # type: ignore[arg-type]
        x.grad = None
    saved = state_dict.as_saved(nn.Sequential(layer), {f"0.{PACKED}": stored(layer), "other": x})
    assert list(saved) == [*(f"0.{key}" for key in before), "other"]
    for key, value in before.items():
        assert same(saved[f"0.{key}"], value), key
    assert set(layer.state_dict()) - set(before) == {PACKED}
    assert not any(key in layer.state_dict() for key in record.moved)


def test_a_full_state_dict_keeps_no_bytes() -> None:
    """Of all layers, on rank 0, until the next forward: a full base."""
    layer = quantized("4bit")
    packed(layer)
    bytes_of = stored(layer).numpy().copy()
    freed = weakref.ref(bytes_of)
    saved = state_dict.as_saved(nn.Sequential(layer), {f"0.{PACKED}": torch.from_numpy(bytes_of)})
    assert "0.weight.absmax" in saved
    del bytes_of
    gc.collect()
    assert freed() is None


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    return bool(
        torch.equal(
            one.dequantize() if inventory.inner_names(one) else one,
            other.dequantize() if inventory.inner_names(other) else other,
        )
    )


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "clone": torch.clone,
    "detach": torch.Tensor.detach,
    "data": lambda tensor: tensor.data,
    "to": lambda tensor: tensor.to("cpu"),
    "item": lambda tensor: tensor[0],
    "numpy": lambda tensor: tensor.numpy(),
    "list": lambda tensor: tensor.tolist(),
    "pointer": lambda tensor: tensor.data_ptr(),
    "storage": lambda tensor: tensor.untyped_storage(),
    "cat": lambda tensor: torch.cat([tensor, tensor]),
    "plus": lambda tensor: tensor + 1,
    "copy": lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda tensor: tensor.__reduce_ex__(2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_reads_a_hidden_tensor_gets_an_error(kind: str) -> None:
    layer = quantized(kind)
    packed(layer)
    hidden = [leaf for leaf in leaves(layer) if leaf.tensor.is_meta]
    assert hidden
    for leaf in hidden:
        assert leaf.tensor.device == torch.device("cpu")
        assert leaf.tensor.numel() > 0
        assert "sharded by FSDP" in repr(leaf.tensor)
        for name, read in READS.items():
            with pytest.raises(AdapterError, match=r"^0\..*while FSDP has the layer sharded"):
                pytest.fail(f"{name} of {leaf.path} gave {read(leaf.tensor)}")
    with pytest.raises(AdapterError, match="while FSDP has the layer sharded"):
        layer(torch.randn(3, 64, dtype=torch.bfloat16))


def test_a_tensor_that_was_kept_is_found_and_a_view_of_it_is_a_copy() -> None:
    """A second reference is found in any forward, and a new view in the first, where quantizers make theirs."""
    layer = Keeper(0)
    record = packed(layer)
    for turn in range(5):
        full = stored(layer)
        record.show(full)
        # Another attribute each time: what was found once is looked at in every turn.
        setattr(layer, f"kept_{turn}", layer.state.scales)
        if not turn:
            layer.view = layer.codes.data[5:9]
            expected = layer.view.clone()
        record.hide()
        full.fill_(7)
        with pytest.raises(AdapterError):
            getattr(layer, f"kept_{turn}").sum()
        assert torch.equal(layer.view, expected)
        assert layer.codes.shape == (1001,)


def test_a_parameter_that_somebody_kept_is_empty() -> None:
    layer = quantized("4bit")
    weight = layer.weight
    record = packed(layer)
    assert weight.numel() == 0  # type: ignore[operator]
    record.show(stored(layer))
    assert layer.weight is weight
    assert weight.numel() == 2048  # type: ignore[operator]


def test_a_layer_that_gives_a_tensor_other_memory_is_refused() -> None:
    """As AQLM's do on a CPU: what is computed there once would not be there in the next forward."""
    layer = Keeper(0)
    record = packed(layer)
    record.show(stored(layer))
    layer.codes.data = layer.codes.data.flip(0)
    with pytest.raises(AdapterError, match=r"^0\.codes: the layer has given it other memory in a forward\. "):
        record.hide()


def test_a_parameter_of_numbers_moves_whatever_its_size() -> None:
    """FSDP would cast a scale, and takes no scalar; FP8 layers have one for each tensor."""
    layer = Keeper(0)
    layer.scale = nn.Parameter(torch.tensor(1 / 3), requires_grad=False)
    layer.few = nn.Parameter(torch.arange(3), requires_grad=False)
    record = packed(layer)
    assert record.moved["scale"] == "parameter"
    assert set(layer._parameters) == {PACKED, "few"}
    record.show(stored(layer))
    assert layer.scale.shape == ()
    assert float(layer.scale) == float(torch.tensor(1 / 3))


def test_a_tensor_with_two_names_in_a_layer_moves_and_one_of_two_layers_stays() -> None:
    """peft gives the codes of AQLM's layers the name `qweight` too."""
    first, second = Keeper(0), Keeper(1)
    first.again = first.codes
    model = nn.Sequential(first, second)
    found = choosing.candidates(inventory.take(model), ())
    assert [item.name for item in found] == ["0", "1"]
    assert {"0.codes", "0.again"} <= found[0].names
    second.codes = first.codes
    assert not any("codes" in name for item in choosing.candidates(inventory.take(model), ()) for name in item.names)
    record = packed(first)
    record.show(stored(first))
    assert first.again is first.codes
    record.hide()
    assert first.again is first.codes


@pytest.mark.parametrize(("plain", "hooked"), [(True, True), (True, False), (False, True)])
def test_a_layer_that_a_hook_is_to_rebuild_is_refused(plain: bool, hooked: bool) -> None:
    """A torch layer with codes for a weight, below a hook before a forward; without either nobody rebuilds it."""
    layer: nn.Module = nn.Linear(64, 64, bias=False).requires_grad_(False) if plain else Keeper(0)
    if plain:
        layer.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(nn.Linear(64, 64).requires_grad_(False), nn.Sequential(layer))
    if hooked:
        model.register_forward_pre_hook(lambda module, args: None)
    if not (plain and hooked):
        assert plan_of(model).placements
        return
    with pytest.raises(PlanError, match=r"^1\.0: a torch Linear that keeps int8, for a hook to rebuild it"):
        plan_of(model)


def plan_of(model: nn.Module) -> Plan:
    return make_plan(model, units=["Sequential"], ranks=2)


def test_tables_that_layers_share_and_small_tensors_stay() -> None:
    first, second = Keeper(0), Keeper(1)
    table = torch.rand(500)
    first.state.more["shared"] = second.state.more["shared"] = table
    model = nn.Sequential(first, second)
    found = choosing.candidates(inventory.take(model), ())
    choosing.pack_layers(inventory.take(model), {item.name: (item.nbytes, "float32") for item in found}, CPU)
    assert [item.name for item in packed_layers(model)] == ["0", "1"]
    assert first.state.more["shared"] is table
    assert float(first.state.more["few"].sum()) == 3


def test_another_layer_than_the_planned_one_is_refused_before_anything_is_packed() -> None:
    model = nn.Sequential(Keeper(0), Keeper(1))
    taken = inventory.take(model)
    nbytes = choosing.candidates(taken, ())[0].nbytes
    with pytest.raises(AdapterError, match="quantized bytes where 5 were planned"):
        choosing.pack_layers(taken, {"0": (nbytes, "float32"), "1": (5, "float32")}, CPU)
    assert packed_layers(model) == []


def test_what_a_user_ignores_and_what_is_trained_is_not_packed() -> None:
    model = nn.Sequential(Keeper(0), Keeper(1), nn.Embedding(9, 9))
    model[2].register_buffer("positions", torch.arange(4096))
    found = choosing.candidates(inventory.take(model), {"0.codes"})
    assert [item.name for item in found] == ["1"]
    model[1].more = nn.Parameter(torch.ones(3))
    assert choosing.candidates(inventory.take(model), {"0.codes"}) == []


@pytest.mark.parametrize("param_dtype", [None, "bfloat16"])
def test_one_dtype_a_unit_where_fsdp2_takes_no_more(monkeypatch: pytest.MonkeyPatch, param_dtype: str | None) -> None:
    """FSDP2 before torch 2.8, which no CPU runs: bytes that travel as bf16 cannot join a unit of fp32."""
    trainer_fsdp_patch.patch()
    taken = inventory.take(nn.Sequential(nn.Linear(16, 16).requires_grad_(False), Keeper(0)))
    asked = planned.Asked(2, param_dtype, 2, set(), lambda name: "")
    for old in (False, True):
        monkeypatch.setattr(planned.versions, "at_least", lambda *_, old=old: not old)
        tensors, originals = planned.with_packed(taken.tensors(), taken, asked, lambda _: {})
        packed = [item.name for item in tensors if planned.is_packed(item)]
        assert packed == list(originals) == ([] if old and param_dtype else ["1.packed_bytes"])


WAYS = ["plain", "low", "half", "reentrant", "recomputed", "kept", "compiled", "one"]


def keeps_its_bits(way: str, fsdp: int, use_orig_params: bool, packed_in: str, rank: int) -> Outcome:
    """Three steps and an evaluation of two units whose quantizer compares its bytes, by hand under FSDP."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainer_fsdp_patch.patch()
    low = {"low": torch.bfloat16, "half": torch.float16}.get(way)
    main = torch.float32 if packed_in else low or torch.float32
    model = nn.Sequential(nn.Linear(16, 16), *(Block(index, main) for index in range(2)), Head(16, 16))
    torch.manual_seed(0)
    names = [item.name for item in choosing.candidates(inventory.take(model), ())]
    sizes = {item.name: item.nbytes for item in choosing.candidates(inventory.take(model), ())}
    kind = packed_in or str(main).removeprefix("torch.")
    choosing.pack_layers(inventory.take(model), {name: (sizes[name], kind) for name in names}, CPU)
    wrapped = _wrap(model, way, fsdp, use_orig_params, low)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    if way == "compiled":
        wrapped = torch.compile(wrapped, backend="eager")
    for _ in range(3):
        wrapped(torch.randn(2, 16)).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.eval()
    with torch.no_grad():
        wrapped(torch.randn(2, 16))
    hidden = [leaf.path for item in packed_layers(model) for leaf in leaves(item.layer) if leaf.tensor.is_meta]
    dist.destroy_process_group()
    return Outcome(extra={"found": sorted(set(keeper.FOUND)), "runs": keeper.RUNS, "hidden": hidden})


def _wrap(model: nn.Module, way: str, fsdp: int, use_orig_params: bool, low: torch.dtype | None) -> nn.Module:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

    if way in ("reentrant", "recomputed"):
        how = wrapping.CheckpointImpl.REENTRANT if way == "reentrant" else wrapping.CheckpointImpl.NO_REENTRANT
        for index in (1, 2):
            model[index] = wrapping.checkpoint_wrapper(model[index], checkpoint_impl=how)  # type: ignore[index, operator]
    if fsdp == 2:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for index in (1, 2):
            inside = getattr(model[index], "_checkpoint_wrapped_module", model[index])  # type: ignore[index]
            policy = MixedPrecisionPolicy(param_dtype=low, output_dtype=torch.float32)
            fully_shard(inside, mp_policy=policy, reshard_after_forward=way != "kept")
        return model
    strategy = {"kept": ShardingStrategy.SHARD_GRAD_OP, "one": ShardingStrategy.NO_SHARD}.get(way)
    for index in (1, 2):
        model[index] = FullyShardedDataParallel(  # type: ignore[index, operator]
            model[index],  # type: ignore[index]
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            sharding_strategy=strategy,
            mixed_precision=MixedPrecision(param_dtype=low, cast_forward_inputs=True) if low else None,
        )
    return model


CASES = [
    *((way, 1, flag) for way in WAYS for flag in (True, False)),
    *((way, 2, True) for way in WAYS if way != "one"),
]


@pytest.mark.parametrize(("way", "fsdp", "flag"), [case for case in CASES if case[1] in FLAVOURS])
def test_every_bit_is_kept(way: str, fsdp: int, flag: bool) -> None:
    """Every pattern of 16 bits, in forward, backward, recomputation and evaluation."""
    for outcome in forks.launch(keeps_its_bits, way, fsdp, flag, "", ranks=2):
        assert outcome.error == "", outcome.extra
        assert outcome.extra["found"] == []
        recomputed = way in ("reentrant", "recomputed")
        assert outcome.extra["runs"].count("backward") == 6  # type: ignore[attr-defined]
        assert outcome.extra["runs"].count("forward") == (14 if recomputed else 8)  # type: ignore[attr-defined]
        assert len(outcome.extra["hidden"]) == 12 or way in ("kept", "one")  # type: ignore[arg-type]


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_cast_is_seen(fsdp: int) -> None:
    """The test above finds what it is for: bytes that are stored as fp32 under param_dtype bf16 are cast."""
    for outcome in forks.launch(keeps_its_bits, "low", fsdp, True, "float32", ranks=2):
        assert "FSDP has gathered 132200 of its 264400 quantized bytes" in outcome.error
