"""Which hooks fit a vLLM, by its sources: small stand-ins here, and what the scan of every release found."""

from __future__ import annotations

import ast
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest

from safealloc.integrations.vllm import targets

HERE = Path(__file__).parent
COMMITTED = HERE / "vllm_releases" / "hooks_by_release.json"

VERSION = "0.28.0"
"""Of the stand-in: a release from before ``fused_act_quant``, whose whole body would have to stand here."""

SCALES = """
    def create_fp4_scale_tensor(m: int, n: int, device: torch.device, is_sf_swizzled_layout: bool) -> torch.Tensor:
        if is_sf_swizzled_layout:
            # Must be zero-initialized: the kernel does not write every padded element.
            return torch.zeros((128, 4), device=device, dtype=torch.int32)
        return torch.empty((m, n // 16), device=device, dtype=torch.uint8)
"""
OUTPUTS = """
    def create_fp4_output_tensors(m, n, device, is_sf_swizzled_layout, padded_n=None):
        '''A docstring.'''
        physical_n = padded_n if padded_n is not None else n
        output = torch.empty((m, physical_n // 2), device=device, dtype=torch.uint8)
        # A comment.
        output_scale = create_fp4_scale_tensor(m, physical_n, device, is_sf_swizzled_layout)
        return output, output_scale
"""
EXPERTS = """
    def scaled_fp4_experts_quant(input_tensor, input_global_scale, expert_offsets, blockscale_offsets, topk):
        assert not current_platform.is_rocm()
        assert input_tensor.ndim == 2, f"input.ndim needs to be == 2, but got {input_tensor.ndim}."
        MAX_TOKENS_PER_EXPERT = envs.VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE
        m_numtopk, k = input_tensor.shape
        assert m_numtopk <= MAX_TOKENS_PER_EXPERT * topk, (
            f"m_numtopk must be less than MAX_TOKENS_PER_EXPERT("
            f"{MAX_TOKENS_PER_EXPERT})"
            f" for cutlass_moe_fp4, observed m_numtopk = {m_numtopk}. Use"
            f" VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE to set this value."
        )
        scales_k = k // 16
        padded_k = (scales_k + (4 - 1)) // 4
        output = torch.empty(m_numtopk, k // 2, device=input_tensor.device, dtype=torch.uint8)
        output_scales = torch.empty(
            MAX_TOKENS_PER_EXPERT * topk, padded_k, dtype=torch.int32, device=input_tensor.device
        )
        torch.ops._C.scaled_fp4_experts_quant(
            output, output_scales, input_tensor, input_global_scale, expert_offsets, blockscale_offsets
        )
        output_scales = output_scales.view(torch.float8_e4m3fn)
        return output, output_scales
"""
SILU_EXPERTS = EXPERTS.replace("scaled_fp4", "silu_and_mul_scaled_fp4").replace(
    "m_numtopk, k = input_tensor.shape",
    """m_numtopk, k_times_2 = input_tensor.shape
        assert k_times_2 % 2 == 0, "input width must be even (gate || up layout)"
        k = k_times_2 // 2""",
)
FLASHINFER = """
    if has_flashinfer():
        @torch.library.custom_op("vllm::flashinfer_mm_fp4", mutates_args=[], device_types="cuda")
        def flashinfer_mm_fp4(A, B, A_scale, B_scale, g_scale, dtype, use_8x4_sf_layout, backend):
            from flashinfer import mm_fp4

    def flashinfer_quant_nvfp4_8x4_sf_layout(a, a_global_sf):
        return flashinfer_nvfp4_quantize(a, a_global_sf)

    def flashinfer_scaled_fp4_mm(a, b, block_scale_a, block_scale_b, alpha, out_dtype, backend):
        return flashinfer_mm_fp4(a, b.t())
"""
WORKER = """
    class Other:
        def determine_available_memory(self, much): ...

    class Worker(Base):
        @torch.inference_mode()
        def determine_available_memory(self): ...

        def compile_or_warm_up_model(self): ...

        @torch.inference_mode()
        def execute_model(self, scheduler_output: "SchedulerOutput") -> "ModelRunnerOutput | None": ...
"""


