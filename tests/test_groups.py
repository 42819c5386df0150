"""The constructors of Groups against loops over tokens, and the errors of check()."""

import pytest
import torch
from torch.nn import functional as F
from where import Where

from vidl.ops import (
    Groups,
    ReplicatedGlobal,
    cls_attention_scores,
    mean_attention_scores,
    space_time_attention,
    value_weighted_scores,
)

GRID = (4, 5, 6)


def members(groups):
    """The query rows and the key rows of every group that has queries."""
    groups.check()
    queries, keys = (x.tolist() for x in (groups.query_offsets, groups.key_offsets))
    query_rows = list(range(groups.num_queries))
    key_rows = list(range(groups.num_keys))
    if groups.query_rows is not None:
        query_rows = groups.query_rows.tolist()
    if groups.key_rows is not None:
        key_rows = groups.key_rows.tolist()
    pairs = set()
    for g in range(groups.num_groups):
        q = frozenset(query_rows[queries[g] : queries[g + 1]])
        if q:
            pairs.add((q, tuple(sorted(key_rows[keys[g] : keys[g + 1]]))))
    return pairs


def by_label(labels):
    """Groups of self-attention among the rows with the same label."""
    groups = {}
    for row, label in enumerate(labels):
        groups.setdefault(label, []).append(row)
    return {(frozenset(rows), tuple(sorted(rows))) for rows in groups.values()}


