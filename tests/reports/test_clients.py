"""TRL and sentence-transformers themselves, where they are installed, on tiny random models."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import cases
import pytest
from cases import Case, Found, Scene

from trainer_fsdp_patch.testing import cpu, trial

TRL, SENTENCES = ("trl", "datasets"), ("sentence_transformers", "datasets")
cases.imported(*(f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "reward", "grpo")))
cases.imported("sentence_transformers.cross_encoder", "sentence_transformers.losses")


def arguments(scene: Scene, kind: Any, **extra: Any) -> Any:
    """The case's TrainingArguments as the client's own class."""
    import transformers

    def make(**keywords: Any) -> Any:
        return kind(**{**keywords, **extra})

    with mock.patch.object(transformers, "TrainingArguments", make):
        given = trial.arguments(scene.setup, str(scene.folder), scene.ranks)
    if scene.ranks > 1 and scene.setup.fsdp:
        cpu.bridge(given)
    return given


def tokenizer() -> Any:
    """Words t4 to t95."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{place}": place for place in range(4, trial.VOCABULARY)}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = words | {word: place for place, word in enumerate(special.values())}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    # Of its default names a Llama takes these two, and `generate` refuses others.
    takes = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=takes, **special)


def texts(seed: int, low: int, high: int) -> list[str]:
    numbers = random.Random(seed)
    lengths = [numbers.randrange(low, high) for _ in range(trial.STEPS * trial.BATCH)]
    return [" ".join(f"t{numbers.randrange(4, trial.VOCABULARY)}" for _ in range(length)) for length in lengths]


def pairs() -> Any:
    from datasets import Dataset

    columns = {"prompt": texts(1, 3, 4), "chosen": texts(2, 4, 5), "rejected": texts(3, 4, 5)}
    return Dataset.from_dict(columns)


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", **settings})


def finished(scene: Scene, trainer: Any) -> Found:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def fresh(scene: Scene, kind: Any, given: Any, model: Any = None, config: Any = None, **keywords: Any) -> Found:
    """A client's Trainer that puts the adapter on the base itself."""
    import torch

    torch.manual_seed(0)
    keywords = {"processing_class": tokenizer(), **keywords}
    trainer = kind(model=model or scene.load(), args=given, peft_config=config or lora(), **keywords)
    trial.nudge(trainer.model)
    return finished(scene, trainer)


def sft(scene: Scene) -> Found:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": texts(0, 3, 9)})
    return fresh(scene, SFTTrainer, arguments(scene, SFTConfig, max_length=16), train_dataset=data)


def sft_packed(scene: Scene) -> Found:
    """Rows are joined to full lengths before the ranks share them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": texts(0, 24, 32)})
    given = arguments(scene, SFTConfig, max_length=16, packing=True, packing_strategy="wrapped")
    return fresh(scene, SFTTrainer, given, train_dataset=data)


def sft_of_completions(scene: Scene) -> Found:
    """The loss is that of the completions alone, whose number differs from rank to rank."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"prompt": texts(1, 3, 6), "completion": [f" {text}" for text in texts(2, 2, 8)]})
    given = arguments(scene, SFTConfig, max_length=16, completion_only_loss=True)
    return fresh(scene, SFTTrainer, given, train_dataset=data)


CHAT = """{%- for message in messages %}
{%- if message.role == "assistant" %}{% generation %}{{ message.content + " </s>" }}{% endgeneration %}
{%- else %}{{ "<s> " + message.content + " " }}{%- endif %}
{%- endfor %}"""


