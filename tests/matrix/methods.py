"""Every PEFT method of the newest peft, as functions that put it on a base model.

A method that draws random numbers in its forward draws the same ones for the same rows in ranks and in one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES, LLAMA, Architecture
from peft import get_peft_model
from transformers import TrainerCallback

from trainer_fsdp_patch.testing import trial

Configure = Callable[[Any], Any]

TARGETS = ["q_proj", "o_proj"]
CAUSAL = {"task_type": "CAUSAL_LM"}


class Method:
    """Puts an adapter on a base model.

    Args:
        config: name of peft's configuration class.
        build: takes the base model; None for a plain `get_peft_model`.
        rows: columns that each row of the data has beside the tokens, as scalars.
        even: whether its loss, or a part of it, ignores the Trainer's count of tokens; it is trained on rows of equal
            length, and without that count under DDP, where upstream multiplies the loss by the number of ranks.
        micro: whether a forward mixes the rows of a batch, so that one process has to take the ranks' batches in turn.
        callbacks: makes those that its schedule needs.
        save: writes tensors of a state dict into a folder, where peft cannot save it.
        architecture: of the base.
        settings: of the configuration; a method that takes target modules gets TARGETS where it names none.
    """

    def __init__(
        self,
        config: str,
        build: Configure | None = None,
        *,
        rows: dict[str, int] | None = None,
        even: bool = False,
        micro: bool = False,
        callbacks: Callable[[], list[Any]] = list,
        save: Callable[[dict[str, Any], str], None] | None = None,
        architecture: Architecture = LLAMA,
        **settings: Any,
    ) -> None:
        self.config, self.build, self.settings = config, build, settings
        self.rows, self.even, self.micro = rows or {}, even or architecture.even, micro
        self.callbacks, self.save = callbacks, save
        self.architecture, self.load = architecture, architecture.load

    def __call__(self, model: Any) -> Any:
        if self.build is not None:
            return self.build(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, getattr(peft, self.config)(**self.settings))

    def dataset(self, size: int) -> list[dict[str, Any]]:
        """The architecture's rows, with this method's columns."""
        rows = trial.dataset(size, even=True) if self.even and not self.architecture.even else None
        return [{**row, **self.rows} for row in rows or self.architecture.dataset(size)]

    @property
    def exists(self) -> bool:
        """Whether the installed peft has it."""
        return hasattr(peft, self.config)


def tuned(config: str, **settings: Any) -> Method:
    """A method on linear layers."""
    return Method(config, **{"target_modules": TARGETS, **settings})


def prompted(config: str, **settings: Any) -> Method:
    """A method that puts virtual tokens before the input."""
    return Method(config, **CAUSAL, **{"num_virtual_tokens": 4, **settings})


class Schedule(TrainerCallback):  # type: ignore[misc]
    """Lets a method weigh its gradients and allot its ranks after each step, as peft asks for."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


def scheduled() -> list[Any]:
    """For a method that keeps a schedule."""
    return [Schedule()]


keeps_a_schedule = pytest.mark.skipif(
    not hasattr(TrainerCallback, "on_optimizer_step"), reason="this Trainer drops gradients before it calls back"
)


