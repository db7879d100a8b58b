"""Small servers that speak as much of Google Cloud Storage and of the Hugging Face Hub as loading and pushing need."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _reply(self, status, body=b"", headers=None):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "content-length" not in (headers or {}):
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _any(self):
        url = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {self.path}")
        self.answer(url.path, parse_qs(url.query), self._body())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any


class _Gcs(_Handler):
    def answer(self, path, query, body):
        objects = self.server.objects
        if path.startswith("/upload/"):
            name, generation = query["name"][0], str(len(self.server.requests))
            objects[name] = (body, generation)
            return self._reply(200, _entry(name, body, generation))
        _, _, name = path.partition("/o/")
        if not name:
            low, high = query.get("startOffset", [""])[0], query.get("endOffset", ["\uffff"])[0]
            return self._reply(200, {"items": [_entry(n, *objects[n]) for n in sorted(objects) if low <= n < high]})
        name = unquote(name)
        if name not in objects:
            return self._reply(404, {})
        if self.command == "DELETE":
            del objects[name]
            return self._reply(204)
        data, generation = objects[name]
        if query.get("ifGenerationNotMatch") == [generation]:
            return self._reply(304)
        return self._reply(200, data, {"x-goog-generation": generation})


def _entry(name, data, generation):
    return {"name": name, "size": str(len(data)), "generation": generation, "timeCreated": "2024-01-01T00:00:00Z"}


class _Hub(_Handler):
    @property
    def own_url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path, query, body):
        files = self.server.objects
        if "/commit/" in path:  # what belongs to a commit stays as it was, and clients remember it
            self.server.commit = hashlib.sha1(self.server.commit.encode()).hexdigest()
        commit = self.server.commit
        if path == "/api/repos/create":
            return self._reply(200, {"url": f"{self.own_url}/me/policy", "id": "me/policy"})
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            # As the real one does it: weights are large files, which are uploaded before the commit names them.
            mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"  # noqa: E731
            modes = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked]
            return self._reply(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            found = []
            for one in json.loads(body)["objects"]:
                action = {"href": f"{self.own_url}/lfs/{one['oid']}", "header": {}}
                found.append({"oid": one["oid"], "size": one["size"], "actions": {"upload": action}})
            return self._reply(200, {"transfer": "basic", "objects": found})
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return self._reply(400, {})
            self.server.large[path.removeprefix("/lfs/")] = body
            return self._reply(200)
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = self.server.large[entry["value"]["oid"]]
            return self._reply(
                200, {"commitUrl": f"{self.own_url}/me/policy/commit/{commit}", "commitOid": commit, "success": True}
            )
        if "/tree/" in path:
            listing = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in sorted(files.items())
            ]
            return self._reply(200, listing)
        if path.startswith("/api/models/"):
            names = [{"rfilename": name} for name in sorted(files)]
            return self._reply(200, {"id": "me/policy", "modelId": "me/policy", "sha": commit, "siblings": names})
        if "/resolve/" in path:
            name = unquote(path.split("/resolve/", 1)[1].split("/", 1)[1])
            if name not in files:
                return self._reply(404, {}, {"x-error-code": "EntryNotFound"})
            head = {
                "etag": f'"{hashlib.sha1(files[name]).hexdigest()}"',
                "x-repo-commit": commit,
                "content-length": str(len(files[name])),
            }
            return self._reply(200, files[name], head)
        return self._reply(404, {})


@contextlib.contextmanager
def serve(handler):
    """Yields (server, url); `server.objects` holds the files, `server.requests` what was asked."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.objects, server.requests, server.commit, server.large = {}, [], "c" * 40, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def gcs():
    return serve(_Gcs)


def hub():
    return serve(_Hub)
