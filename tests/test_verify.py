"""`verify` and `repair` on adapters that were lost in every way that has been reported, and on hostile files."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import checkpoints
import pytest
import torch
from cells import METHODS, Bench, Setup
from safetensors.torch import load_file, save_file

from trainer_fsdp_patch import cli
from trainer_fsdp_patch.errors import AdapterError, TrainerFsdpPatchWarning
from trainer_fsdp_patch.files import reading, repair, verify
from trainer_fsdp_patch.saving import adapter_state

LAYERS = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Path:
    """A LoRA run with checkpoints, as the patches leave it."""
    run = checkpoints.Scene(bench).run(checkpoints.train, Setup("good", fsdp=1, save_steps=1), patched=True)
    assert checkpoints.failure(run) == ""
    return Path(run[0].folder)


@pytest.fixture
def good(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "good"))


def faults(folder: Path) -> list[str]:
    return [item.fault for item in verify.verify_path(folder)]


def change(folder: Path, function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    tensors = load_file(folder / reading.SAFE)
    save_file({key: item.contiguous() for key, item in function(tensors).items()}, folder / reading.SAFE)


def test_what_the_patches_write_is_alive(good: Path) -> None:
    for path in (good, good / reading.SAFE, good / "checkpoint-1"):
        assert verify.verify_path(path) == []


@pytest.mark.parametrize("method", ["vera", "randlora", "dora", "vblora"])
def test_other_methods_are_alive(bench: Bench, method: str) -> None:
    from cells import has

    if not has(method):
        pytest.skip(f"this peft has no {method}")
    run = checkpoints.Scene(bench).run(checkpoints.train, Setup("f1", fsdp=1), patched=True, configure=METHODS[method])
    assert checkpoints.failure(run) == ""
    assert verify.verify_path(Path(run[0].folder)) == []


def test_wrapper_names_are_mended(good: Path, tmp_path: Path) -> None:
    """https://github.com/axolotl-ai-cloud/axolotl/issues/3294"""
    whole = load_file(good / reading.SAFE)
    for wrapper in ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"):
        spoilt = Path(shutil.copytree(good, tmp_path / wrapper))
        change(
            spoilt, lambda tensors, w=wrapper: {k.replace(".layers.0", f".layers.0.{w}"): v for k, v in tensors.items()}
        )
        [finding] = [item for item in verify.verify_path(spoilt) if item.fault == "wrapper-names"]
        assert finding.repairable
        done, left = repair.repair_path(spoilt, tmp_path / f"{wrapper} mended")
        assert left == []
        assert "4 keys have lost" in done[0]
        mended = load_file(tmp_path / f"{wrapper} mended" / reading.SAFE)
        assert mended.keys() == whole.keys()
        assert all(mended[key].equal(whole[key]) for key in whole)


