"""The hub's layout served from loopback: what is fetched, what is cached, what goes wrong."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hf_files
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from weights import WeightsError, from_pretrained, load_tokenizer
from weights.tokenizer import gpt2_tokenizer_json

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import json, sys
from weights import WeightsError, from_pretrained, load_tokenizer
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        model = from_pretrained(name, revision=revision)
        answers.append(["loaded", float(abs(model.wte.weight).sum())])
    except WeightsError as error:
        answers.append(["refused", str(error)])
print(json.dumps(answers))
"""


@dataclass
class Hub:
    """A server, the directories that it serves by hub id, and the paths asked of it."""

    url: str
    repos: dict[str, Path]
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            hub.asked.append(self.path)
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if match is None:
                return self.answer(404, {"X-Error-Code": "EntryNotFound"})
            repo, revision, name = match.groups()
            if repo == "org/gated":
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            if repo not in hub.repos:
                return self.answer(404, {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", COMMIT):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            path = hub.repos[repo] / name
            if not path.is_file():
                return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            etag = f'"{repo}/{name}"'.replace("/", "-")
            return self.answer(200, {"ETag": etag, "X-Repo-Commit": COMMIT}, path.read_bytes())

        do_GET = do_HEAD  # noqa: N815

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", {})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def load(
    hub_url: str, cache: Path, *names: str | tuple[str, str], offline: bool = False
) -> list[list[Any]]:
    """What `from_pretrained` does for each name, in a process that has this hub and cache."""
    environment = os.environ | {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    pairs = [(name, None) if isinstance(name, str) else name for name in names]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(pairs)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_models_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    config, cache = hf_files.GPT2_CONFIG, tmp_path / "cache"
    tensors = hf_files.gpt2_tensors(config)
    expected = abs(tensors["wte.weight"]).sum()
    hub.repos["openai-community/gpt2"] = hf_files.write_model(tmp_path / "gpt2", config, tensors)
    hub.repos["org/sharded"] = hf_files.write_model(tmp_path / "sharded", config, tensors, shards=3)
    pickled = hf_files.write_model(tmp_path / "pickled", config, tensors)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub.repos["org/pickled"] = pickled

    names = ("gpt2", "org/sharded", ("org/sharded", COMMIT), ("gpt2", "v9"), "org/pickled")
    found = load(hub.url, cache, *names, "org/none", "org/gated")
    for kind, total in found[:3]:
        assert kind == "loaded"
        assert total == pytest.approx(expected)
    for (kind, message), part in zip(
        found[3:],
        ["no revision 'v9'", "only in pytorch_model.bin", "neither a local dir", "is gated"],
        strict=True,
    ):
        assert kind == "refused"
        assert part in message
    resolved = [path for path in hub.asked if "openai-community/gpt2/resolve" in path]
    files = {path.split("/")[-1] for path in resolved}
    assert files == {"config.json", "model.safetensors"}
    assert {path.split("/")[-2] for path in resolved} == {"main", COMMIT, "v9"}

    # The same cache, and nobody who answers: first unknowingly, then on purpose.
    nowhere = "http://127.0.0.1:9"
    assert load(nowhere, cache, "gpt2") == found[:1]
    shutil.rmtree(cache / "hub/models--org--sharded/.no_exist")  # as another program's cache
    *cached, other = load(nowhere, cache, "gpt2", "org/sharded", "org/x", offline=True)
    assert cached == found[:2]
    assert "org/x: config.json is not cached and HF_HUB_OFFLINE is set" in other[1]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (LocalEntryNotFoundError("no route to host"), "not cached and the hub cannot be reached"),
        (ConnectionResetError("cut\nTraceback"), r"config\.json could not be fetched \(cut\)$"),
    ],
)
def test_no_connection(
    raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=message):
        from_pretrained("org/x")


def test_tokenizer_without_what_only_some_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache that another program filled does not know that there is no chat template."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(gpt2_tokenizer_json())

    def download(repo: str, name: str, **_: Any) -> str:
        if not (tmp_path / name).exists():
            raise LocalEntryNotFoundError("offline")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tokenizer = load_tokenizer("org/x")
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"
    assert tokenizer.chat_template is None


def test_special_tokens_of_the_other_files(tmp_path: Path) -> None:
    """GPT-2's own repository names them by their ids alone, beside the tokenizer."""
    (tmp_path / "config.json").write_text('{"bos_token_id": 50256, "eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 50256}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "tokenizer.json").write_text(gpt2_tokenizer_json())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text == 50256
    assert dict(tokenizer.special_tokens) == dict.fromkeys(
        ("bos_token", "eos_token"), "<|endoftext|>"
    )
