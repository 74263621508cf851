"""Which hooks fit which vLLM release, and whether the table of allocation sites is complete, by the sources in its wheel.

Nothing is imported or installed. Where something does not fit, the result says what would change: which functions stay
vLLM's own, and which sites are not in the table.

python tests/vllm_releases/check_releases.py [RELEASE ...] [--wheels DIR] [--json FILE] [--markdown]

pip finds the wheels. Only source files are read, by HTTP range requests; wheels in ``--wheels DIR`` are not unpacked either.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import scan_sites
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from safealloc.integrations import drift
from safealloc.integrations.vllm import targets

RESULT = Path(__file__).with_name("hooks_by_release.json")
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(5, 45)), "manylinux2014_x86_64", "manylinux1_x86_64"]
"""pip takes no tag that is not listed: 0.21.0 is for manylinux_2_24, which no other release is for."""

_PYTHONS = ("3.12", "3.11", "3.13")
_AT_ONCE = 4
_TRIES = 4
_CHUNK = 1 << 20


class UnavailableError(Exception):
    """A release cannot be read, and why."""


@dataclass(frozen=True, slots=True)
class Release:
    """The result for one release.

    Attributes:
        version: of vLLM.
        wheel: its file name.
        torch: the version that it requires.
        allocation: what its ``create_fp4_scale_tensor`` allocates with, "zeros" or "empty".
        kernel_zeroes_padding: whether that function says that the quantization kernel zeroes padding.
        findings: one per target.
        new_sites: places that allocate scales and are not in the table of sites.
        unavailable: why the release could not be read, or "".
    """

    version: str
    wheel: str = ""
    torch: str | None = None
    allocation: str | None = None
    kernel_zeroes_padding: bool | None = None
    findings: Sequence[drift.Finding] = ()
    new_sites: Sequence[str] = ()
    unavailable: str = field(default="", kw_only=True)

    def as_dict(self) -> dict[str, Any]:
        if self.unavailable:
            return {"unavailable": self.unavailable}
        return {
            "wheel": self.wheel,
            "torch": self.torch,
            "allocation": self.allocation,
            "kernel_zeroes_padding": self.kernel_zeroes_padding,
            "hooks": {found.target.name: found.status for found in self.findings},
            "why_not": {found.target.name: found.detail for found in self.findings if found.detail},
            "new_sites": list(self.new_sites),
        }

    @property
    def unfit(self) -> bool:
        """Whether a hook that should fit does not, a site is not in the table, or that is unknown."""
        changed = any(found.status in ("changed", "missing") for found in self.findings)
        return changed or bool(self.unavailable or self.new_sites)


class _Remote(io.RawIOBase):
    """A file on an HTTP server, read in pieces."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._at = url, 0
        with _opened(urllib.request.Request(url, method="HEAD")) as answer:
            self._size = int(answer.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        span = {"Range": f"bytes={self._at}-{self._at + wanted - 1}"}
        with _opened(urllib.request.Request(self._url, headers=span)) as answer:
            if answer.status != 206:
                raise UnavailableError("the package index does not serve parts of a file")
            read: bytes = answer.read()
        buffer[: len(read)] = read
        self._at += len(read)
        return len(read)


def _opened(request: urllib.request.Request) -> Any:
    """The response; temporary errors are retried."""
    for wait in range(_TRIES):
        try:
            return urllib.request.urlopen(request, timeout=60, context=_tls())
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise UnavailableError(f"the package index answers {error.code}") from None
            last = f"the package index answers {error.code}"
        except OSError as error:
            last = f"the package index cannot be reached: {type(error).__name__}"
        time.sleep(2**wait)
    raise UnavailableError(last)


@functools.cache
def _tls() -> ssl.SSLContext:
    """With the certificates that pip is configured to use."""
    known = ssl.create_default_context()
    certificates = _pip("config", "get", "global.cert").stdout.strip()
    if certificates and Path(certificates).is_file():
        known.load_verify_locations(certificates)
    return known


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def published() -> list[str]:
    """The releases from the oldest supported one on, oldest first, without prereleases."""
    done = _pip("index", "versions", "vllm", "--python-version", _PYTHONS[0], "--only-binary=:all:", *_platforms())
    listed = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if listed is None:
        raise SystemExit("pip lists no releases of vLLM: name them as arguments")
    oldest = drift.release(targets.SUPPORTED[0])
    found = {version.strip() for version in listed[1].split(",")}
    return sorted((version for version in found if drift.release(version) >= oldest), key=drift.release)


def _platforms() -> Iterator[str]:
    for platform in PLATFORMS:
        yield from ("--platform", platform)


def _located(version: str) -> str:
    """The address of a release's wheel."""
    why = ""
    for python in _PYTHONS:
        done = _pip(
            *("install", "--dry-run", "--quiet", "--report", "-", "--no-deps", "--ignore-installed"),
            *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
            *("--target", "there-is-no-such-directory", *_platforms(), f"vllm=={version}"),
        )
        if done.returncode == 0:
            return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])
        why = why or f"pip finds no wheel for Linux on x86-64 and Python {', '.join(_PYTHONS)}"
    raise UnavailableError(why)


