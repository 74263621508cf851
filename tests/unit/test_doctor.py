"""``safealloc doctor``: what it finds, also in broken installations."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.command_line import ROOT, run_safealloc
from support.vllm_source import VERSION, stand_in

from safealloc import _optional, settings
from safealloc.cli import main
from safealloc.commands import doctor_vllm
from safealloc.integrations.vllm import kernel, plugin, sites, targets
from safealloc.ops.backends import GEMMS, QUANTIZERS


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_package_has_a_version_or_a_reason(result):
    named = ["safealloc", "python", "torch", "triton", "flashinfer", "vllm", "cuda.bindings", "matplotlib"]
    assert set(result["versions"]) == {*named, "CUDA (torch)", "CUDA driver"}
    for found in result["versions"].values():
        assert found["version"] or found["reason"]
    assert result["versions"]["torch"] == {"version": torch.__version__, "reason": None}
    for package in ("triton", "flashinfer", "vllm"):
        assert result["versions"][package]["reason"] == _optional.missing(package)


def test_every_backend_is_usable_or_refused_for_each_layout(result):
    assert len(result["devices"]) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for device in result["devices"]:
        assert device["name"]
        for found, table, layouts in (
            (device["quantizers"], QUANTIZERS, {"128x4", "8x4", "linear"}),
            (device["gemms"], GEMMS, {"128x4", "8x4"}),
        ):
            assert [row["name"] for row in found] == list(table)
            for row in found:
                assert {*row["usable"], *row["refused"]} == layouts
                assert not {*row["usable"]} & {*row["refused"]}
                assert all(row["refused"].values())
                assert {*row["auto"]} <= {*row["usable"]}
            automatic = [layout for row in found for layout in row["auto"]]
            assert sorted(automatic) == sorted(layouts)


def test_the_cpu(result):
    cpu = result["devices"][0]
    assert (cpu["device"], cpu["capability"]) == ("cpu", None)
    reference = next(row for row in cpu["gemms"] if row["name"] == "reference")
    assert reference["usable"] == ["128x4", "8x4"]
    assert "CPU" in cpu["graph_lifetimes"]


def test_every_setting_is_listed_with_its_meaning(result):
    assert {name: entry["meaning"] for name, entry in result["settings"].items()} == settings.MEANINGS


def test_values_of_settings_are_shown(monkeypatch, tmp_path, capsys):
    values = {
        "SAFEALLOC_VERIFY": "100",
        "SAFEALLOC_VERIFY_REPAIR": "1",
        "SAFEALLOC_STRICT": "1",
    }
    for name in settings.MEANINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["settings"]
    assert {name: entry["value"] for name, entry in found.items() if entry["value"] is not None} == values
    assert {entry["problem"] for entry in found.values()} == {None}
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"SAFEALLOC_VERIFY 100 {settings.MEANINGS['SAFEALLOC_VERIFY']}" in lines
    assert f"SAFEALLOC_POISON not set {settings.MEANINGS['SAFEALLOC_POISON']}" in lines


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SAFEALLOC_VERIFY", "often", "No default pool can be made: SAFEALLOC_VERIFY must be a whole number"),
        ("SAFEALLOC_VERIFY_REPAIR", "yes", "No default pool can be made: SAFEALLOC_VERIFY_REPAIR must be 0 or 1"),
        ("SAFEALLOC_POISON", "2", "No default pool can be made: SAFEALLOC_POISON must be 0 or 1"),
    ],
)
def test_a_setting_with_a_bad_value_is_reported(monkeypatch, tmp_path, capsys, name, value, problem):
    monkeypatch.setenv(name, value)
    path = tmp_path / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["settings"]
    assert found[name]["problem"].startswith(problem)
    assert [other for other, entry in found.items() if entry["problem"] is not None] == [name]
    assert f"\n{problem}" in capsys.readouterr().out


def test_inductor_leaves_buffers_alone_or_there_is_a_reason(result):
    assert result["inductor"] is None or "torch" in result["inductor"]


@pytest.mark.gpu
def test_graph_lifetimes_are_tracked_on_a_gpu(result):
    assert result["devices"][1]["graph_lifetimes"] is None


def test_a_package_whose_import_fails_has_a_reason(tmp_path):
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("print('noise')\nassert False, 'no CUDA toolkit'\n")
    path = tmp_path / "result.json"
    done = run_safealloc("doctor", "--json", str(path), PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert done.returncode == 0, done.stderr
    reason = "importing flashinfer failed: AssertionError: no CUDA toolkit"
    result = json.loads(path.read_text())
    assert result["versions"]["flashinfer"]["reason"] == reason
    gemms = {row["name"]: row for row in result["devices"][0]["gemms"]}
    assert gemms["trtllm"]["refused"] == {"128x4": reason, "8x4": reason}
    assert reason in done.stdout
    assert "noise" not in done.stdout
    assert "\x1b" not in done.stdout


def test_an_unsuitable_inductor_has_a_reason(monkeypatch, tmp_path):
    from safealloc.errors import SafeAllocError

    def refuse(op):
        raise SafeAllocError("this torch cannot")

    monkeypatch.setattr("safealloc.commands.doctor.forbid_reuse", refuse)
    path = tmp_path / "result.json"
    assert main(["doctor", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["inductor"] == "this torch cannot"


# --- vLLM -----------------------------------------------------------------------------------------------------------------


def test_vllm_as_it_is_installed(result):
    found = result["vllm"]
    assert found["version"] or found["reason"]
    assert [hook["name"] for hook in found["hooks"]] in ([], [target.name for target in targets.TARGETS])
    assert (found["version"] is None) == (not found["hooks"])
    assert found["plugin"]["registered"] is None
    if not torch.cuda.is_available():
        assert found["linear"] == [{"device": "cuda", "path": None, "reason": "it needs a CUDA device"}]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a vLLM of some version and sources first on the path."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in (*settings.MEANINGS, "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)

    def install(version=VERSION, sources=None, init="raise RuntimeError('imported')\n"):
        for module, text in (stand_in() if sources is None else sources).items():
            file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if init is not None:
            (tmp_path / "vllm").mkdir(exist_ok=True)
            (tmp_path / "vllm" / "__init__.py").write_text(init)
        if version is not None:
            metadata = tmp_path / f"vllm-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    return install


def shown(found):
    out = Console(file=io.StringIO(), width=10_000, markup=False, highlight=False)
    doctor_vllm.show(found, out)
    return re.sub(" +", " ", out.file.getvalue())


def test_a_vllm_that_every_hook_fits_is_not_imported(install):
    install()
    found = doctor_vllm.look(None)
    assert "vllm" not in sys.modules
    assert (found.version, found.reason, found.note) == (VERSION, None, None)
    assert {hook.status for hook in found.hooks} == {"hooked", "as known", "not yet there"}
    assert found.padding == doctor_vllm.PaddingFinding("zeros", False)
    text = shown(found)
    assert f"\n{targets.SCALES.name} yes\n" in text
    assert f"\n{targets.QUANTIZE.name} - not replaced: hooks rely on what it does\n" in text
    assert f"\n{targets.FUSED_ACT_QUANT.name} - vLLM has it since" in text
    assert "padding without it torch.zeros zeroed at each call\n" in text
    assert [one["name"] for one in found.sites] == [one.name for one in sites.SITES if one.exists(VERSION)]
    assert len(text.splitlines()) < 46


def test_hooks_that_need_flashinfer_have_a_reason(install, monkeypatch):
    install()
    for reason in ("flashinfer is not installed", None):
        monkeypatch.setattr(_optional, "missing", lambda name, reason=reason: reason)
        hooks = {hook.name: hook for hook in doctor_vllm.look(None).hooks}
        assert hooks[targets.MM.name].status == "hooked"
        expected = None if reason is None else f"exists only with FlashInfer: {reason}"
        assert hooks[targets.MM.name].reason == hooks[targets.MM_OP.name].reason == expected
        assert hooks[targets.SCALES.name].reason is None


def test_a_hook_that_does_not_fit_has_a_reason(install):
    sources = stand_in()
    sources[targets.MM.module] = "def flashinfer_scaled_fp4_mm(model): ...\n"
    sources[targets.PROFILE.module] = "def broken(:\n"
    sources[targets.SCALES.module] = sources[targets.SCALES.module].replace("torch.zeros", "torch.empty")
    del sources[targets.LINEAR.module]
    install(sources=sources)
    found = doctor_vllm.look(None)
    hooks = {hook.name: hook for hook in found.hooks}
    assert (hooks[targets.MM.name].status, hooks[targets.MM.name].reason) == (
        "changed",
        "its parameters are (model)",
    )
    assert "SyntaxError" in hooks[targets.PROFILE.name].reason
    assert hooks[targets.LINEAR.name].status == "missing"
    assert found.padding.allocation == "empty"
    text = shown(found)
    assert f"\n{targets.MM.name} no: changed its parameters are (model)\n" in text
    assert f"\n{targets.LINEAR.name} no: missing {targets.LINEAR.module} has no " in text
    assert "torch.empty its sources do not mention any zeroing\n" in text


def test_a_kernel_that_zeroes_padding_is_reported(install):
    sources = stand_in()
    comment = "# The NVFP4 quant kernel explicitly zeroes every padded scale entry.\n"
    sources[targets.SCALES.module] = re.sub("# Must be.*\n", comment, sources[targets.SCALES.module])
    install(sources=sources)
    found = doctor_vllm.look(None)
    assert found.padding.kernel_zeroes
    assert "its quantization kernel zeroes it" in shown(found)


def look_on(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = doctor_vllm.look(None)
    return {one["name"]: (one["taken"], one["zeroes_padding"], one["change"]) for one in found.sites}, shown(found)


@pytest.mark.parametrize(
    ("capability", "dense", "all_reduce", "in_table"),
    [
        (None, "SM10x SM12x", "SM10x", 8),
        ((10, 3), "default", "default", 7),
        ((12, 0), "default", "by option", 7),
        ((9, 0), "never", "never", 0),
    ],
)
def test_what_changes_at_each_site_depends_on_the_gpu(install, monkeypatch, capability, dense, all_reduce, in_table):
    install()
    by_name, text = look_on(monkeypatch, capability)
    change = "nothing: no NVFP4" if capability == (9, 0) else "time: no fill"
    assert by_name["scaled_fp4_quant"] == (dense, "fill", change)
    assert by_name["all-reduce + RMSNorm + FP4"] == (all_reduce, "fill", change)
    _, _, table = text.partition("what safealloc changes here")
    assert ("\nscaled_fp4_quant " in table) == (capability != (9, 0))
    assert "\nMXFP8 quantizers " not in text
    left = f"\n{len(by_name) - in_table} more sites of scales, optional and left alone: see --json.\n"
    assert (left if in_table else "vLLM has no NVFP4 kernels for this GPU: safealloc changes nothing here.\n") in text


def test_a_site_whose_hook_does_not_fit_is_left_alone(install, monkeypatch):
    sources = stand_in()
    sources[targets.SCALES.module] = sources[targets.SCALES.module].replace(
        "def create_fp4_scale_tensor(m", "def other(m"
    )
    install(sources=sources)
    by_name, _ = look_on(monkeypatch, None)
    assert by_name["scaled_fp4_quant"][2] == "nothing: hook unfit"
    assert by_name["NVFP4 expert quantizers"][2] == "safety, memory"


@pytest.mark.parametrize("capability", [None, (10, 0)])
def test_the_table_of_sites_fits_80_columns(install, monkeypatch, capability):
    install()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    out = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    doctor_vllm.show(doctor_vllm.look(None), out)
    text = out.file.getvalue().partition("what safealloc changes here")[2].partition("more sites")[0]
    lines = [line for line in text.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 2 + 2 * 7  # no row has more than two lines
    assert "…" not in text


@pytest.mark.parametrize(
    ("version", "note"),
    [
        ("0.18.1", "older than 0.19.1, the oldest release that was checked"),
        ("9.0.0", f"newer than {targets.SUPPORTED[1]}, the newest release that was checked"),
        (f"{targets.SUPPORTED[1]}+cu130", None),
        ("0.25.1rc1", None),
        ("dev", "its version is not a release number"),
    ],
)
def test_a_version_that_was_not_checked_is_noted(install, version, note):
    install(version)
    found = doctor_vllm.look(None)
    assert found.version == version
    assert found.note == note or found.note.startswith(note)
    if note is not None:
        assert f"vLLM {version}: {note}" in shown(found)


def test_a_vllm_without_metadata_or_package_has_a_reason(install, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", _not_installed)
    install(version=None)
    found = doctor_vllm.look(None)
    assert (found.version, found.hooks) == (None, [])
    assert shown(found) == "vLLM: it is there, but its version cannot be found.\n\n"
    assert doctor_vllm.look("vllm is not installed").reason == "vllm is not installed"


def _not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_an_error_while_reading_sources_is_the_reason(install, monkeypatch):
    install()

    def fail(*arguments):
        raise RuntimeError("no such file")

    monkeypatch.setattr(targets, "check", fail)
    found = doctor_vllm.look(None)
    assert (found.version, found.reason) == (VERSION, "looking at its sources failed: RuntimeError: no such file")
    assert found.reason in shown(found)


def test_sources_of_a_vllm_that_cannot_be_imported_are_read(install, tmp_path):
    install(init="print('noise')\nraise SystemError('no CUDA')\n")
    path = tmp_path / "result.json"
    done = run_safealloc("doctor", "--json", str(path), PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["vllm"]
    assert (found["version"], found["reason"]) == (VERSION, "importing vllm failed: SystemError: no CUDA")
    assert {hook["status"] for hook in found["hooks"]} == {"hooked", "as known", "not yet there"}
    assert f"vLLM {VERSION}: importing vllm failed: SystemError: no CUDA.\n" in done.stdout
    assert "noise" not in done.stdout
    assert "\x1b" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_hook_that_needs_a_setting_has_a_reason(install, monkeypatch):
    install()
    assert f"\n{targets.STEP.name} - registered only with SAFEALLOC_VERIFY, which is not set\n" in shown(
        doctor_vllm.look(None)
    )
    monkeypatch.setenv("SAFEALLOC_VERIFY", "100")
    assert f"\n{targets.STEP.name} yes\n" in shown(doctor_vllm.look(None))


def test_what_keeps_the_plugin_off(install, monkeypatch):
    install()
    monkeypatch.setattr(doctor_vllm, "_entry_point", lambda: None)
    found = doctor_vllm.look(None)
    assert (found.plugin.enabled, found.plugin.allowed, found.plugin.vllm_plugins) == (True, True, None)
    assert "\nloaded by vLLM yes\n" in shown(found)
    monkeypatch.setenv("SAFEALLOC", "0")
    found = doctor_vllm.look(None)
    assert not found.plugin.enabled
    assert "\nloaded by vLLM no SAFEALLOC=0 keeps it off\n" in shown(found)
    monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
    found = doctor_vllm.look(None)
    assert (found.plugin.allowed, found.plugin.vllm_plugins) == (False, "lora,other")
    assert "\nloaded by vLLM no VLLM_PLUGINS=lora,other leaves it out\n" in shown(found)
    monkeypatch.setenv("VLLM_PLUGINS", "other,safealloc")
    assert doctor_vllm.look(None).plugin.allowed


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["safealloc.integrations.vllm.plugin:load"], None),
        ([], "safealloc is on the path, not installed"),
        (["elsewhere:load"], "is another package's: elsewhere:load"),
    ],
)
def test_the_entry_point(install, monkeypatch, values, reason):
    install()
    entries = [SimpleNamespace(value=value) for value in values]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **of: entries)
    found = doctor_vllm.look(None)
    if reason is None:
        assert found.plugin.entry_point is None
        assert "\nloaded by vLLM yes\n" in shown(found)
    else:
        assert reason in found.plugin.entry_point
        assert f"\nloaded by vLLM no {found.plugin.entry_point}\n" in shown(found)


def test_entry_points_that_cannot_be_read_have_a_reason(install, monkeypatch):
    install()

    def fail(**of):
        raise ValueError("no = in line 3")

    monkeypatch.setattr(importlib.metadata, "entry_points", fail)
    reason = "reading entry points failed: ValueError: no = in line 3"
    assert doctor_vllm.look(None).plugin.entry_point == reason


def test_the_entry_point_names_the_plugin():
    group, name, value = doctor_vllm._GROUP, doctor_vllm._NAME, doctor_vllm._ENTRY_POINT
    declared = (ROOT / "pyproject.toml").read_text()
    assert f'[project.entry-points."{group}"]\n{name} = "{value}"\n' in declared
    assert importlib.metadata.EntryPoint(name, value, group).load() is plugin.load


def test_what_is_registered_in_this_process(install, monkeypatch):
    install()
    monkeypatch.setattr(plugin, "registered", lambda: ("one", "two"))
    found = doctor_vllm.look(None)
    assert found.plugin.registered == ("one", "two")
    assert "\nregistered here 2 hooks\n" in shown(found)


def test_the_linear_kernel_on_each_device(install, monkeypatch):
    capabilities = [(10, 0), (10, 3), (9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(_optional, "missing", lambda name: None)
    trtllm = SimpleNamespace(refusal=lambda call: None if call.device.index == 0 else "no such kernel")
    monkeypatch.setattr(kernel, "GEMMS", {"trtllm": trtllm})
    install()
    found = doctor_vllm.look(None)
    assert found.linear == [
        doctor_vllm.LinearFinding("cuda:0", "trtllm", None),
        doctor_vllm.LinearFinding("cuda:1", "triton", "no such kernel"),
        doctor_vllm.LinearFinding("cuda:2", "triton", "no such kernel"),
        doctor_vllm.LinearFinding("cuda:3", None, kernel.refusal(80)),
    ]
    assert "\nlinear kernel on cuda:3 - float8_e4m3 needs compute capability 8.9, this is 8.0\n" in shown(found)
