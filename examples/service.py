"""First tokens over HTTP, from every rank: one process per rank, each with a port of its own.

    pipemoe run -n 2 examples/service.py path/to/checkpoint 8000
    curl -d '{"tokens": [3, 1, 4]}' localhost:8000/first_token        # rank 0; rank 1 listens on 8001
    curl localhost:8000/statistics

Put any balancer in front. SIGTERM, or Ctrl-C, lets a rank answer what it has and then leave; until all ranks have been
told, it goes on computing its experts for the others.
"""

import json
import signal
import sys
import threading
from concurrent.futures import CancelledError, TimeoutError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pipemoe
from pipemoe.errors import FatalError, InputError, QueueFull

SECONDS = 60  # that a request may take


class Handler(BaseHTTPRequestHandler):
    engine: pipemoe.Engine

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/first_token":
            return self.answer(404, {"error": "POST /first_token, GET /statistics"})
        try:
            asked = json.loads(body)
            future = self.engine.submit(asked["tokens"], asked.get("priority", 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            return self.answer(400, {"error": 'give JSON like {"tokens": [3, 1, 4]}'})
        except QueueFull as error:
            return self.answer(503, {"error": str(error)})
        try:
            first = future.result(SECONDS)
        except InputError as error:
            return self.answer(400, {"error": str(error)})
        except (TimeoutError, CancelledError):
            future.cancel()  # nothing more is computed for it
            return self.answer(504, {"error": f"no first token within {SECONDS} s"})
        except FatalError as error:
            return self.answer(500, {"error": str(error)})
        self.answer(200, {"token": first.token, "ms": round(1e3 * (first.first_token - first.queued), 3)})

    def do_GET(self) -> None:
        if self.path != "/statistics":
            return self.answer(404, {"error": "POST /first_token, GET /statistics"})
        self.answer(200, self.engine.statistics())

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main(path: str, port: str) -> None:
    world = pipemoe.init()
    model = pipemoe.load_model(path, world)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with pipemoe.Engine(model) as engine:
        Handler.engine = engine
        server = ThreadingHTTPServer(("", int(port) + world.rank), Handler)
        server.daemon_threads = False  # so that server_close waits until every answer has been sent
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"rank {world.rank}: http://localhost:{server.server_port}", flush=True)
        stop.wait()
        server.shutdown()  # takes no new connections; those that wait are answered
        engine.drain()
    server.server_close()


if __name__ == "__main__":
    main(*sys.argv[1:])
