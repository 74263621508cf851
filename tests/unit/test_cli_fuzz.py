"""Whatever the command line is given, it answers with an exit code and at most one line of error, never a traceback.

What is refused leaves no file behind, a JSON file is whole, and a configuration is never written over.
``SAFEALLOC_FUZZ_EXAMPLES=5000`` looks further: so many random examples a test, instead of a few that are always the same.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import ROOT
from test_plan import DEEPSEEK_R1, LLAMA_70B, MIXTRAL_8X7B, QWEN3_235B

from benchmarks import __main__
from safealloc import ScalePool, _optional
from safealloc.cli import main
from safealloc.commands import audit, doctor, doctor_vllm, models, plan, repro
from safealloc.commands.report import one_line
from safealloc.pool import guard

_MORE = os.environ.get("SAFEALLOC_FUZZ_EXAMPLES")

REAL = [LLAMA_70B, DEEPSEEK_R1, QWEN3_235B, MIXTRAL_8X7B]
FIELDS = sorted(
    {*LLAMA_70B, *DEEPSEEK_R1, *QWEN3_235B, *models._EXPERTS, *models._TOPK}
    | {"model_type", "text_config", "shared_expert_intermediate_size"}
)


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=int(_MORE or examples),
        derandomize=_MORE is None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


class Done(NamedTuple):
    """One run: its exit code, what it printed, and the files that it wrote."""

    code: Any
    out: str
    err: str
    written: dict[str, str]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new current folder: a configuration in a file and in a folder, and names that cannot be read or written."""
    with tempfile.TemporaryDirectory() as made:
        here = Path(made) / "here"
        here.mkdir()
        (here / "folder").mkdir()
        (here / "empty").mkdir()
        for file in (here / "config.json", here / "folder" / "config.json"):
            file.write_text(json.dumps(QWEN3_235B))
        (here / "old.json").write_text("of an earlier run")
        (here / "loop").symlink_to("loop")
        (here / "link.json").symlink_to("config.json")
        with contextlib.chdir(here):
            yield here


def contents() -> dict[str, str]:
    """Of every file in the current folder and its folders."""
    return {str(path): path.read_text("latin-1") for path in Path().rglob("*") if path.is_file()}


def run(arguments: Sequence[str], out: Any, err: Any) -> Any:
    """The exit code of ``main``."""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return main(arguments)
        except SystemExit as exit_:
            return exit_.code


