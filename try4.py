import shutil, json, torch
from pathlib import Path
from tests.training.processes import run_cases
from tests.training.test_distributed import settings_of
folder = Path("/tmp/t_bf16b"); shutil.rmtree(folder, ignore_errors=True)
cases = {}
for m in ("sft", "reward"):
    cases[f"one-{m}"] = settings_of(m, "lora", None)
    for r in ("fsdp2", "zero3", "zero2"):
        cases[f"{r}-{m}"] = settings_of(m, "lora", r) | {"mixed_precision": "bf16", "bf16": True}
try: run_cases("tests.training.distributed_cases", folder, cases, timeout=250)
except AssertionError as e: print(str(e)[-7000:])
for c in cases:
    try: print(c, [x.get("loss") for x in json.loads((folder/c/"metrics.json").read_text())])
    except FileNotFoundError: print(c, "FAILED")
