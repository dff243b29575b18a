"""An adapter that a script takes past the Trainer's save: on one rank, or from a state dict that it made itself.

https://github.com/huggingface/peft/issues/286, https://github.com/huggingface/peft/issues/845; FastChat, LLaVA and Qwen
filter `named_parameters()` and hand what is left to `trainer._save`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, has, reference_of, trial
from faults import FLAVOURS, added, takes_adapters
from safetensors.torch import load_file, save_file

from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.testing import forks, releases
from trainer_fsdp_patch.testing.case import Outcome

SHARDS_BESIDE = releases.at_least("accelerate", "1.15.0") and releases.at_least("torch", "2.13.0")
FILE = "adapter_model.safetensors"
ALONE = ("filtered", "alone", "function", "pickled")
TOGETHER = ("everyone", "documented", "all_ranks")


def filtered(trainer: Any, folder: str) -> None:
    """FastChat's and Qwen's: the names of a wrapped model, and the Trainer's own `_save`."""
    named = dict(trainer.model_wrapped.named_parameters())
    named.update(trainer.model_wrapped.named_buffers(remove_duplicate=False))
    state = {name: tensor.detach().cpu() for name, tensor in named.items()}
    if trainer.args.should_save:
        trainer._save(folder, state_dict=state)


def alone(trainer: Any, folder: str) -> None:
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder)


def function(trainer: Any, folder: str) -> None:
    """diffusers' scripts: peft's function, and a file of one's own."""
    from peft import get_peft_model_state_dict

    if trainer.is_world_process_zero():
        found = get_peft_model_state_dict(trainer.model)
        Path(folder).mkdir()
        save_file({key: value.clone().contiguous() for key, value in found.items()}, f"{folder}/{FILE}")


def pickled(trainer: Any, folder: str) -> None:
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder, safe_serialization=False)


def everyone(trainer: Any, folder: str) -> None:
    trainer.model.save_pretrained(folder, is_main_process=trainer.is_world_process_zero())


def documented(trainer: Any, folder: str) -> None:
    """accelerate's documented save."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder, is_main_process=trainer.accelerator.is_main_process, state_dict=state)


def all_ranks(trainer: Any, folder: str) -> None:
    """The same without saying who the main process is: the others have an empty state dict and the same folder."""
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
    if trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()


def trained(method: str, setup: Setup, base: str, folder: str, *, patched: bool) -> Any:
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=patched)
    torch.manual_seed(0)
    model = METHODS[method](trial.load_base(base, setup))
    trial.nudge(model)
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    trainer.train()
    return trainer


def read(folder: Path) -> dict[str, Any]:
    if (folder / FILE).exists():
        return load_file(folder / FILE)
    return torch.load(folder / "adapter_model.bin", weights_only=True)


def saved(
    method: str, ways: tuple[str, ...], patched: bool, setup: Setup, base: str, folder: str, rank: int
) -> Outcome:
    """Each way's file beside the Trainer's: what of it is missing or differs."""
    trainer = trained(method, setup, base, folder, patched=patched)
    collectives.PATIENCE = 0.5
    if patched:
        trainer.save_model(f"{folder}/trainer")
    found: dict[str, Any] = {}
    for way in ways:
        try:
            globals()[way](trainer, f"{folder}/{way}")
        except Exception as error:
            found[way] = f"{type(error).__name__}: {error}"
        trainer.accelerator.wait_for_everyone()
        if rank == 0 and way not in found:
            ours = read(Path(folder, way))
            whole = read(Path(folder, "trainer")) if patched else ours
            wrong = [key for key in whole if key not in ours or not torch.equal(ours[key], whole[key])]
            shapes = {key: tuple(tensor.shape) for key, tensor in ours.items()}
            found[way] = sorted({*wrong, *(ours.keys() - whole.keys())}) if patched else shapes
    return Outcome(extra=found)


def launch(
    bench: Bench, folder: Path, method: str, setup: Setup, ways: tuple[str, ...], *, patched: bool = True
) -> Any:
    outcomes = forks.launch(saved, method, ways, patched, setup, bench.base, str(folder), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    return outcomes


def close_to_one_process(bench: Bench, method: str, setup: Setup, folder: Path) -> None:
    one = bench.reference(method, reference_of(setup))
    theirs, ours = read(Path(one.folder)), read(folder)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("method", ["lora", "vera", "lora_head", "two_adapters"])
def test_a_whole_adapter_needs_no_other_rank(bench: Bench, tmp_path: Path, method: str, fsdp: int) -> None:
    if not has(method):
        pytest.skip(f"this peft has no {method}")
    setup = Setup("hand", fsdp=fsdp)
    outcomes = launch(bench, tmp_path, method, setup, ALONE + TOGETHER)
    assert outcomes[0].extra == {way: [] for way in ALONE + TOGETHER}
    assert outcomes[1].extra == {}
    close_to_one_process(bench, method, setup, tmp_path / "alone")


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_stock_writes_none_of_it_from_wrapped_names(bench: Bench, tmp_path: Path, method: str) -> None:
    """40 bytes and exit code 0, one rank's parts under names that nobody loads, or an error."""
    setup = Setup("hand", fsdp=1)
    outcomes = forks.launch(saved, method, ("filtered",), False, setup, bench.base, str(tmp_path), ranks=2)
    if not outcomes[0].error and isinstance(outcomes[0].extra["filtered"], dict):
        one = read(Path(bench.reference(method, reference_of(setup)).folder))
        assert not [
            key for key, shape in outcomes[0].extra["filtered"].items() if shape == getattr(one.get(key), "shape", None)
        ]


