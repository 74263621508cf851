"""Which hooks fit a vLLM, by its sources: a small stand-in here, and the result of the scan of every release."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
from support.vllm_source import VERSION, stand_in

from safealloc.integrations import drift
from safealloc.integrations.vllm import targets

COMMITTED = Path(__file__).parents[1] / "vllm_releases" / "hooks_by_release.json"


def found_in(sources: dict[str, str], version: str = VERSION) -> dict[targets.Target, drift.Finding]:
    return {found.target: found for found in targets.check(version, sources.get)}


def changed(target: targets.Target, old: str, new: str) -> drift.Finding:
    """The finding for a target after a change of its module."""
    sources = stand_in()
    assert old in sources[target.module]
    sources[target.module] = sources[target.module].replace(old, new)
    return found_in(sources)[target]


def test_every_hook_fits_the_stand_in():
    for target, found in found_in(stand_in()).items():
        if target is targets.FUSED_ACT_QUANT:
            assert found.status == "not yet there"
            assert found.detail == f"vLLM has it since {target.since}"
        else:
            expected = "as known" if target is targets.QUANTIZE else "hooked"
            assert (found.status, found.detail) == (expected, ""), target.name
            assert found.attribute == target.attributes[0]


def test_names_of_targets_are_unique():
    assert len({target.name for target in targets.TARGETS}) == len(targets.TARGETS)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("padded_n=None)", "padded_n=None, align=32)", "(m, n, device, is_sf_swizzled_layout, padded_n, align)"),
        ("is_sf_swizzled_layout, padded_n=None)", "swizzled, padded_n=None)", "(m, n, device, swizzled, padded_n)"),
        ("(m, n, device", "(n, m, device", "(n, m, device, is_sf_swizzled_layout, padded_n)"),
        ("padded_n=None)", "padded_n=None, *rest)", "(m, n, device, is_sf_swizzled_layout, padded_n, *rest)"),
        ("padded_n=None)", "padded_n=None, **rest)", "(m, n, device, is_sf_swizzled_layout, padded_n, **rest)"),
        ("padded_n=None)", "*, padded_n=None)", "(m, n, device, is_sf_swizzled_layout, *, padded_n)"),
    ],
)
def test_a_function_with_an_unknown_signature_is_not_hooked(old, new, expected):
    found = changed(targets.OUTPUTS, old, new)
    assert (found.status, found.attribute) == ("changed", "create_fp4_output_tensors")
    assert found.detail == f"its parameters are {expected}"


def test_the_signature_of_an_older_release_fits():
    assert changed(targets.OUTPUTS, ", padded_n=None", "").status == "hooked"


@pytest.mark.parametrize(("old", "new"), [("// 2", "// 4"), ("return output,", "output.zero_()\n    return output,")])
def test_a_function_with_an_unknown_body_is_not_hooked_where_the_hook_replaces_the_body(old, new):
    found = changed(targets.OUTPUTS, old, new)
    assert found.status == "changed"
    assert re.fullmatch(r"its body is not one that is known \([0-9a-f]{10}\)", found.detail)


@pytest.mark.parametrize("target", [targets.EXPERTS, targets.SILU_EXPERTS], ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("blockscale_offsets, topk)", "blockscale_offsets, n_experts, topk)", "its parameters are (input_tensor, "),
        (" // 4\n", " // 8\n", "its body is not one that is known ("),
        ("torch.empty(\n", "torch.zeros(\n", "its body is not one that is known ("),
        ("expert_offsets, blockscale_offsets\n", "expert_offsets, None\n", "its body is not one that is known ("),
    ],
)
def test_a_changed_expert_quantizer_is_not_hooked(target, old, new, expected):
    found = changed(target, old, new)
    assert (found.status, found.attribute) == ("changed", target.name)
    assert found.detail.startswith(expected)


@pytest.mark.parametrize(
    ("old", "new"), [("A docstring.", "Another."), ("A comment.", "Another."), ("(m, n,", "(\n    m, n,")]
)
def test_docstrings_comments_and_line_breaks_do_not_change_the_digest_of_a_body(old, new):
    assert changed(targets.OUTPUTS, old, new).status == "hooked"


def test_any_body_fits_where_the_hook_calls_the_original():
    assert changed(targets.MM_OP, "import mm_fp4", "import mm_fp4 as mm").status == "hooked"


REPLACED = {
    "scales of another shape": (targets.SCALES, "(rounded_m, rounded_n // 4)", "(rounded_m, rounded_n)"),
    "scales of another dtype": (targets.SCALES, "dtype=torch.int32", "dtype=torch.uint8"),
    "scales in other tiles": (targets.SCALES, "round_up(m, 128)", "round_up(m, 256)"),
    "another rule for the layout that a GEMM reads": (targets.MM, "a.shape[0] <= 32", "a.shape[0] <= 64"),
    "another allocation of MX experts": (targets.MX_EXPERTS, "scales_k = k // 32", "scales_k = k // 16"),
    "another allocation of experts": (targets.EXPERTS, "MAX_TOKENS_PER_EXPERT * topk, padded_k", "topk, padded_k"),
}


@pytest.mark.parametrize("change", list(REPLACED))
def test_a_function_that_is_replaced_whole_is_left_alone_when_its_body_changes(change):
    target, old, new = REPLACED[change]
    found = changed(target, old, new)
    assert found.status == "changed"
    assert found.detail.startswith("its body is not one that is known (")


def test_hooks_are_off_where_a_caller_changes_the_rule_that_they_rely_on():
    sources = stand_in()
    module = targets.QUANTIZE.module
    sources[module] = sources[module].replace("and m <= 32 else", "and m <= 64 else")
    found = found_in(sources)
    assert found[targets.QUANTIZE].status == "changed"
    for target in (targets.SCALES, targets.OUTPUTS):
        assert found[target].status == "changed"
        assert found[target].detail == "it goes with scaled_fp4_quant, which is not as it is known"
    assert found[targets.EXPERTS].status == "hooked"


@pytest.mark.parametrize(("one", "other"), [("SCALES", "OUTPUTS"), ("OUTPUTS", "SCALES")])
def test_scales_and_outputs_are_hooked_together_or_not_at_all(one, other):
    """The hook on outputs goes around the allocation; that one alone would take a padded k for the true one."""
    one, other = getattr(targets, one), getattr(targets, other)
    sources = stand_in()
    body = "torch.zeros((r" if one is targets.SCALES else "physical_n // 2"
    sources[one.module] = sources[one.module].replace(body, body.replace("zeros", "ones").replace("// 2", "// 4"))
    found = found_in(sources)
    assert found[one].detail.startswith("its body is not one that is known")
    assert (found[other].status, found[other].detail) == (
        "changed",
        f"it goes with {one.name}, which is not as it is known",
    )


# --- the live function ------------------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A module with two functions, and a finding that both have to be its own."""
    (tmp_path / "their_module.py").write_text("def rule(): ...\ndef f(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_module", raising=False)
    rule = targets.Target("rule", "their_module", ("rule",), bodies=("0",), group="theirs")
    target = targets.Target("f", "their_module", ("f",), bodies=("0",), group="theirs")
    monkeypatch.setattr(targets, "TARGETS", (rule, target))
    yield importlib.import_module("their_module"), drift.Finding(target, "hooked", "f")
    del sys.modules["their_module"]


