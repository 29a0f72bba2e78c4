"""From scores to a dataset on disk: `write_selection`, and `trl-ift select` on the command line."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError

from ..redaction import redacted
from ..scripts.data import load_split
from ..scripts.tools import add_dataset_options, run_tool
from ..scripts.train import usage_error
from .lobass import BANDS, DEFAULT_FRACTION, SELECTIONS, check_same_rows, rows_at, selection_scores, top_rows
from .report import FILES as REPORT_FILES
from .report import check_report_tools, write_report
from .scoring import ROW_SETTINGS, RowOptions, column_of, content_of, load_scores, row_hash
from .shards import read_manifest


SCORES_FILE = "scores.parquet"
SUMMARY_FILE = "selection.json"
_FILES = (SCORES_FILE, SUMMARY_FILE, *REPORT_FILES, "state.json", "dataset_info.json")
# What a score is called in the report, where that is not the name of the selection
_NAMES = {
    "lobass": "learnability",
    "rho_lm": "loss reduction",
    "perplexity low": "negative perplexity",
    "perplexity middle": "negative distance from the median rank",
}


def write_selection(
    output_dir: str | os.PathLike,
    dataset: Dataset | IterableDataset,
    initial: Dataset,
    reference: Dataset | None = None,
    direct: Dataset | None = None,
    *,
    selection: str = "lobass",
    fraction: float | None = None,
    k: int | None = None,
    min_score: float | None = None,
    normalize: str | None = "initial",
    band: str = "low",
    seed: int = 0,
    dataset_text_field: str = "text",
    report: bool = True,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Dataset:
    """
    Select rows by their scores and write them, with the scores of all rows and a report, into a folder.

    The folder is a dataset for `datasets.load_from_disk` and for `--dataset_name` of the training commands: the selected rows
    as they were, in their order. Beside it stand `scores.parquet` (a line for every row: both losses, the score, whether it was
    selected), `selection.json` (how it was made) and `report.html`, `report.md`. It appears whole, or not at all.

    Args:
        output_dir: Folder to write.
        dataset: The dataset that was scored.
        initial, reference, direct, selection, normalize, band, seed: See `selection_scores`.
        fraction, k, min_score: See `top_rows`.
        dataset_text_field: Column of plain text, as it was scored.
        report: Whether to write the report (needs matplotlib).
        settings: Printed in the report beside what is known here.
        overwrite: Whether an existing selection in `output_dir` may be replaced.

    Returns:
        The selected rows.

    Raises:
        ValueError: The scores do not belong together or to the dataset, or `output_dir` is not free.
        ImportError: The report needs matplotlib.
    """
    folder = Path(output_dir).expanduser().resolve()
    check_output(folder, overwrite)
    if report:
        check_report_tools()
    for name, value, default, users in (
        ("normalize", normalize, "initial", "lobass"),
        ("band", band, "low", "perplexity"),
        ("seed", seed, 0, "random"),
    ):
        if value != default and selection != users:
            raise ValueError(f"`{name}={value!r}` has no effect with `selection={selection!r}`. Drop it.")
    if reference is not None:
        check_same_rows(initial, reference)
    if isinstance(dataset, Dataset) and len(dataset) != len(initial):
        raise ValueError(
            f"The dataset has {len(dataset)} rows and there are scores of {len(initial)}. Name the dataset that was scored."
        )
    scores = selection_scores(selection, initial, reference, direct, normalize=normalize, band=band, seed=seed)
    chosen = top_rows(scores, fraction, k, min_score=min_score)
    num_tokens, nll = column_of(initial, "num_tokens").to_numpy(), column_of(initial, "nll").to_numpy()
    reference_nll = None if reference is None else column_of(reference, "nll").to_numpy()
    dropped = _dropped(selection, scores, num_tokens, nll, min_score)
    summary = {
        "selection": selection,
        "fraction": DEFAULT_FRACTION if fraction is None and k is None else fraction,
        "k": k,
        "min_score": min_score,
        **({"normalize": normalize} if selection == "lobass" else {}),
        **({"band": band} if selection == "perplexity" else {}),
        **({"seed": seed} if selection == "random" else {}),
        **redacted(settings or {}),
        "rows": len(initial),
        "selected": len(chosen),
        "dropped": dropped,
    }
    shown = _may_be_shown(scores, chosen) if report else set()
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = tempfile.TemporaryDirectory(prefix=f".{folder.name}.writing-", dir=folder.parent)
    scratch = Path(workplace.name) / "selection"
    try:
        rows, texts = _take(dataset, chosen, shown, initial, dataset_text_field, Path(workplace.name) / "cache")
        rows.save_to_disk(str(scratch))
        columns = {
            "index": column_of(initial, "index"),
            "row_hash": column_of(initial, "row_hash"),
            "num_tokens": num_tokens,
            "loss_initial": nll,
            **({} if reference_nll is None else {"loss_reference": reference_nll}),
            "learnability" if selection == "lobass" else "score": scores,
            "selected": np.isin(np.arange(len(scores)), chosen),
        }
        pq.write_table(pa.table(columns), scratch / SCORES_FILE)

        def text_of(index: int) -> tuple[str, str]:
            if index not in texts:  # among equal scores, the report may show others
                row = dataset[index] if isinstance(dataset, Dataset) else next(rows_at(dataset, {index}))
                texts[index] = _row_text(row, dataset_text_field)
            return texts[index]

        (scratch / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if report:
            write_report(
                scratch,
                scores,
                chosen,
                num_tokens,
                name=_NAMES.get(f"{selection} {band}" if selection == "perplexity" else selection, selection),
                dropped=dropped,
                comparisons=_comparisons(selection, len(chosen), initial, reference, direct, seed),
                row_text=text_of,
                settings={name: value for name, value in summary.items() if value is not None and name != "dropped"},
                loss_initial=nll,
                loss_reference=reference_nll,
            )
        _put_in_place(scratch, folder)
    finally:
        workplace.cleanup()
    return Dataset.load_from_disk(str(folder))


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise unless a selection can be written to `folder`."""
    if folder.is_file():
        raise ValueError(f"`output_dir='{folder}'` is a file. Name a folder.")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not found:
        return
    others = [name for name in found if name not in _FILES and not name.endswith(".arrow")]
    if SUMMARY_FILE not in found or others:
        raise ValueError(
            f"`output_dir='{folder}'` holds other files ({', '.join(others[:3])}). Choose another folder."
        )
    if not overwrite:
        raise ValueError(
            f"`output_dir='{folder}'` already holds a selection. Choose another folder, or replace it with `overwrite=True` "
            "(`--overwrite`)."
        )


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Move the finished folder to its place, and what stood there beside it, to be removed last."""
    old = scratch.with_name("replaced")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(scratch, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise


def _may_be_shown(scores: np.ndarray, chosen: np.ndarray, number: int = 20) -> set[int]:
    """Rows whose text the report may show: from the top, around the cut, and from the bottom."""
    valid = np.flatnonzero(np.isfinite(scores))
    ordered = valid[np.argsort(-scores[valid], kind="stable")]
    cut = len(chosen)
    parts = (ordered[:number], ordered[max(cut - number, 0) : cut + number], ordered[-number:])
    return set(np.concatenate(parts).tolist())


def _take(
    dataset: Dataset | IterableDataset,
    chosen: np.ndarray,
    shown: set[int],
    initial: Dataset,
    text_field: str,
    cache: Path,
) -> tuple[Dataset, dict[int, tuple[str, str]]]:
    """The chosen rows, after a check that they are those that were scored, and the texts of some rows."""
    hashes = dict(zip(chosen.tolist(), column_of(initial.select(chosen), "row_hash").to_pylist(), strict=True))
    options = RowOptions(dataset_text_field=text_field)
    texts = {}

    def check(row: Mapping[str, Any], index: int) -> None:
        if row_hash(content_of(row, options)) != hashes[index]:
            raise ValueError(
                f"Row {index} of the dataset is not the row that was scored. Name the dataset (split, order) that was scored."
            )

    dataset = dataset.with_format(None)
    if isinstance(dataset, Dataset):
        rows = dataset.select(chosen)
        for index, row in zip(chosen.tolist(), rows, strict=True):
            check(row, index)
        return rows, {index: _row_text(dataset[index], text_field) for index in shown}

    def stream() -> Iterator[Mapping[str, Any]]:
        wanted = sorted(shown | hashes.keys())
        found = rows_at(dataset, frozenset(wanted))
        for index, row in zip(wanted, found, strict=False):
            if index in shown:
                texts[index] = _row_text(row, text_field)
            if index in hashes:
                check(row, index)
                yield row

    try:
        rows = Dataset.from_generator(stream, features=dataset.features, cache_dir=str(cache))
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    if len(rows) != len(chosen):
        raise ValueError(
            f"The stream ended before row {chosen[-1]}, which was scored. Name the dataset that was scored."
        )
    return rows, texts


def _dropped(
    selection: str, scores: np.ndarray, num_tokens: np.ndarray, nll: np.ndarray, min_score: float | None
) -> dict[str, int]:
    """Number of rows that could not be selected, by reason."""
    without = ~np.isfinite(scores)
    reasons = {
        "no scored token after truncation": num_tokens == 0,
        "the loss is not finite": (num_tokens > 0) & ~np.isfinite(nll),
        SELECTIONS[selection].dropped: without & (num_tokens > 0) & np.isfinite(nll),
    }
    if min_score is not None:
        reasons[f"score below min_score ({min_score:g})"] = ~without & (scores < min_score)
    return {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}


def _comparisons(
    selection: str, k: int, initial: Dataset, reference: Dataset | None, direct: Dataset | None, seed: int
) -> dict[str, np.ndarray]:
    """The rows that other selections of the same size would have kept."""
    others = [
        ("random", "random", {"seed": seed + 1}),
        ("longest", "length", {}),
        ("lowest perplexity", "perplexity", {"band": "low"}),
        ("highest perplexity", "perplexity", {"band": "high"}),
        ("LoBaSS", "lobass", {}),
        ("unnormalised (RHO-LM)", "rho_lm", {}),
        ("IFD", "ifd", {}),
        ("superfiltering", "superfiltering", {}),
    ]
    given = {"reference": reference, "direct": direct}
    found = {}
    for label, name, options in others:
        if name == selection or any(given[need] is None for need in SELECTIONS[name].needs):
            continue
        scores = selection_scores(name, initial, reference, direct, **options)  # type: ignore[arg-type]
        valid = int(np.isfinite(scores).sum())
        found[label] = top_rows(scores, k=min(k, valid)) if valid else np.array([], dtype=np.int64)
    return found


def _row_text(row: Mapping[str, Any], text_field: str) -> tuple[str, str]:
    """Prompt and completion of a row as text."""
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _as_text(row["prompt"]), _as_text(row["completion"])
    for name in ("messages", "conversations"):
        if row.get(name):
            return _as_text(row[name][:-1]), _as_text(row[name][-1:])
    return "", _as_text(row.get(text_field, row.get("input_ids", "")))


def _as_text(value: Any) -> str:
    if not isinstance(value, list | tuple):
        return str(value)
    if not value or not isinstance(value[0], Mapping):
        return " ".join(map(str, value))
    parts = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in value]
    if len(parts) == 1:
        return str(parts[0][1])
    return "\n".join(f"{role}: {content}" for role, content in parts)


def join_folds(folds: Sequence[tuple[np.ndarray, Dataset]]) -> Dataset:
    """Return the scores of all rows from scores of parts of them: (row indices, scores) each."""
    tables = [part.data.table.set_column(0, "index", pa.array(indices)) for indices, part in folds]
    return Dataset(pa.concat_tables(tables).sort_by("index"))


# ---------------------------------------------------------------- the command line


def load_comparable(folders: Mapping[str, str | None]) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Load folders of scores by name (`initial`, `reference`, `direct`), and check that they belong together.

    Returns:
        The scores, and the manifest of the initial ones.
    """
    given = {name: folder for name, folder in folders.items() if folder is not None}
    scores = {name: load_scores(folder) for name, folder in given.items()}
    manifests = {name: read_manifest(folder)["settings"] for name, folder in given.items()}
    for name, manifest in manifests.items():
        direct = manifest.get("direct_prompt") is not None
        if direct != (name == "direct"):
            found = "without their prompts" if direct else "with their prompts"
            raise ValueError(f"`--{name} {given[name]}` holds scores of completions {found} (see `--direct_prompt`).")
        keys = ["rows", "dataset", *ROW_SETTINGS, "dtype", "attn_implementation"]
        if name == "direct":
            keys.append("policy")  # the two losses are of one model
        differing = [
            f"{key}={manifest.get(key)!r} there and {manifests['initial'].get(key)!r} in {given['initial']}"
            for key in keys
            if manifest.get(key) != manifests["initial"].get(key)
        ]
        if differing:
            raise ValueError(
                f"The scores in `{given[name]}` do not belong to the initial ones: {', '.join(differing)}. Score the same "
                "dataset with the same options."
            )
    return scores, read_manifest(given["initial"])


