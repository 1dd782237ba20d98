"""The page's files: who gets what, how long it is kept, and what a browser may do with it."""

import hashlib
import json
import re
import tomllib
from collections.abc import Generator, Iterator
from pathlib import Path

import httpx
import pytest

import exo.api.page
from exo.api.page.routes import Page
from exo.config import Access, ApiKey
from tests import ROOT
from tests.conftest import fake_card
from tests.support.api_server import serve

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
SVG = "http://www.w3.org/2000/svg"
"""A name, which is not asked for."""
STATIC = Path(exo.api.page.__file__).parent / "static"


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    """A server with a key, which the client does not have."""
    access = Access(keys=(ApiKey("alice", "secret"),))
    card = fake_card("fake/secret-model")
    with (
        serve(tmp_path_factory.mktemp("server"), card, access=access) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def files(http: httpx.Client) -> Iterator[httpx.Response]:
    """The page, and every file that it names, directly or by an import."""
    seen, paths = set[str](), ["/"]
    while paths:
        path = paths.pop()
        if path in seen:
            continue
        seen.add(path)
        reply = http.get(path, headers=BROWSER)
        yield reply
        folder = path.rpartition("/")[0]
        text = reply.text if "/vendor/" not in path else ""
        names = re.findall(r'(?:src|href)="(docs|page/[^"]+)"', text) + re.findall(r'from "\./([^"]+)"', text)
        paths += [f"{folder}/{name}" for name in names]


def test_programs_get_a_line_of_text_and_browsers_the_page(http: httpx.Client) -> None:
    for headers in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
        reply = http.get("/", headers=headers)
        assert (reply.status_code, reply.text) == (200, "exo is running; /docs tells what it offers\n")
        assert reply.headers["content-type"].startswith("text/plain")
        assert reply.headers["vary"] == "accept"
    page = http.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == "accept"
    assert "the API" not in page.text
    assert "/v1" in page.text
    assert http.head("/").status_code == 200


def test_every_file_of_the_page_is_served_without_a_key_and_tells_nothing(http: httpx.Client) -> None:
    found = list(files(http))
    assert len(found) > 8
    for reply in found:
        assert reply.status_code == 200, reply.url
        assert "secret" not in reply.text.replace("client_secret", "")
    assert {reply.url.path for reply in found} == Page.read().paths


def test_no_file_needs_another_host_or_code_of_the_page_itself(http: httpx.Client) -> None:
    for reply in files(http):
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert {policy[kind] for kind in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert policy["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        if "/vendor/" not in reply.url.path and not reply.url.path.endswith(".svg"):
            code = re.sub(r"(^|\s)//\s.*", "", reply.text.replace(SVG, ""), flags=re.MULTILINE)
            assert "//" not in code, reply.url


def test_a_browser_keeps_the_files_and_asks_for_the_page_again(http: httpx.Client) -> None:
    for reply in files(http):
        kept = "no-cache" if reply.url.path in ("/", "/docs") else "public, max-age=31536000, immutable"
        assert reply.headers["cache-control"] == kept
        for tag in (reply.headers["etag"], f'"other", W/{reply.headers["etag"]}'):
            again = http.get(reply.url.path, headers={**BROWSER, "if-none-match": tag})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["content-security-policy"] == reply.headers["content-security-policy"]
        changed = http.get(reply.url.path, headers={**BROWSER, "if-none-match": '"other"'})
        assert changed.content == reply.content


def test_vendored_files_are_those_of_their_packages() -> None:
    folder = STATIC / "vendor"
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {name: digest for package in manifest.values() for name, digest in package["files"].items()}
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *listed}
    for name, digest in listed.items():
        assert hashlib.sha512((folder / name).read_bytes()).hexdigest() == digest, name
    for package in manifest.values():
        assert any(name.endswith("LICENSE") for name in package["files"])
        assert any(package["version"] in (folder / name).read_text()[:500] for name in package["files"])


def test_every_file_is_packed_into_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["exo"]
    package = ROOT / "src" / "exo"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in STATIC.rglob("*") if path.is_file()} <= packed
