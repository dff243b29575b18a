"""Tiny random models of common architectures, how each is loaded, and the data that it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantizers
import torch

from trainer_fsdp_patch.testing import trial
from trainer_fsdp_patch.testing.case import Setup

WIDTH = 64
TEXT: dict[str, Any] = {
    "vocab_size": trial.VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LAYERS = 2
"""Of every model that is written from now on; encoders and decoders have as many each."""

IMAGE_TOKEN = trial.VOCABULARY - 1


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        make: returns the configuration and the class of the model.
        rows: the data, by number of rows; None for `trial.dataset`.
        even: whether its loss ignores the Trainer's count of tokens.
    """

    make: Callable[[], tuple[Any, type]]
    rows: Callable[[int], list[dict[str, Any]]] | None = None
    even: bool = False

    def write(self, folder: Path) -> None:
        """Write a random model of it into a folder."""
        torch.manual_seed(0)
        config, kind = self.make()
        kind(config).save_pretrained(folder)

    def load(self, folder: str, setup: Setup) -> Any:
        """Load it as a user would."""
        return quantizers.load(folder, setup, self.make()[1])

    def dataset(self, size: int) -> list[dict[str, Any]]:
        """Rows to train on."""
        return self.rows(size) if self.rows else trial.dataset(size, even=self.even)


def _text() -> dict[str, Any]:
    return {**TEXT, "num_hidden_layers": LAYERS}


def _llama(**changes: Any) -> Callable[[], tuple[Any, type]]:
    def make() -> tuple[Any, type]:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaConfig(**{**_text(), "num_key_value_heads": 2, **changes}), LlamaForCausalLM

    return make


def _gpt2() -> tuple[Any, type]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": trial.VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**sizes, **dropout, initializer_range=0.1), GPT2LMHeadModel


def _bert() -> tuple[Any, type]:
    from transformers import BertConfig, BertForSequenceClassification

    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**_text(), **dropout, num_labels=3), BertForSequenceClassification


def _t5() -> tuple[Any, type]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=trial.VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=LAYERS, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return config, T5ForConditionalGeneration


def _mixtral() -> tuple[Any, type]:
    from transformers import MixtralConfig, MixtralForCausalLM

    # All experts are chosen: which two come first may turn on a rounding, and bf16 rounds otherwise in other batches.
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 4}
    return MixtralConfig(**{**_text(), **experts}), MixtralForCausalLM


def _qwen_moe() -> tuple[Any, type]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    return Qwen3MoeConfig(**{**_text(), **experts}, head_dim=16), Qwen3MoeForCausalLM


def _vit() -> tuple[Any, type]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {name: _text()[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = ViTConfig(
        **sizes, num_attention_heads=4, image_size=16, patch_size=8, initializer_range=0.1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return config, ViTForImageClassification


def _llava() -> tuple[Any, type]:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {name: _text()[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    vision = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=8)
    text = _llama()()[0]
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=4)
    return config, LlavaForConditionalGeneration


def _pixels(row: int) -> torch.Tensor:
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(row))


def _images(size: int) -> list[dict[str, Any]]:
    return [{"pixel_values": _pixels(row), "labels": row % 3} for row in range(size)]


def _classes(size: int) -> list[dict[str, Any]]:
    rows = trial.dataset(size, even=True)
    return [{**row, "labels": index % 3} for index, row in enumerate(rows)]


def _image_texts(size: int) -> list[dict[str, Any]]:
    rows = trial.dataset(size)
    for index, row in enumerate(rows):
        row["input_ids"] = row["input_ids"].clamp(max=IMAGE_TOKEN - 1)
        row["input_ids"][:4] = IMAGE_TOKEN
        row["labels"] = torch.where(row["input_ids"] == IMAGE_TOKEN, -100, row["labels"].clamp(max=IMAGE_TOKEN - 1))
        row["pixel_values"] = _pixels(index)
    return rows


LLAMA = Architecture(_llama(tie_word_embeddings=False))
ARCHITECTURES = {
    "llama": LLAMA,
    "llama_tied": Architecture(_llama(tie_word_embeddings=True)),
    "gpt2": Architecture(_gpt2),
    "bert": Architecture(_bert, _classes, even=True),
    "t5": Architecture(_t5, even=True),
    "mixtral": Architecture(_mixtral),
    "qwen_moe": Architecture(_qwen_moe),
    "vit": Architecture(_vit, _images, even=True),
    "llava": Architecture(_llava, _image_texts),
}
