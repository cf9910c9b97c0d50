"""Mixtures of sources: the pattern against a slow search, readers of both kinds against plain lists."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megastruct.config import load_config
from megastruct.data.mixture import Mixture
from megastruct.data.order import source_seed
from megastruct.data.preparation.prepare import prepare
from megastruct.errors import UserError
from slow_order import text_samples, token_samples, tokens_of
from test_readers import make_readers, merged_cursor, run_step
from tiny_data import (
    NUM_SHARDS,
    SEED,
    SEQ_LENGTH,
    VALIDATION_FRACTION,
    make_texts,
    open_kind,
    train_model,
    write_parquet,
)

ROOT = Path(__file__).parents[2]
WEIGHTS = [(1.0,), (3, 1), (1, 1, 1), (0.7, 0.2, 0.1), (0.05, 0.95), (1e-3, 1.0), (1 / 3, 2 / 3), (math.pi, 1e-9, 2.0)]
WEIGHTS += [(0.9, *[0.001] * 100), (0.7, *[0.01] * 30), (0.5, *[0.05] * 10), (0.82, *[0.01] * 18)]  # many small alike
WEIGHTS += [(0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), tuple(1 / k for k in range(1, 40))]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_pattern_is_an_exact_even_interleave(weights):
    mixture = Mixture(weights)
    num_samples = 2 * mixture.period + 3
    sources, indices = mixture.locate(np.arange(num_samples))
    shares = mixture.counts / mixture.period
    for source in range(len(weights)):
        own = np.flatnonzero(sources == source)
        assert (indices[own] == np.arange(len(own))).all()  # each source's samples once and in order
        assert abs(shares[source] - weights[source] / sum(weights)) <= 1 / mixture.period
        # every prefix has its share to less than a sample
        taken = np.cumsum(sources == source)
        ideal = shares[source] * np.arange(1, num_samples + 1)
        assert np.abs(taken - ideal).max() < 1
    for prefix in (0, 1, mixture.period - 1, mixture.period, mixture.period + 2):
        counted = np.bincount(sources[:prefix], minlength=len(weights))
        assert mixture.consumed(prefix).tolist() == counted.tolist()


def test_decimal_weights_are_exact():
    for weights in ((0.7, 0.2, 0.1), (0.35, 0.65), (1e-3, 1.0), (5, 3, 2)):
        mixture = Mixture(weights)
        written = [Fraction(str(weight)) for weight in weights]
        assert [Fraction(int(count), mixture.period) for count in mixture.counts] == [w / sum(written) for w in written]
    assert Mixture((math.pi, 1e-9, 2.0)).counts.min() == 1  # what rounds to nothing is not dropped


def test_the_pattern_is_pinned():
    """A change here makes every run on a mixture resume on other tokens."""
    sources, _ = Mixture((0.5, 0.3, 0.2)).locate(np.arange(12))
    assert sources.tolist() == PINNED_SOURCES
    assert Mixture((0.7, 0.3)).locate(np.array([10**12 + 7]))[1].tolist() == [300_000_000_002]


PINNED_SOURCES = [0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("weights", [(), (1, 0), (1, -1), (math.inf, 1), (math.nan,)])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weights"):
        Mixture(weights)


def test_most_samples_is_the_last_that_fits():
    mixture = Mixture((0.7, 0.2, 0.1))
    for limits in ((7, 2, 1), (100, 3, 50), (0, 9, 9), (14, 4, 3)):
        fitting = [n for n in range(200) if (mixture.consumed(n) <= limits).all()]
        assert mixture.most_samples(limits) == fitting[-1]


@pytest.mark.parametrize("weights, num_streams", [((3, 1), (4, 2)), ((0.7, 0.2, 0.1), (3, 8, 1)), ((1,), (6,))])
@pytest.mark.parametrize("micro_batch_size, dp_size", [(1, 1), (2, 3), (1, 4), (8, 2)])
def test_streams_of_rank_equal_a_search(weights, num_streams, micro_batch_size, dp_size):
    mixture = Mixture(weights)
    samples = 5 + np.arange(40 * mixture.period * micro_batch_size * dp_size)
    sources, indices = mixture.locate(samples)
    for rank in range(dp_size):
        own = (samples - 5) // micro_batch_size % dp_size == rank
        streams = indices[own] % np.array(num_streams)[sources[own]]
        met = sorted(set(zip(sources[own].tolist(), streams.tolist(), strict=True)))
        assert mixture.streams_of_rank(num_streams, 5, micro_batch_size, rank, dp_size) == met


# Readers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    for shard in range(2):
        write_parquet(folder / f"{shard}.parquet", make_texts(NUM_SHARDS + shard))
    return folder


@pytest.fixture(scope="module")
def second_tokens(tmp_path_factory, second_text, tokenizer_path):
    folder = tmp_path_factory.mktemp("made") / "second"
    prepare(str(second_text), folder, str(tokenizer_path), validation_fraction=VALIDATION_FRACTION)
    return folder


def open_mixture(kind, paths, tokenizer_path):
    return open_kind(
        kind,
        list(paths),
        tokenizer_path,
        seq_length=SEQ_LENGTH,
        vocab_size=512,
        seed=SEED,
        validation_fraction=VALIDATION_FRACTION,
    )


@pytest.fixture(scope="module", params=["tokens", "text"])
def mixed(request, text_folder, token_folder, second_text, second_tokens, tokenizer_path):
    """(data, expected samples): weights 0.6 and 0.4, several epochs of the smaller source."""
    num_samples = 240
    texts = [sorted(folder.glob("*.parquet")) for folder in (text_folder, second_text)]
    if request.param == "tokens":
        folders = (token_folder, second_tokens)
        own = [
            token_samples(
                tokens_of(paths, tokenizer_path, False, VALIDATION_FRACTION), SEQ_LENGTH, source_seed(SEED, k), 240
            )
            for k, paths in enumerate(texts)
        ]
    else:
        folders = (text_folder, second_text)
        own = [
            text_samples(paths, tokenizer_path, VALIDATION_FRACTION, SEQ_LENGTH, source_seed(SEED, k), streams, 240)
            for k, (paths, streams) in enumerate(zip(texts, (4, 2), strict=True))
        ]
    places = zip(*(part.tolist() for part in Mixture((0.6, 0.4)).locate(np.arange(num_samples))), strict=True)
    expected = [own[source][index] for source, index in places]
    return open_mixture(request.param, zip(folders, (0.6, 0.4), strict=True), tokenizer_path), expected


@pytest.mark.parametrize("before, after", [((1, 12), (1, 12)), ((2, 3), (3, 2)), ((6, 1), (1, 4)), ((1, 1), (12, 1))])
@pytest.mark.parametrize("stop_step", [0, 7])
def test_mixed_order_equals_the_reference_resumed_on_any_layout(mixed, before, after, stop_step):
    data, expected = mixed
    readers = make_readers(data, *before)
    got = [sample for _ in range(stop_step) for sample in run_step(readers, *before)]
    cursor = merged_cursor(readers)
    assert cursor.shape == data.cursor_shape and cursor.min() >= 0
    readers = make_readers(data, *after, cursor=cursor, start_sample=12 * stop_step)
    got += [sample for _ in range(20 - stop_step) for sample in run_step(readers, *after)]
    assert got == expected


def test_validation_of_a_mixture_has_each_sources_share(
    text_folder, token_folder, second_text, second_tokens, tokenizer_path
):
    batches = {}
    for kind, folders in (("tokens", (token_folder, second_tokens)), ("text", (text_folder, second_text))):
        data = open_mixture(kind, zip(folders, (0.6, 0.4), strict=True), tokenizer_path)
        alone = [open_mixture(kind, [(folder, 1)], tokenizer_path) for folder in folders]
        rows = [row for batch in data.validation_batches(10, 5, 0, 1) for row in batch.ids.tolist()]
        own = [[row for batch in one.validation_batches(6, 1, 0, 1) for row in batch.ids.tolist()] for one in alone]
        places = zip(*(part.tolist() for part in Mixture((0.6, 0.4)).locate(np.arange(10))), strict=True)
        assert rows == [own[source][index] for source, index in places]
        batches[kind] = rows
        with pytest.raises(UserError, match=r"evaluation\.num_samples") as caught:
            data.validation_batches(10_000, 1, 0, 1)
        most = int(str(caught.value).split("fill only ")[1].split()[0])
        assert len(data.validation_batches(most, 1, 0, 1)) == most
        with pytest.raises(UserError):
            data.validation_batches(most + 1, 1, 0, 1)
    assert batches["tokens"] == batches["text"]


def test_a_changed_weight_is_another_run(token_folder, second_tokens, tokenizer_path):
    def described(*weights):
        folders = zip((token_folder, second_tokens), weights, strict=True)
        return open_mixture("tokens", folders, tokenizer_path).describe()

    assert described(0.6, 0.4) == described(3, 2)
    assert described(0.6, 0.4)["mixture"] != described(0.5, 0.5)["mixture"]
    assert all(value is None or type(value) in (int, float, str) for value in described(1, 1).values())


def test_mistakes_name_the_source(token_folder, text_folder, second_text, tokenizer_path, tmp_path):
    with pytest.raises(UserError) as caught:
        open_mixture("tokens", [(token_folder, 1), (tmp_path / "a", 1), (text_folder, 1)], tokenizer_path)
    assert "data.path.1" in str(caught.value) and "data.path.2" in str(caught.value)
    with pytest.raises(UserError, match=r"data\.path\.1: .*none"):
        open_mixture("text", [(text_folder, 1), (tmp_path / "none", 1)], tokenizer_path)
    other = train_model(tmp_path / "other.model", vocab_size=300)
    prepare(str(second_text), tmp_path / "other", str(other))
    with pytest.raises(UserError, match="another tokenizer"):
        open_kind(
            "tokens", [(token_folder, 1.0), (tmp_path / "other", 1.0)], None, seq_length=8, vocab_size=512, seed=0
        )


def test_folders_that_hold_out_other_documents_are_refused(token_folder, second_text, tokenizer_path, tmp_path):
    prepare(str(second_text), tmp_path / "more", str(tokenizer_path), validation_fraction=2 * VALIDATION_FRACTION)
    with pytest.raises(UserError, match=r"data\.path: .*more has the validation fraction 0\.3"):
        open_mixture("tokens", [(token_folder, 1), (tmp_path / "more", 1)], tokenizer_path)


def test_config_of_a_mixture():
    read = lambda text: load_config(ROOT / "configs/run/quickstart.yaml", [f"data.path={text}"])  # noqa: E731
    assert read("tokens").data.sources == [("tokens", 1.0)]
    assert read("[{path: a, weight: 0.9}, {path: b, weight: 1}]").data.sources == [("a", 0.9), ("b", 1.0)]
    with pytest.raises(UserError) as caught:
        read("[{path: a}, {path: b, weight: 0, x: 1}, c]")
    assert [problem.where for problem in caught.value.problems] == [
        *("data.path.0.weight", "data.path.1.weight", "data.path.1.x", "data.path.2")
    ]
    assert read(caught.value.problems[0].suggestion.removeprefix("data.path=").replace(", ...", "")).data.sources
    with pytest.raises(UserError, match=r"data\.path"):
        read("[]")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/tokens"], ["tokens"]),
        (["data/tokens/", "../books"], ["tokens", "books"]),
        (["web/tokens", "books/tokens"], ["web/tokens", "books/tokens"]),
        (["web/*.parquet", "books/*.jsonl.gz"], ["web", "books"]),
        (["shards/web-*.parquet", "shards/books-*.parquet"], ["web", "books"]),
        (["tiiuae/falcon-refinedweb", "./a b.jsonl"], ["falcon-refinedweb", "ab"]),
        (["tokens", "x/tokens"], ["tokens", "x/tokens"]),
        (["same", "same", "other"], ["same-1", "same-2", "other-3"]),
        (["*", "**/*.parquet"], ["data-1", "data-2"]),
    ],
)
def test_sources_have_short_names(paths, names):
    assert Mixture([1] * len(paths), paths).names == names
