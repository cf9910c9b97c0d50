"""The loss on tokens and text against a slow reference in float64, which predicts every token on its own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megastruct.data import open_data
from megastruct.data.options import DataOptions
from megastruct.data.split import is_validation
from megastruct.errors import UserError
from megastruct.evaluation.loss import Score, evaluate, sum_of
from megastruct.evaluation.model import open_model
from megastruct.evaluation.sources import Selection, Source, Sources
from megastruct.inference.load import Loaded
from ranks import run_ranks
from saved_runs import SEQ_LENGTH, VALIDATION_FRACTION, Material, run_config, save_run, write_jsonl


def sources_of(run: Path, loaded: Loaded, *data: str | Path, **selection: object) -> list[Source]:
    found = Sources(run, loaded, Selection(**selection))  # type: ignore[arg-type]
    return found.given([str(word) for word in data]) if data else found.own()


def scores(run: Path, *data: str | Path, batch_size: int = 3, **selection: object) -> dict[str, Score]:
    loaded = open_model(run, "cpu")
    return {source.name: evaluate(loaded, source, batch_size) for source in sources_of(run, loaded, *data, **selection)}


def texts_of(material: Material, source: str, split: str) -> list[str]:
    wanted = {"all": (False, True), "validation": (True,), "train": (False,)}[split]
    return [text for text in material.texts[source] if is_validation(text.encode(), VALIDATION_FRACTION) in wanted]


def stream(run: Path, texts: list[str]) -> list[int]:
    tokenizer = open_model(run, "cpu").tokenizer
    return [token for text in texts for token in (*tokenizer.encode([text])[0].tolist(), tokenizer.eod_id)]


@torch.no_grad()
def slow_losses(run: Path, tokens: list[int], separate: bool) -> list[float]:
    """The loss of every token in nats, by a model in float64 that reads only what the token may see."""
    loaded = open_model(run, "cpu", torch.float64)
    loaded.model.eod_id = None
    eod_id, losses = loaded.tokenizer.eod_id, []
    for index, token in enumerate(tokens):
        if index == 0:
            context = [eod_id]
        else:
            first = (index - 1) // SEQ_LENGTH * SEQ_LENGTH  # of the row
            if separate:
                ends = [place for place in range(index - 1) if tokens[place] == eod_id]
                first = max([first, *(end + 1 for end in ends)])
            context = tokens[first:index]
        logits = loaded.model(torch.tensor([context]))[-1, 0]
        losses.append(-float(logits.log_softmax(-1)[token]))
    return losses


@pytest.mark.parametrize("name", ["crossed", "separate"])
@pytest.mark.parametrize("split", ["validation", "train", "all"])
def test_token_shards_and_text_against_the_reference(material: Material, name: str, split: str) -> None:
    run = material.run(name)
    found = {"shards": scores(run, material.tokens("web"), split=split)["web"]}
    if split == "all":
        found["text"] = scores(run, material.text("web"))["web"]
        texts = [text for own in ("train", "validation") for text in texts_of(material, "web", own)]
    else:
        found["text"] = scores(run, material.text("web"), split=split)["web"]
        texts = texts_of(material, "web", split)
    tokens = stream(run, texts)
    losses = slow_losses(run, tokens, name == "separate")
    num_bytes = sum(len(text.encode()) for text in texts)
    for kind, score in found.items():
        assert (score.num_tokens, score.num_bytes) == (len(tokens), num_bytes), kind
        if kind == "shards" or split != "all":  # of all, the documents come in another order
            assert score.total == pytest.approx(math.fsum(losses), rel=1e-6)
            assert score.loss == pytest.approx(np.mean(losses), rel=1e-6)
            assert score.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
            assert score.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-6)
    if split != "all":
        assert found["shards"] == found["text"]


@pytest.mark.parametrize("num_tokens", [1, 2, SEQ_LENGTH, SEQ_LENGTH + 1, SEQ_LENGTH + 2, 3 * SEQ_LENGTH + 1, 60])
def test_the_last_row_may_be_short(material: Material, num_tokens: int) -> None:
    run = material.run()
    score = scores(run, material.text("web"), batch_size=2, max_tokens=num_tokens)["web"]
    tokens = stream(run, material.texts["web"])[:num_tokens]
    assert score.num_tokens == num_tokens
    assert score.total == pytest.approx(sum(slow_losses(run, tokens, False)), rel=1e-6)


def test_the_batch_size_changes_only_rounding(material: Material) -> None:
    found = [scores(material.run(), material.tokens("web"), batch_size=size)["web"] for size in (1, 4, 100)]
    assert [score.loss for score in found] == pytest.approx([found[0].loss] * 3, rel=1e-6)


def test_bytes_by_hand(material: Material, tmp_path: Path) -> None:
    texts = ["日本語", "naïve café", "a", "🙂 b", "  two  spaces"]
    run, path = material.run(), write_jsonl(tmp_path / "text.jsonl", texts)
    score = scores(run, path)["text"]
    # Characters: 3 of 3 bytes; 2 of 2 bytes and 8; 1; one of 4 bytes and 2; the tokenizer makes spaces single.
    assert score.num_bytes == 9 + 12 + 1 + 6 + len("two spaces")
    losses = slow_losses(run, stream(run, texts), False)
    assert score.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / score.num_bytes, rel=1e-6)


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 4, 5])
def test_bytes_of_a_character_that_is_cut(material: Material, tmp_path: Path, num_bytes: int) -> None:
    run, path = material.run(), write_jsonl(tmp_path / "text.jsonl", ["語🙂"])
    ids = stream(run, ["語🙂"])
    assert len(ids) == 9  # the space before a text, a token for each byte, the end
    assert scores(run, path, max_tokens=1 + num_bytes)["text"].num_bytes == num_bytes


def score_here(run: Path, path: Path, max_tokens: int | None) -> tuple[Score, float]:
    torch.set_num_threads(1)
    [score] = scores(run, path, max_tokens=max_tokens).values()
    return score, score.total


@pytest.mark.parametrize(("name", "kind"), [("crossed", "tokens"), ("separate", "text")])
def test_the_number_of_ranks_changes_nothing(material: Material, name: str, kind: str) -> None:
    path = material.tokens("web") if kind == "tokens" else material.text("web")
    alone = run_ranks(1, score_here, material.run(name), path, None)[0]
    for world_size in (2, 3):
        for score, total in run_ranks(world_size, score_here, material.run(name), path, None):
            assert total == alone[1]
            assert (score.num_tokens, score.num_bytes) == (alone[0].num_tokens, alone[0].num_bytes)
            assert sorted(score.sums) == sorted(alone[0].sums)


def test_fewer_rows_than_ranks(material: Material) -> None:
    path = material.tokens("web")
    alone = run_ranks(1, score_here, material.run(), path, 3)[0]
    assert alone[0].num_tokens == 3 and len(alone[0].sums) == 1
    assert run_ranks(3, score_here, material.run(), path, 3) == [alone] * 3


def refused_here(run: Path, path: Path) -> str:
    try:
        scores(run, path)
    except UserError as error:
        return f"{error.on_all_ranks} {error}"
    return ""


def test_all_ranks_refuse_what_one_cannot_read(material: Material, tmp_path: Path) -> None:
    run = save_run(run_config(tmp_path, "run"), material.tokenizer)
    messages = run_ranks(2, refused_here, run, write_jsonl(tmp_path / "empty.jsonl", [None]))
    assert messages[0] == messages[1] and messages[0].startswith("True") and "has no tokens" in messages[0]


def test_own_data_is_the_held_out_part_of_each_source(material: Material) -> None:
    run = material.run()
    own, given = scores(run), scores(run, *map(material.tokens, ("web", "books")))
    assert list(own) == ["web", "books"] and own == given
    whole = sum_of(own.values())
    assert whole.num_tokens == sum(score.num_tokens for score in own.values())
    assert whole.loss == pytest.approx(
        sum(score.loss * score.num_tokens for score in own.values()) / whole.num_tokens, rel=1e-12
    )


@torch.no_grad()
def test_own_text_is_as_long_as_the_validation_of_the_run(material: Material, tmp_path: Path) -> None:
    """And its rows are those of the loop, after a first token that the loop does not predict."""
    paths = [{"path": str(material.text(source)), "weight": 1} for source in ("web", "books")]
    data = {"kind": "text", "path": paths, "validation_fraction": VALIDATION_FRACTION}
    data["tokenizer"] = str(material.tokenizer)
    config = run_config(tmp_path, "text", data=data, evaluation={"num_samples": 4})
    run = save_run(config, material.tokenizer)
    loaded = open_model(run, "cpu")
    held_out = open_data(DataOptions.of(config)).validation_batches(4, 1, 0, 1)
    for index, (name, score) in enumerate(scores(run).items()):
        assert name == ("web", "books")[index] and score.num_tokens == 2 * SEQ_LENGTH + 1
        own = held_out[index::2]  # the sources take turns
        first = slow_losses(run, [int(own[0].ids[0, 0])], False)[0]
        losses = [
            torch.nn.functional.cross_entropy(loaded.model(batch.ids)[:, 0].double(), batch.labels[0], reduction="sum")
            for batch in own
        ]
        assert score.total == pytest.approx(float(sum(losses)) + first, rel=1e-6)
    assert scores(run, max_tokens=5)["books"].num_tokens == 5


def test_a_checkpoint_folder_is_evaluated_as_such(material: Material) -> None:
    run, data = material.run(), material.tokens("web")
    folders = [run, *(run / "checkpoints" / f"step_000000{step}" for step in (20, 10))]
    newest, same, older = (scores_of_checkpoint(folder, run, data) for folder in folders)
    assert newest == same and newest.loss != pytest.approx(older.loss, rel=1e-3)
    assert [open_model(folder, "cpu").step for folder in folders] == [20, 20, 10]


def scores_of_checkpoint(folder: Path, run: Path, data: Path) -> Score:
    loaded = open_model(folder, "cpu")
    [source] = sources_of(run, loaded, data)
    return evaluate(loaded, source, 3)


def test_bfloat16_is_near(material: Material) -> None:
    loaded = open_model(material.run(), "cpu", torch.bfloat16)
    [source] = sources_of(material.run(), loaded, material.tokens("web"))
    wanted = scores(material.run(), material.tokens("web"))["web"].loss
    assert evaluate(loaded, source, 3).loss == pytest.approx(wanted, rel=1e-2)


def test_a_loss_that_is_not_finite_is_said(material: Material) -> None:
    loaded = open_model(material.run(), "cpu")
    next(loaded.model.parameters()).detach().fill_(math.nan)
    [source] = sources_of(material.run(), loaded, material.tokens("web"))
    assert math.isnan(evaluate(loaded, source, 3).loss)
