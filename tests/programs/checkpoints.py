"""What becomes of an adapter when it is saved, resumed, evaluated, generated with, and when a rank or the disk fails.

`python tests/programs/checkpoints.py` runs every scenario, stock beside patched, and prints the table; what it last
gave is tests/data/checkpoints.json. A cell is right where nothing was lost: the saved adapter equals that of one
process, a resumed run ends bit-equal to one that was not interrupted, and a fault leaves what was saved before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# As a program it finds what tests find by pytest's own path.
sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("matrix", "helpers")]

from cells import METHODS, Bench, reference_of, with_a_head

from trainer_fsdp_patch import bits, versions
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.files import reading, verify
from trainer_fsdp_patch.testing import case, forks, releases, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

Action = Callable[[Any, Path], "dict[str, Any] | None"]
Arguments = dict[str, Any]


def work(
    action: Action, extra: Arguments, setup: Setup, configure: Any, base: str, folder: str, ranks: int, patched: bool,
    rank: int,
) -> Outcome:  # fmt: skip
    """Build a Trainer in this rank, hand it to an action, and save what it leaves."""
    import torch
    from transformers import PrinterCallback

    if extra.get("torch_compile"):
        # TrainingArguments has read it already, accelerate has not.
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "EAGER"
    given = trial.enter(setup, folder, ranks, patched=patched)
    native = extra.get("native") and ranks > 1
    for name, value in extra.items():
        if name == "native":
            continue
        assert hasattr(given, name), name
        setattr(given, name, value)
    torch.manual_seed(0)
    model = configure(load_natively(base, ranks) if native else trial.load_base(base, setup))
    trial.nudge(model)
    if ranks == 1:
        model.save_pretrained(f"{folder}/init")
    size = trial.STEPS * trial.BATCH
    trainer = _trainer_class()(
        model=model, args=given, train_dataset=trial.dataset(size), eval_dataset=trial.dataset(trial.BATCH)
    )
    trainer.remove_callback(PrinterCallback)
    # Releases before 4.46 do not see labels through peft.
    trainer.label_names = ["labels"]
    found = action(trainer, Path(folder)) or {}
    if not found.pop("saved", False):
        trainer.save_model(folder)
    return Outcome(folder=folder, extra=found)


def load_natively(base: str, ranks: int) -> Any:
    """The base, sharded by transformers itself while it is loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=ranks)
    model = AutoModelForCausalLM.from_pretrained(base, distributed_config=config, attn_implementation="eager")
    model.config.use_cache = False
    return model


def _trainer_class() -> Any:
    import torch
    from transformers import Trainer

    class ScoredTrainer(Trainer):  # type: ignore[misc]
        """Scores a run the better the earlier it is, so that the best checkpoint is not the last."""

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            metrics = super().evaluate(*args, **kwargs)
            return {**metrics, "eval_earliness": -float(self.state.global_step)}

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            """With `reference`, as DPO has it: a second forward with the adapter off."""
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if getattr(self, "reference", False) and model.training:
                with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                    plain = model(**inputs)
                logits = plain["logits"] if isinstance(plain, dict) else plain.logits
                loss = loss + 0.1 * (outputs["logits"].float() - logits.float()).pow(2).mean()
            return (loss, outputs) if return_outputs else loss

    return ScoredTrainer


class LostError(Exception):
    """An adapter file is absent or empty."""


class Scene:
    """Runs of one scenario below one folder; the references of one process are kept."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.references: dict[Any, Outcome] = {}

    def run(
        self, action: Action, setup: Setup, *, patched: bool, configure: Any = METHODS["lora"], ranks: int = 2,
        folder: Path | None = None, **extra: Any,
    ) -> list[Outcome]:  # fmt: skip
        where = folder or Path(tempfile.mkdtemp(dir=self.bench.folder)) / "run"
        where.mkdir(parents=True, exist_ok=True)
        arguments = (action, extra, setup, configure, self.bench.base, str(where), ranks, patched)
        return forks.launch(work, *arguments, ranks=ranks)

    def one(self, action: Action, setup: Setup, configure: Any = METHODS["lora"], **extra: Any) -> Outcome:
        key = (action, reference_of(setup), configure, tuple(sorted(extra.items())))
        if key not in self.references:
            self.references[key] = self.run(
                action, reference_of(setup), patched=False, configure=configure, ranks=1, **extra
            )[0]
        assert not self.references[key].error, self.references[key].extra
        return self.references[key]

    def right(self, outcomes: list[Outcome], one: Outcome, setup: Setup) -> str:
        return failure(outcomes) or case.compare(outcomes[0], one, setup).error


def failure(outcomes: list[Outcome]) -> str:
    """Error of the first rank that has one of its own."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    # A rank that waited says that another has gone, and one that crashed says why.
    crashed = [error for error in errors if error.startswith("ended ")]
    return next((error for error in (*crashed, *errors) if "hung" not in error), errors[0]) if errors else ""


