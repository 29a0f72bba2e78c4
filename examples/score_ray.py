# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-ift", "ray[data]>=2.51"]
# ///
"""Score a dataset of any size with Ray Data: the loss of each row before and after fine-tuning, and its learnability (LoBaSS).

    uv run score_ray.py --model ./model --adapter ./reference --data './rows/*.jsonl.gz' --output ./scores --workers 2
    RAY_ADDRESS=10.0.0.1:6379 python score_ray.py --data 's3://bucket/rows/*.parquet' --output s3://bucket/scores --workers 64
    ray job submit --working-dir . -- python score_ray.py --data 'hf://datasets/trl-lib/tldr/data/train-*.parquet' ...

The first line is for one machine, on its GPUs if it has any, the others for a cluster. Rows are what `SFTTrainer` takes, as
JSON lines or Parquet; only workers read them. With `--adapter`, one model in memory gives both losses. `index` counts from
the first row of the first file: sorted by it, `learnability` is what `trl_ift.data.select_top` takes. Scoring has no
collectives: if a worker or a machine is lost, Ray repeats what it had not finished. If this process is lost, start again.
"""

import argparse
import json
import os
from contextlib import nullcontext
from itertools import accumulate

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray


def read_rows(path: str):
    """The rows of a file as JSON: nested messages stay what they are, which they would not as Arrow or NumPy values."""
    with fsspec.open(path, "rb", compression="infer") as file:
        if path.endswith(".parquet"):
            for batch in pq.ParquetFile(file).iter_batches(1000):
                yield from (json.dumps(row, default=str) for row in batch.to_pylist())
        else:
            yield from (line.decode() for line in file if line.strip())


@ray.remote
def count_rows(path: str) -> int:
    with fsspec.open(path, "rb") as file:
        return pq.read_metadata(file).num_rows if path.endswith(".parquet") else sum(1 for _ in read_rows(path))


def read_file(file: dict):
    for index, row in enumerate(read_rows(file["path"]), file["start"]):
        yield {"index": index, "row": row}


class Score:
    """A worker, whose models stay in memory from one batch to the next."""

    def __init__(self, args: argparse.Namespace):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig

        from trl_ift.data import Scorer, learnability

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        sources = [args.model, *([args.reference_model] if args.reference_model else [])]
        models = [AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype).to(device) for source in sources]
        if args.adapter:
            models = [PeftModel.from_pretrained(models[0], args.adapter)] * 2
        options = (AutoTokenizer.from_pretrained(args.model), SFTConfig(max_length=args.max_length, bf16=False))
        self.scorers = [Scorer(model, *options, batch_tokens=args.batch_tokens) for model in models]
        self.initial = models[0].disable_adapter if args.adapter else nullcontext
        self.learnability = learnability

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [json.loads(row) for row in batch["row"].to_pylist()]
        with self.initial():
            scores = self.scorers[0](rows)
        columns = {name: [score[name] for score in scores] for name in ("row_hash", "num_tokens", "nll")}
        if len(self.scorers) == 2:
            columns["nll_reference"] = [score["nll"] for score in self.scorers[1](rows)]
            columns["learnability"] = self.learnability(columns["nll"], columns["nll_reference"])
        return pa.table({"index": batch["index"], **columns})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the initial model")
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--adapter", help="the reference: a LoRA adapter of the model")
    reference.add_argument("--reference_model", help="the reference: a model of its own")
    parser.add_argument("--data", nargs="+", required=True, help="files or patterns: *.jsonl, *.jsonl.gz, *.parquet")
    parser.add_argument("--output", required=True, help="new folder of Parquet files")
    parser.add_argument("--workers", type=int, default=1, help="processes with models, each on a GPU if there are any")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores of a worker")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens that are kept of a row")
    parser.add_argument("--dtype", default="float32", help="of the weights, e.g. bfloat16")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="most tokens of a forward, with padding")
    parser.add_argument("--batch_rows", type=int, default=1000, help="rows that a worker sorts by length at a time")
    args = parser.parse_args()
    if fsspec.url_to_fs(args.output)[0].exists(args.output):
        parser.error(f"--output: `{args.output}` exists; name a folder that does not")
    ray.init(include_dashboard=False)
    paths = [file.full_name for file in fsspec.open_files(args.data)]
    counts = ray.get([count_rows.remote(path) for path in paths])
    if not sum(counts):
        parser.error(f"--data: {args.data} are {len(paths)} files without rows")
    starts = accumulate(counts, initial=0)
    files = [{"path": path, "start": start} for path, start in zip(paths, starts, strict=False)]
    ray.data.DataContext.get_current().target_max_block_size = 2**20  # what a worker gets, and loses, at a time
    # No cores for reading and writing, which would wait for ever where the workers hold all of them
    readers = {"compute": ray.data.TaskPoolStrategy(args.workers), "num_cpus": 0}
    workers = {"compute": ray.data.ActorPoolStrategy(size=args.workers), "num_cpus": args.threads}
    workers |= {"num_gpus": 1 if ray.cluster_resources().get("GPU") else 0, "fn_constructor_args": [args]}
    rows = ray.data.from_items(files, override_num_blocks=len(files)).flat_map(read_file, **readers)
    scores = rows.map_batches(Score, batch_size=args.batch_rows, batch_format="pyarrow", **workers)
    scores.write_parquet(args.output, min_rows_per_file=100_000, ray_remote_args={"num_cpus": 0})


if __name__ == "__main__":
    main()
