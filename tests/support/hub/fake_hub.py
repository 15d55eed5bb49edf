"""A Hub for tests: the routes that huggingface_hub's client uses, on 127.0.0.1, in memory.

    python fake_hub.py        prints its port and serves until its standard input closes

Written from what the client (2.4, HF_HUB_DISABLE_XET=1) sends. `POST /_test/seed` makes a repository of a
folder, `/_test/fail` lets requests fail, all or a share of them, `/_test/collection` makes a collection,
`/_test/empty` forgets all of that and what was sent, and `GET /_test/log` tells what was asked and how many
bytes came.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import sys
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {
    "hf_aliceWriteToken0000": ("alice", "write"),
    "hf_aliceReadToken00000": ("alice", "read"),
    "hf_bobWriteToken000000": ("bob", "write"),
}
LICENSES = {"apache-2.0", "mit", "creativeml-openrail-m", "openrail++", "other"}
LFS = re.compile(r"\.(safetensors|h5|keras|bin|png|index|pb)$|\.data-\d+-of-\d+$")


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class Repository:
    def __init__(self, name: str, owner: str, private: bool) -> None:
        self.name, self.owner, self.private = name, owner, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(
            f"{self.name}{branch}{len(self.commits)}{message}".encode(errors="replace")
        ).hexdigest()
        self.commits[oid], self.heads[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = self.heads.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]


REPOSITORIES: dict[str, Repository] = {}
OBJECTS: dict[str, bytes] = {}
LOG: list[dict[str, Any]] = []
FAILURES: list[dict[str, Any]] = []
READ: dict[str, bytes] = {}
COLLECTIONS: dict[str, list[str]] = {}
CHANCE = random.Random(0)
PAGE = 30  # models on a page of a listing
LOCK = threading.RLock()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@cache
def oid_of(path: str, data: bytes) -> str:
    return sha256(data) if LFS.search(path) else git_oid(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the headers' acknowledgement
    unheard = False

    def log_message(self, *_: Any) -> None:
        pass

    def fails(self, rule: dict[str, Any]) -> bool:
        here = rule["method"] in (self.command, "*") and re.search(rule["path"], self.path)
        if "share" in rule:
            return bool(here and CHANCE.random() < rule["share"] and not self.path.startswith("/_test"))
        return bool(here and rule["times"] and not {"cut", "sleep"} & rule.keys())

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.entry = entry = {"method": self.command, "path": self.path, "bytes": 0}
        with LOCK:
            failure = next((f for f in FAILURES if self.fails(f)), None)
            if failure:
                failure["times"] -= 1
            if not self.route.startswith("/_test"):
                LOG.append(entry)
        if failure and failure.get("drop"):  # the connection breaks after half of the body
            entry["bytes"] = len(self.rfile.read(length // 2))
            self.close_connection = True
            self.connection.close()
            return
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        entry["bytes"] = len(self.body)
        if self.command == "PUT":
            time.sleep(sum(rule.get("sleep", 0) for rule in FAILURES))
        try:
            if failure and failure.get("late"):
                with LOCK:
                    self.unheard = True
                    self.answer()  # it is done, and the answer is lost
                    self.unheard = False
            if failure:
                status = CHANCE.choice(failure["statuses"]) if "statuses" in failure else failure["status"]
                wait = failure.get("retry_after", "") if status == 429 else ""
                raise Refusal(status, failure.get("message", "told to fail"), retry_after=wait)
            with LOCK:
                self.answer()
        except Refusal as refusal:
            header = re.sub("[^ -~]", "", refusal.message)  # which the client would not read at all
            self.send(
                refusal.status,
                {"error": refusal.message, **refusal.body},
                {
                    "X-Error-Code": refusal.code,
                    "X-Error-Message": header,
                    "Retry-After": refusal.body.get("retry_after", ""),
                },
            )

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def send(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
        if self.unheard:
            return
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def user(self) -> tuple[str, str] | None:
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        who = TOKENS.get(given.removeprefix("Bearer "))
        if who is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return who

    def repository(self, name: str, *, write: bool = False) -> Repository:
        who, found = self.user(), REPOSITORIES.get(name)
        hidden = found is not None and found.private and (who is None or who[0] != found.owner)
        if found is None or hidden:
            raise Refusal(404 if who else 401, "Repository not found", "RepoNotFound")
        if write and (who is None or who != (found.owner, "write")):
            raise Refusal(403, "Forbidden: you must have write access to do this")
        return found

    def answer(self) -> None:
        for method, pattern, action in ROUTES:
            if method == self.command or (method == "GET" and self.command == "HEAD"):
                match = re.fullmatch(pattern, self.route)
                if match:
                    return action(self, **{k: unquote(v) for k, v in match.groupdict().items() if v})
        raise Refusal(404, f"no route {self.command} {self.route}")

    def json(self) -> Any:
        return json.loads(self.body)

    # what tests ask

    def seed(self) -> None:
        order = self.json()
        repository = REPOSITORIES.setdefault(
            order["repo"], Repository(order["repo"], "alice", order.get("private", False))
        )
        files = dict(repository.files("main")[1])
        root = Path(order["folder"]) if order.get("folder") else None
        for path in sorted(p for p in root.rglob("*") if p.is_file()) if root else ():
            files[f"{order.get('at', '')}{path.relative_to(root).as_posix()}"] = path.read_bytes()
        for name, path in order.get("paths", {}).items():
            if path not in READ:
                READ[path] = Path(path).read_bytes()
            files[name] = READ[path]
        for name in order.get("files", {}):
            files[name] = order["files"][name].encode()
        self.send(200, repository.commit(order.get("branch", "main"), files, "seeded"))

    def fail(self) -> None:
        FAILURES[:] = [{"times": 1_000_000, "method": "GET", "path": "", **rule} for rule in self.json()]
        self.send(200, {})

    def empty(self) -> None:
        for held in (REPOSITORIES, OBJECTS, COLLECTIONS, FAILURES, LOG):
            held.clear()  # type: ignore[attr-defined]
        self.send(200, {})

    def log(self) -> None:
        self.send(200, LOG)
        LOG.clear()

    def state(self) -> None:
        told = {
            name: {
                "private": r.private,
                "heads": {h: sorted(r.commits[c]) for h, c in r.heads.items()},
                "messages": r.messages,
                "oids": {name: oid_of(name, data) for name, data in r.files("main")[1].items()},
            }
            for name, r in REPOSITORIES.items()
        }
        self.send(200, told)

    def collection(self) -> None:
        order = self.json()
        COLLECTIONS[order["slug"]] = order["items"]
        self.send(200, {})

    # the Hub

    def models(self) -> None:
        """A page of the models of an author, newest first, with a link to the next page."""
        author, start = self.query["author"][0], int(self.query.get("cursor", ["0"])[0])
        names = [name for name in REPOSITORIES if name.startswith(f"{author}/")][::-1]
        headers = {}
        if start + PAGE < len(names):
            url = f"http://{self.headers['Host']}/api/models?author={author}&cursor={start + PAGE}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.send(200, [{"id": name, "private": False} for name in names[start : start + PAGE]], headers)

    def collected(self, slug: str) -> None:
        if slug not in COLLECTIONS:
            raise Refusal(404, "Collection not found")
        items = [
            {"_id": str(at), "id": name, "type": kind, "position": at}
            for at, (kind, name) in enumerate(COLLECTIONS[slug])
        ]
        about = {"title": slug, "owner": {"name": "alice"}, "lastUpdated": "2023-05-01T00:00:00.000Z"}
        more = {"position": 0, "private": False, "theme": "blue", "upvotes": 0}
        self.send(200, {"slug": slug, "items": items, **about, **more})

    def whoami(self) -> None:
        who = self.user()
        if who is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.send(200, {"type": "user", "name": who[0], "auth": {"accessToken": {"role": who[1]}}})

    def create(self) -> None:
        order, who = self.json(), self.user()
        name = f"{order.get('organization') or (who[0] if who else '')}/{order['name']}"
        if who is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        url = f"http://{self.headers['Host']}/{name}"
        if name in REPOSITORIES:
            raise Refusal(409, "You already created this model repo", url=url)
        if who != (name.split("/")[0], "write"):
            raise Refusal(403, f"You don't have the rights to create a model under {name.split('/')[0]!r}")
        REPOSITORIES[name] = Repository(name, who[0], order.get("visibility") == "private")
        self.send(200, {"url": url, "name": name})

    def validate(self) -> None:
        license = re.search(r"^license: *(\S+)", self.json()["content"], re.M)
        errors = (
            [{"message": '"license" must be one of the list'}]
            if license and license[1] not in LICENSES
            else []
        )
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, repo: str, rev: str) -> None:
        repository = self.repository(repo, write=True)
        if rev in repository.heads:
            raise Refusal(409, f"Reference already exists: refs/heads/{rev}")
        repository.heads[rev] = repository.heads["main"]
        self.send(201, {})

    def preupload(self, repo: str, rev: str) -> None:
        pull = self.query.get("create_pr") == ["1"]
        _, files = self.repository(repo, write=not pull).files(rev)
        self.send(
            200,
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if LFS.search(f["path"]) else "regular",
                        "shouldIgnore": False,
                        **({"oid": oid_of(f["path"], files[f["path"]])} if f["path"] in files else {}),
                    }
                    for f in self.json()["files"]
                ]
            },
        )

    def batch(self, repo: str) -> None:
        self.repository(repo)
        href = f"http://{self.headers['Host']}/_lfs/"
        self.send(
            200,
            {
                "transfer": "basic",
                "objects": [
                    {
                        "oid": o["oid"],
                        "size": o["size"],
                        **(
                            {}
                            if o["oid"] in OBJECTS
                            else {
                                "actions": {
                                    "upload": {"href": href + o["oid"], "header": {}},
                                    "verify": {"href": href + o["oid"] + "/verify"},
                                }
                            }
                        ),
                    }
                    for o in self.json()["objects"]
                ],
            },
        )

    def put(self, oid: str) -> None:
        if sha256(self.body) != oid:
            raise Refusal(400, "the content is not what was announced")
        OBJECTS[oid] = self.body
        self.send(200, {})

    def verify(self, oid: str) -> None:
        self.send(200 if oid in OBJECTS else 404, {})

    def commit(self, repo: str, rev: str) -> None:
        pull = self.query.get("create_pr") == ["1"]
        repository = self.repository(repo, write=not pull)
        files, message = dict(repository.files(rev)[1]), ""
        for line in self.body.splitlines():
            order = json.loads(line)
            key, value = order["key"], order["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = OBJECTS[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
        number = 1 + sum(head.startswith("refs/pr/") for head in repository.heads)
        oid = repository.commit(f"refs/pr/{number}" if pull else rev, files, message)
        url = f"http://{self.headers['Host']}/{repo}"
        answer = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid}
        if pull:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        self.send(200, answer)

    def info(self, repo: str, rev: str = "main") -> None:
        repository = self.repository(repo)
        oid, files = repository.files(rev)
        self.send(
            200,
            {
                "id": repo,
                "modelId": repo,
                "sha": oid,
                "private": repository.private,
                "tags": [],
                "siblings": [{"rfilename": name} for name in files],
            },
        )

    def tree(self, repo: str, rev: str) -> None:
        _, files = self.repository(repo).files(rev)
        self.send(
            200,
            [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": git_oid(data),
                    **(
                        {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}}
                        if LFS.search(name)
                        else {}
                    ),
                }
                for name, data in files.items()
            ],
        )

    def resolve(self, repo: str, rev: str, path: str) -> None:
        oid, files = self.repository(repo).files(rev)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = files[path]
        etag = f'"{oid_of(path, data)}"'
        start, stop = 0, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or stop - 1) + 1
        headers = {"X-Repo-Commit": oid, "ETag": etag, "Accept-Ranges": "bytes"}
        if LFS.search(path):
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        headers["Content-Length"] = str(stop - start)
        self.entry["sent"] = 0 if self.command == "HEAD" else stop - start
        for rule in FAILURES:
            if rule["times"] and "cut" in rule and self.entry["sent"] and re.search(rule["path"], self.path):
                rule["times"] -= 1  # the connection breaks on the way
                self.entry["sent"] = rule["cut"]
                self.send(206 if wanted else 200, data[start : start + rule["cut"]], headers)
                self.close_connection = True
                return
        self.send(206 if wanted else 200, data[start:stop], headers)


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
ROUTES = [
    ("POST", "/_test/seed", Handler.seed),
    ("POST", "/_test/fail", Handler.fail),
    ("POST", "/_test/collection", Handler.collection),
    ("POST", "/_test/empty", Handler.empty),
    ("GET", "/_test/log", Handler.log),
    ("GET", "/_test/state", Handler.state),
    ("GET", "/api/models", Handler.models),
    ("GET", "/api/collections/(?P<slug>.+)", Handler.collected),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{_REPO}/branch/{_REV}", Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REV}", Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/_lfs/(?P<oid>[0-9a-f]+)", Handler.put),
    ("POST", "/_lfs/(?P<oid>[0-9a-f]+)/verify", Handler.verify),
    ("POST", f"/api/models/{_REPO}/commit/{_REV}", Handler.commit),
    ("GET", f"/api/models/{_REPO}", Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REV}", Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REV}", Handler.tree),
    ("GET", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)", Handler.resolve),
]

if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
