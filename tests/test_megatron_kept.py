"""Claim: the reference's states of one micro-batch never meet the policy's logits of another, or of none.

And what the passes replace in verl's Megatron engine is there, by its source: the engine cannot be imported without Megatron
Core. With it: tests/test_megatron.py.
"""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import verl

from verl_patches.megatron_kept import KeptStates, shard_of_rank


def labels(*ids):
    return torch.tensor([ids])


def kept():
    states = KeptStates()
    for i in range(2):
        states.keep(labels(i, 7), torch.full((2, 1, 4), float(i), requires_grad=True), {"weight": i})
    return states


def test_micro_batches_come_back_in_their_order_and_without_a_graph():
    states = kept()
    for i in range(2):
        micro_batch = states.next(labels(i, 7))
        assert torch.equal(micro_batch.hidden, torch.full((2, 1, 4), float(i))) and micro_batch.arguments == {
            "weight": i
        }
        assert not micro_batch.hidden.requires_grad
    states.require_all_used()


@pytest.mark.parametrize("wrong", [labels(1, 7), labels(0, 8), labels(0, 7, 7)])
def test_another_micro_batch_is_refused(wrong):
    with pytest.raises(RuntimeError, match="the two passes over one batch were split differently"):
        kept().next(wrong)


def test_more_micro_batches_than_the_references_are_refused():
    with pytest.raises(RuntimeError, match="split differently"):
        KeptStates().next(labels(0))


def test_fewer_micro_batches_than_the_references_are_refused():
    states = kept()
    states.next(labels(0, 7))
    with pytest.raises(RuntimeError, match="1 micro-batches of the reference were not asked for"):
        states.require_all_used()


@pytest.fixture
def second_of_two_ranks(monkeypatch):
    """What Megatron Core knows of this rank."""
    parallel_state = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: 2,
        get_tensor_model_parallel_rank=lambda: 1,
        get_tensor_model_parallel_group=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "megatron", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace(parallel_state=parallel_state))


def test_the_part_of_the_vocabulary(second_of_two_ranks):
    shard = shard_of_rank(width=24, vocab_size=48)
    assert (shard.start, shard.vocab_size) == (24, 48)


def test_a_padded_vocabulary_is_refused(second_of_two_ranks):
    with pytest.raises(RuntimeError, match="padded the vocabulary from 47 to 48"):
        shard_of_rank(width=24, vocab_size=47)


def function(file, name):
    """Of verl's source, wherever in the file it is defined."""
    tree = ast.parse((Path(verl.__file__).parent / file).read_text())
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


def test_the_logits_processor_takes_what_ours_does():
    arguments = function("workers/engine/megatron/transformer_impl.py", "_lm_head_logits_processor").args
    assert [a.arg for a in arguments.args] == ["self", "logits", "label", "temperature"]
    source = (Path(verl.__file__).parent / "workers/engine/megatron/transformer_impl.py").read_text()
    assert "self._lm_head_logits_processor," in source  # of the instance, where ours is set


@pytest.mark.parametrize("caller", ["_fused_GPTModel_forward", "fused_output_processor"])
def test_the_fused_heads_call_the_function_that_ours_replaces(caller):
    calls = [
        node
        for node in ast.walk(function("models/mcore/model_forward_fused.py", caller))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "linear_cross_entropy"
    ]
    (call,) = calls
    assert len(call.args) == 6 and not call.keywords
    assert call.args[0].id == "hidden_states" and call.args[2].id == "labels" and call.args[3].id == "temperature"
