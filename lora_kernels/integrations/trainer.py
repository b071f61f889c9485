"""A callback that accelerates the PEFT model of transformers' Trainer, and of those derived from it."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .peft import AccelerationReport, accelerate


class LoRAKernelsCallback(TrainerCallback):
    """`accelerate` of the trainer's model before its first step, with the report printed once, by one process.

    Given to a Trainer's `callbacks`, it acts at the end of its constructor, where TRL has made the PeftModel and nothing is
    sharded yet, so that blocks can be fused under FSDP; added later, at the beginning of the training. Saving is unchanged.
    report: what `accelerate` returned, None before. options: those of `accelerate`. Raises ValueError as it does.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.report: AccelerationReport | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.report is None:
            self.report = accelerate(kwargs["model"], **self.options)
            if state.is_world_process_zero:
                print(self.report)

    on_init_end = on_train_begin
