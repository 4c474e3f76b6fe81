import sys, json, shutil, torch, os
from pathlib import Path
from tests.training.processes import run_cases
from tests.training.test_distributed import settings_of
folder = Path("/tmp/t_further"); shutil.rmtree(folder, ignore_errors=True)
os.environ["PREFOPT_CACHE"] = str(folder / "cache")
cases = {"one-lora": settings_of("dpo", "lora", None), "one-full": settings_of("dpo", "full", None)}
for r in sys.argv[1:]:
    for k, more in {"pre": {"precompute_ref_log_probs": True}, "prefull": {"precompute_ref_log_probs": True, "tune": "full"}, "acc": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}, "ckpt": {"gradient_checkpointing": True}}.items():
        cases[f"{k}-{r}"] = settings_of("dpo", "lora", r) | more
try: run_cases("tests.training.distributed_cases", folder, cases, timeout=500)
except AssertionError as e: print(str(e)[-7000:])
for c, s in cases.items():
    try: a = torch.load(folder / c / "weights.pt"); b = torch.load(folder / f"one-{s['tune']}" / "weights.pt")
    except FileNotFoundError: print(c, "FAILED"); continue
    print(c, max(float((a[n]-b[n]).norm() / max(float(b[n].norm()), 1e-3)) for n in b))
