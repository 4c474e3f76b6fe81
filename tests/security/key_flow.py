"""A whole flow and failing runs with keys in the environment, against a service that tells them.

    python tests/security/key_flow.py FOLDER MODEL

Everything that is printed goes into FOLDER too, so that one search finds a key wherever it went.
"""

import contextlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEYS = {
    "ANTHROPIC_API_KEY": "sk-ant-api03-SECRETanthropicSECRETanthropic",
    "OPENAI_API_KEY": "sk-proj-SECRETopenaiSECRETopenaiSECRET0",
    "HF_TOKEN": "hf_SECRETtokenSECRETtokenSECRETtoken12",
    "AWS_SECRET_ACCESS_KEY": "SECRETawsSECRETawsSECRETawsSECRETaws/1",
    "WANDB_API_KEY": "SECRETwandbSECRETwandbSECRETwandb0000000",
}
MODES = ("answers", "401", "400", "500", "page", "half")


class Service(BaseHTTPRequestHandler):
    """Anthropic's and OpenAI's messages; in other modes than "answers" it quotes all headers."""

    mode = "answers"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply(404, {"error": {"type": "not_found_error", "message": "no such page"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = self.headers.get("x-api-key") or self.headers.get("authorization")
        told = f"your key is {key}; you sent {dict(self.headers)}"
        if self.mode == "answers":
            from prefopt.testing.answers import prefer_longer

            asked = {"messages": [m for m in body["messages"] if m["role"] == "user"]}
            self.reply(200, self.message(prefer_longer(asked), body))
        elif self.mode == "page":
            self.send(200, f"<html>{told}</html>".encode())
        elif self.mode == "half":
            self.send(200, json.dumps({"content": told}).encode()[:-1])
        else:
            error = {"type": "authentication_error", "code": "invalid_api_key", "message": told}
            self.reply(int(self.mode), {"type": "error", "error": error})

    def message(self, text, body):
        if "chat/completions" in self.path:
            choice = {"role": "assistant", "content": text}
            return {
                "id": "c", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "message": choice, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18},
            }  # fmt: skip
        return {
            "id": "m", "type": "message", "role": "assistant", "model": body["model"],
            "content": [{"type": "text", "text": text}], "stop_reason": "end_turn",
            "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 9},
        }  # fmt: skip

    def reply(self, status, value):
        self.send(status, json.dumps(value).encode())

    def send(self, status, content):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main(folder, model):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    os.environ |= KEYS
    os.environ |= {"ANTHROPIC_BASE_URL": address, "ANTHROPIC_LOG": "debug", "OPENAI_LOG": "debug"}

    import asyncio
    import logging

    waits = asyncio.sleep
    asyncio.sleep = lambda seconds, result=None: waits(min(seconds, 0.01), result)
    logging.basicConfig(level=logging.DEBUG)  # as someone who looks for a fault has it
    import prefopt.judges.openai
    from prefopt.cli import main as command

    prefopt.judges.openai.OPENAI_URL = f"{address}/v1"  # in place of its own, which gets the key
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(10)))
    sampled = folder / "answers.jsonl"
    small = ["--sampling.max_new_tokens", "8", "--model", model, "--prompts", str(prompts)]
    judge = ["--judge", "anthropic:claude-sonnet-5-5", "--max_usd", "5"]
    codes = {}
    codes["run"] = command(
        ["run", "--out", str(folder / "run"), "--k", "2", "--held_out", "4", *small, *judge,
         "--dpo.epochs", "1", "--dpo.max_length", "128", "--lora.r", "2"]
    )  # fmt: skip
    codes["sample"] = command(["sample", "--out", str(sampled), "--k", "2", *small])
    prices = folder / "prices.json"
    price = dict.fromkeys(
        ("input_usd_per_mtok", "output_usd_per_mtok", "cache_read_usd_per_mtok",
         "cache_write_usd_per_mtok"), 1.0,
    )  # fmt: skip
    prices.write_text(json.dumps({"gpt": price}))
    for mode in MODES:
        Service.mode = mode
        for name in ("anthropic:claude-sonnet-5-5", "openai:gpt"):
            out = folder / f"{mode}-{name.partition(':')[0]}"
            codes[out.name] = command(
                ["judge", "label", "--candidates", str(sampled), "--out", str(out), "--judge", name,
                 "--max_usd", "5", *(["--prices", str(prices)] if name == "openai:gpt" else [])]
            )  # fmt: skip
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    with (out / "printed.txt").open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.suppress(SystemExit):
            main(out, sys.argv[2])
