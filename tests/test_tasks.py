"""Benchmarks: the answers and scores of lm-evaluation-harness on the same files, whatever stands in them."""

import http.server
import json
import random
import threading
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch

import eval as evaluation
from configurator import UserError
from eval import (
    Choice,
    alike,
    cast_products,
    log_likelihoods,
    question_batches,
    result,
    run_task,
    summarise,
    to_choice,
)
from model import LanguageModel, ModelConfig
from runtime.device import MachineSettings, choose_machine
from test_serve import make_model, start
from text import tasks
from text.tasks import TASKS, Question, clean, open_task, task_names
from text.tokenizer_files import load_tokenizer, train_tokenizer

WORDS = "a cake the dog runs [title] [step] water ice HOT cold.  why? which of these is 1 24 café 水 move".split(" ")
MACHINE = choose_machine(MachineSettings(device="cpu", dtype="float32"))
N = 24


def words(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder with the files as they were published, {task: {split: records as the Hub has them}})"""
    folder, r, hub = tmp_path_factory.mktemp("tasks"), random.Random(5), {}
    for name, title in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
        hub[name] = {}
        for split, of_file in (("train", "Train"), ("validation", "Dev"), ("test", "Test")):
            rows = []
            for i in range(N):
                labels = list("ABCDE" if i % 3 else "12345")[: r.randint(3, 5)]
                texts = [words(r, 1, 6) for _ in labels]
                if i % 5 == 0:
                    texts[1] = texts[0]  # a tie
                stem = words(r, 3, 60 if i % 7 == 0 else 12) + " \n" * (i % 4 == 0)
                rows.append({"id": f"{split}{i}", "question": stem, "choices": {"text": texts, "label": labels},
                             "answerKey": r.choice(labels)})
            hub[name][split] = rows
            write(folder / f"ARC-V1-Feb2018-2/{title}/{title}-{of_file}.jsonl", [
                {"id": row["id"], "answerKey": row["answerKey"], "question": {"stem": row["question"], "choices": [
                    {"text": choice, "label": label} for choice, label in zip(*row["choices"].values(), strict=True)
                ]}} for row in rows])
    hub["hellaswag"], hub["piqa"] = {}, {}
    for split, swag, piqa in (("train", "train", "train"), ("validation", "val", "valid")):
        rows = [{"ind": i, "activity_label": words(r, 1, 2), "ctx_a": words(r, 4, 20), "ctx_b": words(r, 0, 3),
                 "endings": [words(r, 2, 12) for _ in range(4)], "label": r.randint(0, 3)} for i in range(N)]
        write(folder / f"swag/hellaswag_{swag}.jsonl", rows)
        hub["hellaswag"][split] = [row | {"label": str(row["label"])} for row in rows]
        rows = [{"goal": words(r, 2, 10) + " " * (i % 2), "sol1": words(r, 1, 9), "sol2": words(r, 1, 9)}
                for i in range(N)]
        labels = [r.randint(0, 1) for _ in rows]
        if split == "train":
            twice = rows[0], labels[0]
        rows[-1], labels[-1] = twice  # a question that is among the few-shot examples, there twice
        write(folder / f"physicaliqa/{piqa}.jsonl", rows)
        (folder / f"physicaliqa/{piqa}-labels.lst").write_text("".join(f"{label}\n" for label in labels))
        hub["piqa"][split] = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    return folder, hub


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{kind: (our tokenizer, folder with its files)}, with a begin-of-text token and without."""
    found = {}
    for kind in ("plain", "bos"):
        folder = tmp_path_factory.mktemp(kind)
        train_tokenizer("bpe", [" ".join(WORDS) * 3 + "\nQuestion: Answer:"], 330).save(folder)
        if kind == "bos":
            path = folder / "tokenizer.json"
            document = json.loads(path.read_text(encoding="utf-8"))
            begin = {"id": "<|endoftext|>", "type_id": 0}
            number = next(t["id"] for t in document["added_tokens"] if t["content"] == "<|endoftext|>")
            texts = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
            document["post_processor"] = {
                "type": "TemplateProcessing", "single": [{"SpecialToken": begin}, *texts[:1]], "pair": texts,
                "special_tokens": {"<|endoftext|>": begin | {"ids": [number], "tokens": ["<|endoftext|>"]}}}
            path.write_text(json.dumps(document), encoding="utf-8")
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>"}))
        found[kind] = load_tokenizer(folder), folder
    return found


