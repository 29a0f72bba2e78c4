"""The datasets of the training scripts: a file, a folder, a Hub id, or a mixture of them."""

import gzip
import json
import os
from glob import glob
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from trl_ift.redaction import redacted


# Suffix -> builder of `datasets`
_BUILDERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def load_splits(script_args: Any, dataset_args: Any, training_args: Any) -> tuple[Any, Any]:
    """Return the training and the evaluation dataset that the arguments name.

    Args:
        script_args: `trl.ScriptArguments`.
        dataset_args: `trl.DatasetMixtureConfig`. Its `test_split_size` cuts the evaluation dataset from the training
            split, of `dataset_name` too.
        training_args: Config of the trainer. The evaluation dataset is `None` if its `eval_strategy` is `"no"`.

    Raises:
        ValueError: No dataset or two are named, a split is missing, or a file cannot be read.
        FileNotFoundError: A file or folder does not exist.
    """
    name, mixture, test_size = script_args.dataset_name, dataset_args.datasets, dataset_args.test_split_size
    if bool(name) == bool(mixture):
        found = "both are given" if name else "none is given"
        raise ValueError(
            f"Name the data either by `--dataset_name` (a file, a folder or a Hub id) or by `datasets:` in the YAML file of "
            f"`--config`; {found}."
        )
    train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
    if mixture:
        splits, name, train_split, test_split = _load_mixture(dataset_args), "`datasets:`", "train", "test"
    else:
        splits = load_named(name, script_args.dataset_config, script_args.dataset_streaming)
        if test_size is not None:
            splits = _cut_test_split(splits, name, train_split, test_split, test_size, training_args.seed)

    train_dataset = _pick(splits, name, train_split, "Name the training split with `--dataset_train_split`.")
    if training_args.eval_strategy == "no":
        return train_dataset, None
    remedy = (
        f"`--eval_strategy {training_args.eval_strategy.value}` needs one: name it with `--dataset_test_split`, cut it from "
        "the training data with `--test_split_size 0.05`, or set `--eval_strategy no`."
    )
    return train_dataset, _pick(splits, name, test_split, remedy)


