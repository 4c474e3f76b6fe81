"""Trainings in several processes on this machine, as `accelerate launch` would start them.

`run_cases` starts a module of cases once, which imports the libraries and calls `fork_cases`; every
case is then forked from it, as importing takes longer than to train.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

_HANGS_AFTER_S = 60
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def run_cases(module, folder, cases, *, timeout=300):
    """Train every case by `python -m module folder cases`; raises AssertionError with what failed.

    Args:
        module: whose main calls `fork_cases`.
        folder: each case gets the folder of its name in it.
        cases: settings by name. Of the settings, `recipe` names a file of recipes/accelerate (None is
            none) and `processes` says how many; the others are the module's.
        timeout: seconds for all of them.
    """
    folder.mkdir(exist_ok=True, parents=True)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, str(folder), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # those it forked too
    assert process.returncode == 0, said


def fork_cases(train):
    """Call `train(folder, settings)` for the cases on the command line, each in its processes."""
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  # which accelerate imports; here once, not in every process
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    failed = []
    for name, settings in cases.items():
        (folder / name).mkdir(exist_ok=True)
        if not _forked(train, folder / name, settings):
            logs = sorted((folder / name).glob("said*.txt"))
            failed.append("\n".join([name, *(log.read_text()[-6000:] for log in logs)]))
    print("\n\n".join(failed))
    sys.exit(bool(failed))


def _forked(train, folder, settings):
    """Whether all processes of a case ended well."""
    settings = dict(settings)
    recipe, n = settings.pop("recipe", None), settings.pop("processes", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            _in_process(train, folder, settings, recipe, rank, n, port)
        children.append(child)
    well = True
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and well:
            well = False
            for other in children:  # which would wait for the one that failed
                os.kill(other, signal.SIGKILL)
    return well


def _in_process(train, folder, settings, recipe, rank, n, port):
    log = os.open(folder / f"said{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    faulthandler.dump_traceback_later(_HANGS_AFTER_S, exit=True)
    try:
        if n > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            set_launch_environment(recipe or "ddp", n, settings.pop("mixed_precision", "no"))
        train(folder, settings)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def set_launch_environment(recipe, n, mixed_precision="no"):
    """What `accelerate launch --config_file recipes/accelerate/<recipe>.yaml` tells its processes.

    The very file, but for the number of processes, the precision and the CPU.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    flags = [
        "--num_processes",
        str(n),
        "--mixed_precision",
        mixed_precision,
        "--main_process_port",
        "0",
    ]
    config = ["--config_file", str(RECIPES / f"{recipe}.yaml")]
    args = launch_command_parser().parse_args([*config, *flags, "none.py"])
    args, defaults, _ = _validate_launch_command(args)
    address = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        os.environ |= prepare_deepspeed_cmd_env(args)[1] | address
    else:
        os.environ |= prepare_multi_gpu_env(args) | address
    if args.use_deepspeed:
        from deepspeed.comm import comm

        # It compiles for minutes, and gloo does without.
        sys.modules[comm.TorchBackend.__module__].build_shm_op = lambda: None
    if args.use_deepspeed or args.use_fsdp:
        _take_cpus_for_gpus()
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"


def _take_cpus_for_gpus():
    """accelerate shards on GPUs only, though PyTorch and DeepSpeed do on CPUs too, over gloo."""
    import torch
    import transformers.training_args
    from accelerate.state import DistributedType, PartialState

    def set_device(state):
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
