"""What "auto" takes: the order of its sources, the files of entries, ranks and compiled graphs."""

import errno
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vidl import ops
from vidl.kernels import choices, library
from vidl.kernels.constant import assume_constant
from vidl.kernels.space_time_attention import pytorch

OP = "select_tokens"
X, SCORES = torch.randn(2, 9, 16), torch.rand(2, 8)


def select(x=X, scores=SCORES, backend="auto"):
    return ops.select_tokens(x, scores, 4, prefix=1, backend=backend).tokens


def key_of(call=select):
    """The key of the last call with "auto" in `call`."""
    keys = []
    with choices.recording(lambda key, *call: keys.append(key)):
        call()
    return keys[-1]


KEY = key_of()


def chosen(key=KEY, device="cpu", dtype=torch.float32, **facts):
    return library.automatic(OP, device, dtype, key, **facts)


def fresh(monkeypatch):
    """Read the entries anew, as another process would."""
    monkeypatch.setattr(choices, "_tables", {})
    monkeypatch.setattr(choices, "_said", set())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path))
    fresh(monkeypatch)
    return tmp_path


def ship(tmp_path, monkeypatch, backend, device="cpu"):
    """Plant a table of the package for this CPU."""
    table = choices.Table({KEY: backend}).as_json()["tuned"]
    file = tmp_path / "shipped.json"
    file.write_text(json.dumps({choices.device.name_of(device): table}))
    monkeypatch.setattr(choices, "SHIPPED", file)


def test_the_package_ships_a_table():
    assert isinstance(json.loads(choices.SHIPPED.read_text()), dict)


def test_a_key_has_what_the_speed_depends_on():
    assert KEY.op == OP and dict(KEY.sizes) == {"tokens": 3, "rows": 4, "width": 4}
    assert dict(KEY.facts) == {"order": "index", "fuse": "", "packed": False}
    assert (KEY.dtype, KEY.gradient, KEY.policy) == ("float32", False, "eager")
    x = X.clone().requires_grad_()
    assert key_of(lambda: select(x)).gradient
    with torch.no_grad():
        assert not key_of(lambda: select(x)).gradient
    assert key_of(lambda: select(X.bfloat16())).dtype == "bfloat16"
    assert "tokens ~8" in str(KEY) and "forward" in str(KEY)


def test_every_op_has_a_key():
    qkv, groups = torch.randn(3, 8, 2, 32), ops.Groups.equal(2, 4)
    video, ids = torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8), torch.tensor([[0, 3]])
    weight = torch.randn(8, 3, 2, 8, 8)
    calls = {
        "space_time_attention": lambda: ops.space_time_attention(*qkv, groups),
        "token_scores": lambda: ops.cls_attention_scores(*qkv[:2], groups),
        "select_tokens": select,
        "masked_patch_embed": lambda: ops.masked_patch_embed(video, weight, ids_keep=ids),
        "masked_patch_loss": lambda: ops.masked_patch_loss(
            torch.randn(1, 2, 384), video, ids, patch_size=8, tubelet_size=2
        ),
        "frame_difference": lambda: ops.frame_difference(video, (2, 8, 8)),
    }
    assert set(calls) == {name for name in library.OPS if not name.endswith("_bwd")}
    for name, call in calls.items():
        assert key_of(call).op == name


def test_the_order_of_the_sources(cache, monkeypatch):
    assert chosen() == ("native", "rule")
    ship(cache, monkeypatch, "reference")
    fresh(monkeypatch)
    assert chosen() == ("reference", "shipped")
    choices.write("cpu", KEY, "native")
    assert chosen() == ("native", "tuned")
    fresh(monkeypatch)  # another process
    assert chosen() == ("native", "tuned")
    monkeypatch.setenv("VIDL_BACKEND", "reference")
    assert chosen() == ("reference", "VIDL_BACKEND")
    assert chosen(KEY._replace(gradient=True))[1] == "VIDL_BACKEND"
    monkeypatch.setenv("VIDL_BACKEND", "auto")
    assert chosen() == ("native", "tuned")
    assert chosen(KEY._replace(gradient=True)) == ("native", "rule")


def test_the_rule_takes_the_first_that_can_run():
    assert library.automatic(OP, "cpu", torch.float64)[0] != "native"
    assert library.automatic(OP, "mps", torch.float32)[0] in ("torch", "reference")
    assert library.automatic(OP, "cuda", torch.float32)[0] in ("torch", "reference")


