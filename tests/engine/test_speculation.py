"""Invariants of guessing: matches are real, latest and long, and no guess is drafted that does not pay."""

from hypothesis import given
from hypothesis import strategies as st

from onebit.engine.speculation import LONGEST, MAX_DRAFTS, Lookup, Speculation

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def lookup_of(tokens, cuts=()):
    """A lookup that has read the tokens, in parts where there are cuts."""
    grown = []
    lookup = Lookup(grown)
    for cut in [*cuts, len(tokens)]:
        grown += tokens[len(grown) : cut]
        if grown:
            lookup.read()
    return lookup


@given(TOKENS, st.lists(st.integers(1, 59)).map(sorted))
def test_a_guess_follows_an_earlier_occurrence_of_the_latest_tokens(tokens, cuts):
    lookup = lookup_of(tokens, cuts)
    earlier = {tuple(tokens[i : i + 2]) for i in range(len(tokens) - 2)}
    assert (lookup.chance(0) > 0) == (tuple(tokens[-2:]) in earlier)
    if lookup.chance(0):
        source, n = lookup._source, lookup._length
        assert 2 <= n <= LONGEST
        assert n <= source < len(tokens)
        assert tokens[source - n : source] == tokens[-n:]
        assert lookup.guesses(1) == [tokens[source]]


def test_the_longest_match_goes_before_the_latest():
    # 3 4 came last before 9, but 1 2 3 4 before 7.
    assert lookup_of([1, 2, 3, 4, 7, 0, 3, 4, 9, 0, 1, 2, 3, 4]).guesses(2) == [7, 0]
    assert lookup_of([8, 3, 4, 7, 0, 3, 4, 9, 0, 6, 3, 4]).guesses(2) == [9, 0]
    assert lookup_of([1, 2, 3, 4, 5]).chance(0) == 0


def test_what_repeats_to_the_end_is_expected_to_go_on():
    assert lookup_of([7, 1, 2, 3, 1, 2, 3]).guesses(7) == [1, 2, 3, 1, 2, 3, 1]


def test_chances_follow_the_text():
    regular, irregular = [1, 2, 3] * 40, []
    for i in range(60):
        irregular += [1, 2, 10 + i]
    assert lookup_of(regular, range(1, 120)).chance(0) > 0.95
    assert lookup_of([*irregular, 1, 2], range(1, 182)).chance(0) < 0.1


def steps(speculation, base, row, counts):
    for n in counts:
        speculation.observe(n, base + row * (n - 1))


def test_the_price_of_a_row_is_learned():
    for base, row in ((0.1, 0.005), (1e-4, 5e-5), (0.02, 0.02)):
        speculation = Speculation()
        assert speculation.price(1) == 0.25
        steps(speculation, base, row, [1] * 20)
        assert 0.2 < speculation.price(1) < 0.3
        steps(speculation, base, row, [1, 4, 1, 6] * 20)
        assert abs(speculation.price(1) / (row / base) - 1) < 0.1
        assert speculation.price(8) < speculation.price(1)
        # One step that the machine disturbed changes little.
        speculation.observe(1, 50 * base)
        assert 0.5 < speculation.price(1) / (row / base) < 2


def test_drafts_grow_with_the_chance_and_shrink_with_the_price():
    sure, unsure = [1, 2, 3] * 40, [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3]
    sure, unsure = lookup_of(sure, range(1, 120)), lookup_of(unsure)
    lengths = []
    for row in (0.01, 0.3, 1.2):
        speculation = Speculation()
        steps(speculation, 1.0, row, [1, 4, 1, 6] * 20)
        drafts = speculation.draft([(sure, 99), (unsure, 99), (lookup_of([1]), 99)], 3)
        lengths.append([len(guesses) for guesses in drafts])
        assert speculation.draft([(sure, 2)], 1)[0] in ([1, 2], [])
    assert lengths[0][0] == MAX_DRAFTS
    assert lengths[0] >= lengths[1] >= lengths[2] == [0, 0, 0]
    assert lengths[1][0] > lengths[1][1] and lengths[0][2] == 0
    assert Speculation().draft([], 1) == []