def make_parser(prog: str = "trl-ift select") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Select rows of an SFT dataset by the losses that `trl-ift score` has written, and write them as a dataset "
        "with a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of options; those on the command line win")
    add("--initial", required=True, help="scores under the initial model")
    add("--reference", help="scores under the fine-tuned model")
    add("--direct", help="scores of the completions alone, for ifd and superfiltering")
    add_dataset_options(parser)
    add("--output_dir", required=True, help="folder to write")
    add("--selection", choices=list(SELECTIONS), default="lobass", help="which rows are kept")
    add("--fraction", type=float, help="share of all rows, in (0, 1] (default: 0.06, if --k is not given)")
    add("--k", type=int, help="number of rows, in place of --fraction")
    add("--min_score", type=float, help="rows with a lower score are never selected; 0 drops those made worse")
    add("--normalize", choices=("initial", "reference", "none"), default="initial", help="divisor of the difference")
    add("--band", choices=BANDS, default="low", help="which perplexities are kept")
    add("--seed", type=int, default=0, help="seed of the random selection")
    add("--no_report", action="store_true", help="write no report")
    add("--overwrite", action="store_true", help="replace an earlier selection")
    parser.error = partial(usage_error, prog)  # type: ignore[method-assign]
    return parser


def main(argv: list[str]) -> int:
    """Run `trl-ift select` and return its exit code."""
    return run_tool(make_parser(), argv, _select)