def stored_bits(folder: str | Path) -> dict[str, bytes]:
    """Bytes of every tensor of an adapter's folder."""
    file = reading.adapter_file(Path(folder))
    found = reading.read_tensors(file) if file else {}
    if not found:
        raise LostError("no adapter file was written" if file is None else "the adapter file is empty")
    return {key: bits.bits(tensor).numpy().tobytes() for key, tensor in found.items()}


def train(trainer: Any, folder: Path) -> None:
    trainer.train()


def resume_last(trainer: Any, folder: Path) -> dict[str, Any]:
    """Resume from the folder's last checkpoint, as users ask for it."""
    trainer.train(resume_from_checkpoint=True)
    return {"steps": trainer.state.global_step}


def resume_from(step: int) -> Action:
    def action(trainer: Any, folder: Path) -> dict[str, Any]:
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        return {"steps": trainer.state.global_step}

    return action


def compiled(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """The same below torch.compile."""
    return interrupted(scene, setup, patched=patched, torch_compile=True)


def interrupted(scene: Scene, setup: Setup, *, patched: bool, configure: Any = METHODS["lora"], **extra: Any) -> str:
    """Resume from the checkpoint of every step: each end is bit-equal to that of the run that was not interrupted."""
    writing = dataclasses.replace(setup, save_steps=1)
    whole = scene.run(train, writing, patched=patched, configure=configure, **extra)
    wrong = scene.right(whole, scene.one(train, setup, configure), setup)
    for step in range(1, trial.STEPS):
        if wrong:
            return wrong
        again = Path(f"{whole[0].folder}-from-{step}")
        shutil.copytree(Path(whole[0].folder) / f"checkpoint-{step}", again / f"checkpoint-{step}")
        resumed = scene.run(resume_from(step), setup, patched=patched, configure=configure, folder=again, **extra)
        wrong = failure(resumed)
        if not wrong and stored_bits(resumed[0].folder) != stored_bits(whole[0].folder):
            wrong = f"resumed at step {step}, it ends in other bits"
    return wrong


def other_ranks(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """Two ranks write, four resume."""
    writing = dataclasses.replace(setup, save_steps=1)
    first = scene.run(train, writing, patched=patched)
    if failure(first):
        return failure(first)
    for step in range(2, trial.STEPS + 1):
        shutil.rmtree(f"{first[0].folder}/checkpoint-{step}")
    resumed = scene.run(resume_last, setup, patched=patched, ranks=4, folder=Path(first[0].folder))
    return scene.right(resumed, scene.one(train, setup), setup)


def best_at_end(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """The best checkpoint, which is the first, is loaded at the end and saved, on all ranks."""
    extra = {
        "load_best_model_at_end": True, "metric_for_best_model": "eval_earliness", "greater_is_better": True,
        "eval_steps": 1,
    }  # fmt: skip
    writing = dataclasses.replace(setup, save_steps=1)

    def action(trainer: Any, folder: Path) -> None:
        releases.evaluate_every_step(trainer)
        trainer.train()

    outcomes = scene.run(action, writing, patched=patched, **extra)
    if failure(outcomes):
        return failure(outcomes)
    folder = Path(outcomes[0].folder)
    if stored_bits(folder) == stored_bits(folder / "checkpoint-1"):
        return ""
    return "the best checkpoint is not what was saved at the end"


def model_only(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """Checkpoints that hold nothing but the adapter: with SGD at a constant rate there is nothing else to lose."""
    setup = dataclasses.replace(setup, optim="sgd")
    extra = {"save_only_model": True, "lr_scheduler_type": "constant"}
    first = scene.run(train, dataclasses.replace(setup, save_steps=2), patched=patched, **extra)
    if failure(first):
        return failure(first)
    folder = Path(f"{first[0].folder}-again")
    shutil.copytree(Path(first[0].folder) / "checkpoint-2", folder / "checkpoint-2")
    resumed = scene.run(resume_last, setup, patched=patched, folder=folder, **extra)
    wrong = failure(resumed)
    return wrong or ("" if stored_bits(folder) == stored_bits(first[0].folder) else "resumed, it ends in other bits")


def evaluated(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """evaluate() and predict() before, during and after train(), each loss that of one process."""

    def action(trainer: Any, folder: Path) -> dict[str, Any]:
        losses = [trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).metrics["test_loss"]]
        releases.evaluate_every_step(trainer)
        trainer.train()
        losses += [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        losses += [trainer.evaluate()["eval_loss"]]
        return {"losses": losses}

    one = scene.one(action, setup)
    outcomes = scene.run(action, setup, patched=patched)
    wrong = scene.right(outcomes, one, setup)
    pairs = [] if wrong else list(zip(outcomes[0].extra["losses"], one.extra["losses"], strict=True))
    # From 4.46 to 4.49 a Trainer multiplies them by the number of ranks, under DDP too.
    factor = 1 if versions.at_least("transformers", "4.50.0") or not releases.normalises_over_ranks() else 2
    off = max((abs(ours - theirs * factor) / theirs for ours, theirs in pairs), default=0.0)
    return wrong or (f"losses of evaluation are off by {off:.1e}" if off > setup.tolerance else "")


def generated(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """generate() after the first step gives what one process gives, and training goes on as if it had not been."""
    import torch
    from transformers import TrainerCallback

    class Generate(TrainerCallback):  # type: ignore[misc]
        tokens: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                model.eval()
                with torch.no_grad():
                    prompt = torch.tensor([[5, 7, 11]], device=args.device)
                    self.tokens = model.generate(
                        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
                        use_cache=False, pad_token_id=0,
                    ).tolist()  # fmt: skip
                model.train()

    def action(trainer: Any, folder: Path) -> dict[str, Any]:
        callback = Generate()
        trainer.add_callback(callback)
        trainer.train()
        return {"tokens": callback.tokens}

    one = scene.one(action, setup)
    outcomes = scene.run(action, setup, patched=patched)
    wrong = scene.right(outcomes, one, setup)
    if wrong or all(outcome.extra["tokens"] == one.extra["tokens"] for outcome in outcomes):
        return wrong
    return f"it generates {outcomes[0].extra['tokens']} instead of {one.extra['tokens']}"


def generate_unevenly(trainer: Any, folder: Path) -> dict[str, Any]:
    """Four tokens on the first rank and nine on the second, prompt included."""
    import torch

    trainer.train()
    prompt = torch.tensor([[5]], device=trainer.args.device)
    new = 8 if trainer.args.process_index else 3
    tokens = trainer.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True, pad_token_id=0,
        max_new_tokens=new, min_new_tokens=new,
    )  # fmt: skip
    return {"length": tokens.shape[1]}


def referenced(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """A loss that needs the base without its adapter, as DPO's does."""

    def action(trainer: Any, folder: Path) -> None:
        trainer.reference = True
        trainer.train()

    return scene.right(scene.run(action, setup, patched=patched), scene.one(action, setup), setup)


def saved(configure: Any) -> Callable[..., str]:
    """The saved adapter is complete and that of one process, and a fresh process loads it."""

    def scenario(scene: Scene, setup: Setup, *, patched: bool) -> str:
        outcomes = scene.run(train, setup, patched=patched, configure=configure)
        wrong = scene.right(outcomes, scene.one(train, setup, configure), setup)
        findings = [] if wrong else verify.verify_path(Path(outcomes[0].folder))
        return wrong or (findings[0].text if findings else "")

    return scenario


# Faults. Both sides get the same one: it sits in safetensors, below peft and below the patches.


def killed(when: str, rank: int = 0) -> Callable[..., str]:
    """A rank is killed at its second checkpoint; what was saved stays whole, and the run resumes from the first."""

    def scenario(scene: Scene, setup: Setup, *, patched: bool) -> str:
        writing = dataclasses.replace(setup, save_steps=1)
        whole = scene.run(train, writing, patched=patched)
        if failure(whole):
            return failure(whole)

        def action(trainer: Any, folder: Path) -> None:
            fail_the_second_write(when, rank)
            trainer.train()

        folder = Path(f"{whole[0].folder}-killed")
        shutil.copytree(whole[0].folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        before = stored_bits(folder)
        outcomes = scene.run(action, writing, patched=patched, folder=folder)
        if "hung" not in outcomes[rank].error:
            return failure(outcomes) or "the rank was not killed"
        return survived(scene, setup, folder, before, whole, patched=patched)

    return scenario


def survived(
    scene: Scene, setup: Setup, folder: Path, before: dict[str, bytes], whole: list[Outcome], *, patched: bool,
    configure: Any = METHODS["lora"],
) -> str:  # fmt: skip
    """What is left after a fault: the adapter that was there, and a checkpoint from which the run ends as it should."""
    try:
        if stored_bits(folder) != before:
            return "the adapter that was saved before is gone"
    except Exception as error:
        return f"the adapter that was saved before is gone: {str(error).splitlines()[0]}"
    resumed = scene.run(resume_last, setup, patched=patched, folder=folder, configure=configure)
    if failure(resumed):
        return f"resumed: {failure(resumed)}"
    return "" if stored_bits(folder) == stored_bits(whole[0].folder) else "resumed, it ends in other bits"


def fail_the_second_write(when: str, rank: int) -> None:
    """From here on: the second adapter file that this process writes, or the save of it, ends the process."""
    import safetensors.torch
    from transformers import Trainer

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ.get("RANK", "0")) != rank:
        return
    upstream, save, calls = safetensors.torch.serialize_file, Trainer.save_model, []

    def serialize_file(data: Any, filename: Any, metadata: Any = None) -> None:
        upstream(data, filename, metadata)
        calls.append(filename)
        if len(calls) == 2:
            if when == "during":
                os.truncate(filename, os.path.getsize(filename) // 2)
            die()

    def save_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("save")
        if len(calls) == 2:
            die()
        return save(self, *args, **kwargs)

    if when == "before":
        Trainer.save_model = save_model
    else:
        safetensors.torch.serialize_file = serialize_file


def config_cut(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """The disk is full when the adapter's configuration is written; without it no tensor of the adapter loads."""
    first = scene.run(train, setup, patched=patched)
    if failure(first):
        return failure(first)

    def action(trainer: Any, folder: Path) -> dict[str, Any]:
        import safetensors.torch

        upstream = safetensors.torch.serialize_file

        def serialize_file(*args: Any, **kwargs: Any) -> None:
            upstream(*args, **kwargs)
            limits("full at the configuration", folder)

        trainer.train()
        safetensors.torch.serialize_file = serialize_file
        try:
            trainer.save_model(str(folder))
        except Exception:
            return {"saved": True}
        finally:
            limits_lifted("full at the configuration")
        return {}

    folder = Path(first[0].folder)
    scene.run(action, setup, patched=patched, folder=folder)
    findings = verify.verify_path(folder)
    return findings[0].text if findings else ""


def overwritten(when: str, configure: Any = METHODS["lora"]) -> Callable[..., str]:
    """The rank that writes is killed, or the disk is full, while the final adapter replaces an older one."""

    def scenario(scene: Scene, setup: Setup, *, patched: bool) -> str:
        first = scene.run(train, dataclasses.replace(setup, save_steps=1), patched=patched, configure=configure)
        if failure(first):
            return failure(first)
        folder = Path(first[0].folder)
        before = stored_bits(folder)

        def action(trainer: Any, folder: Path) -> dict[str, Any]:
            if when in ("during", "after"):
                fail_the_second_write(when, 0)
            # The first write; it also imports what a save needs.
            trainer.save_model(str(folder / "elsewhere"))
            trainer.train()
            error = ""
            try:
                limits(when, folder)
                trainer.save_model(str(folder))
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
            finally:
                limits_lifted(when)
            return {"saved": True, "error": error}

        extra = {"configure": configure, "learning_rate": 2e-2}
        outcomes = scene.run(action, setup, patched=patched, folder=folder, **extra)
        limits_off(folder)
        if when in ("during", "after") and "hung" not in outcomes[0].error:
            return failure(outcomes) or "the rank was not killed"
        if when in ("full", "read-only") and not all(outcome.extra.get("error") for outcome in outcomes):
            return "a rank went on as if the adapter had been saved"
        return survived(scene, setup, folder, before, first, patched=patched, configure=configure)

    return scenario


def limits(when: str, folder: Path) -> None:
    """Let this rank's writes fail: as on a full disk, just before the adapter is whole, or in a read-only folder."""
    if when == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = (folder / reading.SAFE).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, resource.RLIM_INFINITY))
    elif when == "full at the configuration":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    elif when == "read-only":
        for item in (folder, *folder.iterdir()):
            if item.is_file() or item == folder:
                item.chmod(item.stat().st_mode & ~0o222)
        if os.geteuid() == 0:
            # Root may write anywhere, so this rank becomes somebody else, who may not read Python's own files.
            "".encode("utf-8-sig")
            for parent in folder.parents:
                if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                    parent.chmod(parent.stat().st_mode | 0o055)
            os.seteuid(65534)


def limits_lifted(when: str) -> None:
    """In the rank, which has something to report."""
    if when.startswith("full"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    elif when == "read-only" and os.getuid() == 0:
        os.seteuid(0)


def limits_off(folder: Path) -> None:
    """Afterwards, for all."""
    for item in (folder, *folder.iterdir()):
        if item.is_file() or item == folder:
            item.chmod(item.stat().st_mode | 0o200)


def dead_rank(scene: Scene, setup: Setup, *, patched: bool) -> str:
    """A rank dies in the backward of the second step; the other ends with an error, and the run resumes."""
    writing = dataclasses.replace(setup, save_steps=1)
    whole = scene.run(train, writing, patched=patched)
    if failure(whole):
        return failure(whole)

    def action(trainer: Any, folder: Path) -> None:
        import torch.distributed as dist

        backward = trainer.accelerator.backward

        def dies(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 1 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return backward(*args, **kwargs)

        trainer.accelerator.backward = dies
        trainer.train()

    folder = Path(f"{whole[0].folder}-dead")
    shutil.copytree(whole[0].folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    outcomes = scene.run(action, writing, patched=patched, folder=folder)
    if "hung" in outcomes[0].error or not outcomes[0].error:
        return "the other rank waits for ever"
    return survived(scene, setup, folder, stored_bits(whole[0].folder), whole, patched=patched)


def natively(configure: Any) -> Callable[..., str]:
    """transformers shards the base while it loads it; it refuses to resume such a run."""

    def scenario(scene: Scene, setup: Setup, *, patched: bool) -> str:
        outcomes = scene.run(train, setup, patched=patched, configure=configure, native=True)
        return scene.right(outcomes, scene.one(train, setup, configure), setup)

    return scenario


def with_everything(model: Any) -> Any:
    """LoRA with biases, a whole module, and trainable tokens where this peft has them."""
    import peft
    import torch

    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    settings: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]}
    if versions.at_least("peft", "0.15.0"):
        settings["trainable_token_indices"] = {"embed_tokens": [1, 2, 3]}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, bias="all", **settings))


def with_two_adapters(model: Any) -> Any:
    import peft

    model = METHODS["lora"](model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    return model


def scenarios() -> Iterator[tuple[str, Callable[..., str], Setup]]:
    """Name, scenario and set-up, of those that the installed releases have."""
    for fsdp in (1, 2) if releases.has_fsdp2() else (1,):
        base = Setup(f"FSDP{fsdp}", fsdp=fsdp)
        kinds = [dataclasses.replace(base, sharded_checkpoint=sharded) for sharded in (False, True)]
        for setup in kinds:
            kind = f"FSDP{fsdp} {'sharded' if setup.sharded_checkpoint else 'full'}"
            for optim in ("adamw_torch", "sgd"):
                yield f"resume at each step, {optim}, {kind}", interrupted, dataclasses.replace(setup, optim=optim)
            # Before, a Trainer takes the batch size of each rank from the checkpoint.
            if versions.at_least("transformers", "5.2.0"):
                yield f"resume on 4 ranks, {kind}", other_ranks, setup
            yield f"torch.compile, {kind}", compiled, setup
            yield f"load_best_model_at_end, {kind}", best_at_end, setup
        if "FULL" in releases.state_dict_type(base):
            yield f"save_only_model, FSDP{fsdp}", model_only, base
        amp = dataclasses.replace(base, amp="bf16")
        checkpointing = dataclasses.replace(base, activation_checkpointing=True)
        yield f"evaluate before, during, after, FSDP{fsdp}", evaluated, base
        yield f"generate during training, FSDP{fsdp}", generated, base
        yield f"disable_adapter for a reference, FSDP{fsdp}", referenced, base
        yield f"biases, tokens, modules_to_save, FSDP{fsdp}", saved(with_everything), base
        yield f"modules_to_save, FSDP{fsdp}", saved(with_a_head), base
        yield f"two adapters, FSDP{fsdp}", saved(with_two_adapters), base
        yield f"activation checkpointing, FSDP{fsdp}", saved(METHODS["lora"]), checkpointing
        yield (
            f"gradient checkpointing, FSDP{fsdp}",
            saved(METHODS["lora"]),
            dataclasses.replace(base, checkpointing=True),
        )
        yield f"projections under bf16, FSDP{fsdp}", saved(METHODS["vera"]), amp
        for when in ("before", "during", "after"):
            yield f"rank 0 killed {when} a checkpoint's write, FSDP{fsdp}", killed(when), base
        yield f"rank 1 killed before a checkpoint's write, FSDP{fsdp}", killed("before", 1), base
        for when in ("during", "after"):
            yield f"rank 0 killed {when} an overwrite, FSDP{fsdp}", overwritten(when), base
        yield f"full disk, FSDP{fsdp}", overwritten("full"), base
        yield f"full disk at the configuration, FSDP{fsdp}", config_cut, base
        yield f"read-only folder, FSDP{fsdp}", overwritten("read-only"), base
        yield f"rank 1 dies in a step, FSDP{fsdp}", dead_rank, base
    if versions.at_least("transformers", "5.19.0"):
        for method in ("lora", "vera"):
            yield f"{method}, sharded by transformers itself", natively(METHODS[method]), Setup("native", fsdp=0)


def cell(scenario: Callable[..., str], scene: Scene, setup: Setup, *, patched: bool) -> str:
    """What was lost, in one line, or ""."""
    try:
        return scenario(scene, setup, patched=patched)
    except (LostError, AdapterError) as error:
        return str(error)


def table(rows: list[dict[str, str]]) -> int:
    """Print scenario, stock and patched; 1 where a patched cell is wrong."""
    from rich.console import Console
    from rich.table import Table

    output = Table(title="right: nothing was lost", title_justify="left")
    for column in ("scenario", "stock", "patched"):
        output.add_column(column, overflow="fold")
    for row in rows:
        cells = ["not run" if side not in row else row[side][:90] or "right" for side in ("stock", "patched")]
        output.add_row(row["scenario"], *cells)
    Console(width=None if Console().is_terminal else 150).print(output, markup=False)
    for side in ("stock", "patched"):
        found = [row[side] for row in rows if side in row]
        right = found.count("")
        sys.stdout.write(f"{side:8} {len(found)} scenarios: {right} right, {len(found) - right} wrong\n")
    return int(any(row["patched"] for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="keep scenarios whose name contains this")
    parser.add_argument("--no-stock", action="store_true", help="leave the unpatched side out")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args()
    forks.TIMEOUT = 20.0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Bench(Path(folder)))
        for name, scenario, setup in scenarios():
            if given.only not in name:
                continue
            row = {"scenario": name}
            for side in ("patched",) if given.no_stock else ("stock", "patched"):
                row[side] = cell(scenario, scene, setup, patched=side == "patched")
            rows.append(row)
            sys.stderr.write(f"{row}\n")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
