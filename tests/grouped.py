"""Groups and inputs for the tests of several ops."""

import torch

from vidl.ops import Groups

# Sizes of groups just below, at and above the sizes of tiles.
EDGES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 257)


def visible(B=2, grid=(3, 4, 5), K=25):
    return torch.stack([torch.randperm(grid[0] * grid[1] * grid[2])[:K] for _ in range(B)])


GRID = (3, 4, 5)
GROUPS = {
    "equal": lambda: Groups.equal(3, 50),
    "one row each": lambda: Groups.equal(5, 1),
    "frames": lambda: Groups.spatial(visible(), GRID),
    "positions": lambda: Groups.temporal(visible(), GRID),
    "eight rows": lambda: Groups.equal(11, 8),
    "windows": lambda: Groups.window(visible(), GRID, (2, 3, 3), (1, 1, 0)),
    "frames and a global token": lambda: Groups.spatial(visible(), GRID).with_global(),
    "positions and a global token": lambda: Groups.temporal(visible(), GRID).with_global(),
    "block-sparse": lambda: Groups.block_sparse(2, 60, 16, local=1, random=2),
    "ragged": lambda: Groups.joint(torch.tensor([0, 30, 30, 170]).int(), 170, 140),
    "cross": lambda: Groups.equal(3, 20, keys=33),
    "queries without keys": lambda: Groups.cross(
        torch.tensor([0, 3, 5, 9]).int(),
        torch.tensor([0, 4, 4, 20]).int(),
        num_queries=9,
        num_keys=20,
        max_queries=4,
        max_keys=16,
    ),
    "keys without queries": lambda: Groups.cross(
        torch.tensor([0, 0, 9]).int(),
        torch.tensor([0, 4, 20]).int(),
        num_queries=9,
        num_keys=20,
        max_queries=9,
        max_keys=16,
    ),
    "long": lambda: Groups.equal(1, 150),
    "no rows": lambda: Groups.equal(3, 0),
    "no groups": lambda: Groups.equal(0, 4),
}


def fused(groups, H, D, dtype, device):
    """q, k, v as slices of one buffer with NaN around every row; reproducible."""
    generator = torch.Generator().manual_seed(groups.num_queries * 31 + groups.num_keys)
    around = torch.full((max(groups.num_queries, groups.num_keys) + 2, 3, H, D + 8), float("nan"))
    inside = around[1:-1, :, :, :D]
    inside.copy_(torch.randn(inside.shape, generator=generator))
    around = around.to(device, dtype)
    q, k, v = around[1:-1, :, :, :D].unbind(1)
    return q[: groups.num_queries], k[: groups.num_keys], v[: groups.num_keys]


def random_groups(generator, most, longest):
    """Groups with random sizes from `EDGES`, with rows in random order, in one group or several."""
    G = generator.randint(1, most)
    edges = [e for e in EDGES if e <= longest]
    queries = [generator.choice(edges) for _ in range(G)]
    keys = queries if generator.random() < 0.5 else [generator.choice(edges) for _ in range(G)]
    num_queries, E = sum(queries), sum(keys)
    shared = generator.random() < 0.3 and E > 0
    num_keys = generator.randint(1, E) if shared else E
    seed = torch.Generator().manual_seed(generator.randint(0, 2**31))
    rows = None if generator.random() < 0.3 else torch.randperm(num_queries, generator=seed).int()
    key_rows = None
    if rows is not None or num_keys != E:
        key_rows = torch.randperm(E, generator=seed).int() % num_keys
    groups = Groups(
        torch.tensor([0, *queries]).cumsum(0).int(),
        torch.tensor([0, *keys]).cumsum(0).int(),
        rows,
        key_rows if shared or key_rows is not None else None,
        max_queries=max(queries),
        max_keys=max(keys) + generator.choice([0, 0, 5]),
        num_queries=num_queries,
        num_keys=num_keys,
    )
    return groups.with_entries() if shared and key_rows is not None else groups