def _select(args: argparse.Namespace) -> None:
    check_output(Path(args.output_dir).expanduser(), args.overwrite)
    scores, manifest = load_comparable({"initial": args.initial, "reference": args.reference, "direct": args.direct})
    settings = {"dataset": args.dataset_name, "initial_model": manifest["model"]}
    if args.reference is not None:
        found = read_manifest(args.reference)
        settings["reference_model"] = found["adapter"] or found["model"]
        if found["settings"]["policy"] == manifest["settings"]["policy"]:
            print(
                "Note: the reference has the weights of the initial model, so that all scores are 0.", file=sys.stderr
            )
    settings |= {name: manifest["settings"][name] for name in ("max_length", "truncation_mode", "dtype")}
    rows = write_selection(
        args.output_dir,
        load_split(args.dataset_name, args.dataset_split, args.dataset_config, args.dataset_streaming),
        **scores,
        selection=args.selection,
        fraction=args.fraction,
        k=args.k,
        min_score=args.min_score,
        normalize=None if args.normalize == "none" else args.normalize,
        band=args.band,
        seed=args.seed,
        dataset_text_field=manifest["settings"]["dataset_text_field"],
        report=not args.no_report,
        settings=settings,
        overwrite=args.overwrite,
    )
    print_selection(args.output_dir, len(rows), len(scores["initial"]), not args.no_report)


def print_selection(folder: str | os.PathLike, selected: int, rows: int, report: bool) -> None:
    """Say what was written and how to train on it."""
    print(f"Selected {selected} of {rows} rows. Train on them with `--dataset_name {folder}`.")
    if report:
        print(f"The report: {Path(folder) / 'report.html'}")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
