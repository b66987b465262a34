import json
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from typing import Literal

import pytest

import convert
import eval as evaluation
import plot
import sample
import train
from benchmarks.__main__ import BenchSettings
from configurator import (
    KNOWN_ELSEWHERE,
    ROOT,
    UserError,
    cache_folder,
    configure,
    field_comments,
    find_config,
    find_path,
    kind_and_range,
    pick,
    write_path,
)


@dataclass
class Alpha:
    lr: float = 1e-3            # peak learning rate
    max_steps: int = 100        # optimizer steps
    compile: bool = True        # compile the model
    name: str = ""              # of the run


@dataclass
class Beta:
    kind: Literal["a", "b"] = "a"  # which one
    prompt: list[str] = field(default_factory=list)  # may be repeated
    d_model: int = 64           # width


def settings(*argv, **environ):
    return configure([Alpha, Beta], list(argv), environ)


@pytest.mark.parametrize("word, value", [("True", True), ("true", True), ("1", True), ("on", True), ("yes", True),
                                         ("False", False), ("false", False), ("0", False), ("off", False)])
@pytest.mark.parametrize("form", ["compile={}", "--compile={}", "COMPILE={}", "--compile {}"])
def test_booleans_mean_what_they_say(form, word, value):
    assert settings(*form.format(word).split()).compile is value
    assert settings(COMPILE=word).compile is value


def test_flags_switch_on_and_no_flags_switch_off():
    assert settings("compile=false", "--compile").compile is True
    assert settings("--no-compile").compile is False
    assert settings("--no_compile").compile is False
    assert settings("--compile", "--lr", "2").compile is True


def test_all_ways_of_writing_a_value_agree():
    for argv in (["lr=0.5"], ["LR=0.5"], ["--lr=0.5"], ["--lr", "0.5"], ["--LR", "5e-1"]):
        assert settings(*argv).lr == 0.5
    assert settings("--max-steps=7").max_steps == 7


def test_precedence_is_default_file_environment_command_line(tmp_path):
    first, second = tmp_path / "one.py", tmp_path / "two.py"
    first.write_text("lr = 0.1\nmax_steps = 1\nd_model = 1\nname = 'one'\n")
    second.write_text("max_steps = 2\nd_model = 2\nname = 'two'\n")
    s = settings(str(first), str(second), "name=line", D_MODEL="3", NAME="environment")
    assert (s.lr, s.max_steps, s.d_model, s.name, s.kind) == (0.1, 2, 3, "line", "a")
    assert [s.source[n] for n in ("lr", "max_steps", "d_model", "name", "kind")] == [
        str(first), str(second), "environment", "command line", "default"]
    assert "d_model = 3" in s.report() and "kind" not in s.report()


@pytest.mark.parametrize("content, words", [
    (b"learning_rate = 1", ["learning_rate", "did you mean lr"]),
    (b"lr = 'fast'", ["lr=fast", "expected a number"]),
    (b"x = (", ["line 1", "SyntaxError"]),
    (b"lr = 1\nmax_steps = 1 // 0", ["line 2", "ZeroDivisionError"]),
    (b"kind = 'c'", ["kind=c", "a, b"]),
    (b"compile = 1", ["compile=1", "expected True or False"]),
    (b"lr = 1\nwidth = 3\n", ["width", "--help lists the settings"]),
    (b"import sys\nsys.exit(3)\n", ["line 2", "SystemExit"]),
    (b"raise ValueError('a\\n' * 500)\n", ["line 1", "ValueError"]),
    (b"x = '\xff'\n", []), (b"a\0b = 1\n", []), (b"(" * 5000, []),
])
def test_whatever_is_wrong_in_a_config_file_is_a_sentence_with_its_name(tmp_path, content, words):
    (tmp_path / "wrong.py").write_bytes(content)
    with pytest.raises(UserError) as error:
        settings(str(tmp_path / "wrong.py"))
    assert all(word in str(error.value) for word in [*words, "wrong.py"]), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv, words", [
    (["learing_rate=1"], ["learing_rate"]),
    (["max_step=1"], ["did you mean max_steps"]),
    (["n_embd=1"], ["did you mean d_model"]),
    (["max_iters=1"], ["did you mean max_steps"]),
    (["lr=abc"], ["lr=abc", "a number"]),
    (["max_steps=1.5"], ["max_steps", "whole number"]),
    (["max_steps=true"], ["max_steps", "whole number"]),
    (["compile=maybe"], ["compile=maybe", "true or false"]),
    (["--lr"], ["--lr needs a value"]),
    (["nothere.py"], ["nothere.py", "not found"]),
    (["word"], ["word", "KEY=value"]),
])
def test_mistakes_on_the_command_line_get_one_sentence(argv, words):
    with pytest.raises(UserError) as error:
        settings(*argv)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_numbers_are_parsed_by_the_type_of_the_field_and_never_evaluated():
    s = settings("max_steps=1e5", "lr=1", "name=__import__('os')")
    assert (s.max_steps, s.lr, s.name) == (100_000, 1.0, "__import__('os')")
    assert type(s.max_steps) is int and type(s.lr) is float
    assert settings("max_steps=100_000").max_steps == 100_000


