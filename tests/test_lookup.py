"""Drafts from earlier text, and how many tokens are worth a verification."""

import random

from mobilemoe.lookup import PromptLookup, VerificationTimes


def times_of(ratios: list[float]) -> VerificationTimes:
    times = VerificationTimes(len(ratios) - 1)
    times.ratios = ratios
    return times


def certain(tokens: list[int]) -> PromptLookup:
    """A text whose drafts are as long as allowed."""
    text = PromptLookup(tokens, VerificationTimes(7))
    text.acceptance = 1.0
    return text


def write(text: PromptLookup, answer: list[int], seconds: list[float]) -> tuple[float, int]:
    """The time in which a model writes an answer, and its calls, if verifying i tokens takes `seconds[i]`."""
    elapsed, calls, position = 0.0, 0, 0
    while position < len(answer):
        draft = text.draft(len(answer) - position - 1)
        elapsed, calls = elapsed + seconds[len(draft)], calls + 1
        text.times.record(len(draft), seconds[len(draft)])
        for drafted in [*draft, None]:
            text.append(answer[position])
            position += 1
            if drafted != answer[position - 1]:
                break
    return elapsed, calls


# As long for two tokens as for one after the other, and nearly so.
EXPENSIVE = [1.0, 2.0, 2.9, 3.9, 4.8, 5.7, 6.6, 7.5]
CHEAP = [1.0, 1.2, 1.35, 1.5, 1.65, 1.8, 1.95, 2.1]


def test_what_followed_the_last_run_is_the_draft():
    text = certain([1, 2, 3, 4, 5, 6, 7, 1, 2])
    assert text.draft(4) == [3, 4, 5, 6]
    assert text.draft(1) == [3] and text.draft(0) == []
    # The last occurrence counts, of the longer run first.
    assert certain([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).draft(1) == [4]
    assert certain([2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).draft(1) == [5]
    # One token is no run, and a text without repetitions has no draft.
    assert certain([1, 2, 3, 1]).draft(4) == []
    assert certain([]).draft(4) == []


def test_a_draft_continues_a_loop():
    assert certain([5, 6, 7, 6, 7, 6, 7]).draft(7) == [6, 7, 6, 7, 6, 7, 6]


def test_what_continues_is_followed():
    """A later copy of the last run that went on otherwise does not distract from the one that is being copied."""
    copied = [1, 2, 3, 4, 5, 2, 3, 8, 9, 9]
    text = certain([*copied, 1, 2])
    text.append(3)
    assert text.draft(3) == [4, 5, 2]
    text.append(7)
    assert text.draft(3) == []


def test_lengths_follow_acceptance_and_time():
    assert VerificationTimes(7).best_length(1, 7) == 7
    assert VerificationTimes(7).best_length(1, 3) == 3
    assert times_of(EXPENSIVE).best_length(0.99, 7) == 0
    assert times_of(CHEAP).best_length(0.95, 7) == 7
    assert 0 < times_of(CHEAP).best_length(0.4, 7) < 4
    assert times_of(CHEAP).best_length(0.1, 7) == 0
    # A length that takes long for its own sake is left out.
    assert times_of([1.0, 1.3, 1.6, 4.0, 4.2, 4.4, 4.6, 4.8]).best_length(0.9, 7) == 2


def test_an_interruption_does_not_end_drafts():
    times = VerificationTimes(7)
    times.record(0, 1.0)
    times.record(7, 100.0)
    assert times.best_length(0.95, 7) > 0
    for _ in range(8):
        times.record(7, 2.0)
    assert times.best_length(0.95, 7) == 7


def test_copies_are_written_faster_and_new_text_is_not_slowed():
    choice = random.Random(0)
    prompt, new = (choice.choices(range(40), k=600) for _ in range(2))
    for seconds in (EXPENSIVE, CHEAP):
        times = VerificationTimes(7)
        # Many runs of two of these tokens occur before, by chance: their continuations are wrong.
        elapsed, calls = write(PromptLookup(prompt, times), new, seconds)
        assert calls > 0.9 * len(new) and elapsed < 1.03 * len(new)
        copy = write(PromptLookup(prompt, times), prompt[100:300], seconds)[0]
        assert copy < (80 if seconds is CHEAP else 206)


def test_tokens_that_were_not_drafted_teach_as_well():
    times = times_of(CHEAP)
    text = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, times)
    for token in (31, 32, 33):
        text.append(token)
    for first in range(1, 8):
        text.append(first)
        text.append(first + 1)
        # A wrong continuation of a run that has occurred.
        text.append(40 + first)
    assert text.acceptance < 0.3
    for token in [1, 2, 3, 4, 5, 6, 7, 8, 9] * 2:
        text.append(token)
    assert text.acceptance > 0.8 and len(text.draft(7)) > 3
