"""Positions: the rows of the table are those of the models that have one."""

import itertools
import math

import pytest
import torch

from vidl.nn import inflate_table, resize_table
from vidl.ops import Groups, Positions


def every(grid, batch=1):
    """All patches of a clip, in order."""
    return torch.arange(math.prod(grid)).expand(batch, -1)


def rows(positions):
    return positions.index(positions.query_codes[:, None], positions.key_codes)


WINDOWS = [(14, 14), (7, 7), (16, 16), (24, 24), (12, 20), (1, 5)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_rows_of_timm(window):
    beit = pytest.importorskip("timm.models.beit")
    layers = pytest.importorskip("timm.layers.pos_embed_rel")
    swin = pytest.importorskip("timm.models.swin_transformer")
    positions = Positions.grid(every((1, *window)), (1, *window))
    assert torch.equal(rows(positions), layers.gen_relative_position_index(window))
    assert torch.equal(rows(positions), swin.get_relative_position_index(*window))
    with_global = positions.with_global()
    assert with_global.rows == positions.rows + 3
    assert torch.equal(rows(with_global), beit.gen_relative_position_index(window))


@pytest.mark.parametrize("window", [(14, 14), (10, 18)], ids=str)
@pytest.mark.parametrize(
    "module, name",
    [
        ("beit.modeling_beit", "BeitRelativePositionBias"),
        ("data2vec.modeling_data2vec_vision", "Data2VecVisionRelativePositionBias"),
    ],
)
def test_rows_of_transformers(module, name, window):
    theirs = getattr(pytest.importorskip(f"transformers.models.{module}"), name)
    positions = Positions.grid(every((1, *window)), (1, *window)).with_global()
    assert torch.equal(rows(positions), theirs.generate_relative_position_index(window))


VIDEO_WINDOWS = [(8, 7, 7), (2, 7, 7), (16, 7, 7), (4, 3, 5)]


@pytest.mark.parametrize("window", VIDEO_WINDOWS, ids=str)
def test_rows_of_torchvision(window):
    models = pytest.importorskip("torchvision.models.video.swin_transformer")
    index = models.ShiftedWindowAttention3d(32, list(window), [0, 0, 0], 2).relative_position_index
    whole = Positions.grid(every(window), window)
    assert torch.equal(rows(whole), index)
    for frames in range(1, window[0] + 1):  # a clip of fewer frames than the window
        grid = (frames, *window[1:])
        n = math.prod(grid)
        clipped = Positions.grid(every(grid), grid, reach=window)
        assert torch.equal(rows(clipped), index[:n, :n])
    sides = [range(1, window[0] + 1), (1, window[1] - 1, window[1]), (1, window[2] - 2, window[2])]
    for size in itertools.product(*sides):
        n = math.prod(size)
        first = Positions.first(every(size), size, size, reach=window)
        assert torch.equal(rows(first), index[:n, :n])


def test_first_counts_tokens_in_their_window():
    """A map of 4 rows under windows of 2 x 7 x 7, shifted in time: each token counts in its own."""
    grid, size, reach, shift = (5, 4, 7), (2, 4, 7), (2, 7, 7), (1, 0, 0)
    first = Positions.first(every(grid), grid, size, reach=reach, shift=shift)
    groups = Groups.window(every(grid), grid, size, shift)
    whole = rows(Positions.grid(every(reach), reach))
    for start, end in itertools.pairwise(groups.query_offsets.tolist()):
        tokens = groups.query_rows[start:end]
        place = tokens // 28  # frames; the first window has one
        local = (place + 1) % 2 * 28 + tokens % 28
        got = first.index(first.query_codes[tokens, None], first.key_codes[tokens])
        assert torch.equal(got, whole[local[:, None], local])


def three_dimensions_with_cls(window):
    """SViTT's rule, written plainly: displacements of the grid, then three rows for CLS."""
    rel = [2 * n - 1 for n in window]
    axes = [torch.arange(n) for n in window]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    d = places[:, None] - places + torch.tensor(window) - 1
    n, grid_rows = len(places) + 1, math.prod(rel)
    index = torch.empty(n, n, dtype=torch.long)
    index[1:, 1:] = (d[..., 0] * rel[1] + d[..., 1]) * rel[2] + d[..., 2]
    index[0], index[:, 0], index[0, 0] = grid_rows, grid_rows + 1, grid_rows + 2
    return index


@pytest.mark.parametrize("window", [(4, 14, 14), (8, 7, 14), (3, 2, 5)], ids=str)
def test_rows_with_a_global_token(window):
    positions = Positions.grid(every(window), window).with_global()
    assert torch.equal(rows(positions), three_dimensions_with_cls(window))


def test_some_tokens_of_each_sample_with_a_global_token():
    grid = (2, 3, 4)
    index = three_dimensions_with_cls(grid)
    ids = torch.stack([torch.randperm(24)[:9] for _ in range(3)])
    positions = Positions.grid(ids, grid).with_global()
    cu_seqlens = torch.tensor([0, 9, 18, 27], dtype=torch.int32)
    packed = Positions.grid(ids.flatten(), grid, cu_seqlens=cu_seqlens).with_global()
    assert torch.equal(positions.query_codes, packed.query_codes)
    assert positions.row_offsets.tolist() == [0, 10, 20, 30]
    for b in range(3):
        part = slice(10 * b, 10 * b + 10)
        place = torch.cat([torch.tensor([0]), ids[b] + 1])
        got = positions.index(positions.query_codes[part, None], positions.key_codes[part])
        assert torch.equal(got, index[place[:, None], place])
    chosen = torch.tensor([10, 3, 4, 27])
    some = positions.select(chosen)
    assert torch.equal(some.key_codes, positions.key_codes[chosen])
    assert (some.rows, some.wrap) == (positions.rows, positions.wrap)


def test_distances_of_words_are_cut_off():
    positions = Positions.sequence(torch.tensor([0, 6], dtype=torch.int32), 6, 2)
    place = torch.arange(6)
    assert torch.equal(rows(positions), (place[:, None] - place).clamp(-2, 2) + 2)
    assert positions.rows == 5


def test_queries_and_keys_of_two_grids():
    positions = Positions.cross(every((2, 3, 3)), (2, 3, 3), every((2, 2, 3)), (2, 2, 3))
    whole = rows(Positions.grid(every((2, 3, 3)), (2, 3, 3)))
    keys = torch.tensor([t * 9 + y * 3 + x for t in (0, 1) for y in (0, 1) for x in (0, 1, 2)])
    assert torch.equal(rows(positions), whole[:, keys])


def test_check_finds_keys_that_share_a_row():
    ids, grid = every((2, 3, 3)), (2, 3, 3)
    groups = Groups.joint(torch.tensor([0, 18], dtype=torch.int32), 18, 18)
    positions = Positions.grid(ids, grid)
    assert positions.check(groups) is positions
    positions.with_global().check(Groups.joint(torch.tensor([0, 19], dtype=torch.int32), 19, 19))
    flat = Positions.grid(ids, grid, reach=(2, 1, 2))  # the table is of a smaller window
    with pytest.raises(ValueError, match="need keys with distinct rows of the table, group 0"):
        flat.check(groups)
    Positions.grid(ids, grid, reach=(1, 3, 3)).check(Groups.spatial(ids, grid))


CODES = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ((CODES, CODES, 0), ValueError, "need rows >= 1, got 0"),
        ((CODES, CODES, 2.0), TypeError, "need rows as an int"),
        ((CODES, CODES, 3, 3), ValueError, "need wrap < rows, got 3 and 3"),
        ((CODES.long(), CODES, 3), TypeError, "need query_codes in int32, got torch.int64"),
        ((CODES, CODES[None], 3), ValueError, r"need key_codes \[rows\], got \(1, 3\)"),
        ((CODES, [0], 3), TypeError, "need key_codes as a tensor, got list"),
    ],
)
def test_wrong_codes(values, error, message):
    with pytest.raises(error, match=message):
        Positions(*values)


