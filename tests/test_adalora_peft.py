"""PEFT's AdaLoRA layers accelerated: PEFT's numbers by the one rule, fast calls counted, its allocator and files as before."""

import copy
from dataclasses import dataclass

import pytest
import torch
from adalora_case import X, close, model, peft
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners import adalora
from peft_case import FAST, Layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import accelerate, accelerated, restore
from lora_kernels.integrations.peft import linear

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@dataclass
class AdaLayer(Layer):
    def build(self):
        base = Conv1D(self.N, self.K) if self.conv1d else nn.Linear(self.K, self.N, bias=self.bias)
        nn.init.normal_(base.weight, std=self.K**-0.5)
        config = AdaLoraConfig(
            target_modules=["0"],
            init_r=4,
            target_r=2,
            total_step=9,
            lora_alpha=6,
            lora_dropout=self.lora_dropout,
            fan_in_fan_out=self.conv1d,
        )
        made = get_peft_model(nn.Sequential(base).to(self.dtype), config, autocast_adapter_dtype=self.autocast_adapter_dtype)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=1.0 if "lora_E" in name else 0.3)
        return made


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_dtypes_with_fp32_adapters_over_a_16_bit_base(dtype, lora_dropout):
    AdaLayer(dtype=dtype, lora_dropout=lora_dropout).check()


@pytest.mark.parametrize(
    "options",
    [
        {"conv1d": True},
        {"conv1d": True, "dtype": BF16, "lora_dropout": 0.4},
        {"bias": False, "shape": ()},
        {"autocast": BF16},
        {"autocast": BF16, "dtype": BF16},
        {"autocast_adapter_dtype": False, "dtype": BF16},
    ],
    ids=str,
)
def test_other_layers(options):
    AdaLayer(**options).check()


@pytest.mark.parametrize("mistake", ["no E", "alpha over r"])
def test_mistakes_break_the_rule(mistake, monkeypatch):
    right = linear.fast_parts

    def wrong(layer):
        parts = right(layer)
        A = parts.lora_A.weight
        other = A * (4 + 1e-5) / 4 if mistake == "alpha over r" else layer.lora_A["default"] * 1.5 + 0 * A
        return parts._replace(lora_A=type(parts.lora_A)(other))

    monkeypatch.setattr(linear, "fast_parts", wrong)
    with pytest.raises(AssertionError):
        AdaLayer(dtype=FP64).check()


def test_a_run_of_peft_s_allocator_goes_on_as_before():
    plain = peft()
    ours = copy.deepcopy(plain)
    before, keys = dict(ours.named_parameters()), list(ours.state_dict())
    report = accelerate(ours)
    assert report.accelerated == [f"base_model.model.{name}" for name in ("up", "down", "out")]
    assert all(parameter is before[name] for name, parameter in ours.named_parameters())
    assert list(ours.state_dict()) == keys
    assert repr(ours.base_model.model.up).startswith("adalora.SVDLinear(")
    for made in (plain, ours):
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.2)
        for number in range(20):
            torch.manual_seed(number)
            made(torch.randn(9, 12)).sub(1).square().mean().backward()
            optimizer.step()
            made.base_model.update_and_allocate(number)
            optimizer.zero_grad()
    assert ours.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern
    for name, parameter in plain.named_parameters():
        close(before[name], parameter)
    close(ours(X), plain(X))
    assert report.calls() == {FAST: 63}
    restore(ours)
    assert type(ours.base_model.model.up) is adalora.SVDLinear
    close(ours(X), plain(X))


@pytest.mark.filterwarnings("ignore:The following rank_pattern", "ignore:Adapter 'default'.*invalid shape")
def test_files_with_rank_pattern_and_merging(tmp_path):
    made = peft(init_lora_weights=False)
    accelerate(made)
    pattern = {f"{name}.lora_E": [True, False, True, True] for name in ("up", "down")} | {"out.lora_E": [False] * 4}
    with torch.no_grad():
        for key, keep in pattern.items():
            made.base_model.model.get_submodule(key.removesuffix(".lora_E")).lora_E["default"][~torch.tensor(keep)] = 0
    made.peft_config["default"].rank_pattern = pattern
    made.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path)
    report = accelerate(loaded)
    close(loaded(X), made(X))
    assert report.calls()[FAST] == 2
    assert sum(report.calls().values()) == 3, "the layer without ranks is PEFT's"
    made.merge_adapter()
    calls = accelerate(made)
    close(made(X), loaded(X))
    assert calls.calls()["adapters are merged"] == 3
    made.unmerge_adapter()
    close(made(X), loaded(X))


def test_factors_on_the_meta_device_where_ranknum_is_not():
    """As while PEFT loads a file with low_cpu_mem_usage."""
    made = peft()
    for name in ("lora_A", "lora_B", "lora_E"):
        getattr(made.base_model.model.up, name).to("meta")
    assert accelerate(made).falling_back == {"base_model.model.up": "tensors on different devices"}


def test_what_falls_back():
    plain = peft(init_lora_weights=False, lora_dropout=0.2).eval()
    plain.add_adapter("other", AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["up"], inference_mode=True))
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    close(ours(X), plain(X))
    for made in (plain, ours):
        made.base_model.set_adapter(["default", "other"], inference_mode=True)
    close(ours(X), plain(X))
    with ours.disable_adapter(), plain.disable_adapter():
        close(ours(X), plain(X))
    assert report.calls() == {FAST: 5, "several active adapters": 1, "adapters are disabled": 3}
    ours.base_model.set_adapter("default")
    ours.base_model.model.up.base_layer.register_forward_hook(lambda *args: None)
    ours(X)
    assert report.calls()["base has hooks"] == 1


def test_other_layers_of_adalora_are_named():
    base = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    made = get_peft_model(base, AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0", "2"]))
    report = accelerate(made)
    assert report.accelerated == ["base_model.model.2"]
    assert report.skipped["base_model.model.0"].startswith("a adalora.SVDConv2d; lora.Linear and adalora.SVDLinear")


def test_torch_compile_in_one_graph():
    made = peft(init_lora_weights=False).eval()
    accelerate(made)
    close(torch.compile(made, fullgraph=True, backend="aot_eager")(X), made(X))


def test_accelerated_is_not_for_its_configuration():
    with pytest.raises(TypeError, match=r"got AdaLoraConfig, expected a peft\.LoraConfig; call accelerate\(model\) after"):
        accelerated(AdaLoraConfig(total_step=9))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_over_bitsandbytes_4_bit(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bnb.nn.Linear4bit(64, 96, compute_dtype=dtype, quant_type="nf4")).to("cpu")
    base.is_loaded_in_4bit = True
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0"])
    plain = get_peft_model(base, config)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=1.0 if "lora_E" in name else 0.3)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    assert type(plain.base_model.model[0]).__name__ == "SVDLinear4bit"
    x, dy = torch.randn(5, 64).to(dtype), torch.randn(5, 96).to(dtype)
    found = []
    for made in (ours, plain):
        trained = [p for p in made.parameters() if p.requires_grad]
        y = made(x)
        found.append([y, *torch.autograd.grad(y, trained, dy)])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == FP32 else {"rtol": 2e-2, "atol": 0.1}
    for own, theirs in zip(*found, strict=True):
        assert own.dtype == theirs.dtype
        torch.testing.assert_close(own, theirs, **tolerance)
    assert report.calls() == {FAST: 1}
    restore(ours)
    assert type(ours.base_model.model[0]) is type(plain.base_model.model[0])
