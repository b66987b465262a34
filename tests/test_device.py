import pytest

from configurator import UserError
from runtime.device import attempt, place_of_process

TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_without_torchrun_there_is_one_process():
    for environ in ({}, {"RANK": ""}, {"RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": ""}):
        assert place_of_process(environ) == (0, 1, 0)
    assert place_of_process(TORCHRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == (1, 2, 1)


@pytest.mark.parametrize("environ", [
    {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}, {"RANK": "a"}, {"RANK": "-1"}, {"WORLD_SIZE": "1.5"},
    {"LOCAL_RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "9" * 50}, {"RANK": "\u0661"}, {"RANK": " "},
    {"RANK": "2", "WORLD_SIZE": "2", **TORCHRUN}, {"WORLD_SIZE": "2", **TORCHRUN},
])
def test_a_rank_that_torchrun_did_not_set_is_one_sentence(environ):
    with pytest.raises(UserError, match="unset"):
        place_of_process(environ)


@pytest.mark.parametrize("text, number", [("", 0), ("2", 2), ("abc", 0), ("-1", 0), ("1.5", 0), ("9" * 5000, 0)])
def test_a_count_of_attempts_that_is_none_is_the_first(monkeypatch, text, number):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", text)
    assert attempt() == number