def stand_in() -> dict[str, str]:
    """The sources of a small vLLM that every hook fits, by module."""
    sources = {
        targets.SCALES.module: "".join(map(textwrap.dedent, (SCALES, OUTPUTS, EXPERTS, SILU_EXPERTS))),
        targets.MM.module: textwrap.dedent(FLASHINFER),
        targets.ATTENTION_FUSION.module: "class AttnQuantFusionPass(VllmPatternMatcherPass): ...\n",
        targets.MLA_FUSION.module: "class MLAAttnQuantFusionPass(VllmPatternMatcherPass): ...\n",
        targets.PROFILE.module: textwrap.dedent(WORKER),
        targets.LOAD.module: "def process_weights_after_loading(model, model_config, target_device): ...\n",
        targets.CACHE_KEY.module: "environment_variables: dict[str, Callable] = {}\n",
        targets.LINEAR.module: "_POSSIBLE_NVFP4_KERNELS = {}\n",
    }
    assert {target.module for target in targets.TARGETS} - set(sources) == {targets.FUSED_ACT_QUANT.module}
    return sources


def found_in(sources: dict[str, str], version: str = VERSION) -> dict[targets.Target, targets.Finding]:
    return {found.target: found for found in targets.check(version, sources.get)}


def changed(target: targets.Target, old: str, new: str) -> targets.Finding:
    """What is found of a target after a change of its module."""
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
            assert (found.status, found.detail) == ("hooked", ""), target.name
            assert found.attribute == target.attributes[0]


def test_names_of_targets_are_unique():
    assert len({target.name for target in targets.TARGETS}) == len(targets.TARGETS)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("padded_n=None)", "padded_n=None, align=32)", "(m, n, device, is_sf_swizzled_layout, padded_n, align)"),
        ("is_sf_swizzled_layout, padded_n=None)", "swizzled, padded_n=None)", "(m, n, device, swizzled, padded_n)"),
        ("(m, n, device", "(n, m, device", "(n, m, device, is_sf_swizzled_layout, padded_n)"),
        ("padded_n=None)", "padded_n=None, *rest)", "(m, n, device, is_sf_swizzled_layout, padded_n, *rest)"),
        ("padded_n=None)", "padded_n=None, **rest)", "(m, n, device, is_sf_swizzled_layout, padded_n, **rest)"),
        ("padded_n=None)", "*, padded_n=None)", "(m, n, device, is_sf_swizzled_layout, *, padded_n)"),
    ],
)
def test_another_signature_is_left_alone(old, new, says):
    found = changed(targets.OUTPUTS, old, new)
    assert (found.status, found.attribute) == ("changed", "create_fp4_output_tensors")
    assert found.detail == f"its parameters are {says}"


def test_a_signature_of_an_older_release_fits_too():
    assert changed(targets.OUTPUTS, ", padded_n=None", "").status == "hooked"


@pytest.mark.parametrize(("old", "new"), [("// 2", "// 4"), ("return output,", "output.zero_()\n    return output,")])
def test_another_body_is_left_alone_where_the_hook_writes_it_anew(old, new):
    found = changed(targets.OUTPUTS, old, new)
    assert found.status == "changed"
    assert re.fullmatch(r"its body is not one that is known \([0-9a-f]{10}\)", found.detail)


@pytest.mark.parametrize("target", [targets.EXPERTS, targets.SILU_EXPERTS], ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("blockscale_offsets, topk)", "blockscale_offsets, n_experts, topk)", "its parameters are (input_tensor, "),
        (" // 4\n", " // 8\n", "its body is not one that is known ("),
        ("torch.empty(\n", "torch.zeros(\n", "its body is not one that is known ("),
        ("expert_offsets, blockscale_offsets\n", "expert_offsets, None\n", "its body is not one that is known ("),
    ],
)
def test_another_expert_quantizer_is_left_alone(target, old, new, says):
    found = changed(target, old, new)
    assert (found.status, found.attribute) == ("changed", target.name)
    assert found.detail.startswith(says)


@pytest.mark.parametrize(
    ("old", "new"), [("A docstring.", "Another."), ("A comment.", "Another."), ("(m, n,", "(\n    m, n,")]
)
def test_docstrings_comments_and_line_breaks_are_no_change(old, new):
    assert changed(targets.OUTPUTS, old, new).status == "hooked"


