"""Stores and fetches the bytes of a checkpoint as other tools do; driven by `bench_store`.

    store_peers.py boto3 FOLDER LOCATION PART_BYTES SHARDS     the bytes of FOLDER/shard-I by boto3's transfer manager
    store_peers.py dcp   FOLDER DESTINATION SHARDS             their bytes as tensors, by torch.distributed.checkpoint

One command a line on standard input, one JSON object a line on standard output:

    put N     stores everything under the name N
    get N     fetches what was stored under the name N
    async N   stores it with dcp.async_save: "stall" is until it returns, "seconds" until it is done

boto3: from memory to the store and from there to memory, as ours; each shard is a multipart upload of PART_BYTES parts, all
shards at once and ten requests at a time for each (its default). dcp: one process, one thread a shard (`FileSystemWriter(thread_count=SHARDS)`), fsync on as it is by default.
"""

import concurrent.futures
import io
import json
import pathlib
import resource
import shutil
import sys
import time


def boto3_peer(folder, location, part_bytes, shards):
    import boto3
    from boto3.s3.transfer import TransferConfig

    bucket, prefix = location.removeprefix("s3://").split("/", 1)
    config = TransferConfig(multipart_threshold=part_bytes, multipart_chunksize=part_bytes)
    client = boto3.client("s3")
    state = [(folder / f"shard-{index}").read_bytes() for index in range(shards)]

    def key(name, index):
        return f"{prefix}/peer/{name}/shard-{index}"

    def put(name):
        def one(index):
            client.upload_fileobj(io.BytesIO(state[index]), bucket, key(name, index), Config=config)

        with concurrent.futures.ThreadPoolExecutor(shards) as pool:
            list(pool.map(one, range(shards)))

    def get(name):
        def one(index):
            fetched = io.BytesIO()
            client.download_fileobj(bucket, key(name, index), fetched, Config=config)
            return len(fetched.getbuffer())

        with concurrent.futures.ThreadPoolExecutor(shards) as pool:
            lengths = list(pool.map(one, range(shards)))
        assert lengths == [len(shard) for shard in state], lengths

    return {"put": put, "get": get}, f"boto3 {boto3.__version__}"


def dcp_peer(folder, destination, shards):
    import numpy
    import torch
    import torch.distributed.checkpoint as dcp

    state = {}
    for index in range(shards):
        values = numpy.fromfile(folder / f"shard-{index}", dtype=numpy.uint8)
        values = values[: len(values) // 12 * 12].view(numpy.float32).reshape(3, -1)
        for name, tensor in zip(("master", "exp_avg", "exp_avg_sq"), values):
            state[f"{index}.{name}"] = torch.from_numpy(tensor.copy())
    place = pathlib.Path(destination)
    threads = {"thread_count": shards}

    def put(name):
        shutil.rmtree(place / name, ignore_errors=True)
        started = time.perf_counter()
        dcp.save(state, storage_writer=dcp.FileSystemWriter(place / name, **threads))
        return time.perf_counter() - started

    def put_async(name):
        shutil.rmtree(place / name, ignore_errors=True)
        started = time.perf_counter()
        future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(place / name, **threads))
        stall = time.perf_counter() - started
        future.result()
        return time.perf_counter() - started, stall

    def get(name):
        dcp.load(state, storage_reader=dcp.FileSystemReader(place / name))

    return {"put": put, "async": put_async, "get": get}, f"torch {torch.__version__}"


def main():
    kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    if kind == "boto3":
        commands, version = boto3_peer(folder, sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        commands, version = dcp_peer(folder, sys.argv[3], int(sys.argv[4]))
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        command, name = line.split()
        before = resource.getrusage(resource.RUSAGE_SELF)
        started = time.perf_counter()
        timed = commands[command](name)
        seconds, stall = time.perf_counter() - started, None
        if isinstance(timed, tuple):
            seconds, stall = timed
        elif timed is not None:
            seconds = timed
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "stall": stall}), flush=True)


main()