def test_wrong_calls():
    ids, grid = every((2, 3, 3)), (2, 3, 3)
    with pytest.raises(ValueError, match="need reach as 3 ints"):
        Positions.grid(ids, grid, reach=(3, 3))
    with pytest.raises(ValueError, match="without a global token"):
        Positions.grid(ids, grid).with_global().with_global()
    with pytest.raises(ValueError, match="with row_offsets"):
        Positions.cross(ids, grid, ids, grid).with_global()
    with pytest.raises(ValueError, match=r"need positions.query_codes \[17\]"):
        Positions.grid(ids, grid).check(Groups.equal(1, 17))
    with pytest.raises(ValueError, match="need size <= reach"):
        Positions.first(ids, grid, (2, 3, 3), reach=(2, 2, 3))


def test_positions_are_a_pytree():
    positions = Positions.grid(every((2, 3, 3)), (2, 3, 3))
    leaves, spec = torch.utils._pytree.tree_flatten(positions)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.key_codes, positions.key_codes) and again.rows == positions.rows


def test_resized_tables_are_those_of_timm():
    layers = pytest.importorskip("timm.layers.pos_embed_rel")
    table = torch.randn(13 * 13, 4)
    theirs = layers.resize_rel_pos_bias_table_simple(table, (12, 12), (23 * 23, 4))
    torch.testing.assert_close(resize_table(table, (1, 7, 7), (1, 12, 12)), theirs)


