"""scripts/bench.py: what it counts, how it survives its contenders, what it prints."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import command, make_dataset, run

import eqx_gpt
from eqx_gpt import AttentionConfig, GPTConfig, MLPConfig, NormConfig, PositionConfig
from scripts.benchmarks import checkpoints, growth, serve, startup
from scripts.benchmarks.job import Contender, Job, to_json
from scripts.benchmarks.models import subject_of
from scripts.benchmarks.peers import peers_of
from scripts.benchmarks.table import records, table
from scripts.benchmarks.timing import Result, compare
from scripts.benchmarks.worker import SERVE, Round, Worker, WorkerError

FAKE = """
import os, signal, sys
from scripts.benchmarks.serve import Prepared

def prepare(job, settings):
    print("a library that talks on stdout")
    if "refuses" in settings:
        raise ValueError(settings["refuses"])
    def run(n):
        if settings.get("log"):
            with open(settings["log"], "a") as log:
                log.write(settings["name"])
        settings["calls"] = settings.get("calls", 0) + 1
        if settings.get("dies_at") == settings["calls"]:
            print("last words", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGKILL)
        return n * settings.get("seconds", 1.0), n * 6
    return Prepared(run, {"pid": os.getpid(), "tuned": os.environ.get("GLIBC_TUNABLES")})