def test_lists_take_every_repetition_and_replace_the_default():
    assert settings("--prompt", "a", "--prompt=b").prompt == ["a", "b"]
    assert settings().prompt == []


def test_an_empty_environment_variable_counts_as_not_set():
    assert settings(LR="").lr == 1e-3 and settings(LR="").source["lr"] == "default"


def test_two_declarations_of_one_name_are_a_bug():
    @dataclass
    class Again:
        lr: float = 1.0

    with pytest.raises(ValueError, match="lr"):
        configure([Alpha, Again], [], {})


def test_pick_takes_the_fields_and_leaves_the_rest():
    assert pick(Alpha, {"lr": 2.0, "unrelated": 1}) == Alpha(lr=2.0)
    assert settings("lr=2").part(Alpha) == Alpha(lr=2.0)


def test_settings_are_json(tmp_path):
    assert json.loads(json.dumps(settings("lr=2").to_dict()))["lr"] == 2


def test_what_is_read_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_path("model.py") == ROOT / "model.py"
    (tmp_path / "model.py").touch()
    assert find_path("model.py").resolve() == tmp_path / "model.py"


def test_what_is_written_is_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_path("tests").resolve() == tmp_path / "tests"
    assert cache_folder("").resolve() == ROOT / "data" / "cache"
    assert cache_folder("data/cache").resolve() == tmp_path / "data" / "cache"


def test_our_configs_are_ours_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "config" / "quickstart.py"
    theirs.parent.mkdir()
    theirs.touch()
    assert find_config("config/quickstart.py") == ROOT / "config" / "quickstart.py"
    assert find_config("./config/quickstart.py").samefile(theirs)
    assert find_config(str(theirs)).samefile(theirs)


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "~nosuchuser/x", "a\0b", "\ud800"])
def test_a_path_that_cannot_be_one_fails_in_a_sentence(path):
    for use in (find_path, write_path, cache_folder):
        with pytest.raises(UserError, match="usable path") as caught:
            use(path)
        assert len(str(caught.value)) < 200


