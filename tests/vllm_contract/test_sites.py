"""The table of vLLM's allocation sites, against the sources of the vLLM that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.vllm_installed import TESTED
from vllm_releases import scan_sites

from safealloc.integrations.vllm import sites


@pytest.fixture(scope="module")
def sources():
    spec = importlib.util.find_spec("vllm")
    return scan_sites.read(Path(spec.submodule_search_locations[0]))


def test_the_table_has_every_place_where_this_vllm_allocates_scales(sources):
    assert scan_sites.missing(sources) == []


def test_every_site_of_this_release_is_in_its_sources(sources):
    found = {place.partition(":")[2] for place in scan_sites.scan(sources)}
    for site in sites.SITES:
        if site.exists(TESTED):
            assert found & set(site.where.split()), site.name
