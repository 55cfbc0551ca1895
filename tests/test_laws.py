"""Every rule that ships obeys the laws of `fxopt.testing`."""

import pytest

from fxopt.passes import RULES
from fxopt.testing import check_spelling

CASES = [
    pytest.param(rule, spelling, id=f"{rule.name}-{spelling.__name__}") for rule in RULES for spelling in rule.spellings
]


@pytest.mark.parametrize(("rule", "spelling"), CASES)
def test_laws(rule, spelling):
    check_spelling(rule, spelling, max_examples=6)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "spelling"), CASES)
def test_laws_at_length(rule, spelling):
    check_spelling(rule, spelling, max_examples=60)