def load_named(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """Load all splits of a data file, of a folder (data files, or `Dataset.save_to_disk`), or of a dataset on the Hub.

    Whether their bytes are UTF-8 says `check_encoding`, for the split that is used.

    A data file may have an address that fsspec reads (`https://`, `hf://`, `s3://`, ...), or be a pattern of files
    (`*.jsonl`). Files and a single saved `Dataset` are the split "train".
    """
    from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    path = Path(name).expanduser()
    if _is_url_or_pattern(name):
        return _read(name, load_dataset, **_files_of(name), streaming=streaming)
    if path.is_file():
        builder = _builder_of(path)
        _check_start(path)
        return _read(name, load_dataset, builder, data_files={"train": str(path)}, streaming=streaming)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _read(name, load_dataset, str(path), name=config, streaming=streaming)
        _check_saved(path)
        saved = _read(name, load_from_disk, str(path))
        splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
        if streaming:
            splits = IterableDatasetDict({split: data.to_iterable_dataset() for split, data in splits.items()})
        return splits
    if _looks_like_path(name):
        raise FileNotFoundError(
            f"The dataset `{redacted(name)}` does not exist: there is no such file or folder (in {os.getcwd()})."
        )
    return _read(name, load_dataset, name, name=config, streaming=streaming)


def load_split(name: str, split: str, config: str | None = None, streaming: bool = False) -> Any:
    """Load one split of what `load_named` loads, for commands with the option `--dataset_split`."""
    splits = load_named(name, config, streaming)
    return _pick(splits, name, split, "Name one with `--dataset_split`.")


def _load_mixture(dataset_args: Any) -> Any:
    from trl import get_dataset

    for entry in dataset_args.datasets:
        path = Path(entry.path).expanduser()
        if _is_url_or_pattern(entry.path):
            files = _files_of(entry.path)
            entry.path, entry.data_files = files["path"], files["data_files"]["train"]
        elif path.is_file():  # a data file, as with `--dataset_name`; TRL expects its builder here
            entry.path, entry.data_files = _builder_of(path), str(path)
            _check_start(path)
    return _read("`datasets:`", get_dataset, dataset_args)


def _cut_test_split(splits: Any, name: str, train_split: str, test_split: str, test_size: float, seed: int) -> Any:
    from datasets import Dataset, DatasetDict

    train_dataset = _pick(splits, name, train_split, "Name the training split with `--dataset_train_split`.")
    if not isinstance(train_dataset, Dataset):
        raise ValueError("`--test_split_size` cannot cut a streamed dataset: drop `--dataset_streaming`.")
    parts = train_dataset.train_test_split(test_size=test_size, seed=seed)
    return DatasetDict({train_split: parts["train"], test_split: parts["test"]})


def _read(source: str, load: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of `datasets`, whose errors about broken files are of all kinds, and hide the reason in their cause."""
    try:
        return load(*args, **kwargs)
    except StopIteration:  # of an empty file
        raise ValueError(redacted(f"The dataset {source} has no rows.")) from None
    except Exception as error:
        if isinstance(error, OSError | ImportError) and not isinstance(error, gzip.BadGzipFile):
            if (message := redacted(str(error))) == str(error):
                raise  # it is not there, or a package is missing
            try:
                mended = type(error)(message)
            except TypeError:  # an error of the Hub, which wants the answer of the server
                mended = OSError(message)
            raise mended from None
        reason = error.__cause__ or error
        message = redacted(f"The dataset {source} cannot be read: {type(reason).__name__}: {reason}")
        raise ValueError(message) from error


def check_encoding(dataset: Any, name: str) -> None:
    """Refuse bytes that are not UTF-8 in the texts of a map-style dataset: they would fail when their row is read."""
    import pyarrow as pa
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return
    source = redacted(name)
    try:
        dataset.data.table.validate(full=True)
    except pa.ArrowInvalid as error:
        for index in range(len(dataset)):
            try:
                dataset[index]
            except UnicodeDecodeError:
                raise ValueError(
                    f"The dataset {source}, row {index}, holds bytes that are not UTF-8. Convert it."
                ) from None
        raise ValueError(f"The dataset {source} is damaged: {error}") from None


def _check_start(path: Path) -> None:
    """Refuse a JSON file that does not begin with an object or a list: of `null`, the reader of Arrow dies."""
    if _builder_of(path) != "json":
        return
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except Exception:  # a damaged archive: the loader will say so
        return
    if start and start[:1] not in (b"{", b"["):
        raise ValueError(
            f"The data file `{path}` begins with {start[:20]!r}: expected JSON objects, one a line or as a list. Mend the file."
        )


def _check_saved(folder: Path) -> None:
    """Check the files by which `Dataset.save_to_disk` names others: splits and data must lie in the folder.

    Raises:
        ValueError: One is damaged, or names a file outside.
    """
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    path = splits if splits.is_file() else state
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        named = list(content["splits"]) if path == splits else [file["filename"] for file in content["_data_files"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{path}` is damaged ({type(error).__name__}: {error}). Save the dataset again.") from None
    for name in named:
        if not isinstance(name, str) or name in ("", "..") or PurePath(name).name != name:
            raise ValueError(f"`{path}` names {name!r}, which is no file in its folder. Save the dataset again.")
        if path == splits:
            _check_saved(folder / name)


def _pick(splits: Any, name: str, split: str, remedy: str) -> Any:
    if split not in splits:
        raise ValueError(
            f"The dataset {redacted(name)} has no split {split!r}; it has: {', '.join(map(repr, splits))}. {remedy}"
        )
    check_encoding(splits[split], name)
    return splits[split]


def _is_url_or_pattern(name: str) -> bool:
    """Whether `name` is an address, as fsspec reads it, or a pattern of files: no id on the Hub has these characters."""
    return "://" in name or (any(mark in name for mark in "*?[") and not Path(name).expanduser().exists())


def _files_of(name: str) -> dict[str, Any]:
    """Arguments of `load_dataset` for the data files at an address (`https://`, `hf://`, `s3://`, ...) or of a pattern."""
    if "://" in name:
        return {"path": _builder_of(PurePath(urlsplit(name).path)), "data_files": {"train": name}}
    pattern = os.path.expanduser(name)
    files = [Path(file) for file in sorted(glob(pattern, recursive=True)) if os.path.isfile(file)]
    if not files:
        raise FileNotFoundError(f"No file matches `{name}` (in {os.getcwd()}).")
    builders = {_builder_of(file) for file in files}
    if len(builders) > 1:
        raise ValueError(f"`{name}` matches files of several kinds: {', '.join(sorted(builders))}. Name one kind.")
    for file in files:
        _check_start(file)
    return {"path": builders.pop(), "data_files": {"train": [str(file) for file in files]}}


def _builder_of(path: PurePath) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _BUILDERS:
        raise ValueError(
            f"The data file `{path}` is of no known kind. Expected one of {', '.join(_BUILDERS)}, possibly compressed "
            f"({', '.join(_COMPRESSIONS)})."
        )
    return _BUILDERS[suffixes[-1]]


def _looks_like_path(name: str) -> bool:
    """Whether `name` cannot be the id of a dataset on the Hub (`name` or `owner/name`)."""
    return (
        name.startswith((".", "~", "/"))
        or name.count(os.sep) > 1
        or name.lower().endswith((*_BUILDERS, *_COMPRESSIONS))
    )
