"""A small stand-in for the Hugging Face hub: enough of its HTTP interface for huggingface_hub to make repositories, commit files and
fetch them again."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

GOOD_TOKEN, READING_TOKEN = "hf_goodTOKEN0123456789", "hf_readTOKEN0123456789"
COMMIT = "c" * 40


class HubStub:
    """``repos``: name -> private; ``files``: (repo, path) -> bytes; ``requests``: (method, path) in order. ``broken`` answers all
    commits with that status. Each commit counts as one second later than the one before: ``dates``, (repo, path) -> seconds."""

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: int | None = None
        self.dates: dict[tuple[str, str], int] = {}
        self.commits: list[list[str]] = []  # what each did: +path, -path
        self.address = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict | list | bytes]:
        path, _, query = path.partition("?")
        path = unquote(path)
        self.requests.append((method, path))
        if token not in (GOOD_TOKEN, READING_TOKEN):
            return 401, {"error": f"Invalid credentials {token}"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}}
        if method in ("GET", "HEAD") and "/auth-check" not in path:
            return self._read(path, 'recursive=true' in query.lower())
        if token == READING_TOKEN:
            return 403, {"error": "You don't have the rights"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
            self.repos[name] = asked.get("private", asked.get("visibility") == "private")
            return 200, {"url": f"{self.address}/{name}", "name": name, "id": "1"}
        _, api, _, owner, name, action, *_ = path.split("/")
        repo = f"{owner}/{name}"
        if action == "auth-check":
            return 200, {}
        if action == "preupload":
            return 200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                   for file in json.loads(body)["files"]]}
        if action == "commit":
            if self.broken:
                return self.broken, {"error": f"out of order, {token}"}
            self.commits.append([])
            for line in filter(None, body.decode().splitlines()):
                one = json.loads(line)
                name = one["value"].get("path", "")
                if one["key"] == "file":
                    self.files[repo, name] = base64.b64decode(one["value"]["content"])
                    self.dates[repo, name] = len(self.commits)
                    self.commits[-1].append(f"+{name}")
                elif one["key"] in ("deletedFile", "deletedFolder"):
                    self.files = {key: data for key, data in self.files.items()
                                  if key[0] != repo or key[1] != name and not key[1].startswith(f"{name.rstrip('/')}/")}
                    self.commits[-1].append(f"-{name.rstrip('/')}")
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/{repo}/commit/{'0' * 40}"}
        return 404, {"error": f"no {path}"}

    def _read(self, path: str, deep: bool) -> tuple[int, dict | list | bytes]:
        """What a repository holds, and its files."""
        _, *parts = path.split("/")
        listing = parts[0] == "api"
        if parts[0] in ("api", "datasets", "spaces"):
            parts = parts[2:] if listing else parts[1:]
        (owner, name, *rest) = parts
        repo = f"{owner}/{name}"
        action, revision, where = (rest[0], rest[1], "/".join(rest[2:])) if len(rest) > 1 else ("revision", "main", "")
        if repo not in self.repos:
            return 404, {"error": "Repository not found", "code": "RepoNotFound"}
        if revision not in ("main", COMMIT):
            return 404, {"error": "Invalid rev id", "code": "RevisionNotFound"}
        if not listing:
            found = self.files.get((repo, where))
            return (200, found) if found is not None else (404, {"error": "Entry not found", "code": "EntryNotFound"})
        if action == "revision":
            return 200, {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": file} for of, file in self.files if of == repo],
                         "private": True, "tags": [], "downloads": 0, "likes": 0}
        return self._tree(repo, where, deep)

    def _tree(self, repo: str, folder: str, deep: bool) -> tuple[int, dict | list]:
        start = f"{folder}/" if folder else ""
        inside = [file for of, file in self.files if of == repo and file.startswith(start)]
        if folder and not inside:
            return 404, {"error": "Entry not found", "code": "EntryNotFound"}
        found: dict[str, dict] = {}
        for file in inside:
            path = file if deep else start + file.removeprefix(start).split("/")[0]
            date = max(self.dates[repo, file], found.get(path, {}).get("second", 0))
            kind = {"type": "file", "size": len(self.files[repo, file])} if path == file else {"type": "directory"}
            found[path] = {**kind, "path": path, "oid": "0" * 40, "second": date,
                           "lastCommit": {"id": COMMIT, "title": "x", "date": f"2026-01-01T00:{date // 60:02d}:{date % 60:02d}.000Z"}}
        return 200, list(found.values())


@contextmanager
def serving(stub: HubStub) -> Iterator[str]:
    """The address at which ``stub`` answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            chunks = []
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
            else:
                chunks.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, answer = stub.answer(self.command, self.path, token, b"".join(chunks))
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/octet-stream" if data is answer else "application/json")
            self.send_header("Content-Length", str(len(data)))
            if data is answer:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            elif status >= 400 and "code" in answer:
                self.send_header("X-Error-Code", answer["code"])
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_HEAD = do_PUT = _any  # noqa: N815

        def log_message(self, *_given) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        stub.address = f"http://127.0.0.1:{server.server_port}"
        yield stub.address
    finally:
        server.shutdown()
        server.server_close()