SCRIPTS = ["train.py", "sample.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_setting_with_its_comment(script, tmp_path):
    result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("  ") and " = " in line]
    assert len(rows) > 10
    assert all(len(row.split(" = ", 1)[1].split(None, 1)) == 2 for row in rows), "a setting has no comment"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(script, tmp_path):
    result = subprocess.run([sys.executable, ROOT / script, "n_embd=3"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_no_setting_shares_a_name_with_what_torchrun_sets():
    torchrun = {"LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "ROLE_WORLD_SIZE",
                "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "ROLE_NAME",
                "TORCHELASTIC_RUN_ID", "PYTHON_EXEC", "OMP_NUM_THREADS", "PATH", "HOME", "USER", "LANG"}
    for parts in (train.SETTINGS, sample.SETTINGS):
        names = configure(parts, [], {}).source  # a collision between dataclasses raises here
        assert not torchrun & {name.upper() for name in names}


def test_names_known_elsewhere_point_to_settings_that_exist():
    names = set(configure(train.SETTINGS, [], {}).source) | set(configure(sample.SETTINGS, [], {}).source)
    meant = {value.partition("=")[0] for value in KNOWN_ELSEWHERE.values()}
    assert meant <= names, meant - names


def test_every_config_file_is_accepted():
    files = sorted((ROOT / "config").glob("*.py"))
    assert files
    for file in files:
        s = configure(train.SETTINGS, [str(file)], {})
        assert s.part(train.ModelConfig).d_model > 0
    assert os.path.exists(ROOT / "config" / "quickstart.py")


def parts() -> list[type]:
    more = [plot.PlotSettings, convert.ConvertSettings, BenchSettings]
    return list(dict.fromkeys([*train.SETTINGS, *sample.SETTINGS, *evaluation.SETTINGS, *more]))


@pytest.mark.parametrize("part", parts(), ids=lambda part: part.__name__)
def test_the_help_of_a_setting_makes_sense_without_its_neighbours(part):
    for name, comment in field_comments(part).items():
        assert len(comment.split()) >= 3, f"{name}: {comment}"
        assert not re.match(r"(and|or|of|on|so many|the same|besides|also|too|instead|these|those)\b", comment), name


def wrong_values(kind) -> list:
    """What no setting of this type may be."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return [value for value in (choices[-1].upper(), choices[-1] + " ", "", None, 1, True) if value not in choices]
    if kind is int:
        return ["3", None, True, 1.5, float("nan"), 10**19, 10**400, 1e30, -(10**16)]
    if kind is float:
        return ["3", None, True, float("nan"), float("inf"), -float("inf"), 10**400]
    return {bool: ["true", 1, 0, None], str: [None, 3, b"x"], list[str]: ["a", [1], None, ("a",)]}[kind]


def test_every_settings_class_checks_its_own_fields():
    for part in parts():
        for name in part.__dataclass_fields__:
            for value in wrong_values(kind_and_range(part, name)[0]):
                with pytest.raises(UserError, match=f"^{name}="):
                    part(**{name: value})


@pytest.mark.parametrize("setting", [
    "lr=nan", "lr=0", "muon_lr=inf", "eps=-1", "eps=nan", "norm_eps=inf", "weight_decay=nan", "embed_scale=-inf",
    "logit_softcap=nan", "init_std=inf", "grad_clip=nan", "min_lr=nan", "stop_loss=inf", "stop_ppl=-1",
    "router_scale=nan", "router_scale=0", "balance_loss=inf", "decay_share=nan", "decay_share=1.5", "rope_theta=inf",
    "rope_theta=1", "beta1=1", "beta2=0", "ema=1", "dropout=1", "label_smoothing=nan", "lora_alpha=inf",
    "seq_len=0", "seq_len=1e30", f"d_model={10**19}", "n_layer=-1", "n_layer=1e9", "batch_size=0", "eval_tokens=-5",
    "patience=-1", "max_skipped=0", "max_steps=0", "log_interval=0", "eval_interval=-1", "keep_checkpoints=0",
    "seed=-1", f"seed={10**20}", "workers=-1", "workers=100000", "shard_tokens=0", "val_share=nan", "vocab_size=-3",
])
def test_numbers_out_of_their_range_are_refused_in_a_sentence(setting):
    name = setting.partition("=")[0]
    for argv, environ in (([setting], {}), ([], {name.upper(): setting.partition("=")[2]})):
        with pytest.raises(UserError, match=f"^{name}=.*must be") as caught:
            configure(train.SETTINGS, argv, environ)
        assert len(str(caught.value)) < 220 and "\n" not in str(caught.value)


def test_a_long_value_is_shortened_in_a_sentence():
    for setting in ("lr=" + "9" * 10_000, "max_steps=" + "9" * 10_000, "kind=" + "x" * 10_000, "compile=\n\x1b[2J"):
        with pytest.raises(UserError) as caught:
            settings(setting)
        assert len(str(caught.value)) < 220 and str(caught.value).isprintable()


# What Windows, macOS, shells, terminals, schedulers, launchers, CI systems and GPU libraries export.
EXPORTED = """
    ALLUSERSPROFILE APPDATA COMMONPROGRAMFILES COMPUTERNAME COMSPEC HOMEDRIVE HOMEPATH LOCALAPPDATA LOGONSERVER
    NUMBER_OF_PROCESSORS OS PATHEXT PROCESSOR_ARCHITECTURE PROCESSOR_LEVEL PROGRAMDATA PROMPT PSMODULEPATH PUBLIC
    SESSIONNAME SYSTEMDRIVE SYSTEMROOT TEMP TMP USERDOMAIN USERNAME USERPROFILE WINDIR HOME USER LOGNAME SHELL SHLVL PWD
    OLDPWD PATH LANG LC_ALL LANGUAGE TERM TERM_PROGRAM COLORTERM COLUMNS LINES DISPLAY EDITOR VISUAL PAGER LESS MAIL
    HOSTNAME HOST HOSTTYPE MACHTYPE OSTYPE LS_COLORS TMPDIR SSH_CONNECTION SSH_AUTH_SOCK SSH_TTY WINDOW WINDOWID STY
    TERMCAP TMUX TMUX_PANE XDG_SESSION_ID XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_DATA_DIRS DBUS_SESSION_BUS_ADDRESS
    SECURITYSESSIONID ITERM_PROFILE COMMAND_MODE APPLE_PUBSUB_SOCKET_RENDER CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_SHLVL
    CONDA_PROMPT_MODIFIER VIRTUAL_ENV VIRTUAL_ENV_PROMPT PYTHONPATH PYTHONHOME PS1 IFS BLOCK_SIZE BLOCKSIZE SYSTEM OUT
    CI GITHUB_ACTIONS GITHUB_WORKSPACE RUNNER_OS RUNNER_TEMP GITLAB_CI CI_JOB_ID BUILD_ID BUILD_NUMBER JOB_NAME
    NODE_NAME EXECUTOR_NUMBER WORKSPACE TRAVIS APPVEYOR SYSTEM_TEAMPROJECT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
    GROUP_RANK
    ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
    OMP_NUM_THREADS MKL_NUM_THREADS KMP_AFFINITY SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID SLURM_LOCALID SLURM_NODELIST
    SLURM_CPUS_PER_TASK SLURM_MEM_PER_NODE JOB_ID QUEUE NSLOTS NHOSTS NQUEUES PE PE_HOSTFILE REQNAME REQUEST RESTARTED
    SGE_TASK_ID SGE_ROOT ARC ENVIRONMENT JOB_SCRIPT TASK_ID PBS_JOBID PBS_NODEFILE PBS_O_WORKDIR NCPUS LSB_JOBID
    LSB_HOSTS LSB_QUEUE LSB_MCPU_HOSTS LS_JOBPID OMPI_COMM_WORLD_RANK PMI_RANK CUDA_VISIBLE_DEVICES CUDA_HOME
    CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING NVIDIA_VISIBLE_DEVICES NCCL_DEBUG NCCL_SOCKET_IFNAME HF_HOME HF_TOKEN
    TRANSFORMERS_CACHE WANDB_PROJECT WANDB_MODE WANDB_API_KEY TORCH_HOME TORCH_LOGS PYTORCH_CUDA_ALLOC_CONF CXX CC
    KUBERNETES_SERVICE_HOST KUBERNETES_PORT HOSTALIASES MANPATH INFOPATH DEBIAN_FRONTEND LD_LIBRARY_PATH GPG_AGENT_INFO
""".split()


def test_what_systems_export_is_neither_a_setting_nor_mentioned(capsys):
    lists = (train.SETTINGS, sample.SETTINGS, evaluation.SETTINGS, [plot.PlotSettings])
    for table in lists:
        s = configure(table, [], dict.fromkeys(EXPORTED, "7") | {"RANK": "0"})
        assert set(s.source.values()) == {"default"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variable, meant", [
    ("MAX_STEP", "MAX_STEPS"), ("BASE_CKPT", "INIT_FROM"), ("SPM_MODEL", "TOKENIZER"), ("CKPT_PATH", "INIT_FROM"),
    ("COSINE_RESTARTS", "SCHEDULE=cosine_restarts"), ("LEARNING_RATE", "LR"), ("DATAPATH", "DATA_PATH"),
    ("TOTAL_TOKENS", "MAX_TOKENS"), ("WARMUP_STEP", "WARMUP_STEPS"),
])
def test_a_variable_that_was_meant_for_us_is_said_in_one_line(variable, meant, capsys):
    configure(train.SETTINGS, [], {variable: "1"})
    said = capsys.readouterr().err
    assert variable in said and f"did you mean {meant}?" in said and said.count("\n") == 1


@pytest.mark.parametrize("key, meant", [
    ("total_tokens", "max_tokens"), ("max_grad_norm", "grad_clip"), ("cosine_restarts", "schedule=cosine_restarts"),
    ("gradient_checkpointing", "checkpoint_activations"), ("lora_r", "lora_rank"), ("ckpt_path", "init_from"),
    ("spm", "tokenizer"), ("optimiser", "optimizer"), ("request_delay", ""), ("min_new", ""), ("foo", ""),
    ("num_tokens_to_generate", ""), ("data_parallel", ""), ("total_size", ""), ("gpu", ""),
])
def test_a_hint_is_right_or_not_given(key, meant):
    with pytest.raises(UserError) as caught:
        configure(train.SETTINGS, [f"{key}=1"], {})
    assert (f"did you mean {meant}?" if meant else "--help lists") in str(caught.value)


@pytest.mark.parametrize("config, environ, argv, kept", [
    ("data_path = 'a'\nval_path = 'v'", {}, ["dataset=stdlib"], {"dataset": "stdlib", "data_path": "", "val_path": ""}),
    ("dataset = 'b'", {"MIXTURE": "a:1 b:1"}, [], {"mixture": "a:1 b:1", "dataset": "stdlib"}),
    ("mixture = 'a:1 b:1'", {"DATASET": "b"}, [], {"mixture": "", "dataset": "b"}),
    ("max_tokens = 100", {}, ["max_steps=7"], {"max_tokens": 0, "max_steps": 7}),
    ("", {"MAX_TOKENS": "100"}, ["max_steps=7"], {"max_tokens": 0, "max_steps": 7}),
    ("max_steps = 7", {"MAX_TOKENS": "100"}, [], {"max_tokens": 100}),
    ("total_batch_size = 512", {}, ["grad_accum=16"], {"total_batch_size": 0, "grad_accum": 16}),
    ("muon_lr = 0.1", {}, ["muon_ratio=2"], {"muon_lr": 0.0, "muon_ratio": 2.0}),
    ("stop_ppl = 25", {"STOP_LOSS": "2"}, [], {"stop_ppl": 0.0, "stop_loss": 2.0}),
    ("max_tokens = 100", {"MAX_TOKENS": "0"}, [], {"max_tokens": 0}),
])
def test_of_two_settings_that_say_one_thing_the_later_source_counts(tmp_path, config, environ, argv, kept):
    (tmp_path / "c.py").write_text(config)
    s = configure(train.SETTINGS, [str(tmp_path / "c.py"), *argv], environ)
    assert {name: getattr(s, name) for name in kept} == kept


@pytest.mark.parametrize("pair", ["max_steps=7 max_tokens=100", "data_path=a dataset=b",
                                  "grad_accum=2 total_batch_size=9", "dataset=b mixture=a:1"])
def test_two_settings_that_say_one_thing_from_one_source_are_refused(tmp_path, pair):
    names = dict(part.split("=") for part in pair.split())
    (tmp_path / "c.py").write_text("\n".join(f"{k} = {v if v.isdecimal() else repr(v)}" for k, v in names.items()))
    upper = {name.upper(): value for name, value in names.items()}
    for argv, environ in ((pair.split(), {}), ([], upper), ([str(tmp_path / "c.py")], {})):
        with pytest.raises(UserError, match="exclude each other"):
            configure(train.SETTINGS, argv, environ)


def test_a_config_file_computes_and_what_it_imports_and_defines_is_no_setting(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("from math import sqrt, pi\nimport os.path as p\nfrom fractions import Fraction\n_hidden = 3\n\n\n"
                    "def half(x):\n    return x / 2\n\n\nlr = half(pi) / sqrt(4)\nmax_steps = 12 * 10\n",
                    encoding="utf-8-sig")
    s = settings(str(file))
    assert (s.lr, s.max_steps) == (pytest.approx(0.7853981), 120)
