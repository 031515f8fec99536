#!/usr/bin/env python3
"""A pretend cloud: prints every message of every batch that the gateway sends, and says "stored". Usage: backend.py [PORT]"""

import http.server
import json
import sys


class Cloud(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for line in body.splitlines():
            event = json.loads(line)
            print(event["id"], event["time"], event.get("data", event.get("data_base64")), flush=True)
        self.answer(204)

    def do_GET(self):
        self.answer(204)

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


port = int(sys.argv[1]) if len(sys.argv) > 1 else 3001
http.server.ThreadingHTTPServer(("127.0.0.1", port), Cloud).serve_forever()
