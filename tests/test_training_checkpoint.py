"""Which differences of options forbid going on with a training."""

from pathlib import Path

import pytest

from cryosuite.errors import InputError
from cryosuite.methods.hype_options import HypeOptions
from cryosuite.training.checkpoint import refuse_differences, with_later_options
from cryosuite.training.options import plain

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


def test_options_that_came_later_are_what_earlier_runs_meant():
    """Runs of train-hype from before --reading and --other-views read images whole, and from one side."""
    stored = plain(HypeOptions(dim=64, heads=2))
    early = {name: value for name, value in stored.items() if name not in ("reading", "other_views")}
    then = with_later_options(written(early), HypeOptions())
    refuse_differences(RUN, then, written(plain(HypeOptions.from_dict(early))))
    with pytest.raises(InputError, match="--reading was whole, now halves"):
        refuse_differences(RUN, then, written(plain(HypeOptions.from_dict(early | {"reading": "halves"}))))
    assert with_later_options(written(stored), HypeOptions()) == written(stored)
