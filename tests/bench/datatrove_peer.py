"""Filters, deduplicates and tokenises JSON lines as datatrove does it; driven by `bench_data`.

    datatrove_peer.py INPUT_FOLDER WORK_FOLDER PROCESSES TOKENIZER_FILE

One command a line on standard input, one JSON object a line on standard output; LANGUAGE is en or zh:

    refine LANGUAGE NAME    everything, from the files of INPUT_FOLDER/LANGUAGE to files in WORK_FOLDER/NAME/output
    tokens LANGUAGE NAME    the same files to token ids in WORK_FOLDER/NAME/output, in their order, without any rule

English: the stages of FineWeb that need no model: Gopher repetition, Gopher quality, C4 (without its rules on single lines, and
without terminal punctuation, as FineWeb has it), FineWeb quality, then MinHash with 14 bands of 8 and 5-grams of words, with 64-bit
hashes: signatures, buckets, clusters, filter. Chinese: the same but for what is English alone, as FineWeb 2 has it (no C4, no stop
words, no length of words); words are cut by jieba. Each stage runs on PROCESSES processes where it can be cut up.
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
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import load_word_tokenizer


# What it calls the languages.
LANGUAGES = {"en": "eng", "zh": "cmn"}


def filters(language):
    if language == "en":
        return [
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
        ]
    code = LANGUAGES[language]
    return [
        GopherRepetitionFilter(language=code),
        GopherQualityFilter(language=code, min_avg_word_length=None, max_avg_word_length=None, min_stop_words=None),
        FineWebQualityFilter(language=code, char_duplicates_ratio=0.1),
    ]


def stage(folder, processes, pipeline, tasks, name):
    LocalPipelineExecutor(
        pipeline=pipeline, tasks=tasks, workers=min(tasks, processes), logging_dir=str(folder / "logs" / name)
    ).run()


def refine(inputs, language, folder, processes):
    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=14, hashes_per_bucket=8, n_grams=5)
    at = {name: str(folder / name) for name in ("filtered", "signatures", "buckets", "clusters", "output")}
    plain = {"compression": None}
    reader = JsonlReader(str(inputs), compression=None)
    stage(folder, processes, [reader, *filters(language), JsonlWriter(at["filtered"], **plain)], processes, "filter")
    reader = JsonlReader(at["filtered"], compression=None)
    # Where stages run in this process, one that the filters have loaded cannot be copied into the next stage.
    load_word_tokenizer.cache_clear()
    signature = MinhashDedupSignature(
        output_folder=at["signatures"], config=config, language=LANGUAGES[language]
    )
    stage(folder, processes, [reader, signature], processes, "signatures")
    buckets = MinhashDedupBuckets(input_folder=at["signatures"], output_folder=at["buckets"], config=config)
    stage(folder, processes, [buckets], config.num_buckets, "buckets")
    cluster = MinhashDedupCluster(input_folder=at["buckets"], output_folder=at["clusters"], config=config)
    stage(folder, processes, [cluster], 1, "clusters")
    kept = MinhashDedupFilter(input_folder=at["clusters"])
    stage(folder, processes, [reader, kept, JsonlWriter(at["output"], **plain)], processes, "dedup")
    return sum(sum(1 for _ in open(path, "rb")) for path in pathlib.Path(at["output"]).rglob("*.jsonl"))


def tokens(inputs, folder, processes, tokenizer):
    # Shuffled they would be written twice, and ours are not.
    writer = DocumentTokenizer(str(folder / "output"), tokenizer, shuffle_documents=False)
    stage(folder, processes, [JsonlReader(str(inputs), compression=None), writer], processes, "tokens")
    # Two bytes a token below 65,536 entries.
    return sum(path.stat().st_size for path in (folder / "output").rglob("*.ds")) // 2


def main():
    inputs, work, processes, tokenizer = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    # What the stages print must not stand between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    version = getattr(datatrove, "__version__", None)
    if version is None:
        from importlib.metadata import version as of

        version = of("datatrove")
    print(json.dumps({"version": f"datatrove {version}"}), file=answers, flush=True)
    for line in sys.stdin:
        step, language, name = line.split()
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        started = time.perf_counter()
        if step == "refine":
            count = refine(inputs / language, language, folder, processes)
        else:
            count = tokens(inputs / language, folder, processes, tokenizer)
        seconds = time.perf_counter() - started
        peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(json.dumps({"seconds": seconds, "count": count, "peak_kib": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
