"""BEiT on the visible patches of each frame, or of a whole clip with sparse attention."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_flag,
    check_floating,
    check_shape,
    check_tensors,
    finite,
)
from vidl.kernels.groups import Groups, Positions
from vidl.kernels.groups.positions import GLOBAL_ROWS
from vidl.nn.arguments import check_layer, check_state
from vidl.nn.block import LAYER_NORM, DropPath, Mlp
from vidl.nn.checkpoints import load_or_explain
from vidl.nn.frames_in_time import FramesInTime, groups_in_time
from vidl.nn.patch_embed import MaskedPatchEmbed, has_hooks
from vidl.nn.positions import inflate_table, resize_table
from vidl.nn.pruning import Pruning, Scores, check_prune_layers, run_layer, scored_attention
from vidl.nn.vit import Frames, encoder_weights, frame_ids, frames_of, grid_of, initialise

Order = Literal["first", "last"]
TABLE = "relative_position_bias_table"
# Parts of published checkpoints beside those of `encoder_weights`: the norm of pooled tokens, a
# head, and a buffer that older versions saved.
NOT_ENCODER = ("fc_norm.", "lm_head.")
INDEX = ".relative_position_index"


@dataclass(frozen=True)
class Edges:
    """Block-sparse attention: which blocks of tokens a block attends to.

    CLS attends to all tokens, and all attend to CLS. The tokens behind it are cut into blocks. A
    block attends to itself, to its neighbours and to random other blocks; to all blocks if there
    are not more. The last block may be shorter.

    Attributes:
        block: tokens of a block.
        random: the number of random blocks.
        local: the block itself and its nearest neighbours; an odd number of blocks.

    Raises:
        TypeError, ValueError: a number is out of range.

    Source: SViTT, arXiv 2304.08809, 3.2.
    """

    block: int = 56
    random: int = 3
    local: int = 1

    def __post_init__(self) -> None:
        check_count("block", self.block, 1)
        check_count("random", self.random)
        check_count("local", self.local, 1)
        if self.local % 2 == 0:
            raise ValueError(f"need an odd number of blocks in local, got {self.local}")

    def groups(
        self, batch: int, length: int, seed: int, *, device: torch.device | str = "cpu"
    ) -> Groups:
        """The groups of CLS and `length` tokens in each of `batch` samples, which share a pattern.

        Args:
            seed: of the random blocks.
        """
        check_count("batch", batch)
        check_count("length", length)
        _check_int("seed", seed)
        blocks = -(-length // self.block)
        if self.local + self.random >= blocks:
            return Groups.equal(batch, 1 + length, device=device)
        return Groups.block_sparse(
            batch, length, self.block, local=self.local, random=self.random, seed=seed,
            device=device,
        ).with_global()  # fmt: skip


class Beit(nn.Module):
    """BEiT that encodes the visible patches of each frame of a clip, or of the clip as a whole.

    Positions are known only from a learned table of relative positions in every layer. Masked
    patches are never embedded. Layers in `prune_layers` prune the tokens. Parameters are named as
    in timm's `Beit`.

    - By default each frame is encoded separately, with a CLS of its own (Singularity).
    - `time` adds attention over time to every block, `FramesInTime` (VindLU).
    - `joint` encodes all patches of a clip and one CLS as one sequence; the table then also has the
      displacement in time. With `edges` its attention is block-sparse (SViTT).

    Sources: BEiT, arXiv 2106.08254; Singularity, arXiv 2206.03428, 3.1; VindLU, arXiv 2212.05051,
    3.1; SViTT, arXiv 2304.08809, 3.

    Args:
        img_size, patch_size, in_chans: as in `ViT`.
        embed_dim, depth, num_heads, mlp_ratio: as in timm.
        init_values: initial value of LayerScale; None: no LayerScale.
        act_layer, norm_layer: as in timm; attention over time has a norm of its own.
        num_frames: the frames of a clip that the table of a joint encoder is made for; clips may
            have fewer. Frames that are encoded separately may be of any number.
        joint: encode the clip as one sequence.
        time: add attention over time to every block, before the attention of a frame ("first") or
            after the MLP ("last", as in the authors' code of VindLU); None: none.
        edges: block-sparse attention of a joint encoder; None: all tokens attend to all.
        prune_layers: the layers that prune their tokens, counted from 0.
        pruning: how these layers prune; required with `prune_layers`. A fused token has no place in
            the table, and "value" scores leave the table out: neither is possible; with `edges`
            only scores "cls".
        drop_path: rate of stochastic depth, in [0, 1): of the last block, falling to 0 in the
            first; of attention over time, in all blocks. Drawn for each frame, or for each clip if
            joint and over time.
        final_norm: add a norm after the last block. BEiT that averages its tokens has none.
        mean, std: normalisation of uint8 clips, as in `MaskedPatchEmbed`.
        backend: of all ops.

    Raises:
        TypeError, ValueError: options do not fit together: for example, `edges` or `num_frames`
            without `joint`, or `time` with it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        init_values: float | None = 0.1,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        *,
        num_frames: int = 1,
        joint: bool = False,
        time: Order | None = None,
        edges: Edges | None = None,
        prune_layers: Sequence[int] = (),
        pruning: Pruning | None = None,
        drop_path: float = 0.0,
        final_norm: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.grid = grid_of(img_size, patch_size)
        check_count("depth", depth)
        layer: Any = (num_heads, mlp_ratio, True, act_layer, norm_layer, backend)
        check_layer(embed_dim, *layer, width="embed_dim")
        check_flag("final_norm", final_norm)
        if init_values is not None:
            finite("init_values", init_values)
        _check_kind(num_frames, joint, time, edges)
        self.prune_layers = check_prune_layers(prune_layers, depth, pruning)
        _check_scores(pruning, edges)
        self.embed_dim, self.num_frames, self.joint = embed_dim, num_frames, joint
        self.time, self.edges = time, edges
        self.patch_embed = MaskedPatchEmbed(
            patch_size, in_chans, embed_dim, mean=mean, std=std, backend=backend
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        reach = (num_frames, *self.grid)
        rows = math.prod(2 * n - 1 for n in reach) + GLOBAL_ROWS
        block: dict[str, Any] = dict(mlp_ratio=mlp_ratio, init_values=init_values, time=time)
        block |= dict(act_layer=act_layer, norm_layer=norm_layer, backend=backend)
        DropPath(drop_path)  # checks it
        rates = [drop_path * number / max(depth - 1, 1) for number in range(depth)]
        plans = [pruning if number in self.prune_layers else None for number in range(depth)]
        self.blocks = nn.ModuleList(
            BeitBlock(
                embed_dim, num_heads, rows, **block, pruning=plan, drop_path=rate,
                time_drop_path=drop_path,
            )
            for plan, rate in zip(plans, rates, strict=True)
        )  # fmt: skip
        self.norm = norm_layer(embed_dim) if final_norm else nn.Identity()
        initialise(self)

    def forward(
        self,
        video: Tensor,
        ids_keep: Tensor | None = None,
        time: Tensor | None = None,
        *,
        step: int | Tensor = 0,
        seed: int = 0,
    ) -> Frames:
        """Encode the visible patches.

        Args:
            video: [B, C, T, H, W], or images [B, C, H, W]; uint8 or floating point, any strides; T
                up to `num_frames` if joint.
            ids_keep: visible patches of the clip in (time, row, column) order, [B, K] int64; None:
                all. Unless joint, each frame shows as many, those of frame t in columns t K / T to
                (t + 1) K / T - 1.
            time: embedding added to the tokens of each frame, its CLS included, [T, C]; None:
                nothing.
            step, seed: ints; with `edges`, the random blocks of a layer are drawn from them and
                from the number of the layer, on the host, so `torch.compile` compiles each step
                anew. Without, they have no effect.

        Returns:
            `Frames`: of each frame, or of each clip if joint.

        Raises:
            TypeError, ValueError: the clip, the ids or the time embedding do not have these shapes.
            RuntimeError: frames that are encoded separately differ in their number of visible
                patches (on CUDA as a device-side assertion).
        """
        optional = ("ids_keep", "time")
        check_tensors(optional, video=video, ids_keep=ids_keep, time=time, model=self.cls_token)
        if self.edges is not None:
            _check_int("step", step)
            _check_int("seed", seed)
        if video.ndim == 4:
            video = video.unsqueeze(2)
        T, patches = frames_of(video, ids_keep, self.grid, self.patch_embed), math.prod(self.grid)
        if self.joint and self.num_frames < T:
            raise ValueError(f"need video of at most num_frames={self.num_frames} frames, got {T}")
        if time is not None:
            check_floating(time=time)
            check_shape("time", time, T, self.embed_dim)
        B, device = video.shape[0], video.device
        position = None if time is None else (time, time.new_zeros(patches, self.embed_dim))
        x = self.patch_embed(video, ids_keep, position=position)  # [B, K, C]
        if not self.joint:
            ids = frame_ids(B, T, patches, ids_keep, device)
        elif ids_keep is None:
            ids = torch.arange(T * patches, device=device).expand(B, -1)
        else:
            ids = ids_keep
        x = x.reshape(*ids.shape, self.embed_dim)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        if time is not None and not self.joint:
            cls = cls + time.repeat(B, 1)[:, None]
        x = torch.cat([cls, x], 1)
        places = _places(T if self.joint else 1, self.num_frames, self.grid, device)
        frames = T if self.time else None
        tokens = _Tokens(ids, places, frames, patches, every=ids_keep is None)
        kept = {}
        for layer, block in enumerate(self.blocks):
            groups = self._groups(x, seed, step, layer)
            x, after = block(x, groups, tokens)
            if after is not tokens:
                tokens, kept[layer] = after, after.ids
        return Frames(self.norm(x), tokens.ids, kept)

    def _groups(self, x: Tensor, seed: int, step: int | Tensor, layer: int) -> Groups:
        """The groups of a layer."""
        if self.edges is None:
            return Groups.equal(x.shape[0], x.shape[1], device=x.device)
        numbers = hashlib.blake2b(f"{seed} {step} {layer}".encode(), digest_size=7).digest()
        drawn = int.from_bytes(numbers, "big")
        return self.edges.groups(x.shape[0], x.shape[1] - 1, drawn, device=x.device)

    @property
    def keep_rate(self) -> float:
        """The share of tokens that each layer in `prune_layers` keeps."""
        if not self.prune_layers:
            return 1.0
        block: Any = self.blocks[self.prune_layers[0]]
        return block.pruning.keep_rate

    def set_keep_rate(self, keep_rate: float) -> None:
        """Set the keep rate of all layers in `prune_layers`; 1.0 keeps all tokens.

        Raises:
            ValueError: keep_rate is not in (0, 1].
        """
        for layer in self.prune_layers:
            block: Any = self.blocks[layer]
            block.set_keep_rate(keep_rate)

    def load_pretrained(
        self,
        state_dict: Mapping[str, Tensor],
        *,
        mode: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> list[str]:
        """Load the weights of a BEiT.

        The weights may have the names of timm, the authors' code or Hugging Face's BEiT. A table
        that layers share becomes the table of each layer, as in the authors' fine-tuning. Tables of
        images of another size, which must be square, are resized. A joint encoder inflates tables
        of images and of fewer frames, see `inflate_table`. Attention over time may be missing: it
        keeps its weights, and in a new model it adds nothing.

        Args:
            state_dict: the weights by name.
            mode: how tables are resized, see `resize_table`; transformers resizes by "bilinear".

        Returns:
            The names of weights that were skipped because they are outside the encoder:
            classifiers, heads, norms of pooled tokens, mask tokens.

        Raises:
            ValueError: other weights are missing, unexpected, or of another shape (all are named).
        """
        if mode not in ("bicubic", "bilinear"):
            raise ValueError(f"need mode 'bicubic' or 'bilinear', got {mode!r}")
        check_state(state_dict)
        state, skipped = encoder_weights(state_dict, self)
        for name in [n for n in state if n.startswith(NOT_ENCODER) or n.endswith(INDEX)]:
            skipped.append(name)
            del state[name]
        for name in [n for n in state if n.endswith((".attn.q.bias", ".attn.v.bias"))]:
            state[f"{name[: -len('.bias')]}_bias"] = state.pop(name)
        shared = state.pop(f"rel_pos_bias.{TABLE}", None)
        for number in range(len(self.blocks)):
            name = f"blocks.{number}.attn.{TABLE}"
            tables = [x for x in (state.get(name), shared) if x is not None]
            if tables:
                state[name] = self.fitted(torch.stack(tables).sum(0), mode)
        own = [name for name in self.state_dict() if ".time." in name]
        image = not any(name in state for name in own)
        load_or_explain(self, state, may_miss=own if image else ())
        return skipped

    def fitted(self, table: Tensor, mode: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
        """A table for this model's grid and frames; the same if its grid is not known."""
        own: Any = self.blocks[0]
        if table.ndim != 2 or len(table) == len(own.attn.relative_position_bias_table):
            return table
        count, plane = len(table) - GLOBAL_ROWS, math.prod(2 * n - 1 for n in self.grid)
        times, side = count // plane, math.isqrt(max(count, 0))
        if times % 2 and times * plane == count:  # of another number of frames
            frames = (times + 1) // 2
        elif side % 2 and side * side == count:  # an image of another size
            old = (side + 1) // 2
            frames, table = 1, resize_table(table, (1, old, old), (1, *self.grid), mode)
        else:
            return table
        return inflate_table(table, (frames, *self.grid), self.num_frames) if self.joint else table


class BeitBlock(nn.Module):
    """Attention with a table, MLP, pruning, and attention over time before or after them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rows: int,
        *,
        mlp_ratio: float,
        init_values: float | None,
        act_layer: Callable[[], nn.Module],
        norm_layer: Callable[..., nn.Module],
        time: Order | None,
        pruning: Pruning | None,
        drop_path: float,
        time_drop_path: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = BeitAttention(dim, num_heads, rows)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer)
        self.drop_path2 = DropPath(drop_path)
        self.gamma_1, self.gamma_2 = None, None
        if init_values is not None:
            self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
            self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))
        self.time, self.order = None, time
        if time is not None:
            self.time = FramesInTime(dim, num_heads, drop_path=time_drop_path, backend=backend)
        self.pruning, self.backend = pruning, backend

    def forward(self, x: Tensor, groups: Groups, tokens: "_Tokens") -> tuple[Tensor, "_Tokens"]:
        """Transform the tokens of each sample, CLS first.

        Args:
            x: [S, 1 + K, C].
            groups: which of these rows attend to which.
            tokens: which patches they are.

        Returns:
            The tokens and which patches they are; the same `tokens` if nothing was pruned.
        """
        if self.time is not None and self.order == "first":
            x = self.time(x, tokens.time)
        pruning = self.pruning
        if pruning is not None and not pruning.drops(x.shape[1] - 1):
            pruning = None
        attention = partial(self._attention, groups, tokens.positions)
        x, selected = run_layer(x, attention, self._mlp, pruning, backend=self.backend)
        if selected is not None:
            tokens = tokens.select(selected.ids_keep)
        if self.time is not None and self.order == "last":
            x = self.time(x, tokens.time)
        return x, tokens

    def _attention(
        self, groups: Groups, positions: Positions, x: Tensor, scores: Scores | None
    ) -> tuple[Tensor, Tensor | None]:
        out, importance = self.attn(self.norm1(x), groups, positions, scores, self.backend)
        out = out if self.gamma_1 is None else self.gamma_1 * out
        return x + self.drop_path1(out), importance

    def _mlp(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)

    def set_keep_rate(self, keep_rate: float) -> None:
        """Set the keep rate of a block that prunes.

        A method, because a module that wraps the block passes on calls, but keeps attributes.

        Raises:
            ValueError: keep_rate is not in (0, 1], or the block does not prune.
        """
        if self.pruning is None:
            raise ValueError("need a block with pruning to set its keep rate")
        self.pruning = replace(self.pruning, keep_rate=keep_rate)

    def extra_repr(self) -> str:
        return f"pruning={self.pruning}, backend={self.backend!r}"


class BeitAttention(nn.Module):
    """Attention with a table of relative positions, and without a bias of the keys."""

    def __init__(self, dim: int, num_heads: int, rows: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        positions: Positions,
        scores: Scores | None,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, [S, N, C], and the scores of the tokens, [S N], or None.

        Args:
            x: [S, N, C].
            groups, positions: of its rows.
            scores: as in `Pruning`; with groups of `Edges` only "cls".
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if type(self.qkv) is nn.Linear and not has_hooks(self.qkv):
            qkv = F.linear(x, self.qkv.weight, bias)
        else:  # an adapter of peft
            qkv = self.qkv(x) + bias
        rows = groups.num_queries
        q, k, v = qkv.reshape(rows, 3, self.num_heads, -1).unbind(1)
        options: Any = dict(bias=self.relative_position_bias_table, positions=positions)
        out, importance = scored_attention(q, k, v, groups, scores, **options, backend=backend)
        if importance is not None and groups.num_global:
            # The groups of the CLS queries come last, and together list all rows in order.
            importance = importance[importance.shape[0] - rows :]
        return self.proj(out.reshape(x.shape)), importance


class _Tokens:
    """Which patches the tokens behind CLS are, and what follows from it for all layers.

    Args:
        ids: the patches of each frame or clip, [S, K] int64.
        places: positions of CLS and all patches of one of them.
        frames: T, for attention over time; None: without.
        patches: P.
        every: whether `ids` are all patches, in order.

    Attributes:
        positions: of the rows of all tokens.
        time: the groups of attention over time; None without.
    """

    def __init__(
        self, ids: Tensor, places: Positions, frames: int | None, patches: int, every: bool = False
    ) -> None:
        self.ids, self.places, self.frames, self.patches = ids, places, frames, patches
        if every:
            self.positions = places.repeat(ids.shape[0])
        else:
            self.positions = places.select(F.pad(ids + 1, (1, 0)).flatten())
        self.time: Groups | None = None
        if frames is not None:
            self.time = groups_in_time(ids, frames, patches, every=every)

    def select(self, chosen: Tensor) -> "_Tokens":
        """The tokens after pruning; `chosen` [S, K] are their numbers without CLS."""
        return _Tokens(self.ids.gather(1, chosen), self.places, self.frames, self.patches)


def _places(frames: int, num_frames: int, grid: tuple[int, int], device: torch.device) -> Positions:
    """CLS and all patches of so many frames, in a table for `num_frames`."""
    ids = torch.arange(frames * math.prod(grid), device=device)[None]
    return Positions.grid(ids, (frames, *grid), reach=(num_frames, *grid)).with_global()


def _check_int(name: str, number: int | Tensor) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"need {name} as an int, got {number!r}")


def _check_kind(num_frames: int, joint: bool, time: Order | None, edges: Edges | None) -> None:
    check_count("num_frames", num_frames, 1)
    check_flag("joint", joint)
    if time not in (None, *get_args(Order)):
        raise ValueError(f"need time among None, 'first', 'last', got {time!r}")
    if edges is not None and not isinstance(edges, Edges):
        raise TypeError(f"need edges=Edges(block, random), got {edges!r}")
    if joint and time is not None:
        raise ValueError(f"need joint=False with time={time!r}: joint attention has all frames")
    if not joint and edges is not None:
        raise ValueError("need joint=True with edges, got joint=False")
    if not joint and num_frames != 1:
        raise ValueError(f"need joint=True with num_frames={num_frames}, got joint=False")


def _check_scores(pruning: Pruning | None, edges: Edges | None) -> None:
    if pruning is None:
        return
    if pruning.fuse is not None:
        raise ValueError(f"need pruning with fuse=None: tables know no fused token, got {pruning}")
    if pruning.scores == "value":
        raise ValueError(f"need pruning with scores that heed the table, got {pruning}")
    if edges is not None and pruning.scores != "cls":
        raise ValueError(f"need pruning with scores='cls' beside edges, got {pruning}")
