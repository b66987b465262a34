"""From text to chat, for every preset and every kind of model: train, save, load, sample, tune with adapters."""

import pytest
import torch

import sample
import train
from configurator import ROOT
from conftest import tiny_run, tune
from runtime import checkpoint
from test_model import KINDS, shaken, tiny
from test_train import column, same

TUNED = {"counting_grpo", "stdlib_dpo"}  # these need a base: test_docs runs them after theirs
PRESETS = sorted({path.stem for path in (ROOT / "config").glob("*.py")} - TUNED)
# Every preset at the size of a toy: what makes it special stays.
TOY = dict(vocab_size=300, tokenizer="bpe", seq_len=48, d_model=48, n_layer=2, n_head=4, d_ff=64,
           total_batch_size=0, max_tokens=0, max_steps=3, eval_interval=3, eval_tokens=480, batch_size=4,
           warmup_steps=1)
MORE = {"mla_moe": dict(kv_rank=16, rope_dim=4, d_expert=16), "pretrain_enigma": dict(n_enigma=1),
        "lumen": dict(n_kv_head=2), "quickstart": dict(n_kv_head=2), "shakespeare_char": dict(n_kv_head=2)}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_loads_samples_and_takes_adapters(text, questions, tmp_path, capsys, preset):
    toy = TOY | {"n_kv_head": 4} | MORE.get(preset, {}) | ({} if preset != "mla_moe" else {"n_kv_head": 0})
    config = str(ROOT / "config" / f"{preset}.py")
    run = tmp_path / "run"
    assert train.main([config, *tiny_run(text, run, **(toy | {"data_path": text}))]) == 0
    assert len(column(run, "loss")) == 3
    model, tokenizer, state = checkpoint.load_model(run / "step_00000003.pt")
    assert same(model.state_dict(), state["model"])
    sample.main([f"init_from={run}", "--prompt", "the quick", "device=cpu", "max_new_tokens=5"])
    assert capsys.readouterr().out
    assert train.main(tune(text, run, questions, tmp_path / "tuned", max_steps=2, eval_interval=2, use_lora=1)) == 0
    tuned, _, state = checkpoint.load_model(tmp_path / "tuned" / "step_00000002.pt")
    ids = torch.randint(300, (1, 20))
    assert all("lora_" in name for name in state["model"]) and not torch.equal(tuned(ids), model(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind):
    """In fp32 and with the compiler's own graph, not its kernels: what the two disagree on is a mistake."""
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        model = shaken(tiny(kind)).train()
        for i, p in enumerate(model.parameters()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
        call = model
        if compiled and model.cfg.reversible:
            for block in model.blocks:
                block.chain.compile(backend="aot_eager")
        elif compiled:
            call = torch.compile(model, backend="aot_eager")
        loss = call(ids[:, :-1], ids[:, 1:]).sum()
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.compiler.reset()
    (a, eager), (b, compiled) = results
    assert a == pytest.approx(b, rel=1e-5) and (eager - compiled).norm() < 1e-4 * eager.norm()


@pytest.mark.parametrize("kind", ["moe", "mla moe"])
def test_experts_are_balanced_and_reported_by_a_run(text, tmp_path, go, kind):
    shape = {name: value for name, value in KINDS[kind].items() if name not in ("n_kv_head",)}
    go(max_steps=30, n_kv_head=4, **shape)
    run = tmp_path / "run"
    loads = column(run, "expert_load")
    assert len(loads) == 30 and all(1.0 <= load <= 8.0 for load in loads)
    if kind == "mla moe":
        bias = checkpoint.load(run / "step_00000030.pt")["model"]["blocks.1.ffn.bias"]
        assert bias.abs().max() > 0 and torch.allclose((bias / 1e-3).round() * 1e-3, bias, atol=1e-6)
    assert len(column(run, "balance")) == (30 if kind == "moe" else 0)


def test_the_balance_loss_is_beside_the_nats_and_has_a_gradient():
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for coefficient in (0.0, 1.0):
        model = shaken(tiny("moe", balance_loss=coefficient)).train()
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        nats, balance = model(ids[:, :-1], ids[:, 1:], with_balance=True)
        (nats.sum() + coefficient * 64 * balance).backward()
        results.append((nats.detach(), model.blocks[0].ffn.router.weight.grad, balance))
    (a, without, balance), (b, with_loss, _) = results
    assert torch.allclose(a, b) and balance > 1.0
    x, place = model.embed_at(ids[:, :-1])
    place.balance = []
    for block in model.blocks:
        x = block(x, place)
    by_hand = 64 * torch.stack(place.balance).mean()
    expected = torch.autograd.grad(by_hand, model.blocks[0].ffn.router.weight)[0]
    assert torch.allclose(with_loss - without, expected, atol=1e-4 * without.abs().max().item())


def test_a_checkpointed_model_with_experts_has_the_same_gradients():
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(0))
    grads, counts = [], []
    for again in (False, True):
        model = tiny("moe", checkpoint_activations=again, balance_loss=0.5).train()
        for i, p in enumerate(model.parameters()):
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
        nats, balance = model(ids[:, :-1], ids[:, 1:], with_balance=True)
        (nats.sum() + 32 * balance).backward()
        grads.append([p.grad for p in model.parameters()])
        counts.append(model.experts()[0].counts.clone())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    assert torch.equal(*counts) and counts[0].sum() == 2 * 64