"""

TINY = GPTConfig(block_size=13, vocab_size=17, n_layer=2, n_head=2, n_embd=12)
LLAMA = GPTConfig(
    *(13, 17, 2, 4, 24),
    norm=NormConfig("rmsnorm", bias=False),
    position=PositionConfig("rope"),
    attention=AttentionConfig(2, qkv_bias=False, out_bias=False),
    mlp=MLPConfig("gated", "silu", 29, bias=False),
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes contenders whose times are given."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def make(name="fake", *, tuned=False, **settings):
        return Contender(name, "fake", {"name": name, **settings}, tuned)

    return make


JOB = Job("train", TINY.to_dict(), round_seconds=1e-9)


def test_a_worker_answers_and_is_gone_afterwards(fake):
    with Worker(fake(seconds=2.0), JOB) as worker:
        pid = worker.facts["pid"]
        assert worker.facts["tuned"] is None
        found = worker.round()
        assert (found.seconds, found.amount, found.repeats, found.rate) == (2.0, 6, 1, 3.0)
        assert found.memory is None or found.memory > 2**20
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_fails_says_why(fake):
    with pytest.raises(
        WorkerError, match=r"fake failed: ValueError in fake\.py:\d+: no such shape"
    ):
        Worker(fake(refuses="no such shape"), JOB)
    with pytest.raises(WorkerError, match=r"fake died: killed by SIGKILL.*memory; .*last words"):
        Worker(fake(dies_at=1), JOB)
    with (
        Worker(fake(dies_at=3), JOB) as worker,
        pytest.raises(WorkerError, match="killed by SIGKILL"),
    ):
        worker.round()


def test_a_worker_ends_with_its_parent(fake):
    with subprocess.Popen(
        [sys.executable, str(SERVE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdin.write(to_json(fake(), JOB) + "\n")
        process.stdin.flush()
        assert "pid" in json.loads(process.stdout.readline())
        process.stdin.close()
        assert process.wait(timeout=30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator's settings are glibc's")
def test_only_tuned_contenders_get_our_environment(fake, monkeypatch):
    monkeypatch.delenv("EQX_GPT_ALLOCATOR", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with Worker(fake(tuned=True), JOB) as worker:
        assert "hugetlb=1" in worker.facts["tuned"]
        assert worker.round().amount == 6


def test_rounds_alternate_and_the_ratio_is_of_the_medians(fake, tmp_path):
    log = str(tmp_path / "log")
    ours, peer = fake("a", seconds=1.0, log=log), fake("b", seconds=2.5, log=log)
    results = compare(ours, [fake("x", refuses="no"), peer], JOB, 3, lambda _: None)
    assert (tmp_path / "log").read_text() == "aabb" * 4  # one to warm up, each
    assert [r.contender.name for r in results] == ["a", "x", "b"]
    assert results[1].error == "x failed: ValueError in fake.py:8: no"
    assert results[2].ratio == 2.5
    assert results[2].ratios == [2.5] * 3
    assert (results[0].rate, results[0].seconds, len(results[0].rounds)) == (6.0, 1.0, 3)
    with pytest.raises(WorkerError, match=r"a failed: ValueError in fake\.py:8: ours"):
        compare(fake("a", refuses="ours"), [peer], JOB, 1, lambda _: None)


def test_flops_and_shares():
    """GPT-2 124M: 6 N + 12 L d T, of N = 124,439,808, at T = 1024."""
    facts = {"params": 124_439_808, "dtype": "bfloat16", "flops_per_token": 859_886_592.0}
    beside = [Round(1.0, 500.0, 1, None)]
    results = [
        Result(Contender("ours", "m", {}, True), [Round(2.0, 1000.0, 4, 7)], facts, []),
        Result(Contender("peer", "m", {"precision": "float32"}), [Round(1, 250, 1, 5)], {}, beside),
        Result(Contender("broken", "m"), [], {}, [], "broken died"),
    ]
    peaks = {"float32_flops": 4e11, "bfloat16_flops": 8e11, "read_bytes_per_s": 4e10}
    ours, peer, broken = records(results, Job("train"), peaks)
    assert ours["tokens_per_s"] == 500
    assert ours["seconds"] == 0.5
    assert ours["flops_per_s"] == 500 * 859_886_592.0
    assert ours["share_of_matmul_peak"] == pytest.approx(500 * 859_886_592 / 8e11)
    assert peer["share_of_matmul_peak"] == pytest.approx(250 * 859_886_592 / 4e11)
    assert (peer["ours_is_faster"], peer["ours_is_faster_range"]) == (2.0, [2.0, 2.0])
    assert broken == {"name": "broken", "tuned": False, "error": "broken died"}
    assert table("title", [ours, peer, broken]).row_count == 3

    facts = {"bytes_per_token": 1e8, "flops_per_token": 1.0}
    decoded = [Result(Contender("ours", "m"), [Round(1, 200, 1, None)], facts, [])]
    (row,) = records(decoded, Job("decode"), peaks)
    assert row["share_of_memory_bandwidth"] == pytest.approx(200 * 1e8 / 4e10)
    assert "share_of_matmul_peak" not in row


@pytest.mark.parametrize(
    ("task", "config"), [("train", TINY), ("prefill", LLAMA), ("decode", TINY)]
)
def test_our_tasks_count_what_they_do(task, config, quick_compilation):
    from scripts.benchmarks import ours

    job = Job(task, config.to_dict(), batch_size=3, seq=5, new_tokens=4 * (task == "decode"))
    prepared = ours.prepare(job, {"precision": "float32"})
    seconds, amount = prepared.run(2)
    assert amount == 2 * 3 * (4 if task == "decode" else 5)
    assert task == "decode" or seconds > 0
    model = eqx_gpt.GPT.init(config, key=jax.random.key(0))
    in_blocks = eqx_gpt.count_params(model.blocks)
    if task == "train":
        n_params = eqx_gpt.count_params(model)
        flops = 6 * n_params + 12 * config.n_layer * config.n_embd * 5
        assert prepared.facts["flops_per_token"] == flops
    else:
        flops = 2 * in_blocks + 4 * config.n_layer * config.n_embd * 5
        assert prepared.facts["flops_per_token"] == pytest.approx(flops)
        norms = eqx_gpt.count_params(model.norm)
        read = 2 * (in_blocks + model.wte.weight.size + norms)  # bytes, but for float32 norms
        assert read / 3 < prepared.facts["bytes_per_token"] < 1.1 * read / 3


def test_models_by_name_preset_and_path(tmp_path):
    from weights import save_pretrained

    small = subject_of(None, "gpt2-small", random=True)
    assert (small.batch_size, small.block_size, small.config.vocab_size) == (12, 1024, 50304)
    assert small.hf == {}  # without biases it is no GPT-2 of transformers
    zoo = subject_of("smollm2-135m", None, random=True)
    assert (zoo.source, zoo.hf["model_type"], zoo.hf["num_key_value_heads"]) == (None, "llama", 3)
    save_pretrained(eqx_gpt.GPT.init(LLAMA, key=jax.random.key(0)), tmp_path / "m")
    found = subject_of(str(tmp_path / "m"), None, random=False)
    assert found.config == LLAMA
    assert found.source == str(tmp_path / "m")
    with pytest.raises(ValueError, match="give either --model or --preset"):
        subject_of(None, None, random=True)
    with pytest.raises(ValueError, match=r"'gpt3' is neither .* did you mean 'gpt2'"):
        subject_of("gpt3", None, random=True)
    with pytest.raises(ValueError, match="unknown preset 'gpt2-smal'"):
        subject_of(None, "gpt2-smal", random=True)


def test_peers_that_cannot(monkeypatch):
    everything = ("float32", "bfloat16", "compile")

    def ask(peer, job):
        return peers_of((peer,), everything, "both", job)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--against torch needs torch: pip install torch"):
        ask("torch", Job("train"))
    with pytest.raises(
        ValueError, match=r"--against llama\.cpp needs llama_cpp: pip install llama"
    ):
        ask("llama.cpp", Job("decode"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="torch is not timed at decode; give --against transf"):
        ask("torch", Job("decode"))
    with pytest.raises(ValueError, match="this one is a llama: give --against transformers"):
        ask("torch", Job("train", hf={"model_type": "llama"}))
    with pytest.raises(ValueError, match="give --model FILE"):
        ask("llama.cpp", Job("decode", source="dir"))
    with pytest.raises(ValueError, match="--batch_size 1, not 2"):
        ask("llama.cpp", Job("decode", source="m.gguf", batch_size=2))
    with pytest.raises(ValueError, match="no architecture of transformers holds this model"):
        ask("transformers", Job("train"))
    names = [(c.name, c.tuned) for c in ask("torch", Job("train"))]
    assert names == [
        (name, tuned)
        for tuned in (False, True)
        for name in (
            "torch float32",
            "torch bfloat16 autocast",
            "torch bfloat16 autocast, compiled",
        )
    ]


def test_memory_is_the_accelerators(monkeypatch):
    ours = serve.peak_memory("train")
    assert ours is None or ours > 2**20
    jax_of = SimpleNamespace(
        default_backend=lambda: "gpu",
        local_devices=lambda: [SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3})],
    )
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "jax", jax_of)
    assert serve.peak_memory("train") == 3
    assert serve.peak_memory("load") != 3
    cuda = SimpleNamespace(is_initialized=lambda: True, max_memory_allocated=lambda: 5)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert serve.peak_memory("train") == 5


def test_growth_is_written(tmp_path):
    def point(grows, seq, params):
        row = {"name": "ours", "tokens_per_s": 10.0 * seq, "peak_memory_bytes": 2**30}
        failed = {"name": "plain", "error": "no memory"}
        return {"grows": grows, "size": "1M", "seq": seq, "params": params,
                "contenders": [row, failed]}  # fmt: skip

    points = [point("length", 8, 99), point("length", 16, 99), point("size", 8, 70)]
    said = []
    growth.save(tmp_path / "out", {"points": points}, said.append)
    assert json.loads((tmp_path / "out" / "growth.json").read_text())["points"] == points
    lines = (tmp_path / "out" / "growth.md").read_text().splitlines()
    assert len(lines) == 2 + 6
    assert lines[2] == "| length | 1M | 8 | ours | 80 |  | 1.00 |"
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "out" / "growth.png").exists() == drawn
    with pytest.raises(ValueError, match="unknown size '13M'; give some of 12M"):
        growth.larger(TINY, "13M")
    for name, (n_layer, n_embd) in growth.SIZES.items():
        config = growth.larger(subject_of(None, "gpt2-small", random=True).config, name)
        n_params = 12 * n_layer * n_embd**2 + (50304 + 1024) * n_embd
        assert round(n_params / 1e6) == int(name.removesuffix("M"))
        assert config.n_head * config.head_dim == n_embd


def test_the_first_step_of_a_command():
    say = "import time; print('loading'); print('iter 0/9 loss 1.0', flush=True); time.sleep(99)"
    start = time.monotonic()
    assert 0 < startup._until_first_step([sys.executable, "-c", say], dict(os.environ)) < 60
    assert time.monotonic() - start < 60
    with pytest.raises(ValueError, match="ended before its first step: oh no"):
        startup._until_first_step([sys.executable, "-c", "print('oh no')"], dict(os.environ))
    code = "import sys; print('bad'); sys.exit(3)"
    with pytest.raises(ValueError, match="failed with exit code 3: bad"):
        startup._until_end([sys.executable, "-c", code], dict(os.environ))


def test_torchs_model_is_ours():
    torch = pytest.importorskip("torch")
    from scripts.benchmarks.torch_gpt import Shape, TorchGPT
    from train.loss import next_token_loss

    config = GPTConfig(
        *(13, 17, 2, 3, 12),
        norm=NormConfig(bias=False),
        attention=AttentionConfig(qkv_bias=False, out_bias=False),
        mlp=MLPConfig(bias=False),
    )
    model = eqx_gpt.GPT.init(config, key=jax.random.key(0))
    peer = TorchGPT(Shape(13, 17, 2, 3, 12, bias=False))
    ours = eqx_gpt.tree.named_arrays(model)
    names = {"qkv": "attention.qkv", "out": "attention.out", "up": "mlp.up", "down": "mlp.down"}
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if name.startswith("blocks."):
                _, layer, part, _ = name.split(".")
                value = ours[f"blocks.{names.get(part, part)}.weight"][int(layer)]
            else:
                value = ours[name]
            p.copy_(torch.from_numpy(np.array(value)))
        windows = np.random.default_rng(0).integers(0, 17, (5, 14))
        loss = peer(
            torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
        )
    assert loss.item() == pytest.approx(
        float(next_token_loss(model, jnp.asarray(windows, jnp.int32))), abs=2e-6
    )


def test_the_command(tmp_path):
    flags = {"batch_size": 2, "block_size": 8, "rounds": 1, "round_seconds": 0.01}
    result = run(
        command("bench.py", "train", "--preset", "shakespeare-char-cpu", **flags), tmp_path
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert {"command", "model", "cpu", "cores", "versions", "ceilings", "ours", "peers"} <= set(
        found
    )
    assert {"float32_flops", "bfloat16_flops", "read_bytes_per_s"} == set(found["ceilings"])
    assert {"tokens_per_s", "seconds", "flops_per_s", "share_of_matmul_peak"} <= set(found["ours"])
    assert (found["command"], found["batch_size"], found["seq"]) == ("train", 2, 8)
    assert "of the peak" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--model", "gpt3"], ["'gpt3' is neither", "'gpt2'"]),
        (["train"], ["give either --model or --preset"]),
        (["train", "--model", "gpt2", "--block_size", "2000"], ["2000 tokens", "1024"]),
        (["decode", "--model", "gpt2", "--new_tokens", "0"], ["new_tokens must be at least 1"]),
        (["startup", "--data_dir", "nowhere"], ["nowhere", "scripts/prepare.py"]),
    ],
)
def test_a_mistake_gets_one_message(args, words, tmp_path):
    result = run([*command("bench.py"), *args], tmp_path)
    assert result.returncode == 2, result.stderr
    for word in words:
        assert word in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_ctrl_c_leaves_nobody_behind(fake, tmp_path):
    """As Ctrl-C does: the parent alone gets the signal, while a worker is busy."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from scripts.benchmarks.job import Contender, Job\n"
        "from scripts.benchmarks.timing import compare\n"
        "compare(Contender('sleepy', 'sleepy'), [], Job('train'), 10**6, lambda _: None)\n"
    )
    (tmp_path / "sleepy.py").write_text(
        "import os, time\n"
        "from scripts.benchmarks.serve import Prepared\n"
        "def prepare(job, settings):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
    )
    root = str(SERVE.parent.parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", program, root], stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_cost_of_a_checkpoint_is_what_the_steps_after_it_take_longer():
    """Steps of 2 s; one stops the run for 5 s, and the two steps after it take 3 s each."""
    records, elapsed, blocked = [], 100.0, 0.0
    for i in range(24):
        if i and i % 6 == 0:
            elapsed, blocked = elapsed + 5, blocked + 5
        elapsed += 3 if i >= 6 and i % 6 < 2 else 2
        records += [{"iter": i, "train_loss": 1.0, "elapsed_s": elapsed, "step_s": 2.0 * i,
                     "data_s": 0.5 * i, "checkpoint_s": blocked}]  # fmt: skip
    found = checkpoints.cost([*records, {"iter": 24, "val_loss": 1.0, "elapsed_s": 999.0}], 50, 6)
    assert found == {
        "interval": 50, "step_s": 2.0, "checkpoint_s": 7.0, "checkpoint_blocks_s": 5.0,
        "checkpoint_overhead": 0.07, "data_wait_share": 0.25,
        "after": [8.0, 3.0, 2.0, 2.0, 2.0, 2.0],
    }  # fmt: skip


def test_bench_checkpoints(tmp_path):
    make_dataset(tmp_path / "data")
    argv = command("bench.py", "checkpoints", preset="shakespeare-char-cpu", window=2,
                   saves=2, dataset="tiny")  # fmt: skip
    result = run(argv, tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["command"] == "checkpoints"
    assert len(found["after"]) == 2
    assert min(found["step_s"], found["checkpoint_blocks_s"]) > 0
    assert found["data_wait_share"] >= 0
    assert "a checkpoint every 50 steps: " in result.stderr
