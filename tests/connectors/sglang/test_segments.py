"""How a batch of prefills is cut."""

from tq_connectors.sglang.segments import Kind, cut_into_segments


def test_neighbours_of_one_kind_share_a_segment() -> None:
    segments = cut_into_segments([0, 0, 64, 128, 70, 9], [100, 3, 65, 70, 64, 1])
    assert [segment.kind for segment in segments] == [Kind.FRESH, Kind.RESUMED, Kind.RESUMED, Kind.SHORT]
    fresh, first, second, short = segments
    assert (fresh.rows, fresh.tokens, fresh.new_lens) == (slice(0, 2), slice(0, 103), (100, 3))
    assert fresh.spans == [(0, 100), (100, 103)]
    assert (first.rows, first.tokens, first.prefix_lens) == (slice(2, 3), slice(103, 168), (64,))
    assert (second.rows, second.tokens, second.prefix_lens) == (slice(3, 4), slice(168, 238), (128,))
    assert (short.rows, short.tokens, short.prefix_lens) == (slice(4, 6), slice(238, 303), (70, 9))


def test_a_sequence_without_new_tokens_belongs_to_no_segment() -> None:
    (segment,) = cut_into_segments([5, 64], [0, 2])
    assert (segment.rows, segment.tokens) == (slice(1, 2), slice(0, 2))
    assert cut_into_segments([64], [0]) == ()


def test_a_gap_ends_a_segment() -> None:
    first, second = cut_into_segments([0, 0, 0], [4, 0, 6])
    assert (first.rows, second.rows) == (slice(0, 1), slice(2, 3))
