"""What the help of each command ends with: command lines to start from. tests/test_cli_help.py parses them all."""

EXAMPLES = {
    "demo": (
        "lora-kernels demo",
        "lora-kernels demo --quantize nf4 --steps 100 --output run",
        "lora-kernels demo --model DIR --text book.txt --variant dora",
    ),
    "bench": (
        "lora-kernels bench --shape 4096x14336 --tokens 8192 --rank 16",
        "lora-kernels bench --suite decoder --compare peft,unsloth-style",
        "lora-kernels bench --model DIR --quantize nf4 --html page.html",
    ),
    "tune": ("lora-kernels tune", "lora-kernels tune --quick --json tuning.json"),
    "report": ("lora-kernels report", "lora-kernels report --kernels --target sm_90 --dtypes 'bf16 fp32'"),
    "memory": (
        "lora-kernels memory --size 8b",
        "lora-kernels memory --model DIR --rank 64 --target 'q_proj|v_proj'",
        "lora-kernels memory --shape 4096x14336:32 --tokens 2048 --json -",
    ),
    "convert": (
        "lora-kernels convert adapter pixel.safetensors --format kohya",
        "lora-kernels convert pixel.safetensors adapter --format peft --model DIR",
    ),
    "merge": (
        "lora-kernels merge one two --output both --format peft",
        "lora-kernels merge a.safetensors b.safetensors --weight 0.7 --weight 0.3 --output c.safetensors --format diffusers",
    ),
}
CODES = {
    0: "done",
    1: "something failed: a wrong result, a full disk, too little memory",
    2: "bad input, which the line on stderr names",
    130: "interrupted",
}


def epilog(*lines: str) -> str:
    """For typer, which makes a line of each paragraph."""
    return "\n\n".join(lines)


def of_command(name: str) -> str:
    """Its examples."""
    return epilog("Examples:", *EXAMPLES[name])


def of_all() -> str:
    """The exit codes."""
    codes = [f"{code} {meaning}" for code, meaning in CODES.items()]
    return epilog(f"Exit codes: {'; '.join(codes)}.", "lora-kernels COMMAND --help has examples.")
