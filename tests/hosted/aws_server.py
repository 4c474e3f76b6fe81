"""moto's server on a local port, with what it lacks of Bedrock, and faults to order.

moto keeps customization jobs and S3 objects. It has no list of foundation models, takes a job's
name twice for an error whatever the token, and never lets a job end by itself; `models`, `hidden`,
`before_create`, `after_create` and `ends` add these.
"""

from __future__ import annotations

import json
import threading
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server

HAIKU = "anthropic.claude-3-haiku-20240307-v1:0:200k"


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class AWSServer:
    """A context manager; `url` is what AWS_ENDPOINT_URL is set to."""

    def __init__(self) -> None:
        # Here: 2 s that every process which collects the tests would pay.
        from moto.backends import get_backend
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.backends = get_backend
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.models = [HAIKU]
        self.created: list[dict[str, Any]] = []
        self.hidden = 0
        self.before_create: Any = lambda: None
        self.after_create: Any = lambda: None
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> AWSServer:
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def jobs(self) -> dict[str, Any]:
        """moto's jobs by name."""
        found: dict[str, Any] = {}
        for regions in self.backends("bedrock").values():
            for backend in regions.values():
                found |= backend.model_customization_jobs
        return found

    def ends(self, name: str, status: str, failure: str = "") -> None:
        """Let a job end."""
        self.jobs[name].status = status
        self.jobs[name].failure_message = failure

    def reset(self) -> None:
        """Forget all jobs and objects."""
        for service in ("bedrock", "s3"):
            for regions in self.backends(service).values():
                regions.reset()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/foundation-models":
            models = [
                {
                    "modelId": model,
                    "modelArn": f"arn:aws:bedrock:us-west-2::foundation-model/{model}",
                    "providerName": "Anthropic",
                    "modelLifecycle": {"status": "LEGACY", "endOfLifeTime": "2030-01-31T00:00:00Z"},
                }
                for model in self.models
            ]
            return self._say(start_response, "200 OK", {"modelSummaries": models})
        if path.startswith("/model-customization-jobs/") and method == "GET" and self.hidden > 0:
            self.hidden -= 1
            start_response(
                "404 Not Found",
                [("x-amzn-errortype", "ResourceNotFoundException")],
            )
            return [b'{"message": "not there yet"}']
        if path == "/model-customization-jobs" and method == "POST":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            self.created.append(json.loads(body))
            self.before_create()
            import io

            environ["wsgi.input"] = io.BytesIO(body)
            said = list(self.moto(environ, start_response))
            self.after_create()
            return said
        return self.moto(environ, start_response)

    @staticmethod
    def _say(start_response: Any, status: str, body: Any) -> list[bytes]:
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]
