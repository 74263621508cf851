"""Arguments, exit codes, and what is printed where."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import safealloc
from safealloc.cli import main
from safealloc.commands import report

ROOT = Path(safealloc.__file__).resolve().parents[1]


def run_safealloc(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m safealloc`` with its output piped."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "safealloc", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "40", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"safealloc {safealloc.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["no-such-command"], "no-such-command"),
        (["repro", "--device", "no-such-device"], "no-such-device"),
        (["repro", "--device", "cuda:100"], "cuda:100"),
        (["repro", "--device", "cuda:256"], "cuda:256"),  # an index of 8 bits in PyTorch
        (["repro", "--device", "meta"], "meta"),
        (["repro", "--device", "cpu", "--backend", "no-such-backend"], "no-such-backend"),
        (["repro", "--device", "cpu", "--backend", "trtllm"], "trtllm"),
        (["repro", "--device", "cpu", "--seed", "-1"], "--seed"),
        (["repro", "--device", "cpu", "--seed", str(2**63)], "--seed"),
        (["repro", "--device", "cpu", "--replays", "0"], "--replays"),
        (["repro", "--device", "cpu", "--json", "no/such/directory/result.json"], "no/such/directory"),
        (["bench", "no-such-part"], "no-such-part"),
        (["bench", "decode", "--json", "no/such/directory/result.json"], "no/such/directory"),
        (["doctor", "--json", "."], "directory"),
        (["doctor", "--device", "cpu"], "--device"),
        (["audit", "--device", "meta"], "meta"),
        (["audit", "--device", "cuda:100"], "cuda:100"),
        (["audit", "--device", "cpu", "--json", "no/such/directory/result.json"], "no/such/directory"),
        (["audit", "--device", "cpu", "--markdown", "no/such/directory/result.md"], "no/such/directory"),
        (["audit", "--device", "cpu", "--markdown", "."], "directory"),
        (["doctor", "--json", "a" * 300], "File name too long"),
        (["audit", "--device", "cpu", "--markdown", "a" * 300], "File name too long"),
        (["plan", "a" * 300], "File name too long"),
        (["plan", "/dev/full"], "so it is no configuration"),  # zeros, for ever
        (["plan", "new\nline"], r"new\nline"),
        (["plan", "red\x1b[31m"], r"red\x1b[31m"),
        (["plan", "\udcff"], r"\udcff"),  # a byte that is not UTF-8
        (["plan", "config\0"], "NUL"),
        (["doctor", "--json", "result\0"], "NUL"),
        (["repro", "--device", "cpu", "--seed", "9" * 5000], "--seed"),
        (["repro", "--device", "cpu", "--replays", "9" * 5000], "from 1 to 2**63 - 1"),
        (["repro", "--device", "cpu", "--seed", "٣"], "--seed"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert says in printed.err


def test_what_a_full_disk_leaves_of_a_result_is_removed(tmp_path, monkeypatch, capsys):
    """Here after its first 1000 bytes."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", "--json", "result.json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_.value.code == 2
    assert "--json result.json: File too large" in capsys.readouterr().err
    assert not Path("result.json").exists()


def test_a_file_that_cannot_be_opened_is_left_alone(tmp_path, monkeypatch):
    """As a program that runs, though it may be written by its rights."""
    file = tmp_path / "result.json"
    file.write_text("kept")

    def refuse(self, *arguments, **options):
        raise OSError(26, "Text file busy")

    with monkeypatch.context() as patched, pytest.raises(report.UsageError, match="Text file busy"):
        patched.setattr(Path, "open", refuse)
        report.write_json(file, {})
    assert file.read_text() == "kept"


def test_piped_output_is_plain_and_whole():
    done = run_safealloc("repro", "--device", "cpu", "--backend", "reference")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["16", "trtllm", "128x4", "8x4", "14/16", "14/16"] in [line[:6] for line in lines]
    assert sum(line[1:2] == ["cutlass"] and "0/64" in line for line in lines) == 1
    assert ["33", "720", "8x4", "3", "33/33", "0/33", "yes"] in lines
    assert sum(line[-1:] == ["yes"] for line in lines) == 14 + 40 + 22


def test_a_terminal_gets_color_and_no_cut_cell():
    reader, writer = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "50"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "safealloc", "repro", "--device", "cpu", "--backend", "reference"]
    process = subprocess.Popen(command, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    printed = b""
    while True:
        try:
            some = os.read(reader, 65536)
        except OSError:  # how Linux reports that the other side of a terminal was closed
            break
        if not some:
            break
        printed += some
    os.close(reader)
    assert process.wait(120) == 0
    text = printed.decode()
    assert "\x1b[1m" in text
    assert "…" not in text


def test_json_goes_to_the_file_and_the_table_to_the_output(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["command"] == "safealloc doctor"
    assert "quantizer" in capsys.readouterr().out
