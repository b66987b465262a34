from fuzz_settings import fuzz


def test_any_command_line_environment_and_config_file_begins_or_is_refused_in_a_sentence():
    faults, reached = fuzz("settings", 250)
    assert not faults and reached > 15, faults[:3]


def test_any_configuration_of_a_model_trains_a_step_or_is_refused_in_a_sentence():
    faults, reached = fuzz("models", 150)
    assert not faults and reached > 40, faults[:3]
