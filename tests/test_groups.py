"""The constructors of Groups against loops over tokens, and the errors of check()."""

import pytest
import torch
from torch.nn import functional as F

from vidl.ops import Groups, ReplicatedGlobal, space_time_attention

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


def broken(**change):
    good = Groups.spatial(drawn(False)[0], GRID)
    return Groups(**{**vars(good), **change})


@pytest.mark.parametrize(
    "text, change",
    [
        ("query_offsets that ascend", {"query_offsets": torch.tensor([0, 50, 40, 90]).int()}),
        ("query_offsets that ascend", {"query_offsets": torch.tensor([1, 50, 90]).int()}),
        ("key_offsets that ascend", {"key_offsets": torch.tensor([0, 50, 80]).int()}),
        ("query_rows in", {"query_rows": torch.arange(1, 91).int()}),
        ("key_rows in", {"key_rows": torch.arange(-1, 89).int()}),
        (
            r"exactly one group.*\[0, 5\]",
            {"query_rows": torch.arange(90).where(torch.arange(90) != 5, 0).int()},
        ),
        ("at most 3 rows", {"max_keys": 3}),
    ],
)
def test_check_finds(text, change):
    with pytest.raises(ValueError, match=text):
        broken(**change).check()


@pytest.mark.parametrize(
    "text, make",
    [
        (r"ids \[B, K\]", lambda: Groups.spatial(torch.arange(3), GRID)),
        (r"with cu_seqlens", lambda: Groups.spatial(torch.zeros(1, 3), GRID, torch.zeros(2))),
        ("grid", lambda: Groups.spatial(torch.zeros(1, 3), (4, 5))),
        ("shift", lambda: Groups.window(torch.zeros(1, 3), GRID, (2, 2, 2), (2, 0, 0))),
        ("shift", lambda: Groups.window(torch.zeros(1, 3), GRID, (0, 2, 2))),
        ("local", lambda: Groups.block_sparse(1, 8, 2, local=2)),
        ("row_offsets", lambda: broken(row_offsets=None).with_global()),
        ("as many keys", lambda: Groups.equal(2, 3, keys=4).with_global()),
    ],
)
def test_misuse_is_explained(text, make):
    with pytest.raises(ValueError, match=text):
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
