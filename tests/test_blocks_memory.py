"""What a group keeps: nothing beyond its parent's forward, or of another thread, copy or replica; and who is in none."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from blocks_case import FUSED, Attention, X
from torch import nn

from lora_kernels import LoRALinear, fuse_blocks
from lora_kernels.models.blocks import groups

# ---- nothing is kept ----


def kept_after(model, *, fails=False):
    """Results that live after the parent's forward."""
    references, original = [], groups.lora_linear_group

    def watched(x, members, **options):
        ys = original(x, members, **options)
        references.extend(weakref.ref(y) for y in ys)
        return ys

    groups.lora_linear_group = watched
    try:
        with torch.no_grad(), pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            model(X.clone(), cached=not fails)
    finally:
        groups.lora_linear_group = original
    assert len(references) == 3
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_no_result_outlives_the_parent_s_forward():
    model = Attention()
    fuse_blocks(model)
    assert kept_after(model) == 0, "k and v, which nobody took"


def test_nor_an_exception():
    model = Attention()
    fuse_blocks(model)
    model.between = lambda x: 1 / 0
    assert kept_after(model, fails=True) == 0


def test_a_scope_that_keeps_its_foundis_caught(monkeypatch):
    monkeypatch.setattr(groups.Group, "close", lambda self, parent, args, output: None)
    with pytest.raises(AssertionError, match="which nobody took"):
        test_no_result_outlives_the_parent_s_forward()


def test_a_fused_model_is_freed_without_the_garbage_collector():
    model = Attention()
    fuse_blocks(model)
    reference = weakref.ref(model.q_proj)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


# ---- threads, copies, replicas ----


def test_threads_do_not_take_each_other_s_results():
    model, found, barrier = Attention(), {}, threading.Barrier(2)
    fuse_blocks(model)
    model.between = lambda x: (barrier.wait(10), x)[1]  # both have computed q before any takes k

    def run(i):
        with torch.no_grad():
            found[i] = model(X + i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    plain = Attention()
    for i in range(2):
        torch.testing.assert_close(found[i], plain(X + i), rtol=1e-9, atol=1e-9)


def test_a_replica_of_data_parallel_computes_with_its_own_weights():
    model = Attention()
    report = fuse_blocks(model)
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        twin = copy.deepcopy(child)
        twin.__dict__["forward"] = child.__dict__["forward"]  # as replicate() shares it
        twin.weight.data.mul_(2)
        replica._modules[name] = twin
    y = replica(X)
    assert report.calls() == {FUSED: 1}
    assert not torch.allclose(y, model(X))
    for name, child in Attention().named_children():
        child.weight.data.mul_(2)
        replica._modules[name] = child
    torch.testing.assert_close(y, Attention.forward(replica, X), rtol=1e-9, atol=1e-9)


def test_a_layer_alone_may_be_copied_and_pickled():
    model = Attention()
    fuse_blocks(model)
    expected = model.q_proj(X)
    for twin in (copy.deepcopy(model.q_proj), pickle.loads(pickle.dumps(model.q_proj))):
        del model.between  # is no part of it
        assert torch.equal(twin(X), expected)
        model.between = lambda x: x


# ---- who is no member ----


def test_layers_that_two_modules_share_or_whose_forward_was_replaced_stay_alone():
    model = nn.ModuleList([Attention(), Attention()])
    model[1].k_proj = model[0].k_proj
    report = fuse_blocks(model)
    assert report.groups == []
    assert report.skipped["0"] == "k_proj is a child of several modules"
    model = Attention()
    model.q_proj.forward = lambda x: x
    assert fuse_blocks(model).skipped == {"": "q_proj's forward was replaced on the instance"}


def test_only_layers_of_one_input_size_are_a_group():
    model = Attention()
    model.q_proj = LoRALinear(12, 8)
    assert fuse_blocks(model).groups == ["{k_proj,v_proj}"]
