"""The command `rpp` as a user meets it: exit codes, one clear line, and no torch where none is needed."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp import cli
from megatron_rpp.config.fields import fields
from tests.support.tokenizer_dirs import write_fast

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with run.toml, a model's config.json and a data file; all of them valid."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 3)
    (tmp_path / "run.toml").write_text(
        f'[run]\ndir = "{tmp_path}/run"\n[model]\npath = "{tmp_path}/model"\n'
        f'[data.train]\npath = "{tmp_path}/data.jsonl"\n'
        f'[sft]\ninit = "{tmp_path}/model"\ndata = "{tmp_path}/data.jsonl"\noutput = "{tmp_path}/warm"\n'
    )
    return tmp_path


def rpp(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "megatron_rpp.cli", *words]
    clean = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env={**clean, **(env or {})})


def cpu_seconds() -> float:
    """Of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


HELP = [
    ([], "rpp train CONFIG.toml"),
    (["--help"], "rpp train CONFIG.toml"),
    (["train", "--help"], "rpp train CONFIG.toml"),
    (["sft", "-h"], "rpp sft CONFIG.toml"),
    (["report", "--help"], "rpp report RUN_DIR"),
    (["plan", "run.toml", "--help"], "rpp plan CONFIG.toml"),
    (["doctor", "--help"], "rpp doctor CONFIG.toml"),
    (["launch", "--help"], "rpp launch slurm CONFIG.toml"),
    (["launch", "slurm", "--help"], "--dry-run "),
    (["serve", "--help"], "rpp serve CONFIG.toml"),
    (["slurm-job", "--help"], "rpp slurm-job CONFIG.toml"),
]


@pytest.mark.parametrize(("words", "expected"), HELP)
def test_help_answers_fast_and_imports_nothing_heavy(words: list[str], expected: str) -> None:
    code = (
        "import sys; from megatron_rpp import cli; cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'rich', 'transformers', 'requests'}; "
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    before = cpu_seconds()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=30)
    assert cpu_seconds() - before < 1.0  # not the wall clock: other tests may share the cores
    assert expected in done.stdout
    assert done.stderr == "\n"


def test_train_help_lists_every_key_with_type_default_and_docstring() -> None:
    text = rpp("train", "--help").stdout
    assert all(f"--{key}=<" in text for key in fields())
    entry = "--optimizer.lr=<float>   default: 5e-07\n      Peak learning rate.\n"
    assert entry in text


