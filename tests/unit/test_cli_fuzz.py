"""Whatever a configuration, an argument or a setting is, there is a result or one line of error, never a traceback.

What is refused leaves no file behind, and a JSON file is whole. With ``SAFEALLOC_FUZZ_EXAMPLES=5000`` each test tries so many
random examples, instead of a few that are always the same.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.model_configs import DEEPSEEK_R1, LLAMA_70B, MIXTRAL_8X7B, QWEN3_235B

from safealloc.cli import main
from safealloc.commands import doctor, doctor_vllm
from safealloc.commands.repro import command as repro
from safealloc.ops.backends import GEMMS
from safealloc.settings import MEANINGS, POISON, VERIFY, VERIFY_REPAIR, watch

_MORE = os.environ.get("SAFEALLOC_FUZZ_EXAMPLES")

REAL = [LLAMA_70B, DEEPSEEK_R1, QWEN3_235B, MIXTRAL_8X7B]
FIELDS = sorted({"model_type", "text_config", "shared_expert_intermediate_size"}.union(*REAL))


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=int(_MORE or examples),
        derandomize=_MORE is None,
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.function_scoped_fixture,  # what `instant` patches is the same for every example
        ],
    )


class Done(NamedTuple):
    """One run: its exit code, what it printed, and the files that it wrote."""

    code: Any
    out: str
    err: str
    written: dict[str, str]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A new current folder with a configuration in a file and in a folder."""
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        here = Path(made)
        (here / "folder").mkdir()
        (here / "empty").mkdir()
        for file in (here / "config.json", here / "folder" / "config.json"):
            file.write_text(json.dumps(QWEN3_235B))
        yield here


def contents() -> dict[str, str]:
    """Of every file in the current folder and its folders."""
    return {str(path): path.read_text("latin-1") for path in Path().rglob("*") if path.is_file()}


def answered(arguments: Sequence[str]) -> Done:
    """Run in the current folder: there is a result, or one line of error and nothing else."""
    out, err = io.StringIO(), io.StringIO()
    before = contents()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main(arguments)
        except SystemExit as exit_:
            code = exit_.code
    after = contents()
    written = {name: text for name, text in after.items() if before.get(name) != text}
    assert before.keys() <= after.keys()
    assert code in (0, 1, 2)
    if code == 2:
        assert (out.getvalue(), written) == ("", {})
        assert re.fullmatch(r"safealloc[^\n]*: [^\n]+\n", err.getvalue())
    else:
        assert out.getvalue()
        assert err.getvalue() == ""
        for text in written.values():
            assert json.loads(text)["command"].startswith("safealloc ")
    return Done(code, out.getvalue(), err.getvalue(), written)


PATHS = st.sampled_from(
    ["config.json", "folder", "result.json", "-", "missing", "missing/file", "", ".", "..", "empty"]
)
NUMBERS = st.one_of(
    st.integers(-3, 600).map(str),
    st.integers(2**20 + 1, 10**25).map(str),
    st.sampled_from(["1e3", "1.0", "+1", " 8", "nan", "many", ""]),
)
SIZES = st.lists(NUMBERS, max_size=4).map(",".join)

