"""A Hugging Face Hub on loopback: as much of its protocol as huggingface_hub's own client speaks with models.

    python tests/fake_hub.py --port 8080
    HF_ENDPOINT=http://127.0.0.1:8080 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_fake genrec push …

Accounts, repositories, branches and files live in memory. Whoever has a token of `tokens` may do everything; without one,
public repositories can be read. Files of the kinds that the Hub stores as large go through git-lfs' batch protocol (Xet
has to be off in the client). `cut` breaks connections as a bad line does.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "fakeTokenOfTheLoopbackHub0123456789"
LARGE = (".safetensors", ".parquet", ".png", ".bin", ".model")
CHUNK = 1024
Tree = dict[str, bytes]


def git_hash(content: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """A model repository: its commits, and which of them its branches show.

    Attributes:
        history: every commit that a branch has ever shown, in order.
        objects: large files that arrived whole, by sha256; a commit may not have them yet.
    """

    private: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, tree: Tree, branch: str = "main") -> str:
        """Make a commit the latest of a branch."""
        parent = self.branches.get(branch, "")
        content = json.dumps([parent, {name: git_hash(content) for name, content in sorted(tree.items())}])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        self.history.append(sha)
        return sha

    def files(self, revision: str = "main") -> Tree:
        """The files of a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]

    def save(self, folder: Path, revision: str = "main") -> Path:
        """Write them to a folder."""
        for name, content in self.files(revision).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