def test_a_function_as_in_its_file_is_replaced_by_nobody(imported):
    module, finding = imported
    assert targets.replaced_by(finding, module) is None


@pytest.mark.parametrize("name", ["f", "rule"])
def test_who_replaced_a_function_or_one_of_its_group_is_named(imported, name):
    module, finding = imported

    def theirs(): ...

    for other in (theirs, functools.wraps(getattr(module, name))(lambda: None), functools.partial(theirs)):
        setattr(module, name, other)
        reason = targets.replaced_by(finding, module)
        assert reason is not None
        assert reason.endswith(f" instead of {name}")
        if other is theirs:
            assert reason.startswith(f"{__name__}.test_who_replaced_")


def test_a_wrapper_is_no_obstacle_where_the_hook_calls_the_original(imported):
    module, _ = imported
    module.f = functools.partial(module.f)
    wrapped = targets.Target("f", "their_module", ("f",))
    assert targets.replaced_by(drift.Finding(wrapped, "hooked", "f"), module) is None


def test_a_name_that_is_no_longer_a_function_is_not_hooked():
    found = changed(targets.SCALES, "def create_fp4_scale_tensor(", "create_fp4_scale_tensor = None\ndef other(")
    assert (found.status, found.detail) == ("changed", "it is not a function")
    assert (
        changed(targets.SCALES, "def create_fp4_scale_tensor", "async def create_fp4_scale_tensor").status == "missing"
    )


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_a_target_that_is_gone_is_missing(target):
    sources = stand_in()
    sources[target.module] = "import torch\n"
    found = found_in(sources, targets.SUPPORTED[1])[target]
    assert (found.status, found.attribute) == ("missing", "")
    assert found.detail == f"{target.module} has no {' or '.join(target.attributes)}"
    del sources[target.module]
    assert found_in(sources, targets.SUPPORTED[1])[target] == found


