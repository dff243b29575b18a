"""LoRA or VeRA on T5 with Seq2SeqTrainer, whose evaluation generates; on one device or on many, the same script.

    python examples/seq2seq_t5.py --out one
    torchrun --nproc-per-node 2 examples/seq2seq_t5.py --out two
    torchrun --nproc-per-node 8 examples/seq2seq_t5.py --model NAME --data FILE.jsonl

FSDP shards the base, and every rank generates. Each line of the data has a "source" and a "target".
Without --model, a tiny random T5 is made, whose tokens are bytes, so that nothing is fetched.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import trainer_fsdp_patch

trainer_fsdp_patch.patch()

import numpy as np
import on_cpu
from datasets import Dataset, load_dataset
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    set_seed,
)

METHODS = {
    "lora": LoraConfig(r=8, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
    "vera": VeraConfig(r=256, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
}
# T5 averages the loss over the tokens of each rank: ranks give what one process gives where answers are equally long.
SUMS = [{"source": f"{a} plus {b}", "target": f"{a + b:02}"} for a in range(8) for b in range(8)]


def tiny():
    """A random T5 of two layers; no dropout, so that ranks can be compared with one process."""
    config = T5Config(
        vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


def settings(given: argparse.Namespace) -> Seq2SeqTrainingArguments:
    """The same global batch, whatever the number of ranks."""
    fsdp = {"version": given.fsdp, "transformer_layer_cls_to_wrap": ["T5Block"]}
    if on_cpu.needed() and given.fsdp == 1:
        fsdp["sync_module_states"] = False
    # A random base has more to learn.
    rate = 1e-3 if given.model else 1e-2
    arguments = Seq2SeqTrainingArguments(
        output_dir=given.out,
        per_device_train_batch_size=16 // on_cpu.ranks(),
        per_device_eval_batch_size=16 // on_cpu.ranks(),
        max_steps=given.steps,
        learning_rate=rate if given.method == "lora" else 3 * rate,
        predict_with_generate=True,
        generation_max_length=given.length,
        save_strategy="no",
        logging_steps=0.1,
        report_to=[],
        seed=0,
        **({"fsdp": True, "fsdp_config": fsdp} if on_cpu.ranks() > 1 else {}),
        **on_cpu.settings(),
    )
    return on_cpu.begin(arguments)


def right(tokenizer, found) -> dict[str, float]:
    """The share of answers that are word for word what they should be."""
    # Answers and targets are filled with -100 to one length each.
    tokens = (np.where(part < 0, tokenizer.pad_token_id, part) for part in found)
    said, meant = (tokenizer.batch_decode(part, skip_special_tokens=True) for part in tokens)
    return {"right": sum(map(str.__eq__, said, meant)) / len(meant)}


def main() -> None:
    """Train, evaluate what the model answers, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a T5")
    parser.add_argument("--data", help="JSON lines with a source and a target each")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2, help="version, with more than one rank")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=8, help="of an answer that is generated, in tokens")
    parser.add_argument("--out", default="adapter", help="folder of the adapter")
    given = parser.parse_args()

    arguments = settings(given)
    set_seed(0)
    base = AutoModelForSeq2SeqLM.from_pretrained(given.model) if given.model else tiny()
    tokenizer = AutoTokenizer.from_pretrained(given.model) if given.model else ByT5Tokenizer()
    rows = load_dataset("json", data_files=given.data, split="train") if given.data else Dataset.from_list(SUMS)
    rows = rows.map(lambda row: tokenizer(row["source"], text_target=row["target"]), remove_columns=rows.column_names)
    trainer = Seq2SeqTrainer(
        model=get_peft_model(base, METHODS[given.method]),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        compute_metrics=functools.partial(right, tokenizer),
    )
    trainer.train()
    figures = trainer.evaluate()
    trainer.save_model(given.out)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{Path(given.out).resolve()}: loss from {losses[0]} to {losses[-1]}, {figures['eval_right']:.0%} right")


if __name__ == "__main__":
    main()