def test_another_body_fits_where_the_hook_calls_the_original():
    assert changed(targets.SCALES, "(128, 4)", "(m, n)").status == "hooked"


def test_a_name_that_is_no_function_any_more_is_left_alone():
    found = changed(targets.SCALES, "def create_fp4_scale_tensor(", "create_fp4_scale_tensor = None\ndef other(")
    assert (found.status, found.detail) == ("changed", "it is no function")
    assert (
        changed(targets.SCALES, "def create_fp4_scale_tensor", "async def create_fp4_scale_tensor").status == "missing"
    )


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_what_is_gone_is_missing(target):
    sources = stand_in()
    sources[target.module] = "import torch\n"
    found = found_in(sources, targets.SUPPORTED[1])[target]
    assert (found.status, found.attribute) == ("missing", "")
    assert found.detail == f"{target.module} has no {' or '.join(target.attributes)}"
    del sources[target.module]
    assert found_in(sources, targets.SUPPORTED[1])[target] == found


def test_what_a_release_does_not_have_yet_is_not_missing():
    without = {module: text for module, text in stand_in().items() if module != targets.LINEAR.module}
    assert found_in(without, "0.19.1")[targets.LINEAR].status == "not yet there"
    assert found_in(without, "0.20.0")[targets.LINEAR].status == "missing"
    assert found_in(stand_in(), "0.19.1")[targets.LINEAR].status == "hooked"  # backported


def test_a_method_is_looked_for_in_its_class_only():
    gone = changed(targets.PROFILE, "class Worker", "class GPUWorker")
    assert gone.detail == f"{targets.PROFILE.module} has no Worker.determine_available_memory"
    assert changed(targets.PROFILE, "def determine_available_memory(self):", "def profile(self):").status == "missing"
    found = changed(targets.WARM_UP, "def compile_or_warm_up_model(self)", "def compile_or_warm_up_model(self, sizes)")
    assert found.detail == "its parameters are (self, sizes)"
    found = changed(targets.STEP, "scheduler_output:", "scheduler_output, wait:")
    assert (found.status, found.detail) == ("changed", "its parameters are (self, scheduler_output, wait)")


def test_a_function_is_not_taken_for_a_method_or_a_local_of_that_name():
    definition = "def process_weights_after_loading(model, model_config, target_device): ..."
    for around in ("class Loader:", "def load():"):
        sources = stand_in() | {targets.LOAD.module: f"{around}\n    {definition}\n"}
        assert found_in(sources)[targets.LOAD].status == "missing"


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
def test_a_function_below_an_if_or_a_try(text):
    definition = "def process_weights_after_loading(model, model_config, target_device): ..."
    sources = stand_in() | {targets.LOAD.module: text.format(definition)}
    assert found_in(sources)[targets.LOAD].status == "hooked"


def test_the_older_name_of_a_class():
    found = changed(targets.ATTENTION_FUSION, "AttnQuantFusionPass", "AttnFusionPass")
    assert (found.status, found.attribute) == ("hooked", "AttnFusionPass")


@pytest.mark.parametrize(
    ("text", "says"),
    [("def create(:\n", "SyntaxError"), ("x = '\0'\n", "null bytes"), ("\tif x:\n pass", "IndentationError")],
)
def test_a_source_that_is_no_python_is_a_reason(text, says):
    sources = stand_in() | {targets.SCALES.module: text}
    found = found_in(sources)
    for target in (targets.SCALES, targets.OUTPUTS):
        assert (found[target].status, found[target].attribute) == ("changed", "")
        assert found[target].detail.startswith("the source of vllm._custom_ops cannot be read: ")
        assert says in found[target].detail
    assert found[targets.MM].status == "hooked"
    assert targets.own_allocation(sources.get) is None
    assert targets.kernel_zeroes_padding(sources.get) is None


def test_a_source_that_cannot_be_read_is_a_reason():
    def source(module):
        if module == targets.MM.module:
            raise PermissionError(13, "Permission denied")
        if module == targets.LOAD.module:
            return b"\xff".decode()
        return stand_in().get(module)

    found = {finding.target: finding for finding in targets.check(VERSION, source)}
    assert "Permission denied" in found[targets.MM].detail
    assert "UnicodeDecodeError" in found[targets.LOAD].detail
    assert found[targets.SCALES].status == "hooked"


