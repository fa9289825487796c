"""A bucket of Google Cloud Storage on this machine, over HTTP as its JSON API has it.

There are objects and no folders, as there: one is made by nothing, and gone with its last object.
https://cloud.google.com/storage/docs/json_api/v1
"""

import contextlib
import http.server
import importlib.util
import io
import json
import threading
import urllib.parse

import fsspec
import pytest
from etils.epath import backend


class Objects(http.server.ThreadingHTTPServer):
    """All buckets; `objects` maps "bucket/name" to (content, generation)."""

    daemon_threads = True

    def __init__(self):
        self.objects, self.generation, self.lock = {}, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def write(self, bucket, name, content):
        """Writes an object; returns what is said of it."""
        with self.lock:
            self.generation += 1
            self.objects[f"{bucket}/{name}"] = (content, self.generation)
            return _described(bucket, name, content, self.generation)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Objects

    def log_message(self, *_):
        pass

    def do_GET(self):
        where, query = self._asked()
        bucket, _, name = where.partition("/o/")
        if not name and not where.endswith("/o"):
            self._answer(200, {"kind": "storage#bucket", "id": where, "name": where})
        elif not name:
            self._answer(200, self._listing(where.removesuffix("/o"), query))
        elif (found := self._found(bucket, name)) is None:
            self._answer(404, {"error": {"code": 404, "message": "Not Found"}})
        elif query.get("alt") != "media":
            self._answer(200, _described(bucket, name, *found))
        else:
            self._send_content(*found)

    def do_POST(self):
        where, query = self._asked()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, _, name = where.partition("/o/")
        if "/rewriteTo/" in name or "/copyTo/" in name:
            source, target = name.replace("/copyTo/", "/rewriteTo/").split("/rewriteTo/b/")
            bucket_to, _, name_to = target.partition("/o/")
            copied = self._found(bucket, source)
            if copied is None:
                return self._answer(404, {"error": {"code": 404, "message": "Not Found"}})
            made = self.server.write(bucket_to, name_to, copied[0])
            return self._answer(200, {"done": True, "rewriteToken": "", "resource": made})
        bucket, name = bucket.removesuffix("/o"), query.get("name")
        if query.get("uploadType") == "multipart":
            name, content = self._parts(content)
        elif query.get("uploadType") == "resumable":
            name = name or json.loads(content)["name"]
            self.send_response(200)
            where = f"/upload/storage/v1/b/{bucket}/o?name={urllib.parse.quote(name, '')}"
            self.send_header("Location", self.server.url + where)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        expected, found = query.get("ifGenerationMatch"), self._found(bucket, name)
        if expected is not None and int(expected) != (found[1] if found else 0):
            return self._answer(412, {"error": {"code": 412, "message": "Precondition Failed"}})
        return self._answer(200, self.server.write(bucket, name, content))

    def do_PUT(self):
        where, query = self._asked()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(200, self.server.write(where.removesuffix("/o"), query["name"], content))

    def do_DELETE(self):
        bucket, _, name = self._asked()[0].partition("/o/")
        with self.server.lock:
            gone = self.server.objects.pop(f"{bucket}/{name}", None)
        self._answer(404 if gone is None else 204, None)

    def _parts(self, content):
        """Name and content of an upload in two parts."""
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
        parts = content.split(b"--" + boundary)
        described, held = (part.split(b"\n\n", 1)[1] for part in parts[1:3])
        return json.loads(described)["name"], held.removesuffix(b"\n")

    def _asked(self):
        parsed = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parsed.path).partition("/storage/v1/b/")[2]
        return path, dict(urllib.parse.parse_qsl(parsed.query))

    def _found(self, bucket, name):
        with self.server.lock:
            return self.server.objects.get(f"{bucket}/{name}")

    def _listing(self, bucket, query):
        start, delimiter = f"{bucket}/{query.get('prefix', '')}", query.get("delimiter")
        items, prefixes = [], set()
        with self.server.lock:
            objects = sorted(self.server.objects.items())
        for path, found in objects:
            if not path.startswith(start):
                continue
            head, cut, _ = path[len(start) :].partition(delimiter) if delimiter else ("", "", "")
            name = path.partition("/")[2]
            if cut:
                prefixes.add((start + head + cut).partition("/")[2])
            else:
                items.append(_described(bucket, name, *found))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _send_content(self, content, generation):
        status, asked = 200, self.headers.get("Range", "")
        length = len(content)
        if asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, length - int(last))
            stop = min(int(last) + 1, length) if first and last else length
            if start >= length:
                return self._answer(416, None)
            status, content = 206, content[start:stop]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{length}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        return self.wfile.write(content)

    def _answer(self, status, what):
        content = b"" if what is None else json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _described(bucket, name, content, generation):
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{generation}",
        "bucket": bucket,
        "name": name,
        "size": str(len(content)),
        "generation": str(generation),
        "metageneration": "1",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


@contextlib.contextmanager
def served():
    """The server, while the block runs."""
    with Objects() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class FileSystem(fsspec.AbstractFileSystem):
    """The buckets of a server, as gcsfs shows them; where that is not installed."""

    protocol, cachable, server = ("gs", "gcs"), False, None

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path).rstrip("/")
        found = {}
        for name, (content, _) in sorted(self.server.objects.items()):
            below, cut, _ = name.removeprefix(f"{path}/").partition("/")
            if name == path:
                found[name] = dict(name=name, size=len(content), type="file")
            elif name.startswith(f"{path}/"):
                kind = "directory" if cut else "file"
                size = 0 if cut else len(content)
                found[below] = dict(name=f"{path}/{below}", size=size, type=kind)
        if not found:
            raise FileNotFoundError(path)
        return [*found.values()] if detail else [x["name"] for x in found.values()]

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def _rm(self, path):
        with self.server.lock:
            self.server.objects.pop(self._strip_protocol(path), None)

    def cp_file(self, path1, path2, **_):
        self.pipe_file(path2, self.cat_file(path1))

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            if path not in self.server.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.server.objects[path][0])
        assert mode == "wb", f"gcsfs has no mode {mode}"
        return _Written(self.server, path)


class _Written(io.BytesIO):
    def __init__(self, server, path):
        super().__init__()
        self._server, self._path = server, path

    def close(self):
        if not self.closed:
            bucket, _, name = self._path.partition("/")
            self._server.write(bucket, name, self.getvalue())
        super().close()


@contextlib.contextmanager
def in_reach():
    """A server that `gs://` leads to: of tensorstore by its own driver, else by gcsfs if there."""
    with served() as server, pytest.MonkeyPatch.context() as patched:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patched.setenv(name, server.url)
        patched.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        if importlib.util.find_spec("gcsfs") is None:
            from orbax.checkpoint._src.path import gcs_utils

            patched.setattr(FileSystem, "server", server)
            patched.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: FileSystem())
            # It asks google-cloud-storage, which comes with gcsfs.
            patched.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        yield server
