"""A small stand-in for the Hugging Face hub: enough of its HTTP interface for huggingface_hub to make repositories and commit files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD_TOKEN, READING_TOKEN = "hf_goodTOKEN0123456789", "hf_readTOKEN0123456789"


class HubStub:
    """``repos``: name -> private; ``files``: (repo, path) -> bytes; ``requests``: (method, path) in order. ``broken`` answers all
    commits with that status."""

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: int | None = None
        self.address = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict]:
        path = path.partition("?")[0]
        self.requests.append((method, path))
        if token not in (GOOD_TOKEN, READING_TOKEN):
            return 401, {"error": f"Invalid credentials {token}"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}}
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
            for line in filter(None, body.decode().splitlines()):
                one = json.loads(line)
                if one["key"] == "file":
                    self.files[repo, one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/{repo}/commit/{'0' * 40}"}
        return 404, {"error": f"no {path}"}


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
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
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
