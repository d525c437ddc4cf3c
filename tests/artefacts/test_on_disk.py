from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file, save_file

import fastedit
from fastedit import BaseMismatch, CorruptFile, FasteditError, NumericalError
from fastedit.artefacts import (
    Edit,
    LowRank,
    apply_to_directory,
    export,
    list_directory,
    load_edit,
    revert_directory,
    stack_of,
)

INDEX = "model.safetensors.index.json"


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, without the lock."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".fastedit.lock"
    }


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    single = directory / "model.safetensors"
    if single.exists():
        return load_file(single)
    shards = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    return {name: tensor for shard in shards for name, tensor in load_file(directory / shard).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype)


class Case:
    """A model directory, and edits made one on top of the other in memory."""

    def __init__(
        self, path: Path, kind: str, dtype: torch.dtype, shards: bool, make_model, make_edit
    ) -> None:
        self.model = make_model(kind, dtype)
        self.path = path / "model"
        self.model.save_pretrained(self.path, max_shard_size="6KB" if shards else "5GB")
        assert (self.path / INDEX).exists() == shards
        (self.path / "tokenizer.json").write_text("{}")
        self.before = files_of(self.path)
        self.dtype = dtype
        self.edits = []
        for seed, layers in enumerate([(0, 1), (1, 2), (0,)]):
            edit = make_edit(self.model, layers, seed=seed)
            stack_of(self.model).push(edit)
            edit.save(path / f"edit{seed}")
            self.edits.append(path / f"edit{seed}")

    def in_memory(self, which: list[int], make_model, kind: str) -> dict[str, torch.Tensor]:
        """State of a model with these edits on it, in this order."""
        model = make_model(kind, self.dtype)
        for index in which:
            stack_of(model).push(load_edit(self.edits[index]), force=True)
        return dict(model.state_dict())


@pytest.fixture
def make_case(tmp_path, make_model, make_edit):
    def make(kind: str = "llama", dtype: torch.dtype = torch.float32, shards: bool = False) -> Case:
        return Case(tmp_path, kind, dtype, shards, make_model, make_edit)

    return make


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_directory_equals_memory_bit_for_bit(kind, dtype, shards, make_case, make_model) -> None:
    case = make_case(kind, dtype, shards)
    for count, directory in enumerate(case.edits):
        row = apply_to_directory(directory, case.path)
        assert row["id"] == load_edit(directory).id
        expected = case.in_memory(list(range(count + 1)), make_model, kind)
        loaded = load_model(case.path, dtype).state_dict()
        assert same(loaded, {name: expected[name] for name in loaded})
    assert [row["id"] for row in list_directory(case.path)] == [load_edit(d).id for d in case.edits]
    for gone, left in ((1, [0, 2]), (2, [0]), (0, [])):
        edit_id = load_edit(case.edits[gone]).id
        assert [row["id"] for row in revert_directory(case.path, edit_id[:6])] == [edit_id]
        loaded = load_model(case.path, dtype).state_dict()
        expected = case.in_memory(left, make_model, kind)
        assert same(loaded, {name: expected[name] for name in loaded})
    assert files_of(case.path) == case.before
    assert list_directory(case.path) == []


@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_only_what_is_edited_is_written(shards, make_case) -> None:
    case = make_case(shards=shards)
    stamps = {p: p.stat().st_mtime_ns for p in case.path.iterdir()}
    row = apply_to_directory(case.edits[0], case.path)
    assert row["matrices"] == 2
    changed = {p.name for p, stamp in stamps.items() if not p.exists() or p.stat().st_mtime_ns != stamp}
    if shards:
        weight_map = json.loads(case.before[INDEX])["weight_map"]
        edited = {weight_map[name] for name in load_edit(case.edits[0]).weight_names}
        assert changed == {INDEX, *edited}
        assert len(edited) < len(set(weight_map.values()))
    else:
        assert changed == {"model.safetensors"}
    assert not list(case.path.glob(".*.tmp"))
    revert_directory(case.path, "all")
    assert files_of(case.path) == case.before


def test_revert_last_and_all(make_case) -> None:
    case = make_case()
    for directory in case.edits:
        apply_to_directory(directory, case.path)
    assert revert_directory(case.path)[0]["id"] == load_edit(case.edits[2]).id
    assert len(revert_directory(case.path, "all")) == 2
    assert files_of(case.path) == case.before
    with pytest.raises(FasteditError, match="nothing to revert"):
        revert_directory(case.path)


