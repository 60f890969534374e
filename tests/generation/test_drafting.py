"""Guessing ahead from what was said before."""

from gramlite.generation.drafting import LEAST_LEAD, MOST_CONTEXTS, Drafter


def taught(*lines: list[int]) -> Drafter:
    drafter = Drafter()
    for line in lines:
        drafter.learn(line, len(line))
    return drafter


def test_a_phrase_is_guessed_once_it_was_heard_often_enough() -> None:
    phrase = [1, 2, 3, 4, 5]
    assert taught(*[phrase] * (LEAST_LEAD - 1)).guess([9, 1, 2, 3], 8) == []
    assert taught(*[phrase] * LEAST_LEAD).guess([9, 1, 2, 3], 8) == [4, 5]
    assert taught(*[phrase] * LEAST_LEAD).guess([9, 1, 2, 3], 1) == [4]
    assert taught(*[phrase] * LEAST_LEAD).guess([2, 3], 8) == []


def test_a_fork_in_the_phrase_is_not_guessed() -> None:
    drafter = taught(*[[1, 2, 3, 4], [1, 2, 3, 5]] * 10)
    assert drafter.guess([1, 2, 3], 8) == []
    for _ in range(2 * LEAST_LEAD):
        drafter.learn([1, 2, 3, 5], 1)
    assert drafter.guess([1, 2, 3], 8) == [5]


def test_only_the_new_tokens_count() -> None:
    drafter = Drafter()
    for _ in range(LEAST_LEAD):
        drafter.learn([1, 2, 3, 4, 5], 1)
    assert drafter.guess([1, 2, 3], 8) == [] and drafter.guess([2, 3, 4], 8) == [5]


def test_what_was_heard_once_is_forgotten_when_the_table_is_full() -> None:
    drafter = taught(*[[1, 2, 3, 4]] * LEAST_LEAD)
    drafter.learn(list(range(10, 10 + MOST_CONTEXTS + 10)), MOST_CONTEXTS + 10)
    assert drafter.guess([1, 2, 3], 8) == [4]
    assert len(drafter._leaders) == 1
