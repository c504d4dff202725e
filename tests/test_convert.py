"""The command `scripts/convert.py`, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import hf_files
import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent


def convert(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_convert(tmp_path: Path) -> None:
    tensors = hf_files.gpt2_tensors(hf_files.GPT2_CONFIG, "transformer.")
    hf_files.write_model(tmp_path / "in", hf_files.GPT2_CONFIG, tensors, shards=2)
    done = convert("./in", "out", "--dtype=float16", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "out: 4,850 parameters, no tokenizer" in done.stderr
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == tensors.keys()
    key = "transformer.wte.weight"
    assert np.array_equal(found[key], tensors[key].astype(np.float16))


def test_to_gguf_and_back(tmp_path: Path) -> None:
    tensors = hf_files.gpt2_tensors(hf_files.GPT2_CONFIG, "transformer.")
    hf_files.write_model(tmp_path / "in", hf_files.GPT2_CONFIG, tensors)
    done = convert("in", "out.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "out.gguf: 4,850 parameters, no tokenizer" in done.stderr
    done = convert("out.gguf", "back", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[key], tensors[key]) for key in tensors)


def test_mistakes_of_the_user(tmp_path: Path) -> None:
    hf_files.write_model(tmp_path / "in", hf_files.GPT2_CONFIG, {"x": np.zeros(1)})
    mistakes = {
        ("in",): "required",
        ("in", "out", "--dtyp", "float16"): "--dtype",
        ("in", "out"): "says 3 layers, but the files hold 1 tensors",
        ("./in", "in"): "in is the source; give another path for the result",
        ("in", "out", "--dtype", "q8_0"): "--dtype q8_0 is only for .gguf files",
    }
    for arguments, message in mistakes.items():
        done = convert(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert message in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
