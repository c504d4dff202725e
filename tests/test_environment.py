"""The process that a command computes in: its memory, its cache of programs, and what it keeps."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import ROOT

from scripts import cpu_devices, environment, processor, program_cache, xla_loops
from train import cores
from train.config import TrainConfig

# What a command may be: started with options of Python, arguments, a module path and a stdin.
COMMAND = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from scripts.environment import describe_process, prepare_process
prepare_process(__name__)
import json, os
assert "jax" not in sys.modules
found = {{"pid": os.getpid(), "argv": sys.argv[1:], "utf8": sys.flags.utf8_mode,
         "stdin": sys.stdin.read(), "said": describe_process(), "environ": dict(os.environ)}}
if sys.argv[1:] == ["compute"]:
    import jax
    found["result"] = float(jax.jit(lambda x: (x * 3).sum())(jax.numpy.arange(5.0)))
print(json.dumps(found))
"""
OURS = ("GLIBC_TUNABLES", environment.SWITCH, program_cache.SWITCH)
KEPT = (
    "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.top_pad=268435456"
)
HUGE_PAGES = f"glibc.malloc.hugetlb=1:{KEPT}"

linux = pytest.mark.skipif(not environment._has_huge_pages(), reason="no huge pages to ask for")


@pytest.fixture
def start(tmp_path):
    """Starts the command above as a user's shell would; gives what it saw, and its stderr."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)

    def start(*argv, **changes):
        clean = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("JAX_")}
        settings = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", **changes}
        with subprocess.Popen(
            [sys.executable, "-X", "utf8", script, *argv], env={**clean, **settings}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            out, err = process.communicate("from stdin", timeout=60)
        assert process.returncode == 0, err
        found = json.loads(out)
        assert found["pid"] == process.pid
        return found, err

    return start


@linux
def test_a_command_starts_itself_once_more_and_keeps_all_it_was_given(start):
    found, err = start("a b", "--c=1", PYTHONPATH="/somewhere")
    assert found["environ"]["GLIBC_TUNABLES"] == HUGE_PAGES
    assert (found["argv"], found["utf8"], found["stdin"]) == (["a b", "--c=1"], 1, "from stdin")
    assert found["environ"]["PYTHONPATH"] == "/somewhere"
    assert "huge pages for malloc (EQX_GPT_ALLOCATOR=off: none)" in found["said"]
    assert err == ""


@linux
@pytest.mark.parametrize(("n_embd", "kept"), [(257, True), (256, False)])
def test_what_a_thread_frees_stays_where_steps_allocate_much(n_embd, kept):
    code = f"""
import ctypes, resource, sys, threading
sys.path[:0] = [{str(ROOT)!r}]
from scripts.cpu_devices import prepare_training
from train.config import TrainConfig
prepare_training(TrainConfig(n_embd={n_embd}, n_head=1))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
def use():
    n = ctypes.c_size_t(2**28)
    p = ctypes.c_void_p(libc.malloc(n))
    libc.memset(p, 1, n)
    libc.free(p)