def sft_of_assistants(scene: Scene) -> Found:
    """The loss is that of what assistants say, in one turn or in two, as the chat template marks it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    words = tokenizer()
    words.chat_template = CHAT
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in zip(texts(1, 2, 6), texts(2, 2, 8), strict=True)
    ]
    # The number of tokens in the loss differs from row to row, and so from rank to rank.
    data = Dataset.from_dict({"messages": [turn * (1 + place % 3 // 2) for place, turn in enumerate(turns)]})
    given = arguments(scene, SFTConfig, max_length=32, assistant_only_loss=True)
    return fresh(scene, SFTTrainer, given, train_dataset=data, processing_class=words)


def translation(scene: Scene) -> Found:
    """T5 with LoRA, whose evaluation generates. Its loss is a mean of each rank, so that labels are of one length."""
    import torch
    from peft import get_peft_model
    from transformers import (
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=trial.VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    model = get_peft_model(
        T5ForConditionalGeneration(config), lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    )
    trial.nudge(model)
    # Of a batch that ranks fill up, transformers gives the answers to the filling too, under DDP as well.
    extra = {"predict_with_generate": True, "generation_max_length": 6, "per_device_eval_batch_size": 2}
    given = arguments(scene, Seq2SeqTrainingArguments, **extra)
    words = tokenizer()
    rows = [
        {"input_ids": words(first)["input_ids"], "labels": words(second)["input_ids"]}
        for first, second in zip(texts(1, 3, 9), texts(2, 4, 5), strict=True)
    ]
    trainer = Seq2SeqTrainer(
        model=model,
        args=given,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DataCollatorForSeq2Seq(words, model=None),
        processing_class=words,
    )
    found = finished(scene, trainer)
    answers = trainer.predict(rows[:4]).predictions
    return {**found, "answers": torch.tensor(answers)}


def dpo(scene: Scene) -> Found:
    from trl import DPOConfig, DPOTrainer

    return fresh(scene, DPOTrainer, arguments(scene, DPOConfig, max_length=16), train_dataset=pairs())


def with_adapter(base: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(base, lora())


def dpo_of_an_adapter(scene: Scene, **keywords: Any) -> Found:
    """TRL copies the adapter under the name "ref" where it is given no reference model."""
    from trl import DPOConfig, DPOTrainer

    model = scene.model(with_adapter)
    given = arguments(scene, DPOConfig, max_length=16)
    trainer = DPOTrainer(model=model, args=given, train_dataset=pairs(), processing_class=tokenizer(), **keywords)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.add_(0.02)
    return finished(scene, trainer)


def dpo_with_a_full_reference(scene: Scene) -> Found:
    import torch

    torch.manual_seed(0)
    return dpo_of_an_adapter(scene, ref_model=scene.load())


def reward(scene: Scene) -> Found:
    import torch
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    model = scene.load(AutoModelForSequenceClassification)
    model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    model.config.num_labels = model.num_labels = 1
    model.config.pad_token_id = 0
    given = arguments(scene, RewardConfig, max_length=16)
    return fresh(scene, RewardTrainer, given, model, lora(task_type="SEQ_CLS"), train_dataset=pairs())


def grpo(scene: Scene) -> Found:
    """Two completions of each prompt; at such a temperature they are the likeliest ones, in ranks as in one process."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def scored(completions: list[str], **columns: Any) -> list[float]:
        return [len(set(text)) % 7 + place * 0.5 for place, text in enumerate(completions)]

    extra = {"num_generations": 2, "max_completion_length": 4, "temperature": 1e-4, "beta": 0.1}
    given = arguments(scene, GRPOConfig, **extra)
    data = Dataset.from_dict({"prompt": texts(1, 3, 4)})
    return fresh(scene, GRPOTrainer, given, reward_funcs=[scored], train_dataset=data)


def encoder(scene: Scene, kind: str, **settings: Any) -> str:
    """Folder of a tiny BERT with the tokenizer."""
    import torch
    import transformers

    folder = scene.folder / "bert"
    if scene.rank == 0:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=trial.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, **settings,
        )  # fmt: skip
        getattr(transformers, kind)(config).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    scene.wait()
    return str(folder)


