"""The committed check of SGLang's releases, and its table in the docs."""

from __future__ import annotations

import json

import pytest
from sglang_releases.check_releases import COMMITTED, table
from support.command_line import ROOT

from safealloc.integrations import drift
from safealloc.integrations.sglang import hooks, sites, targets

RESULT = json.loads(COMMITTED.read_text())


def test_every_hook_fits_every_supported_release():
    releases = RESULT["releases"]
    assert RESULT["supported"] == list(targets.SUPPORTED)
    assert {*targets.SUPPORTED} <= set(releases)
    assert len(releases) >= 5
    for version, found in releases.items():
        assert list(found) == [target.name for target in targets.TARGETS]
        assert set(found.values()) <= {"hooked", "not yet there"}, version


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_since_is_the_first_release_that_has_the_target(target):
    with_it = [version for version, found in RESULT["releases"].items() if found[target.name] == "hooked"]
    assert min(with_it, key=drift.release) == target.since


def test_the_docs_show_the_table():
    assert table(RESULT) in (ROOT / "docs" / "sglang.md").read_text()


def test_every_target_has_a_hook_and_every_quantizer_a_site():
    assert {*hooks.HOOKS} == {*targets.TARGETS} - {targets.LOAD}
    assert {site.hook for site in sites.SITES} == {*targets.QUANTIZERS, None}


def test_a_changed_body_is_left_alone():
    source = {targets.DENSE.module: "def _flashinfer_fp4_quantize_impl(input):\n    return input\n"}.get
    found = {one.target: one for one in targets.check("0.5.23", source)}
    assert found[targets.DENSE].status == "changed"
    assert found[targets.MXFP8].status == "missing"
