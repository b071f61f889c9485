"""lora_conv2d: every option against float64 under the one rule, what it saves, its mask, and what it refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conv2d_accuracy import broken
from torch import Tensor

from lora_kernels import dropout_mask, lora_conv2d, quantize_nf4
from lora_kernels.cases.conv2d import Case
from lora_kernels.mask import keep_scale

BF16, FP16, FP32, FP64 = DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WINDOWS = {
    "3x3": {},
    "strided": {"stride": 2},
    "uneven": {"kernel": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "same": {"padding": "same", "dilation": 2},
    "same, more below": {"kernel": (2, 4), "padding": "same"},
    "1x1": {"kernel": (1, 1), "padding": 0},
    "1x1, strided": {"kernel": (1, 1), "padding": 0, "stride": 2},
    "1x1, padded": {"kernel": (1, 1)},
}
DROPOUTS = {"none": {}, "of x": {"p": 0.3}, "of h": {"p": 0.3, "position": "h"}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_rule(window, dropout, dtype, device):
    for channels_last in (False, True):
        case = Case(**WINDOWS[window], **DROPOUTS[dropout], dtype=dtype, channels_last=channels_last, device=device)
        assert not (lines := broken(case)), (channels_last, lines)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("needs", ["", "x", "AB", "A", "B", "W", "xc", "xB"])
def test_frozen_parts(needs, channels_last, device):
    for dropout in DROPOUTS.values():
        assert not (lines := broken(Case(**dropout, needs=tuple(needs), channels_last=channels_last, device=device))), lines


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_wide_adapters_over_a_narrow_base_and_autocast(dtype, dropout, device):
    for channels_last, kernel in itertools.product((False, True), ((3, 3), (1, 1))):
        own = {**DROPOUTS[dropout], "channels_last": channels_last, "kernel": kernel, "padding": "same", "device": device}
        assert not (lines := broken(Case(dtype=dtype, adapter_dtype=FP32, **own))), lines
    if dtype == BF16:
        assert not (lines := broken(Case(autocast=dtype, **own))), lines


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_of_a_wider_bias_is_not_rounded_to_bfloat16(autocast, device):
    x, W, A, B = (torch.ones(shape, device=device) for shape in ((1, 3, 1, 257), (4, 3, 3, 3), (2, 3, 3, 3), (4, 2, 1, 1)))
    c = torch.zeros(4, device=device, requires_grad=True)
    with torch.autocast(device.type, BF16, enabled=autocast):
        y = lora_conv2d(x if autocast else x.bfloat16(), W if autocast else W.bfloat16(), A, B, c, padding=1)
    (dc,) = torch.autograd.grad(y.sum(), c)
    assert dc.tolist() == [257.0] * 4


@pytest.mark.parametrize("n", [0, 1, 5])
def test_sizes_and_chunks(n, device, monkeypatch):
    """Parts of samples, of lines, and a scaling and a bias of another kind."""
    for elements in (1 << 20, 40, 200):
        for module in ("mask", "backends.torch.conv2d"):
            monkeypatch.setattr(f"lora_kernels.{module}.chunk_elements", lambda device, elements=elements: elements)
        for channels_last, dtype in itertools.product((False, True), (FP32, BF16)):
            s = torch.tensor(0.3, device=device)
            own = {"n": n, "scaling": s, "bias": False, "needs": ("x", "A", "B"), "channels_last": channels_last}
            case = Case(p=0.4, dtype=dtype, adapter_dtype=FP32, device=device, **own)
            assert not (lines := broken(case)), (elements, lines)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_planes_so_large_that_their_masks_are_turned(dtype, device):
    case = Case(n=2, C=3, N=4, R=2, size=(32, 33), p=0.3, dtype=dtype, device=device)
    assert not (lines := broken(case)), lines


def test_the_mask_is_the_package_s_by_sample_line_column_and_channel(device):
    """An A of ones for one channel tells which of its pixels are kept."""
    n, C, height, width, p, seed = 2, 5, 3, 4, 0.4, 11
    x, W = torch.ones(n, C, height, width, device=device), torch.zeros(1, C, 1, 1, device=device)
    keep = dropout_mask(n * height * width, C, p, seed, device=device).view(n, height, width, C).permute(0, 3, 1, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for channel in range(C):
            A, B = torch.zeros(1, C, 1, 1, device=device), torch.ones(1, 1, 1, 1, device=device)
            A[0, channel] = 1
            y = lora_conv2d(x.contiguous(memory_format=memory_format), W, A, B, dropout_p=p, seed=seed)
            assert torch.equal(y[:, 0], keep[:, channel] * keep_scale(p))
    A = torch.ones(C, 1, 1, 1, device=device)
    y = lora_conv2d(x[:, :1], W[:, :1], A, torch.ones(1, C, 1, 1, device=device), dropout_p=p, seed=seed, dropout_position="h")
    torch.testing.assert_close(y[:, 0], keep.sum(1) * keep_scale(p))


@pytest.mark.parametrize("position", ["x", "h"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_saves_x_h_and_a_seed(channels_last, position, device):
    problem = Case(p=0.3, position=position, channels_last=channels_last, needs=("x", "A", "B"), device=device).draw()
    x, W, A, B, c = problem.tensors.values()
    own, saved = {t.data_ptr() for t in (W, A, B)}, {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_conv2d(x, W, A, B, c, padding=1, dropout_p=0.3, dropout_position=position)
    rest = [t for address, t in saved.items() if address not in own | {x.data_ptr()}]
    assert x.data_ptr() in saved
    assert sorted(t.numel() for t in rest) == [1, y[:, :1].numel() * A.shape[0]]


def test_a_channels_last_1x1_is_a_linear_layer_without_a_copy(device):
    problem = Case(kernel=(1, 1), padding=0, channels_last=True, device=device).draw()
    x, W, A, B, c = problem.tensors.values()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        y = lora_conv2d(x, W, A, B, c)
    assert "OperationFunction" in type(y.grad_fn.next_functions[0][0].next_functions[0][0]).__name__
    assert x.data_ptr() in seen
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dx_of_a_channels_last_weight_lies_in_memory_as_a_convolution_s(layout, device):
    """The weight that W and the adapter are summed up in, for it, is channels-last too."""
    x, W, A, B = (torch.ones(shape, device=device) for shape in ((2, 4, 6, 6), (5, 4, 3, 3), (2, 4, 3, 3), (5, 2, 1, 1)))
    x, W = x.to(memory_format=layout).requires_grad_(), W.to(memory_format=torch.channels_last)
    y, plain = lora_conv2d(x, W, A, B, padding=1), F.conv2d(x, W, padding=1)
    assert torch.autograd.grad(y.sum(), x)[0].stride() == torch.autograd.grad(plain.sum(), x)[0].stride()


def test_compiled_as_one_graph(device):
    problem = Case(p=0.3, needs=("x", "A", "B"), device=device).draw()
    seed = torch.tensor(3, device=device)

    def layer(*tensors):
        return lora_conv2d(*tensors, padding=1, dropout_p=0.3, seed=seed)

    own, compiled = problem.compute(layer), problem.compute(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for name, value in own.items():
        torch.testing.assert_close(compiled[name], value)


def test_no_second_derivative(device):
    x, W, A, B, c = Case(device=device).draw().tensors.values()
    (dx,) = torch.autograd.grad(lora_conv2d(x, W, A, B, c).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_checkpointing_computes_the_same_mask_again(device):
    x, W, A, B, c = Case(device=device).draw().tensors.values()
    found = []
    for again in (False, True):
        torch.manual_seed(4)
        layer = lambda x: lora_conv2d(x, W, A, B, c, dropout_p=0.4)  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        found.append(torch.autograd.grad(y.sum(), (x, A, B)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


REFUSED = {
    "groups": (("x", (1, 8, 9, 9)), ValueError, "x: got 8 channels, expected 4 .* groups is 1 here"),
    "channels": (("x", (1, 3, 9, 9)), ValueError, "x: got 3 channels, expected 4 for weight"),
    "x": (("x", (4, 9, 9)), ValueError, r"x: got shape \(4, 9, 9\), expected four dimensions \[n, C, H, W\]"),
    "small": (("x", (1, 4, 2, 9)), ValueError, "expected a padded height of at least 3"),
    "A": (("lora_A", (2, 4, 1, 1)), ValueError, r"lora_A: got shape \(2, 4, 1, 1\), expected \(2, 4, 3, 3\)"),
    "B": (("lora_B", (5, 3, 1, 1)), ValueError, r"lora_B: got shape \(5, 3, 1, 1\), expected \(5, 2, 1, 1\)"),
    "rank 0": (("lora_A", (0, 4, 3, 3)), ValueError, "rank 0"),
    "bias": (("bias", (6,)), ValueError, r"bias: got shape \(6,\), expected \(5,\)"),
    "weight": (("weight", quantize_nf4(torch.ones(64, 64))), TypeError, "no 4-bit convolutions"),
    "stride": (("stride", 0), ValueError, "stride: got 0, expected an integer of at least 1"),
    "pair": (("dilation", (1, 2, 3)), ValueError, r"dilation: got \(1, 2, 3\)"),
    "padding": (("padding", "reflect"), ValueError, "padding: got 'reflect', expected numbers, 'valid' or 'same'"),
    "position": (("dropout_position", "y"), ValueError, "dropout_position: got 'y', expected 'x' or 'h'"),
    "p": (("dropout_p", 1.5), ValueError, "dropout_p: got 1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    (field, value), error, message = REFUSED[name]
    shapes = {"x": (1, 4, 9, 9), "weight": (5, 4, 3, 3), "lora_A": (2, 4, 3, 3), "lora_B": (5, 2, 1, 1), "bias": (5,)}
    arguments = {key: torch.ones(shape) for key, shape in shapes.items()}
    is_shape = field in shapes and isinstance(value, tuple)
    with pytest.raises(error, match=message):
        lora_conv2d(**{**arguments, field: torch.ones(value) if is_shape else value})
    with pytest.raises(ValueError, match="stride: got 2 with padding='same'"):
        lora_conv2d(**arguments, stride=2, padding="same")


def test_everything_dropped_and_expanded_gradients(device):
    problem = Case(p=1.0, device=device).draw()
    x, W, A, B, c = problem.tensors.values()
    for position in ("x", "h"):
        y = lora_conv2d(x, W, A, B, c, padding=1, dropout_p=1.0, dropout_position=position)
        torch.testing.assert_close(y, F.conv2d(x, W, c, padding=1))
        dA, dB = torch.autograd.grad(y.sum(), (A, B))  # whose dy is expanded
        assert not dA.any()
        assert not dB.any()
