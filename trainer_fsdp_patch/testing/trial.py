"""One training run of a tiny model on forked ranks, and its comparison with one process.

`check` and the tests share it: the parent imports everything once and forks two ranks for each case.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.inspecting import inventory, sharing
from trainer_fsdp_patch.measuring.footprint import Footprint
from trainer_fsdp_patch.planning import expecting
from trainer_fsdp_patch.planning.prepared import prepared_by
from trainer_fsdp_patch.testing import case, cpu, forks, recording, releases

STEPS, BATCH, LENGTH, VOCABULARY = 3, 4, 12, 96

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    Configure = Callable[[PreTrainedModel], PeftModel]


def tiny_base(folder: Path) -> str:
    """Write the base model of all cases: a random Llama of two layers, width 64, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def load_base(
    folder: str, setup: case.Setup, kind: type[PreTrainedModel] | None = None, quantization: object = None
) -> PreTrainedModel:
    """Load the base as a user would, quantized where the setup says so.

    Args:
        folder: of the base.
        setup: the case.
        kind: class of the model; None is AutoModelForCausalLM.
        quantization: a configuration of another quantizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if setup.storage:
        cpu.allow_packed_weights()
    if setup.storage == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif setup.storage:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=setup.kind[:3],
            bnb_4bit_use_double_quant="double" in setup.kind,
            bnb_4bit_compute_dtype=torch.bfloat16 if setup.amp == "bf16" else getattr(torch, setup.dtype),
            bnb_4bit_quant_storage=getattr(torch, setup.storage),
        )
    model = (kind or AutoModelForCausalLM).from_pretrained(
        folder,
        quantization_config=quantization,
        attn_implementation=setup.attention,
        **{releases.dtype_argument(): getattr(torch, setup.dtype)},
    )
    # FSDP's checkpointing recomputes layers, which would fill a cache twice.
    model.config.use_cache = False
    return model


def nudge(model: nn.Module) -> None:
    """Move every trainable tensor off its initial value, the same on all ranks, so that all have gradients."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.add_(noise.to(parameter))


