"""Filters and deduplicates JSON lines as datatrove does it; driven by `bench_data`.

    datatrove_peer.py INPUT_FOLDER WORK_FOLDER PROCESSES

One command a line on standard input, one JSON object a line on standard output:

    run N     everything, from the files of INPUT_FOLDER to files in WORK_FOLDER/N/output

Its stages are those of FineWeb that need no model: Gopher repetition, Gopher quality, C4 (without its rules on single lines, and
without terminal punctuation, as FineWeb has it), FineWeb quality, then MinHash with 14 bands of 8 and 5-grams of words, with 64-bit
hashes: signatures, buckets, clusters, filter. Each stage runs on PROCESSES processes where it can be cut up.
"""

import json
import pathlib
import resource
import shutil
import sys
import time

import datatrove
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig


def run(inputs, folder, processes):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)

    def stage(pipeline, tasks, name):
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, workers=min(tasks, processes), logging_dir=str(folder / "logs" / name)
        ).run()

    at = {name: str(folder / name) for name in ("filtered", "signatures", "buckets", "clusters", "output")}
    plain = {"compression": None}
    stage(
        [
            JsonlReader(str(inputs), compression=None),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            C4QualityFilter(
                filter_no_terminal_punct=False,
                min_num_sentences=3,
                min_words_per_line=-1,
                max_word_length=-1,
                remove_citations=False,
                filter_javascript=False,
                filter_policy=False,
            ),
            FineWebQualityFilter(char_duplicates_ratio=0.1),
            JsonlWriter(at["filtered"], **plain),
        ],
        processes,
        "filter",
    )
    reader = JsonlReader(at["filtered"], compression=None)
    stage([reader, MinhashDedupSignature(output_folder=at["signatures"], config=config)], processes, "signatures")
    stage(
        [MinhashDedupBuckets(input_folder=at["signatures"], output_folder=at["buckets"], config=config)],
        config.num_buckets,
        "buckets",
    )
    stage([MinhashDedupCluster(input_folder=at["buckets"], output_folder=at["clusters"], config=config)], 1, "clusters")
    stage(
        [reader, MinhashDedupFilter(input_folder=at["clusters"]), JsonlWriter(at["output"], **plain)], processes, "dedup"
    )
    return sum(sum(1 for _ in open(path, "rb")) for path in pathlib.Path(at["output"]).rglob("*.jsonl"))


def main():
    inputs, work, processes = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    # What the stages print must not stand between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    version = getattr(datatrove, "__version__", None)
    if version is None:
        from importlib.metadata import version as of

        version = of("datatrove")
    print(json.dumps({"version": f"datatrove {version}"}), file=answers, flush=True)
    for line in sys.stdin:
        _, name = line.split()
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        started = time.perf_counter()
        kept = run(inputs, work / name, processes)
        seconds = time.perf_counter() - started
        peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(json.dumps({"seconds": seconds, "kept": kept, "peak_kib": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
