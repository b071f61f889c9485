"""A plugin of Axolotl's: `plugins: [lora_kernels.integrations.axolotl.Plugin]` in its YAML file."""

from typing import Any

from axolotl.integrations.base import BasePlugin

from .trainer import LoRAKernelsCallback


class Plugin(BasePlugin):
    """Every trainer that Axolotl makes, TRL's too, gets LoRAKernelsCallback."""

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[LoRAKernelsCallback]:
        return [LoRAKernelsCallback()]
