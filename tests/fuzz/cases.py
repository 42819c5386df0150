"""Random calls of the ops: the same number gives the same case, on every machine."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from vidl import ops
from vidl.ops import Groups, Positions

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        inputs: the tensors of the call; None where an optional one is left out.
        options: the other arguments.
        leaves: the names of the inputs that need a gradient.
        poisoned: the groups that have a NaN or an infinity: their results may be anything.
        clean: the inputs without the NaN and infinities of the poisoned groups.
    """

    op: str
    number: int
    dtype: torch.dtype
    inputs: dict[str, Tensor | None]
    options: dict[str, Any]
    leaves: tuple[str, ...] = ()
    poisoned: frozenset[int] = frozenset()
    clean: dict[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = {
            name: None if x is None else f"{tuple(x.shape)} {x.stride()} {x.dtype}"
            for name, x in self.inputs.items()
        }
        options = {n: _sizes(x) if isinstance(x, Groups) else x for n, x in self.options.items()}
        return f"{self.op} {self.number}: {shapes}, {options}, gradients of {self.leaves}"

    def double(self) -> "Case":
        """The same case in float64, without poison."""
        inputs = {
            name: x.detach().double()
            if x is not None and x.is_floating_point() and name != "key_bias"  # float32 only
            else x
            for name, x in (self.inputs | self.clean).items()
        }
        return replace(self, inputs=inputs, poisoned=frozenset(), clean={})

    def grad(self, name: str, result: Tensor) -> Tensor:
        """A gradient of a result; its numbers are exact in every dtype."""
        seed = torch.Generator().manual_seed(self.number * 8 + len(name))
        numbers = torch.randn(result.shape, generator=seed).clamp(-4, 4)
        return ((numbers * 64).round() / 64).to(result.dtype)

    def run(self, backend: str) -> dict[str, Tensor]:
        """The results by name, and the gradients of the leaves as "grad <name>"."""
        inputs = {
            name: x.detach().requires_grad_(name in self.leaves) if x is not None else None
            for name, x in self.inputs.items()
        }
        results = call(self, inputs, backend)
        outputs = {name: x for name, x in results.items() if x.requires_grad}
        leaves = {name: inputs[name] for name in self.leaves}
        if not outputs:
            results |= {f"grad {name}": torch.zeros_like(x) for name, x in leaves.items()}
        else:
            grads = torch.autograd.grad(
                list(outputs.values()),
                list(leaves.values()),
                [self.grad(name, x) for name, x in outputs.items()],
                allow_unused=True,
            )
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
                results[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
        return {name: x.detach() for name, x in results.items()}


def call(case: Case, inputs: dict[str, Tensor | None], backend: str) -> dict[str, Tensor]:
    """Call the op of a case; its results by name."""
    arguments: dict[str, Any] = {**inputs, **case.options, "backend": backend}
    if case.op == "masked_patch_embed":
        time, space = arguments.pop("time"), arguments.pop("space")
        arguments["position"] = space if time is None else (time, space)
    out = getattr(ops, case.op)(**arguments)
    if case.op == "select_tokens":
        return out._asdict()
    if case.op != "space_time_attention":
        return {"out": out}
    names = ["out", *["lse"] * case.options["return_lse"]]
    names += ["scores"] if case.options["return_scores"] else []
    return dict(zip(names, out if isinstance(out, tuple) else (out,), strict=True))


def case_of(op: str, number: int, dtypes: Sequence[torch.dtype]) -> Case:
    """The case of this number of the op, in one of these dtypes."""
    draw = Draw(random.Random(f"{op} {number}"))
    drawn = CASES.get(op, _scores)(draw, dtypes[number % len(dtypes)], op)
    return replace(drawn, number=number)


def _sizes(groups: Groups) -> str:
    queries, keys = groups.query_offsets.diff().tolist(), groups.key_offsets.diff().tolist()
    return f"groups of {queries} queries and {keys} keys of {groups.num_keys} rows"


class Draw:
    """Random numbers, sizes and tensors."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator
        self.choice, self.random = generator.choice, generator.random
        self.seed = torch.Generator().manual_seed(generator.getrandbits(31))

    def often(self, probability: float) -> bool:
        return self.random() < probability

    def randn(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return self.laid_out((torch.randn(shape, generator=self.seed) * scale).to(dtype))

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.seed)

    def below(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, max(most, 1), shape, generator=self.seed)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same numbers with other strides, often between values that must not be read."""
        if self.often(0.4):
            return x
        order = list(range(x.ndim))
        self.generator.shuffle(order)
        steps = [self.choice((1, 1, 1, 2, 3)) for _ in order]
        before = [self.choice((0, 0, 1, 3)) for _ in order]
        after = [self.choice((0, 0, 1, 2)) for _ in order]
        sizes = [b + n * s + a for n, s, b, a in zip(x.shape, steps, before, after, strict=True)]
        value = NAN if x.is_floating_point() else 255 if x.dtype == torch.uint8 else -(2**30)
        memory = torch.full([sizes[i] for i in order], value, dtype=x.dtype)
        view = memory.permute([order.index(i) for i in range(x.ndim)])
        for i, (n, s, b) in enumerate(zip(x.shape, steps, before, strict=True)):
            view = view.narrow(i, b, n * s)
            view = view.as_strided(
                [*view.shape[:i], n, *view.shape[i + 1 :]],
                [*view.stride()[:i], view.stride(i) * s, *view.stride()[i + 1 :]],
                view.storage_offset(),
            )
        view.copy_(x)
        return view

    def ids(self, B: int, N: int, repeats: bool = True) -> tuple[Tensor, Tensor | None]:
        """Patches of each sample, [B, K], or packed [total] with offsets."""
        packed = self.often(0.5)
        same = self.generator.randint(0, min(N, 6))
        counts = [self.generator.randint(0, min(N, 6)) if packed else same for _ in range(B)]
        repeated = repeats and self.often(0.3)
        ids = [self.below(N, n) if repeated else self.permutation(N)[:n] for n in counts]
        if not packed:
            stacked = torch.stack(ids) if ids else torch.zeros(0, same, dtype=torch.int64)
            return self.laid_out(stacked), None
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        return self.laid_out(torch.cat([*ids, self.permutation(0)])), self.laid_out(offsets)

    def clip(self, dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
        """A clip; a float clip in random layout, with equal pixels at times."""
        if dtype == torch.uint8:
            clip = self.below(256, *sizes).byte()
        else:
            clip = (torch.randn(sizes, generator=self.seed) * self.choice((1, 1, 1, 0.01, 20))).to(
                dtype
            )
        if self.often(0.1):
            clip = clip * 0 + self.choice((0, 7, 255))
        return self.laid_out(clip)

    def groups(self) -> Groups:
        """Few small groups; built by name, or with ragged sizes, any order, and shared keys."""
        kind = self.choice(("ragged",) * 5 + ("equal", "spatial", "window", "sparse"))
        B, grid = self.choice((1, 1, 2)), (self.choice((1, 2, 3)), self.choice((1, 2)), 3)
        if kind == "equal":
            keys = self.choice((None, None, *SIZES))
            return Groups.equal(self.choice((0, 1, 2, 3)), self.choice(SIZES), keys=keys)
        if kind == "sparse":
            return Groups.block_sparse(B, self.choice((5, 8, 16)), self.choice((2, 4)), random=1)
        if kind in ("spatial", "window"):
            ids, cu_seqlens = self.ids(B, prod(grid), repeats=False)
            if kind == "spatial":
                groups = self.choice((Groups.spatial, Groups.temporal))(ids, grid, cu_seqlens)
            else:
                groups = Groups.window(ids, grid, (2, 1, 2), (1, 0, 1), cu_seqlens)
            return groups.with_global() if self.often(0.5) else groups
        return self._ragged()

    def _ragged(self) -> Groups:
        G = self.choice((0, 1, 1, 2, 3, 4))
        sizes = SIZES if self.often(0.9) else (*SIZES, 31, 33, 63, 64, 65, 130)
        queries = [self.choice(sizes) for _ in range(G)]
        keys = queries if self.often(0.4) else [self.choice(sizes) for _ in range(G)]
        num_queries, E = sum(queries), sum(keys)
        num_keys, query_rows, key_rows = E, None, None
        if self.often(0.5):
            query_rows = self.laid_out(self.permutation(num_queries).int())
        if self.often(0.5):  # in another order; or some rows in several groups, some in none
            key_rows = self.permutation(E).int()
            if self.often(0.6):
                num_keys = self.generator.randint(1, E + 2)
                key_rows = self.below(num_keys, E).int()
            key_rows = self.laid_out(key_rows)
        return Groups(
            self.laid_out(torch.tensor([0, *queries]).cumsum(0).int()),
            self.laid_out(torch.tensor([0, *keys]).cumsum(0).int()),
            query_rows,
            key_rows,
            max_queries=max(queries, default=0) + self.choice((0, 0, 0, 5)),
            max_keys=max(keys, default=0) + self.choice((0, 0, 0, 5)),
            num_queries=num_queries,
            num_keys=num_keys,
        )

    def limited(self, groups: Groups) -> Groups:
        """The groups with limits of their queries, at times."""
        kind = self.choice((None, None, None, "causal", "padded", "any"))
        if kind is None:
            return groups
        if kind == "causal":
            return groups.causal()
        if kind == "padded":
            return groups.padded(self.below(12, groups.num_groups))
        limits = torch.zeros(groups.num_queries, dtype=torch.int32)
        for queries, keys in members(groups):
            limits[queries] = self.below(len(keys) + 1, len(queries)).int()
        return replace(groups, query_limits=self.laid_out(limits))

    def added(
        self, inputs: dict[str, Tensor | None], options: dict[str, Any], dtype: torch.dtype
    ) -> tuple[str, ...]:
        """Add a table of biases and its positions, and a bias of the keys, at times.

        Returns:
            The names of the inputs that may need a gradient.
        """
        groups: Groups = options["groups"]
        if self.often(0.3):
            hidden = torch.rand(groups.num_keys, generator=self.seed) < self.choice((0, 0.2, 0.8))
            key_bias = torch.randn(groups.num_keys, generator=self.seed)
            inputs["key_bias"] = self.laid_out(key_bias.masked_fill(hidden, -INF))
        if self.often(0.6):
            return ()
        rows = self.choice((1, 2, 3, 8, 20))
        wrap = self.choice([n for n in (0, 0, 1, 2) if n < rows])
        codes = [self._codes(n, rows) for n in (groups.num_queries, groups.num_keys)]
        options["positions"] = Positions(*codes, rows, wrap)
        heads = inputs["k"].shape[1]
        inputs["bias"] = self.randn(rows, heads, dtype=self.choice((dtype, torch.float32)))
        return ("bias",)

    def _codes(self, count: int, rows: int) -> Tensor:
        """Codes that repeat, some of them beyond any difference. All differences fit int32."""
        far = self.choice((0, 0.2))
        beyond = torch.rand(count, generator=self.seed) < far
        codes = self.below(rows, count) - self.below(2, 1)
        return self.laid_out(torch.where(beyond, self.choice((2**29, -(2**29))), codes).int())

    def leaves(self, *names: str) -> tuple[str, ...]:
        """Some of these inputs, mostly all."""
        return names if self.often(0.6) else tuple(n for n in names if self.often(0.5))


SIZES = (0, 0, 1, 1, 2, 3, 5, 7, 8, 9, 13, 16, 17)


def _clip_of(draw: Draw, dtype: torch.dtype) -> tuple[Tensor, tuple[int, int, int], int]:
    """A clip, its patch size, and N."""
    patch = (draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 4, 5, 7)), draw.choice((1, 2, 4, 7, 8)))
    if draw.often(0.1):
        patch = (draw.choice((1, 2)), 16, 16)
    grid = (draw.choice((0, 1, 1, 2, 3)), draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 3)))
    B, C = draw.choice((0, 1, 1, 2, 3)), draw.choice((1, 1, 2, 3, 3, 3, 4, 5))
    sizes = (B, C, *(g * p for g, p in zip(grid, patch, strict=True)))
    pixels = draw.choice((torch.uint8, torch.uint8, dtype, torch.float32))
    return draw.clip(pixels, sizes), patch, prod(grid)