def test_two_keys_that_would_become_one(good: Path, tmp_path: Path) -> None:
    change(good, lambda tensors: tensors | {f"_orig_mod.{k}": v + 1 for k, v in tensors.items()})
    with pytest.raises(AdapterError, match="two keys of the file name this tensor"):
        repair.repair_path(good, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_an_adapter_that_only_the_checkpoint_has(bench: Bench, tmp_path: Path, sharded: bool) -> None:
    """https://github.com/huggingface/transformers/issues/30491"""
    setup = Setup("only", fsdp=1, save_steps=3, sharded_checkpoint=sharded)
    run = checkpoints.Scene(bench).run(checkpoints.train, setup, patched=True)
    whole = load_file(Path(run[0].folder) / reading.SAFE)
    lost = Path(shutil.copytree(Path(run[0].folder) / "checkpoint-3", tmp_path / "checkpoint-3"))
    shutil.move(lost / reading.CONFIG, tmp_path / reading.CONFIG)
    (lost / reading.SAFE).unlink()
    assert faults(lost) == ["missing"]
    _, left = repair.repair_path(lost, tmp_path / "without")
    assert [item.fault for item in left] == ["no-config"]
    _, left = repair.repair_path(lost, tmp_path / "with", tmp_path / reading.CONFIG)
    assert left == []
    mended = load_file(tmp_path / "with" / reading.SAFE)
    assert mended.keys() == whole.keys()
    assert all(mended[key].equal(whole[key]) for key in whole)


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no tensor": (lambda tensors: {}, "empty"),
    "one layer has no lora_B": (
        lambda tensors: {k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in k},
        "partial",
    ),
    "nothing that LoRA trains": (lambda tensors: {f"{LAYERS}.0.mlp.weight": torch.ones(2, 2)}, "partial"),
    "an empty shard": (
        lambda tensors: {k: v[:0] if "layers.0.self_attn.q_proj.lora_A" in k else v for k, v in tensors.items()},
        "no-element",
    ),
    "NaN": (lambda tensors: {k: v / 0 * 0 if "lora_B" in k else v for k, v in tensors.items()}, "not-finite"),
    "zero": (lambda tensors: {k: v * 0 if "q_proj.lora_B" in k else v for k, v in tensors.items()}, "zero"),
    "rank 1 of 2": (
        lambda tensors: {k: torch.cat([v[: len(v) // 2] * 0, v[len(v) // 2 :]]) for k, v in tensors.items()},
        "one-rank",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_mended(good: Path, tmp_path: Path, name: str) -> None:
    function, fault = SPOILT[name]
    change(good, function)
    assert set(faults(good)) == {fault}
    _, left = repair.repair_path(good, tmp_path / "out")
    assert {item.fault for item in left} >= {fault}
    assert all(item.fault in repair.REASONS for item in left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_projections_are_a_note(bench: Bench, tmp_path: Path, dtype: torch.dtype, capsys: Any) -> None:
    """FSDP1's mixed precision rounds them in place, and peft makes them so next to a base in bf16."""
    scene = checkpoints.Scene(bench)
    run = scene.run(checkpoints.train, Setup("f1", fsdp=1), patched=True, configure=METHODS["vera"])
    good = Path(shutil.copytree(run[0].folder, tmp_path / "good"))
    assert faults(good) == []
    change(good, lambda tensors: {k: v.bfloat16().to(dtype) if "vera_A" in k else v for k, v in tensors.items()})
    [found] = verify.verify_path(good)
    assert (found.fault, found.note) == ("rounded", True)
    assert cli.main(["verify", str(good)]) == 0
    assert "vera_A: note, every value of the projection is one of bf16" in capsys.readouterr().out
    assert cli.main(["verify", str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alive"]


def test_vera_next_to_a_base_in_bf16_is_alive(tmp_path: Path) -> None:
    from peft import VeraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model = get_peft_model(base, VeraConfig(r=8, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            parameter.data.add_(0.02)
    model.save_pretrained(tmp_path)
    assert {item.fault for item in verify.verify_path(tmp_path) if not item.note} == set()
    assert "rounded" in faults(tmp_path)


def test_truncated_and_hostile_files(good: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    whole = (good / reading.SAFE).read_bytes()
    (good / reading.SAFE).write_bytes(whole[: len(whole) // 2])
    assert faults(good) == ["unreadable"]
    (good / reading.SAFE).unlink()
    for write in (torch.save, lambda item, path: path.write_bytes(pickle.dumps(item))):
        write(Hostile(), good / reading.PICKLED)
        assert faults(good) == ["unreadable"]
    index = good / reading.FSDP_SHARDED / ".metadata"
    index.parent.mkdir()
    index.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(AdapterError, match="which no checkpoint needs"):
        reading.fsdp_part(good)
    assert not (tmp_path / "executed").exists()
    (good / reading.PICKLED).unlink()
    (good / reading.CONFIG).write_text('{"peft_type": ')
    assert "unreadable" in faults(good)


def test_paths_as_each_python_writes_them() -> None:
    """Python 3.13 has `pathlib._local`; others read what it has written, and it what others have."""
    for module in (b"pathlib", b"pathlib._local"):
        assert reading._Index(io.BytesIO(b"c" + module + b"\nPosixPath\n.")).load() is PosixPath


def test_a_hostile_shard_of_a_distributed_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.2 runs it, and a user's variable may have newer releases do so."""
    from torch.distributed import checkpoint

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    folder = tmp_path / "checkpoint-1" / reading.FSDP_SHARDED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"weight": torch.ones(4)}, checkpoint_id=folder, no_dist=True)
    torch.testing.assert_close(reading.fsdp_part(folder.parent), {"weight": torch.ones(4)})
    [shard] = folder.glob("*.distcp")
    torch.save(Hostile(), shard)
    index = pickle.loads((folder / ".metadata").read_bytes())
    [entry] = index.storage_data.values()
    entry.offset, entry.length = 0, shard.stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(AdapterError, match="Weights only"):
        reading.fsdp_part(folder.parent)
    assert not (tmp_path / "executed").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.mark.parametrize("sharded", [False, True])
def test_checkpoints_that_are_not_whole(bench: Bench, tmp_path: Path, sharded: bool) -> None:
    setup = Setup("whole", fsdp=1, save_steps=3, sharded_checkpoint=sharded)
    run = checkpoints.Scene(bench).run(checkpoints.train, setup, patched=True)
    whole = Path(run[0].folder) / "checkpoint-3"
    assert verify.verify_path(whole) == []
    names = [item.name for item in whole.iterdir()]
    optional = {"README.md", "training_args.bin", "rng_state_1.pth", "tokenizer.json"}
    assert len(set(names) - optional) == 7
    for name in set(names) - optional:
        spoilt = Path(shutil.copytree(whole, tmp_path / name / "checkpoint-3"))
        (shutil.rmtree if (spoilt / name).is_dir() else Path.unlink)(spoilt / name)
        assert faults(spoilt), name
    for name in ("scheduler.pt", "rng_state_1.pth", "trainer_state.json", reading.SAFE):
        spoilt = Path(shutil.copytree(whole, tmp_path / f"{name} cut" / "checkpoint-3"))
        (spoilt / name).write_bytes((spoilt / name).read_bytes()[:-40])
        assert faults(spoilt), name


def test_files_of_the_users_own_are_left_alone(good: Path) -> None:
    for name in ("vocabulary.bin", "notes.pt", "other.safetensors"):
        (good / "checkpoint-1" / name).write_bytes(b"mine")
    assert verify.verify_path(good) == []


def test_the_part_that_is_resumed_from_lacks_tensors(good: Path) -> None:
    """https://github.com/huggingface/accelerate/pull/4206"""
    folder = good / "checkpoint-1"
    found = reading.read_tensors(folder / reading.FSDP_FULL)
    torch.save({k: v for k, v in found.items() if "layers.1" not in k}, folder / reading.FSDP_FULL)
    [finding] = verify.verify_path(folder)
    assert finding.fault == "incomplete"
    assert "lacks 4 tensors" in finding.text


def test_the_commands(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(good)]) == 0
    assert "alive" in capsys.readouterr().out
    change(good, lambda tensors: {f"_orig_mod.{k}": v for k, v in tensors.items()})
    assert cli.main(["verify", str(good), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["alive"] is False
    assert [item["fault"] for item in result["findings"]] == ["wrapper-names"]
    assert cli.main(["repair", str(good), "--out", str(tmp_path / "out")]) == 0
    assert "8 keys have lost the names of wrappers" in capsys.readouterr().out
    assert cli.main(["repair", str(good), "--out", str(tmp_path / "out")]) == 2
    assert "holds an adapter" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_merged_in_a_fresh_process(bench: Bench, trained: Path) -> None:
    """README's way from the saved adapter to a merged model gives the logits of the adapter of one process."""
    one = checkpoints.Scene(bench).one(checkpoints.train, Setup("good", fsdp=1))

    def merged(folder: str, rank: int) -> checkpoints.Outcome:
        from peft import PeftModel

        base = checkpoints.trial.load_base(bench.base, Setup("merge"))
        model = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
        with torch.no_grad():
            return checkpoints.Outcome(extra={"logits": model(torch.arange(12)[None]).logits, "names": str(model)})

    ours, theirs, none = (
        checkpoints.forks.launch(merged, folder, ranks=1)[0]
        for folder in (str(trained), one.folder, f"{one.folder}/init")
    )
    assert not ours.error, ours.extra
    assert "lora" not in ours.extra["names"]
    update = (theirs.extra["logits"] - none.extra["logits"]).norm()
    assert (ours.extra["logits"] - theirs.extra["logits"]).norm() / update < 1e-3


def test_a_save_says_where_it_holds_one_ranks_rows() -> None:
    """Files of a run that began with one rank's shard equal the live adapter, and are as dead as it was."""
    weight = torch.zeros(8, 4)
    weight[4:] = 1.0
    with pytest.warns(TrainerFsdpPatchWarning, match="rows of rank 1 of 2 only"):
        adapter_state.warn_of_shards({"layers.0.lora_B.weight": weight, "layers.1.lora_B.weight": torch.ones(8, 4)})
