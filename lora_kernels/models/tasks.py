"""PEFT's task types: which one a transformers model is for, and the head that is trained whole with some of them."""

from dataclasses import replace

from torch import nn

from .config import LoRAConfig
from .names import trained_whole
from .wrappers import named_modules

# By task type, the table of transformers in which the classes for it are, and the heads that PEFT trains and saves with it.
TABLES = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def with_head(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """config with the heads of its task, as far as `model` has them, in modules_to_save."""
    named = config.modules_to_save or []
    heads = [name for name in HEADS.get(config.task_type or "", []) if name not in named and _has(model, name)]
    return replace(config, modules_to_save=[*named, *heads]) if heads else config


def saved_task(model: nn.Module, config: LoRAConfig) -> dict[str, str | dict[str, str] | None]:
    """task_type and auto_mapping as PEFT writes them; without a task type, its AutoPeftModels make the class in auto_mapping.

    The task type is config's, or that of the model's class in transformers; none if the adapter lacks the head of the task,
    without which PEFT cannot read the adapter of one.
    """
    task = config.task_type or _task_of(model)
    if task is not None and with_head(model, replace(config, task_type=task)).modules_to_save == config.modules_to_save:
        return {"task_type": task, "auto_mapping": None}
    # fully_shard puts a class of its own before it
    kind = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    return {"task_type": None, "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}


def _has(model: nn.Module, name: str) -> bool:
    return any(path and trained_whole(path, [name]) for path, _ in named_modules(model))


def _task_of(model: nn.Module) -> str | None:
    classes = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    if not classes:
        return None
    from transformers.models.auto import modeling_auto

    tables = {task: set(getattr(modeling_auto, table).values()) for task, table in TABLES.items()}
    return next((task for name in classes for task, table in tables.items() if name in table), None)
