"""PEFT models on these kernels, and adapters in PEFT's file format. PEFT is imported only when it is used."""

from .acceleration import AccelerationReport, accelerate, accelerated, restore

__all__ = ["AccelerationReport", "accelerate", "accelerated", "restore"]