def _normalisation(draw: Draw, C: int) -> dict[str, Any]:
    options = {}
    if draw.often(0.6):
        options["mean"] = [draw.random() for _ in range(C)]
    if draw.often(0.6):
        options["std"] = [0.05 + draw.random() for _ in range(C)]
    return options


def _embed(draw: Draw, dtype: torch.dtype, op: str) -> Case:
    video, patch, N = _clip_of(draw, dtype)
    C, C_in = draw.choice((0, 1, 2, 3, 5, 8, 16, 17, 33)), video.shape[1]
    frames = video.shape[2] // patch[0]
    weight = draw.randn(C, C_in, *patch, dtype=dtype, scale=draw.choice((1, 0.05)))
    if patch[0] == 1 and draw.often(0.5):
        weight = weight[:, :, 0]
    side = draw.choice((dtype, torch.float32))
    inputs: dict[str, Tensor | None] = {"video": video, "weight": weight}
    inputs["bias"] = draw.randn(C, dtype=side) if draw.often(0.6) else None
    inputs["time"] = inputs["space"] = inputs["ids_keep"] = inputs["cu_seqlens"] = None
    if draw.often(0.6):
        inputs["space"] = draw.randn(N, C, dtype=side)
        if frames and draw.often(0.5):
            inputs["space"] = draw.randn(N // frames, C, dtype=side)
            inputs["time"] = draw.randn(frames, C, dtype=draw.choice((dtype, torch.float32)))
    if draw.often(0.85):
        inputs["ids_keep"], inputs["cu_seqlens"] = draw.ids(video.shape[0], N)
        _hide(draw, video, patch, inputs["ids_keep"], inputs["cu_seqlens"])
    names = [n for n in ("video", "weight", "bias", "time", "space") if inputs[n] is not None]
    names = names if video.is_floating_point() else names[1:]
    options = _normalisation(draw, C_in) if video.dtype == torch.uint8 else {}
    return Case(op, 0, dtype, inputs, options, draw.leaves(*names))


def _hide(
    draw: Draw, video: Tensor, patch: Sequence[int], ids: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Fill the patches of a float clip that are not listed with NaN, at times."""
    if ids is None or not video.is_floating_point() or draw.often(0.5):
        return
    for sample, listed in zip(video, samples_of(ids, cu_seqlens), strict=True):
        for n in set(range(prod(video.shape[2:]) // prod(patch))) - set(listed):
            patch_of(sample, patch, n).fill_(NAN)


def samples_of(ids: Tensor, cu_seqlens: Tensor | None) -> list[list[int]]:
    """The ids of each sample."""
    if cu_seqlens is None:
        return ids.tolist()
    offsets, packed = cu_seqlens.tolist(), ids.tolist()
    return [packed[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


def patch_of(sample: Tensor, patch: Sequence[int], n: int) -> Tensor:
    """Patch n of a clip [C, T, H, W], in the order (time, row, column), as a view."""
    t, h, w = patch
    rows, columns = sample.shape[2] // h, sample.shape[3] // w
    i, j, k = n // (rows * columns) * t, n // columns % rows * h, n % columns * w
    return sample[:, i : i + t, j : j + h, k : k + w]


def _loss(draw: Draw, dtype: torch.dtype, op: str) -> Case:
    video, patch, N = _clip_of(draw, dtype)
    C = video.shape[1]
    ids, cu_seqlens = draw.ids(video.shape[0], N)
    _hide(draw, video, patch, ids, cu_seqlens)
    options: dict[str, Any] = {"patch_size": patch[1:], "tubelet_size": patch[0]}
    if patch[1] == patch[2] and draw.often(0.5):
        options["patch_size"] = patch[1]
    options["target"] = draw.choice(("mae", "videomae"))
    counted = prod(patch) * (C if options["target"] == "mae" else 1)
    options["norm_pix"] = counted > 1 and draw.often(0.6)
    options["reduction"] = draw.choice(("mean", "none"))
    if video.dtype == torch.uint8 or options["target"] == "videomae":
        options |= _normalisation(draw, C)
    prediction = draw.randn(*ids.shape, C * prod(patch), dtype=dtype)
    inputs = {"prediction": prediction, "video": video, "ids_masked": ids, "cu_seqlens": cu_seqlens}
    return Case(op, 0, dtype, inputs, options, draw.leaves("prediction"))


def _heads(
    draw: Draw, dtype: torch.dtype, groups: Groups, sizes: Sequence[int], names: str
) -> dict[str, Tensor | None]:
    """Queries, keys and values: slices of one buffer, or in any layout."""
    H, D = draw.choice((1, 1, 2, 3)), draw.choice(sizes)
    scale = draw.choice((1, 1, 1, 0.01, 4))
    rows = {"q": groups.num_queries, "k": groups.num_keys, "v": groups.num_keys}
    if draw.often(0.3):
        longest = max(rows.values())
        buffer = torch.randn(longest, 3, H, D, generator=draw.seed) * scale
        tensors = {n: buffer.to(dtype)[: rows[n], "qkv".index(n)] for n in names}
    else:
        tensors = {}
        for n in names:
            tensors[n] = draw.randn(rows[n], H, D, dtype=dtype, scale=1 if n == "v" else scale)
            if draw.often(0.05):
                tensors[n] = tensors[n][:, :1].expand(rows[n], H, D)
    if "v" in names and draw.often(0.2):
        tensors["v"] = tensors["v"][..., : draw.generator.randint(1, D)]
    return {**tensors}


def _poisoned(draw: Draw, case: Case) -> Case:
    """The same case with a NaN or an infinity in some key or query, at times."""
    groups: Groups = case.options["groups"]
    name = draw.choice([n for n in "qkv" if n in case.inputs])
    x = case.inputs[name]
    if draw.often(0.8) or x is None or x.numel() == 0:
        return case
    row = draw.generator.randrange(x.shape[0])
    poisoned = x.clone()
    poisoned[row, 0, draw.generator.randrange(x.shape[2])] = draw.choice((NAN, INF, -INF))
    hit = [
        g for g, (queries, keys) in enumerate(members(groups))
        if row in (queries if name == "q" else keys)
    ]  # fmt: skip
    return replace(
        case,
        inputs=case.inputs | {name: poisoned},
        poisoned=frozenset(hit),
        clean={name: x},
    )


def members(groups: Groups) -> list[tuple[list[int], list[int]]]:
    """The rows of the queries and of the keys of each group."""
    lists = []
    for offsets, rows, count in (
        (groups.query_offsets, groups.query_rows, groups.num_queries),
        (groups.key_offsets, groups.key_rows, groups.num_keys),
    ):
        listed = list(range(count)) if rows is None else rows.tolist()
        steps = offsets.tolist()
        lists.append([listed[a:b] for a, b in zip(steps, steps[1:], strict=False)])
    return list(zip(*lists, strict=True))


def _attention(draw: Draw, dtype: torch.dtype, op: str) -> Case:
    groups = draw.groups()
    inputs = _heads(draw, dtype, groups, (32, 32, 32, 64, 80, 96, 128), "qkv")
    options = {
        "groups": groups,
        "scale": draw.choice((None, None, 0.0, 0.3, -0.2, 1)),
        "return_lse": draw.often(0.5),
        "return_scores": draw.choice((None, "cls", "mean")),
    }
    options["groups"] = draw.limited(groups)
    added = draw.added(inputs, options, dtype)
    return _poisoned(draw, Case(op, 0, dtype, inputs, options, draw.leaves("q", "k", "v", *added)))


def _scores(draw: Draw, dtype: torch.dtype, op: str) -> Case:
    groups = draw.groups()
    names = {"key_similarity_scores": "k", "value_weighted_scores": "qkv"}.get(op, "qk")
    inputs = _heads(draw, dtype, groups, (1, 2, 3, 5, 8, 16, 24, 31, 32, 33, 64, 80, 128), names)
    options: dict[str, Any] = {"groups": draw.limited(groups)}
    leaves: tuple[str, ...] = ()
    if names != "k":
        leaves = draw.leaves(*names, *draw.added(inputs, options, dtype))
        options["scale"] = draw.choice((None, None, 0.0, 0.3, -0.2, 1))
    if names == "qkv" and draw.often(0.2):  # some values are zero
        # Large logits leave a subnormal sum to the others, by which PyTorch divides to NaN.
        options["scale"] = draw.choice((0.0, 0.001))
        inputs["v"] = inputs["v"] * (draw.below(2, groups.num_keys, 1, 1)).to(dtype)
    if op == "mean_attention_scores" and draw.often(0.5):
        from fuzz.attention import log_sum_exp

        high = torch.promote_types(dtype, torch.float32)
        inputs["lse"] = draw.laid_out(log_sum_exp(inputs, options).to(high))
    return _poisoned(draw, Case(op, 0, dtype, inputs, options, leaves))


def _select(draw: Draw, dtype: torch.dtype, op: str) -> Case:
    prefix, packed = draw.choice((0, 0, 1, 2)), draw.often(0.5)
    rest = draw.choice(((), (1,), (3,), (8,), (17,), (2, 3), (33,), (0,)))
    options: dict[str, Any] = {"prefix": prefix, "order": draw.choice(("index", "score"))}
    options["fuse"] = draw.choice((None, "sum", "mean"))
    options["rounding"] = draw.choice(("ceil", "floor", "floor_min_one", "drop_floor"))
    most = draw.choice((1, 4, 12, 40))
    if packed:
        counts = [draw.generator.randint(0, most) for _ in range(draw.choice((0, 1, 2, 4)))]
        shape = (sum(counts) + prefix * len(counts),)
        offsets = torch.tensor([0, *(n + prefix for n in counts)]).cumsum(0).int()
    else:
        batch = draw.choice(((), (1,), (2,), (3,), (2, 2), (0,)))
        counts = [draw.generator.randint(0, most)]
        shape, offsets = (*batch, counts[0] + prefix), None
    least = min(counts, default=0)
    options["keep"] = draw.choice((0.01, 0.1, 0.5, 0.7, 0.9, 1.0))
    if least and draw.often(0.5):
        options["keep"] = draw.generator.randint(1, least)
    x = draw.randn(*shape, *rest, dtype=dtype)
    scored = shape if packed else (*shape[:-1], counts[0])
    side = draw.choice((dtype, torch.float32))
    rank_by = _hard(draw, scored, side) if draw.often(0.3) else None
    scores = _hard(draw, scored, side)
    if options["fuse"]:  # numbers whose sums, and 1 divided by them, are finite
        scores = torch.where(scores.abs() > 100, NAN, torch.where(scores.abs() < 1e-30, 0, scores))
    inputs = {"x": x, "scores": draw.laid_out(scores), "rank_by": rank_by}
    inputs["cu_seqlens"] = offsets if offsets is None else draw.laid_out(offsets)
    return Case(
        op, 0, dtype, inputs, options, draw.leaves("x", *(["scores"] if options["fuse"] else []))
    )


def _hard(draw: Draw, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Scores; often with ties, NaN, infinities, signed zeros and very small or large numbers."""
    scores = torch.rand(shape, generator=draw.seed) + 0.01
    if draw.often(0.5):
        scores = draw.below(7, *shape) / 4 - draw.choice((0.5, 0))
    if draw.often(0.5):
        for value in (NAN, INF, -INF, -0.0, 1e-45, -1e-45, 3e38):
            drawn = torch.rand(shape, generator=draw.seed)
            scores = torch.where(drawn < draw.choice((0, 0.05, 0.3)), value, scores)
    return draw.laid_out(scores.to(dtype))


def _difference(draw: Draw, dtype: torch.dtype, op: str) -> Case:
    video, patch, _ = _clip_of(draw, dtype)
    options = _normalisation(draw, video.shape[1]) if video.dtype == torch.uint8 else {}
    options.pop("mean", None)
    return Case(op, 0, dtype, {"video": video}, {"patch": patch, **options})


CASES: dict[str, Callable[[Draw, torch.dtype, str], Case]] = {
    "masked_patch_embed": _embed,
    "masked_patch_loss": _loss,
    "space_time_attention": _attention,
    "cls_attention_scores": _scores,
    "mean_attention_scores": _scores,
    "value_weighted_scores": _scores,
    "key_similarity_scores": _scores,
    "select_tokens": _select,
    "frame_difference": _difference,
}
