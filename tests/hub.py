"""A stand-in for the Hugging Face Hub on 127.0.0.1: the requests that pushing and loading models make, kept in memory.

It has no Xet, so that HF_HUB_DISABLE_XET=1 must be set before huggingface_hub is imported (`ENVIRONMENT`). Connections end with
their answers (HTTP/1.0): none outlives the server, and a server that is down is down.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

TOKEN = "a-token"

LARGE = (".safetensors", ".png")
"""What goes by LFS."""

Answer = tuple[int, dict[str, str], bytes]


class Refused(Exception):
    """Status, X-Error-Code and message of an answer that is none."""


@dataclass
class Repository:
    """Commits, each a whole tree of path -> content, and what names them."""

    private: bool
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: dict[str, bytes], branch: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[name], self.names[branch] = tree, name
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        name = self.names.get(revision, revision)
        if name not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name, self.commits[name]


class Hub(ThreadingHTTPServer):
    """The server; `with Hub() as hub:` starts and ends it. `requests` lists what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}", threading.Lock()
        self.repositories, self.large, self.requests = dict[str, Repository](), dict[str, bytes](), list[str]()

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, cache: Path, token: str = TOKEN) -> dict[str, str]:
        """What a process needs to talk to it: read when huggingface_hub is imported."""
        quiet = {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": token, **quiet}

    def answer(self, method: str, path: list[str], token: str | None, body: bytes) -> Answer:
        if token not in (None, TOKEN):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        match method, path:
            case "POST", ["api", "validate-yaml"]:
                return _json({"errors": [], "warnings": []})
            case "PUT", ["lfs", name]:
                self.large[name] = body
                return _json({})
            case "POST", _ if token is None:
                raise Refused(401, "", "Invalid username or password.")
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                known = name in self.repositories
                if not known:
                    self.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
                    self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
                return _json({"url": f"{self.url}/{name}", "error": "You already created this model repo"}, 409 if known else 200)
            case _, ["api", "models", owner, name, *rest] | [owner, name, *rest]:
                name = f"{owner}/{name.removesuffix('.git')}"
                repository = self.repositories.get(name)
                if repository is None or (repository.private and token is None):
                    raise Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
                if repository.gated:
                    raise Refused(403, "GatedRepo", f"Access to model {name} is restricted")
                return self._within(name, repository, [method, *rest], body)
        raise Refused(404, "", f"the stand-in has no {method} {path}")

    def _within(self, name: str, repository: Repository, asked: list[str], body: bytes) -> Answer:
        match asked:
            case ["GET"] | ["GET", "revision", _]:
                commit, tree = repository.at(asked[2] if asked[2:] else "main")
                return _json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in sorted(tree)]})
            case ["GET", "tree", revision]:
                return _json([_entry(path, content) for path, content in sorted(repository.at(revision)[1].items())])
            case ["GET", "resolve", revision, *folders]:
                (commit, tree), path = repository.at(revision), "/".join(folders)
                if path not in tree:
                    raise Refused(404, "EntryNotFound", "Entry not found")
                return 200, {"X-Repo-Commit": commit, "ETag": f'"{_digest(path, tree[path])}"'}, tree[path]
            case ["POST", "branch", branch]:
                if branch in repository.names:
                    raise Refused(409, "", f"Reference already exists: {branch}")
                repository.names[branch] = repository.at("main")[0]
                return _json({})
            case ["POST", "preupload", revision]:
                there = {path: _digest(path, content) for path, content in repository.at(revision)[1].items()}
                paths = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": path, "shouldIgnore": False, "oid": there.get(path)} for path in paths]
                return _json({"files": [file | {"uploadMode": _mode(file["path"])} for file in files]})
            case ["POST", "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                for entry in objects:
                    if entry["oid"] not in self.large:
                        entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
                return _json({"transfer": "basic", "objects": objects})
            case ["POST", "commit", revision]:
                tree = dict(repository.at(revision)[1])
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        tree[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        tree[value["path"]] = self.large[value["oid"]]
                commit = repository.commit(tree, revision)
                return _json({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})
        raise Refused(404, "", f"the stand-in has no {asked} of a repository")


class _Handler(BaseHTTPRequestHandler):
    def _serve(self) -> None:
        hub, path = cast(Hub, self.server), urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            try:
                parts = [unquote(part) for part in path.split("/")[1:]]
                status, headers, content = hub.answer(self.command.replace("HEAD", "GET"), parts, token, body)
            except Refused as no:
                status, headers, content = _json({"error": no.args[2]}, no.args[0])
                headers |= {"X-Error-Code": no.args[1], "X-Error-Message": no.args[2]}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def _mode(path: str) -> str:
    return "lfs" if path.endswith(LARGE) else "regular"


def _digest(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    found["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.endswith(LARGE):
        found["lfs"] = {"oid": _digest(path, content), "size": len(content), "pointerSize": 134}
    return found


def _json(value: object, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()
