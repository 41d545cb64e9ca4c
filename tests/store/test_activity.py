from store.sample_blocks import NAMESPACE, OTHER_NAMESPACE, sample_key

from tq_store.server.activity import Activity


def test_lookups_gets_and_puts_are_counted_by_namespace() -> None:
    activity = Activity()
    activity.looked_up([sample_key(number) for number in range(4)], 3)
    activity.looked_up([sample_key(1, OTHER_NAMESPACE)], 0)
    activity.looked_up([], 0)
    activity.sent(NAMESPACE, 100)
    activity.received(OTHER_NAMESPACE, 300)
    (first, most), (second, least) = activity.busiest(5)
    assert (first, second) == (OTHER_NAMESPACE, NAMESPACE)
    assert (most.asked_keys, most.found_keys, most.sent_bytes, most.received_bytes) == (1, 0, 0, 300)
    assert (least.asked_keys, least.found_keys, least.sent_bytes, least.received_bytes) == (4, 3, 100, 0)
    assert [digest for digest, _ in activity.busiest(1)] == [OTHER_NAMESPACE]


def test_a_client_that_invents_namespaces_fills_no_memory_and_pushes_no_busy_one_out() -> None:
    activity = Activity(max_namespaces=8)
    activity.sent(NAMESPACE, 1 << 30)
    for number in range(1000):
        activity.looked_up([sample_key(1, number.to_bytes(32, "big"))], 0)
        activity.looked_up([sample_key(1)], 1)
    assert len(activity.busiest(1000)) == 8
    assert activity.busiest(1)[0][0] == NAMESPACE