def test_out_leaves_the_model_and_can_be_reverted(make_case, tmp_path) -> None:
    case = make_case(shards=True)
    out = tmp_path / "out"
    apply_to_directory(case.edits[0], case.path, out=out)
    assert files_of(case.path) == case.before
    assert len(list_directory(out)) == 1
    apply_to_directory(case.edits[1], out)
    revert_directory(out, "all")
    assert files_of(out) == case.before
    with pytest.raises(FileExistsError):
        apply_to_directory(case.edits[0], case.path, out=out)


def test_tied_weights_mixed_dtypes_and_missing_prefix(tmp_path, make_model, make_edit) -> None:
    """A checkpoint of the base model, as GPT-2's own: names without prefix, other dtypes, no metadata."""
    model = make_model("gpt2")
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    state = {n.removeprefix("transformer."): t for n, t in load_file(directory / "model.safetensors").items()}
    state["ln_f.weight"] = state["ln_f.weight"].half()
    state["steps"] = torch.arange(3)
    save_file(state, directory / "model.safetensors")
    before = files_of(directory)
    edit = make_edit(model)
    stack_of(model).push(edit)
    apply_to_directory(edit, directory)
    after = weights_of(directory)
    for name, tensor in state.items():
        full = f"transformer.{name}"
        expected = model.state_dict()[full] if full in edit.factors else tensor
        assert torch.equal(after[name], expected)
        assert after[name].dtype == tensor.dtype
    assert torch.equal(load_model(directory).lm_head.weight, state["wte.weight"])
    revert_directory(directory)
    assert files_of(directory) == before


def test_edit_made_in_float32_fits_the_same_weights_in_half_precision(
    tmp_path, make_model, make_edit
) -> None:
    half = make_model("llama", torch.bfloat16)
    half.save_pretrained(tmp_path / "model")
    wide = make_model("llama", torch.bfloat16).float()
    edit = make_edit(wide)
    stack_of(wide).push(edit)
    apply_to_directory(edit, tmp_path / "model")
    name = edit.weight_names[0]
    assert torch.equal(weights_of(tmp_path / "model")[name], wide.state_dict()[name].bfloat16())