def test_a_target_newer_than_the_release_is_not_missing():
    without = {module: text for module, text in stand_in().items() if module != targets.LINEAR.module}
    assert found_in(without, "0.19.1")[targets.LINEAR].status == "not yet there"
    assert found_in(without, "0.20.0")[targets.LINEAR].status == "missing"
    assert found_in(stand_in(), "0.19.1")[targets.LINEAR].status == "hooked"  # backported


def test_a_method_is_searched_in_its_class_only():
    gone = changed(targets.PROFILE, "class Worker", "class GPUWorker")
    assert gone.detail == f"{targets.PROFILE.module} has no Worker.determine_available_memory"
    assert changed(targets.PROFILE, "def determine_available_memory(self):", "def profile(self):").status == "missing"
    found = changed(targets.WARM_UP, "def compile_or_warm_up_model(self)", "def compile_or_warm_up_model(self, sizes)")
    assert found.detail == "its parameters are (self, sizes)"
    found = changed(targets.STEP, "scheduler_output:", "scheduler_output, wait:")
    assert (found.status, found.detail) == ("changed", "its parameters are (self, scheduler_output, wait)")


def test_a_method_or_nested_function_of_the_same_name_is_not_the_target():
    definition = "def flashinfer_scaled_fp4_mm(a, b, block_scale_a, block_scale_b, alpha, out_dtype, backend): ..."
    for around in ("class Loader:", "def load():"):
        sources = stand_in() | {targets.MM.module: f"{around}\n    {definition}\n"}
        assert found_in(sources)[targets.MM].status == "missing"


@pytest.mark.parametrize(
    "text",
    [
        "if cuda:\n    {}",
        "if rocm:\n    pass\nelif cuda:\n    {}",
        "if rocm:\n    pass\nelse:\n    with warnings():\n        {}",
        "try:\n    {}\nexcept ImportError:\n    pass",
        "try:\n    import fast\nexcept ImportError:\n    {}",
        "try:\n    import fast\nexcept ImportError:\n    pass\nelse:\n    {}",
    ],
)
def test_a_function_below_an_if_or_a_try_is_found(text):
    definition = f"def flashinfer_mm_fp4({', '.join(targets.MM_OP.parameters[0])}): ..."
    sources = stand_in() | {targets.MM.module: text.format(definition)}
    assert found_in(sources)[targets.MM_OP].status == "hooked"


def test_a_class_is_found_by_its_older_name():
    found = changed(targets.ATTENTION_FUSION, "AttnQuantFusionPass", "AttnFusionPass")
    assert (found.status, found.attribute) == ("hooked", "AttnFusionPass")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("def create(:\n", "SyntaxError"), ("x = '\0'\n", "null bytes"), ("\tif x:\n pass", "IndentationError")],
)
def test_a_source_that_does_not_parse_is_reported_as_the_reason(text, expected):
    sources = stand_in() | {targets.SCALES.module: text}
    found = found_in(sources)
    for target in (targets.SCALES, targets.OUTPUTS):
        assert (found[target].status, found[target].attribute) == ("changed", "")
        assert found[target].detail.startswith("the source of vllm._custom_ops cannot be read: ")
        assert expected in found[target].detail
    assert found[targets.MM].status == "hooked"
    assert targets.own_allocation(sources.get) is None
    assert targets.kernel_zeroes_padding(sources.get) is None


def test_a_source_that_cannot_be_read_is_reported_as_the_reason():
    def source(module):
        if module == targets.MM.module:
            raise PermissionError(13, "Permission denied")
        if module == targets.PASSES.module:
            return b"\xff".decode()
        return stand_in().get(module)

    found = {finding.target: finding for finding in targets.check(VERSION, source)}
    assert "Permission denied" in found[targets.MM].detail
    assert "UnicodeDecodeError" in found[targets.PASSES].detail
    assert found[targets.SCALES].status == "hooked"


# --- who zeroes padding -----------------------------------------------------------------------------------------------


