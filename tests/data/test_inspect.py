"""inspect_data shows what is there, and finds what is not."""

import json
import shutil

import numpy as np
import pytest

from megastruct.commands import inspect as inspect_data
from megastruct.data.preparation.inspect import lengths
from megastruct.data.tokens.manifest import load_manifest
from slow_order import documents_of, tokens_of
from tiny_data import VALIDATION_FRACTION


def shown(capsys, *arguments) -> str:
    inspect_data.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        inspect_data.main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def tokens(tmp_path, token_folder):
    return shutil.copytree(token_folder, tmp_path / "tokens")


def reference_lengths(text_folder, tokenizer_path, held_out=False):
    tokens = tokens_of(sorted(text_folder.glob("*.parquet")), tokenizer_path, held_out, VALIDATION_FRACTION)
    eod = tokens[-1]
    return np.diff(np.flatnonzero(np.array(tokens) == eod), prepend=-1)


def test_counts_lengths_and_samples(token_folder, text_folder, tokenizer_path, capsys):
    expected = reference_lengths(text_folder, tokenizer_path)
    out = shown(capsys, token_folder, "--verify", "--samples", 4)
    assert f"train: {expected.sum():,} tokens in {len(expected):,} documents" in out
    assert "skipped: 12 empty, 6 null" in out and "verified: " in out
    texts = [text for path in text_folder.glob("*.parquet") for text in documents_of(path, False, VALIDATION_FRACTION)]
    samples = [part.split("\n", 1)[1].rstrip("\n") for part in out.split("\n--- ")[1:]]
    # the document at the beginning of a second file has lost its head to the first
    assert len(samples) == 4 and sum(sample in texts for sample in samples) >= 3
    assert all(any(sample.strip() in text for text in texts) for sample in samples)
    assert samples != shown(capsys, token_folder, "--samples", 4, "--seed", 1).split("\n--- ")[1:]
    held_out = reference_lengths(text_folder, tokenizer_path, held_out=True)
    assert f"validation documents ({held_out.sum():,} tokens read)" in shown(
        capsys, token_folder, "--split", "validation"
    )


def test_length_histogram_equals_the_reference(token_folder, text_folder, tokenizer_path):
    """Documents that are cut between two files are seen from end to end in neither, so they may be missing."""
    expected = reference_lengths(text_folder, tokenizer_path)
    manifest = load_manifest(token_folder)
    found = lengths(token_folder, manifest, "train", 10**9)
    later_parts = sum(not file.file.endswith("-000.bin") for file in manifest.splits.train)
    assert later_parts and len(expected) - later_parts <= found.num_documents <= len(expected)
    assert found.num_tokens == expected.sum() and found.longest == expected.max()
    bins = np.bincount(np.floor(np.log2(expected)).astype(int))
    assert len(bins) == len(found.counts) and ((bins - found.counts) >= 0).all()
    assert (bins - found.counts).sum() == len(expected) - found.num_documents
    part = lengths(token_folder, manifest, "train", 1500)
    assert part.num_tokens == 1500 and 0 < part.num_documents < found.num_documents


def test_all_damaged_files_are_named(tokens, capsys):
    flipped, cut, gone, short = sorted(tokens.glob("train/*.bin"))[:4]
    content = np.fromfile(flipped, "<u2")
    content[3] ^= 1
    content.tofile(flipped)
    cut.write_bytes(cut.read_bytes()[:-3])
    gone.unlink()
    short.write_bytes(b"\xff" * short.stat().st_size)
    error = refused(capsys, tokens, "--verify")
    assert "4 of " in error
    for path, what in ((flipped, "sha256"), (cut, "bytes"), (gone, "No such file"), (short, "token id 65535")):
        assert what in error.split(str(path))[1].split("try:")[0]
    assert "Traceback" not in error
    # without reading, sizes tell
    error = refused(capsys, tokens)
    assert str(cut) in error and str(gone) in error and str(flipped) not in error


def test_a_manifest_that_counts_wrongly_is_found(tokens, capsys):
    manifest = json.loads((tokens / "manifest.json").read_text())
    for count in (manifest["splits"]["train"][0], manifest["totals"]["train"]):
        count["num_documents"] += 1
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    shown(capsys, tokens)
    assert "contains the ends of" in refused(capsys, tokens, "--verify")


def test_mistakes(tmp_path, token_folder, capsys):
    assert "manifest.json" in refused(capsys, tmp_path)
    error = refused(capsys, token_folder, "--samples", -1, "--max-tokens", 0)
    assert "--samples" in error and "--max-tokens" in error
