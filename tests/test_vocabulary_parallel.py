"""Claim: shards of the vocabulary on several ranks give the numbers of the whole vocabulary, to that function's own accuracy.

On 2 and 4 gloo ranks, for vocabularies that the ranks do not divide, with padding columns full of large logits, a rank that has
nothing but padding, impossible tokens and parts, and a KL of 1e-9; equal logits give exactly zero. The versions for accelerators
are merged in one process, the Triton kernel interpreted. Not claimed: that NCCL or a GPU has run it.
"""

import pytest
import torch
from engine_harness import run_on_ranks
from test_token_statistics import assert_agrees, plain

import vimpo_verl.token_statistics.float32 as float32
import vimpo_verl.token_statistics.vocabulary_parallel as module
from vimpo_verl.token_statistics import TokenStatistics, VocabularyShard, linear_token_statistics, token_statistics

HUGE = 50.0  # in the padding: it would take all probability


def make_cases(seed: int) -> dict[str, tuple]:
    """Name -> policy and reference logits of the whole vocabulary, labels, temperature."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def case(tokens, vocabulary, shift, scale=3.0):
        z = scale * draw(tokens, vocabulary)
        return z, z + shift * draw(tokens, vocabulary), torch.randint(vocabulary, (tokens,), generator=generator)

    cases = {f"{v} entries, shift {s}": (*case(40, v, s), None) for v in (5, 1_003) for s in (1e-4, 1e-2, 0.5, 3.0)}
    cases["more logits than a chunk"] = (*case(300, 5_001, 0.5), None)
    cases["temperature"] = (*case(40, 101, 0.5), torch.linspace(0.3, 2.0, 40))
    cases["peaked"] = (*case(40, 101, 0.5, scale=100.0), None)
    z, u, labels = case(40, 1_003, 1e-4)
    cases["all moved"] = (z, u + 5.0, labels, None)
    z, u, labels = case(6, 103, 0.5)
    z[0, 3:5] = u[0, 3:5] = -torch.inf  # impossible for both
    z[1, :50] = -torch.inf  # a whole part of the policy's, with the label of token 1 in it or not
    z[2, 60] = -torch.inf
    z[3, :80], u[3, :80] = -torch.inf, -torch.inf  # for both
    u[4, 7] = -torch.inf  # for the reference alone: an infinite KL
    u[5, :60] = -torch.inf  # a whole part
    labels[:] = torch.tensor([90, 90, 60, 90, 7, 90])
    cases["impossible"] = (z, u, labels, None)
    cases["unlikely labels"] = (z := torch.randn(8, 64, generator=generator)), z + 0.1, z.argmin(-1), None
    z[torch.arange(8), z.argmin(-1)] -= 900.0
    return cases


DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-12}


def width_of(vocabulary: int, ranks: int) -> int:
    """Of each rank's shard, padded: at 5 tokens and 4 ranks the last has nothing but padding."""
    return -(-vocabulary // ranks) if vocabulary < 10 else -(-vocabulary // ranks // 8) * 8


def shard_of(logits, rank, ranks):
    width = width_of(logits.shape[1], ranks)
    padded = torch.full((logits.shape[0], ranks * width), HUGE, dtype=logits.dtype)
    padded[:, : logits.shape[1]] = logits
    return padded[:, rank * width : (rank + 1) * width]


def on_rank(rank: int, ranks: int, seed: int) -> dict:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    found = {}
    for name, (z, u, labels, temperature) in make_cases(seed).items():
        shard = VocabularyShard(rank * width_of(z.shape[1], ranks), z.shape[1], torch.distributed.group.WORLD)
        for dtype in DTYPES:
            policy, ref = (shard_of(x.to(dtype), rank, ranks) for x in (z, u))
            found[name, dtype] = token_statistics(policy, ref, labels, temperature, shard=shard)
            found[name, dtype, "equal"] = token_statistics(policy, policy.clone(), labels, temperature, shard=shard)
    hidden, ref_hidden, weight, labels = hidden_case()
    rows = slice(rank * 30, rank * 30 + 30) if ranks == 2 else slice(rank * 15, rank * 15 + 15)
    shard = VocabularyShard(rows.start, 57, torch.distributed.group.WORLD)
    found["linear"] = linear_token_statistics(hidden, weight[rows], ref_hidden, weight[rows], labels, 0.7, shard=shard)
    try:
        token_statistics(policy, ref, labels[: len(z)] * 0 + z.shape[1], shard=shard)
    except ValueError as error:
        found["padding as a label"] = str(error)
    return found


def hidden_case():
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(1_100, 16, generator=generator) for _ in range(2))
    return (
        hidden,
        ref_hidden,
        torch.randn(60, 16, generator=generator),
        torch.randint(57, (1_100,), generator=generator),
    )


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return make_cases(seed), run_on_ranks(request.param, on_rank, request.param, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_agree_with_the_formula_of_the_whole(results, dtype):
    cases, ranks = results
    for name, (z, u, labels, temperature) in cases.items():
        expected = plain(z.to(dtype), u.to(dtype), labels, temperature)
        for found in ranks:
            assert all(
                x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in found[name, dtype]
            )
            print(name)  # seen if it fails
            assert_agrees(found[name, dtype], expected, DTYPES[dtype])


def test_every_rank_has_the_same_numbers(results):
    cases, ranks = results
    for key in (key for key in ranks[0] if isinstance(key, tuple)):
        for other in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(ranks[0][key], other[key], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_give_exactly_zero(results, dtype):
    cases, ranks = results
    for name in cases:
        statistics = ranks[0][name, dtype, "equal"]
        assert torch.equal(statistics.token_kl, torch.zeros_like(statistics.token_kl)), name
        assert torch.equal(statistics.log_prob, statistics.ref_log_prob), name


def test_from_hidden_states_and_parts_of_the_output_matrix(results):
    hidden, ref_hidden, weight, labels = hidden_case()
    logits = (x @ weight[:57].T / 0.7 for x in (hidden, ref_hidden))
    assert_agrees(results[1][0]["linear"], plain(*logits, labels), 1e-4)


def test_a_label_in_the_padding_is_refused(results):
    for found in results[1]:
        assert "labels are in no shard" in found["padding as a label"]


def triton(*arguments):
    return pytest.importorskip("vimpo_verl.token_statistics.triton_kernel").triton_token_statistics(*arguments)


@pytest.mark.parametrize("version", [float32.float32_token_statistics, triton])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_versions_for_accelerators_are_merged_alike(monkeypatch, version, ranks):
    """In float32, in which log-probs and entropy have an error of 5e-6 nats and a KL is good to 1e-4 of it."""
    monkeypatch.setattr(module, "statistics_rows", lambda *arguments: version(*arguments))
    for name, case in make_cases(seed=1).items():
        z, u, labels, temperature = (None if x is None else x[:10] for x in case)  # the interpreter is slow
        parts = [
            module.shard_statistics(
                shard_of(z, rank, ranks),
                shard_of(u, rank, ranks),
                labels,
                temperature,
                VocabularyShard(rank * width_of(z.shape[1], ranks), z.shape[1], None),
            )
            for rank in range(ranks)
        ]
        found, expected = module.merged(torch.stack(parts)), plain(z, u, labels, temperature)
        for field in TokenStatistics._fields:
            tolerance = {"rtol": 1e-4, "atol": 1e-12} if field == "token_kl" else {"rtol": 1e-5, "atol": 5e-6}
            if name == "all moved" and field == "token_kl":  # z - u is rounded at the size of 5 in float32
                tolerance["rtol"] = 2e-3
            result, wanted = getattr(found, field), getattr(expected, field)
            torch.testing.assert_close(result, wanted, **tolerance, msg=lambda m, c=(name, field): f"{c}: {m}")
