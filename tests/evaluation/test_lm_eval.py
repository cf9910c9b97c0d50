"""Tasks of lm-evaluation-harness on a run folder, against plain computations."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megastruct.errors import UserError
from megastruct.evaluation.lm_eval import MegastructLM
from megastruct.evaluation.model import open_model
from megastruct.evaluation.tasks import Tasks, task_table
from ranks import run_ranks
from saved_runs import SEQ_LENGTH, Material

QUESTIONS = [
    {"question": "river stone", "choices": ["light", "garden winter", "42"], "answer": 1},
    {"question": "letter", "choices": ["market", "café", "engine paper silver"], "answer": 0},
    {"question": "paper 42 winter", "choices": ["stone", "river", "café"], "answer": 2},
    {"question": "silver", "choices": ["winter", "stone", "日本"], "answer": 0},
]
PASSAGES = [
    {"text": "river stone light"},
    {"text": "the café of 日本 " * 8},
    {"text": "winter"},
]
STARTS = [{"start": "river"}, {"start": "stone light garden"}, {"start": "日本"}]

CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
"""
GENERATE = """
task: tiny_generate
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "nothing like it"
generation_kwargs: {until: ["."], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for text, documents in ((CHOICE, QUESTIONS), (ROLLING, PASSAGES), (GENERATE, STARTS)):
        name = text.split()[1]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        kwargs = json.dumps({"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")})
        loading = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {kwargs}\n"
        (folder / f"{name}.yaml").write_text(text + loading)
    return folder


@pytest.fixture(scope="module")
def model(material: Material) -> MegastructLM:
    return MegastructLM(str(material.run()), device="cpu", batch_size=3)


@torch.no_grad()
def plain(model: MegastructLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Token by token in one row, which the model can read whole."""
    total, greedy = 0.0, True
    for index, token in enumerate(continuation):
        logits = model.loaded.model(torch.tensor([context + continuation[:index]]))[-1, 0]
        total += float(logits.double().log_softmax(-1)[token])
        greedy = greedy and int(logits[: model.loaded.tokenizer.vocab_size].argmax()) == token
    return total, greedy


def requests(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]