class Reseed(TrainerCallback):  # type: ignore[misc]
    """Starts every forward of a step from one state of the random numbers.

    Each rank then draws for its rows what one process draws for the same rows, taken as a batch of their own.
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(state.global_step)

    on_substep_end = on_step_begin


def reseeded() -> list[Any]:
    """For a method that draws random numbers in its forward."""
    return [Reseed()]


def _experts(base: Any) -> dict[str, str]:
    """Two LoRA adapters on disk for X-LoRA, written beside the base that was loaded."""
    from safetensors.torch import save_file

    folder = Path(base.config._name_or_path).parent / "experts"
    found = {}
    for index in range(2):
        where = folder / str(index)
        found[str(index)] = str(where)
        if (where / "adapter_model.safetensors").exists():
            continue
        where.mkdir(parents=True, exist_ok=True)
        peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM").save_pretrained(where)
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for name, module in base.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                shapes = {"lora_A": (4, module.in_features), "lora_B": (module.out_features, 4)}
                for part, shape in shapes.items():
                    key = f"base_model.model.{name}.{part}.weight"
                    tensors[key] = torch.randn(shape, generator=generator) * 0.05
        save_file(tensors, where / "part")
        (where / "part").rename(where / "adapter_model.safetensors")
    return found


def _xlora(model: Any) -> Any:
    config = peft.XLoraConfig(
        hidden_size=model.config.hidden_size, adapters=_experts(model), xlora_depth=2, xlora_size=16,
        xlora_dropout_p=0.0, layerwise_scalings=True, use_trainable_adapters=False, **CAUSAL,
    )  # fmt: skip
    return get_peft_model(model, config)


def _two_adapters(model: Any) -> Any:
    """Two on one model, the second one active."""
    model = tuned("LoraConfig", r=4)(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("second")
    return model


def _mixed(model: Any) -> Any:
    """LoRA and LoHa side by side, both active."""
    model = get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(r=4, target_modules=["o_proj"]))
    model.set_adapter(["default", "second"])
    return model


def _save_mixed(found: dict[str, Any], folder: str) -> None:
    """What a user can do, since peft does not save mixed models."""
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    adapters = {name: tensor.contiguous() for name, tensor in found.items() if ".lora_" in name or ".hada_" in name}
    save_file(adapters, Path(folder) / "adapter_model.safetensors")


def _adaption_prompt(model: Any) -> Any:
    """The one method whose parameters are bf16 on a bf16 base: with other lengths some updates are a rounding apart."""
    return get_peft_model(model, peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **CAUSAL))


def _shadow(model: Any) -> Any:
    settings = {"r": 4, "shadow_dropout": 0.0, "shadow_num_attention_heads": 4, "shadow_intermediate_size": 32}
    return get_peft_model(model, peft.ShadowConfig(**settings, **CAUSAL))


ON_LLAMA: dict[str, Method] = {
    "vera": tuned("VeraConfig", r=8, projection_prng_key=1, d_initial=0.1),
    "vera_noproj": tuned("VeraConfig", r=8, projection_prng_key=1, d_initial=0.1, save_projection=False),
    "pvera": tuned("PveraConfig", r=8, projection_prng_key=1, d_initial=0.1, micro=True, callbacks=reseeded),
    "randlora": tuned("RandLoraConfig", r=8, randlora_alpha=8),
    "vblora": tuned("VBLoRAConfig", r=4, num_vectors=16, vector_length=16),
    "unilora": tuned("UniLoraConfig", r=4, theta_d_length=64),
    "tinylora": tuned("TinyLoraConfig", r=2, u=8),
    "frod": tuned("FrodConfig", progressbar=False),
    "lora": tuned("LoraConfig", r=4),
    "lora_dropout": tuned("LoraConfig", r=4, lora_dropout=0.3, micro=True, callbacks=reseeded),
    "rslora": tuned("LoraConfig", r=4, use_rslora=True),
    "dora": tuned("LoraConfig", r=4, use_dora=True),
    "lora_bias": tuned("LoraConfig", r=4, lora_bias=True),
    "lora_only_biases": tuned("LoraConfig", r=4, bias="lora_only"),
    "lora_all_biases": tuned("LoraConfig", r=4, bias="all"),
    "lora_head": tuned("LoraConfig", r=4, modules_to_save=["lm_head"]),
    "lora_tokens": tuned("LoraConfig", r=4, trainable_token_indices={"embed_tokens": [1, 2, 3]}),
    "lora_embedding": tuned("LoraConfig", r=4, target_modules=["embed_tokens", "q_proj"]),
    "lora_replicated": tuned("LoraConfig", r=4, layer_replication=[(0, 2), (1, 2)]),
    "lora_ranks": tuned("LoraConfig", r=4, rank_pattern={"o_proj": 2}, alpha_pattern={"q_proj": 3}),
    "pissa": tuned("LoraConfig", r=4, init_lora_weights="pissa"),
    "adalora": tuned("AdaLoraConfig", init_r=4, target_r=2, total_step=100, orth_reg_weight=0.1, even=True, **CAUSAL),
    "adalora_schedule": tuned(
        "AdaLoraConfig",
        init_r=4,
        target_r=2,
        tinit=0,
        tfinal=1,
        total_step=trial.STEPS,
        orth_reg_weight=0.1,
        even=True,
        callbacks=scheduled,
        **CAUSAL,
    ),
    "adamss": tuned("AdamssConfig", r=16, num_subspaces=2, subspace_rank=2),
    "adamss_schedule": tuned(
        "AdamssConfig",
        r=16,
        num_subspaces=4,
        subspace_rank=2,
        use_asa=True,
        asa_target_subspaces=5,
        init_warmup=0,
        final_warmup=1,
        mask_interval=1,
        callbacks=scheduled,
    ),
    "beft": tuned("BeftConfig"),
    "boft": tuned("BOFTConfig", boft_block_size=8),
    "c3a": tuned("C3AConfig", block_size=16),
    "cartridge": prompted("CartridgeConfig"),
    "cpt": Method(
        "CPTConfig",
        cpt_token_ids=[5, 6, 7, 8],
        cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
        even=True,
        **CAUSAL,
    ),
    "deft": tuned("DeftConfig", r=4),
    # Its scalars get gradients that nearly cancel, so that bf16 in batches of another shape is felt.
    "delora": tuned("DeloraConfig", micro=True, r=4, delora_lambda=25),
    "fourierft": tuned("FourierFTConfig", n_frequency=32),
    "glora": tuned("GloraConfig", r=4),
    "gralora": tuned("GraloraConfig", r=8, gralora_k=2),
    "hira": tuned("HiraConfig", r=4),
    "hra": tuned("HRAConfig", r=4),
    "ia3": tuned("IA3Config", feedforward_modules=["o_proj"]),
    "lily": tuned("LilyConfig", micro=True, r=8, stride_A=1, num_B=4, scaling=1.0),
    "ln_tuning": Method("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm"]),
    "loha": tuned("LoHaConfig", r=4),
    "lokr": tuned("LoKrConfig", r=4),
    "miss": tuned("MissConfig", r=4),
    "miss_bat": tuned("MissConfig", r=4, init_weights="bat"),
    "miss_mini": tuned("MissConfig", r=4, init_weights="mini", mini_r=4),
    "oft": tuned("OFTConfig", oft_block_size=8),
    "osf": tuned("OSFConfig"),
    "p_tuning": prompted("PromptEncoderConfig", encoder_hidden_size=16),
    "peanut": tuned("PeanutConfig", r=4),
    "poly": tuned("PolyConfig", r=4, n_tasks=2, rows={"task_ids": 1}, micro=True, callbacks=reseeded, **CAUSAL),
    "prefix": prompted("PrefixTuningConfig"),
    "prefix_mlp": prompted("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=16),
    "prompt": prompted("PromptTuningConfig"),
    "multitask_prompt": Method(
        "MultitaskPromptTuningConfig", rows={"task_ids": 0}, num_virtual_tokens=4, num_tasks=2, **CAUSAL
    ),
    "psoft": tuned("PsoftConfig", r=8),
    "road": tuned("RoadConfig", group_size=16),
    "shadow": Method("ShadowConfig", _shadow, even=True),
    "shira": tuned("ShiraConfig", r=4),
    "supertuning": tuned("SupertuningConfig", sparsity=0.9, r=2),
    "trainable_tokens": Method("TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[1, 2, 3]),
    "waveft": tuned("WaveFTConfig", n_frequency=64),
    "xlora": Method("XLoraConfig", _xlora),
    "adaption_prompt": Method("AdaptionPromptConfig", _adaption_prompt),
    "two_adapters": Method("LoraConfig", _two_adapters),
    "mixed": Method("LoHaConfig", _mixed, save=_save_mixed),
}


def _on(name: str, config: str, **settings: Any) -> Method:
    return tuned(config, architecture=ARCHITECTURES[name], **settings)


_VERA: dict[str, Any] = {"r": 8, "projection_prng_key": 1, "d_initial": 0.1}
_LANGUAGE = r".*language_model.*\.(q_proj|o_proj)"

ON_ARCHITECTURES: dict[str, Method] = {
    "llama_tied lora": _on("llama_tied", "LoraConfig", r=4),
    "llama_tied vera": _on("llama_tied", "VeraConfig", **_VERA),
    "llama_tied lora_tokens": _on("llama_tied", "LoraConfig", r=4, trainable_token_indices={"embed_tokens": [1, 2, 3]}),
    "llama_tied lora_embedding": _on("llama_tied", "LoraConfig", r=4, target_modules=["embed_tokens", "q_proj"]),
    "llama_tied prompt": prompted("PromptTuningConfig", architecture=ARCHITECTURES["llama_tied"]),
    "gpt2 lora": _on("gpt2", "LoraConfig", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "gpt2 vera": _on("gpt2", "VeraConfig", **_VERA, target_modules=["c_attn"], fan_in_fan_out=True),
    "gpt2 ia3": _on("gpt2", "IA3Config", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    "bert lora": _on("bert", "LoraConfig", r=4, target_modules=["query", "value"], task_type="SEQ_CLS"),
    "bert vera": _on("bert", "VeraConfig", **_VERA, target_modules=["query", "value"], modules_to_save=["classifier"]),
    "t5 lora": _on("t5", "LoraConfig", r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
    "t5 vera": _on("t5", "VeraConfig", **_VERA, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
    "t5 prefix": Method(
        "PrefixTuningConfig", num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM", architecture=ARCHITECTURES["t5"]
    ),
    "mixtral lora": _on("mixtral", "LoraConfig", r=4),
    "mixtral vera": _on("mixtral", "VeraConfig", **_VERA),
    "mixtral lora_experts": _on(
        "mixtral", "LoraConfig", r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "qwen_moe lora_experts": _on("qwen_moe", "LoraConfig", r=4, target_parameters=["mlp.experts.down_proj"]),
    "vit lora": _on("vit", "LoraConfig", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    "vit vera": _on("vit", "VeraConfig", **_VERA, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    "llava lora": _on("llava", "LoraConfig", r=4, target_modules=_LANGUAGE),
    "llava vera": _on("llava", "VeraConfig", **_VERA, target_modules=_LANGUAGE),
}
"""Methods on other architectures."""

METHODS = {**ON_LLAMA, **ON_ARCHITECTURES}