def test_whether_vllm_allocates_scales_with_zeros_or_empty():
    sources = stand_in()
    assert targets.own_allocation(sources.get) == "zeros"
    sources[targets.SCALES.module] = sources[targets.SCALES.module].replace("torch.zeros", "torch.empty")
    assert targets.own_allocation(sources.get) == "empty"
    assert targets.own_allocation({targets.SCALES.module: "import torch\n"}.get) is None
    assert targets.own_allocation({}.get) is None


def test_whether_the_kernel_zeroes_padding_is_read_from_a_comment():
    sources = stand_in()
    assert targets.kernel_zeroes_padding(sources.get) is False
    comment = "# The NVFP4 quant kernel explicitly zeroes every padded\n        # scale entry."
    sources[targets.SCALES.module] = re.sub("# Must be.*", comment, sources[targets.SCALES.module])
    assert targets.kernel_zeroes_padding(sources.get) is True
    assert targets.kernel_zeroes_padding({}.get) is None


# --- versions and digests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("0.25.1", (0, 25, 1)),
        ("0.25.1rc1", (0, 25, 1)),
        ("0.33.0+cu130", (0, 33, 0)),
        ("0.33.1.dev12+g0123456.precompiled", (0, 33, 1)),
        ("0.9.0.1", (0, 9, 0)),
        ("dev", ()),
    ],
)
def test_release_numbers_of_a_version(version, numbers):
    assert drift.release(version) == numbers


def test_versions_are_ordered_by_number():
    assert drift.release("0.9.2") < drift.release("0.19.1") < drift.release("0.33.0+cu130")


BODY = """
    def f(x, name):
        'docstring'
        y = f"{name!r} of {x:>{4}} " "and" f" {x}" if x else None
        return [*x, {**y, 'a': 1.5}, ..., b'c', 2j, (lambda a, /, *, b=None: a)(1)] if y is not None else f"{x=}"
"""


def test_a_digest_is_the_same_in_every_python_version():
    # From 3.12 on, ast.unparse quotes the strings inside f-strings differently.
    assert drift.digest(ast.parse(textwrap.dedent(BODY)).body[0]) == "0371578fb9"
    assert sys.version_info[:2] in ((3, 11), (3, 12), (3, 13))


@pytest.mark.parametrize(
    ("old", "new"),
    [("1.5", "1"), ("None:", "False:"), ("{**y", "{y: y"), ("!r", "!s"), (">{4}", "<{4}"), ("b'c'", "'c'")],
)
def test_different_bodies_have_different_digests(old, new):
    assert old in BODY
    first, second = (drift.digest(ast.parse(textwrap.dedent(text)).body[0]) for text in (BODY, BODY.replace(old, new)))
    assert first != second


# --- the committed scan of every release ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads(COMMITTED.read_text())


def test_the_committed_scan_was_made_with_this_table(committed):
    """If this fails, run tests/vllm_releases/check_releases.py again."""
    assert committed["supported"] == list(targets.SUPPORTED)
    assert list(committed["targets"]) == [target.name for target in targets.TARGETS]
    for target in targets.TARGETS:
        assert committed["targets"][target.name] == {
            "module": target.module,
            "attributes": list(target.attributes),
            "parameters": [", ".join(names) for names in target.parameters],
            "since": target.since,
            "bodies": sorted(target.bodies),
            "group": target.group,
        }
    for release in committed["releases"].values():
        assert list(release["hooks"]) == list(committed["targets"])


def test_every_hook_fits_every_supported_release(committed):
    releases = committed["releases"]
    oldest, newest = map(drift.release, targets.SUPPORTED)
    assert {*targets.SUPPORTED} <= set(releases)
    supported = [version for version in releases if oldest <= drift.release(version) <= newest]
    assert len(supported) >= 20
    for version in supported:
        assert set(releases[version]["hooks"].values()) <= {"hooked", "as known", "not yet there"}, version
        assert releases[version]["new_sites"] == [], version
        assert releases[version]["torch"], version
        assert releases[version]["allocation"] in ("zeros", "empty"), version


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_since_is_the_first_release_that_has_the_target(committed, target):
    known = ("hooked", "as known")
    with_it = [version for version, found in committed["releases"].items() if found["hooks"][target.name] in known]
    assert min(with_it, key=drift.release) == target.since


def test_the_committed_scan_contains_no_url_or_path(committed):
    text = COMMITTED.read_text()
    assert "://" not in text
    assert not re.search(r"(^|[\" ])/\w|\.(org|com|io|net)\b", text)