def test_tied_weight_stored_twice_is_changed_twice(tmp_path, make_model, make_edit) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    before = files_of(directory)
    change = LowRank(torch.randn(50, 2), torch.randn(16, 2))
    edit = Edit(method="x", facts=make_edit(model).facts, factors={"lm_head.weight": change})
    stack_of(model).push(edit)
    apply_to_directory(edit, directory)
    after = weights_of(directory)
    assert torch.equal(after["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(after["model.embed_tokens.weight"], model.lm_head.weight)
    revert_directory(directory)
    assert files_of(directory) == before


# ------------------------------------------------------------------ what is refused


def test_wrong_base_position_and_repetition_are_refused(make_case, tmp_path, make_model) -> None:
    case = make_case()
    with pytest.raises(BaseMismatch, match="does not fit this model"):
        apply_to_directory(case.edits[1], case.path)
    apply_to_directory(case.edits[0], case.path)
    with pytest.raises(FasteditError, match="already"):
        apply_to_directory(case.edits[0], case.path)
    now = files_of(case.path)
    other = tmp_path / "other"
    make_model("llama", seed=3).save_pretrained(other)
    with pytest.raises(BaseMismatch, match="its bits are others"):
        apply_to_directory(case.edits[0], other)
    make_model("gpt2").save_pretrained(tmp_path / "third")
    with pytest.raises(BaseMismatch, match="do not hold"):
        apply_to_directory(case.edits[0], tmp_path / "third")
    assert files_of(case.path) == now
    apply_to_directory(case.edits[0], other, force=True)
    assert len(list_directory(other)) == 1
    with pytest.raises(FasteditError, match="no edit in .* with an id like 'zzz'"):
        revert_directory(other, "zzz")


def test_weights_changed_by_something_else_are_noticed(make_case) -> None:
    case = make_case(shards=True)
    apply_to_directory(case.edits[0], case.path)
    name = load_edit(case.edits[0]).weight_names[1]
    file = case.path / json.loads((case.path / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    now = files_of(case.path)
    for attempt in (
        lambda: revert_directory(case.path),
        lambda: apply_to_directory(case.edits[1], case.path),
    ):
        with pytest.raises(BaseMismatch, match="was changed by something else"):
            attempt()
        assert files_of(case.path) == now


def test_places_without_weights_are_explained(make_case, tmp_path) -> None:
    case = make_case()
    with pytest.raises(FasteditError, match="there is no model directory"):
        apply_to_directory(case.edits[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FasteditError, match=r"holds neither model\.safetensors"):
        list_directory(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FasteditError, match="save_pretrained"):
        list_directory(tmp_path / "empty")
    link = tmp_path / "snapshot"
    link.mkdir()
    for file in case.path.iterdir():
        (link / file.name).symlink_to(file)
    with pytest.raises(FasteditError, match="is a link"):
        apply_to_directory(case.edits[0], link)
    apply_to_directory(case.edits[0], link, out=tmp_path / "out")
    assert files_of(case.path) == case.before


@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_truncated_models_are_named(shards, make_case) -> None:
    case = make_case(shards=shards)
    names = [name for name in case.before if name.endswith(".safetensors")]
    path = case.path / sorted(names)[0]
    for length in (0, 5, 60, len(case.before[path.name]) - 1):
        path.write_bytes(case.before[path.name][:length])
        with pytest.raises(CorruptFile, match=path.name):
            apply_to_directory(case.edits[0], case.path)
    path.unlink()
    with pytest.raises((CorruptFile, FasteditError)):
        apply_to_directory(case.edits[0], case.path)


def test_missing_originals_are_named(make_case) -> None:
    case = make_case()
    apply_to_directory(case.edits[0], case.path)
    now = files_of(case.path)
    for file in (case.path / "fastedit" / "originals").iterdir():
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(FasteditError, match="damaged"):
            revert_directory(case.path)
        file.write_bytes(data)
        file.unlink()
        with pytest.raises(FasteditError, match="missing"):
            revert_directory(case.path)
        file.write_bytes(data)
    assert files_of(case.path) == now


def test_not_finite_results_are_refused(make_case) -> None:
    case = make_case(dtype=torch.float16)
    edit = load_edit(case.edits[0])
    edit.factors[edit.weight_names[1]].left.fill_(1e6)
    with pytest.raises(NumericalError, match=r"layers\.1.*not finite in float16"):
        apply_to_directory(edit, case.path)
    assert files_of(case.path) == case.before


def test_two_processes_at_once_are_refused(make_case) -> None:
    case = make_case()
    handle = os.open(case.path / ".fastedit.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for attempt in (
        lambda: apply_to_directory(case.edits[0], case.path),
        lambda: revert_directory(case.path),
    ):
        with pytest.raises(FasteditError, match="another process is editing"):
            attempt()
    os.close(handle)
    apply_to_directory(case.edits[0], case.path)


# ------------------------------------------------------------------ dying at any point


@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_full_disk_leaves_the_model_and_names_the_file(shards, make_case, monkeypatch) -> None:
    from fastedit.artefacts import safetensors_file

    case = make_case(shards=shards)
    apply_to_directory(case.edits[0], case.path)
    now = files_of(case.path)
    write = safetensors_file._write
    for action, limit in itertools.product(("apply", "last", "all"), range(0, 40, 3)):
        budget = [limit]

        def full(file, data, budget=budget):
            budget[0] -= 1
            if budget[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(file, data)

        monkeypatch.setattr(safetensors_file, "_write", full)
        try:
            if action == "apply":
                apply_to_directory(case.edits[1], case.path)
            else:
                revert_directory(case.path, action)
        except FasteditError as error:
            assert "no space left" in str(error)  # noqa: PT017
            assert str(case.path) in str(error)  # noqa: PT017
            monkeypatch.setattr(safetensors_file, "_write", write)
            kept = {n: d for n, d in files_of(case.path).items() if n in now}
            assert kept == now
            continue
        monkeypatch.setattr(safetensors_file, "_write", write)
        break
    else:
        pytest.fail("no limit was high enough")
    revert_directory(case.path, "all")
    assert files_of(case.path) == case.before


def _kill_everywhere(case: Case, folder: Path, number: str) -> dict[str, Path]:
    """Kill an application and two kinds of revert at every point; action → where the copies are."""
    jobs = []
    for action in ("apply", "last", "all"):
        model = case.path if action == "apply" else folder / "apply" / "done"
        job = {"workspace": folder / action, "model": model, "edit": case.edits[1], "action": action}
        jobs.append({**{name: str(value) for name, value in job.items()}, "signal": number})
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(fastedit.__file__).parents[1]),
    }
    program = Path(__file__).with_name("kill_points.py")
    subprocess.run([sys.executable, program], input=json.dumps(jobs), text=True, check=True, env=environment)
    return {action: folder / action for action in ("apply", "last", "all")}


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_killed_at_any_point_leaves_old_or_new_weights(shards, number, make_case, tmp_path) -> None:
    case = make_case(shards=shards)
    states = [weights_of(case.path)]
    for edit in case.edits[:2]:
        apply_to_directory(edit, case.path)
        states.append(weights_of(case.path))
    revert_directory(case.path)
    assert not same(states[0], states[1])
    assert not same(states[1], states[2])
    places = _kill_everywhere(case, tmp_path / "killed", number)
    for action, former, later in (("apply", 1, 2), ("last", 2, 1), ("all", 2, 0)):
        copies = sorted(path for path in places[action].iterdir() if path.name != "done")
        assert len(copies) > 10
        seen = []
        for copy in [*copies, places[action] / "done"]:
            weights = weights_of(copy)
            seen.append(same(weights, states[later]))
            assert seen[-1] or same(weights, states[former]), copy
            assert len(list_directory(copy)) == (later if seen[-1] else former)
        assert seen == sorted(seen)
        assert seen[0] is False
        assert seen[-1] is True
        for copy in copies[:: max(1, len(copies) // 6)]:  # the next run tidies up, whatever was left
            if not list_directory(copy):
                apply_to_directory(case.edits[0], copy)
            revert_directory(copy, "all")
            assert files_of(copy) == case.before


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("shards", [False, True], ids=["single", "shards"])
def test_full_export_of_a_directory(shards, make_case, make_model, tmp_path) -> None:
    case = make_case(shards=shards)
    out = export(case.edits, case.path, tmp_path / "out")
    assert files_of(case.path) == case.before
    assert set(files_of(out)) == set(case.before)
    expected = case.in_memory([0, 1, 2], make_model, "llama")
    assert same(load_model(out).state_dict(), expected)
    assert list_directory(out) == []
    with pytest.raises(FileExistsError):
        export(case.edits, case.path, out)
    export(case.edits[:1], case.path, out, overwrite=True, dtype="bfloat16")
    state = load_model(out, torch.bfloat16).state_dict()
    single = case.in_memory([0], make_model, "llama")
    assert same(state, {name: tensor.bfloat16() for name, tensor in single.items()})
    config = json.loads((out / "config.json").read_text())
    assert (config.get("dtype") or config["torch_dtype"]) == "bfloat16"
    # edits that are in the directory already count as part of it
    apply_to_directory(case.edits[0], case.path)
    export(case.edits[:2], case.path, tmp_path / "second")
    expected = case.in_memory([0, 1], make_model, "llama")
    assert same(load_model(tmp_path / "second").state_dict(), expected)
    assert not (tmp_path / "second" / "fastedit").exists()


def test_full_export_of_a_live_model(make_case, make_model, tmp_path, bits, assert_bits) -> None:
    case = make_case()
    model = make_model("llama")
    before = bits(model)
    out = export(case.edits[:1], model, tmp_path / "out")
    assert_bits(model, before)
    assert same(load_model(out).state_dict(), case.in_memory([0], make_model, "llama"))
    export([], case.model, tmp_path / "half", dtype=torch.float16)
    state = load_model(tmp_path / "half", torch.float16).state_dict()
    assert same(state, {name: tensor.half() for name, tensor in case.model.state_dict().items()})
    with pytest.raises(BaseMismatch):
        export(case.edits[1:], model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert_bits(model, before)


def test_lora_export(make_case, tmp_path) -> None:
    case = make_case()
    out = export(case.edits, case.path, tmp_path / "lora", format="lora")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(case.path)
    tensors = load_file(out / "adapter_model.safetensors")
    edits = [load_edit(directory) for directory in case.edits]
    start = "base_model.model.model.layers.1.mlp.down_proj"
    product = tensors[f"{start}.lora_B.weight"] @ tensors[f"{start}.lora_A.weight"]
    name = "model.layers.1.mlp.down_proj.weight"
    total = sum(edit.factors[name].dense().double() for edit in edits if name in edit.factors)
    assert relative_error(product, total) < 2e-6
    with pytest.raises(ValueError, match="format must be"):
        export(case.edits, case.path, tmp_path / "x", format="gguf")
    with pytest.raises(ValueError, match="dtype must be"):
        export(case.edits, case.path, tmp_path / "x", dtype="int8")
