"""LoRA by Ray Train: TorchTrainer starts the workers, and each runs the Trainer as it would run anywhere.

    python examples/ray_train.py --workers 2 --out adapter

`patch()` stands in the function that the workers run, because they are processes of their own.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def train(given: dict[str, object]) -> None:
    """What every worker runs."""
    import trainer_fsdp_patch

    trainer_fsdp_patch.patch()

    import on_cpu
    from peft import LoraConfig, get_peft_model
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    set_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "o_proj"]))
    numbers = ([(7 * row + 3 * place) % 92 + 4 for place in range(8)] for row in range(64))
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in numbers]
    fsdp = {"version": given["fsdp"], "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    if on_cpu.needed() and given["fsdp"] == 1:
        fsdp["sync_module_states"] = False
    arguments = TrainingArguments(
        output_dir=f"{given['out']}/run",
        per_device_train_batch_size=16 // int(given["workers"]),
        max_steps=4,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        **({"fsdp": True, "fsdp_config": fsdp} if on_cpu.ranks() > 1 else {}),
        **on_cpu.settings(),
    )
    trainer = Trainer(model=model, args=on_cpu.begin(arguments), train_dataset=rows)
    trainer.add_callback(RayTrainReportCallback())
    trainer = prepare_trainer(trainer)
    trainer.train()
    trainer.save_model(str(given["out"]))


def main() -> None:
    """Start the workers, and say where the adapter is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2, help="version, with more than one worker")
    parser.add_argument("--out", default="adapter", help="folder of the adapter, which all workers reach")
    given = parser.parse_args()

    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Workers import on_cpu from here; a project that is installed needs no path.
    path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    out = str(Path(given.out).resolve())
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, include_dashboard=False)
    trainer = TorchTrainer(
        train,
        train_loop_config={"workers": given.workers, "fsdp": given.fsdp, "out": out},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(storage_path=f"{out}/ray"),
    )
    trainer.fit()
    print(f"{out}: trained by {given.workers} workers")


if __name__ == "__main__":
    main()