def test_an_entry_that_cannot_run_is_a_miss(cache, monkeypatch):
    ship(cache, monkeypatch, "reference")
    choices.write("cpu", KEY, "removed")
    assert chosen() == ("reference", "shipped")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choices.write("cpu", KEY, "triton")
    assert chosen() == ("reference", "shipped")


def test_vidl_backend_is_a_backend_asked_for_by_name(monkeypatch):
    monkeypatch.setenv("VIDL_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*'native'.*'fastest'"):
        select()
    monkeypatch.setenv("VIDL_BACKEND", "native")
    with pytest.raises(RuntimeError, match="'native' cannot run on cpu in float64"):
        select(X.double(), SCORES)
    select(X.double(), SCORES, backend="reference")


def test_a_backend_asked_for_by_name_ignores_entries():
    choices.write("cpu", KEY, "reference")
    assert library.choose("native", OP, "cpu", torch.float32, lambda: KEY) == "native"


def test_auto_runs_what_was_chosen(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the rule's choice ran")

    x = X.clone().requires_grad_()
    choices.write("cpu", key_of(lambda: select(x)), "reference")
    monkeypatch.setattr(library, "_call", refuse)
    select(x).sum().backward()  # forward and backward share the backend


def test_a_damaged_file_is_a_miss(monkeypatch):
    other = KEY._replace(gradient=True)
    choices.write("cpu", KEY, "reference")
    choices.write("cpu", other, "reference")
    for content in ('{"key": ', "[]", '{"key": {"op": "x"}, "backend": "native"}', "\0"):
        choices.file_of("cpu", KEY).write_text(content)
        fresh(monkeypatch)
        with pytest.warns(UserWarning, match=r"select_tokens-.*json is damaged and ignored"):
            assert chosen() == ("native", "rule")
        assert chosen(other) == ("reference", "tuned")  # without a second warning


@pytest.mark.parametrize("error", [RuntimeError("no home"), PermissionError()], ids=repr)
def test_without_a_cache_folder_there_are_no_entries(error, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(choices, "cache_folder", fail)
    assert chosen() == ("native", "rule")


def test_a_full_disk_names_the_file(monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    choices.write("cpu", KEY._replace(gradient=True), "reference")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device: .*select_tokens-"):
        choices.write("cpu", KEY, "reference")
    assert chosen() == ("reference", "tuned")  # for this process
    files = {file.name for file in choices.folder("cpu").iterdir()}
    assert files == {"device.txt", choices.file_of("cpu", KEY._replace(gradient=True)).name}


def in_processes(call, arguments):
    """Run calls in forks of this process; returns their exit statuses."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=call, args=values) for values in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def _write_all(start, sizes, backend):
    torch.set_num_threads(start)
    for size in sizes:
        choices.write("cpu", KEY._replace(sizes=(("tokens", size),)), backend, seconds=[0.0] * 999)


def test_concurrent_writers(monkeypatch):
    threads = torch.get_num_threads()
    arguments = [(threads, range(40), backend) for backend in ("native", "reference")]
    assert in_processes(_write_all, arguments) == [0, 0]
    fresh(monkeypatch)
    tuned = choices.table("cpu").tuned  # would warn of a file that is not whole
    assert len(tuned) == 40 and set(tuned.values()) <= {"native", "reference"}


def test_other_hardware_or_software_has_other_entries(monkeypatch):
    choices.write("cpu", KEY, "reference")
    identity = choices.device.identity("cpu")
    assert {"device", "isa", "threads", "torch", "triton", "kernels"} <= set(identity)
    about = choices.folder("cpu") / "device.txt"
    assert json.loads(about.read_text()) == identity
    for name in identity:
        changed = identity | {name: "another"}
        monkeypatch.setattr(choices.device, "identity", lambda kind, changed=changed: changed)
        fresh(monkeypatch)
        assert chosen() == ("native", "rule")


def test_a_change_of_threads_is_seen_at_once():
    choices.write("cpu", KEY, "reference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert chosen() == ("native", "rule")
    finally:
        torch.set_num_threads(before)
    assert chosen() == ("reference", "tuned")


def on_a_fake_gpu(monkeypatch, capturing=False):
    monkeypatch.setattr(choices.device, "exists", lambda kind: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(choices.device, "current", lambda kind: (kind, 0))
    monkeypatch.setattr(choices.device, "name_of", lambda kind: "Fake 100")
    monkeypatch.setattr(choices.device, "identity", lambda kind: {"device": "Fake 100"})


def test_graphs_have_choices_of_their_own(monkeypatch):
    for capturing in (False, True):
        on_a_fake_gpu(monkeypatch, capturing)
        with choices.recording(lambda *call: None):
            key = choices.key(OP, "cuda", torch.float16, (), {"rows": 8})
        assert key is not None and key.policy == ("graph" if capturing else "eager")


def test_one_line_where_nothing_was_tuned(monkeypatch, caplog):
    on_a_fake_gpu(monkeypatch)
    for _ in range(2):
        backend, _ = library.automatic(OP, "cuda", torch.float16)
    line = f"vidl: using {backend} on Fake 100; `vidl tune` measures the kernels on it"
    assert caplog.messages == [line]
    fresh(monkeypatch)
    choices.write("cuda", KEY, "native")
    library.automatic(OP, "cuda", torch.float16)
    select()  # on a CPU there is nothing to say
    assert caplog.messages == [line]


def compiled_graphs(call, inputs, dynamic):
    """The graphs of torch.compile for `call` on several inputs."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=keep, dynamic=dynamic)
    for values in inputs:
        torch.testing.assert_close(compiled(*values), call(*values))
    return graphs


def test_the_choice_is_a_constant_of_a_compiled_graph():
    inputs = [(X, SCORES)]
    (graph,) = compiled_graphs(select, inputs, dynamic=False)
    assert "vidl.select_tokens" in str(graph.graph)
    choices.write("cpu", KEY, "reference")
    (graph,) = compiled_graphs(select, inputs, dynamic=False)
    assert "vidl.select_tokens" not in str(graph.graph)


@pytest.mark.parametrize("tuned", [False, True], ids=["rule", "tuned"])
def test_a_dynamic_graph_takes_the_rule_and_compiles_once(tuned):
    sizes = (9, 20, 40, 90, 200)
    inputs = [(torch.randn(2, n, 16), torch.rand(2, n - 1)) for n in sizes]
    if tuned:
        for values in inputs:
            choices.write("cpu", key_of(lambda values=values: select(*values)), "reference")
    (graph,) = compiled_graphs(select, inputs, dynamic=True)
    assert "vidl.select_tokens" in str(graph.graph)


def test_dynamic_attention_compiles_as_often_as_by_name():
    """Twice: the second graph has symbols for the numbers inside the groups."""

    def attend(q, k, v, groups):
        return ops.space_time_attention(q, k, v, groups)

    inputs = []
    for size in (5, 9, 20, 40):
        offsets = torch.tensor([0, size, 2 * size - 1], dtype=torch.int32)
        groups = ops.Groups.joint(offsets, 2 * size - 1, size)
        inputs.append((*torch.randn(3, 2 * size - 1, 2, 32), groups))
        choices.write("cpu", key_of(lambda values=inputs[-1]: attend(*values)), "reference")
    graphs = compiled_graphs(attend, inputs, dynamic=True)
    assert len(graphs) <= 2
    assert all("vidl.space_time_attention" in str(graph.graph) for graph in graphs)


def _rank(rank, folder):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDL_CACHE", f"{folder}/{rank}")
        choices._tables.clear()
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2
        )
        try:
            choices.write("cpu", KEY, "reference" if rank == 0 else "native")
            other = KEY._replace(gradient=True)
            if rank == 1:
                choices.write("cpu", other, "reference")
            with choices.using("cpu", choices.share("cpu")):
                assert chosen() == ("reference", "tuned")
                assert chosen(other) == ("native", "rule")
            assert chosen() == ("reference" if rank == 0 else "native", "tuned")
        finally:
            dist.destroy_process_group()


def test_ranks_choose_alike(tmp_path):
    assert in_processes(_rank, [(rank, str(tmp_path)) for rank in range(2)]) == [0, 0]


def test_constants_are_marked_as_pytorch_marks_them():
    marked = [mark(lambda: 1) for mark in (torch.compiler.assume_constant_result, assume_constant)]
    assert vars(marked[0]) == vars(marked[1]) != {}


def test_the_ops_do_not_import_the_compiler():
    code = "import sys, vidl.ops; print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_cached_constants_are_not_traced():
    def run(x):
        library.by_rule("select_tokens", "cpu", torch.float64)  # it may say why, once
        return x + 1 if pytorch.provides("math", "sqrt") else x - 1

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1