def faults():
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
print(faults() - first)
"""
    settings = {"GLIBC_TUNABLES": environment.TUNABLES, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **settings}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    n_fault = int(done.stdout)
    assert n_fault < 50 if kept else n_fault > 100  # of huge pages, of 2 MiB, there are 128


WIDE = "--xla_cpu_prefer_vector_width=512"
OPTIONS = "--xla_backend_extra_options"
SEVERAL = "xla_cpu_use_multi_output_fusion=true"


@pytest.mark.skipif(not processor.has_512_bits(), reason="no registers of 512 bits")
@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"XLA_FLAGS": ""}, WIDE),
        ({"XLA_FLAGS": "--xla_x=1"}, f"--xla_x=1 {WIDE}"),
        (
            {"XLA_FLAGS": "--xla_cpu_prefer_vector_width=128"},
            "--xla_cpu_prefer_vector_width=128",
        ),
        ({"XLA_FLAGS": "", "JAX_PLATFORMS": "cuda,cpu"}, ""),
    ],
)
def test_xla_is_told_of_wide_vectors_unless_the_user_has_a_say(start, given, flags):
    assert start(**given)[0]["environ"].get("XLA_FLAGS", "") == flags


@pytest.mark.parametrize(
    ("optimizer", "platforms", "given", "flags"),
    [
        ("adamw", "cpu", "", f"{OPTIONS}={SEVERAL}"),
        ("muon", "cpu", "--xla_x=1", f"--xla_x=1 {OPTIONS}={SEVERAL}"),
        ("adamw", "cpu", f"{OPTIONS}=x=1 --xla_y=2", f"{OPTIONS}=x=1,{SEVERAL} --xla_y=2"),
        ("adamw", "cpu", f"{OPTIONS}={SEVERAL[:-4]}false", f"{OPTIONS}={SEVERAL[:-4]}false"),
        ("adafactor", "cpu", "", ""),  # it would take memory
        ("adamw", "cuda", "", ""),
    ],
)
def test_loops_have_several_results(monkeypatch, optimizer, platforms, given, flags):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    xla_loops.prepare_optimizer(optimizer)
    assert os.environ["XLA_FLAGS"] == flags


@pytest.mark.parametrize(
    ("changes", "given", "n"),
    [
        ({}, "", 4),
        ({"batch_size": 16}, "", 4),  # the most
        ({"batch_size": 9}, "", 3),  # four do not divide it
        ({"micro_batch_size": 3}, "", 1),  # and its 384 tokens are too few
        ({"block_size": 64}, "", 3),  # 768 tokens: 256 each
        ({"block_size": 32}, "", 1),
        ({"n_embd": 768}, "", 1),
        ({"optimizer": "muon"}, "", 1),
        ({"mesh": "data=1"}, "", 1),
        ({"init_from": "gpt2"}, "", 1),
        ({}, "--xla_force_host_platform_device_count=7", 7),
    ],
)
def test_cores_are_devices_for_small_models(monkeypatch, changes, given, n):
    fields = {"batch_size": 12, "gradient_accumulation_steps": 1, "block_size": 128, "n_embd": 384}
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    cpu_devices.prepare_training(dataclasses.replace(TrainConfig(), **{**fields, **changes}))
    found = re.search(r"device_count=(\d+)", os.environ["XLA_FLAGS"])
    assert n == (1 if found is None else int(found[1]))


@pytest.mark.parametrize("given", ["", "--xla_disable_hlo_passes=dce,cse"])
def test_in_one_of_several_processes_cores_stay_together_and_sums_apart(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    config = TrainConfig(n_embd=128, batch_size=12)
    cpu_devices.prepare_training(config, alone=False)
    flags = os.environ["XLA_FLAGS"].split()
    assert not any("device_count" in flag for flag in flags)
    assert flags[-1] == "--xla_disable_hlo_passes=cpu-all-reduce-combiner"
    assert given in flags or not given


@pytest.mark.parametrize(
    ("command", "computing"),
    [("train.py", "with_chosen_batch(config"), ("plan.py", "from train.plan import")],
)
def test_flags_are_set_before_anything_computes(command, computing):
    text = (ROOT / "scripts" / command).read_text()
    assert text.index("prepare_training(config") < text.index(computing)
    if command == "train.py":  # which may start threads
        assert text.index("prepare_training(config") < text.index("open_data(wishes")


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [(-8, 1)]),
        ({"EQX_GPT_ALLOCATOR": "off"}, []),
        ({"GLIBC_TUNABLES": f"{environment.TUNABLES}:glibc.malloc.arena_max=3"}, []),
        ({"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, []),
        ({"libc": "musl"}, []),
    ],
    ids=str,
)
def test_arenas_are_the_users_and_glibcs(monkeypatch, changes, calls):
    said = []
    libc = SimpleNamespace(mallopt=lambda *args: said.append(args))
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(environment, "_has_huge_pages", lambda: "libc" not in changes)
    settings = {"GLIBC_TUNABLES": environment.TUNABLES, "EQX_GPT_ALLOCATOR": "set", **changes}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    environment.keep_what_threads_free()
    assert said == calls


@linux
@pytest.mark.parametrize(
    ("given", "tunables"),
    [
        ({"EQX_GPT_ALLOCATOR": "off"}, None),
        ({"JAX_PLATFORMS": "cuda,cpu"}, None),
        ({"JAX_PLATFORMS": "tpu"}, None),
        ({"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}, f"glibc.malloc.perturb=1:{HUGE_PAGES}"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, f"glibc.malloc.hugetlb=0:{KEPT}"),
    ],
    ids=str,
)
def test_the_user_and_the_device_decide(given, tunables, start):
    found, _ = start(**given)
    assert found["environ"].get("GLIBC_TUNABLES") == tunables


def test_importing_changes_nothing(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = dict(os.environ)
    environment.prepare_process("scripts.train")
    assert dict(os.environ) == before


def test_an_accelerator_needs_its_device_and_its_plugin(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(processor, "_ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr(processor.importlib.util, "find_spec", lambda name: None)
    assert processor.computes_on_cpu()
    monkeypatch.setattr(processor.importlib.util, "find_spec", lambda name: object())
    assert not processor.computes_on_cpu()
    (tmp_path / "nvidia0").unlink()
    assert processor.computes_on_cpu()


def test_where_programs_are_kept(start, tmp_path):
    found, _ = start()
    place = Path(found["environ"]["JAX_COMPILATION_CACHE_DIR"])
    assert place.parent == tmp_path / "cache" / "eqx_gpt"
    assert place.stat().st_mode & 0o077 == 0
    assert str(place) in found["said"]
    assert int(found["environ"]["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 2 * 2**30


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"EQX_GPT_COMPILATION_CACHE": "off"}, None),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
        ({"XDG_CACHE_HOME": "/dev/null"}, None),  # nothing can be made there
    ],
    ids=str,
)
def test_programs_are_not_kept_there(given, place, start):
    found, err = start("compute" if place is None else "", **given)
    assert found["environ"].get("JAX_COMPILATION_CACHE_DIR") == place
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in found["environ"]
    assert err == ""


def test_damaged_programs_are_compiled_again(start, tmp_path):
    place = Path(start("compute")[0]["environ"]["JAX_COMPILATION_CACHE_DIR"])
    whole, *others = sorted(place.glob("*-cache"))
    assert others, "two programs at least"
    for entry in (whole, *others):
        entry.write_bytes(entry.read_bytes()[:50])
    for entry in others:  # as a killed process leaves them
        entry.with_name(entry.name.replace("-cache", "-atime")).unlink()
        os.utime(entry, (0, 0))
    found, err = start("compute")
    assert found["result"] == 30
    assert err.count("Error reading persistent compilation cache entry") == 1
    assert all(len(entry.read_bytes()) > 50 for entry in others)


def test_the_second_start_compiles_nothing(start):
    logged = {"JAX_LOG_COMPILES": "1", "JAX_EXPLAIN_CACHE_MISSES": "1"}
    with ThreadPoolExecutor() as at_once:
        first = list(at_once.map(lambda _: start("compute", **logged), range(2)))
    assert sum(err.count("PERSISTENT COMPILATION CACHE MISS") for _, err in first) >= 2
    assert not any("Error" in err for _, err in first)
    found, err = start("compute", **logged)
    assert found["result"] == 30
    assert err.count("Persistent compilation cache hit") >= 2
    assert "PERSISTENT COMPILATION CACHE MISS" not in err
