"""PEFT models on these kernels, and adapters in PEFT's file format. PEFT is imported only when it is used."""

from .acceleration import AccelerationReport, accelerate, accelerated, restore
from .adapters import load_adapter, save_adapter

__all__ = ["AccelerationReport", "accelerate", "accelerated", "load_adapter", "restore", "save_adapter"]