def from_index(version: str) -> Release:
    """Read a release where pip finds it."""
    try:
        address = urllib.parse.urlsplit(url := _located(version))
        name = urllib.parse.unquote(address.path.rpartition("/")[2])
        if address.scheme == "file":
            return looked_at(name, Path(urllib.request.url2pathname(address.path)).open("rb"))
        return looked_at(name, io.BufferedReader(_Remote(url), _CHUNK))
    except (UnavailableError, zipfile.BadZipFile) as error:
        return Release(version, unavailable=str(error))


def from_file(path: Path) -> Release:
    """Read a wheel on this machine."""
    try:
        return looked_at(path.name, path.open("rb"))
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Release(path.name.split("-")[1], unavailable=f"{path.name}: {type(error).__name__}: {reason}")


def looked_at(name: str, file: BinaryIO | io.BufferedReader) -> Release:
    """Check a wheel's sources.

    Args:
        name: the wheel's file name.
        file: the wheel, which is closed afterwards.
    """
    with file, zipfile.ZipFile(file) as wheel:
        members = set(wheel.namelist())

        @functools.cache
        def source(module: str) -> str | None:
            path = module.replace(".", "/")
            found = next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in members), None)
            return None if found is None else wheel.read(found).decode()

        version = name.split("-")[1]
        metadata = wheel.read(f"vllm-{version}.dist-info/METADATA").decode()
        files = [name for name in members if name.startswith("vllm/") and name.endswith(".py")]
        sources = {name.removeprefix("vllm/"): wheel.read(name).decode() for name in sorted(files)}
        torch = re.search(r"^Requires-Dist: torch ?\(?==([\w.+]+)", metadata, re.MULTILINE)
        return Release(
            version,
            name,
            None if torch is None else torch[1],
            targets.own_allocation(source),
            targets.kernel_zeroes_padding(source),
            targets.check(version, source),
            scan_sites.missing(sources),
        )


def scan(what: Sequence[Any], look: Callable[[Any], Release]) -> list[Release]:
    """Read several releases at once, with a progress bar if standard error is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    out = Console(stderr=True)
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task("vLLM releases", total=len(what))

        def looked(one: Any) -> Release:
            found = look(one)
            progress.update(task, advance=1, description=f"vLLM {found.version}")
            return found

        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return sorted(threads.map(looked, what), key=lambda found: drift.release(found.version))


def as_json(found: Sequence[Release]) -> dict[str, Any]:
    """The result as it is committed."""
    return {
        "command": "tests/vllm_releases/check_releases.py",
        "supported": list(targets.SUPPORTED),
        "targets": {target.name: _as_dict(target) for target in targets.TARGETS},
        "releases": {release.version: release.as_dict() for release in found},
    }


def _as_dict(target: targets.Target) -> dict[str, Any]:
    """What decides whether a target fits, so that the result shows which table it was made with."""
    return {
        "module": target.module,
        "attributes": list(target.attributes),
        "parameters": [", ".join(names) for names in target.parameters],
        "since": target.since,
        "bodies": sorted(target.bodies),
        "group": target.group,
    }


def markdown(found: Sequence[Release]) -> str:
    """A table for the README; consecutive releases with the same result share a line."""
    lines = ["| vLLM | torch | its own scale allocation | hooks that fit | left to vLLM |", "|---|---|---|---|---|"]
    for cells, same in groupby(found, _cells):
        versions = [release.version for release in same]
        named = versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
        lines.append(f"| {' | '.join((named, *cells))} |")
    return "\n".join(lines)


def _cells(release: Release) -> tuple[str, ...]:
    if release.unavailable:
        return ("?", "?", "?", release.unavailable)
    kernel = "; its quantization kernel zeroes padding" if release.kernel_zeroes_padding else ""
    hooked = [found for found in release.findings if found.status == "hooked"]
    left = [
        f"{found.target.name}{', not yet there' if found.status == 'not yet there' else f': {found.status}, {found.detail}'}"
        for found in release.findings
        if found.status not in ("hooked", "as known")
    ]
    left += [f"a site that is not in the table: {name}" for name in release.new_sites]
    existing = [found for found in release.findings if found.status not in ("not yet there", "as known")]
    return (
        release.torch or "?",
        f"`torch.{release.allocation}`{kernel}",
        f"{len(hooked)} of {len(existing)}",
        "; ".join(left).replace("|", "\\|") or "nothing",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Scan, write, print; returns 1 if a hook does not fit or a release cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "releases", nargs="*", metavar="RELEASE", help="(all that pip lists from the oldest supported one)"
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="read the wheels of vLLM in this folder instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write the result there; committed is {RESULT.name}")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    given = parser.parse_args(arguments)
    if given.wheels is None:
        found = scan(given.releases or published(), from_index)
    else:
        wheels = [wheel for wheel in sorted(given.wheels.glob("vllm-*.whl")) if _asked_for(wheel, given.releases)]
        if not wheels:
            parser.error(f"--wheels {given.wheels}: no matching wheel of vLLM")
        found = scan(wheels, from_file)
    if given.json is not None:
        given.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    if given.markdown:
        print(markdown(found))
    else:
        for release in found:
            print(release.version, *_cells(release), sep="  ")
    return int(any(release.unfit for release in found))


def _asked_for(wheel: Path, releases: Sequence[str]) -> bool:
    return not releases or wheel.name.split("-")[1] in releases


if __name__ == "__main__":
    sys.exit(main())