# --- who zeroes padding ---------------------------------------------------------------------------------------------------


def test_own_allocation():
    sources = stand_in()
    assert targets.own_allocation(sources.get) == "zeros"
    sources[targets.SCALES.module] = sources[targets.SCALES.module].replace("torch.zeros", "torch.empty")
    assert targets.own_allocation(sources.get) == "empty"
    assert targets.own_allocation({targets.SCALES.module: "import torch\n"}.get) is None
    assert targets.own_allocation({}.get) is None


def test_whether_the_kernel_zeroes_padding_is_said_by_a_comment():
    sources = stand_in()
    assert targets.kernel_zeroes_padding(sources.get) is False
    comment = "# The NVFP4 quant kernel explicitly zeroes every padded\n        # scale entry."
    sources[targets.SCALES.module] = re.sub("# Must be.*", comment, sources[targets.SCALES.module])
    assert targets.kernel_zeroes_padding(sources.get) is True
    assert targets.kernel_zeroes_padding({}.get) is None


# --- versions and digests -------------------------------------------------------------------------------------------------


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
def test_the_numbers_of_a_version(version, numbers):
    assert targets.release(version) == numbers


def test_versions_are_ordered_by_number():
    assert targets.release("0.9.2") < targets.release("0.19.1") < targets.release("0.33.0+cu130")


BODY = """
    def f(x, name):
        'docstring'
        y = f"{name!r} of {x:>{4}} " "and" f" {x}" if x else None
        return [*x, {**y, 'a': 1.5}, ..., b'c', 2j, (lambda a, /, *, b=None: a)(1)] if y is not None else f"{x=}"
"""


def test_a_digest_is_the_same_under_every_python():
    # ast.unparse quotes the strings inside f-strings otherwise from 3.12 on.
    assert targets.digest(ast.parse(textwrap.dedent(BODY)).body[0]) == "0371578fb9"
    assert sys.version_info[:2] in ((3, 11), (3, 12), (3, 13))


@pytest.mark.parametrize(
    ("old", "new"),
    [("1.5", "1"), ("None:", "False:"), ("{**y", "{y: y"), ("!r", "!s"), (">{4}", "<{4}"), ("b'c'", "'c'")],
)
def test_a_digest_tells_bodies_apart(old, new):
    assert old in BODY
    first, second = (
        targets.digest(ast.parse(textwrap.dedent(text)).body[0]) for text in (BODY, BODY.replace(old, new))
    )
    assert first != second


# --- what the scan of every release found ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads(COMMITTED.read_text())


def test_the_committed_scan_is_of_this_table(committed):
    """If not, tests/vllm_releases/check_releases.py has to run again."""
    assert committed["supported"] == list(targets.SUPPORTED)
    assert list(committed["targets"]) == [target.name for target in targets.TARGETS]
    for target in targets.TARGETS:
        assert committed["targets"][target.name] == {
            "module": target.module,
            "attributes": list(target.attributes),
            "parameters": [", ".join(names) for names in target.parameters],
            "since": target.since,
            "bodies": sorted(target.bodies),
        }
    for release in committed["releases"].values():
        assert list(release["hooks"]) == list(committed["targets"])


def test_every_hook_fits_every_supported_release(committed):
    releases = committed["releases"]
    oldest, newest = map(targets.release, targets.SUPPORTED)
    assert {*targets.SUPPORTED} <= set(releases)
    supported = [version for version in releases if oldest <= targets.release(version) <= newest]
    assert len(supported) >= 20
    for version in supported:
        assert set(releases[version]["hooks"].values()) <= {"hooked", "not yet there"}, version
        assert releases[version]["torch"], version
        assert releases[version]["allocation"] in ("zeros", "empty"), version


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_since_is_the_first_release_that_has_it(committed, target):
    with_it = [version for version, found in committed["releases"].items() if found["hooks"][target.name] == "hooked"]
    assert min(with_it, key=targets.release) == target.since


def test_the_committed_scan_names_no_address(committed):
    text = COMMITTED.read_text()
    assert "://" not in text
    assert not re.search(r"(^|[\" ])/\w|\.(org|com|io|net)\b", text)
