"""PEFT models on these kernels. PEFT is imported only when it is used."""

from .acceleration import AccelerationReport, accelerate, accelerated, restore

__all__ = ["AccelerationReport", "accelerate", "accelerated", "restore"]
