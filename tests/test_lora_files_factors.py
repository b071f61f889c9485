"""Factors of one module: Tucker's middle, DoRA's and LoCon's shapes, and which rows of a fused weight are whose."""

import pytest
import torch
from lora_files_case import FUSED, adapted, close, flux, fused, linear_paths, output, saved, unet
from torch import nn
from torch.nn import functional as F

from lora_kernels import LoRAConfig, add_lora, load_adapter
from lora_kernels.models.lora_files import foreign_names
from lora_kernels.models.lora_files.adapters import fitted, tensors_of
from lora_kernels.models.lora_files.factors import modules_of
from lora_kernels.models.lora_files.loading import factors_by_part, read_lora_file
from lora_kernels.models.lora_files.parts import parts_of

ONE = "lora_unet_conv_in"


def placed(tmp_path, tensors, model):
    """The factors of a file by path in a model."""
    file = saved(tmp_path / "lora.safetensors", tensors)
    return next(iter(factors_by_part(file, read_lora_file(file), parts_of(model), None).values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_tucker_s_middle_is_folded_into_down(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    down, mid, up = (torch.randn(shape).to(dtype) for shape in ((3, 4, 1, 1), (3, 3, 3, 3), (8, 3, 1, 1)))
    names = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    (factors,) = modules_of({f"{ONE}.{end}": tensor for end, tensor in names.items()}).values()
    truth = F.conv2d(F.conv2d(F.conv2d(x, down.double()), mid.double(), padding=1), up.double())
    ours = F.conv2d(F.conv2d(x, factors.A.double(), padding=1), factors.B.double())
    error = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, truth, rtol=error, atol=error * truth.abs().max())
    assert (factors.A.dtype, factors.r, factors.alpha) == (torch.promote_types(dtype, torch.float32), 3, 2.0)


def test_locon_s_shapes_are_a_convolution_s_and_a_linear_layer_s(tmp_path):
    """Linear layers' files have 1 × 1 convolutions where the model was made without use_linear_projection, and the reverse."""
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "pixels": nn.Conv2d(4, 8, 1), "linear": nn.Linear(4, 8)})
    shapes = {"conv": ((2, 4, 3, 3), (8, 2, 1, 1)), "pixels": ((2, 4), (8, 2)), "linear": ((2, 4, 1, 1), (8, 2, 1, 1))}
    tensors = {}
    for name, pair in shapes.items():
        tensors |= {f"lora_unet_{name}.lora_{end}.weight": torch.randn(pair[end == "up"]) for end in ("down", "up")}
    factors = placed(tmp_path, tensors, model)
    assert {path: (tuple(each.A.shape), each.alpha) for path, each in factors.items()} == {
        "conv": ((2, 4, 3, 3), 2),
        "pixels": ((2, 4), 2),
        "linear": ((2, 4, 1, 1), 2),
    }
    like = {"linear": ((2, 4), (8, 2)), "pixels": ((2, 4, 1, 1), (8, 2, 1, 1)), "conv": ((2, 4, 3, 3), (8, 2, 1, 1))}
    for path, (A, B) in like.items():
        own = tensors_of({path: factors[path]})
        expected = {key: torch.empty(A if "lora_A" in key else B) for key in own}
        assert [tuple(tensor.shape) for tensor in fitted(own, expected).values()] == [A, B]
    with pytest.raises(ValueError, match=r"'lora_unet_conv.lora_down.weight' is \[2, 4, 1, 1\]"):
        placed(tmp_path, tensors | {"lora_unet_conv.lora_down.weight": torch.randn(2, 4, 1, 1)}, model)


def test_a_linear_layer_takes_pixels_factors(tmp_path):
    base, ours = unet(), unet()
    (path,) = linear_paths(base, "mid_block.attentions.0.proj_in")
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": A[..., None, None]}
    tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = B[..., None, None]
    load_adapter(ours, saved(tmp_path / "lora.safetensors", tensors))
    close(output(ours), output(adapted(base, {path: (A, B, 2.0)})))


@pytest.mark.parametrize("shape", [(16, 1), (16,), (16, 1, 1, 1)])
def test_dora_s_scale_is_the_magnitude(tmp_path, shape):
    """W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖ by rows."""
    base, ours = unet(), unet()
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    A, B, m = torch.randn(2, 16), torch.randn(16, 2), torch.rand(16) + 1
    tensors = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(1.0), "dora_scale": m.view(shape)}
    name = path.replace(".", "_")
    file = saved(tmp_path / "lora.safetensors", {f"lora_unet_{name}.{end}": tensor for end, tensor in tensors.items()})
    assert load_adapter(ours, file).config.use_dora
    weight = base.get_submodule(path).weight
    with torch.no_grad():
        W = weight.double() + 0.5 * B.double() @ A.double()
        weight.copy_(m.double()[:, None] * W / W.norm(dim=1, keepdim=True))
    close(output(ours), output(base))
    assert (output(unet()) - output(base)).abs().max() > 1e-3


def test_fused_magnitudes_are_split_as_the_rows_are(tmp_path):
    """diffusers drops them; the rows are known from what it does with up."""
    base, ours = flux(), flux()
    name, paths = next(iter(FUSED.items()))
    tensors, made = fused(base, {name: paths}, "lora_unet_")
    m = torch.rand(48) + 1
    load_adapter(ours, saved(tmp_path / "lora.safetensors", tensors | {f"lora_unet_{name}.dora_scale": m[:, None]}))
    for path, part in zip(paths, m.split(16), strict=True):
        assert torch.equal(ours.get_submodule(path).lora_magnitude["default"], part)
        assert torch.equal(ours.get_submodule(path).lora_B["default"], made[path][1])


def test_a_converter_that_loses_rows_is_noticed(tmp_path, monkeypatch):
    """A mutant of the check that every row is somewhere."""
    base = flux()
    tensors, _ = fused(base, {name: FUSED[name] for name in ("double_blocks_0_img_attn_qkv",)}, "lora_unet_")
    file = saved(tmp_path / "lora.safetensors", tensors)
    original = foreign_names._converter

    def losing(*arguments):
        convert = original(*arguments)
        return lambda asked: {key: rows for key, rows in convert(asked).items() if "to_v" not in key}

    monkeypatch.setattr(foreign_names, "_converter", losing)
    with pytest.raises(ValueError, match=r"'lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight': no module of Flux"):
        load_adapter(base, file)


def test_names_that_end_alike_are_told_apart(tmp_path):
    """proj_out is a layer of FLUX, and the end of others' paths."""
    ours = flux()
    tensors = {"transformer.proj_out.lora_A.weight": torch.ones(2, 16), "transformer.proj_out.lora_B.weight": torch.ones(4, 2)}
    assert list(load_adapter(ours, saved(tmp_path / "lora.safetensors", tensors)).adapted) == ["proj_out"]
    add_lora(ours, LoRAConfig(target_modules=["to_q"]), "other")
    load_adapter(ours, tmp_path / "lora.safetensors")  # again, into the adapter that is there
    assert torch.equal(ours.proj_out.lora_B["default"], torch.ones(4, 2))