def test_resized_tables_keep_global_rows_and_frames():
    table = torch.randn(3 * 5 * 7 + 3, 2)
    bigger = resize_table(table, (2, 3, 4), (2, 4, 6), "bilinear")
    assert bigger.shape == (3 * 7 * 11 + 3, 2) and torch.equal(bigger[-3:], table[-3:])
    for t in range(3):
        plane = table[35 * t : 35 * t + 35].view(1, 5, 7, 2).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(plane, (7, 11), mode="bilinear")
        got = bigger[77 * t : 77 * t + 77].view(7, 11, 2).permute(2, 0, 1)
        torch.testing.assert_close(got, expected[0])
    assert torch.equal(resize_table(table, (2, 3, 4), (2, 3, 4)), table)


def test_an_inflated_table_ignores_time():
    grid = (3, 2, 4)
    table = torch.randn(3 * 7 + 3, 2)
    inflated = inflate_table(table, (1, 2, 4), 3)
    clip = Positions.grid(every(grid), grid).with_global()
    frame = Positions.grid(every((1, 2, 4)), (1, 2, 4)).with_global()
    assert len(inflated) == clip.rows
    place = torch.cat([torch.tensor([0]), torch.arange(24) % 8 + 1])
    expected = table[rows(frame)][place[:, None], place]
    assert torch.equal(inflated[rows(clip)], expected)


@pytest.mark.parametrize("old, new", [(2, 3), (4, 8), (3, 3), (4, 2)])
def test_a_table_is_inflated_to_the_nearest_displacement(old, new):
    planes, special = torch.arange(2 * old - 1.0), torch.full((3, 2), -1.0)
    table = torch.cat([planes.repeat_interleave(3)[:, None].expand(-1, 2), special])
    inflated = inflate_table(table, (old, 1, 2), new)
    assert torch.equal(inflated[-3:], special)
    got = inflated[:-3].view(2 * new - 1, 3, 2)
    assert torch.equal(got, got[:, :1, :1].expand_as(got))
    time = got[:, 0, 0] - (old - 1)  # the displacement whose numbers each one gets
    assert torch.equal(time, -time.flip(0))
    wanted = torch.arange(1 - new, new) * (2 * old - 1) / (2 * new - 1)
    assert ((time - wanted).abs() <= 0.5).all()


def test_wrong_tables():
    table = torch.randn(15, 2)
    with pytest.raises(ValueError, match=r"need table \[21, H\], or 3 rows more"):
        resize_table(table, (1, 2, 4), (1, 3, 3))
    with pytest.raises(ValueError, match="need as many frames, got 1 and 2"):
        resize_table(table, (1, 2, 3), (2, 3, 3))
    with pytest.raises(ValueError, match="need mode 'bicubic' or 'bilinear'"):
        resize_table(table, (1, 2, 3), (1, 3, 3), "nearest")
    with pytest.raises(ValueError, match=r"need table \[45, H\]"):
        inflate_table(torch.randn(15, 2), (2, 2, 3), 2)
    with pytest.raises(TypeError, match="need table as a tensor"):
        inflate_table([1.0], (1, 2, 3), 2)
    with pytest.raises(TypeError, match="need table in a floating dtype"):
        inflate_table(table.long(), (1, 2, 3), 2)
