"""A local endpoint that serves folders as the Hugging Face hub's API does: what `huggingface_hub` asks for."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(root: Path, token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serves `root/owner/name/*` as repositories at `COMMIT`; gives the address and the paths asked for.

    Repositories named `private` are there for those alone who send the token.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            asked.append(self.path)
            path = self.path.partition("?")[0].strip("/").split("/")
            names = path[2:] if path[:2] == ["api", "models"] else path
            folder = root.joinpath(*names[:2])
            hidden = names[1:2] == ["private"] and self.headers["Authorization"] != f"Bearer {token}"
            if len(names) < 2 or hidden or not folder.is_dir():
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            revision = names[3] if len(names) > 3 else "main"
            if revision not in ("main", "v1", COMMIT):
                return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            files = sorted(file for file in folder.iterdir())
            if path[0] == "api" and "tree" in names:
                rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                return self.answer(json.dumps(rows).encode(), Content_Type="application/json")
            if path[0] == "api":
                siblings = [{"rfilename": file.name} for file in files]
                about = {"id": "/".join(names[:2]), "sha": COMMIT, "siblings": siblings, "private": False}
                return self.answer(json.dumps(about).encode(), Content_Type="application/json")
            file = folder / names[-1]
            if not file.is_file():
                return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
            body = file.read_bytes()
            self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
