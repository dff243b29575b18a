"""The project's model and data."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed


def build() -> PeftModel:
    """A small Llama with LoRA."""
    set_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "o_proj"]))


def rows() -> list[dict[str, list[int]]]:
    """Sixty-four rows of eight tokens."""
    numbers = ([(7 * row + 3 * place) % 92 + 4 for place in range(8)] for row in range(64))
    return [{"input_ids": tokens, "labels": tokens} for tokens in numbers]
