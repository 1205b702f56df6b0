"""Speak HTTP as the Hugging Face hub does to who uploads: its routes, statuses and error headers,
after huggingface_hub 1.33's client and the protocols that it names (commit API, Git LFS)."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "me"
"""Who the token ``writer`` belongs to; ``reader`` may only read."""
SHA = "c0ffee" + "0" * 34


class FakeHub(ThreadingHTTPServer):
    """The server, and what tests set and look at."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        """Repository -> branch -> path -> content."""
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        """Content of LFS objects by SHA-256."""
        self.commits: list[tuple[str, str, str]] = []
        """(repository, branch, message) of every commit."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> None:
        self.repos[repo] = {"main": dict(files)}
        self.private[repo] = private


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            listed = []
            branch = "main" if match[2] == SHA else match[2]
            for name, content in self.server.repos[match[1]][branch].items():
                listed.append({"type": "file", "path": name, "size": len(content), "oid": "0"})
            self._answer(200, listed)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._answer(500, {"error": f"no route {path}"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self._body()
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        if path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
            return
        if self.headers["Authorization"] != "Bearer writer":
            self._refuse(403, "Forbidden: you don't have the rights to write here")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self.server.repos[match[1]]
            is_new = match[2] not in branches
            branches.setdefault(match[2], dict(branches["main"]))
            self._answer(200 if is_new else 409, {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            self._answer(200, {"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for asked in json.loads(body)["objects"]:
                upload = {"href": f"{self.server.url}/lfs/{asked['oid']}"}
                objects.append({**asked, "authenticated": True, "actions": {"upload": upload}})
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(match[1], match[2], body)
        else:
            self._answer(500, {"error": f"no route {path}"})

    def _info(self, repo: str) -> None:
        if repo == f"{OWNER}/down":
            # As a network that fails: the connection ends without an answer.
            self.close_connection = True
        elif repo == f"{OWNER}/busy":
            self._refuse(503, "the hub is down for maintenance")
        elif self.headers.get("Authorization") not in ("Bearer writer", "Bearer reader"):
            self._refuse(401, "Invalid credentials in Authorization header")
        elif repo not in self.server.repos:
            self._refuse(404, "Repository not found", code="RepoNotFound")
        else:
            siblings = [{"rfilename": name} for name in self.server.repos[repo]["main"]]
            private = self.server.private[repo]
            info = {"id": repo, "sha": SHA, "private": private, "siblings": siblings}
            self._answer(200, info)

    def _create(self, asked: dict[str, Any]) -> None:
        if asked.get("organization") != OWNER:
            self._refuse(403, f"You don't have the rights to create a model under {asked}")
            return
        repo = f"{OWNER}/{asked['name']}"
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.add(repo, {".gitattributes": b""}, private=private)
        self._answer(200, {"url": f"{self.server.url}/{repo}"})

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        files = self.server.repos[repo][branch]
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "header":
                self.server.commits.append((repo, branch, value["summary"]))
            elif change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                # A hub refuses an object that was not uploaded.
                files[value["path"]] = self.server.stored[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
            else:
                self._answer(400, {"error": f"unknown change {change['key']}"})
                return
        url = f"{self.server.url}/{repo}/commit/{SHA}"
        self._answer(200, {"commitUrl": url, "commitOid": SHA})

    def _file(self, repo: str, name: str) -> None:
        content = self.server.repos[repo]["main"][name]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # Each chunk: its length in hexadecimal, its bytes, an empty line.
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Message", message)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens while the block runs."""
    with FakeHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
