"""Every mutation of tests/mutations.py is noticed by the test that it names."""

import pytest
from mutating import Mutation, healthy, survives
from mutations import MUTATIONS

pytestmark = pytest.mark.slow


def test_the_named_tests_pass_in_a_copy_without_mutation() -> None:
    assert healthy(MUTATIONS) == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_is_noticed(mutation: Mutation) -> None:
    assert survives(mutation) == ""
