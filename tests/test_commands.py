"""The commands as a user types them, each in a process of its own."""

import json
import random
import signal
import time

import pytest
from tiny_run import FLAGS, command, losses, make_dataset, run, start


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a prepared dataset."""
    place = tmp_path_factory.mktemp("place")
    make_dataset(place / "data")
    return place


@pytest.fixture(scope="module")
def straight(place):
    """A run by the command, without interruption; its stderr is kept beside it."""
    result = run(command("train.py", **FLAGS, out_dir="out/straight"), place)
    assert result.returncode == 0, result.stderr
    (place / "stderr.txt").write_text(result.stderr)
    assert result.stdout == ""
    return place / "out" / "straight"


def wait_for_step(process, step):
    """Read stderr up to the line of that step."""
    for line in process.stderr:
        if line.startswith(f"iter {step}/"):
            return
    raise AssertionError(f"ended before step {step}")


def test_what_a_person_sees(straight, place):
    lines = (place / "stderr.txt").read_text().splitlines()
    header = [line.split()[0] for line in lines[:6]]
    assert header == ["model", "data", "device", "batch", "run", "process"]
    assert sum(line.startswith("iter ") and " loss " in line for line in lines) == 30
    assert sum(line.startswith("eval ") for line in lines) == 3
    assert "\x1b" not in "".join(lines)
    assert "\r" not in "".join(lines)


def test_killed_ten_times_it_gives_the_same_losses_bit_for_bit(straight, place):
    rng = random.Random(0)
    argv = command("train.py", **FLAGS, out_dir="out/killed")
    done = 0
    for _ in range(10):
        with start(argv, place) as process:
            target = rng.randrange(done, min(29, done + 8))
            wait_for_step(process, target)
            time.sleep(rng.random() * 0.05)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        argv = command("train.py", init_from="resume", out_dir="out/killed")
        done = max([0, *(int(p.name) for p in (place / "out/killed/checkpoints").iterdir()
                         if p.name.isdigit())])  # fmt: skip
    result = run(argv, place)
    assert result.returncode == 0, result.stderr
    assert losses(place / "out" / "killed") == losses(straight)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(sent, code, place):
    out_dir = f"out/{sent.name}"
    flags = {**FLAGS, "max_iters": 100_000, "lr_decay_iters": 100_000}
    with start(command("train.py", **flags, out_dir=out_dir), place) as process:
        wait_for_step(process, 7)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"--init_from resume --out_dir {out_dir}" in err
    assert "Traceback" not in err
    saved = max(int(p.name) for p in (place / out_dir / "checkpoints").iterdir())
    assert f"step {saved} is saved" in err
    resumed = run(
        command("train.py", init_from="resume", out_dir=out_dir, max_iters=saved + 1), place
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"iter {saved}/" in resumed.stderr


def test_flags_win_over_the_file_which_wins_over_the_preset(place):
    (place / "mine.json").write_text(json.dumps({**FLAGS, "max_iters": 5, "seed": 3}))
    argv = command("train.py", "--preset", "shakespeare-char", config="mine.json")
    result = run([*argv, "--max-iters=2", "--decay_lr", "False", "--out_dir", "out/won"], place)
    assert result.returncode == 0, result.stderr
    config = json.loads((place / "out/won/run.json").read_text())["config"]
    assert (config["max_iters"], config["seed"], config["beta2"]) == (2, 3, 0.99)
    assert config["decay_lr"] is False
    again = run(command("train.py", config="out/won/run.json", out_dir="out/again"), place)
    assert again.returncode == 0, again.stderr
    assert losses(place / "out/again") == losses(place / "out/won")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--preset", "gpt2-smal"], ["unknown preset 'gpt2-smal'", "'gpt2-small'"]),
        (["--batch_sise", "3"], ["--batch_sise", "--batch_size"]),
        (["--batch_size", "x"], ["batch_size", "x"]),
        (["--batch_size", "0"], ["batch_size must be at least 1, got 0"]),
        (["--config", "no.json"], ["'no.json'", "No such file"]),
        (["--config", "bad.json"], ["bad.json", "no field 'n_layers'", "'n_layer'"]),
        (["--config", "type.json"], ["type.json", "n_layer must be int, got 'four'"]),
        (["--dataset", "nope"], ["nope", "scripts/prepare.py"]),
        (["--init_from", "resume", "--out_dir", "out/none"], ["no run to resume in 'out/none'"]),
        (["--dataset", "tiny", "--init_from", "nosuchmodel"], ["nosuchmodel"]),
        (["--dataset", "tiny", "--vocab_size", "3"], ["vocab_size=3 is less than"]),
        (["--dataset", "tiny", "--block_size", "100000"], ["block_size=100000"]),
    ],
)
def test_a_mistake_gets_one_message(args, words, place):
    (place / "bad.json").write_text('{"n_layers": 2}')
    (place / "type.json").write_text('{"n_layer": "four"}')
    result = run([*command("train.py"), *args], place)
    assert result.returncode == 2, result.stderr
    for word in words:
        assert word in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (place / "out" / "checkpoints").exists()


def test_a_preset_without_its_data_trains_on_the_standard_library(tmp_path):
    flags = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2,
             "gradient_accumulation_steps": 2, "max_iters": 2, "eval_iters": 1}  # fmt: skip
    result = run(command("train.py", "--preset", "gpt2-small", **flags), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "DATASET 'openwebtext' IS NOT PREPARED" in result.stderr
    assert "python scripts/prepare.py openwebtext" in result.stderr
    out_dir = tmp_path / "out" / "gpt2-small-stdlib"
    content = json.loads((out_dir / "run.json").read_text())
    assert content["config"]["dataset"] == content["data"]["name"] == "stdlib"
    assert (content["model"]["vocab_size"], content["model"]["n_token"]) == (50304, 50257)
    assert '"dataset": "stdlib"' in (out_dir / "metrics.jsonl").read_text()
    sampled = run(command("sample.py", out_dir=out_dir, num_samples=1, max_new_tokens=20), tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    resumed = run(
        command("train.py", preset="gpt2-small", init_from="resume", max_iters=3), tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "iter 2/3 " in resumed.stderr


def test_sampling_a_run(straight, place):
    argv = command("sample.py", out_dir=straight, start="Jack", num_samples=2, max_new_tokens=40)
    first, second = run(argv, place), run(argv, place)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("Jack")
    assert first.stdout.count("Jack") >= 2
    other = run([*argv, "--seed", "7"], place)
    assert other.stdout != first.stdout
    (place / "prompt.txt").write_text("Emma and")
    argv = command("sample.py", out_dir=straight, start="FILE:prompt.txt", temperature=0)
    greedy = run([*argv, "--num_samples", "1"], place)
    assert greedy.stdout.startswith("Emma and")
    assert len(greedy.stdout) == len("Emma and") + 500 + 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"out_dir": "nowhere"}, "no run to resume in 'nowhere'"),
        ({"start": ""}, "the prompt is empty"),
        ({"start": "FILE:none.txt"}, "none.txt"),
        ({"start": "é"}, "é"),
        ({"temperature": -1}, "temperature must be 0 (greedy) or above, got -1.0"),
    ],
)
def test_a_mistake_in_sampling_gets_one_message(flags, words, straight, place):
    result = run(command("sample.py", **{"out_dir": straight, **flags}), place)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_evaluation_is_exact_over_every_token(straight, place):
    import jax
    import numpy as np

    from train.manifest import Manifest
    from weights import from_pretrained

    result = run(command("eval.py", out_dir=straight, block_size=11, batch_size=5), place)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])

    data = Manifest.read(place / "data" / "tiny")
    tokens = np.asarray(data.tokens("val"), np.int32)
    model = from_pretrained(straight)
    total = 0.0
    for i in range(0, len(tokens) - 1, 11):
        block = tokens[i : i + 12]
        log_p = np.asarray(jax.nn.log_softmax(model(block[:-1])), np.float64)
        total -= log_p[np.arange(len(block) - 1), block[1:]].sum()
    loss = total / (len(tokens) - 1)
    assert found["tokens"] == len(tokens) - 1
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(
        total / np.log(2) / data.splits["val"].bytes, rel=1e-6
    )


def test_evaluation_with_a_sliding_window(straight, place):
    """The policy itself is in test_evaluate.py: here the flags reach it."""
    from train.evaluate import split_loss
    from train.manifest import Manifest
    from weights import from_pretrained

    result = run(command("eval.py", out_dir=straight, block_size=11, stride=2), place)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    expected, count = split_loss(
        from_pretrained(straight), Manifest.read(place / "data" / "tiny").tokens("val"),
        block_size=11, stride=2, micro_batch_size=7, dtype="float32", progress=lambda *_: None,
    )  # fmt: skip
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert (found["tokens"], found["stride"], found["precision"]) == (count, 2, "float32")
    result = run(command("eval.py", out_dir=straight, block_size=11, stride=12), place)
    assert (result.returncode, result.stdout) == (2, "")
    assert "stride=12 is outside 1 to block_size=11" in result.stderr
    assert "Traceback" not in result.stderr
