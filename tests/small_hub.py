"""A hub of a few folders, served on the loopback: the endpoints that huggingface_hub uses, and no more."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SmallHub:
    """Serves `folders` by their names, each at the revisions `main` and `COMMIT`.

    Attributes:
        folders: name of a repository -> its folder.
        revisions: the known revisions.
        sent: names of the files that were requested, in order.
        cut: file -> number of bytes after which the connection is closed.
        status: status of every answer.
    """

    def __init__(self, folders):
        self.folders = {name: pathlib.Path(folder) for name, folder in folders.items()}
        self.revisions = {"main", COMMIT}
        self.sent, self.cut, self.status = [], {}, 200
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self):
        """May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request, body):
        path = urllib.parse.unquote(request.path.partition("?")[0])
        in_api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?", path)
        in_file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repository, revision = (in_api[1], in_api[3]) if in_api else in_file.groups()[:2] if in_file else ("", "")
        if self.status != 200:
            self._refuse(request, self.status, "")
        elif repository not in self.folders:
            self._refuse(request, 404, "RepoNotFound")
        elif revision not in self.revisions:
            self._refuse(request, 404, "RevisionNotFound")
        elif in_api:
            self._say(request, in_api[2], self.folders[repository])
        else:
            self._send(request, self.folders[repository], in_file[3], body)

    def _refuse(self, request, status, code):
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _say(self, request, what, folder):
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        sizes = {name: (folder / name).stat().st_size for name in names}
        if what == "revision":
            reply = {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        else:
            reply = [
                {"type": "file", "path": name, "size": sizes[name], "oid": _digest(folder / name)} for name in names
            ]
        data = json.dumps(reply).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _send(self, request, folder, name, body):
        if not (folder / name).is_file():
            self._refuse(request, 404, "EntryNotFound")
            return
        data = (folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        request.send_response(206 if first else 200)
        request.send_header("ETag", f'"{_digest(folder / name)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        if first:
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - first))
        request.end_headers()
        if body:
            self.sent.append(name)
            request.wfile.write(data[first : self.cut.get(name, len(data))])
            request.close_connection = True


def _digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(folders):
    """Runs a small hub until the block ends."""
    hub = SmallHub(folders)
    try:
        yield hub
    finally:
        hub.close()
