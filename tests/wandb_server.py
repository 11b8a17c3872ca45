"""As much of W&B's server as its client needs to send a run: what it was sent, kept in memory."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Store:
    """Runs by id.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.summary: dict[str, dict[str, Any]] = {}

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Rows of the history, in order of their lines."""
        return [row for _, row in sorted(self.history[run_id].items())]

    def stream(self, run_id: str, files: dict[str, Any]) -> None:
        """Take lines of a run's files at their offsets."""
        part = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for line, text in enumerate(part["content"], start=part["offset"]):
            self.history[run_id][line] = json.loads(text)
        for text in files.get("wandb-summary.json", {"content": []})["content"]:
            self.summary[run_id] = json.loads(text)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Answer a question of the client; None for one that no run depends on."""
        run_id = variables.get("name", "")
        project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
        bucket = {"id": f"U{run_id}", "name": run_id, "displayName": run_id, "project": project}
        if "upsertBucket" in query:
            new = run_id not in self.history
            self.history.setdefault(run_id, {})
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "historyTail" in query:
            rows = self.rows(run_id) if run_id in self.history else None
            return {"model": {**project, "bucket": None if rows is None else bucket | {
                "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
                "eventsTail": "[]", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}',
                "summaryMetrics": json.dumps(self.summary.get(run_id, {})),
            }}}  # fmt: skip
        if "viewer" in query:
            return {"viewer": {"id": "V", "entity": "e", "username": "u", "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/up"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "U", "uploadHeaders": [], "files": files}}
        return None


@contextmanager
def served() -> Iterator[Store]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_PUT(self) -> None:
            self._body()
            self._send({})

        def do_POST(self) -> None:
            asked = json.loads(self._body())
            if self.path.endswith("/file_stream"):
                store.stream(self.path.split("/")[-2], asked.get("files") or {})
                self._send({})
                return
            data = store.answer(asked["query"], asked.get("variables") or {})
            self._send({"data": data} if data else {"errors": [{"message": "not served"}]})

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            packed = self.headers.get("content-encoding") == "gzip"
            return gzip.decompress(body) if packed else body

        def _send(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store = Store(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
