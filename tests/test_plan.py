"""What a plan says is what a run takes, and to plan takes nothing."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import loss
import train
from configurator import ROOT, UserError, configure
from lora import LoraSettings, inject
from model import LanguageModel, ModelConfig
from optim import EMA, Optimizer, OptimSettings
from runtime import ledger, plan
from runtime.ledger import Demand, count_lasting, count_pass, head_chunks

FP32 = torch.float32
SMALL = "VOCAB_SIZE=97 SEQ_LEN=32 D_MODEL=32 N_LAYER=2 N_HEAD=4 N_KV_HEAD=4 D_FF=64"
KINDS = {
    "plain": "", "adamw": "OPTIMIZER=adamw", "untied": "TIE_EMBEDDINGS=0", "window": "WINDOW=8", "ema": "EMA=0.9",
    "learned": "POSITION=learned NORM=layernorm BIAS=1", "dropout": "DROPOUT=0.1",
    "latent": "ATTENTION=mla QK_NORM=0", "experts": "N_EXPERT=4 D_EXPERT=16 N_SHARED=1",
    "reversible": "REVERSIBLE=1", "enigma": "REVERSIBLE=1 N_ENIGMA=1 POSITION=alibi",
    "convolution": "SHORT_CONV=4", "checkpointed": "CHECKPOINT_ACTIVATIONS=1",
    "lora": "USE_LORA=1 LORA_RANK=2",
}


def settings(words: str = ""):
    return configure(train.SETTINGS, f"{SMALL} {words}".split(), {})


def printed(capsys, *argv: str) -> str:
    assert train.main([*argv, "DRY_RUN=1"]) == 0
    return capsys.readouterr().out


def figures(out: str, words: str) -> list[float]:
    """The numbers behind these words."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"         {words} ")]
    return [float(number) for number in line.removeprefix(f"         {words} ").split()]


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty folder for everything that could be written; afterwards it is still empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
    before = sorted((ROOT / "out").glob("*"))
    yield tmp_path
    assert not list(tmp_path.iterdir())
    assert sorted((ROOT / "out").glob("*")) == before