def drawn(ragged, seed=0):
    """Visible ids of three samples, packed or not, and for every row (sample, t, y, x)."""
    generator = torch.Generator().manual_seed(seed)
    T, H, W = GRID
    lengths = [17, 0, 40] if ragged else [30, 30, 30]
    ids = [torch.randperm(T * H * W, generator=generator)[:n] for n in lengths]
    places = [
        (b, int(i) // (H * W), int(i) // W % H, int(i) % W)
        for b, row in enumerate(ids)
        for i in row
    ]
    if not ragged:
        return torch.stack(ids), None, places
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat(ids), cu_seqlens, places


@pytest.mark.parametrize("ragged", [False, True])
def test_spatial_and_temporal(ragged):
    ids, cu_seqlens, places = drawn(ragged)
    assert members(Groups.spatial(ids, GRID, cu_seqlens)) == by_label([p[:2] for p in places])
    temporal = Groups.temporal(ids, GRID, cu_seqlens)
    assert members(temporal) == by_label([(p[0], *p[2:]) for p in places])
    assert temporal.max_keys == 4


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "size, shift",
    [
        ((2, 3, 3), (0, 0, 0)),
        ((2, 3, 3), (1, 1, 2)),
        ((8, 2, 6), (4, 1, 0)),
        ((1, 1, 1), (0, 0, 0)),
    ],
)
def test_window(ragged, size, shift):
    ids, cu_seqlens, places = drawn(ragged)
    labels = [
        (b, *((p - s) // n for p, n, s in zip(place, size, shift, strict=True)))
        for b, *place in places
    ]
    groups = Groups.window(ids, GRID, size, shift, cu_seqlens)
    assert members(groups) == by_label(labels)


def test_joint_equal_and_cross():
    cu = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert members(Groups.joint(cu, 7, 5)) == by_label([0, 0, 0, 2, 2, 2, 2])
    assert members(Groups.equal(3, 2)) == by_label([0, 0, 1, 1, 2, 2])
    words = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    cross = Groups.cross(cu, words, num_queries=7, num_keys=4, max_queries=4, max_keys=2)
    assert members(cross) == {(frozenset((0, 1, 2)), (0,)), (frozenset((3, 4, 5, 6)), (3,))}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_with_global_is_frozens_rule(ragged, kind):
    ids, cu_seqlens, places = drawn(ragged)
    groups = getattr(Groups, kind)(ids, GRID, cu_seqlens).with_global()
    samples = [[r for r, p in enumerate(places) if p[0] == b] for b in range(3)]
    expected = set()
    for b, rows in enumerate(samples):
        first = sum(len(s) + 1 for s in samples[:b])
        row_of = {r: first + 1 + i for i, r in enumerate(rows)}
        everything = tuple(range(first, first + len(rows) + 1))
        expected.add((frozenset((first,)), everything))
        label = {r: places[r][1:2] if kind == "spatial" else places[r][2:] for r in rows}
        for one in set(label.values()):
            group = [row_of[r] for r in rows if label[r] == one]
            expected.add((frozenset(group), tuple(sorted([first, *group]))))
    assert members(groups) == expected
    assert groups.num_queries == len(places) + 3
    first = groups.key_rows[groups.key_offsets[:-1].long()]  # the global key comes first
    starts = groups.row_offsets[:-1].tolist()
    assert set(first.tolist()) <= set(starts)


@pytest.mark.parametrize("length", [24, 22, 3])
@pytest.mark.parametrize("local, random", [(1, 0), (1, 2), (3, 1)])
def test_block_sparse(length, local, random):
    block, batch = 4, 2
    blocks = -(-length // block)
    if min(local, blocks) + random > blocks:
        with pytest.raises(ValueError, match="blocks"):
            Groups.block_sparse(batch, length, block, local=local, random=random)
        return
    groups = Groups.block_sparse(batch, length, block, local=local, random=random, seed=3)
    assert len(members(groups)) == batch * blocks
    for queries, keys in members(groups):
        b, first = min(queries) // length, min(queries) % length
        assert first % block == 0 and len(queries) == min(block, length - first)
        seen = {(k - b * length) // block for k in keys}
        near = {(first // block + j - local // 2) % blocks for j in range(min(local, blocks))}
        assert near <= seen and len(seen) == min(local, blocks) + random
        whole = {s * block + i for s in seen for i in range(block) if s * block + i < length}
        assert {k - b * length for k in keys} == whole
    again = Groups.block_sparse(batch, length, block, local=local, random=random, seed=3)
    assert torch.equal(groups.key_rows, again.key_rows)


@pytest.mark.parametrize("seed", range(20))
def test_shared_rows_list_their_entries(seed):
    ids, cu_seqlens, _ = drawn(ragged=True, seed=seed)
    groups = Groups.spatial(ids, GRID, cu_seqlens).with_global()
    starts, entries = groups.entry_offsets.tolist(), groups.entries.tolist()
    for row in range(groups.num_keys):
        mine = entries[starts[row] : starts[row + 1]]
        assert mine == (groups.key_rows == row).nonzero().flatten().tolist()


def test_is_a_pytree():
    groups = Groups.spatial(drawn(False)[0], GRID)
    leaves, spec = torch.utils._pytree.tree_flatten(groups)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert members(again) == members(groups) and again.max_keys == groups.max_keys


IDS = torch.zeros(1, 3, dtype=torch.int64)
CU = torch.tensor([0, 2, 4]).int()


def cross(cu_keys=CU, **change):
    counts = {"num_queries": 4, "num_keys": 4, "max_queries": 2, "max_keys": 2}
    return Groups.cross(CU, cu_keys, **counts | change)


def broken(checked=False, **change):
    good = Groups.spatial(drawn(False)[0], GRID)
    return Groups(**{**vars(good), **change}, checked=checked)


def offsets(*inner):
    """[13] offsets from 0 to 90."""
    return torch.tensor([0, *inner, *[90] * (12 - len(inner))]).int()


@pytest.mark.parametrize(
    "text, change",
    [
        ("query_offsets that ascend", {"query_offsets": offsets(50, 40)}),
        ("query_offsets that ascend", {"query_offsets": offsets(50) + 1}),
        ("key_offsets that ascend", {"key_offsets": offsets(50).clamp(max=80)}),
        ("query_rows in", {"query_rows": torch.arange(1, 91).int()}),
        ("key_rows in", {"key_rows": torch.arange(-1, 89).int()}),
        (
            r"exactly one group.*\[0, 5\]",
            {"query_rows": torch.arange(90).where(torch.arange(90) != 5, 0).int()},
        ),
        ("at most 3 rows", {"max_keys": 3}),
        (r"key_offsets \[13\]", {"key_offsets": torch.tensor([0, 90]).int()}),
        (r"query_rows \[90\]", {"query_rows": torch.arange(91).int()}),
        (r"entries, or neither", {"entries": torch.arange(90).int()}),
        (
            "entries of these key_rows",
            {"entry_offsets": torch.arange(91).int(), "entries": torch.arange(90).int()},
        ),
    ],
)
def test_wrong_groups_are_not_built(text, change):
    with pytest.raises(ValueError, match=text):
        broken(**change)
    if "offsets that" in text or "rows in" in text or "exactly" in text or "at most" in text:
        with pytest.raises(ValueError, match=text):
            broken(**change, checked=True).check()


@pytest.mark.parametrize(
    "change", [{"query_offsets": torch.zeros(13)}, {"max_keys": 3.5}, {"num_keys": None}]
)
def test_groups_of_other_types_are_not_built(change):
    with pytest.raises(TypeError, match=f"need {next(iter(change))} "):
        broken(**change)


SHARED = dict(
    query_offsets=torch.tensor([0, 2, 4]).int(),
    key_offsets=torch.tensor([0, 2, 4]).int(),
    query_rows=None,
    key_rows=torch.tensor([0, 1, 1, 2]).int(),
    max_queries=2,
    max_keys=2,
    num_queries=4,
    num_keys=4,
)


def test_shared_keys_get_entries():
    groups = Groups(**SHARED)
    assert groups.entry_offsets.tolist() == [0, 1, 3, 4, 4]
    assert groups.entries.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="every key in one group, or entries"):
        Groups(**SHARED, checked=True).check()
    distinct = SHARED | {"key_rows": torch.tensor([3, 1, 0, 2]).int()}
    assert Groups(**distinct).entries is None


@pytest.fixture
def nan_in_new_memory():
    """torch fills memory with NaN that it would leave uninitialized."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SCORED = {
    "attention": lambda q, k, v, **options: space_time_attention(q, k, v, **options),
    "cls": lambda q, k, v, **options: cls_attention_scores(q, k, **options),
    "mean": lambda q, k, v, **options: mean_attention_scores(q, k, **options),
    "value": value_weighted_scores,
}


@pytest.mark.parametrize("backend", ["native", "triton", "emulated"])
@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("key_rows", [[0, 1, 1, 2], [4, 3, 0, 1], []])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_every_gradient_is_written(key_rows, name, backend):
    """Rows of keys in two groups and in none, without a call of with_entries()."""
    dtype = torch.float32 if backend != "emulated" else torch.bfloat16
    op = "space_time_attention" if name == "attention" else "token_scores"
    Where(backend, "cpu").skip_unless_runs(op, dtype)
    ends = (SHARED["key_offsets"] * (len(key_rows) > 0)).int()
    rows = {"key_rows": torch.tensor(key_rows).int(), "key_offsets": ends, "num_keys": 6}
    groups = Groups(**SHARED | rows)
    q, k, v = (torch.randn(n, 2, 32, dtype=dtype, requires_grad=True) for n in (4, 6, 6))
    results = [
        SCORED[name](q, k, v, groups=groups, backend=name_of) for name_of in (backend, "reference")
    ]
    weight = torch.randn_like(results[0])
    ours, theirs = (
        torch.autograd.grad(
            (x * weight).sum(), (q, k, v), allow_unused=True, materialize_grads=True
        )
        for x in results
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


BUILDERS = {
    "spatial": lambda ids, cu=None: Groups.spatial(ids, (2, 2, 2), cu),
    "temporal": lambda ids, cu=None: Groups.temporal(ids, (2, 2, 2), cu),
    "window": lambda ids, cu=None: Groups.window(ids, (2, 2, 2), (1, 2, 2), (0, 1, 0), cu),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_ids_and_offsets_out_of_range_join_no_sample(build, compiled):
    def rows(ids, cu=None):
        return build(ids, cu).query_rows

    torch._dynamo.reset()
    make = torch.compile(rows, fullgraph=True, backend="eager") if compiled else rows
    good, packed = torch.tensor([[0, 4, 7], [1, 4, 5]]), torch.tensor([0, 4, 7])
    assert make(good).shape == (6,)
    for id in (-1, 8, 2**40):
        bad = good.clone()
        bad[0, 2] = id
        with pytest.raises((ValueError, RuntimeError), match=r"need ids in \[0, (8|N)\)"):
            make(bad)
    for cu in ([0, 2, 2], [1, 2, 3], [0, 3, 2, 3], [0, 4]):
        with pytest.raises(
            (ValueError, RuntimeError), match="cu_seqlens that ascend from 0 to (3|members)"
        ):
            make(packed, torch.tensor(cu).int())


def test_compiled_groups_without_a_sync():
    """A user's own Groups inside a compiled function: assertions in the graph, no graph break."""

    def build(query_rows):
        rows = SHARED["key_rows"]
        return Groups(**SHARED | {"query_rows": query_rows, "key_rows": rows}).entries

    compiled = torch.compile(build, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([3, 1, 0, 2]).int()).tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="every query in exactly one group"):
        compiled(torch.tensor([3, 1, 1, 2]).int())


def test_tensors_elsewhere_are_asserted():
    """On another device nothing is read on the host."""
    moved = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in SHARED.items()}
    assert Groups(**moved).entries.device.type == "meta"
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert Groups.spatial(ids, GRID).query_rows.shape == (6,)


@pytest.mark.parametrize(
    "text, make",
    [
        (r"ids \[B, K\]", lambda: Groups.spatial(torch.arange(3), GRID)),
        (r"with cu_seqlens", lambda: Groups.spatial(torch.zeros(1, 3), GRID, torch.zeros(2))),
        ("grid", lambda: Groups.spatial(torch.zeros(1, 3), (4, 5))),
        ("shift", lambda: Groups.window(torch.zeros(1, 3), GRID, (2, 2, 2), (2, 0, 0))),
        ("shift", lambda: Groups.window(torch.zeros(1, 3), GRID, (0, 2, 2))),
        ("local", lambda: Groups.block_sparse(1, 8, 2, local=2)),
        ("batch >= 0, got -1", lambda: Groups.block_sparse(-1, 8, 2, random=0)),
        ("2147483648 keys of all", lambda: Groups.block_sparse(2**28, 8, 8, random=0)),
        ("groups >= 0, got -3", lambda: Groups.equal(-3, 2)),
        ("size >= 0, got -3", lambda: Groups.equal(2, -3)),
        ("keys >= 0, got -3", lambda: Groups.equal(2, 3, keys=-3)),
        (r"2\^31 rows, got 2147483648", lambda: Groups.equal(2**16, 2**15)),
        (r"2\^31 rows, got 4294967296", lambda: Groups.equal(2**16, 1, keys=2**16)),
        ("ascend from 0 to 3", lambda: Groups.joint(CU, 3, 3)),
        ("at most 1 rows", lambda: Groups.joint(CU, 4, 1)),
        ("total >= 0", lambda: Groups.joint(CU, -4, 1)),
        ("cu_keys that ascend from 0 to 5", lambda: cross(num_keys=5)),
        ("cu_queries that ascend from 0 to 5", lambda: cross(num_queries=5)),
        ("at most 1 rows in cu_queries", lambda: cross(max_queries=1)),
        ("one length", lambda: cross(cu_keys=torch.tensor([0, 4]).int(), max_keys=4)),
        (r"labels in \[0, 2\)", lambda: Groups.labelled(torch.tensor([0, 2]), 2, 2)),
        (r"labels in \[0, 2\)", lambda: Groups.labelled(torch.tensor([0, -1]), 2, 2)),
        ("at most 1 rows", lambda: Groups.labelled(torch.tensor([0, 0]), 2, 1)),
        (r"labels \[rows\]", lambda: Groups.labelled(torch.zeros(2, 2).long(), 2, 1)),
        ("at most 20 rows", lambda: Groups.spatial(torch.zeros(1, 21).long(), (2, 4, 5))),
        ("size of frames, rows", lambda: Groups.window(IDS, GRID, (2, 2))),
        ("key_rows, got None", lambda: Groups.equal(2, 3).with_entries()),
        ("row_offsets", lambda: broken(row_offsets=None).with_global()),
        ("as many keys", lambda: Groups.equal(2, 3, keys=4).with_global()),
    ],
)
def test_misuse_is_explained(text, make):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    "text, make",
    [
        ("groups as an int, got 2.0", lambda: Groups.equal(2.0, 3)),
        ("size as an int, got 3.5", lambda: Groups.equal(2, 3.5)),
        ("size as an int, got True", lambda: Groups.equal(2, True)),
        ("keys as an int, got 1.5", lambda: Groups.equal(2, 3, keys=1.5)),
        ("longest as an int", lambda: Groups.joint(CU, 4, 4.0)),
        ("cu_seqlens in int32", lambda: Groups.joint(CU.long(), 4, 4)),
        ("cu_keys in int32", lambda: cross(cu_keys=CU.float())),
        ("labels in int64", lambda: Groups.labelled(torch.zeros(2), 2, 2)),
        ("ids in int64", lambda: Groups.spatial(IDS.int(), GRID)),
        ("ids in int64", lambda: Groups.temporal(IDS.double(), GRID)),
        ("grid as an int", lambda: Groups.spatial(IDS, (4, 5, 6.0))),
        ("shift as an int", lambda: Groups.window(IDS, GRID, (2, 2, 2), (0.5, 0, 0))),
        ("block as an int", lambda: Groups.block_sparse(1, 8, 2.0)),
    ],
)
def test_other_types_are_explained(text, make):
    with pytest.raises(TypeError, match=text):
        make()


def drawn_replicated(ragged, kind):
    ids, cu_seqlens, places = drawn(ragged)
    groups = getattr(Groups, kind)(ids, GRID, cu_seqlens)
    return ReplicatedGlobal(groups), places


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_replicated_global_is_timesformers_rule(ragged, kind):
    """Attention of [replica, patches] per frame; the global row is their mean."""
    replicated, places = drawn_replicated(ragged, kind)
    replicated.groups.check()
    H, D = 2, 8
    qkv = torch.randn(3 + len(places), 3, H, D, dtype=torch.float64, requires_grad=True)
    rows = replicated.replicate(qkv)
    out = replicated.average(
        space_time_attention(*rows.unbind(1), replicated.groups, backend="reference")
    )

    T, height, width = GRID
    labels = [(t,) for t in range(T)]
    if kind == "temporal":
        labels = [(y, x) for y in range(height) for x in range(width)]
    expected = [None] * qkv.shape[0]
    for b in range(3):
        start = sum(p[0] < b for p in places) + b
        label_of = {
            start + 1 + i: p[1:2] if kind == "spatial" else p[2:]
            for i, p in enumerate(p for p in places if p[0] == b)
        }
        heads = []
        for label in labels:
            rows = [r for r, one in label_of.items() if one == label]
            q, k, v = qkv[[start, *rows]].permute(1, 2, 0, 3)
            head, *rest = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
            heads.append(head)
            for row, out_of_row in zip(rows, rest, strict=True):
                expected[row] = out_of_row
        expected[start] = torch.stack(heads).mean(0)
    expected = torch.stack(expected)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), qkv, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), qkv),
    )


def test_average_undoes_replicate():
    replicated, places = drawn_replicated(True, "spatial")
    x = torch.randn(3 + len(places), 5)
    rows = replicated.replicate(x)
    assert rows.shape[0] == replicated.groups.num_queries == len(places) + 3 * GRID[0]
    assert torch.equal(replicated.average(rows), x)
    with pytest.raises(ValueError, match=f"need {len(places) + 3} rows"):
        replicated.replicate(rows)
    with pytest.raises(ValueError, match="with row_offsets"):
        ReplicatedGlobal(Groups.labelled(torch.zeros(3, dtype=torch.int64), 1, 3))
    no_rows = ReplicatedGlobal(Groups.spatial(torch.empty(2, 0, dtype=torch.int64), GRID))
    assert torch.equal(no_rows.average(no_rows.replicate(x[:2])), x[:2])
