"""A model hub on loopback: as much of the hub's protocol as huggingface_hub and datasets use, from what they
were seen to ask for. Holds repositories in memory; can cut downloads short, ask for a licence, or not know a
name."""
import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """repos: {"models/gpt2": {"main": {path: bytes}}}; gated: names that want a licence accepted; cuts: {path:
    in how many of the next downloads of it the connection breaks half-way}; log: (method, path, Range header)
    of all requests."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.clear()

    def clear(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.cuts: dict[str, int] = {}
        self.log: list[tuple[str, str, str | None]] = []

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files

    def handle_error(self, request, client_address):
        pass  # a client that goes away in the middle is what some tests are about


def sha_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()


def describe(path: str, data: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    # What is answered
    def answer(self, status, body=b"", headers={}):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def break_off(self, status, data, headers):
        """Sends half of it, and goes away."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    # What is there; where nothing is, these answer it themselves
    def find(self, kind, rest):
        """-> the repository's name, its revisions, and what follows the name; or None"""
        for name in sorted(self.server.repos, key=len, reverse=True):
            kind_of, _, short = name.partition("/")
            if kind_of == kind and (rest == short or rest.startswith(short + "/")):
                if name in self.server.gated and not self.headers.get("Authorization"):
                    self.refuse(401, "GatedRepo", f"Access to {short} is restricted")
                    return None
                return name, self.server.repos[name], rest[len(short) + 1 :]
        self.refuse(401, "RepoNotFound", "Repository Not Found")
        return None

    def revision(self, revisions, name):
        """-> the files at a branch or commit, or None"""
        for branch, files in revisions.items():
            if name in (branch, sha_of(files)):
                return files
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return None

    # What is asked
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.log.append((self.command, path, self.headers.get("Range")))
        if path == "api/whoami-v2":
            return self.answer(200, {"name": "somebody", "type": "user", "orgs": [], "auth": {}})
        match = re.match(r"api/(models|datasets)/(.*)", path)
        if match:
            return self.get_info(*match.groups())
        kind = "models"
        if path.startswith("datasets/"):
            kind, _, path = path.partition("/")
        found = self.find(kind, path)
        if not found:
            return None
        _, revisions, rest = found
        known = sorted([*revisions, *map(sha_of, revisions.values())], key=len, reverse=True)
        for revision in known:
            start = f"resolve/{revision}/"
            if rest.startswith(start):
                return self.get_file(self.revision(revisions, revision), rest.removeprefix(start))
        return self.refuse(404, "RevisionNotFound", "Invalid rev id")

    def get_file(self, files, name):
        headers = {"X-Repo-Commit": sha_of(files), "Accept-Ranges": "bytes"}
        if name not in files:
            return self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        data = files[name]
        status = 200
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(data))
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start = int(wanted[1])
            end = min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data = data[start : end + 1]
            status = 206
        if self.command != "HEAD" and self.server.cuts.get(name, 0):
            self.server.cuts[name] -= 1
            return self.break_off(status, data, headers)
        return self.answer(status, data, headers)

    def get_info(self, kind, rest):
        found = self.find(kind, rest)
        if not found:
            return None
        name, revisions, rest = found
        match = re.fullmatch(r"(?:(revision|tree)/([^/]+(?:/convert/parquet)?)(?:/(.*))?)?", rest)
        if not match:
            return self.answer(404, {"error": rest})
        files = self.revision(revisions, match[2] or "main")
        if files is None:
            return None
        entries = [describe(path, data) for path, data in files.items()]
        if match[1] == "tree":
            return self.get_tree(entries, f"{match[3]}/" if match[3] else "")
        short = name.partition("/")[2]
        return self.answer(200, {
            "id": short, "modelId": short, "sha": sha_of(files), "private": False, "gated": False,
            "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]})

    def get_tree(self, entries, under):
        query = parse_qs(urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = []
        folders = set()
        for entry in entries:
            first, slash, _ = entry["path"].removeprefix(under).partition("/")
            if not entry["path"].startswith(under):
                continue
            if slash:
                folders.add(under + first)
            if recursive or not slash:
                inside.append(entry)
        if under and not inside and not folders:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        for path in sorted(folders):
            inside.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return self.answer(200, inside)

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while True:
            size = int(self.rfile.readline().strip() or b"0", 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                return body

    def do_POST(self):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.log.append((self.command, path, None))
        body = self.read_body()
        if path == "api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self.create(json.loads(body))
        kind, rest = re.match(r"api/(models|datasets)/(.*)", path).groups()
        found = self.find(kind, rest)
        if not found:
            return None
        name, revisions, rest = found
        what, _, revision = rest.partition("/")
        if what == "paths-info":
            files = self.revision(revisions, revision)
            if files is None:
                return None
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            return self.answer(200, [describe(path, files[path]) for path in asked["paths"] if path in files])
        if what == "preupload":
            answers = []
            for file in json.loads(body)["files"]:
                answers.append({"path": file["path"], "uploadMode": "regular", "shouldIgnore": False})
            return self.answer(200, {"files": answers})
        if what == "commit":
            return self.commit(name, revisions, revision, body.decode().splitlines())
        return self.answer(404, {"error": path})

    def create(self, asked):
        kind = asked.get("type") or "model"
        short = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        url = f"{self.server.url}/{short}"
        if f"{kind}s/{short}" in self.server.repos:
            return self.answer(409, {"error": "exists", "url": url})
        self.server.add(f"{kind}s/{short}", {})
        return self.answer(200, {"url": url, "name": short, "id": "1"})

    def commit(self, name, revisions, revision, lines):
        files = dict(revisions.get(revision, {}))
        for line in lines:
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                files.pop(entry["value"]["path"], None)
        revisions[revision] = files
        sha = sha_of(files)
        url = f"{self.server.url}/{name}/commit/{sha}"
        return self.answer(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None, "success": True})
