"""Which differences of options forbid going on with a training."""

from pathlib import Path

import pytest

from cryosuite.errors import InputError
from cryosuite.training.checkpoint import refuse_differences

RUN = Path("run/weights.3.pkl")


def written(options: dict) -> dict:
    """What a checkpoint says of the training it belongs to."""
    return {"method": {"name": "hype", "options": options}, "options": {}, "particles": {}}


@pytest.mark.parametrize(
    "then, now",
    [
        ({"depth": 3}, {"depth": 3}),
        ({"depth": 3}, {"depth": 3, "halves": False}),  # came with a later version, and is off
        ({"depth": 3, "drop": 0.0}, {"depth": 3}),  # was off, and is gone
    ],
)
def test_options_that_are_off_are_as_good_as_not_there(then: dict, now: dict):
    refuse_differences(RUN, written(then), written(now))


@pytest.mark.parametrize(
    "then, now, name",
    [
        ({"depth": 3}, {"depth": 4}, "depth"),
        ({"depth": 3}, {"depth": 3, "halves": True}, "halves"),
        ({"depth": 3, "drop": 0.2}, {"depth": 3}, "drop"),
    ],
)
def test_an_option_that_changed_is_named(then: dict, now: dict, name: str):
    with pytest.raises(InputError, match=name):
        refuse_differences(RUN, written(then), written(now))
