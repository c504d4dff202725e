"""What a run recorded of itself, against what a command finds: conflicts end with both sides."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tiny_run import FLAGS, TEXT, make_dataset

import scripts.eval
import train.provenance
from eqx_gpt.record import conflict, digest, digests
from eqx_gpt.tokenizer import CharTokenizer
from scripts.common import model_source
from train.config import TrainConfig
from train.datasets import prepare
from train.loop import train as run_training
from train.manifest import Manifest, check_same_tokenizer
from train.run import RunError, check_own_data, read_run
from weights import WeightsError, from_pretrained, load_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def data(place):
    return Manifest.read(make_dataset(place / "data") / "tiny")


@pytest.fixture(scope="module")
def config(place):
    short = {"max_iters": 2, "eval_iters": 1, "dropout": 0.0}
    return TrainConfig(**{**FLAGS, **short}, data_dir=str(place / "data"))


@pytest.fixture(scope="module")
def trained(place, config, data):
    out_dir = place / "trained"
    run_training(dataclasses.replace(config, out_dir=str(out_dir)), data)
    return out_dir


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def edit(run, change):
    content = json.loads((run / "run.json").read_text())
    change(content)
    (run / "run.json").write_text(json.dumps(content))


def other_text(data_dir, name, text):
    """A dataset of another text, in place of one of that name."""
    (data_dir / "other.txt").write_text(text)
    prepare(
        "text", data_dir, name=name, files=(data_dir / "other.txt",), tokenizer="char",
        overwrite=True,
    )  # fmt: skip
    return Manifest.read(data_dir / name)


def test_the_processes_that_trained_a_run_are_recorded(copy, config, data):
    (first,) = read_run(copy)["processes"]
    assert (first["steps_done"], first["precision"]) in ((0, "float32"), (0, "bfloat16"))
    assert first["products"] == "xla"  # it is narrow
    assert first["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}
    assert {"python", "jax", "jaxlib", "equinox", "optax"} <= first["versions"].keys()
    assert first["command"]
    longer = dataclasses.replace(config, out_dir=str(copy), max_iters=3)
    run_training(longer, data, resume=True)
    again, second = read_run(copy)["processes"]
    assert again == first
    assert second["steps_done"] == 2
    assert second["started"] >= first["started"]


def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch):
    monkeypatch.setattr(train.provenance, "_ROOT", tmp_path)
    assert train.provenance.code_commit() is None  # no repository of its own
    (tmp_path / ".git").mkdir()
    assert train.provenance.code_commit() is None  # a broken one


def test_a_digest_knows_values_and_not_their_order():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    record = {"format_version": 1, "config": {}, "model": {"n": 1}, "lora": None, "data": {}}
    record["sha256"] = digests(record)
    assert conflict(record) is None
    assert conflict({**record, "model": {"n": 2}}, ["config"]) is None
    problem = conflict({**record, "model": {"n": 2}})
    assert problem is not None
    assert digest({"n": 1})[:12] in problem
    assert digest({"n": 2})[:12] in problem
    assert conflict({"format_version": 1}) is None


def test_an_edited_config_is_refused_by_whoever_reads_it(copy, config, data):
    edit(copy, lambda content: content["model"]["norm"].update(eps=0.1))  # every array still fits
    with pytest.raises(WeightsError, match=r"run\.json: 'model' was edited"):
        from_pretrained(copy)
    with pytest.raises(RunError, match=r"run\.json: 'model' was edited"):
        run_training(dataclasses.replace(config, out_dir=str(copy)), data, resume=True)


def test_a_newer_format_is_refused_by_whoever_reads_it(copy):
    edit(copy, lambda content: content.update(format_version=2))
    words = "format_version is 2, expected 1; a newer one needs a newer version"
    for read in (read_run, from_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match=words):
            read(copy)


def test_a_replaced_tokenizer_is_refused(copy):
    """By sample, eval, lm_eval and convert alike: all of them read it so."""
    other = CharTokenizer("".join(chr(ord("A") + i) for i in range(40)))
    (copy / "tokenizer_spec.json").write_text(json.dumps(other.spec()))
    with pytest.raises(WeightsError, match=r"fingerprint \w{12}\.\.\., but the run was trained"):
        model_source("resume", str(copy))()
    with pytest.raises(WeightsError, match="put its own back, which run"):
        load_tokenizer(copy)


def test_a_dataset_that_is_not_the_runs_any_more_is_refused(copy, trained, config, data, tmp_path):
    """The same characters in another order; and other characters, of which there are as many."""
    reversed_text = other_text(tmp_path, "tiny", TEXT[::-1])
    assert reversed_text.tokenizer_fingerprint == data.tokenizer_fingerprint
    words = r"is not what the run in .* was trained on: train split of dataset 'tiny' had sha256 "
    with pytest.raises(RunError, match=words):
        check_own_data(trained, reversed_text)
    other = other_text(tmp_path, "tiny", TEXT.replace("J", "Q"))
    words = r"the tokenizer of dataset 'tiny' had fingerprint \w{12}\.\.\., now \w{12}\.\.\."
    with pytest.raises(RunError, match=words):
        check_own_data(trained, other)
    with pytest.raises(RunError, match=words):
        run_training(dataclasses.replace(config, out_dir=str(copy)), other, resume=True)
    with pytest.raises(ValueError, match="another tokenizer"):
        check_same_tokenizer(other, load_tokenizer(trained))
    check_own_data(trained, data)


def test_evaluating_a_run_on_its_own_dataset_needs_that_dataset(trained, tmp_path, monkeypatch):
    """Under its name is another text now; named by the user it is taken."""
    other_text(tmp_path, "tiny", TEXT[::-1])
    argv = ["eval.py", "--out_dir", str(trained), "--data_dir", str(tmp_path), "--block_size", "13"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(RunError, match="To take what is there now, give --dataset tiny"):
        scripts.eval.main()
    monkeypatch.setattr("sys.argv", [*argv, "--dataset", "tiny"])
    assert scripts.eval.main() == 0


def test_a_checkpoint_of_another_shape_is_refused(copy, config, data):
    """As after copying checkpoints of one run into another."""

    def widen(content):
        content["model"]["n_embd"] = content["config"]["n_embd"] = 28
        content["sha256"] = digests(content)

    edit(copy, widen)
    with pytest.raises(WeightsError, match=r"shape \(40, 14\), run\.json asks for \(40, 28\)"):
        from_pretrained(copy)
    config = dataclasses.replace(config, out_dir=str(copy), n_embd=28, max_iters=3)
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"shape \(1, 14\), run\.json asks for \(1, 28\)"):
        run_training(config, data, resume=True)
    assert (copy / "metrics.jsonl").read_bytes() == before
