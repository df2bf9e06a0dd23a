"""Packs hold every episode once, whole, within the budget; weights are those of the whole optimizer step."""

from collections import Counter

import numpy as np
import pytest
from episodes import item_of_length, make_episode, random_episode
from hypothesis import given
from hypothesis import strategies as st

from training.packing import TrainingItem, pack, token_weights

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@given(lengths, st.integers(1, 60))
def test_every_episode_is_in_one_pack_and_no_pack_of_several_exceeds_the_budget(sizes, budget):
    items = [item_of_length(size) for size in sizes]
    packs = pack(items, [1.0] * len(items), budget)
    assert Counter(id(item) for batch in packs for item in batch.items) == Counter(map(id, items))
    for batch in packs:
        assert [len(s) for s in batch.sequences] == [len(item.episode) for item in batch.items]
        assert len(batch.items) == 1 or sum(map(len, batch.sequences)) <= budget


@given(lengths, st.integers(1, 60))
def test_packing_the_same_items_twice_gives_the_same_packs(sizes, budget):
    items = [item_of_length(size) for size in sizes]
    first, second = ([[id(i) for i in b.items] for b in pack(items, [1.0] * len(items), budget)] for _ in range(2))
    assert first == second


@given(lengths, st.integers(40, 80))
def test_no_two_packs_could_be_one(sizes, budget):
    totals = [sum(map(len, b.sequences)) for b in pack([item_of_length(s) for s in sizes], [1.0] * len(sizes), budget)]
    assert all(a + b > budget for i, a in enumerate(totals) for b in totals[:i])


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_streams_stay_with_their_episode(seed, budget):
    generator = np.random.default_rng(seed)
    items = [TrainingItem(random_episode(generator, 50, turns=int(generator.integers(1, 4))), None) for _ in range(6)]
    weight_of = {id(item): float(k + 1) for k, item in enumerate(items)}
    for batch in pack(items, [weight_of[id(item)] for item in items], budget):
        flat = [int(token) for sequence in batch.sequences for token in sequence]
        expected_ids, expected_logprobs, expected_weights, positions, offset = [], [], [], [], 0
        for item in batch.items:
            for i in range(len(item.episode)):
                if item.episode.sampled[i]:
                    expected_ids.append(item.episode.token_ids[i])
                    expected_logprobs.append(item.episode.sampler_logprobs[i])
                    expected_weights.append(weight_of[id(item)])
                    positions.append(offset + i)
            offset += len(item.episode)
        assert batch.ids.tolist() == expected_ids == [flat[p] for p in positions]
        assert batch.rows.tolist() == [p - 1 for p in positions]  # the logits at i predict token i + 1
        assert batch.sampler_logprobs.tolist() == expected_logprobs
        assert batch.weights.tolist() == expected_weights
        assert batch.counts == tuple(item.episode.num_sampled for item in batch.items)


def test_a_token_is_trained_for_its_position_and_not_for_its_id():
    # The prompt, the turn and the tool's answer hold the same two ids.
    item = TrainingItem(make_episode([0, 7], [([0, 7], [0, 7]), ([7, 0], [])]), None)
    (batch,) = pack([item], [1.0], 100)
    assert batch.rows.tolist() == [1, 2, 5, 6]
    assert batch.ids.tolist() == [0, 7, 7, 0]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", [1 / 6, 1 / 6, 1 / 6]),
        ("sequence_mean", [1 / 3, 1 / 6, 1 / 9]),  # each episode counts 1/3, whatever its length
        ("token_sum", [1.0, 1.0, 1.0]),
    ],
)
def test_weights_of_episodes_with_one_two_and_three_trained_tokens(reduction, expected):
    items = [item_of_length(4 + n, sampled=n) for n in (1, 2, 3)]
    assert token_weights(items, reduction) == pytest.approx(expected, rel=1e-12)
    weighed = token_weights(items, reduction, [2.0, 1.0, 0.5])
    assert weighed == pytest.approx([2 * expected[0], expected[1], expected[2] / 2], rel=1e-12)