def run_tasks(model: MegastructLM, folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    return Tasks([name], folder).run(model.loaded, batch_size=3, **keys)


def test_a_multiple_choice_task(model: MegastructLM, task_folder: Path) -> None:
    results = run_tasks(model, task_folder, "tiny_choice")
    right = 0
    for question in QUESTIONS:
        context = model.tok_encode(question["question"])
        scores = [
            plain(model, context, model.tok_encode(f"{question['question']} {choice}")[len(context) :])[0]
            for choice in question["choices"]
        ]
        right += scores.index(max(scores)) == question["answer"]
    assert results["results"]["tiny_choice"]["acc,none"] == right / len(QUESTIONS)
    assert results["n-samples"]["tiny_choice"] == {"original": 4, "effective": 4}
    assert run_tasks(model, task_folder, "tiny_choice", limit=2)["n-samples"]["tiny_choice"]["effective"] == 2


def test_the_table_has_the_names_of_its_columns(model: MegastructLM, task_folder: Path) -> None:
    head = task_table(run_tasks(model, task_folder, "tiny_choice")).splitlines()[0]
    assert [name.strip() for name in head.split("|")[1:6]] == ["Tasks", "Version", "Filter", "n-shot", "Metric"]


def slow_rolling(model: MegastructLM, text: str) -> float:
    """Windows of the model's context; the last one reaches back as far as it can."""
    ids, total = model.tok_encode(text), 0.0
    for index, token in enumerate(ids):
        window = index // SEQ_LENGTH
        is_last = (window + 1) * SEQ_LENGTH >= len(ids)
        first = max(0, len(ids) - SEQ_LENGTH) if is_last and window else window * SEQ_LENGTH
        context = ([model.eot_token_id, *ids])[first : index + 1]  # from one token before the window's first target
        total += plain(model, context, [token])[0]
    return total


def test_a_rolling_task(model: MegastructLM, task_folder: Path) -> None:
    results = run_tasks(model, task_folder, "tiny_rolling")["results"]["tiny_rolling"]
    total = sum(slow_rolling(model, passage["text"]) for passage in PASSAGES)
    num_bytes = sum(len(passage["text"].encode()) for passage in PASSAGES)
    assert results["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    assert results["byte_perplexity,none"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-5)


def slow_greedy(model: MegastructLM, prompt: str, limit: int, stops: list[str]) -> str:
    tokenizer = model.loaded.tokenizer
    start = tokenizer.encode([prompt])[0].tolist() or [tokenizer.eod_id]
    ids = start[-max(SEQ_LENGTH - limit, SEQ_LENGTH // 2) :]
    before = len(tokenizer.decode(ids))
    for _ in range(min(limit, SEQ_LENGTH - len(ids))):
        scores = model.loaded.model(torch.tensor([ids]))[-1, 0, : tokenizer.vocab_size].tolist()
        token = scores.index(max(scores))
        if token == tokenizer.eod_id:
            break
        ids = [*ids, token]
    text = tokenizer.decode(ids)[before:]
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def test_a_generation_task(model: MegastructLM, task_folder: Path, material: Material) -> None:
    results = lm_eval.simple_evaluate(
        model="megastruct",
        model_args=f"run={material.run()},device=cpu",
        tasks=["tiny_generate"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
    )
    assert results
    found = [sample["resps"][0][0] for sample in results["samples"]["tiny_generate"]]
    assert found == [slow_greedy(model, document["start"], 5, ["."]) for document in STARTS]
    assert len(set(found)) > 1 and results["results"]["tiny_generate"]["exact_match,none"] == 0


@pytest.mark.parametrize(
    ("context", "options"),
    [
        ("river", {"max_gen_toks": 7}),
        ("river", {"until": "e"}),
        ("", {"until": ["a", "o"], "max_new_tokens": 9}),
        ("river stone light garden winter letter market silver engine", {"until": [], "max_gen_toks": 6}),
        ("river stone light garden winter letter market silver engine", {}),  # asks for more than the context has
    ],
)
@torch.no_grad()
def test_generation_stops_as_it_is_told(model: MegastructLM, context: str, options: dict[str, Any]) -> None:
    [text] = model.generate_until(requests("generate_until", (context, options)))
    limit = options.get("max_gen_toks", options.get("max_new_tokens", SEQ_LENGTH - 1))
    until = options.get("until", [])
    assert text == slow_greedy(model, context, limit, [until] if isinstance(until, str) else until)
    assert text


def test_loglikelihoods(model: MegastructLM) -> None:
    """Among them: no context, blank context, no continuation, a context and a continuation that are too long."""
    pairs = [
        ("", "river stone"),
        ("river", " stone light"),
        ("river ", "stone light"),
        (" ", "river"),
        ("river", ""),
        ("", ""),
        ("river stone light " * 9, "garden"),
        ("river", " " + "stone light garden " * 9),
    ]
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    eod, encode = [model.eot_token_id], model.tok_encode
    river, long = encode("river"), encode("river stone light " * 9 + "garden")
    continuation = encode("river " + "stone light garden " * 9)[len(river) :]
    assert len(continuation) > SEQ_LENGTH
    wanted = [
        plain(model, eod, encode("river stone")),
        plain(model, river, encode("river stone light")[len(river) :]),
        plain(model, river, encode("river stone light")[len(river) :]),
        plain(model, eod, encode(" river")),
        (0.0, True),
        (0.0, True),
        plain(model, long[:-1][-SEQ_LENGTH:], long[-1:]),
    ]
    assert [greedy for _, greedy in found[:-1]] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found[:-1]] == pytest.approx([value for value, _ in wanted], rel=1e-5)
    total = 0.0
    for index, token in enumerate(continuation):
        window = index // SEQ_LENGTH
        is_last = (window + 1) * SEQ_LENGTH >= len(continuation)
        first = len(continuation) - SEQ_LENGTH if is_last else window * SEQ_LENGTH
        total += plain(model, ([river[-1], *continuation])[first : index + 1], [token])[0]
    assert found[-1][0] == pytest.approx(total, rel=1e-5)


def test_a_greedy_continuation_is_known_as_such(model: MegastructLM) -> None:
    context = model.tok_encode("river")
    with torch.no_grad():
        logits = model.loaded.model(torch.tensor([context]))[-1, 0, : model.loaded.tokenizer.vocab_size]
    best, worst = int(logits.argmax()), int(logits.argmin())
    found = model._loglikelihood_tokens([(("", ""), context, [token]) for token in (best, worst)])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] == pytest.approx(plain(model, context, [best])[0], rel=1e-5)


def answers(run: Path) -> list[Any]:
    torch.set_num_threads(1)
    model = MegastructLM(str(run), device="cpu", batch_size=2)
    texts = [("", "river"), ("river", " stone light"), ("winter", " café"), ("letter", " 42")]
    return [
        model.loglikelihood(requests("loglikelihood", *texts), disable_tqdm=True),
        model.loglikelihood_rolling(requests("loglikelihood_rolling", ("日本 " * 20,), ("river",))),
        model.generate_until(requests("generate_until", *[(start["start"], {"max_gen_toks": 3}) for start in STARTS])),
    ]


def test_ranks_share_the_work_and_all_know_the_results(material: Material) -> None:
    alone = run_ranks(1, answers, material.run())
    assert run_ranks(3, answers, material.run()) == alone * 3


def test_separate_documents_are_scored_as_in_training(material: Material) -> None:
    """The end-of-document token before a text is in another document, which the second token does not see."""
    model = MegastructLM(str(material.run("separate")), device="cpu")
    ids = model.tok_encode("river stone")
    [(found, _)] = model.loglikelihood(requests("loglikelihood", ("", "river stone")), disable_tqdm=True)
    wanted = plain(model, [model.eot_token_id], ids[:1])[0] + plain(model, ids[:1], ids[1:])[0]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_an_unknown_task_names_the_nearest(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # fast
    assert Tasks(["tiny_[cr]*"], task_folder).names == ["tiny_choice", "tiny_rolling"]
    with pytest.raises(UserError) as caught:
        Tasks(["tiny_chioce", "tiny_rolling", "zzzzzzzz"], task_folder)
    first, second = caught.value.problems
    assert first.found == "tiny_chioce is not a task" and first.suggestion.split(", ")[0] == "tiny_choice"
    assert "zzzzzzzz" in second.found and "lm-eval ls tasks" in second.suggestion


@pytest.mark.soak
def test_the_tasks_of_the_harness_are_known_beside_those_of_a_folder(task_folder: Path) -> None:
    assert Tasks(["tiny_choice", "piqa"], task_folder).names == ["tiny_choice", "piqa"]
    with pytest.raises(UserError, match=r"lambada_opena is not a task\n.*lambada_openai"):
        Tasks(["lambada_opena"])


def test_data_of_a_task_that_is_gone(model: MegastructLM, tmp_path: Path) -> None:
    kwargs = json.dumps({"data_files": str(tmp_path / "gone.jsonl")})
    (tmp_path / "gone.yaml").write_text(
        CHOICE.replace("tiny_choice", "gone") + f"dataset_path: json\ntest_split: train\ndataset_kwargs: {kwargs}\n"
    )
    with pytest.raises(UserError, match="data of gone cannot be read"):
        run_tasks(model, tmp_path, "gone")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("doc_to_text:", "doc_to_text: '{{gone}}' #"),
        ("metric: acc", "metric: none"),
        ("test_split:", "test_split: a #"),
    ],
)
def test_a_mistake_in_the_file_of_a_task(model: MegastructLM, task_folder: Path, tmp_path: Path, before, after) -> None:
    text = (task_folder / "tiny_choice.yaml").read_text()
    assert before in text
    (tmp_path / "task.yaml").write_text(text.replace(before, after))
    with pytest.raises(UserError, match="tiny_choice cannot be run"):
        run_tasks(model, tmp_path, "tiny_choice")


def test_an_error_of_the_model_keeps_its_traceback(model: MegastructLM, task_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(MegastructLM, "_score_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_tasks(model, task_folder, "tiny_choice")


def test_a_task_may_sample(model: MegastructLM) -> None:
    options = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 8}
    ask = requests("generate_until", ("river", options), ("river", {"max_gen_toks": 8}), ("river", options))
    first, greedy, other = model.generate_until(ask)
    assert model.generate_until(ask) == [first, greedy, other]
    assert len({first, greedy, other}) == 3


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'megastruct\[lm-eval\]'"):
        Tasks(["piqa"])


def test_arguments_of_the_model(material: Material) -> None:
    folder = material.run() / "checkpoints" / "step_00000010"
    model = MegastructLM.create_from_arg_string(f"run={folder},dtype=bfloat16", {"batch_size": "auto", "device": "cpu"})
    assert model.loaded.step == 10 and next(model.loaded.model.parameters()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="float32 or bfloat16"):
        MegastructLM(str(folder), dtype="float16")
    assert open_model(folder, "cpu").step == 10
