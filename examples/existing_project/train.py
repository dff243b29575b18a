"""A project that trained before: two lines are new, and they come first.

accelerate launch --config_file examples/existing_project/fsdp.yaml examples/existing_project/train.py
"""

import trainer_fsdp_patch  # new

trainer_fsdp_patch.patch()  # new

from model import build, rows
from transformers import Trainer, TrainingArguments


def main() -> None:
    """What the project did, unchanged."""
    arguments = TrainingArguments("out", max_steps=4, learning_rate=1e-2, report_to=[], save_strategy="no")
    trainer = Trainer(model=build(), args=arguments, train_dataset=rows())
    trainer.train()
    trainer.save_model("adapter")


if __name__ == "__main__":
    main()
