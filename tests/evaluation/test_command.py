"""tools/evaluate.py: its output, its refusals, and the commands of the manual."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megastruct.checkpoint.store import complete_checkpoints
from megastruct.commands.evaluate import main
from megastruct.data.preparation.prepare import prepare
from saved_runs import Material, run_config, save_run, write_jsonl
from tiny_data import train_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "use_the_model.md"
SECTIONS = ("Evaluate", "EleutherAI's lm-evaluation-harness")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets what is missing of these; it is taken back at the end."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], alone: None) -> Any:
    def run(*words: Any) -> str:
        main([*map(str, words), "--device", "cpu"])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], alone: None) -> Any:
    def run(*words: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(map(str, words)))
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.count("error: ") == 1 and "Traceback" not in error
        return error

    return run


def test_the_table_says_what_the_json_says(material: Material, printed: Any) -> None:
    arguments = (material.run(), "--data", material.tokens("web"), f"b={material.text('books')}")
    values = json.loads(printed(*arguments, "--json"))
    head, *lines = printed(*arguments).splitlines()
    assert head == f"{material.run()}: step 20, float32"
    assert re.split(r"  +", lines[0]) == ["source", "tokens", "loss", "perplexity", "bits per byte"]
    assert len({len(line) for line in lines}) == 1
    assert (values["run"], values["step"]) == (str(material.run()), 20)
    assert list(values["sources"]) == ["web", "b"]
    for line, (name, score) in zip(
        lines[1:], [*values["sources"].items(), ("overall", values["overall"])], strict=True
    ):
        assert line.split() == [
            name,
            f"{score['tokens']:,}",
            f"{score['loss']:.4f}",
            f"{score['perplexity']:,.2f}",
            f"{score['bits_per_byte']:.4f}",
        ]
    assert values["overall"]["tokens"] == sum(score["tokens"] for score in values["sources"].values())
    assert values["overall"]["bytes"] == sum(score["bytes"] for score in values["sources"].values())
    assert len(printed(material.run(), "--data", material.tokens("web")).splitlines()) == 3  # no line for the sum


def test_two_processes_print_what_one_prints(material: Material, printed: Any) -> None:
    arguments = [str(material.run()), "--json", "--batch-size", "2"]
    values = json.loads(printed(*arguments))
    assert list(values["sources"]) == ["web", "books"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, ROOT / "tools" / "evaluate.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == values


def test_text_of_another_column(material: Material, tmp_path: Path, printed: Any) -> None:
    path = write_jsonl(tmp_path / "books.jsonl", material.texts["books"], column="text")
    other = json.loads(printed(material.run(), "--json", "--data", path, "--text-column", "text"))
    assert (
        other["sources"] == json.loads(printed(material.run(), "--json", "--data", material.text("books")))["sources"]
    )


def test_options_that_do_not_fit(refused: Any, material: Material) -> None:
    error = refused(material.run(), "--max-tokens", 0, "--batch-size", -1, "--limit", 3)
    assert all(option in error for option in ("--max-tokens: 0 is", "--batch-size: -1 is", "--limit: is used with"))
    assert "--data: is not used with --tasks" in refused(material.run(), "--tasks", "piqa", "--data", "x")
    assert "--include-path" in refused(material.run(), "--tasks", "piqa", "--include-path", "/nowhere")
    assert "--device cpu" in refused(material.run(), "--device", "qpu")
    assert "--tasks: an empty name" in refused(material.run(), "--tasks", "")
    assert "--data: an empty name" in refused(material.run(), "--data", "", "x")
    assert "the name overall" in refused(material.run(), "--data", f"overall={material.text('web')}")


def test_documents_that_are_left_out_are_counted(alone: None, material: Material, tmp_path: Path, capsys: Any) -> None:
    path = write_jsonl(tmp_path / "some.jsonl", ["river stone", None, " ", "light"])
    with path.open("a") as file:
        file.write("{broken\n")
    main([str(material.run()), "--data", str(path), "--json"])
    printed = capsys.readouterr()
    assert f"{path}: 3 documents without text were left out" in printed.err
    assert list(json.loads(printed.out)["sources"]) == ["some"]


def test_data_that_cannot_be_used(refused: Any, material: Material, tmp_path: Path) -> None:
    run = material.run()
    error = refused(run, "--data", tmp_path / "none", tmp_path / "no.jsonl", material.tokens("web"))
    assert f"--data: {tmp_path / 'none'} does not exist" in error and "no.jsonl does not exist" in error
    empty = write_jsonl(tmp_path / "empty.jsonl", [None, " "])
    error = refused(run, "--data", empty)
    assert f"{empty}: 2 documents without text" in error and f"{empty}: has no tokens" in error
    (tmp_path / "nothing.jsonl").write_text("")
    assert "the file is empty (0 bytes)" in refused(run, "--data", tmp_path / "nothing.jsonl")
    assert "two sources have the name a" in refused(run, "--data", f"a={empty}", f"a={material.text('web')}")
    assert "column 'text' is missing" in refused(run, "--data", material.text("web"), "--text-column", "text")


def test_tokens_of_another_tokenizer(refused: Any, material: Material, tmp_path: Path) -> None:
    other = train_model(tmp_path / "other.model", vocab_size=300)
    prepare(str(material.text("web")), tmp_path / "tokens", str(other), report=lambda _: None)
    error = refused(material.run(), "--data", tmp_path / "tokens")
    assert "was made with another tokenizer (300 ids" in error and "than the model's (330 ids" in error
    assert f"--tokenizer {material.run() / 'tokenizer.model'}" in error
    error = refused(material.run(), "--tokenizer", other)
    assert f"{other}: is not the tokenizer that {material.run()} was trained with" in error
    assert "does not exist" in refused(material.run(), "--tokenizer", tmp_path / "none.model")
    large = train_model(tmp_path / "large.model", vocab_size=340)
    run = save_run(run_config(tmp_path, "run"), large)
    assert "has 340 pieces, but the model has 336 words" in refused(run)


def test_damaged_token_shards(refused: Any, material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "web"
    shutil.copytree(material.tokens("web"), folder)
    file = next((folder / "validation").iterdir())
    file.write_bytes(b"\xff\xff" + file.read_bytes()[2:])
    assert f"{file}: contains token id 65535" in refused(material.run(), "--data", folder)
    file.unlink()
    assert f"{file}: is listed in the manifest but does not exist" in refused(material.run(), "--data", folder)


def test_runs_that_cannot_be_loaded(refused: Any, material: Material, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}" in refused(tmp_path / "none")
    run = save_run(run_config(tmp_path, "run"), material.tokenizer)
    [(_, checkpoint)] = complete_checkpoints(run / "checkpoints")
    next(checkpoint.glob("*.distcp")).write_bytes(b"other")
    for path in (run, checkpoint):
        assert "damaged" in refused(path)
    shutil.rmtree(checkpoint)
    assert "has no complete checkpoint" in refused(run)
    guided = run_config(tmp_path, "guided", guided={"schedule": "fixedstep"})
    run = save_run(guided, material.tokenizer, steps=(3, 20))
    older = run / "checkpoints" / "step_00000003"
    assert "--allow-guided" in refused(older) and "guided phase" in refused(older)
    main([str(older), "--allow-guided", "--data", str(material.tokens("books")), "--device", "cpu"])


def test_own_data_that_is_gone(refused: Any, material: Material, tmp_path: Path) -> None:
    run = save_run(run_config(tmp_path, "run", data={"path": "data/gone"}), material.tokenizer)
    error = refused(run)
    assert "--data PATH evaluates on other data" in error and "data/gone does not exist" in error
    text = {"kind": "text", "path": str(material.text("web")), "tokenizer": str(material.tokenizer)}
    run = save_run(run_config(tmp_path, "text", data=text), material.tokenizer)
    assert "evaluation.num_samples: 0" in refused(run)


def test_unknown_tasks(refused: Any, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    original = tasks.TaskManager
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_path, include_defaults=False: original(None, include_path, False)
    )
    write_task(tmp_path)
    error = refused(material.run(), "--tasks", "colors", "--include-path", tmp_path / "tasks")
    assert "--tasks: colors is not a task" in error and "try: colours" in error


def section(name: str) -> str:
    return re.split(r"^## ", PAGE.read_text().split(f"\n## {name}\n")[1], flags=re.M)[0]


def blocks(language: str) -> list[str]:
    return [block for name in SECTIONS for block in re.findall(rf"```{language}\n(.*?)```", section(name), re.S)]


def write_task(folder: Path) -> None:
    """The task of the manual."""
    (folder / "tasks").mkdir()
    [task] = blocks("yaml")
    (folder / "tasks" / "colours.yaml").write_text(task)
    questions = [{"question": "The sky is", "choices": ["blue", "sweet"], "answer": 0}] * 3
    (folder / "tasks" / "colours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))


@pytest.fixture
def manual_folder(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands of the manual name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = run_config(tmp_path / "runs", "quickstart", data={"path": str(material.tokens("web"))})
    save_run(config, material.tokenizer, steps=(100,))
    shutil.copytree(material.tokens("web"), tmp_path / "data" / "sample" / "tokens")
    shutil.copy(material.text("books"), tmp_path / "data" / "readme.jsonl")
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_manual(manual_folder: Path, printed: Any) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if not line.startswith("#")]
    assert len(commands) == 6
    outputs = {}
    for command in commands:
        program, *words = shlex.split(command)
        if "lambada_openai" in command:  # its data is on the hub
            continue
        if program.endswith("torchrun"):
            assert words[:3] == ["--nproc-per-node", "2", "tools/evaluate.py"]
            words = words[2:]  # several processes: above
        assert words[0] == "tools/evaluate.py"
        outputs[command] = printed(*words[1:])
    own, given, part, bf16, tasks = outputs.values()
    assert own.startswith("runs/quickstart: step 100, float32\n") and "bfloat16" in bf16
    assert [line.split()[0] for line in given.splitlines()[1:]] == ["source", "tokens", "readme", "overall"]
    shown = section("Evaluate").split("```\nruns/quickstart")[1].splitlines()
    assert [line.split()[0] for line in shown[1:5]] == ["source", "tokens", "readme", "overall"]
    assert json.loads(part)["sources"].keys() == {"web"}
    assert json.loads(tasks)["results"]["colours"]["acc,none"] in (0.0, 1.0)
    [program] = [block for block in blocks("python") if "simple_evaluate" in block]
    names: dict[str, Any] = {}
    exec(program.replace('include_path="tasks"', 'include_path="tasks", include_defaults=False'), names)
    assert names["results"]["results"]["colours"]["acc,none"] == json.loads(tasks)["results"]["colours"]["acc,none"]


def test_the_options_of_the_manual_exist(capsys: pytest.CaptureFixture[str]) -> None:
    table = re.findall(r"^\| `(--[\w-]+)` \|", section("Evaluate"), flags=re.M)
    with pytest.raises(SystemExit):
        main(["--help"])
    known = capsys.readouterr().out
    assert len(table) == 8 and all(option in known for option in table)
