"""lora-kernels demo --variant adalora: the ranks that are kept, the file beside PEFT, and a wrong variant."""

import json

import pytest
from test_demo import QUICK, model, run_demo, text  # noqa: F401  (fixtures)


@pytest.mark.parametrize("quantize", [(), ("--quantize", "nf4")], ids=["dense", "nf4"])
def test_the_whole_command(run_demo, model, text, tmp_path, quantize):  # noqa: F811
    if quantize:
        pytest.importorskip("bitsandbytes")
    code, out, err = run_demo("--model", model, "--text", text, *QUICK, "--variant", "adalora", *quantize, "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    held_out = list(found["held_out"].values())
    assert held_out[-1] < held_out[0]
    assert found["round_trip"]["logits_bit_equal"] is True
    assert len(found["ranks"]) == 2 * 7
    assert 0 < sum(found["ranks"].values()) <= 4 * 14 < 6 * 14
    assert f"Ranks that AdaLoRA kept: {sum(found['ranks'].values())} in 14 layers" in err
    assert "█" in err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    kept = {key.removesuffix(".lora_E"): sum(keep) for key, keep in config["rank_pattern"].items()}
    assert kept == found["ranks"]