def answered(arguments: Sequence[str], encoding: str = "utf-8") -> Done:
    """Run in the current folder, with streams as a shell's: there is a result, or one line of error and nothing else."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", write_through=True)
    before = contents()
    code = run(arguments, out, err)
    after = contents()
    printed, error = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    written = {name: text for name, text in after.items() if before.get(name) != text}
    assert before.keys() <= after.keys()
    assert code in (0, 1, 2)
    if code == 2:
        assert (printed, written) == ("", {})
        check_error(error)
    else:
        assert printed
        assert error == ""
        for text in written.values():
            assert text.startswith("`safealloc audit`") or json.loads(text)["command"].startswith("safealloc ")
    return Done(code, printed, error, written)


def check_error(error: str) -> None:
    """One line, and nothing in it steers a terminal."""
    assert re.fullmatch(r"safealloc[^\n]*: [^\n]+\n", error)
    assert error[:-1].isprintable()


READABLE = ["config.json", "folder", "link.json", "old.json", "ü.json", "result.json", "new\nline", "\udcff.json", "-"]
MISSING = ["missing", "config.json/file", "loop", "loop/file", "a" * 300, "a/" * 3000]
PATHS = st.sampled_from([*READABLE, *MISSING, "", ".", "..", "/", "empty", "/dev/null", "/dev/full"])
# Undecodable bytes come as surrogates. No slash, so that nothing is written elsewhere.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/")
TEXT = st.text(CHARACTERS | st.sampled_from("\udc80\udcff-=,0\0\n\x1b"), max_size=8)
NUMBERS = st.one_of(
    st.integers(-3, 600).map(str),
    st.integers(2**20 + 1, 10**25).map(str),
    st.sampled_from(["9" * 5000, "-" + "9" * 5000, "0" * 5000 + "1", "1e3", "1.0", "+1", " 8", "1_0", "٣", "²", "nan"]),
    TEXT.filter(lambda text: not re.search(r"\d{4}", text)),  # a million batch sizes take seconds
)
SIZES = st.lists(NUMBERS, max_size=4).map(",".join)

VALUES_IN_JSON = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 8, 16, 17, 48, 64, 128, 4096, 2**16, 2**16 + 1, 2**31 - 1, 2**31, 2**63, 10**400]),
    st.integers(-5, 10**5),
    st.integers(1, 600).map(lambda blocks: 16 * blocks),
    st.sampled_from([0.5, 16.0, 1e308, math.nan, math.inf, -math.inf, -0.0]),
)
ANY_TEXT = st.text(st.one_of(st.characters(), st.sampled_from("\ud800\n\x1b\r\u2028")), max_size=8)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), VALUES_IN_JSON, ANY_TEXT),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT | st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def objects(draw: st.DrawFn) -> str:
    """A real configuration after some mutations, as text: keys may come twice, or in ``text_config``."""
    pairs = [(key, json.dumps(value)) for key, value in draw(st.sampled_from(REAL)).items()]
    for _ in range(draw(st.integers(0, 3))):
        what = draw(st.sampled_from(["delete", "number", "value", "again", "nest"]))
        at = draw(st.integers(0, len(pairs)))
        key = pairs[at][0] if at < len(pairs) else draw(st.sampled_from(FIELDS))
        if what == "delete":
            del pairs[at : at + 1]
            continue
        if what == "nest":
            depth = draw(st.sampled_from([1, 50, 900, 1100, 20000]))
            before, after = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
            text = before * depth + "1" + after * depth
        else:
            text = json.dumps(draw(VALUES_IN_JSON if what == "number" else JSON))
        pairs[at : at + (what != "again")] = [(key, text)]
    body = "{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in pairs) + "}"
    return f'{{"text_config": {body}, "hidden_size": 64}}' if draw(st.integers(0, 9)) == 0 else body


OBJECTS = objects().map(str.encode)
DIGITS = b"1" * 5000
FILES = st.one_of(
    OBJECTS,
    OBJECTS,
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
    st.builds(lambda text, end: text[:end], OBJECTS, st.integers(0, 400)),
    st.sampled_from([b"", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"{}{}", DIGITS, b'{"hidden_size": ' + DIGITS + b"}"]),
)
FINE_FLAGS = ["", "--tp=2", "--sizes=1,2,32,40,300 --layout=trtllm", "--max-size=1024", "--expert-parallel --tp 4"]
ANY_FLAGS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["--tp", "--tensor-parallel"]), st.sampled_from(["1", "2", "4", "8"]) | NUMBERS),
        st.tuples(st.just("--max-size"), NUMBERS),
        st.tuples(st.just("--sizes"), SIZES),
        st.tuples(st.just("--layout"), st.sampled_from(["128x4", "trtllm", "8x4"])),
        st.just(("--expert-parallel",)),
    ),
    max_size=3,
).map(lambda flags: [part for flag in flags for part in flag])


@fuzz(150)
@given(FILES, ANY_FLAGS | st.sampled_from(FINE_FLAGS).map(str.split))
def test_any_configuration_is_planned_or_refused_in_one_line(content, flags):
    with folder() as here:
        (here / "config.json").write_bytes(content)
        done = answered(["plan", "config.json", *flags, "--json", "result.json"])
    if done.code == 2:  # names the file, or what in it or in the flags is wrong
        assert any(says in done.err for says in ("config.json: ", "the configuration", "argument", "ranks", "batch"))
    else:
        assert list(done.written) == ["result.json"]
        check_plan(json.loads(done.written["result.json"]))


@fuzz(150)
@given(PATHS | TEXT, PATHS | TEXT)
def test_any_path_of_a_configuration_and_a_result(config, result):
    with folder(), mock.patch.object(plan, "_MOST_CHARACTERS", 1 << 16):
        done = answered(["plan", f"--json={result}", "--sizes=1,8", "--", config])
        if done.code == 2:
            names = (Path(config), Path(result), Path(config) / "config.json")
            assert "NUL" in done.err or any(one_line(str(name)) in done.err for name in names)
        else:
            assert json.loads(plan.config_file(Path(config)).read_text()) == QWEN3_235B
            assert len(set(done.written.values())) == (result != "/dev/null")


def check_plan(result: dict[str, Any]) -> None:
    """A plan's numbers fit each other, and what a buffer of that shape is by the formula."""
    assert result["sizes"] == sorted(set(result["sizes"]))
    ks = {site["k"] for site in result["sites"]}
    shapes = {(spec["rows"], spec["k"]) for spec in result["buffers"]}
    assert shapes == {(rows, k) for rows in result["sizes"] for k in ks}
    for spec in result["buffers"]:
        tile = 8 if spec["layout"] == "layout_8x4" else 128
        assert spec["layout"] == "layout_128x4" or (result["layout_rule"] == "trtllm" and spec["rows"] <= 32)
        padded = [math.ceil(spec["rows"] / tile) * tile, (spec["k"] // 16 + 3) // 4 * 4]
        assert spec["padded_shape"] == padded
        assert spec["bytes"] == padded[0] * padded[1]
    every = [spec["bytes"] for spec in result["buffers"]]
    assert (result["bytes"], result["per_call_bytes"]) == (sum(every), max(every))
    compact = {(spec["k"], spec["layout"], tuple(spec["padded_shape"])) for spec in result["buffers"]}
    assert result["compact"]["buffers"] == len(compact)
    # Counts besides the scales: 4 bytes for 32 columns of scales, at most 15 bytes behind them.
    scales = sum(rows * cols for _, _, (rows, cols) in compact)
    assert 0 <= result["compact"]["bytes"] - scales <= sum(15 + 4 * math.ceil(k / 512) for k, _, _ in compact)
    experts = result["experts"]
    if experts is None:
        return
    for spec in experts["buffers"]:
        topk = experts["sites"][0]["topk"]
        assert spec["rows"] == result["sizes"][-1] * topk
        rows, cols = spec["padded_shape"]
        assert rows >= spec["rows"]
        # Scales as no more than the bound of vLLM's PR; behind them 4 bytes for each routed row.
        assert rows * cols <= spec["right_sized_bytes"]
        assert 0 <= spec["bytes"] - rows * cols - 4 * spec["rows"] <= 15
        assert spec["vllm_bytes"] == 163840 * topk * cols
    assert experts["freed_bytes"] == experts["vllm_bytes"] - experts["bytes"]


COMMANDS = {
    "repro": ["--device", "--backend", "--seed", "--replays"],
    "doctor": [],
    "plan": ["--tensor-parallel", "--tp", "--expert-parallel", "--max-size", "--sizes", "--layout"],
    "bench": ["--quick", "--plot"],
    "audit": ["--device", "--with-pool", "--quick", "--skip", "--markdown"],
}
EVERY_FLAG = sorted({flag for flags in COMMANDS.values() for flag in flags} | {"--js", "-h", "--no-such", "--"})
DEVICES = ["cpu", "cuda", "cuda:0", "cuda:07", "cuda:٣", "cpu:1", "meta"]
WORDS = ["auto", "triton", "reference", "trtllm", "quantize", "decode", "host", "moe", "all", "128x4", "--", "-1"]
VALUES = PATHS | NUMBERS | st.sampled_from([*DEVICES, *WORDS])


@st.composite
def argument_lists(draw: st.DrawFn) -> list[str]:
    """A command with flags of its own for the most part, and with any values."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    arguments = ["config.json"] if command == "plan" and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        own = st.sampled_from([*COMMANDS[command], "--json"])
        flag = draw(own | own | st.sampled_from(EVERY_FLAG))
        value = draw(VALUES)
        arguments += draw(st.sampled_from([[flag, value], [flag, value], [f"{flag}={value}"], [flag], [value]]))
    return [command, *arguments] if draw(st.integers(0, 19)) else [*arguments, command]


@functools.cache
def results() -> dict[Any, Any]:
    """What the commands answer at once, of this machine or made up."""
    results: dict[Any, Any] = {doctor: doctor.run(lambda message: None)}
    options = repro.Options(repro.checked_device("cpu"), "auto", 0, 1)
    results[repro] = repro.Result(options, "a CPU", {"torch": "2"}, [], {"replay": "a reason"})
    results[bench] = __main__.Result("cuda:0", "a GPU", None, {}, False, {})
    machine = {"device": "cpu", "name": "a CPU"}
    side = audit.Side([], {("a", "a reason\nin two lines, 5 µs"): []})
    results[audit] = audit.Result(False, False, machine, {}, side, side, [])
    return results


@contextlib.contextmanager
def instant() -> Iterator[None]:
    """Nothing is measured or drawn; arguments and output are as ever."""
    with contextlib.ExitStack() as patches:
        for module, result in results().items():
            patches.enter_context(mock.patch.object(module, "run", lambda *given, result=result: result))
        patches.enter_context(mock.patch.object(__main__, "checked_options"))
        patches.enter_context(mock.patch.object(plan, "_MOST_CHARACTERS", 1 << 16))
        if _optional.missing("matplotlib") is None:
            from benchmarks import plots

            patches.enter_context(mock.patch.object(plots, "draw", lambda result, where: [where / "a.png"]))
        yield


@fuzz(200)
@given(argument_lists())
def test_any_arguments_of_any_command(arguments):
    with instant(), folder():
        answered(arguments)


# No NUL can be in an environment variable.
SETTINGS = st.one_of(
    TEXT.map(lambda text: text.replace("\0", "")),
    st.integers(-3, 10**25).map(str),
    st.sampled_from(["0", "1", "", "safealloc", "safealloc,lora", ",", "true", "٣", "²"]),
)
PLUGIN = ["SAFEALLOC", "SAFEALLOC_STRICT", "SAFEALLOC_LINEAR", "SAFEALLOC_MAX_ROWS", "VLLM_PLUGINS"]


@fuzz(30)
@given(st.dictionaries(st.sampled_from(PLUGIN), SETTINGS))
def test_any_environment_of_the_plugin(environment):
    """The doctor tells what it means, here as if vLLM were there."""
    installed = mock.patch.object(doctor_vllm.targets, "installed", return_value=("0.32.0", lambda module: None))
    with installed, mock.patch.dict(os.environ, environment), folder():
        done = answered(["doctor", "--json", "result.json"])
    assert done.code == 0
    plugin = json.loads(done.written["result.json"])["vllm"]["plugin"]
    assert plugin["environment"].items() >= environment.items()


@fuzz(60)
@given(
    st.dictionaries(st.sampled_from([guard.VERIFY, guard.REPAIR, guard.POISON]), SETTINGS | st.just("9" * 5000)),
    st.sampled_from([["repro", "--device=cpu"], ["audit", "--device=cpu"], ["bench"]]),
)
def test_any_environment_of_a_pool(environment, arguments):
    """What no pool takes is refused before the work starts."""
    with mock.patch.dict(os.environ, environment), instant(), folder():
        try:
            ScalePool("cpu").close()
            taken = True
        except ValueError:
            taken = False
        assert (answered([*arguments, "--json", "result.json"]).code != 2) == taken


OUTPUTS = pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "."],
        ["doctor"],
        ["repro", "--device=cpu"],
        ["bench"],
        ["audit", "--device=cpu"],
        ["audit", "--device=cpu", "--markdown=-"],
        ["plan", "--help"],
        ["--version"],
    ],
    ids=" ".join,
)


@OUTPUTS
def test_a_full_device_as_standard_output(arguments):
    err = io.StringIO()
    with instant(), folder(), open("/dev/full", "w") as out:  # whose end writes what is left, as Python's does
        assert run(arguments, out, err) == 2
    check_error(err.getvalue())
    assert "standard output: No space left on device" in err.getvalue()


@OUTPUTS
def test_a_reader_that_leaves_early_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    err = io.StringIO()
    with instant(), folder(), open(writer, "w") as out:
        assert run(arguments, out, err) == 0
    assert err.getvalue() == ""


@OUTPUTS
def test_no_standard_output_at_all(arguments):
    """As after ``>&-`` in a shell."""
    with instant(), folder():
        assert run(arguments, None, io.StringIO()) == 0


@OUTPUTS
def test_standard_output_in_ascii(arguments):
    fields = QWEN3_235B | {"architectures": ["Größe"]}
    with instant(), folder() as here:
        (here / "config.json").write_text(json.dumps(fields))
        printed = answered(arguments, "ascii").out
    if arguments[0] == "plan" and len(arguments) == 1:
        assert printed.startswith(r"Gr\xf6\xdfe on 1 ranks")
    if arguments[0] == "audit":
        assert r"5 \xb5s" in printed


def test_a_report_is_written_in_any_locale(monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    with instant(), folder():
        done = answered(["audit", "--device=cpu", "--markdown=audit.md"], "ascii")
    assert "5 µs".encode().decode("latin-1") in done.written["audit.md"]


def test_a_process_whose_reader_leaves_early():
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-m", "safealloc", "plan", "."]
    with folder(), open(writer) as out:
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.PIPE, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