CONFIGS = sorted(path.stem for path in ROOT.glob("config/*.py") if "\ntask = " not in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_plan_that_touches_nothing(name, nowhere, capsys, monkeypatch):
    monkeypatch.setattr(plan, "tokens_per_second", lambda *_: 100.0)
    config = [f"config/{name}.py", "N_LAYER=2", "DTYPE=float32", "BATCH_SIZE=2"]
    out = printed(capsys, *config, f"OUT_DIR={nowhere / 'run'}")
    s = configure(train.SETTINGS, config, {})
    with torch.device("meta"):
        counts = LanguageModel(s.part(ModelConfig)).count_parameters()
    assert f"model    {counts['total']:,} parameters" in out
    assert "nan" not in out and "inf" not in out
    for word in ("memory ", "sharing ", "devices ", "cost ", "H100", "Chinchilla"):
        assert word in out


def test_the_speed_of_this_machine_is_measured(nowhere, capsys):
    out = printed(capsys, *SMALL.split(), f"OUT_DIR={nowhere / 'run'}")
    (line,) = [line for line in out.splitlines() if "this machine, measured" in line]
    assert float(line.split()[-2].replace(",", "")) > 0


def test_a_model_that_no_memory_holds_has_a_plan(nowhere, capsys):
    sizes = "D_MODEL=8192 N_LAYER=4 N_HEAD=64 N_KV_HEAD=8 D_FF=200000 BATCH_SIZE=1"
    out = printed(capsys, *sizes.split(), f"OUT_DIR={nowhere / 'run'}")
    (line,) = [line for line in out.splitlines() if "this machine" in line]
    assert line.split()[-1] == "-"  # too large to be timed


@pytest.mark.parametrize("task", ["TASK=sft", "USE_LORA=1", "TASK=grpo REWARD=a.py:f", "TASK=dpo"])
def test_a_plan_for_fine_tuning_reads_only_the_settings_of_its_base(task, base, nowhere, capsys, monkeypatch):
    monkeypatch.setattr(plan, "tokens_per_second", lambda *_: 100.0)
    before = {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
    out = printed(capsys, *task.split(), f"INIT_FROM={base}", f"OUT_DIR={nowhere / 'run'}", "DTYPE=float32")
    assert "init     from" in out and "Chinchilla" not in out
    assert {path.name: path.stat().st_mtime_ns for path in base.iterdir()} == before


def test_a_plan_of_a_run_that_exists_has_its_shape_and_leaves_it_alone(base, nowhere, capsys, monkeypatch):
    monkeypatch.setattr(plan, "tokens_per_second", lambda *_: 100.0)
    before = {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
    out = printed(capsys, f"OUT_DIR={base}")
    assert "4 x 64 tokens" in out
    assert {path.name: path.stat().st_mtime_ns for path in base.iterdir()} == before
    with pytest.raises(UserError, match="the checkpoint has d_model=32 but you set d_model=64"):
        train.main([f"OUT_DIR={base}", "D_MODEL=64", "DRY_RUN=1"])


WRONG = {"N_HEAD=5": "n_head=5 needs d_model", "TOTAL_BATCH_SIZE=100": "nearest", "DRY_RUN=perhaps": "dry_run"}


@pytest.mark.parametrize("words, sentence", WRONG.items())
def test_a_wrong_setting_is_still_one_sentence(words, sentence, nowhere):
    with pytest.raises(UserError, match=sentence):
        train.main(["DRY_RUN=1", f"OUT_DIR={nowhere / 'run'}", *words.split()])


def test_each_process_plans_its_share_and_the_first_one_prints(nowhere, capsys, monkeypatch):
    monkeypatch.setattr(plan, "tokens_per_second", lambda *_: 100.0)
    for name, value in dict(WORLD_SIZE="4", RANK="0", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    words = [*SMALL.split(), f"OUT_DIR={nowhere / 'run'}", "TOTAL_BATCH_SIZE=512", "DTYPE=float32"]
    out = printed(capsys, *words)
    assert "a pass of 4 x 32 tokens" in out
    assert next(line for line in out.splitlines() if line.startswith("sharing")).split()[-5:] == \
        ["1", "4", "8", "64", "1,000"]
    sharded = printed(capsys, *words, "SHARD=1")
    for part in ("weights", "gradients", "moments of muon"):
        assert figures(out, part)[0] == pytest.approx(4 * figures(sharded, part)[0], rel=0.02)
    monkeypatch.setenv("RANK", "1")
    assert not printed(capsys, *words)


# ---- the figures


@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_and_moments_are_those_of_the_model_to_the_byte(kind):
    s = settings(KINDS[kind])
    model = LanguageModel(s.part(ModelConfig))
    if s.use_lora:
        inject(model, s.part(LoraSettings))
    optimizer = Optimizer(model, s.part(OptimSettings))
    found = count_lasting(s, FP32, gpu=False)
    ids = torch.zeros(1, s.seq_len, dtype=torch.int64)
    model(ids, ids).sum().backward()
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.moments == sum(tensor.nbytes for tensor in optimizer.state.values())
    average = sum(tensor.nbytes for tensor in EMA(model, s.ema).weights.values()) if s.ema else 0
    assert found.average == average


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(kind):
    """Of a model with memory, counted by torch's own hooks. A reversible stack saves much that is gone at its end."""
    s = settings(KINDS[kind])
    model = ledger.build(s, FP32)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # the tensor itself would make a circle

    ids = torch.zeros(8, s.seq_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x, place = model.embed_at(ids)
        x = model.norm(model.through_blocks(x, place, None))
    keep(x)
    alive = sum(size for storage, size in kept.values() if not storage.expired())
    found = count_pass(s, 8, FP32, gpu=False).activations
    if s.reversible:  # it holds two streams, perhaps one of them beside the graph
        assert alive <= found <= alive + 2 * x.nbytes
    else:
        assert found == pytest.approx(alive, rel=0.05)


def activations(words: str, layers: int = 2) -> float:
    return count_pass(settings(f"{words} N_LAYER={layers}"), 4, FP32, gpu=False).activations


def test_depth_costs_memory_unless_activations_are_recomputed():
    assert activations("", 8) > 3 * activations("", 2)
    assert activations("CHECKPOINT_ACTIVATIONS=1", 8) < 0.2 * activations("", 8)
    assert activations("REVERSIBLE=1", 8) == activations("REVERSIBLE=1", 2)
    enigma = "REVERSIBLE=1 POSITION=alibi N_ENIGMA="
    assert activations(f"{enigma}4", 4) == activations(f"{enigma}1", 1)


def test_sharding_divides_what_lasts_and_accumulation_keeps_gradients():
    need = Demand(settings(), 2, False, FP32, gpu=False)
    always, gradients = need.lasting.always, need.lasting.gradients
    one, eight = (need.most(2, n, shards=True) for n in (1, 8))
    assert one["forward"] - eight["forward"] == pytest.approx(always * 7 / 8)
    assert always * 7 / 8 <= one["backward"] - eight["backward"] < (always + gradients) * 7 / 8  # they come one by one
    assert eight["update"] == pytest.approx(one["update"] / 8)
    assert need.most(2, 2)["forward"] - need.most(2)["forward"] == need.lasting.gradients  # DDP's buckets
    several = Demand(settings(), 2, True, FP32, gpu=False)
    assert several.most(2)["forward"] - need.most(2)["forward"] == need.lasting.gradients


def test_sharded_blocks_are_gathered_in_the_dtype_of_products_and_leave_no_rounded_copy():
    s = settings("N_LAYER=6 SEQ_LEN=8")
    copied, sharded = (count_pass(s, 1, torch.bfloat16, gpu=True, shards=shards) for shards in (False, True))
    with torch.device("meta"):
        blocks = LanguageModel(s.part(ModelConfig)).blocks
    size = sum(p.numel() for p in blocks.parameters())
    assert copied.activations - sharded.activations == pytest.approx(2 * size, rel=0.05)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("words", ["", "VOCAB_SIZE=1000000", "REVERSIBLE=1", "CHECKPOINT_ACTIVATIONS=1"])
def test_other_numbers_of_rows_follow_from_two(words, gpu):
    s = settings(words)
    need = Demand(s, 8, False, torch.bfloat16, gpu)
    found, right = need.at(21), count_pass(s, 21, torch.bfloat16, gpu)
    for name in ("activations", "forward", "head"):
        assert getattr(found, name) == pytest.approx(getattr(right, name), rel=0.03), name
    for share in (0, 0.5, 1):
        assert found.backward(share) == pytest.approx(right.backward(share), rel=0.03)


@pytest.mark.parametrize("shards", [False, True])
def test_the_largest_batch_fits_and_the_next_does_not(shards):
    need, room = Demand(settings(), 2, False, FP32, gpu=False), 50e6
    rows = need.largest(room, 8, shards)
    most = [max(need.most(n, 8, shards).values()) for n in (rows, rows + 1)]
    assert most[0] <= room < most[1]
    assert need.largest(1e5) == 0


def test_a_gpu_has_larger_groups_of_logits():
    assert head_chunks(8192, 32, 2**16, FP32, "meta") > 2 * head_chunks(8192, 32, 2**16, FP32, "cpu")


def test_a_group_of_logits_is_gone_before_the_next():
    group = loss.rows_that_hold(loss.GROUP_ELEMENTS["cpu"], 2**16)
    one, two = (head_chunks(n * group, 32, 2**16, FP32, "cpu") for n in (1, 2))
    assert two < 1.2 * one


@pytest.mark.parametrize("words", ["", "LOGIT_SOFTCAP=30 LABEL_SMOOTHING=0.1"])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_blocks_of_logits_that_are_not_run_are_counted_as_if_they_were(monkeypatch, words, dtype):
    """Groups of 64 rows, the last of 48, in blocks of 10, the last of a group of 4 or 8."""
    monkeypatch.setitem(loss.GROUP_ELEMENTS, "cpu", 64 * 5000)
    monkeypatch.setitem(loss.BLOCK_ELEMENTS, "cpu", 10 * 5000)
    s, runs = settings(f"VOCAB_SIZE=5000 SEQ_LEN=16 {words}"), []
    counted = count_pass(s, 11, dtype, gpu=False)
    monkeypatch.setattr(ledger.Ledger, "once", lambda self, function: lambda *a: runs.append(1) or function(*a))
    assert count_pass(s, 11, dtype, gpu=False) == counted
    assert len(runs) == 2 * 7 + 5


def test_the_ledger_forgets_what_is_gone():
    with ledger.ghosts() as book:
        a = torch.empty(1000)
        b = a * 2
        view = b[:10]
        assert book.alive == 8000
        del a, b
        assert book.alive == 4000 and view.numel() == 10
        del view
    assert book.alive == 0 and book.most == 8000