def test_a_bad_setting_is_told_without_importing_torch(project: Path) -> None:
    code = (
        "import sys; from megatron_rpp import cli; cli.main(sys.argv[1:]); sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    argv = [sys.executable, "-c", code, "train", str(project / "run.toml"), "--train.batch_size=96"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.partition(" must divide ")[0]) == (0, "rpp: error: train.batch_size=96")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["walk"], "unknown command walk; it must be one of: train, sft, report, plan, doctor, launch, serve"),
        (["train"], "no configuration file; write: rpp train CONFIG.toml"),
        (["slurm-job", "--run.steps=1"], "no configuration file; write: rpp slurm-job CONFIG.toml"),
        (["launch", "slurm", "--nodes", "2"], "no configuration file; write: rpp launch slurm CONFIG.toml"),
        (["launch", "slurm", "{}/run.toml", "--nodes=1", "--dryrun"], "cannot read the argument '--dryrun'"),
        (["serve", "{}/run.toml", "--hots=here"], "unknown key hots in the command line"),
        (
            ["train", "{}/run.toml", "--run.stepz=1"],
            "unknown key run.stepz in the command line; did you mean",
        ),
        (["train", "{}/run.toml", "--model.path="], "model.path is not set; pass --model.path=DIRECTORY"),
        (["train", "{}/run.toml", "--data.train.path={}/bad.jsonl"], "{}/bad.jsonl:2: "),
        (
            ["train", "{}/run.toml", "--data.prompt_template={{question}}"],
            "{}/data.jsonl:1: data.prompt_template names `question`, which is not there",
        ),
        (
            ["train", "{}/run.toml", "--rollout.registry=true", "--rollout.server_tensor=3"],
            "rollout.server_tensor=3 must divide num_attention_heads=4",
        ),
        (["sft", "{}/run.toml", "--resume"], "--resume is for `rpp train`"),
        (["sft", "{}/run.toml", "--resume=auto"], "--resume is for `rpp train`"),
        (["train", "{}/run.toml", "--resume=later"], "--resume=later: write --resume to continue a run"),
        (["sft", "{}/run.toml", "--sft.output="], "sft.output is not set"),
        (["sft", "{}/run.toml", "--sft.data={}/bad.jsonl"], "{}/bad.jsonl:2: "),
        (["report"], "write: rpp report RUN_DIR"),
        (["report", "{}/none"], "{}/none/metrics.jsonl holds no steps"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (project / "bad.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": \n')
    assert cli.main([word.format(project) for word in words]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("rpp: error: " + message.format(project)) and shown.count("\n") == 1
    assert not (project / "run").exists()


@pytest.mark.parametrize("command", ["train", "sft"])
def test_check_says_ok_and_starts_and_writes_nothing(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    write_fast(project / "model", template="{{ messages[0].content }}", bos=True)

    def start(*_: object) -> int:
        raise AssertionError("it started ranks")

    monkeypatch.setattr("megatron_rpp.commands.train.launch_local", start)
    before = sorted(project.iterdir())
    assert cli.main([command, str(project / "run.toml"), "--check"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"ok: configuration, model {project}/model") and shown.count("\n") == 2
    assert f"{project}/data.jsonl" in shown and sorted(project.iterdir()) == before
    longest = {"train": "data.train: of the first 3 prompts the longest is 4", "sft": "sft.data: of the first 3 demon"}
    assert shown.splitlines()[1].startswith(longest[command])
    words = ["--data.prompt_template={question}", "--check"]
    assert cli.main([command, str(project / "run.toml"), *words]) == 2
    assert f"{project}/data.jsonl:1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        (None, [], "data.jsonl:2: the prompt is 31 tokens, the limit is 24; raise rollout.context_length"),
        (None, ["--data.chat_template=true"], "this tokenizer has no chat template; set data.chat_template = false"),
        ("{{ raise_exception('no') }}", ["--data.chat_template=true"], "the chat template refuses "),
        (None, ["--model.path={}/other"], "other: no tokenizer here; copy the model's tokenizer.json"),
        (None, ["--model.path={}/small"], "the tokenizer has 50 tokens, the model's vocab_size is 20"),
    ],
)
def test_check_finds_what_only_the_tokenizer_can_tell(
    project: Path, capsys: pytest.CaptureFixture[str], template: str | None, words: list[str], message: str
) -> None:
    for name, rows in {"model": 64, "small": 20, "other": 64}.items():
        (project / name).mkdir(exist_ok=True)
        (project / name / "config.json").write_text(json.dumps({**MODEL, "vocab_size": rows}))
        if name != "other":
            write_fast(project / name, template=template, bos=True)
    (project / "data.jsonl").write_text(
        '{"prompt": "1+1", "answer": "2"}\n' + json.dumps({"prompt": "1" * 30, "answer": "2"}) + "\n"
    )
    limits = ["--rollout.context_length=32", "--rollout.max_response_tokens=8", "--check"]
    argv = ["train", str(project / "run.toml"), *limits, *(word.format(project) for word in words)]
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_run_is_not_overwritten_without_resume(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "run").mkdir()
    (project / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert cli.main(["train", str(project / "run.toml")]) == 2
    assert "already holds a run; pass --resume to continue it, or another --run.dir" in capsys.readouterr().err


def test_a_launcher_with_the_wrong_number_of_ranks_is_refused(project: Path) -> None:
    done = rpp("train", str(project / "run.toml"), env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.returncode == 2
    sizes = "parallel.tensor=1 x parallel.pipeline=1 x parallel.data=1"
    assert done.stderr == f"rpp: error: {sizes} must equal the number of ranks in the job, 2\n"
    other = rpp("train", str(project / "run.toml"), env={"WORLD_SIZE": "2", "RANK": "1"})
    assert (other.returncode, other.stderr) == (2, "")  # rank 0 has told the user; the log has it too
    assert "number of ranks in the job, 2" in (project / "run" / "logs" / "rank-1.txt").read_text()


@pytest.fixture
def fake_train(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ranks import this file in place of megatron_rpp.train; tests write its body."""
    (project / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('megatron_rpp.train', r'{project}/fake.py')\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return spec if name == 'megatron_rpp.train' else None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{project}{os.pathsep}{Path(cli.__file__).parents[1]}")
    return project / "fake.py"


def train(project: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return rpp("train", str(project / "run.toml"), "--parallel.data=2", *more)


def test_every_rank_runs_the_same_configuration(project: Path, fake_train: Path) -> None:
    fake_train.write_text(
        "import os, sys\n"
        "def run(config, *, resume):\n"
        "    print('rank', os.environ['RANK'], config.run.steps, config.parallel.data, resume)\n"
        "    return 0\n"
    )
    done = train(project, "--run.steps=5", "--resume")
    assert (done.returncode, done.stdout, done.stderr) == (0, "rank 0 5 2 yes\n", "")
    assert (project / "run" / "logs" / "rank-1.txt").read_text() == "rank 1 5 2 yes\n"


def test_resume_auto_goes_on_in_a_directory_that_holds_a_run(project: Path, fake_train: Path) -> None:
    fake_train.write_text("import sys\ndef run(config, *, resume):\n    sys.stdout.write(resume)\n    return 0\n")
    (project / "run").mkdir()
    (project / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    done = train(project, "--resume=auto")
    assert (done.returncode, done.stdout, done.stderr) == (0, "auto", "")


def test_a_users_mistake_inside_the_ranks_is_one_line_from_rank_0(project: Path, fake_train: Path) -> None:
    fake_train.write_text("def run(config, *, resume):\n    raise ValueError('prompt 3 is\\nlonger')\n")
    done = train(project)
    assert (done.returncode, done.stderr) == (2, "rpp: error: prompt 3 is longer\n")
    assert "Traceback" in (project / "run" / "logs" / "rank-0.txt").read_text()  # for a bug of ours


def test_a_crash_shows_its_traceback_and_ends_with_1(project: Path, fake_train: Path) -> None:
    fake_train.write_text(
        "import os, time\n"
        "def run(config, *, resume):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('boom')\n"
        "    time.sleep(60)\n"
    )
    done = train(project)
    assert done.returncode == 1
    shown = done.stderr.splitlines()
    assert shown[0] == f"rpp: rank 1 on {socket.gethostname()}: RuntimeError: boom"
    assert shown[2].startswith("Traceback") and shown[-1] == "RuntimeError: boom"
    assert (project / "run" / "logs" / "rank-1.txt").read_text().count("RuntimeError: boom") == 1


def test_report_draws_the_picture_and_prints_the_summary(project: Path) -> None:
    (project / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5, "eval/accuracy": 0.5}\n')
    done = rpp("report", str(project))
    assert done.returncode == 0 and "held-out accuracy 50.0% (step 0)" in done.stdout
    assert (project / "curve.png").exists()
