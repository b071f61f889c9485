"""Two gloo processes against one: gradients under DistributedDataParallel, training and adapters under FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch

from lora_kernels import load_adapter

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What rank 0 of two processes found, and the directory that they wrote to."""
    directory = tmp_path_factory.mktemp("distributed")
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "distributed_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(directory)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return torch.load(directory / "results.pt"), directory


@pytest.mark.parametrize(
    ("case", "make"), [("ddp-peft", worker.peft_model), ("ddp-own", worker.own_model), ("ddp-blocks", worker.own_model)]
)
def test_gradients_of_two_ddp_processes_are_those_of_one(results, case, make):
    found, alone = results[0][case], worker.gradients(make(), worker.tokens())
    assert found.keys() == alone.keys()
    for name, grad in alone.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_adalora_s_ranks_are_the_same_in_every_ddp_process_and_those_of_one(results):
    (ranks, parameters), (others, other_parameters) = results[0]["adalora"]
    assert ranks == others
    assert all(torch.equal(a, b) for a, b in zip(parameters, other_parameters, strict=True))
    alone, _ = worker.adalora(worker.tokens())
    assert ranks == alone != worker.adalora(worker.tokens()[:2])[0], "one process's own gradients keep others"
    assert len({tuple(step.values()) for step in ranks}) > 3, "they fall on the way"
    assert sum(ranks[-1].values()) <= 2 * len(ranks[-1]) < sum(ranks[0].values())


@pytest.mark.parametrize("case", worker.FSDP2_OPTIONS)
def test_fsdp2_trains_as_one_process_and_its_adapter_is_whole(results, case):
    found, directory = results
    options = worker.FSDP2_OPTIONS[case]
    model = worker.own_model(**options)
    losses = worker.train(model, worker.tokens())
    narrow = options.get("dtype", torch.float32) != torch.float32
    torch.testing.assert_close(torch.tensor(found[case]["losses"]), torch.tensor(losses), rtol=1e-2 if narrow else 1e-4, atol=0)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert found[case]["weight_dtype"] == weight.dtype
    assert found[case]["weight_bytes"] == weight.nbytes // 2  # each process holds half of it, in 4 bits too
    trained = [p.detach().clone() for p in worker.lora_parameters(model)]
    load_adapter(model, directory / case)
    for p, expected in zip(worker.lora_parameters(model), trained, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(p, expected, rtol=0, atol=(0.05 if narrow else 1e-4) * scale)
