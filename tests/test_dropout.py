"""The mask: published Philox vectors, a plain-Python implementation of the specification, statistics, edges."""

import pytest
import torch

from lora_kernels import dropout_mask
from lora_kernels.mask import KeepRows, draw_seed, keep_scale, philox, row_chunks, threshold

# Random123's known-answer tests (kat_vectors) of philox4x32: (rounds, counter, key, result)
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN_ANSWERS = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0xA4093822, 0x299F31D0), (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
SEED = 0x0123456789ABCDEF


pytestmark = pytest.mark.usefixtures("cpu_loops")


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(rounds, counter, key, expected):
    seed = torch.tensor(signed(key[1] << 32 | key[0]))
    words = philox(tuple(map(torch.tensor, counter)), seed, seed.new_empty(6, 1), rounds)
    assert tuple(word.item() & 0xFFFFFFFF for word in words) == expected


def python_philox(counter, key, rounds=7):
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def python_keep(row, column, p, seed, offset=0):
    """The specification, word by word."""
    unsigned = seed % (1 << 64)
    words = python_philox((column // 8, row, offset & 0xFFFFFFFF, offset >> 32), (unsigned & 0xFFFFFFFF, unsigned >> 32))
    word, half = divmod(column % 8, 2)
    return (words[word] >> (16 * half) & 0xFFFF) >= round(p * 65536)


@pytest.mark.parametrize(
    ("M", "K", "p", "seed", "offset"),
    [
        (3, 16, 0.5, 0, 0),
        (5, 13, 0.1, SEED, 0),
        (2, 1, 0.5, -1, 0),
        (4, 9, 0.9, -(2**63), 2**64 - 1),
        (7, 31, 0.3, 2**63 - 1, 1 << 32),
    ],
)
def test_mask_is_the_specification(M, K, p, seed, offset, device):
    expected = [[python_keep(row, column, p, seed, offset) for column in range(K)] for row in range(M)]
    mask = dropout_mask(M, K, p, seed, offset=offset, device=device)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


@pytest.mark.parametrize("start", [0, 5, 2**31 - 2, 2**32 - 5])
def test_rows_do_not_depend_on_where_a_slice_starts(start, device):
    seed = torch.tensor(SEED, device=device)
    keep = KeepRows(21, 0.4, seed)(slice(start, start + 4))
    assert keep.tolist() == [[python_keep(start + i, k, 0.4, SEED) for k in range(21)] for i in range(4)]


def test_chunks_agree_with_one_piece(device):
    seed = torch.tensor(SEED, device=device)
    whole = KeepRows(40, 0.3, seed)(slice(0, 100)).clone()
    keep_rows = KeepRows(40, 0.3, seed)
    parts = [keep_rows(slice(start, min(start + 33, 100))).clone() for start in range(0, 100, 33)]
    assert torch.equal(torch.cat(parts), whole)
    many = dropout_mask(3000, 1111, 0.3, SEED, device=device)  # more than one chunk on a CPU
    assert len(row_chunks(3000, 1111, torch.device("cpu"))) > 1
    assert torch.equal(many[2990:], KeepRows(1111, 0.3, seed)(slice(2990, 3000)))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_statistics(p):
    """The rate within 4 sigma, and no correlation between neighbours in a row, across Philox blocks, rows, seeds, offsets."""
    n = 1024
    dropped = [
        (~dropout_mask(n, n, p, seed, offset=offset)).double() - p for seed, offset in ((1, 0), (2, 0), (1, 1), (1 << 32, 0))
    ]
    sigma = (p * (1 - p)) ** 0.5
    for values in dropped:
        assert abs(values.mean().item()) < 4 * sigma / n
    base = dropped[0]
    pairs = [(base[:, lag:], base[:, :-lag]) for lag in (1, 2, 4, 7, 8, 16)] + [(base[1:], base[:-1]), (base[8:], base[:-8])]
    pairs += [(base, other) for other in dropped[1:]]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 4.5 * sigma**2 / a.numel() ** 0.5


def test_nothing_and_everything():
    assert dropout_mask(5, 7, 0.0, SEED).all()
    assert not dropout_mask(5, 7, 1.0, SEED).any()
    assert keep_scale(0.0) == 1.0
    assert keep_scale(1.0) == 0.0
    assert keep_scale(0.1) == 65536 / (65536 - threshold(0.1))
    assert dropout_mask(0, 7, 0.5, SEED).shape == (0, 7)


def test_seed_as_tensor_and_int_agree():
    assert torch.equal(dropout_mask(9, 9, 0.5, SEED), dropout_mask(9, 9, 0.5, torch.tensor(SEED)))
    assert not torch.equal(dropout_mask(9, 9, 0.5, 1), dropout_mask(9, 9, 0.5, 2))


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_in_a_compiled_graph(p, device):
    compiled = torch.compile(lambda seed: dropout_mask(5, 21, p, seed, offset=1 << 40), fullgraph=True)
    for seed in torch.tensor([SEED, -1], device=device):
        assert torch.equal(compiled(seed), dropout_mask(5, 21, p, seed, offset=1 << 40))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"p": 1.5}, ValueError, r"p: got 1.5, expected a probability in \[0, 1\]"),
        ({"p": float("nan")}, ValueError, "p: got nan"),
        ({"seed": 1.0}, TypeError, "seed: got float"),
        ({"seed": 2**63}, ValueError, "seed: got 9223372036854775808"),
        ({"seed": torch.tensor(1.0)}, ValueError, "seed: got a torch.float32"),
        ({"offset": -1}, ValueError, "offset: got -1"),
        ({"M": 2**32 + 1}, ValueError, "M, K: got"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        dropout_mask(**{"M": 2, "K": 2, "p": 0.5, "seed": 0, **arguments})


def test_drawn_seeds_use_all_64_bits():
    """32-bit ones, sign-extended or not, would meet again after some 2^16 calls."""
    torch.manual_seed(0)
    seeds = torch.stack([draw_seed(torch.device("cpu")) for _ in range(1000)])
    for word in (seeds >> 32, seeds & 0xFFFFFFFF):
        assert word.unique().numel() >= 998  # two of a thousand meet once in 8,600 times
        for bit in range(32):
            assert 400 < (word >> bit & 1).sum() < 600