@pytest.fixture(scope="module")
def gpt2(tokenizers):
    """{"random" | "trained": model}; contexts of 25-shot examples do not fit."""
    models = {}
    for name in ("random", "trained"):
        torch.manual_seed(1)
        model = LanguageModel(ModelConfig(
            vocab_size=tokenizers["plain"][0].vocab_size, seq_len=96, d_model=32, n_layer=2, n_head=4, n_kv_head=4,
            ffn="gelu", norm="layernorm", norm_eps=1e-5, qk_norm=False, position="learned", bias=True))
        if name == "trained":
            ids = torch.tensor(tokenizers["plain"][0].encode(words(random.Random(2), 900, 900)))
            optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
            for step in range(40):
                rows = torch.stack([ids[i : i + 65] for i in range(step, step + 512, 64)])
                model(rows[:, :-1], rows[:, 1:].contiguous()).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        models[name] = model.eval()
    return models


@pytest.fixture(scope="module")
def harness(data, tmp_path_factory):
    """Run a task of the harness as it is, but for where its data come from: results and samples."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import PreTrainedTokenizerFast

    from benchmarks.generation import as_transformers

    root, manager = Path(evaluator.__file__).parent / "tasks", TaskManager(include_defaults=False)

    def go(name, model, folder, n_shot, limit=None, lm=None):
        config = load_yaml(next(root.glob(f"*/{name}.yaml")))
        rows = {split: datasets.Dataset.from_list(rows) for split, rows in data[1][name].items()}
        config["custom_dataset"] = lambda **_: datasets.DatasetDict(rows)
        task = ConfigurableTask(config=config | {"num_fewshot": n_shot})
        if not lm:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            peer = as_transformers(model, load_tokenizer(folder), tmp_path_factory.mktemp("hf"))
            lm = HFLM(pretrained=peer, tokenizer=tokenizer, batch_size=8, max_length=model.cfg.seq_len, device="cpu")
        found = evaluator.simple_evaluate(lm, tasks=[task], limit=limit, log_samples=True,
                                          task_manager=manager)
        return found["results"][name], found["samples"][name]

    return go


def load(name, folder, n_shot=0, limit=0):
    return open_task(name, n_shot, limit, task_dir=str(folder))[0]


def ours(name, model, tokenizer, folder, n_shot, limit=0, **how):
    batches = run_task(model, tokenizer, load(name, folder, n_shot, limit), MACHINE, **how)
    return sorted(chain.from_iterable(batches), key=lambda each: each["id"])


def compare(results: list[dict], theirs: dict, samples: list[dict]) -> None:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    for sample, mine in zip(samples, results, strict=True):
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert mine["scores"] == pytest.approx(scores, abs=1e-4)
        assert mine["gold"] == int(sample["target"])
        assert (mine["acc"], mine["acc_norm"]) == (sample["acc"], sample["acc_norm"])
    summary = summarise(results)
    for metric in ("acc", "acc_norm"):
        assert summary[metric] == pytest.approx(theirs[f"{metric},none"], abs=1e-12)
        assert summary[f"{metric}_stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"], abs=1e-12)


@pytest.mark.parametrize("name, which, kind, n_shot, limit", [
    ("arc_easy", "random", "plain", 0, 0), ("arc_easy", "trained", "bos", 3, 11),
    ("arc_challenge", "trained", "plain", 1, 0), ("hellaswag", "trained", "plain", 0, 0),
    ("hellaswag", "random", "bos", 2, 0), ("piqa", "trained", "bos", 0, 0), ("piqa", "random", "plain", 20, 0),
])
def test_choices_scores_and_errors_are_those_of_the_harness(harness, data, tokenizers, gpt2, name, which, kind, n_shot,
                                                            limit):
    tokenizer, folder = tokenizers[kind]
    theirs, samples = harness(name, gpt2[which], folder, n_shot, limit or None)
    results = ours(name, gpt2[which], tokenizer, data[0], n_shot, limit, batch_tokens=700)
    assert any(each["cut"] for each in results) == bool(n_shot)
    compare(results, theirs, samples)


@pytest.mark.parametrize("name", ["arc_easy", "piqa"])
def test_through_the_server_the_harness_gets_the_scores_of_ours(harness, data, tokenizers, gpt2, name):
    """Its `local-completions`, which sends ids and reads the log probabilities of the prompt."""
    pytest.importorskip("tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer, folder = tokenizers["plain"]
    served = make_model(tokenizer, "gpt2", model=gpt2["trained"])
    server = start(served)
    lm = LocalCompletionsAPI(base_url=f"{server.address()}/v1/completions", model="gpt2", tokenizer=str(folder),
                             tokenizer_backend="huggingface", max_length=97, batch_size=4, num_concurrent=3)
    theirs, samples = harness(name, gpt2["trained"], folder, 0, lm=lm)
    compare(ours(name, gpt2["trained"], tokenizer, data[0], 0), theirs, samples)
    server.shutdown()
    server.close()


KINDS = {
    "modern": {}, "window": dict(window=6), "alibi": dict(position="alibi"), "softcap": dict(logit_softcap=5.0),
    "latent": dict(attention="mla", qk_norm=False), "experts": dict(n_expert=4, balance="bias"),
    "enigma": dict(reversible=True, n_enigma=1, position="alibi"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_every_kind_of_model_are_those_of_whole_texts_one_by_one(kind):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=50, seq_len=40, d_model=32, n_layer=2, n_head=4, **KINDS[kind])).eval()
    r = random.Random(0)
    rows = []
    for length in (3, 17, 17, 30, 1) * 6:  # enough for choices of several lengths to go apart
        context = r.choices(range(50), k=length)
        rows += [Choice(context, r.choices(range(50), k=k), False) for k in (1, 4, 10)]
    rows += [Choice(r.choices(range(50), k=39), [4, 5], False), Choice([1], r.choices(range(50), k=40), False)]
    for row, score in zip(rows, log_likelihoods(model, rows, MACHINE), strict=True):
        ids = torch.tensor([row.context + row.continuation])
        with torch.no_grad():
            logs = model(ids[:, :-1]).log_softmax(dim=-1)[0, -len(row.continuation) :]
        alone = logs.gather(1, ids[0, -len(row.continuation) :, None]).sum().item()
        assert score == pytest.approx(alone, abs=1e-4)


def test_results_do_not_depend_on_the_batches(data, tokenizers, gpt2):
    one, other = (ours("arc_easy", gpt2["trained"], tokenizers["plain"][0], data[0], 2, batch_tokens=n)
                  for n in (1, 100_000))
    for a, b in zip(one, other, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)
        assert a["answer"] == b["answer"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_cast_once_score_as_those_that_autocast_casts(kind):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=50, seq_len=40, d_model=32, n_layer=2, n_head=4, **KINDS[kind])).eval()
    machine, r = choose_machine(MachineSettings(device="cpu", dtype="bfloat16")), random.Random(0)
    rows = [Choice(r.choices(range(50), k=20), r.choices(range(50), k=6), False) for _ in range(8)]
    before = log_likelihoods(model, rows, machine)
    cast_products(model, machine.dtype)
    assert model.embed.weight.dtype == torch.float32
    assert log_likelihoods(model, rows, machine) == pytest.approx(before, abs=2e-3)


def test_batches_hold_every_example_once_and_keep_to_their_size():
    r = random.Random(0)
    rows = [[Choice([1] * r.randint(1, 60), [1] * r.randint(1, 9), False) for _ in range(4)] for _ in range(50)]
    found = list(question_batches(rows, 1000))
    assert sorted(i for batch in found for i in batch) == list(range(50)) and len(found) < 25
    for batch in found:
        longest = max(len(row.context) + len(row.continuation) for i in batch for row in rows[i])
        assert len(batch) == 1 or 4 * len(batch) * longest <= 1000


def test_rows_of_about_one_length_go_together():
    assert list(alike([2, 9, 8, 6, 5, 10], least=18)) == [[5, 1, 2], [3, 4, 0]]
    assert list(alike([2, 9, 8], least=1000)) == [[1, 2, 0]]
    assert list(alike([])) == []


def test_of_equal_scores_the_first_choice_counts():
    example = Question("q", ["ab", "ab", "c"], 1, {})
    found = result(0, example, [Choice([0], [1], False)] * 3, [-1.0, -1.0, -3.0])
    assert (found["answer"], found["answer_norm"], found["acc"]) == (0, 0, 0)


def test_the_marks_of_wikihow_go_as_in_the_harness(data):
    from_harness = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    for text in (" a [title] b", "[step] a  [substeps] b   c", "a [x[y]] b ", "[header]\n[title]", "  "):
        assert clean(text) == from_harness.preprocess(text)
    record = {"activity_label": "A", "ctx_a": "b.", "ctx_b": "the USA", "endings": [], "label": "0"}
    example = tasks.parse_hellaswag(record)
    assert example.query == "A: b. The usa"


def test_a_begin_token_is_added_as_the_files_say_or_as_asked(tokenizers):
    plain, with_bos = tokenizers["plain"][0], tokenizers["bos"][0]
    eot = plain.role("eot")
    assert (plain.begin_ids(), with_bos.begin_ids()) == ([], [eot])
    assert (plain.begin_ids("yes"), with_bos.begin_ids("no")) == ([eot], [])


def test_white_space_at_the_end_of_a_context_goes_to_the_continuation(tokenizers):
    tokenizer = tokenizers["plain"][0]
    row = to_choice(tokenizer, "the dog \n", "runs", 99, [])
    assert tokenizer.decode(row.context) == "the dog" and tokenizer.decode(row.continuation) == " \n runs"
    assert to_choice(tokenizer, "", "the dog", 99, []).context == [tokenizer.role("eot")]


def test_single_example_has_no_standard_error():
    assert summarise([{"acc": 1, "acc_norm": 0, "cut": False}])["acc_stderr"] is None


# ---- files


def test_parquet_files_as_on_the_hub_give_the_same_examples(data, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, folder, split in (("arc_challenge", "ARC-Challenge", "test"), ("piqa", "piqa/plain_text", "validation"),
                                ("hellaswag", "hellaswag/data", "validation")):
        path = tmp_path / folder / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(data[1][name][split]), path)
        for a, b in zip(load(name, tmp_path), load(name, data[0]), strict=True):
            assert (a.query, a.choices, a.gold) == (b.query, b.choices, b.gold)


def test_files_are_downloaded_once(data, tmp_path, monkeypatch):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(data[0]))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/physicaliqa/valid{end}" for end in (".jsonl", "-labels.lst")]
        monkeypatch.setitem(TASKS["piqa"].urls, "validation", urls)
        (first, _), (second, _) = (open_task("piqa", cache_dir=str(tmp_path)) for _ in range(2))
        server.shutdown()
    assert first == second == load("piqa", data[0]) and len(asked) == 2


def test_mistakes_end_in_a_sentence(data, tmp_path):
    def refused(sentence, name="piqa", folder=tmp_path, **more):
        with pytest.raises(UserError, match=sentence):
            load(name, folder, **more)

    refused(f"piqa or physicaliqa in its path.*validation.*{tmp_path}")
    refused(f"n_shot={N} needs {N + 1}", folder=data[0], n_shot=N)
    write(tmp_path / "piqa" / "valid.jsonl", [])
    refused("valid.jsonl holds no questions")
    write(tmp_path / "piqa" / "valid.jsonl", [{"goal": "a", "sol1": "b", "label": 0}])
    refused(r"valid.jsonl, line 1 is not an example of piqa: .*sol2")
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    refused("has 2 labels for the 1 lines of valid.jsonl")


def test_examples_on_the_screen_mark_the_right_choice_and_the_answer():
    example = Question("Question: q\nAnswer:", ["good", "bad"], 0, {})
    rows = [Choice([0], [1], False)] * 2
    shown = evaluation.show_answers([result(i, example, rows, s) for i, s in enumerate(([-1.0, -2.0], [-9.0, -1.0]))])
    assert [line.split()[0] for line in shown.splitlines()] == [
        "right:", "Answer:", ">*", "-0.667", "wrong:", "Answer:", "*", ">"]


HUB = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
SWAG = {"activity_label": "l", "ctx_a": "a", "ctx_b": "b", "endings": ["c", "d"], "label": "1"}


@pytest.mark.parametrize("name, changes, complaint", [
    ("arc_easy", {"question": None}, "question is a NoneType"),
    ("arc_easy", {"choices": {"text": ["a", None], "label": ["A", "B"]}}, r"choices.text\[1\] is a NoneType"),
    ("arc_easy", {"choices": {"text": ["a", 3], "label": ["A", "B"]}}, r"choices.text\[1\] is a int"),
    ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "1 choices with 2 different"),
    ("arc_easy", {"choices": {"text": ["a"], "label": ["A"]}}, "0 of 1 choices"),
    ("arc_easy", {"answerKey": "C" * 99}, r"the answer C{40}\.\.\. of"),
    ("arc_easy", {"answerKey": "C"}, "the answer C of the choices A, B"),
    ("arc_easy", {"question": {"stem": "q", "choices": [{"text": 1, "label": "A"}]}}, "text is a int"),
    ("hellaswag", {"endings": "abcd"}, "endings is a str"),
    ("hellaswag", {"endings": ["c", None]}, r"endings\[1\] is a NoneType"),
    ("hellaswag", {"label": 1.9}, "label is a float"), ("hellaswag", {"label": True}, "label is a bool"),
    ("hellaswag", {"label": ""}, "invalid literal"), ("hellaswag", {"label": 2}, "the answer 2 of 2 choices"),
    ("hellaswag", {"ctx_a": None}, "ctx_a is a NoneType"),
])
def test_a_question_of_another_shape_is_refused_with_file_and_line(tmp_path, name, changes, complaint):
    record = (SWAG if name == "hellaswag" else HUB)
    path = tmp_path / name / ("validation.jsonl" if name == "hellaswag" else "test.jsonl")
    write(path, [record, record | changes])
    with pytest.raises(UserError, match=rf"{path.name}, line 2 is not an example of {name}: .*{complaint}"):
        load(name, tmp_path)


@pytest.mark.parametrize("names", [
    ["hellaswag_val.jsonl", "hellaswag_val_old.jsonl"], ["hellaswag_val.jsonl", "hellaswag_val2.jsonl"],
    ["hellaswag_val.jsonl", "hellaswag_val (1).jsonl"], ["hellaswag_val_v1.jsonl", "hellaswag_val_v2.jsonl"],
    ["hellaswag_val_2023.jsonl", "hellaswag_val_2024.jsonl"], ["hellaswag/val.jsonl", "old/hellaswag_val.jsonl"],
    ["hellaswag_dev.jsonl", "hellaswag_val.jsonl"],
])
def test_files_that_look_like_versions_of_one_are_refused(tmp_path, names):
    for i, name in enumerate(names):
        write(tmp_path / name, [SWAG | {"ctx_a": str(i)}])
    with pytest.raises(UserError, match="hellaswag: .* look like versions of one file"):
        load("hellaswag", tmp_path)


def test_numbered_parts_are_read_in_order_unless_they_repeat_a_question(tmp_path):
    for i in range(12):
        write(tmp_path / f"hellaswag_val-{i:02}-of-12.jsonl", [SWAG | {"ctx_a": str(i)}])
    write(tmp_path / "._hellaswag_val-00-of-12.jsonl", [])  # of a Mac
    assert [each.record["ctx_a"] for each in load("hellaswag", tmp_path)] == [str(i) for i in range(12)]
    write(tmp_path / "hellaswag_val-11-of-12.jsonl", [SWAG | {"ctx_a": "3"}])
    with pytest.raises(UserError, match="-11-of-12.jsonl, line 1 is also in hellaswag_val-03-of-12.jsonl"):
        load("hellaswag", tmp_path)


@pytest.mark.parametrize("names, sentence", [
    (",", "names no task"), (" ", "names no task"), (", ,", "names no task"),
    ("arc_easy,mmlu", "mmlu.*arc_easy, arc_challenge, hellaswag, piqa"),
])
def test_tasks_that_do_not_exist_are_refused(names, sentence):
    with pytest.raises(UserError, match=sentence):
        task_names(names)
