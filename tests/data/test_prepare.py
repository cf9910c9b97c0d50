"""prepare_data: the same bytes for any number of workers and after any kill."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megastruct.commands import prepare as prepare_data
from megastruct.data.preparation import prepare as prepare_module
from megastruct.data.preparation import workers as prepare_workers
from megastruct.data.preparation.inspect import verify
from megastruct.data.sources.check import check_shards
from megastruct.data.tokens.manifest import Manifest, load_manifest
from slow_order import tokens_of
from tiny_data import NUM_SHARDS, VALIDATION_FRACTION, make_texts, train_model, write_parquet

ROOT = Path(__file__).parents[2]


def arguments_for(text_folder, output, tokenizer_path, *more) -> list[str]:
    return [
        *("--input", str(text_folder), "--output", str(output), "--tokenizer", str(tokenizer_path)),
        *("--validation-fraction", str(VALIDATION_FRACTION), "--max-shard-tokens", "1000", *more),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        prepare_data.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def tokens_in(folder: Path, manifest: Manifest, split: str) -> list[int]:
    files = getattr(manifest.splits, split)
    return np.concatenate([np.fromfile(folder / file.file, manifest.token_dtype) for file in files]).tolist()


def test_tokens_equal_the_reference(token_folder, text_folder, tokenizer_path):
    manifest = load_manifest(token_folder)
    assert verify(token_folder, manifest) == []
    paths = sorted(text_folder.glob("*.parquet"))
    for split, held_out in (("train", False), ("validation", True)):
        tokens = tokens_in(token_folder, manifest, split)
        assert tokens == tokens_of(paths, tokenizer_path, held_out, VALIDATION_FRACTION)
        total = getattr(manifest.totals, split)
        assert (total.num_tokens, total.num_documents) == (
            len(tokens),
            tokens.count(manifest.settings.tokenizer.eod_id),
        )
        assert all(file.num_tokens <= 1000 for file in getattr(manifest.splits, split))
    broken = {"empty": 2 * NUM_SHARDS, "not_a_string": 0, "null": NUM_SHARDS, "undecodable": 0, "unparsable": 0}
    broken["no_tokens"] = 0
    assert manifest.skipped_documents == broken


def test_three_workers_write_the_same_bytes_as_one(token_folder, text_folder, tokenizer_path, tmp_path, capsys):
    arguments = arguments_for(text_folder, tmp_path / "out", tokenizer_path, "--workers", "3")
    prepare_data.main(arguments)
    assert contents(tmp_path / "out") == contents(token_folder)
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    prepare_data.main(arguments)
    assert "\nalready done" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory, tokenizer_path):
    """(text, what it becomes when nobody interferes); the last of four shards takes a second or more."""
    text, output = tmp_path_factory.mktemp("long"), tmp_path_factory.mktemp("long-tokens") / "out"
    for shard in range(4):
        texts = [text for text in make_texts(shard) if text] * (10 if shard < 3 else 1000)
        write_parquet(text / f"{shard}.parquet", texts, row_group_size=5000)
    prepare_data.main(arguments_for(text, output, tokenizer_path, "--max-shard-tokens", "20000"))
    return text, output


def start(arguments) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tool = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
    return subprocess.Popen([*tool, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def children_of(process: subprocess.Popen) -> list[Path]:
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [Path("/proc") / pid for pid in pids]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see the workers")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_run_goes_on_to_the_same_bytes(long_run, tokenizer_path, tmp_path, capsys, num_workers):
    text, undisturbed = long_run
    output = tmp_path / "out"
    arguments = arguments_for(text, output, tokenizer_path, "--max-shard-tokens", "20000")
    process = start([*arguments, "--workers", str(num_workers)])
    deadline = time.monotonic() + 30
    while len(list(output.glob("progress/0*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    workers = children_of(process)
    assert len(workers) >= (num_workers if num_workers > 1 else 0)
    process.kill()
    process.wait()  # without reading its pipes, which workers that outlive it would hold open
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    assert not (output / "manifest.json").exists()
    finished = sorted(output.glob("train/00000-*.bin"))
    times = {path: path.stat().st_mtime_ns for path in finished}

    prepare_data.main([*arguments, "--workers", "1"])
    assert "continuing an interrupted run" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in finished}
    assert contents(output) == contents(undisturbed)


def test_worker_that_dies_is_a_message(text_folder, tokenizer_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_workers, "_start_worker", os._exit)  # called with the shared counts: exits at once
    error = refused(arguments_for(text_folder, tmp_path / "out", tokenizer_path, "--workers", "2"), capsys)
    assert "worker process died" in error and "Traceback" not in error


def test_a_tokenizer_that_is_replaced_meanwhile_is_refused(text_folder, tokenizer_path, tmp_path, capsys, monkeypatch):
    """Else workers that start later would write other ids under the same manifest."""
    model, output = shutil.copy(tokenizer_path, tmp_path / "a.model"), tmp_path / "out"

    def replace_and_check(*arguments):
        train_model(model, vocab_size=300)
        return check_shards(*arguments)

    monkeypatch.setattr(prepare_module, "check_shards", replace_and_check)
    error = refused(arguments_for(text_folder, output, model, "--workers", "2"), capsys)
    assert "a.model was replaced" in error and error.count("try:") == 1 and "Traceback" not in error
    assert (output / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()


def test_other_settings_are_refused(token_folder, text_folder, tokenizer_path, tmp_path, capsys):
    output = tmp_path / "tokens"
    shutil.copytree(token_folder, output)
    before = contents(output)
    arguments = arguments_for(text_folder, output, tokenizer_path)
    error = refused([*arguments, "--validation-fraction", "0.2", "--max-shard-tokens", "999"], capsys)
    assert "--validation-fraction" in error and "--max-shard-tokens" in error
    other = train_model(tmp_path / "other.model", vocab_size=300)
    assert "--tokenizer" in refused(arguments_for(text_folder, output, other), capsys)
    fewer = shutil.copytree(text_folder, tmp_path / "fewer")
    (fewer / "shard-3.parquet").unlink()
    error = refused(arguments_for(fewer, output, tokenizer_path), capsys)
    assert "--input" in error and "shard-3.parquet" in error
    assert contents(output) == before

    # the same holds for a run that was interrupted
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "progress").mkdir()
    (output / "progress" / "settings.json").write_text(json.dumps(manifest["settings"]))
    (output / "manifest.json").unlink()
    assert "--validation-fraction" in refused([*arguments, "--validation-fraction", "0.2"], capsys)


def test_bad_shards_are_all_named_and_the_others_kept(text_folder, tokenizer_path, tmp_path, capsys):
    text, output = shutil.copytree(text_folder, tmp_path / "text"), tmp_path / "out"
    (text / "shard-1.parquet").write_bytes(b"")
    (text / "shard-4.parquet").write_bytes(b"PAR1 and then nothing")
    arguments = arguments_for(text, output, tokenizer_path)
    error = refused(arguments, capsys)
    assert "shard-1.parquet" in error and "shard-4.parquet" in error and "Traceback" not in error

    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "a.jsonl").write_text('{"content": "good"}\n' * 5)
    content = gzip.compress(b"".join(b'{"content": "good %d"}\n' % i for i in range(5000)))
    for name in "bc":
        (lines / f"{name}.jsonl.gz").write_bytes(content[:-100])
    error = refused(arguments_for(lines, tmp_path / "out2", tokenizer_path), capsys)
    assert "b.jsonl.gz" in error and "c.jsonl.gz" in error and "a.jsonl" not in error
    for name in "bc":
        (lines / f"{name}.jsonl.gz").write_bytes(content)
    (lines / "b.jsonl.gz").rename(lines / "d.jsonl.gz")
    error = refused(arguments_for(lines, tmp_path / "out2", tokenizer_path), capsys)
    assert "--input" in error  # the shards are not those that the run was started with
    (lines / "d.jsonl.gz").rename(lines / "b.jsonl.gz")
    before = (lines / "a.jsonl").stat()
    (lines / "a.jsonl").write_text('{"content": "another size, the same time"}\n' * 5)
    os.utime(lines / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    prepare_data.main(arguments_for(lines, tmp_path / "out2", tokenizer_path))  # they are, now that they are whole
    prepare_data.main(arguments_for(lines, tmp_path / "undisturbed", tokenizer_path))
    assert contents(tmp_path / "out2") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("option", [("--workers", "0"), ("--max-shard-tokens", "0"), ("--validation-fraction", "1")])
def test_bad_numbers(text_folder, tokenizer_path, tmp_path, capsys, option):
    assert option[0] in refused([*arguments_for(text_folder, tmp_path / "o", tokenizer_path), *option], capsys)
    assert not (tmp_path / "o").exists()


def test_foreign_folder_is_left_alone(text_folder, tokenizer_path, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("x")
    assert "thesis.txt" in refused(arguments_for(text_folder, tmp_path, tokenizer_path), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert "not a folder" in refused(arguments_for(text_folder, tmp_path / "thesis.txt", tokenizer_path), capsys)
