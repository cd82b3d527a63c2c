"""A model hub on loopback: as much of the hub's protocol as huggingface_hub and datasets use, from what they were seen
to ask for. Holds repositories in memory; can cut downloads short, ask for a licence, or not know a name."""
import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """repos: {"models/gpt2": {"main": {path: bytes}}}; gated: names that want a licence accepted; cuts: {path: in how
    many of the next downloads of it the connection breaks half-way}; log: (method, path, Range header) of all requests."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.cuts: dict[str, int] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files

    def handle_error(self, request, client_address):
        pass  # a client that goes away in the middle is what some tests are about


@contextmanager
def running_hub():
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def sha_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", head=False, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET(head=True)

    def find(self, kind, rest):
        """-> the repository's name, its revisions, and what follows the name; answers itself where there is none."""
        for name in sorted(self.server.repos, key=len, reverse=True):
            kind_of, _, short = name.partition("/")
            if kind_of == kind and (rest == short or rest.startswith(short + "/")):
                if name in self.server.gated and not self.headers.get("Authorization"):
                    self.answer(401, {"error": "gated"}, **{"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {short} is restricted"})
                    return None
                return name, self.server.repos[name], rest[len(short) + 1 :]
        self.answer(401, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
        return None

    def revision(self, revisions, name):
        """-> the files at a branch or commit; answers itself where there is none."""
        for branch, files in revisions.items():
            if name in (branch, sha_of(files)):
                return files
        self.answer(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {name}"})
        return None

    def do_GET(self, head=False):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.log.append((self.command, path, self.headers.get("Range")))
        if path == "api/whoami-v2":
            return self.answer(200, {"name": "somebody", "type": "user", "orgs": [], "auth": {}})
        if match := re.match(r"api/(models|datasets)/(.*)", path):
            return self.info(*match.groups(), head)
        kind, path = ("datasets", path[9:]) if path.startswith("datasets/") else ("models", path)
        if not (found := self.find(kind, path)):
            return None
        _, revisions, rest = found
        match = re.match(r"resolve/(.*)", rest)
        for revision in sorted([*revisions, *map(sha_of, revisions.values())], key=len, reverse=True):
            if match and match[1].startswith(revision + "/"):
                return self.resolve(self.revision(revisions, revision), match[1][len(revision) + 1 :], head)
        return self.answer(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound"})

    def resolve(self, files, name, head):
        common = {"X-Repo-Commit": sha_of(files), "Accept-Ranges": "bytes"}
        if name not in files:
            return self.answer(404, {"error": "Entry not found"}, head, **common, **{"X-Error-Code": "EntryNotFound"})
        data, status = files[name], 200
        common["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        common["X-Linked-Size"] = str(len(data))
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            common["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            data, status = data[start : end + 1], 206
        if not head and self.server.cuts.get(name, 0):
            self.server.cuts[name] -= 1
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **common}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        return self.answer(status, data, head, **common)

    def info(self, kind, rest, head):
        if not (found := self.find(kind, rest)):
            return None
        name, revisions, rest = found
        match = re.fullmatch(r"(?:(revision|tree)/([^/]+(?:/convert/parquet)?)(?:/(.*))?)?", rest)
        if not match:
            return self.answer(404, {"error": rest})
        files = self.revision(revisions, match[2] or "main")
        if files is None:
            return None
        entries = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                   for path, data in files.items()]
        if match[1] == "tree":
            under = f"{match[3]}/" if match[3] else ""
            inside = [entry for entry in entries if entry["path"].startswith(under)]
            folders = {under + entry["path"][len(under) :].split("/")[0] for entry in inside if "/" in entry["path"][len(under) :]}
            if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() not in ("true", "1"):
                inside = [entry for entry in inside if "/" not in entry["path"][len(under) :]]
            if under and not inside and not folders:
                return self.answer(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})
            return self.answer(200, inside + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)])
        short = name.partition("/")[2]
        return self.answer(200, {
            "id": short, "modelId": short, "sha": sha_of(files), "private": False, "gated": False, "disabled": False, "tags": [],
            "downloads": 0, "likes": 0, "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]}, head)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.log.append((self.command, path, None))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "api/repos/create":
            asked = json.loads(body)
            kind = asked.get("type") or "model"
            name = "/".join(filter(None, (f"{kind}s", asked.get("organization"), asked["name"])))
            if name in self.server.repos:
                return self.answer(409, {"error": "exists", "url": f"{self.server.url}/{name.partition('/')[2]}"})
            self.server.add(name, {})
            return self.answer(200, {"url": f"{self.server.url}/{name.partition('/')[2]}", "name": name.partition("/")[2], "id": "1"})
        kind, rest = re.match(r"api/(models|datasets)/(.*)", path).groups()
        if not (found := self.find(kind, rest)):
            return None
        name, revisions, rest = found
        if match := re.fullmatch(r"paths-info/(.*)", rest):
            files = self.revision(revisions, match[1])
            paths = parse_qs(body.decode())["paths"] if not body.startswith(b"{") else json.loads(body)["paths"]
            return files is None or self.answer(200, [
                {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}
                for path in paths if path in files])
        if match := re.fullmatch(r"preupload/(.*)", rest):
            return self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                               for file in json.loads(body)["files"]]})
        if match := re.fullmatch(r"commit/(.*)", rest):
            files = dict(revisions.get(match[1], {}))
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "deletedFile":
                    files.pop(entry["value"]["path"], None)
            revisions[match[1]] = files
            return self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha_of(files)}", "commitOid": sha_of(files),
                                     "pullRequestUrl": None, "success": True})
        return self.answer(404, {"error": path})