VALUES_IN_JSON = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 8, 16, 17, 48, 64, 128, 4096, 0.5, 16.0, math.nan]),
    st.integers(-5, 10**5),
    st.integers(1, 600).map(lambda blocks: 16 * blocks),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), VALUES_IN_JSON, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A real configuration with some fields changed, added or left out; perhaps that of a multimodal model."""
    fields = dict(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from([*fields, *FIELDS]))
        if draw(st.booleans()):
            fields.pop(key, None)
        else:
            fields[key] = draw(VALUES_IN_JSON | JSON)
    return {"text_config": fields, "hidden_size": 64} if draw(st.integers(0, 9)) == 0 else fields


FILES = st.one_of(
    configurations().map(lambda fields: json.dumps(fields).encode()),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda fields, end: json.dumps(fields).encode()[:end], configurations(), st.integers(0, 400)),
    st.sampled_from([b"", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"{}{}", b"[" * 100_000]),
)
GOOD_FLAGS = ["", "--tp=2", "--sizes=1,2,32,40,300 --layout=trtllm", "--max-size=1024", "--expert-parallel --tp 4"]
GOOD_FLAGS += ["--gpu b200 --spec-tokens 3", "-tp 2 -dp 2 --moe-backend cutlass", "--as-nvfp4 --gpu rtx-5090"]
ANY_FLAGS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["--tp", "--tensor-parallel"]), st.sampled_from(["1", "2", "4", "8"]) | NUMBERS),
        st.tuples(st.just("--max-size"), st.integers(-3, 2000).map(str)),
        st.tuples(st.just("--sizes"), SIZES),
        st.tuples(st.just("--layout"), st.sampled_from(["128x4", "trtllm", "8x4"])),
        st.tuples(st.just("--gpu"), st.sampled_from(["b200", "9.0", "12.1", "h800", "x.y", ""])),
        st.tuples(st.just("--moe-backend"), st.sampled_from(["cutlass", "flashinfer_trtllm", "none"])),
        st.tuples(
            st.sampled_from(["-sc", "--spec-tokens"]),
            st.sampled_from(["3", "{}", '{"num_speculative_tokens": 2}', "["]),
        ),
        st.tuples(st.sampled_from(["-dp", "--max-num-seqs"]), NUMBERS),
        st.just(("--expert-parallel",)),
    ),
    max_size=3,
).map(lambda flags: [part for flag in flags for part in flag])


@fuzz(150)
@given(FILES, ANY_FLAGS | st.sampled_from(GOOD_FLAGS).map(str.split))
def test_any_configuration_is_planned_or_refused_in_one_line(content, flags):
    with folder() as here:
        (here / "config.json").write_bytes(content)
        done = answered(["plan", "config.json", *flags, "--json", "result.json"])
    if done.code == 2:  # names the file, or what in it or in the flags is wrong
        assert any(says in done.err for says in ("config.json: ", "the configuration", "argument", "rank", "batch"))
    else:
        assert list(done.written) == ["result.json"]
        check_plan(json.loads(done.written["result.json"]))


def check_plan(result: dict[str, Any]) -> None:
    """A plan's numbers fit each other, and the formula for a buffer of that shape."""
    assert result["sizes"] == sorted(set(result["sizes"]))
    ks = {site["k"] for site in result["sites"]}
    shapes = {(spec["rows"], spec["k"]) for spec in result["buffers"]}
    if result["data_parallel"] == 1:  # else ranks may share the rows of some
        assert shapes == {(rows, k) for rows in result["sizes"] for k in ks}
    for spec in result["buffers"]:
        tile = 8 if spec["layout"] == "layout_8x4" else 128
        assert spec["layout"] == "layout_128x4" or (result["layout_rule"] == "trtllm" and spec["rows"] <= 32)
        padded = [math.ceil(spec["rows"] / tile) * tile, (spec["k"] // 16 + 3) // 4 * 4]
        assert spec["padded_shape"] == padded
        assert spec["bytes"] == padded[0] * padded[1]
    every = [spec["bytes"] for spec in result["buffers"]]
    assert (result["bytes"], result["per_call_bytes"]) == (sum(every), max(every, default=0))
    experts = result["experts"]
    if experts is None:
        return
    for spec in experts["buffers"]:
        topk = experts["sites"][0]["topk"]
        assert spec["rows"] == result["sizes"][-1] * topk * result["data_parallel"]
        rows, cols = spec["padded_shape"]
        assert rows >= spec["rows"]
        # Scales: no more than the bound of vLLM's PR. After them: 4 bytes for each row of an expert.
        assert rows * cols <= spec["right_sized_bytes"]
        assert 0 <= spec["bytes"] - rows * cols - 4 * spec["rows"] <= 15
        assert spec["vllm_bytes"] == 163840 * topk * cols
    known = result["moe_backend"] is not None
    assert experts["freed_bytes"] == (experts["vllm_bytes"] - experts["bytes"] if known else None)


COMMANDS = {
    "repro": ["--device", "--backend", "--seed", "--replays"],
    "doctor": [],
    "plan": ["--tensor-parallel", "--tp", "--expert-parallel", "--sizes", "--layout", "--gpu"],
}
EVERY_FLAG = sorted({flag for flags in COMMANDS.values() for flag in flags} | {"--js", "-h", "--no-such", "--"})
WORDS = ["cpu", "cuda", "cuda:0", "cpu:1", "meta", "auto", *GEMMS, "128x4", "--", "-1"]
VALUES = PATHS | NUMBERS | st.sampled_from(WORDS)


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
    """Results of the commands that take long: one of this machine, one made up."""
    cpu = torch.device("cpu")
    made_up = repro.Result(cpu, "a CPU", {"torch": "2"}, 0, [], {"replay": "a reason"})
    return {doctor: doctor.run(lambda what, done: None), repro: made_up}


@pytest.fixture
def instant() -> Iterator[None]:
    """Nothing is measured; arguments and output are as ever."""
    with contextlib.ExitStack() as patches:
        for module, result in results().items():
            patches.enter_context(mock.patch.object(module, "run", lambda *given, result=result: result))
        yield


@pytest.mark.usefixtures("instant")
@fuzz(200)
@given(argument_lists())
def test_any_arguments_are_answered(arguments):
    with folder():
        answered(arguments)


# An environment variable holds no NUL.
VALUES_OF_SETTINGS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    st.integers(-3, 10**25).map(str),
    st.sampled_from(["0", "1", "", "safealloc", "safealloc,lora", ",", "true"]),
)


@fuzz(30)
@given(st.dictionaries(st.sampled_from([*MEANINGS, "VLLM_PLUGINS"]), VALUES_OF_SETTINGS))
def test_the_doctor_reports_any_environment(environment):
    """Here as if vLLM were there."""
    installed = mock.patch.object(doctor_vllm.targets, "installed", return_value=("0.32.0", lambda module: None))
    with installed, mock.patch.dict(os.environ, environment), folder():
        done = answered(["doctor", "--json", "result.json"])
    assert done.code == 0
    result = json.loads(done.written["result.json"])
    found = {name: entry["value"] for name, entry in result["settings"].items()}
    found["VLLM_PLUGINS"] = result["vllm"]["plugin"]["vllm_plugins"]
    assert found.items() >= environment.items()


@pytest.mark.usefixtures("instant")
@fuzz(60)
@given(st.dictionaries(st.sampled_from([VERIFY, VERIFY_REPAIR, POISON]), VALUES_OF_SETTINGS))
def test_a_setting_that_no_pool_can_have_is_refused_before_the_work_starts(environment):
    with mock.patch.dict(os.environ, environment), folder():
        try:
            watch()
            accepted = True
        except ValueError:
            accepted = False
        assert (answered(["repro", "--device=cpu", "--json", "result.json"]).code != 2) == accepted
