"""QLoRA or QVeRA with TRL's SFTTrainer, on one device or on many: the same script, small first.

    python examples/quantized_sft.py --out one
    torchrun --nproc-per-node 2 examples/quantized_sft.py --out two
    torchrun --nproc-per-node 8 examples/quantized_sft.py --model NAME --data FILE.jsonl --layer LlamaDecoderLayer

The base is in 4 bits, in bitsandbytes' default storage, and FSDP shards it. Each line of the data has a "text".
Without --model, a tiny random model is made, so that nothing is fetched.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trainer_fsdp_patch

trainer_fsdp_patch.patch()

import on_cpu
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, set_seed
from trl import SFTConfig, SFTTrainer

METHODS = {
    "lora": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=64, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
}
BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def tiny(folder: str) -> str:
    """Make a random model of two layers there, whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: place for place, letter in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a causal language model")
    parser.add_argument("--data", help="JSON lines with a text each")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2, help="version, with more than one rank")
    parser.add_argument("--layer", default="LlamaDecoderLayer", help="class of the model's layers")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="adapter", help="folder of the adapter")
    given = parser.parse_args()

    fsdp = {"version": given.fsdp, "transformer_layer_cls_to_wrap": [given.layer]}
    if on_cpu.needed() and given.fsdp == 1:
        fsdp["sync_module_states"] = False
    arguments = SFTConfig(
        output_dir=given.out,
        per_device_train_batch_size=8 // on_cpu.ranks(),
        max_steps=given.steps,
        max_length=64,
        learning_rate=2e-4 if given.method == "lora" else 1e-2,
        bf16=True,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        seed=0,
        **({"fsdp": True, "fsdp_config": fsdp} if on_cpu.ranks() > 1 else {}),
        **on_cpu.settings(),
    )
    on_cpu.begin(arguments)
    # Rank 0 makes it, and the others read it.
    with arguments.main_process_first():
        model = given.model or tiny(f"{given.out}/base")
    if given.data:
        rows = load_dataset("json", data_files=given.data, split="train")
    else:
        rows = Dataset.from_list([{"text": f"{a} plus {b} is {a + b}."} for a in range(8) for b in range(8)])
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=BITS, dtype=torch.bfloat16)
    trainer = SFTTrainer(
        # Given a peft_config instead, TRL rounds the adapter to bf16 next to a 4-bit base, VeRA's projections too.
        model=get_peft_model(base, METHODS[given.method]),
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    trainer.save_model(given.out)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{Path(given.out).resolve()}: loss from {losses[0]} to {losses[-1]}")


if __name__ == "__main__":
    main()
