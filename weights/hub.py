"""Finding a model's files: a zoo name, a hub id, a local directory or GGUF file.

Files are fetched one by one and only when asked for, through `huggingface_hub`, which honours
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and its cache.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eqx_gpt.config import did_you_mean
from eqx_gpt.zoo import HUB_IDS, list_models
from weights.errors import WeightsError, raise_problems, read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """Where the files of one model are.

    - `kind`: `run` is a directory that training wrote, `adapter` one that PEFT wrote, `directory`
      a local one in the hub's layout, `gguf` a file of llama.cpp, `hub` a repository.
    - `location`: the directory, the file, or the hub id.
    """

    kind: Literal["run", "adapter", "directory", "gguf", "hub"]
    location: str
    revision: str | None = None

    @property
    def path(self) -> Path:
        """The directory or file; not of a hub repository."""
        assert self.kind != "hub"
        return Path(self.location)

    def file(self, name: str) -> Path:
        """A local path of the file. WeightsError if there is none."""
        path = self.find_file(name)
        if path is None:
            raise WeightsError(
                f"{self.location} has no file {name}; of a repository of GGUF files, download one "
                "and give its path"
            )
        return path

    def find_file(self, *names: str) -> Path | None:
        """A local path of the first of these files that there is; None if there is none.

        WeightsError if none was reached and the hub could not be asked about one of them.
        """
        unreachable = None
        for name in names:
            try:
                path = self._fetch(name) if self.kind == "hub" else self.path / name
            except _UnreachableError as error:
                unreachable = unreachable or error
                continue
            if path is not None and path.is_file():
                return path
        if unreachable is not None:
            raise unreachable
        return None

    def find_optional(self, name: str) -> Path | None:
        """As `find_file`, but None too where the hub cannot be asked: for what a model that is
        cached may do without."""
        try:
            return self.find_file(name)
        except _UnreachableError:
            return None

    def _fetch(self, name: str) -> Path | None:
        # Imported where used: `import weights` stays fast.
        import huggingface_hub as hub
        from huggingface_hub import constants, errors

        repo, revision = self.location, self.revision
        at = "" if revision is None else f" at revision {revision!r}"
        try:
            return Path(hub.hf_hub_download(repo, name, revision=revision))
        except errors.GatedRepoError as error:
            message = (
                f"{repo} is gated: accept its terms on its page of the hub, then log in with "
                "`hf auth login` or set HF_TOKEN"
            )
            raise WeightsError(message) from error
        except errors.RevisionNotFoundError as error:
            raise WeightsError(f"{repo} has no revision {revision!r} on the hub") from error
        except errors.RepositoryNotFoundError as error:
            raise WeightsError(
                f"{repo} is neither a local directory nor a public model on the hub; check the "
                "spelling, and for a private model log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            cached = hub.try_to_load_from_cache(repo, name, revision=revision)
            if cached is not None and not isinstance(cached, str):  # known not to exist
                return None
            if constants.HF_HUB_OFFLINE:
                cause = "HF_HUB_OFFLINE is set; unset it, or fetch the model once while online"
            else:
                cause = (
                    "the hub cannot be reached; check the connection, or the path if meant as one"
                )
            raise _UnreachableError(f"{repo}: {name}{at} is not cached and {cause}") from error
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # of whichever HTTP library this version of the hub's uses
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise WeightsError(f"{repo}: {name}{at} could not be fetched ({reason})") from error


class _UnreachableError(WeightsError):
    """Whether the file exists is not known."""


def find(name_or_path: str | Path, revision: str | None = None) -> Source:
    """What a name or path means: a zoo name first, then a local directory, then a hub id.

    A local directory called like a zoo name is meant by `./gpt2`. WeightsError if it is nothing.
    """
    name = str(name_or_path)
    if name in HUB_IDS and not isinstance(name_or_path, Path):
        return _on_hub(HUB_IDS[name], revision)
    path = Path(name).expanduser()
    if path.exists():
        return _local(path, name, revision)
    local = path.suffix == ".gguf" or isinstance(name_or_path, Path)
    if HUB_ID.fullmatch(name) and not local:
        if path.parent.is_dir():
            raise WeightsError(
                f"{name} is no model in the local directory {path.parent}, which exists; check "
                "the spelling, or, if the model of that name on the hub is meant, call this from "
                "another directory"
            )
        return _on_hub(name, revision)
    if local or len(path.parts) > 1 or name.startswith((".", "~")):
        raise WeightsError(
            f"{name} does not exist; give an existing directory or .gguf file, a hub id such as "
            f"'openai-community/gpt2', or a name of eqx_gpt.list_models()"
        )
    raise WeightsError(
        f"{name!r} is neither a model of the zoo nor a local directory; "
        f"{did_you_mean(name, list_models())} A hub id has the form 'organisation/name'"
    )


def _local(path: Path, name: str, revision: str | None) -> Source:
    if revision is not None:
        raise WeightsError(f"{name} is local: revision={revision!r} is only for the hub")
    if not path.is_dir():
        if path.suffix.lower() == ".gguf":
            return Source("gguf", str(path))
        raise WeightsError(f"{name} is a file; give the directory that holds its config.json")
    if (path / "run.json").is_file():
        return Source("run", str(path))
    if (path / "config.json").is_file():
        return Source("directory", str(path))
    if (path / "adapter_config.json").is_file():
        return Source("adapter", str(path))
    raise WeightsError(
        f"{name} is no model: expected config.json (Hugging Face), adapter_config.json (PEFT) or "
        "run.json (a run) in it"
    )


def _on_hub(repo: str, revision: str | None) -> Source:
    """Pinned to the commit of its config.json, so that all of its files are of one version."""
    source = Source("hub", repo, revision)
    config = source.file("config.json")
    return dataclasses.replace(source, revision=config.parent.name)


def weight_files(source: Source) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and of a sharded model its index: key -> file name.

    WeightsError if there are none, if a shard is missing, or if the index names anything but
    files beside it.
    """
    path = source.find_file("model.safetensors", "model.safetensors.index.json")
    if path is None:
        pickled = source.find_file("pytorch_model.bin", "pytorch_model.bin.index.json")
        if pickled is not None:
            raise WeightsError(
                f"{source.location} has its weights only in {pickled.name}, a pickle, which can "
                "run any code and is never read here; convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIRECTORY)"
            )
        raise WeightsError(
            f"{source.location} has no weights: expected model.safetensors, or "
            "model.safetensors.index.json and its shards"
        )
    if path.suffix == ".safetensors":
        return [path], {}
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise WeightsError(f"{path}: expected an object weight_map of keys and file names")
    names = list(index.values())
    bad = [name for name in names if not _is_shard_name(name)]
    if bad:
        raise_problems(
            str(path), [f"{name!r:.80} is not the name of a shard beside it" for name in bad]
        )
    return _shards(source, sorted(set(names))), index


def _is_shard_name(name: object) -> bool:
    shard = r"\w[\w.-]{,200}\.safetensors"
    return isinstance(name, str) and bool(re.fullmatch(shard, name, re.ASCII))


def _shards(source: Source, names: Sequence[str]) -> list[Path]:
    paths = [source.find_file(name) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise_problems(source.location, [f"shard {name} is missing" for name in missing])
    return [path for path in paths if path is not None]