def dataset(size: int, *, even: bool = False) -> list[dict[str, torch.Tensor]]:
    """Random token sequences; the number of labelled tokens differs where the release accounts for that.

    Args:
        size: number of rows.
        even: whether all rows have the same number of labelled tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(size):
        ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: index % 5 if releases.normalises_over_ranks() and not even else 1] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def launched(ranks: int) -> bool:
    """Whether this process is one of the ranks of a launcher, or the only one."""
    return ranks > 1 or "WORLD_SIZE" in os.environ


def _backend(setup: case.Setup, ranks: int) -> str | None:
    """Backend of the collectives; None is the one that accelerate takes for the accelerator that is there."""
    kind = devices.kind()
    if not launched(ranks):
        return None
    if kind == "cpu":
        return "gloo"
    # Shards in main memory are gathered there for a state dict, and their norms are added up.
    return f"{kind}:{devices.backend(kind)},cpu:gloo" if setup.offload else None


def arguments(setup: case.Setup, folder: str, ranks: int) -> TrainingArguments:
    """TrainingArguments of a case; one process gets the full global batch."""
    from transformers import TrainingArguments

    distributed = releases.fsdp(setup) if launched(ranks) and setup.fsdp else {}
    checkpointing = setup.checkpointing or (setup.activation_checkpointing and not distributed)
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=(setup.batch or BATCH) // ranks // setup.micro,
        gradient_accumulation_steps=setup.accumulation * setup.micro,
        max_steps=STEPS,
        learning_rate=1e-2,
        # With the default, Adam steps by the sign of the gradient, and a wrong scale would not show. Where the gradient
        # is nearly zero, bf16 noise would decide the step.
        adam_epsilon=1e-2,
        optim=setup.optim,
        max_grad_norm=setup.clip,
        bf16=setup.amp == "bf16",
        fp16=setup.amp == "fp16",
        torch_compile_backend=setup.compiled or None,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if setup.save_steps else "no",
        save_steps=setup.save_steps or STEPS,
        report_to=[],
        disable_tqdm=True,
        use_cpu=devices.kind() == "cpu",
        ddp_backend=_backend(setup, ranks),
        seed=0,
        **releases.tokens(),
        **distributed,
        **(releases.replicas(setup) if distributed else {}),
    )


def enter(setup: case.Setup, folder: str, ranks: int, *, patched: bool) -> TrainingArguments:
    """Make this process one of the ranks of a case, patched or stock, and return its TrainingArguments."""
    import torch

    import trainer_fsdp_patch

    torch.set_num_threads(1)
    if patched:
        trainer_fsdp_patch.patch(strict=True, adapter_placement=setup.placement, base_budget=setup.budget or None)
    releases.environment()
    given = arguments(setup, folder, ranks)
    if launched(ranks) and setup.fsdp and given.device.type == "cpu":
        cpu.bridge(given)
    return given


def train(
    setup: case.Setup, configure: Configure, base: str, folder: str, ranks: int, patched: bool, rank: int
) -> case.Outcome:
    """Train and save one case in this process.

    Args:
        setup: the case.
        configure: takes the base model, returns the PEFT model. It may have attributes. `load` and `dataset` stand in
            for this module's. `rows` are columns of the data next to the model's. `even`: its loss ignores the count of
            tokens. `micro`: its forward mixes the rows of a batch, so that one process takes it in two parts.
            `callbacks` makes those of its schedule. `save` writes the gathered state dict where peft cannot.
        base: folder of the base model.
        folder: where the adapter is written.
        ranks: number of processes.
        patched: whether to call `patch()` first.
        rank: of this process; what a rank does depends on its environment alone.
    """
    import torch
    import transformers

    if getattr(configure, "micro", False) and ranks == 1:
        setup = dataclasses.replace(setup, micro=2)
    given = enter(setup, folder, ranks, patched=patched)
    given.remove_unused_columns = not getattr(configure, "rows", {})
    if getattr(configure, "even", False) and not setup.fsdp:
        # DDP is left to upstream, which multiplies such a loss by the number of ranks.
        given.average_tokens_across_devices = False
    torch.manual_seed(0)
    model = configure(getattr(configure, "load", load_base)(base, setup))
    nudge(model)
    recorder = recording.recorder(inventory.take(model).tensors())
    trainer = recording.trainer_class(recorder)(
        model=model,
        args=given,
        train_dataset=getattr(configure, "dataset", dataset)(STEPS * (setup.batch or BATCH) * setup.accumulation),
        callbacks=[*getattr(configure, "callbacks", list)(), recorder],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    save = getattr(configure, "save", None)
    if ranks == 1:
        _save(trainer, save, f"{folder}/init")
    outcome: case.Outcome = recorder.outcome
    try:
        trainer.train(resume_from_checkpoint=setup.resume or None)
        outcome.planned = planned(trainer, outcome.footprint)
        with recorder.count() as counted:
            _save(trainer, save, folder)
    except Exception as error:
        return forks.failed(error, outcome)
    outcome.extra["saved_collectives"] = counted.total
    outcome.folder = folder
    outcome.norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return outcome


def planned(trainer: Trainer, seen: Footprint | None) -> Footprint | None:
    """What the plan of a patched run says that it takes of a rank.

    Args:
        trainer: that has trained.
        seen: what was taken; None where nothing was looked at.
    """
    prepared = prepared_by(trainer)
    if prepared is None or seen is None:
        return None
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    # FSDP2 has nothing of that name, and gathers ahead in any case.
    prefetched = getattr(plugin, "backward_prefetch", None) is not None
    gathers = 2 if plugin is None else sharing.gathers(plugin)
    return expecting.footprint(prepared.plan, seen.ranks, prefetched=prefetched, gathers=gathers)


def _save(trainer: Trainer, save: Callable[[dict[str, torch.Tensor], str], object] | None, folder: str) -> None:
    if save is None:
        trainer.save_model(folder)
        return
    tensors = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        save(tensors, folder)


def run(
    setup: case.Setup, configure: Configure, base: str, folder: Path, *, ranks: int = 0, patched: bool = True
) -> case.Outcome:
    """Train one case on forked ranks, the set-up's where no number is given; losses are averaged over them.

    Args:
        setup: the case.
        configure: as for `train`.
        base: folder of the base model.
        folder: where the adapter is written.
        ranks: number of processes; 0 is that of the set-up.
        patched: whether to call `patch()` first.
    """
    ranks = ranks or setup.ranks
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = forks.launch(train, setup, configure, base, str(folder), ranks, patched, ranks=ranks)
    return case.merged(outcomes)
