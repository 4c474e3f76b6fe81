"""The part of the Hub's HTTP interface that an upload uses, on a local port, with faults to order.

Repositories, files and commits are kept in memory. It checks what the Hub checks: who asks, that the
card's metadata are YAML of the Hub's shape, and that large files were uploaded before they are
committed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "t" * 34
LICENSES = {"apache-2.0", "mit", "llama3.2", "other"}
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubServer:
    """A context manager; `url` is the endpoint.

    Attributes:
        repos: by "models/owner/name" or "datasets/owner/name": private, files, commits.
        asked: every request, as "METHOD path".
        fails: a function of such a line; where it gives a number, that status is the answer.
        loses: the same; where it is true, the request is carried out and its answer lost.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fails: Any = lambda _: 0
        self.loses: Any = lambda _: False
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def make(self, name: str, *, private: bool) -> None:
        """A repository that was there before."""
        self.repos[name] = {"private": private, "files": {}, "commits": []}


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        hub, path = self.server_hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{method} {path}"
        hub.asked.append(line)
        fault = hub.fails(line)
        self.lost = hub.loses(line)
        if fault:
            self._answer(fault, {"error": "out of order"})
            return
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            hub.large[path.rpartition("/")[2]] = body
            self._answer(200, {})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "validate-yaml" not in path:
            self._answer(401, {"error": "Invalid username or password."})
            return
        if path == "/api/whoami-v2":
            self._answer(200, {"name": "someone", "type": "user"})
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(
            r"/((?:datasets/)?)([^/]+/[^/]+)\.git/info/lfs/objects/batch", path
        ):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            self._repo(f"{match[1]}/{match[2]}", match[3] or "", body)
        else:
            self._answer(404, {"error": path})

    def _validate(self, asked: dict[str, str]) -> None:
        errors = []
        front = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        data = yaml.safe_load(front[1]) if front else None
        if not isinstance(data, dict):
            errors.append("no metadata")
        else:
            if "license" in data and data["license"] not in LICENSES:
                errors.append(f'"license" must be one of {sorted(LICENSES)}')
            bases = data.get("base_model", [])
            for base in [bases] if isinstance(bases, str) else bases:
                if not REPO_ID.fullmatch(base):
                    errors.append(f'"base_model" with value "{base}" is not valid')
            for index in data.get("model-index", []):
                for result in index["results"]:
                    assert result["task"]["type"]
                    assert result["dataset"]["type"]
                    assert result["dataset"]["name"]
                    assert all(isinstance(m["value"], float) for m in result["metrics"])
        told = {"errors": [{"message": e} for e in errors], "warnings": []}
        if errors and self.headers.get("Accept") == "text/plain":
            self._answer(400, "\n".join(errors))
        else:
            self._answer(400 if errors else 200, told)

    def _create(self, asked: dict[str, Any]) -> None:
        hub = self.server_hub
        name = f"{asked.get('type', 'model')}s/{asked['organization'] or 'someone'}/{asked['name']}"
        if name in hub.repos:
            self._answer(
                409, {"error": "You already created this repo", "url": f"{hub.url}/{name}"}
            )
            return
        hub.make(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self._answer(200, {"url": f"{hub.url}/{name.removeprefix('models/')}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        hub = self.server_hub
        objects = []
        for item in asked["objects"]:
            found = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in hub.large:
                found["actions"] = {"upload": {"href": f"{hub.url}/storage/{item['oid']}"}}
            objects.append(found)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _repo(self, name: str, rest: str, body: bytes) -> None:
        hub = self.server_hub
        repo = hub.repos.get(name)
        if repo is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest.startswith("/preupload/"):
            files = []
            for item in json.loads(body)["files"]:
                large = item["path"].endswith((".safetensors", ".gguf"))
                held = repo["files"].get(item["path"])
                oid = None
                if held is not None:
                    blob = f"blob {len(held)}\0".encode() + held
                    oid = (hashlib.sha256(held) if large else hashlib.sha1(blob)).hexdigest()
                mode = "lfs" if large else "regular"
                files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False,
                              "oid": oid})  # fmt: skip
            self._answer(200, {"files": files})
        elif rest.startswith("/commit/"):
            held = {}
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    held[value["path"]] = hub.large[value["oid"]]
            repo["files"] |= held
            repo["commits"].append(sorted(held))
            url = f"{hub.url}/{name}/commit/{len(repo['commits'])}"
            self._answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        else:
            self._answer(200, {"id": name.partition("/")[2], "_id": "1", "sha": "0" * 40,
                               "private": repo["private"], "tags": [], "downloads": 0,
                               "likes": 0})  # fmt: skip

    def _answer(
        self, status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None
    ) -> None:
        if self.lost:
            self.close_connection = True
            return
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Type": "application/json",
                           "Content-Length": str(len(content))}.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)
