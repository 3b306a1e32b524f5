"""Exact: the page's files, what they are called, and that nothing beside them can be had."""

import re

import httpx
import pytest

from onebit.serve.page import FOLDER, TYPES
from onebit.serve.service import Options
from serve.running import running, tiny_llm

FILES = sorted(path.name for path in FOLDER.iterdir())


def test_the_page_is_complete(server):
    names = re.findall(r'(?:src|href)="([^"#]+)"', server.get("/").text)
    for script in FOLDER.glob("*.js"):
        names += [f"static/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text("utf-8"))]
    assert {f"static/{name}" for name in FILES} - {"static/index.html"} == set(names)


@pytest.mark.parametrize("path", ["/", *[f"/static/{name}" for name in FILES]])
def test_files_have_types_tags_and_a_policy(server, path):
    first = server.get(path)
    name = path.removeprefix("/static/").strip("/") or "index.html"
    assert first.status_code == 200
    assert first.content == (FOLDER / name).read_bytes()
    assert first.headers["content-type"] == TYPES[name[name.rindex(".") :]]
    for answer in (first, server.get(path, headers={"If-None-Match": first.headers["etag"]})):
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
    assert answer.status_code == 304 and not answer.content


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/none.js",
        "/static/../page.py",
        "/static/%2e%2e/page.py",
        "/static/..%2fpage.py",
        "/static/..%5cpage.py",
        "/static//etc/passwd",
        "/static/%2fetc/passwd",
        "/static/index.html%00.js",
        "/static/" + "a" * 5000,
    ],
)
def test_nothing_else_can_be_had(server, path):
    # As bytes: the client would tidy the path up.
    url = httpx.URL(server.url).copy_with(raw_path=path.encode())
    answer = httpx.get(url, timeout=60)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_files_are_only_read(server):
    for path in ("/", "/static/app.js"):
        assert server.post(path).status_code == 405
        assert httpx.head(server.url + path).status_code in (200, 405)


def test_a_key_locks_the_figures_and_not_the_page():
    with running({"tiny": tiny_llm()}, Options(cache_bytes=2**22, api_keys=["secret"])) as locked:
        assert locked.get("/").status_code == locked.get("/static/app.js").status_code == 200
        assert locked.get("/metrics").status_code == locked.get("/v1/models").status_code == 401