class FakeHub(ThreadingHTTPServer):
    """The server; `with FakeHub() as hub` runs it in a thread.

    Attributes:
        repositories: by `org/name`.
        tokens: that are let in.
        requests: method and path of each request, in order.
        received: bytes of file contents and commits that clients have sent.
        bodies: everything that clients have sent, as it came.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}/lfs"  # another host, as the Hub's storage is
        self.repositories: dict[str, Repository] = {}
        self.tokens = {TOKEN}
        self.lock = threading.Lock()
        self.forget()
        self.mend()

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""

    def forget(self) -> None:
        """Begin the record of requests anew."""
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.received = 0

    @property
    def writes(self) -> list[str]:
        """What clients asked to be changed."""
        return [
            path for method, path in self.requests if method != "GET" and method != "HEAD" and "validate" not in path
        ]

    def cut(self, after: int, *, times: int = 10**9) -> None:
        """Break the connection once `after` more bytes of files and commits came, and each that goes on, `times` in all."""
        self.cut_at, self.cuts = self.received + after, times

    def lose_answer(self, times: int = 1) -> None:
        """Take the next commit, and break the connection before the answer."""
        self.lost_answers = times

    def mend(self) -> None:
        """The line is good again."""
        self.cut_at, self.cuts, self.lost_answers = 0, 0, 0

    def add_model(self, name: str, folder: Path) -> Repository:
        """Publish a folder's files, as somebody else did earlier."""
        tree = {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        repository = self.repositories.setdefault(name, Repository())
        repository.commit(tree)
        return repository


class Refusal(Exception):
    """An answer with an error code of the Hub."""

    def __init__(self, status: int, code: str, text: str = "") -> None:
        super().__init__(text or code)
        self.status, self.code = status, code


class Cut(Exception):
    """The line broke."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        """Dispatch."""
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self) -> None:
        """Read the request, find who handles it, and send what comes of it."""
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path))
        try:
            for method, pattern, handle in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and self.command in method.split("|"):
                    self.body = self.read(counted=self.command == "PUT" or "/commit/" in url.path)
                    handle(self, **{name: unquote(value) for name, value in found.groupdict().items() if value})
                    return
            self.body = self.read(counted=False)
            raise Refusal(404, "NotFound", self.path)
        except Cut:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self.send(json.dumps({"error": str(refusal)}).encode(), status=refusal.status, headers=headers)

    def read(self, *, counted: bool) -> bytes:
        """The request's body; breaks where the line is cut."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = iter(self.chunks())
        else:
            pieces = iter(self.pieces(int(self.headers.get("Content-Length") or 0)))
        body = b""
        for piece in pieces:
            body += piece
            if counted:
                with self.server.lock:
                    self.server.received += len(piece)
                    if self.server.cuts and self.server.received > self.server.cut_at:
                        self.server.cuts -= 1
                        raise Cut
        self.server.bodies.append(body)
        return body

    def pieces(self, length: int) -> Iterator[bytes]:
        """A body of known length."""
        while length:
            piece = self.rfile.read(min(length, CHUNK))
            if not piece:
                raise Cut
            length -= len(piece)
            yield piece

    def chunks(self) -> Iterator[bytes]:
        """A body in HTTP chunks."""
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, content: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: Any, **more: Any) -> None:
        """Answer with json."""
        self.send(json.dumps(value).encode(), **more)

    # --- who may, and what is there

    def known(self) -> bool:
        """Whether the client has a token that is let in; a wrong one is refused."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.server.tokens:
            raise Refusal(401, "Unauthorized", "Invalid credentials in Authorization header")
        return bool(given)

    def repository(self, name: str, *, write: bool = False) -> Repository:
        """A repository that the client may read (or change)."""
        known, repository = self.known(), self.server.repositories.get(name)
        if repository is None or (repository.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        if write and not known:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        return repository

    def revision(self, repository: Repository, revision: str) -> str:
        """The commit of a branch or commit."""
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # --- what is asked

    def whoami(self) -> None:
        """GET /api/whoami-v2"""
        if not self.known():
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        self.send_json({"type": "user", "name": "tester", "orgs": []})

    def create(self) -> None:
        """POST /api/repos/create"""
        if not self.known():
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            self.send_json(
                {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, status=409
            )
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = repository = Repository(private=bool(private))
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.send_json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def validate(self) -> None:
        """POST /api/validate-yaml"""
        import yaml

        text = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        if front is None or not isinstance(yaml.safe_load(front[1]), dict):
            self.send_json({"errors": [{"message": "no metadata"}], "warnings": []}, status=400)
        else:
            self.send_json({"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        """GET /api/models/org/name[/revision/…]"""
        repository = self.repository(name)
        sha = self.revision(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self.send_json({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings,
                        "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, name: str, revision: str, path: str = "") -> None:
        """GET /api/models/org/name/tree/…: all files below a path."""
        repository = self.repository(name)
        files = repository.commits[self.revision(repository, revision)]
        found = [entry(file, content) for file, content in files.items() if file.startswith(path)]
        if path and not found:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        self.send_json(found)

    def paths_info(self, name: str, revision: str) -> None:
        """POST /api/models/org/name/paths-info/…"""
        repository = self.repository(name)
        files = repository.commits[self.revision(repository, revision)]
        asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
        self.send_json([entry(file, files[file]) for file in asked if file in files])

    def refs(self, name: str) -> None:
        """GET /api/models/org/name/refs"""
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
            for branch, sha in self.repository(name).branches.items()
        ]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def branch(self, name: str, branch: str) -> None:
        """POST /api/models/org/name/branch/…"""
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "Conflict", "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self.revision(repository, start)
        self.send_json({})

    def preupload(self, name: str, revision: str) -> None:
        """POST /api/models/org/name/preupload/…: which files are large, and which are there already."""
        repository = self.repository(name, write=True)
        there = repository.commits[self.revision(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            if path in there:
                large = path.endswith(LARGE)
                answer["oid"] = hashlib.sha256(there[path]).hexdigest() if large else git_hash(there[path])
            answers.append(answer)
        self.send_json({"files": answers})

    def batch(self, name: str) -> None:
        """POST /org/name.git/info/lfs/objects/batch"""
        repository = self.repository(name, write=True)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repository.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.server.storage}/{name}/{asked['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs/{name}/verify"},
                }
            answers.append(answer)
        self.send_json({"transfer": "basic", "objects": answers})

    def store(self, name: str, oid: str) -> None:
        """PUT /lfs/org/name/…: the content of a large file; signed urls need no token."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "BadDigest", "the content is not what was announced")
        self.server.repositories[name].objects[oid] = self.body
        self.send(b"")

    def verify(self, name: str) -> None:
        """POST /lfs/org/name/verify"""
        asked = json.loads(self.body)
        content = self.repository(name, write=True).objects.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise Refusal(404, "NotFound", "no such object")
        self.send_json({})

    def commit(self, name: str, revision: str) -> None:
        """POST /api/models/org/name/commit/…: all operations at once, or none."""
        repository = self.repository(name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        with self.server.lock:
            head = repository.branches[revision]
            tree = dict(repository.commits[head])
            for line in lines:
                value = line["value"]
                if line["key"] == "header" and value.get("parentCommit", head) != head:
                    raise Refusal(412, "PreconditionFailed", "A commit has happened since.")
                if line["key"] == "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in repository.objects:
                        raise Refusal(400, "BadRequest", f"Your push was rejected: no object {value['oid']}")
                    tree[value["path"]] = repository.objects[value["oid"]]
                elif line["key"] == "deletedFile" and tree.pop(value["path"], None) is None:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            sha = repository.commit(tree, revision)
            if self.server.lost_answers:
                self.server.lost_answers -= 1
                raise Cut
        self.send_json({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        """GET or HEAD /org/name/resolve/…/file; large files are elsewhere."""
        repository = self.repository(name)
        sha = self.revision(repository, revision)
        if path not in repository.commits[sha]:
            self.send(b"", status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        content = repository.commits[sha][path]
        headers = {"X-Repo-Commit": sha}
        if path.endswith(LARGE):
            oid = hashlib.sha256(content).hexdigest()
            repository.objects[oid] = content
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Content-Length": "0"}
            headers["Location"] = f"{self.server.storage}/{name}/{oid}"
            self.send(b"", status=302, headers=headers)
            return
        headers |= {"ETag": f'"{git_hash(content)}"', "Content-Length": str(len(content))}
        self.send(content, headers=headers)

    def large(self, name: str, oid: str) -> None:
        """GET or HEAD /lfs/org/name/…"""
        content = self.server.repositories[name].objects[oid]
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            self.send(content[int(start[1]) :], status=206, headers=headers)
        else:
            self.send(content, headers=headers)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as `tree` lists it."""
    listed: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if path.endswith(LARGE):
        listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return listed


_NAME = r"(?P<name>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_NAME}"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", _MODEL, Handler.info),
    ("GET", rf"{_MODEL}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{_MODEL}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", rf"{_MODEL}/refs", Handler.refs),
    ("POST", rf"{_MODEL}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{_MODEL}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/lfs/{_NAME}/verify", Handler.verify),
    ("PUT", rf"/lfs/{_NAME}/(?P<oid>[0-9a-f]+)", Handler.store),
    ("GET|HEAD", rf"/lfs/{_NAME}/(?P<oid>[0-9a-f]+)", Handler.large),
    ("GET|HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


def environment(hub: FakeHub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Variables that point a process at the server, with a cache and a login of its own in `home`."""
    values = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    return values | ({} if token is None else {"HF_TOKEN": token})


def use(monkeypatch: Any, hub: FakeHub, home: Path, token: str | None = TOKEN) -> None:
    """Point this process at the server: huggingface_hub has read its environment at import already."""
    import transformers
    from huggingface_hub import close_session, constants, hf_api

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(hub, home, token).items():
        monkeypatch.setenv(name, value)
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # of huggingface_hub.model_info and the like
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew when it is needed
    close_session()  # its connections know the proxies of before


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080)
    hub = FakeHub(parser.parse_args().port)
    settings = environment(hub, Path("…"))
    print(
        " ".join(f"{name}={settings[name]}" for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_TOKEN")), flush=True
    )
    with contextlib.suppress(KeyboardInterrupt):
        hub.serve_forever()


if __name__ == "__main__":
    main()
