"""Two real processes: shares of one batch, one state for both, exact continuation."""

import json
import os
import socket
import subprocess
import sys

import pytest
from conftest import clean_environment

from moresjax.data.llava import LlavaSource
from moresjax.data.pipeline import make_iterator
from moresjax.testing.llava_files import PROCESSOR, make_images, make_records, write_list

OPTIONS = {"batch_size": 4, "max_seq_len": 96, "images_per_row": 4, "pack_window": 11}
BATCHES = 5

WORK = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from moresjax.testing.llava_files import PROCESSOR
from moresjax.data.llava import LlavaSource
from moresjax.data.pipeline import make_iterator, to_device_batch
from moresjax.sharding.mesh import batch_sharding, make_mesh

source = LlavaSource("mix.json", "images")
options, count = json.loads(sys.argv[3]), int(sys.argv[4])
found = {}
for batching in ("pad", "pack", "bucket"):
    batches = make_iterator(source, PROCESSOR, batching=batching, **options)
    ids = []
    for number in range(count):
        stacked = next(batches)
        ids.append(stacked.pop("id").tolist())
        batch = to_device_batch(stacked, PROCESSOR, batch_sharding(make_mesh()))
        assert batch.tokens.shape[0] == 4 == 2 * len(ids[-1])
        if number == 2:
            state = json.loads(json.dumps(batches.get_state()))
    again = make_iterator(source, PROCESSOR, batching=batching, **options)
    again.set_state(state)
    resumed = [next(again)["id"].tolist() for _ in range(count - 3)]
    found[batching] = {"ids": ids, "resumed": resumed, "state": state}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder of the data, and what each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    write_list(folder / "mix.json", make_records(make_images(folder / "images", 10), 40))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(filter(None, sys.path))
    options = {"cwd": folder, "env": clean_environment() | {"PYTHONPATH": paths}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = [json.dumps(OPTIONS), str(BATCHES)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(port), str(i), *arguments], **options, **pipes
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors
    return folder, [json.loads(text.splitlines()[-1]) for text, _ in outputs]


@pytest.mark.parametrize("batching", ["pad", "pack", "bucket"])
def test_both_processes_save_one_state_and_go_on_from_it(results, batching):
    one, other = (found[batching] for found in results[1])
    assert one["state"] == other["state"]
    for found in (one, other):
        assert found["resumed"] == found["ids"][3:]
    assert one["ids"] != other["ids"]


@pytest.mark.parametrize("batching", ["pad", "pack", "bucket"])
def test_together_they_read_the_batches_of_one_process_which_can_go_on(results, batching):
    folder, found = results
    source = LlavaSource(str(folder / "mix.json"), str(folder / "images"))
    together = [
        [name for part in parts for name in part]
        for parts in zip(*(one[batching]["ids"] for one in found), strict=True)
    ]
    whole = make_iterator(source, PROCESSOR, batching=batching, **OPTIONS)
    assert [next(whole)["id"].tolist() for _ in range(BATCHES)] == together
    whole.set_state(found[0][batching]["state"])
    assert [next(whole)["id"].tolist() for _ in range(BATCHES - 3)] == together[3:]