def sentences(scene: Scene, loss: str, **settings: Any) -> Found:
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    given = arguments(scene, SentenceTransformerTrainingArguments)
    part = Transformer(encoder(scene, "BertModel"))
    torch.manual_seed(0)
    part.model = get_peft_model(part.model, lora(target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    model = SentenceTransformer(modules=[part, Pooling(64)], device="cpu")
    trial.nudge(model)
    columns: Found = {"first": texts(1, 3, 9), "second": texts(2, 3, 9)}
    if loss == "CosineSimilarityLoss":
        columns["score"] = [place / 12 for place in range(12)]
    data, made = Dataset.from_dict(columns), getattr(losses, loss)(model, **settings)
    return gathered(scene, SentenceTransformerTrainer(model=model, args=given, train_dataset=data, loss=made))


def gathered(scene: Scene, trainer: Any) -> Found:
    """Train, and gather the adapter from the whole model's state dict."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    found = scene.trained(trainer)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    ours = {key: value.clone() for key, value in state.items() if "lora_" in key or "modules_to_save" in key}
    return {**found, "adapter": {} if scene.rank else ours}


def similarity(scene: Scene) -> Found:
    return sentences(scene, "CosineSimilarityLoss")


def cached(scene: Scene) -> Found:
    """The loss runs its backward passes in a hook of the loss's own; negatives come from all ranks."""
    across = scene.ranks > 1
    return sentences(scene, "CachedMultipleNegativesRankingLoss", mini_batch_size=1, gather_across_devices=across)


def cross_encoder(scene: Scene) -> Found:
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    given = arguments(scene, CrossEncoderTrainingArguments)
    model = CrossEncoder(encoder(scene, "BertForSequenceClassification", num_labels=1), device="cpu")
    torch.manual_seed(0)
    model[0].model = get_peft_model(model[0].model, lora(target_modules=["query", "value"], task_type="SEQ_CLS"))
    trial.nudge(model)
    columns = {"first": texts(1, 3, 9), "second": texts(2, 3, 9), "label": [float(place % 2) for place in range(12)]}
    loss = BinaryCrossEntropyLoss(model)
    return gathered(
        scene, CrossEncoderTrainer(model=model, args=given, train_dataset=Dataset.from_dict(columns), loss=loss)
    )


CASES = [
    Case(
        "TRL: SFTTrainer",
        "https://github.com/huggingface/trl/issues/2537",
        "`SFTTrainer(peft_config=...)`.",
        sft,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
        always=False,
    ),
    Case(
        "TRL: SFTTrainer that packs",
        "https://github.com/huggingface/trl/issues/2537",
        "`SFTConfig(packing=True)`: rows are joined and cut to one length.",
        sft_packed,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
        always=False,
    ),
    Case(
        "TRL: SFTTrainer of completions",
        "https://github.com/huggingface/trl/issues/2537",
        "`completion_only_loss=True`: ranks have other numbers of tokens in the loss.",
        sft_of_completions,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
        always=False,
    ),
    Case(
        "Seq2SeqTrainer that generates",
        "https://github.com/huggingface/transformers/issues/34530",
        "T5 with LoRA, `predict_with_generate=True`, and `predict()` after the training.",
        translation,
        stock={"FSDP1": "/loss/0 is ", "FSDP2": "is shared with a parameter already managed by"},
        always=False,
    ),
    Case(
        "TRL: DPOTrainer",
        "https://github.com/hiyouga/LlamaFactory/pull/10127",
        "`DPOTrainer(peft_config=...)`: the reference is the base without its adapter.",
        dpo,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
        always=False,
    ),
    Case(
        "TRL: DPOTrainer of a trained adapter",
        "https://github.com/huggingface/trl/issues/5222",
        "`DPOTrainer(model=PeftModel)`: the reference is a copy of the adapter.",
        dpo_of_an_adapter,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
        always=False,
    ),
    Case(
        "TRL: DPOTrainer with a reference model",
        "https://github.com/huggingface/trl/pull/5583",
        "A full reference model next to the PeftModel, sharded by TRL's `prepare_fsdp`.",
        dpo_with_a_full_reference,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
        always=False,
    ),
    Case(
        "TRL: RewardTrainer",
        "https://github.com/huggingface/accelerate/issues/3732",
        "`RewardTrainer` on a classifier whose head peft trains in full.",
        reward,
        stock={"FSDP1": cases.HUNG},
        missing=TRL,
        always=False,
    ),
    Case(
        "TRL: GRPOTrainer",
        "https://github.com/huggingface/trl/issues/3089",
        "`GRPOTrainer(peft_config=...)` that generates by itself, with a KL term.",
        grpo,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
    ),
    Case(
        "TRL: SFTTrainer of assistants",
        "https://github.com/huggingface/trl/pull/3586",
        "`assistant_only_loss=True`, with a chat template that marks what the assistant says.",
        sft_of_assistants,
        stock={"FSDP1": cases.EMPTY},
        missing=TRL,
        always=False,
    ),
    Case(
        "sentence-transformers: LoRA",
        "https://github.com/huggingface/sentence-transformers/pull/3046",
        "SentenceTransformerTrainer, LoRA on the encoder, CosineSimilarityLoss.",
        similarity,
        missing=SENTENCES,
        always=False,
    ),
    Case(
        "sentence-transformers: GradCache",
        "https://github.com/huggingface/sentence-transformers/pull/3862",
        "The same with CachedMultipleNegativesRankingLoss, whose backward passes run inside a hook.",
        cached,
        missing=SENTENCES,
    ),
    Case(
        "sentence-transformers: CrossEncoder",
        "https://github.com/huggingface/sentence-transformers/pull/3862",
        "CrossEncoderTrainer, LoRA and a head that peft trains in full.",
        cross_encoder,
        stock={"FSDP1": "expected to be in states", "FSDP2": "/loss/"},
        missing=SENTENCES,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
