"""What must hold of an installed package, whose folder this one is not in: python tests/smoke.py

It needs nothing but the package and its dependencies, on any Python. Wheels are tested so, before they are given away.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

import lora_kernels
from lora_kernels import LoRAConfig, add_lora, cpu_extension, load_adapter, save_adapter


def base(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).to(dtype)


def train_and_save(dtype: torch.dtype, quantize: str | None) -> None:
    """The loss falls, and the adapter that is read again computes the same."""
    model, x = base(dtype), torch.randn(16, 64, dtype=dtype)
    add_lora(model, LoRAConfig(lora_dropout=0.1, target_modules="all-linear"), quantize=quantize)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    other = base(dtype)
    with tempfile.TemporaryDirectory() as folder:
        load_adapter(other, save_adapter(model, folder), quantize=quantize)
    assert torch.equal(other.eval()(x), model.eval()(x))


def main() -> None:
    """Raises AssertionError for what does not hold."""
    installed, found = version("lora_kernels"), Path(lora_kernels.__file__)
    assert Path(__file__).parents[1] != found.parents[1], f"{found} is the sources, and nothing that was installed"
    assert installed.partition("+")[0] == lora_kernels.__version__
    assert cpu_extension.extension is not None, cpu_extension.why_not
    for dtype, quantize in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "nf4")):
        train_and_save(dtype, quantize)
    cuda = "no CUDA extension"
    if "+cu" in installed:
        from lora_kernels import _C

        cuda = f"CUDA extension {_C.cuda_version}"
    print(f"lora_kernels {installed} with torch {torch.__version__}: {cpu_extension.extension.__doc__}; {cuda}")


if __name__ == "__main__":
    main()
