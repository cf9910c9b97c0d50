"""Where documents end in the rows of both kinds of data: what the ids of a row say is what the documents say."""

import itertools

import pytest

from megastruct.data import open_tokenizer
from megastruct.data.preparation.prepare import prepare
from megastruct.errors import UserError
from megastruct.models.documents import document_ids
from slow_order import documents_of
from tiny_data import SEED, SEQ_LENGTH, make_texts, open_kind, train_model, write_parquet

# Texts that spell the end token, parts of it, or nothing at all once they are normalised, which are skipped.
SPELLED = ["</s>", "river </s> stone", "<s></s>", "</s></s>", "</s", "/s>", "\u2581</s>", "\x02"]
SPELLED += ["\x03", "\x04", "\x05", "\x06"]
HALF = 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_path):
    """(text shards, token shards)"""
    text, tokens = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("made") / "tokens"
    write_parquet(text / "shard.parquet", [t for pair in zip(make_texts(1), SPELLED * 6, strict=False) for t in pair])
    prepare(str(text), tokens, str(tokenizer_path), validation_fraction=HALF, max_shard_tokens=500)
    return text, tokens


def rows_with_documents(paths, tokenizer_path, held_out):
    """{row of seq_length + 1 tokens: its documents, counted from 0}, from the documents' own lengths."""
    tokenizer, tokens, numbers = open_tokenizer(tokenizer_path), [], []
    documents = [text for path in paths for text in documents_of(path, held_out, HALF)]
    encoded = tokenizer.encode_documents(documents)
    whole = [ids for ids in encoded if len(ids) > 1]
    assert len(whole) < len(encoded), "the normaliser leaves something of every document"
    for number, ids in enumerate(whole):
        tokens += ids.tolist()
        numbers += [number] * len(ids)
    starts = range(0, len(tokens) - SEQ_LENGTH, SEQ_LENGTH)
    return {
        tuple(tokens[s : s + SEQ_LENGTH + 1]): [number - numbers[s] for number in numbers[s : s + SEQ_LENGTH]]
        for s in starts
    }


@pytest.mark.parametrize("kind", ["text", "tokens"])
@pytest.mark.parametrize("held_out", [False, True])
def test_ids_of_a_row_tell_its_documents(folders, tokenizer_path, kind, held_out):
    expected = rows_with_documents(sorted(folders[0].iterdir()), tokenizer_path, held_out)
    folder = folders[kind == "tokens"]
    data = open_kind(
        kind,
        str(folder),
        tokenizer_path,
        seq_length=SEQ_LENGTH,
        vocab_size=512,
        seed=SEED,
        validation_fraction=HALF,
    )
    count = len(expected)
    batches = data.validation_batches(count, 1, 0, 1) if held_out else data.train_reader(1, 1, 0, 1)
    crossings = 0
    for batch in itertools.islice(batches, count):
        row = (*batch.ids[0].tolist(), int(batch.labels[0, -1]))
        assert document_ids(batch.ids, data.tokenizer.eod_id).tolist() == [expected.pop(row)]
        # The end token has a label like any other: the next document's first token.
        crossings += int((batch.ids == data.tokenizer.eod_id).sum())
    assert not expected and crossings > count


def test_a_tokenizer_whose_end_token_can_come_out_of_text_is_refused(tmp_path):
    """SentencePiece makes control tokens of no text. Declared as a word of its own, </s> would be one."""
    model = train_model(tmp_path / "x.model", user_defined_symbols=["</s>"])
    with pytest.raises(UserError, match="no end-of-sentence id"):
        open_tokenizer(model)
