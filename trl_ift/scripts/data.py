"""The datasets of the training scripts: a file, a folder, a Hub id, or a mixture of them."""

import os
from pathlib import Path
from typing import Any


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

    A single file and a single saved `Dataset` are the split "train".
    """
    from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    path = Path(name).expanduser()
    if path.is_file():
        return _read(name, load_dataset, _builder_of(path), data_files={"train": str(path)}, streaming=streaming)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _read(name, load_dataset, str(path), name=config, streaming=streaming)
        saved = _read(name, load_from_disk, str(path))
        splits = DatasetDict({"train": saved}) if isinstance(saved, Dataset) else saved
        if streaming:
            splits = IterableDatasetDict({split: data.to_iterable_dataset() for split, data in splits.items()})
        return splits
    if _looks_like_path(name):
        raise FileNotFoundError(
            f"The dataset `{name}` does not exist: there is no such file or folder (in {os.getcwd()})."
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
        if path.is_file():  # a data file, as with `--dataset_name`; TRL expects its builder here
            entry.path, entry.data_files = _builder_of(path), str(path)
    return _read("`datasets:`", get_dataset, dataset_args)


def _cut_test_split(splits: Any, name: str, train_split: str, test_split: str, test_size: float, seed: int) -> Any:
    from datasets import Dataset, DatasetDict

    train_dataset = _pick(splits, name, train_split, "Name the training split with `--dataset_train_split`.")
    if not isinstance(train_dataset, Dataset):
        raise ValueError("`--test_split_size` cannot cut a streamed dataset: drop `--dataset_streaming`.")
    parts = train_dataset.train_test_split(test_size=test_size, seed=seed)
    return DatasetDict({train_split: parts["train"], test_split: parts["test"]})


def _read(source: str, load: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of `datasets`, whose errors about broken files hide the reason in their cause."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return load(*args, **kwargs)
    except StopIteration:  # of an empty file
        raise ValueError(f"The dataset {source} has no rows.") from None
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(f"The dataset {source} cannot be read: {type(reason).__name__}: {reason}") from error


def _pick(splits: Any, name: str, split: str, remedy: str) -> Any:
    if split not in splits:
        raise ValueError(
            f"The dataset {name} has no split {split!r}; it has: {', '.join(map(repr, splits))}. {remedy}"
        )
    return splits[split]


def _builder_of(path: Path) -> str:
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
