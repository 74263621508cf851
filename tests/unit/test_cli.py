"""Arguments, exit codes, and what is printed where."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support.command_line import ROOT, run_safealloc
from support.model_configs import LLAMA_70B

import safealloc
from safealloc import settings
from safealloc.cli import main
from safealloc.commands import doctor, doctor_sglang, doctor_vllm, report
from safealloc.ops.backends import GEMMS, QUANTIZERS


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"safealloc {safealloc.__version__}\n"


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split()[0] for line in printed.out.splitlines() if re.match(" {4}[a-z]", line)] == [
        "repro",
        "doctor",
        "plan",
        "audit",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-command"], "no-such-command"),
        (["bench"], "bench"),  # it is `python -m benchmarks`
        (["repro", "--device", "no-such-device"], "no-such-device"),
        (["repro", "--device", "cuda:100"], "cuda:100"),
        (["repro", "--device", "cuda:256"], "cuda:256"),  # torch.device keeps 8 bits of an index
        (["repro", "--device", "meta"], "meta"),
        (["repro", "--device", "cpu", "--backend", "no-such-backend"], "no-such-backend"),
        (["repro", "--device", "cpu", "--backend", "trtllm"], "backend 'trtllm' cannot run this: "),
        (["repro", "--device", "cpu", "--seed", "-1"], "--seed"),
        (["repro", "--device", "cpu", "--seed", str(2**63)], "--seed"),
        (["repro", "--device", "cpu", "--seed", "x"], "invalid integer value: 'x'"),
        (["repro", "--device", "cpu", "--replays", "0"], "--replays"),
        (["repro", "--device", "cpu", "--json", "no/such/directory/result.json"], "no/such/directory"),
        (["doctor", "--json", "."], "directory"),
        (["doctor", "--device", "cpu"], "--device"),
        (["plan", "no-such-file"], "no-such-file: No such file or directory"),
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


@pytest.mark.parametrize("command", ["repro", "audit"])
def test_a_setting_that_no_pool_can_have_is_refused_before_the_work_starts(command, monkeypatch, capsys):
    monkeypatch.setenv(settings.VERIFY, "often")
    with pytest.raises(SystemExit) as exit_:
        main([command, "--device", "cpu"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"safealloc {command}: {settings.VERIFY} must be ")


def test_a_file_that_is_not_writable_is_refused_before_the_work_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", lambda progress: pytest.fail("it started"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be root
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--json", str(tmp_path / "result.json")])
    assert exit_.value.code == 2
    assert "not writable" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    """Full after the first 1000 bytes."""
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", "--json", "result.json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("safealloc doctor: --json result.json: File too large (")


def test_json_goes_to_the_file_and_the_tables_to_the_output(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["command"] == "safealloc doctor"
    assert "quantizer" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_a_dash_prints_json_instead_of_the_tables(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA_70B))
    assert main([command, *([] if command == "doctor" else ["."]), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == f"safealloc {command}"
    assert [path.name for path in Path().iterdir()] == ["config.json"]


def test_what_a_package_prints_does_not_get_into_the_json(tmp_path):
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("print('noise')\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = run_safealloc("repro", "--device", "cpu", "--backend", "cutlass", "--json", "-", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (2, "")
    done = run_safealloc("doctor", "--json", "-", PYTHONPATH=path)
    assert json.loads(done.stdout)["versions"]["flashinfer"] == {"version": "unknown", "reason": None}
    assert "noise" in done.stderr


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json", "-"]])
def test_a_reader_that_leaves_early_is_not_an_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-m", "safealloc", *arguments]
    with open(writer) as out:
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.PIPE, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_gets_color_and_no_cut_cell(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    text = on_a_terminal("plan", str(tmp_path))
    assert "\x1b[1m" in text
    assert "…" not in text


def on_a_terminal(*arguments: str) -> str:
    """What is printed to a terminal of 80 columns."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", "LINES": "50"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "safealloc", *arguments]
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
    return printed.decode()


# --- A narrow terminal ------------------------------------------------------------------------------------------------


def narrow() -> Console:
    """A terminal of 80 columns, whose file is text."""
    return Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True, markup=False, highlight=False)


def printed_on(out: Console) -> list[str]:
    """The lines, without control sequences."""
    return re.sub(r"\x1b\[[0-9;]*m", "", out.file.getvalue()).splitlines()


def test_names_of_backends_are_whole_at_80_columns():
    """With a long reason in every row."""
    reason = "it runs on compute capability 10.0, 10.3, 10.7, 12.0, 12.1 only, cuda:0 has 9.0"
    tables = [
        [doctor.BackendFinding(name, ("128x4", "8x4"), ("8x4",), {"linear": reason}) for name in names]
        for names in (QUANTIZERS, GEMMS)
    ]
    device = doctor.DeviceFinding("cuda:0", "a GPU", "9.0", *tables, None)
    plugin = doctor_vllm.PluginFinding(None, None, True, True, None)
    padding = doctor_vllm.PaddingFinding(None, None)
    vllm = doctor_vllm.VllmFinding(None, "vllm is not installed", None, [], padding, [], plugin, [])
    out = narrow()
    doctor.show(
        doctor.Result([], list(settings.given()), {}, [device], None, vllm, doctor_sglang.SGLangFinding(None)), out
    )
    lines = printed_on(out)
    assert max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines if line.split()[:1] in (["quantizer"], ["GEMM"])] == [
        *(["quantizer", name] for name in QUANTIZERS),
        *(["GEMM", name] for name in GEMMS),
    ]
    assert [line.split()[0] for line in lines if line.startswith(" SAFEALLOC")] == list(settings.MEANINGS)


def test_names_of_backends_are_whole_in_the_help(monkeypatch, capsys):
    for width in range(50, 81):
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit):
            main(["repro", "--help"])
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= width
        assert set(GEMMS) <= set(re.split(r"[\s,;:]+", printed))


def test_columns_of_names_are_neither_cut_nor_wrapped():
    names = ["flashinfer silu_and_mul_scaled_nvfp4_experts", "vllm cutlass_scaled_fp4_mm"]
    out = narrow()
    report.table(out, "Names", ("", "details"), [((name, "a long reason " * 9), True) for name in names])
    lines = printed_on(out)
    assert [line for line in lines if line.startswith((" flashinfer", " vllm"))] == [
        line for line in lines if any(name in line for name in names)
    ]
    assert sum(line.count("reason") for line in lines) == 18


def test_a_cell_of_several_lines_is_one_line():
    out = Console(file=io.StringIO(), width=10_000)
    report.table(out, "Reasons", ("", "why not"), [(("a", "first\nsecond \x1b[31m"), False)])
    assert r"first\nsecond \x1b[31m" in out.file.getvalue()
