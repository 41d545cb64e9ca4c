"""How a step's batch is cut, for batches that engines make and for those that they should not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tq_connectors.vllm.batch import decode_rows, prefill_parts


def starts_of(counts):
    return [sum(counts[:index]) for index in range(len(counts) + 1)]


def on_device(starts):
    return torch.tensor(starts, dtype=torch.int32)


def test_sequences_of_one_token_are_rows_as_they_lie():
    starts = starts_of([1, 1, 1, 40])
    rows = decode_rows(starts, on_device(starts), 3, 43)
    assert (rows.num_seqs, rows.num_tokens, rows.rows) == (3, 3, 1)
    assert rows.to_rows is None


@pytest.mark.parametrize(("batch_tokens", "num_seqs"), [(16, 4), (20, 5), (12, 3), (13, 3)])
def test_sequences_of_nobody_fill_a_graph_as_far_as_there_are_tokens(batch_tokens, num_seqs):
    starts = starts_of([4, 4, 4, 0, 0])
    rows = decode_rows(starts, on_device(starts), 5, batch_tokens)
    assert (rows.num_seqs, rows.num_tokens, rows.rows) == (num_seqs, 4 * num_seqs, 4)
    assert rows.to_rows is None


def test_a_batch_without_decodes_has_no_rows():
    starts = starts_of([30])
    assert decode_rows(starts, on_device(starts), 0, 30) is None
    assert decode_rows([0, 0, 0], on_device([0, 0, 0]), 2, 0) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_rows_of_different_numbers_end_with_the_last_token_of_each(counts):
    starts = starts_of(counts)
    tokens = torch.arange(starts[-1])
    rows = decode_rows(starts, on_device(starts), len(counts), starts[-1])
    if rows.to_rows is None:
        assert starts[-1] == sum(count for count in counts if count == rows.rows)
        return
    assert rows.rows == max(counts)
    assert rows.num_tokens == starts[-1]
    by_seq = tokens[rows.to_rows].view(len(counts), rows.rows)
    for seq, count in enumerate(counts):
        own = list(range(starts[seq], starts[seq + 1]))
        assert by_seq[seq, rows.rows - count :].tolist() == own
    assert by_seq.flatten()[rows.to_tokens].tolist() == tokens.tolist()


def test_a_cold_prompt_longer_than_all_others_does_not_hide_that_another_has_a_prefix():
    counts, lengths = [1, 20, 500, 7, 9], [300, 84, 500, 7, 73]
    starts = starts_of(counts)
    cold, chunks = prefill_parts(starts, lengths, on_device(starts), 1)
    assert [(chunk.seq, chunk.tokens, chunk.prefix_len) for chunk in chunks] == [
        (1, slice(1, 21), 64),
        (4, slice(528, 537), 64),
    ]
    (prompts,) = cold
    assert (prompts.first_seq, prompts.lengths, prompts.tokens) == (2, (500, 7), slice(21, 528))
    assert prompts.starts.tolist() == [0, 500, 507]
    assert prompts.starts.dtype == torch.int32


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 64, 100])), max_size=8), st.integers(0, 3)
)
def test_every_token_after_the_decodes_is_in_one_part(sequences, first_seq):
    counts = [count for count, _ in sequences]
    lengths = [count + prefix if count else 0 for count, prefix in sequences]
    starts = starts_of(counts)
    first_seq = min(first_seq, len(sequences))
    cold, chunks = prefill_parts(starts, lengths, on_device(starts), first_seq)
    parts = [prompts.tokens for prompts in cold] + [chunk.tokens for chunk in chunks]
    tokens = sorted(token for part in parts for token in range(part.start, part.stop))
    assert tokens == list(range(starts[first_seq], starts[-1]))
    for chunk in chunks:
        assert chunk.prefix_len == sequences[chunk.seq][1] > 0
    for prompts in cold:
        seqs = range(prompts.first_seq, prompts.first_seq + len(prompts.lengths))
        assert [sequences[seq] for seq in seqs] == [(length, 0) for length in prompts.lengths]
