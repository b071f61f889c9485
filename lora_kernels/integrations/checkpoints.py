"""transformers' Trainer, and those derived from it, with checkpoints that hold adapters in place of the whole model."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers.linear import DEFAULT_ADAPTER
from ..models.adapter_config import to_peft
from ..models.adapter_files import load_adapter
from ..models.adapter_saving import CONFIG_FILE, remove_adapter, save_adapter
from ..models.atomic_files import all_or_nothing, settle
from ..models.export import merged_tensors
from ..models.parameters import lora_parameters
from ..models.state import adapted_layers, lora_layers, lora_state
from ..models.wrappers import unwrapped

if TYPE_CHECKING:
    from transformers import Trainer

CURE = "name their modules in modules_to_save, or freeze them"


def adapter_checkpoints(trainer: "Trainer") -> None:
    """Let the checkpoints of `trainer`, and its `save_model`, hold the adapters that add_lora gave its model, in PEFT's files,
    in place of the model; optimizer, scheduler and random states as always. Call it before `trainer.train()`.

    `train(resume_from_checkpoint=…)` and `load_best_model_at_end` read them, and checkpoints of whole models from before. The
    model has to be made as it was: the same base, quantisation and adapters. For any Trainer: it gets a class of the same name
    that overrides how a model is saved and loaded.
    Raises TypeError for what is no Trainer, and ValueError for a model without LoRA layers, an adapter that PEFT's format
    cannot say, trained parameters that are no adapter's, and FSDP or DeepSpeed, whose checkpoints are their own.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer: got {type(trainer).__name__}, expected a transformers.Trainer")
    model: Any = trainer.model
    adapted_layers(model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "trainer: got one under FSDP or DeepSpeed, whose checkpoints hold their own shards of the whole model; "
            "call save_adapter after training"
        )
    for name, config in lora_state(model).configs.items():
        to_peft(model, config, name)  # raises now, not hours later
    if lost := _no_adapter_s(model):
        raise ValueError(f"trainer: its model {lost}, and would not be in its checkpoints; {CURE}")
    if not isinstance(trainer, AdapterCheckpoints):
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (AdapterCheckpoints, kind), {"__module__": kind.__module__})


class AdapterCheckpoints:
    """What Trainer does with the model of a checkpoint, done with its adapters; with the whole model where that is more: it is
    merged, its adapters were removed, or something else was thawed meanwhile, for which an error would cost the training.
    """

    def _save(self: Any, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        from transformers.trainer import TRAINING_ARGS_NAME

        directory = Path(self.args.output_dir if output_dir is None else output_dir)
        layers = lora_layers(self.model).values()
        merged, lost = any(layer.merged for layer in layers), _no_adapter_s(self.model) if layers else None
        if not layers or merged or lost:
            if lost and not merged:
                warnings.warn(f"{directory} holds the whole model, not its adapters alone: it {lost}; {CURE}", stacklevel=2)
            if merged and not hasattr(unwrapped(self.model), "save_pretrained"):
                state_dict = dict(merged_tensors(self.model))
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            remove_adapter(directory)  # of an earlier call, which from_pretrained would put on top
            return
        directory.mkdir(parents=True, exist_ok=True)
        for name in lora_state(self.model).configs:
            save_adapter(self.model, directory, name)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(directory)
        arguments = io.BytesIO()  # torch.save does not say what the disk refuses
        torch.save(self.args, arguments)
        with all_or_nothing(directory) as folder:
            (folder / TRAINING_ARGS_NAME).write_bytes(arguments.getvalue())

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not _load_adapters(self.model if model is None else model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self: Any) -> None:
        if not _load_adapters(self.model, Path(self.state.best_model_checkpoint)):
            super()._load_best_model()  # type: ignore[misc]


def _no_adapter_s(model: nn.Module) -> str | None:
    """What `model` trains beside its adapters, in words."""
    own = {id(parameter) for parameter in lora_parameters(model)}
    lost = [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in own]
    return f"trains {len(lost)} parameters that are no adapter's, such as {lost[0]!r}" if lost else None


def _load_adapters(model: nn.Module, directory: Path) -> bool:
    """Read all adapters of `model` from a checkpoint; False if it holds a whole model, or nothing. Raises ValueError if the
    adapters in it are others.
    """
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    expected = lora_state(model).configs.keys()
    for folder in (directory, *(directory / name for name in expected)):
        settle(folder)
    saved = {file.parent.name for file in directory.glob(f"*/{CONFIG_FILE}")}
    others = (f"{PREFIX_CHECKPOINT_DIR}-", ".")  # in output_dir, and of a save that was killed
    saved = {name for name in saved if name in expected or not name.startswith(others)}
    saved |= {DEFAULT_ADAPTER} if (directory / CONFIG_FILE).is_file() else set()
    if not saved or any(directory.glob("model*.safetensors*")):  # SavePretrained puts adapters beside a whole model
        return False
    if saved != expected:
        raise ValueError(f"{directory}: has the adapters {sorted(saved)}, expected those of this model, {sorted(expected)}")
    for name in saved:
        load_adapter(model, directory, name)
    return True