def test_stock_waits_for_ever_on_one_rank(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gathers the whole base for the tensors of the adapter."""
    monkeypatch.setattr(forks, "TIMEOUT", 5)
    setup = Setup("hand", fsdp=1)
    outcomes = forks.launch(saved, "lora", ("alone",), False, setup, bench.base, str(tmp_path), ranks=2)
    assert all(outcome.error for outcome in outcomes)


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize(("method", "placement"), [("lora_head", "shard"), ("lora_embedding", "auto")])
def test_what_is_sharded_needs_all_ranks(bench: Bench, tmp_path: Path, method: str, placement: str, fsdp: int) -> None:
    """One rank alone is refused before it waits; all together write what the Trainer does."""
    if placement == "shard" and fsdp == 2 and not SHARDS_BESIDE:
        pytest.skip("these releases shard nothing beside replicas under FSDP2")
    setup = Setup("hand", fsdp=fsdp, placement=placement)
    outcomes = launch(bench, tmp_path, method, setup, (*ALONE[1:], *TOGETHER))
    assert outcomes[1].extra == {}
    for way in ALONE[1:]:
        assert outcomes[0].extra[way].startswith("AdapterError: save of ")
        assert "not all ranks have asked for it in 0.5 s. Nothing was written" in outcomes[0].extra[way]
        assert not (tmp_path / way / FILE).exists()
    assert {way: outcomes[0].extra[way] for way in TOGETHER} == {way: [] for way in TOGETHER}


def refusals(native: bool, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """What the main process says to state dicts without the adapter, and whether an earlier file is as it was."""
    if native:
        METHODS["native"] = added  # type: ignore[assignment]
    trainer = trained("native" if native else "lora", setup, base, folder, patched=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if rank == 0:
        model.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    before = Path(folder, FILE).read_bytes()
    of_base = {name: tensor for name, tensor in model.named_parameters() if "lora_" not in name}
    said = {}
    for name, given, options in (
        ("safetensors", of_base, {}),
        ("pickled", of_base, {"safe_serialization": False}),
        ("empty", {}, {}),
    ):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.save_pretrained(folder, state_dict=given, **options)
            said[name] = [str(item.message) for item in caught if "no tensor to write" in str(item.message)]
        except AdapterError as error:
            said[name] = str(error)
    same = Path(folder, FILE).read_bytes() == before
    return Outcome(extra={"said": said, "same": same, "bin": Path(folder, "adapter_model.bin").exists()})


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("native", [False, pytest.param(True, marks=takes_adapters)])
def test_a_file_without_tensors_is_refused(bench: Bench, tmp_path: Path, native: bool, fsdp: int) -> None:
    """On the main process; the others, which have nothing to write, leave its file alone."""
    setup = Setup("refused", fsdp=fsdp)
    outcomes = forks.launch(refusals, native, setup, bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    assert all(outcome.extra["same"] for outcome in outcomes)
    main, other = (outcome.extra["said"] for outcome in outcomes)
    if native:
        # transformers writes no file where a state dict has nothing to write.
        return
    for name in ("safetensors", "empty"):
        assert "no tensor to write" in main[name] or "has none of it" in main[name]
    assert len(other["empty"]) == 1
    assert "has none of it. A file without tensors would take the place of the adapter" in main["pickled"]


def parts(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """A head that FSDP has sharded, given as this rank's part of it."""
    trainer = trained("lora_head", setup, base, folder, patched=True)
    state = {name: tensor.detach() for name, tensor in trainer.model_wrapped.named_parameters()}
    said = ""
    try:
        if rank == 0:
            trainer._save(folder, state_dict=state)
    except AdapterError as error:
        said = str(error)
    trainer.accelerator.wait_for_everyone()
    return Outcome(extra={"said": said, "file": Path(folder, FILE).exists()})


def test_one_ranks_part_is_refused(bench: Bench, tmp_path: Path) -> None:
    setup = Setup("part", fsdp=1, placement="shard")
    outcomes = forks.launch(parts, setup, bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    refusal = "lm_head.modules_to_save.default.weight: the given state dict has the part of one rank"
    assert refusal in outcomes[0].extra["said"]
    assert not outcomes[0].extra["file"]


def replaced(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """A `state_dict` that a user has put on the model, as alpaca-lora's script does."""
    trainer = trained("lora", setup, base, folder, patched=True)
    # A name that is imported before patch() is upstream's own.
    from peft import get_peft_model_state_dict

    model = trainer.accelerator.unwrap_model(trainer.model)
    doubled = {name: 2 * tensor for name, tensor in get_peft_model_state_dict(model, adapter_name="default").items()}
    # Before peft 0.21 a name without its adapter's is not the adapter's.
    own = {name.replace(".weight", ".default.weight"): tensor for name, tensor in doubled.items()}
    model.state_dict = lambda *args, **kwargs: dict(own)
    found = get_peft_model_state_dict(model)
    return Outcome(extra={"same": [torch.equal(found[name], tensor) for name, tensor in doubled.items()]})


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_state_dict_of_the_users_own_is_asked(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """https://github.com/huggingface/peft/issues/970"""
    outcomes = forks.launch(replaced, Setup("own", fsdp=fsdp), bench.base, str(tmp_path), ranks=2)
    for outcome in outcomes:
        assert outcome.error == "", outcome.extra
        assert outcome.extra["same"] == [True] * 8
