from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from model_configs import tiny_model, tiny_tokenizer

import fastedit
from fastedit.stats import Statistics, collect
from fastedit.stats.distributed import Group, joined

TESTS = Path(__file__).resolve().parent.parent
TEXTS = [f"Sentence {i}" + " of rather different length" * (i % 4) + "." for i in range(150)]
SETTINGS = {"layers": [0, 2], "n_tokens": 1501, "batch_tokens": 100, "dtype": torch.float64}

PROCESS = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from model_configs import tiny_model, tiny_tokenizer
from fastedit.stats import collect
from fastedit.stats.cache import collect_and_save
from fastedit.stats.distributed import joined

settings = dict(layers=[0, 2], n_tokens=1501, batch_tokens=100, dtype=torch.float64)
texts = [f"Sentence {{i}}" + " of rather different length" * (i % 4) + "." for i in range(150)]
model = tiny_model("gpt2", dtype=torch.float64, attn_implementation="eager")
tokenizer = tiny_tokenizer()
found = collect(model, tokenizer, texts, **settings)             # makes its own process group
found[0].save(sys.argv[1] + "/" + sys.argv[2])
assert not torch.distributed.is_initialized()
with joined() as group:                                          # uses the one that is there
    collect_and_save(model, tokenizer, texts, directory=sys.argv[1] + "/saved", **settings)
    few = collect(model, tokenizer, texts[:1], layers=[0], n_tokens=3)   # more processes than sequences
    assert few[0].count == 3
"""


def run(world: int, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "process.py"
    script.write_text(PROCESS.format(tests=str(TESTS)))
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(Path(fastedit.__file__).parent.parent), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), f"rank{rank}"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run(2, tmp_path)
    model = tiny_model("gpt2", dtype=torch.float64, attn_implementation="eager")
    alone = collect(model, tiny_tokenizer(), TEXTS, **SETTINGS)
    first, second = (Statistics.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert first.count == second.count == alone[0].count == 1501
    assert torch.equal(first.second_moment, second.second_moment)
    assert relative_error(first.second_moment, alone[0].second_moment) < 1e-10
    assert first.meta == alone[0].meta
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert saved == ["layer_000.safetensors", "layer_002.safetensors"]
    layer = Statistics.load(tmp_path / "saved" / "layer_002.safetensors")
    assert relative_error(layer.second_moment, alone[2].second_moment) < 1e-10


def test_alone_without_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert group == Group(0, 1)
        assert group.total(5) == 5
        group.wait()
