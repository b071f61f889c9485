"""The experts implementation "lora_kernels" of transformers. transformers is imported only when it is used."""

IMPLEMENTATION = "lora_kernels"


def register_experts() -> None:
    """Let transformers know the experts implementation "lora_kernels".

    `from_pretrained(…, experts_implementation="lora_kernels")` and `model.set_experts_implementation("lora_kernels")` then
    compute a mixture's experts by `lora_grouped_linear`, trained weights included; rows are sorted once a layer. Experts with
    adapters of `add_lora` or of an accelerated PEFT model need it not. Raises ImportError for a transformers before 5.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from ..layers.experts import experts_forward

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
