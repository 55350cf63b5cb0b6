"""token_scores against the formula, against attention as others compute it, and for what must not change it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from token_select_oracles import blocked_scores
from torch import Tensor

import lyra_ops
from bench.harness import peak_cpu
from lyra_ops import _loader
from lyra_ops.testing import assert_within_reference_error

compiled = pytest.mark.skipif(_loader.failure() is not None, reason=str(_loader.failure()))
on_each_backend = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=compiled), "reference"])
BLOCKS = pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (16, 512), (17, 513), (40, 1100)])


def formula(
    query: Tensor,
    key: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_limits: Tensor | None = None,
    key_bias: Tensor | None = None,
    head_weights: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    per_head: bool = False,
    dtype: type[np.floating] = np.longdouble,
) -> Tensor:
    """The formula of the docstring in numpy, row by row; by default in more than float64."""
    query, key = query.double().numpy().astype(dtype), key.double().numpy().astype(dtype)
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1:3]
    weights = np.ones((batch, heads)) if head_weights is None else head_weights.expand(batch, heads).numpy()
    scale = dim**-0.5 if scale is None else scale
    result = np.zeros((batch, heads, length), dtype=dtype)
    for b in range(batch):
        counted = 0
        for i in range(rows):
            seen = np.ones(length, dtype=bool) if key_mask is None else key_mask[b].numpy().copy()
            if causal:
                seen[length - rows + i + 1 :] = False
            if key_limits is not None:
                seen[max(int(key_limits[b, i]), 0) :] = False
            if key_bias is not None:
                seen &= key_bias[b].numpy() > -np.inf
            if not seen.any() or not (query_mask is None or query_mask[b, i]):
                continue
            counted += 1
            for h in range(heads):
                logits = (key[b, h // (heads // kv_heads)] * query[b, h, i]).sum(1)[seen] * dtype(scale)
                if key_bias is not None:
                    logits += key_bias[b].numpy().astype(dtype)[seen]
                cells = np.exp(logits - logits.max())
                result[b, h, seen] += cells / cells.sum()
        result[b] /= max(counted, 1)
    if not per_head:
        weights = weights.astype(dtype)
        result = (result * (weights / weights.sum(1, keepdims=True))[:, :, None]).sum(1)
    return torch.from_numpy(result.astype(np.float32 if dtype == np.float32 else np.float64))


def sample(rows: int, length: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, dim, generator=g, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, length, dim, generator=g, dtype=torch.float64)
    query_mask = torch.rand(batch, rows, generator=g) < 0.7
    key_mask = torch.rand(batch, length, generator=g) < 0.7
    weights = torch.rand(batch, heads, generator=g)
    return query, key, {"query_mask": query_mask, "key_mask": key_mask, "head_weights": weights}


@BLOCKS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_formula(rows: int, length: int, causal: bool, dtype: torch.dtype):
    query, key, options = sample(rows, length)
    query, key = query.to(dtype), key.to(dtype)
    got = lyra_ops.token_scores(query, key, causal=causal, **options)
    plain = formula(query, key, causal=causal, dtype=np.float64 if dtype == torch.float64 else np.float32, **options)
    assert_within_reference_error(got, plain, formula(query, key, causal=causal, **options))


@on_each_backend
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (6, 1), (28, 4)])
def test_grouped_query_heads(heads: int, kv_heads: int, backend: str):
    query, key, _ = sample(21, 33, heads=heads, kv_heads=kv_heads)
    query, key = query.float(), key.float()
    repeated = key.repeat_interleave(heads // kv_heads, dim=1)
    for per_head in (False, True):
        got = lyra_ops.token_scores(query, key, per_head=per_head, backend=backend)
        plain, exact = (formula(query, repeated, per_head=per_head, dtype=d) for d in (np.float32, np.longdouble))
        assert_within_reference_error(got, plain, exact)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 2, 7, 80])
def test_head_dimensions_and_strided_channels(dim: int, dtype: torch.dtype, backend: str):
    query, key, options = sample(19, 130, dim=2 * dim)
    query, key = query.to(dtype)[..., ::2], key.to(dtype)
    for k in (key[..., ::2], key[..., :dim], key[..., :dim].contiguous()):
        got = lyra_ops.token_scores(query, k, backend=backend, **options)
        plain, exact = (formula(query, k, dtype=d, **options) for d in (np.float32, np.longdouble))
        assert_within_reference_error(got, plain, exact)


@on_each_backend
def test_options_have_their_meaning_each(backend: str):
    query, key, options = sample(20, 210)
    query, key = query.float(), key.float()
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(2, 210, generator=g)
    bias[torch.rand(2, 210, generator=g) < 0.3] = -torch.inf
    limits = torch.randint(-3, 240, (2, 20), generator=g)
    per_head = {"head_weights": torch.tensor([0.0, 3.0, 1.0, 0.0])}
    several = {**options, "key_bias": bias, "key_limits": limits, "causal": True}
    for chosen in (
        {"scale": 0.3},
        {"scale": -0.3},
        {"scale": 0},
        {"key_bias": bias},
        {"key_bias": bias.bfloat16()},
        {"key_limits": limits},
        {"key_limits": limits.int(), "causal": True},
        per_head,
        *({name: value} for name, value in options.items()),
        several,
        {**several, "head_weights": None, "per_head": True},
    ):
        bias_used = {"key_bias": chosen["key_bias"].float()} if "key_bias" in chosen else {}
        plain, exact = (formula(query, key, dtype=d, **chosen | bias_used) for d in (np.float32, np.longdouble))
        got = lyra_ops.token_scores(query, key, backend=backend, **chosen)
        assert_within_reference_error(got, plain, exact, name=str(chosen))


@on_each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_heads_together_are_their_mean(causal: bool, backend: str):
    query, key, options = sample(20, 210)
    query, key, weights = query.float(), key.float(), options.pop("head_weights")
    each = lyra_ops.token_scores(query, key, per_head=True, causal=causal, backend=backend, **options).double()
    torch.testing.assert_close(each.sum(2), torch.ones(2, 4, dtype=torch.float64))
    together = lyra_ops.token_scores(query, key, head_weights=weights, causal=causal, backend=backend, **options)
    weights = weights.double() / weights.double().sum(1, keepdim=True)
    mean = (each * weights[..., None]).sum(1)
    plain = formula(query, key, head_weights=weights, causal=causal, dtype=np.float32, **options)
    exact = formula(query, key, head_weights=weights, causal=causal, **options)
    assert_within_reference_error(together, plain, exact)
    assert_within_reference_error(mean.float(), plain, exact)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_padded_bit_for_bit(dtype: torch.dtype, causal: bool, backend: str):
    g = torch.Generator().manual_seed(4)
    rows, lengths = [5, 0, 40, 3, 4], [500, 7, 130, 3, 0 if not causal else 9]
    heads, kv_heads, dim = 6, 2, 16
    cu_q, cu_k = (torch.tensor([2, *sizes]).cumsum(0).int() for sizes in (rows, lengths))
    query = torch.randn(sum(rows) + 5, heads, dim, generator=g).to(dtype)
    key = torch.randn(sum(lengths) + 5, kv_heads, dim, generator=g).to(dtype)
    of_rows = {
        "query_mask": torch.rand(len(query), generator=g) < 0.8,
        "key_limits": torch.randint(1, 400, (len(query),), generator=g),
    }
    of_keys = {
        "key_mask": torch.rand(len(key), generator=g) < 0.8,
        "key_bias": torch.randn(len(key), generator=g),
    }
    weights = torch.rand(5, heads, generator=g)
    lse = torch.randn(heads, len(query), generator=g) + 6
    for more in ({"head_weights": weights}, {"per_head": True}, {"lse": lse}):
        options = {"causal": causal, "backend": backend, **more}
        got = lyra_ops.token_scores_packed(query, key, cu_q, cu_k, **of_rows, **of_keys, **options)
        assert got.shape == ((heads, len(key)) if "per_head" in more else (len(key),))
        outside = torch.ones(len(key), dtype=torch.bool)
        for b in range(5):
            q, k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            outside[k] = False
            alone = {name: t[q][None] for name, t in of_rows.items()} | {n: t[k][None] for n, t in of_keys.items()}
            if "lse" in more:
                options["lse"] = lse[None, :, q]
            if "head_weights" in more:
                options["head_weights"] = weights[b]
            tensors = (t.transpose(0, 1)[None] for t in (query[q], key[k]))
            one = lyra_ops.token_scores(*tensors, **alone, **options)
            assert torch.equal(got[..., k], one[0]), f"sample {b} with {more.keys()}"
        assert (got[..., outside] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_lse_of_the_attention_gives_the_same(causal: bool):
    query, key, options = sample(20, 600)
    query, key = query.float(), key.float()
    logits = query @ key.repeat_interleave(2, dim=1).mT * query.shape[-1] ** -0.5
    hidden = ~options["key_mask"][:, None, None, :]
    if causal:
        hidden = hidden | torch.ones(20, 600, dtype=torch.bool).triu(600 - 20 + 1)
    lse = logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
    lse[~options["query_mask"][:, None].expand_as(lse)] = torch.nan  # rows that do not count may hold anything
    two_pass = lyra_ops.token_scores(query, key, causal=causal, **options)
    one_pass = lyra_ops.token_scores(query, key, causal=causal, lse=lse, **options)
    assert_within_reference_error(one_pass, two_pass, formula(query, key, causal=causal, **options))


def test_attention_of_transformers():
    modeling = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    query, key, _ = sample(9, 9, heads=6, kv_heads=2)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    mask = torch.zeros(9, 9, dtype=torch.float64).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    _, attention = modeling.eager_attention_forward(module, query, key, key, mask, scaling=8**-0.5)
    snapkv = attention[:, :, -4:].mean((1, 2))
    fastv = attention[:, :, -1].mean(1)
    # transformers rounds the softmax to float32, whatever the inputs
    got = lyra_ops.token_scores(query[:, :, -4:].float(), key.float(), causal=True)
    assert_within_reference_error(got, snapkv.float(), formula(query[:, :, -4:], key, causal=True))
    got = lyra_ops.token_scores(query[:, :, -1:].float(), key.float(), causal=True)
    assert_within_reference_error(got, fastv.float(), formula(query[:, :, -1:], key))


def test_attention_of_torch_by_its_backward():
    # The gradient of attention in V is P^T dO, so a dO of ones gives the column sums of P.
    query, key, _ = sample(50, 700, heads=4, kv_heads=4)
    value = torch.zeros(2, 4, 700, 1, dtype=torch.float64, requires_grad=True)
    F.scaled_dot_product_attention(query, key, value).sum().backward()
    columns = value.grad[..., 0].mean(1) / 50
    assert_within_reference_error(lyra_ops.token_scores(query, key), columns, formula(query, key))


def test_rule_of_the_published_code():
    """Softmax over all keys, no mask, float32; mean over heads, then text rows; floor(rho n), at least 32; in order."""
    g = torch.Generator().manual_seed(3)
    length, heads, kv_heads, dim = 150, 6, 2, 16
    query = torch.randn(length, heads, dim, generator=g).transpose(0, 1)
    key = torch.randn(length, kv_heads, dim, generator=g).transpose(0, 1)
    modality = torch.zeros(length, dtype=torch.bool)
    for n_modality, rho in ((100, 0.7), (101, 0.5), (40, 0.5), (20, 0.1)):
        modality[:] = False
        modality[10 : 10 + n_modality] = True
        text = torch.arange(10 + n_modality, length)
        weights = (query[:, text] @ key.repeat_interleave(3, dim=0).mT / math.sqrt(dim)).softmax(-1)
        context = weights[:, :, modality].mean(0).mean(0)
        n_keep = min(n_modality, max(32, int(n_modality * rho)))
        best = modality.nonzero()[:, 0][context.argsort(descending=True, stable=True)[:n_keep]]
        expected = sorted([*(~modality).nonzero()[:, 0].tolist(), *best.tolist()])

        scores = lyra_ops.token_scores(query[None, :, text], key[None])
        selection = lyra_ops.select_tokens(scores, modality[None], keep=rho, min_keep=32)
        assert selection.index[0].tolist() == expected


def scores_of(**changes: object) -> Tensor:
    query, key, options = sample(20, 530)
    return lyra_ops.token_scores(query.float(), key.float(), **{**options, **changes})


def test_sum_is_one_and_padding_gets_nothing():
    _, _, options = sample(20, 530)
    for causal in (False, True):
        scores = scores_of(causal=causal)
        assert (scores[~options["key_mask"]] == 0).all()
        torch.testing.assert_close(scores.double().sum(1), torch.ones(2, dtype=torch.float64))


def test_rows_without_keys_do_not_count():
    query, key, _ = sample(4, 6)
    key_mask = torch.ones(2, 6, dtype=torch.bool)
    key_mask[:, :4] = False  # causal rows 0 and 1, at places 2 and 3, see nothing
    got = lyra_ops.token_scores(query, key, key_mask=key_mask, causal=True)
    query = query[:, :, 2:]
    plain = formula(query, key, key_mask=key_mask, causal=True, dtype=np.float64)
    assert_within_reference_error(got, plain, formula(query, key, key_mask=key_mask, causal=True))
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert (lyra_ops.token_scores(query, key, query_mask=nothing[:, 2:]) == 0).all()
    assert (lyra_ops.token_scores(query, key, key_mask=torch.zeros_like(key_mask)) == 0).all()


def test_padding_may_hold_anything():
    query, key, options = sample(20, 530)
    query, key = query.float(), key.float()
    clean = lyra_ops.token_scores(query, key, **options)
    query[~options["query_mask"][:, None].expand(query.shape[:3])] = torch.nan
    key[~options["key_mask"][:, None].expand(key.shape[:3])] = torch.inf
    assert torch.equal(lyra_ops.token_scores(query, key, **options), clean)


def test_nan_stays_in_its_sample():
    query, key, options = sample(5, 20)
    clean = lyra_ops.token_scores(query, key, **options)
    key[0, 0, options["key_mask"][0].nonzero()[0, 0]] = torch.nan
    got = lyra_ops.token_scores(query, key, **options)
    assert got[0, options["key_mask"][0]].isnan().all()
    assert torch.equal(got[1], clean[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given_lse", [False, True])
def test_alone_and_in_any_batch_bitwise(dtype: torch.dtype, causal: bool, given_lse: bool):
    g = torch.Generator().manual_seed(1)
    heads, kv_heads, dim, rows, length = 14, 2, 32, 21, 700
    query = torch.randn(1, heads, rows, dim, generator=g).to(dtype)
    key = torch.randn(1, kv_heads, length, dim, generator=g).to(dtype)
    real = torch.rand(1, length, generator=g) < 0.9
    real[0, [0, -1]] = True
    lse = torch.randn(1, heads, rows, generator=g) + 6 if given_lse else None
    alone = lyra_ops.token_scores(query, key, key_mask=real, causal=causal, lse=lse)[0]
    # With causal rows, the last row's place is the end of the batch: padding then stands on the left.
    for left_rows, right_rows, left, right in [(0, 0, 0, 0), (3, 0, 0, 0), (19, 0, 333, 0), (7, 30, 100, 612)]:
        if causal and right:
            continue
        pad_rows, pad = (left_rows, right_rows), (left, right)
        batch = {
            "query": F.pad(query, (0, 0, *pad_rows), value=torch.nan).repeat(3, 1, 1, 1),
            "key": F.pad(key, (0, 0, *pad), value=torch.nan).repeat(3, 1, 1, 1),
            "query_mask": F.pad(torch.ones(1, rows, dtype=torch.bool), pad_rows).repeat(3, 1),
            "key_mask": F.pad(real, pad).repeat(3, 1),
            "lse": F.pad(lse, pad_rows).repeat(3, 1, 1) if given_lse else None,
        }
        batch["query"][1] = torch.randn_like(batch["query"][1])
        batch["key"][1] = torch.randn_like(batch["key"][1])
        for _ in range(2):
            got = lyra_ops.token_scores(causal=causal, **batch)
            for b in (0, 2):
                assert torch.equal(got[b, left : left + length], alone), f"padding {pad_rows} {pad}"


@settings(max_examples=25, deadline=None, derandomize=True)  # a bound on rounding errors may once in a while be hit
@given(st.integers(1, 20), st.integers(2, 40), st.booleans(), st.integers(0, 10**6))
def test_permuted_and_duplicated_keys(rows: int, length: int, masked: bool, seed: int):
    query, key, options = sample(rows, length, seed=seed)
    options = options if masked else {}
    scores = lyra_ops.token_scores(query, key, **options)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    permuted = {**options, "key_mask": options["key_mask"][:, order]} if masked else {}
    got = lyra_ops.token_scores(query, key[:, :, order], **permuted)
    assert_within_reference_error(got, scores[:, order], formula(query, key, **options)[:, order])
    doubled = {**options, "key_mask": options["key_mask"].repeat(1, 2)} if masked else {}
    got = lyra_ops.token_scores(query, key.repeat(1, 1, 2, 1), **doubled)
    assert_within_reference_error(got[:, :length] + got[:, length:], scores, formula(query, key, **options))


def test_strided_views():
    query, key, _ = sample(20, 60)
    model_query = query.transpose(1, 2).contiguous().transpose(1, 2)  # as transformers hands them over
    cache = torch.full((2, 2, 100, 16), torch.nan, dtype=torch.float64)
    cache[:, :, 20:80, ::2] = key
    got = lyra_ops.token_scores(model_query, cache[:, :, 20:80, ::2])
    assert torch.equal(got, lyra_ops.token_scores(query, key))


@pytest.mark.parametrize(("batch", "rows", "length"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_nothing_in_nothing_out(batch: int, rows: int, length: int):
    got = lyra_ops.token_scores(torch.zeros(batch, 2, rows, 4), torch.zeros(batch, 1, length, 4))
    assert torch.equal(got, torch.zeros(batch, length))


def test_computes_in_float32_and_without_gradient_whatever_is_on():
    query, key, _ = sample(5, 20)
    query, key = query.float().requires_grad_(), key.float()
    plain = lyra_ops.token_scores(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lyra_ops.token_scores(query, key), plain)
    assert not plain.requires_grad


def test_compiles_and_passes_opcheck():
    query, key, options = sample(5, 20)
    compiled = torch.compile(lyra_ops.token_scores, fullgraph=True, dynamic=True)
    assert torch.equal(
        compiled(query, key, causal=True, **options), lyra_ops.token_scores(query, key, causal=True, **options)
    )
    weights = torch.full((2, 4), 0.25, dtype=torch.float64)
    raw = torch.ops.lyra.token_scores_reference
    masks = options["query_mask"], options["key_mask"], None, None
    torch.library.opcheck(raw, (query, key, *masks, weights, 0.3, True, None, False, None, None))
    lse = torch.zeros(2, 4, 5)
    torch.library.opcheck(raw, (query, key, None, None, None, None, None, 0.3, False, lse, True, None, None))


@compiled
def test_compiled_on_a_cpu():
    query, key, options = sample(20, 5000)
    query, key = query.float(), key.float()
    assert lyra_ops.backend_of(lyra_ops.token_scores, query, key) == "cpu"
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(lyra_ops.token_scores(query, key, causal=True, backend="cpu", **options))
    finally:
        torch.set_num_threads(threads)
    plain = formula(query, key, causal=True, dtype=np.float32, **options)
    assert_within_reference_error(results[0], plain, formula(query, key, causal=True, **options))
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])
    weights = torch.full((2, 4), 0.25)
    masks = options["query_mask"], options["key_mask"], None, None
    raw = torch.ops.lyra.token_select_scores
    torch.library.opcheck(raw, (query, key, *masks, weights, 0.3, True, None, False, None, None))
    limits, bias = torch.randint(0, 5000, (2, 20)).int(), torch.randn(2, 5000)
    torch.library.opcheck(raw, (query, key, None, None, limits, bias, None, 0.3, False, None, True, None, None))
    starts = torch.tensor([0, 9, 20]).int(), torch.tensor([0, 5000, 5000]).int()
    torch.library.opcheck(raw, (query[:1], key[:1], None, None, None, None, None, 0.3, False, None, False, *starts))
    with pytest.raises(RuntimeError, match="cu_seqlens_k: expected increasing places from 0 to 5000"):
        raw(query[:1], key[:1], None, None, None, None, None, 0.3, False, None, False, starts[0], starts[1] + 1)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [9_000, 20_000])  # on a CPU: all powers kept, and made twice
def test_many_keys_against_the_blocked_oracle(length: int, dtype: torch.dtype, backend: str):
    query, key, _ = sample(9, length, batch=1, dim=16)
    query, key = 3 * query.to(dtype), key.to(dtype)
    for causal in (False, True):
        got = lyra_ops.token_scores(query, key, causal=causal, backend=backend)
        logits = query.float() @ key.float().repeat_interleave(2, dim=1).mT * 0.25
        if causal:
            logits = logits.masked_fill(torch.ones(9, length, dtype=torch.bool).triu(length - 8), -torch.inf)
        exact = blocked_scores(query, key, causal=causal)
        assert_within_reference_error(got, logits.softmax(-1).mean((1, 2)), exact)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_exact_scores_keep(dtype: torch.dtype, backend: str):
    query, key, _ = sample(40, 5000, batch=1, dim=16)
    query, key = 3 * query.to(dtype), key.to(dtype)
    scores, exact = lyra_ops.token_scores(query, key, backend=backend), blocked_scores(query, key)
    everything = torch.ones(1, 5000, dtype=torch.bool)
    kept, best = (lyra_ops.select_tokens(s, everything, keep=0.5, backend=backend).mask for s in (scores, exact))
    differ = kept != best
    distance = (exact - exact[best].min()).abs()  # to the last that stays
    assert (distance[differ] <= 2 * (scores - exact).abs().max()).all()
    assert differ.sum() <= 2


@on_each_backend
def test_a_constant_on_all_logits_changes_nothing(backend: str):
    query, key, options = sample(20, 300)
    query, key, shift = query.float(), key.float(), {"key_bias": torch.full((2, 300), 40.0)}
    got = lyra_ops.token_scores(query, key, backend=backend, **shift, **options)
    plain = formula(query, key, dtype=np.float32, **shift, **options)
    assert_within_reference_error(got, plain, formula(query, key, **options))


def test_the_blocked_oracle_is_the_formula():
    query, key, _ = sample(7, 50)
    for causal in (False, True):
        torch.testing.assert_close(
            blocked_scores(query, key, causal=causal, block=13), formula(query, key, causal=causal), rtol=1e-12, atol=0
        )


@compiled
@pytest.mark.parametrize(("length", "fixed"), [(4096, 2 << 20), (131072, 0)])
def test_memory_is_at_most_32_bytes_per_key_or_a_fixed_2_MiB(length: int, fixed: int):
    query, key = torch.randn(1, 28, 16, 4), torch.randn(1, 1, length, 4)

    def run() -> None:
        lyra_ops.token_scores(query, key, backend="cpu")

    run()
    peak = peak_cpu(run)
    if peak is None:
        pytest.skip("this kernel does not let a process reset its peak")
    assert peak <= 32 * length + fixed


def test_backend_by_name():
    query, key, _ = sample(2, 3)
    assert lyra_ops.backend_of(lyra_ops.token_scores, query, key) == "reference"
    for backend in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot serve this call of token_scores"):
            lyra_ops.token_scores(query, key, backend=backend)


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
ERRORS = {
    "query: got list, expected a torch.Tensor": ([1.0], K, {}),
    "query: got shape (4, 3, 8), expected (B, Hq, Lq, D)": (Q[0], K, {}),
    "query: got dtype int64, expected float64 or": (Q.long(), K, {}),
    "key: got shape (1, 2, 5, 8), expected (2, Hkv, L, 8)": (Q, K[:1], {}),
    "key: got shape (2, 2, 5, 4), expected (2, Hkv, L, 8)": (Q, K[..., :4], {}),
    "key: got dtype float64, expected float32": (Q, K.double(), {}),
    "query: got 3 heads, expected a positive multiple of the 2 heads of key": (Q[:, :3], K, {}),
    "query: got head dimension 0": (Q[..., :0], K[..., :0], {}),
    "query_mask: got shape (2, 5), expected (2, 3)": (Q, K, {"query_mask": torch.ones(2, 5, dtype=torch.bool)}),
    "key_mask: got dtype int64, expected bool": (Q, K, {"key_mask": torch.ones(2, 5, dtype=torch.int64)}),
    "key: got a tensor on meta, expected cpu": (Q, K.to("meta"), {}),
    "key_limits: got dtype float32, expected int64 or int32": (Q, K, {"key_limits": torch.zeros(2, 3)}),
    "key_bias: got shape (2, 3), expected (2, 5)": (Q, K, {"key_bias": torch.zeros(2, 3)}),
    "head_weights: got weights and per_head=True": (Q, K, {"head_weights": torch.ones(4), "per_head": True}),
    "causal: got 3 query rows and 2 keys": (Q, K[:, :, :2], {"causal": True}),
    "scale: got nan, expected a finite number": (Q, K, {"scale": math.nan}),
    "scale: got '1', expected a finite number": (Q, K, {"scale": "1"}),
    "lse: got shape (2, 4, 5), expected (2, 4, 3)": (Q, K, {"lse": torch.zeros(2, 4, 5)}),
    "lse: got dtype bfloat16, expected float32 or float64": (Q, K, {"lse": torch.zeros(2, 4, 3).bfloat16()}),
    "head_weights: got shape (3,), expected (4,)": (Q, K, {"head_weights": torch.ones(3)}),
    "head_weights: got a negative or non-finite weight": (Q, K, {"head_weights": -torch.ones(2, 4)}),
    "head_weights: got weights that sum to 0": (Q, K, {"head_weights": torch.zeros(4)}),
    "backend: got 'gpu', expected one of": (Q, K, {"backend": "gpu"}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message: str):
    query, key, options = ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        lyra_ops.token_scores(query, key, **options)


PQ, PK, CU = torch.zeros(6, 4, 8), torch.zeros(9, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
PACKED_ERRORS = {
    "query: got shape (2, 4, 3, 8), expected (Tq, Hq, D)": (Q, PK, CU, CU, {}),
    "key: got shape (9, 2, 4), expected (Tk, Hkv, 8)": (PQ, PK[..., :4], CU, CU, {}),
    "cu_seqlens_q: got dtype int64, expected int32": (PQ, PK, CU.long(), CU, {}),
    "cu_seqlens_k: got shape (1,), expected (2,)": (PQ, PK, CU, CU[:1], {}),
    "cu_seqlens_k: got [0, 12], expected increasing places from 0 to 9": (PQ, PK, CU, CU * 2, {}),
    "causal: sample 0 has more query rows than keys": (PQ, PK, CU, CU // 2, {"causal": True}),
    "lse: got shape (6, 4), expected (4, 6)": (PQ, PK, CU, CU, {"lse": torch.zeros(6, 4)}),
}


@pytest.mark.parametrize("message", PACKED_ERRORS)
def test_packed_errors_name_the_argument(message: str):
    *arguments, options = PACKED_ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        lyra_ops.token_scores_packed(*arguments, **options)
