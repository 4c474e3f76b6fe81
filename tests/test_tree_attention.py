"""One attention in three ways: by segments, by FlexAttention, and by a dense mask written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prefopt.tree_attention
from prefopt.tree_attention import flex_attention, flex_block_mask, segment_attention
from prefopt.trees import AnswerTree, pack_trees, tree_mask

SHAPES = [
    [(3, (2, 4)), (2, (1, 3, 1))],  # two trees, answers of one token among them
    [(1, (1,))],  # nothing but a prompt of one token
    [(5, (1, 1, 1))],
    [(1, (6, 2)), (4, (3,)), (2, (2, 2))],
]


def spans_of(shape):
    """A tree for each (prompt length, answer lengths)."""
    trees = [AnswerTree((0,) * n, tuple((0,) * a for a in answers)) for n, answers in shape]
    return pack_trees(trees).spans


def operands(spans, heads=4, kv_heads=4, width=8, value_width=None, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(h, d):
        return torch.randn(1, h, spans[-1].end, d, generator=draw, dtype=torch.float64)

    made = (normal(heads, width), normal(kv_heads, width), normal(kv_heads, value_width or width))
    return [x.requires_grad_() for x in made]


def written_out(query, key, value, spans, scale=None, softcap=None):
    """The textbook: scores, cap, mask, softmax."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~tree_mask(spans), -torch.inf).softmax(-1) @ value


def values_and_gradients(attend, inputs, spans, **options):
    out = attend(*inputs, spans, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_agree(attend, inputs, spans, tolerance=1e-12, **options):
    expected = values_and_gradients(written_out, inputs, spans, **options)
    found = values_and_gradients(attend, inputs, spans, **options)
    for name, own, other in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(
            own, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("long_prompt", [0, 128], ids=["without masks", "with masks"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_segments_are_the_masked_attention(shape, kv_heads, long_prompt, monkeypatch):
    monkeypatch.setattr(prefopt.tree_attention, "_LONG_PROMPT", long_prompt)
    spans = spans_of(shape)
    # A soft cap computes its softmax in float32, as the models that have one do.
    for options, tolerance in (({}, 1e-12), ({"scale": 0.3}, 1e-12), ({"softcap": 1.5}, 1e-5),
                               ({"scale": 0.7, "softcap": 2.0}, 1e-5)):  # fmt: skip
        inputs = operands(spans, kv_heads=kv_heads)
        assert_agree(segment_attention, inputs, spans, tolerance, **options)


# Compiled it is on GPUs only.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_flex_attention_is_the_masked_attention(shape, kv_heads):
    """Values only: FlexAttention has no backward pass on a CPU."""
    spans = spans_of(shape)
    inputs = [x.detach() for x in operands(spans, kv_heads=kv_heads)]
    mask = flex_block_mask(spans, "cpu")
    for options in ({}, {"scale": 0.3}, {"scale": 0.7, "softcap": 2.0}):
        scale, softcap = options.get("scale"), options.get("softcap")
        found = flex_attention(*inputs, mask, scale=scale, softcap=softcap)
        expected = written_out(*inputs, spans, **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flex_attention_on_a_gpu_with_gradients(shape):
    spans = spans_of(shape)
    cpu = [x.detach().float() for x in operands(spans, kv_heads=2, width=16)]
    for options in ({}, {"scale": 0.7, "softcap": 2.0}):
        there = [x.cuda().requires_grad_() for x in cpu]
        mask = flex_block_mask(spans, "cuda")
        scale, softcap = options.get("scale"), options.get("softcap")
        out = flex_attention(*there, mask, scale=scale, softcap=softcap)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        found = [out, *torch.autograd.grad((out * weights.cuda()).sum(), there)]
        here = [x.double().requires_grad_() for x in cpu]
        expected = values_and_gradients(written_out, here, spans, **options)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own.cpu().double(), other, rtol=5e-3, atol=5e-3)


def test_the_dense_mask_is_what_sdpa_takes():
    spans = spans_of(SHAPES[0])
    query, key, value = operands(spans)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, tree_mask(spans))
    torch.testing.assert_close(out, segment_attention(query, key, value, spans))


def test_what_long_prompts_keep_grows_with_the_tokens_and_not_with_their_square():
    def kept(n):
        spans = spans_of([(n, (n, n // 2))])
        sizes = {}

        def note(x):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            segment_attention(*operands(spans), spans)
        return sum(sizes.values()) / spans[-1].end

    few, many = kept(200), kept(800)
    assert many == pytest.approx(few, rel=0.01)
    assert few == 8 * (4 * 8 * 4 + 4)  # query, key, value and output of 4 heads, and their log-sums


def test_values_may_have_a_width_of_their_own():
    spans = spans_of(SHAPES[0])
    inputs = operands(spans, value_width=5)
    assert segment_attention(*inputs, spans).shape == (1, 4, spans[-1].end, 5)
    assert_agree(segment_attention, inputs, spans)


@given(
    st.lists(
        st.tuples(st.integers(1, 7), st.lists(st.integers(1, 6), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([(1, 1), (4, 2), (6, 3)]),
    st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_segments_are_the_masked_attention_for_any_shape(shape, heads, seed):
    spans = spans_of(shape)
    inputs = operands(spans, *heads, width=4, seed=seed)
    assert_agree(segment_attention, inputs, spans)


def test_an_answer_does_not_see_its_siblings_nor_another_tree():
    """What one answer reads is untouched, to the bit, when all others change."""
    spans = spans_of([(3, (4, 4)), (2, (3,))])
    query, key, value = (x.detach() for x in operands(spans))
    before = segment_attention(query, key, value, spans)
    other = torch.ones(spans[-1].end, dtype=torch.bool)
    other[:6] = False  # the first prompt and the first answer's three fed tokens
    key[:, :, other], value[:, :, other] = 9.0, -9.0
    after = segment_attention(query, key, value, spans)
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert not torch.allclose(before[:, :, 6:], after[:, :, 6:])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_thins_the_weights_and_keeps_their_mean(softcap):
    spans = spans_of([(4, (3, 3))])
    query, key, value = (x.detach().float() for x in operands(spans))
    plain = segment_attention(query, key, value, spans, softcap=softcap)
    torch.manual_seed(0)
    drawn = [
        segment_attention(query, key, value, spans, softcap=softcap, dropout=0.3)
        for _ in range(400)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(torch.stack(drawn).mean(0), plain, atol=0.25, rtol=0)


def test_half_precision_stays_half_and_close():
    spans = spans_of(SHAPES[0])
    inputs = [x.detach().bfloat16() for x in operands(spans, kv_heads=2)]
    exact = written_out(*(x.double() for x in inputs), spans, softcap=3.0)
    found = segment_attention(*inputs, spans, softcap=3.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, atol=0.03, rtol=0.03)
