"""The CUDA emulator detects planted bugs, and the sanitizers report nothing for our kernels."""

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

OPS = sorted(
    file.stem.removeprefix("test_")
    for file in emulated.EMULATOR.glob("test_*.cpp")
    if (emulated.ROOT / "csrc" / file.stem.removeprefix("test_") / "cuda.cu").is_file()
)
# Planted bugs in the kernels of an op: a part of the source (it occurs once), its replacement.
BUGS = {
    "masked_patch_embed": {
        "copies are not waited for": ("cp_async_wait();", ""),
        "pixels are read before other lanes have them": (
            "__syncwarp();  // all lanes' pixels are there, and the lanes of a row stay together",
            "",
        ),
        "interleaved channels are read as planes": ("patch[(p + i) * C + c]", "patch[p + i]"),
        "the last column of a position is not written": (
            "c < position.C; c += 32 * n",
            "c < position.C - 1; c += 32 * n",
        ),
        "rows of a warp share the time of the first": ("own != time", "time < 0"),
        "a warp packs rows of the next": ("+ warp) * task.rows_of_warp;", "+ warp);"),
        "pixels of a channel are those of another": ("to_float(x[i][c])", "to_float(x[i][0])"),
        "first rows change before all lanes have read them": (
            "__syncwarp();  // all lanes have read their heads",
            "",
        ),
        "first rows are read before they are written": (
            "__syncwarp();  // the heads are written",
            "",
        ),
        "rows of a list do not ascend": ("same & ~((2u << lane) - 1)", "same & ((1u << lane) - 1)"),
        "offsets of lists are not checked": (
            "__all_sync(kAll, offsets_ascend(rows, lane, 32))",
            "true",
        ),
        "first rows stay in shared memory": ("if (heads == row) return;", "return;"),
        "ids of a list are not checked": ("id >= 0 && id < rows.N", "id >= 0"),
        "first rows are read before all warps have loaded them": (
            "__syncthreads();  // the heads are there",
            "",
        ),
        "first rows of the next samples arrive too early": (
            "__syncthreads();  // and may be overwritten",
            "",
        ),
        "later rows of a patch are not added to its position": ("inverse.next[own] >= 0", "false"),
        "a batch of rows is added without its first": ("part[j].x[i])", "part[j | 1].x[i])"),
        "later rows of a patch are not added to its pixels": ("m = second;", "m = -1;"),
        "offsets are not checked": ("rows.cu_seqlens == nullptr || blockIdx.x != 0", "true"),
        "ids are not checked": ("place.patch < rows.N", "true"),
    },
    "masked_patch_loss": {
        "copies are not waited for": ("cp_async_wait();", ""),
        "pixels are read before other lanes have them": (
            "__syncwarp();  // all lanes' pixels and numbers are there",
            "",
        ),
        "means are read before they are written": (
            "__syncwarp();  // lane 0 has left means and squares",
            "",
        ),
        "channels are read before they are complete": (
            "__syncwarp();  // every channel is complete",
            "",
        ),
        "results are written before they are complete": (
            "__syncwarp();  // all lanes' results are there",
            "",
        ),
        "a lane reads the pixels of its neighbour": (
            "(pixels, task.walk, C, p, c, x)",
            "(pixels, task.walk, C, p ^ kPixels, c, x)",
        ),
        "bytes beyond the last pixel count": ("words.x[i] & first_bytes(", "words.x[i] | 0 & ("),
        "bytes of interleaved channels are those of another": (
            "bytes_of_channel(part * kPixels + 4 * i, j)",
            "bytes_of_channel(4 * i, j)",
        ),
        "numbers beyond the last pixel count": (
            "p + i < count ? x[i][j] - first[j] - mean[j] : 0.0f",
            "x[i][j] - first[j] - mean[j]",
        ),
        "an error beyond the last pixel counts": ("i / kC < valid", "i / kC <= valid"),
        "the last number of a row is not written": (
            "even + lane; i < numbers;",
            "even + lane; i < numbers - 1;",
        ),
        "a warp beyond the last row works": (
            "if (m >= task.rows.total) return;\n  moments +=",
            "moments +=",
        ),
        "offsets are not checked": ("rows.cu_seqlens == nullptr || blockIdx.x != 0", "true"),
        "ids are not checked": ("place.patch < rows.N", "true"),
        "the variance of a patch is biased": (
            "static_cast<float>(C) - 1.0f",
            "static_cast<float>(C)",
        ),
    },
    "select_tokens": {
        "keys are read before they are written": (
            "__syncthreads();  // the keys are there",
            "",
        ),
        "digits are counted before the counts are zero": (
            "__syncthreads();  // nothing is counted",
            "",
        ),
        "places are read too early": (
            "__syncthreads();  // the places are there",
            "",
        ),
        "keys are moved before all are read": (
            "__syncthreads();  // every key of this round is read, and counted",
            "__syncwarp();",
        ),
        "counts are overwritten while they are read": (
            "__syncthreads();  // nobody reads the counts any more",
            "",
        ),
        "sums are read before they are written": (
            "__syncthreads();  // the sums of all warps are there",
            "",
        ),
        "products are read before they are written": (
            "__syncthreads();  // the products of all warps are there",
            "",
        ),
        "0.0 is better than -0.0": ("score == 0.0f ? 0u : __float_as_uint", "__float_as_uint"),
        "NaN is the best": ("if (score != score) return 0;", "if (score != score) return ~1u;"),
        "digits are read before all are counted": (
            "__syncthreads();  // the digits of all keys are counted",
            "",
        ),
        "keys with other digits are counted": ("(key ^ cut.key) & known", "0u & known"),
        "larger digits do not count": ("rank -= digit.above;", ""),
        "the upper half of the digits does not count": (
            "above += __shfl_sync(kAllLanes, sum, 0);",
            "",
        ),
        "too many equal scores are kept": (
            "if (digit.count == rank) return cut;",
            "if (digit.count == rank || i == kDigits - 1) return cut;",
        ),
        "the last of equal scores is better": ("(j < first)", "(j > first)"),
        "neighbours with equal scores share a place": ("better[u] += own[v] == own[u];", ";"),
        "a lane counts itself": ("(1u << threadIdx.x) - 1", "(2u << threadIdx.x) - 1"),
        "the last token is forgotten": ("sample.N - start)", "sample.N - start - 1)"),
        "the last unit of a row is forgotten": (
            "c < count; c += kAhead * step",
            "c < count - kVec; c += kAhead * step",
        ),
        "kept tokens are fused": ("&& !cut.stays(keys.at(n), n)", ""),
        "tokens with infinite weights are fused": ("used[i] = used[i] && is_finite(scale[i]);", ""),
        "groups of rows are left out": ("sum[e] += __shfl_xor_sync(kAllLanes, sum[e], d);", ";"),
        "blocks of packed samples overlap": ("/ plan.rows + i;", "/ plan.rows;"),
        "the mean is not subtracted": ("row[e] - centre[e]", "row[e]"),
        "dropped rows get no gradient": ("zeros.store(to + c);", ";"),
        "a sample keeps more tokens than it has": ("&& sample.K <= sample.N", ""),
        "offsets may end early": ("end <= total : end == total", "end <= total : true"),
        "NaN is not written": ("from_float<T>(NAN)", "from_float<T>(0.0f)"),
    },
    "space_time_attention": {
        "blocks of keys are read before they are written": (
            "cp_async_wait();\n    __syncthreads();  // the block",
            "__syncthreads();  // the block",
        ),
        "blocks of keys are overwritten while they are read": (
            "__syncthreads();  // the block is there, and nobody reads the one before any more",
            "__syncwarp();",
        ),
        "a head is read before it is there": (
            "__syncthreads();  // this head is there, and nobody reads the one before any more",
            "",
        ),
        "a head is overwritten while it is read": (
            "__syncthreads();  // nobody reads this head any more",
            "",
        ),
        "scores are read before they are written": (
            "__syncthreads();  // the sums of all warps are there",
            "",
        ),
        "sums stay relative to a smaller maximum": ("sum[i] *= factor[i];", ""),
        "the queries of another head are used": (
            "fetch(h + 1, next);\n    T *const q",
            "fetch(h, next);\n    T *const q",
        ),
        "rows out of range are copied": ("within(row[n], group.total - 1)", "row[n]"),
        "keys are overwritten by weights while they are read": (
            "__syncthreads();  // nobody reads keys and values any more",
            "",
        ),
        "weights are read before they are written": (
            "__syncthreads();  // the weights are there",
            "",
        ),
        "queries are used before their delta is there": (
            "__syncthreads();  // every query's delta is there",
            "",
        ),
        "gradients are read before they are written": (
            "__syncthreads();  // the gradients of these queries' products are there",
            "",
        ),
        "gradients are overwritten while they are read": (
            "__syncthreads();  // nobody reads these queries' gradients any more",
            "",
        ),
        "a query attends to one key too many": (
            "? limit[i] : count);",
            "? limit[i] : count + 1);",
        ),
        "a query sees one key too many": (
            "? limit[i] : count);",
            "? limit[i] + 1 : count);",
        ),
        "a query of a pack sees one key too few": (
            "within(a.groups.query_limits[rows], slot)",
            "within(a.groups.query_limits[rows] - 1, slot)",
        ),
        "squares that nobody wrote are read": (
            "if (Kind::kLimited && most_seen[row / 16] <= start) continue;",
            "",
        ),
        "gradients that nobody wrote are read": (
            "Kind::kLimited ? group.most_seen[(first + n) / 16] : keys.count",
            "keys.count",
        ),
        "a wide group's keys are seen by all": (
            "(Kind::kLimited ? place.x : keys.count)",
            "keys.count",
        ),
        "keys of long groups are seen by all": ("logit.key[i] >= limits[at] || ", ""),
        "the last query that sees a block is skipped": (
            "before = max(before, i + 1);",
            "before = max(before, i);",
        ),
        "a block of keys is not fetched": (
            "most = max(most, limit_of(groups, queries, keys, start + i));",
            "most = max(most, limit_of(groups, queries, keys, start + i) - 64);",
        ),
        "NaN reaches queries without keys": (
            "if (e / 2 % 2 == 0 ? first : second) sums",
            "if (false) sums",
        ),
        "a row of a wide group without keys is NaN": (
            "if (Kind::kLimited && group.places[query].x == 0) packed[i] = 0;",
            "",
        ),
        "hidden keys of a query without others have weights": (
            "if (Kind::kBiased && lse[i] == -INFINITY) limit[i] = 0;",
            "",
        ),
        "rows of the table are not limited": (
            "within(wrapping_sum(code, offset), last)",
            "wrapping_sum(code, offset)",
        ),
        "the bias of the keys is forgotten": (" + terms.bias[column];", ";"),
        "a query has the code of another": (
            "offset[i] = query < queries.count ? offset_of(a.bias, queries.row(query)) : 0;",
            "offset[i] = query < queries.count ? offset_of(a.bias, queries.row(first)) : 0;",
        ),
        "gradients of the first row are forgotten": ("table[0] += first_row;", ""),
        "gradients of the last row count twice": (
            "row[n] > 0 && row[n] >= last ? own[n]",
            "row[n] >= last ? own[n]",
        ),
        "the table of a warp is forgotten": ("n < tables; n++) x +=", "n < tables - 1; n++) x +="),
        "a part of the table is forgotten": (
            "part < parts; part++",
            "part < parts - 1; part++",
        ),
        "later keys of one code are forgotten": (
            "const int rounds = max_of_warp(rank) + 1;",
            "const int rounds = 1;",
        ),
        "tables are read before they are complete": (
            "__syncthreads();  // the tables of all warps are there",
            "",
        ),
        "warps add to one table at once": (
            "__syncthreads();  // the sums of the warps before are there",
            "",
        ),
        "groups with other keys share their sums": (
            "static_cast<unsigned>(key_codes[x][i]) - key_codes[y][i] == more",
            "key_codes[x][i] - key_codes[y][i] != INT32_MAX",
        ),
        "groups with other queries share their sums": (
            "static_cast<unsigned>(query_codes[x][i]) - query_codes[y][i] == more",
            "query_codes[x][i] - query_codes[y][i] != INT32_MAX",
        ),
        "groups with fewer keys share the sums of others": (
            "&& keys == tile[y].keys;",
            "&& keys <= tile[y].keys;",
        ),
        "sums are added again": (
            "    sums.clear();\n    do {",
            "    if (n == 0) sums.clear();\n    do {",
        ),
        "a tile is read before all warps have copied it": (
            "__syncthreads();  // the tile is there, and nobody reads the one before any more",
            "__syncwarp();",
        ),
        "the tile behind the first has the rows of the first": (
            "t.query_place += query, t.key_place += key;",
            "t.query_place += query;",
        ),
        "limits count from the first key of a tile": (
            "max(numbers.limits[slot % 2][query], 0) - t.first_key",
            "max(numbers.limits[slot % 2][query], 0)",
        ),
        "a part of the tiles is forgotten": (
            "end(plan.items * (part + 1) / plan.parts)",
            "end(plan.items * (part + 1) / plan.parts - (part > 0))",
        ),
        "the last query of a group is forgotten": (
            "if (member < group.count) row =",
            "if (member < group.count - 1) row =",
        ),
        "NaN reaches another group of the warp": (
            "!finite<T, D>(v)",
            "false",
        ),
        "weights are not transposed": ("transpose(across);", ""),
        "a row gets the delta of another row": (
            "__shfl_sync(kAllLanes, dot, 2 * row_of_lane(i))",
            "__shfl_sync(kAllLanes, dot, row_of_lane(i))",
        ),
        "sums go to the wrong lanes": (
            "return 8 * j + int(lane_id()) % 4 * 2;",
            "return 8 * j + (int(lane_id()) + 1) % 4 * 2;",
        ),
        "rows of a pack are read before they are written": (
            "copy_pack<T, D>(v, a.v, group.h, rows, 16);\n"
            "    cp_async_commit();\n"
            "    cp_async_wait();\n"
            "    __syncwarp();\n"
            "    if (at_once > 1 && !finite<T, D>(v))",
            "copy_pack<T, D>(v, a.v, group.h, rows, 16);\n"
            "    cp_async_commit();\n"
            "    __syncwarp();\n"
            "    if (at_once > 1 && !finite<T, D>(v))",
        ),
        "the gradient of scores is left out of delta": (
            "delta[i] += sum_of_row(more[i]) * share[i];",
            "",
        ),
        "the last entry of a row is forgotten": ("n < end; n++", "n < end - 1; n++"),
        "rows out of range are read": ("within(rows[first + i], total - 1)", "rows[first + i]"),
        "a group is longer than its bound": ("within(end - begin, longest)", "end - begin"),
        "entries out of range are read": (
            "within(groups.entries[n], groups.E - 1) * channels",
            "int64_t{groups.entries[n]} * channels",
        ),
    },
    # Its kernels for a head size of 64.
    "space_time_attention 64": {
        "a stage is read before it is there": (
            "cp_async_wait();\n      prepare_stage",
            "prepare_stage",
        ),
        "a stage is read before all warps have it": (
            "__syncthreads();  // the stage is there",
            "//",
        ),
        "wgmma does not see a stage": (
            "fence_proxy_async();\n      __syncthreads();  // the stage",
            "__syncthreads();  // the stage",
        ),
        "gradients are read before all warps have them": (
            "__syncthreads();  // the gradients of the logits are there",
            "",
        ),
        "wgmma does not see the gradients": (
            "fence_proxy_async();\n      __syncthreads();  // the gradients",
            "__syncthreads();  // the gradients",
        ),
        "products have registers that were not handed over": (
            "wgmma_fence(weights, grads);",
            "",
        ),
        "products are weighed before they are there": (
            "wgmma_wait<1>(sums.weights, sums.grads);",
            "",
        ),
        "left operands are overwritten while they are read": (
            "sums.finish_sums(step - 1);\n    sums.pack(memory.grads, thread, step);",
            "sums.pack(memory.grads, thread, step);\n    sums.finish_sums(step - 1);",
        ),
        "a group of products is not waited for": (
            "wgmma_wait<0>(grad_v[tile]",
            "wgmma_wait<1>(grad_v[tile]",
        ),
        "the first product is added to what was there": (
            "advance(keys, 32 * d), advance(queries, 32 * d),\n"
            "                                     d > 0);",
            "advance(keys, 32 * d), advance(queries, 32 * d),\n"
            "                                     true);",
        ),
        "the sums of a head are added to those of the last": (
            "HopperSums<T> sums;\n    sums.clear();",
            "HopperSums<T> sums;",
        ),
        "queries are taken 8 at a time": (
            "advance(queries, n * 16 * kSwizzledRow)",
            "advance(queries, n * 8 * kSwizzledRow)",
        ),
        "keys are taken as K-major": (
            "wgmma<T, Major::kMN, Major::kMN>(sums,",
            "wgmma<T, Major::kMN, Major::kK>(sums,",
        ),
        "rows are copied without a swizzle": (
            "swizzled(row * kSwizzledRow + 2 * d)",
            "(row * kSwizzledRow + 2 * d)",
        ),
        "gradients are stored without a swizzle": ("(start ^ 16 * unit)", "(start + 16 * unit)"),
        "keys beyond the last have weights": (
            "key + 8 * (e / 2) < count;",
            "key + 8 * (e / 2) <= count;",
        ),
        "the last query is forgotten": (
            "r < count ? memory.lse[r] * kLog2E",
            "r < count - 1 ? memory.lse[r] * kLog2E",
        ),
        "delta is a part of the sum": ("d < 8; d *= 2) dot +=", "d < 4; d *= 2) dot +="),
        "a half has the log-sum-exp of the first": (
            "stage += step / kTiles * kHalfQueries + thread % 4 * 2;",
            "stage += thread % 4 * 2;",
        ),
        "warpgroups have the same keys": (
            "advance(keys, warpgroup * 2 * kTileKeys * kSwizzledRow)",
            "keys",
        ),
        "the next head has the keys of this one": ("keys_slot ^= 1) {", "keys_slot ^= 0) {"),
        "the last keys of the next head are forgotten": (
            "is_last ? kHopperKeys - first : kTileKeys",
            "kTileKeys",
        ),
        "the next head has the queries of this one": (
            "const HopperTask task(a, is_last ? next_index : index);",
            "const HopperTask task(a, index);",
        ),
        "stages share a slot": ("stage++, slot ^= 1) {", "stage++) {"),
        "a stage is one half": ("query_count - first > kHalfQueries", "false"),
        "groups without queries give no zeros": (
            "kStageQueries, 1);",
            "kStageQueries, 0);",
        ),
        "lanes exchange the wrong columns": (
            "is_upper ? x : y, kDistance",
            "is_upper ? y : x, kDistance",
        ),
    },
    "token_scores": {
        "sums are read before they are written": (
            "__syncthreads();  // the numbers of all warps are there",
            "",
        ),
        "gradients of warps are read before they are written": (
            "__syncthreads();  // the sums of all warps are there",
            "",
        ),
        "the gradient of a warp is forgotten": (
            "w < kTeamWarps; w++) grad_q[i] +=",
            "w < kTeamWarps - 1; w++) grad_q[i] +=",
        ),
        "the first query sees one key too few": (
            "limit_of(s.groups, queries, keys, 0);\n  float* const to",
            "limit_of(s.groups, queries, keys, 0) - 1;\n  float* const to",
        ),
        "keys that are not seen have weights": (
            "to[j] = j < seen ? to[j] / sum : 0.0f;",
            "to[j] = to[j] / sum;",
        ),
        "keys that are not seen are read": (
            "if (j >= seen || unit >= D / 8 ||",
            "if (j >= count || unit >= D / 8 ||",
        ),
        "entries have the query of another group": ("group_of(groups, entry));", "0);"),
        "norms leave out heads": ("count = static_cast<int>(s.H) * units;", "count = units;"),
        "values are not divided by their norm": ("grad / b.norms[row]);", "grad);"),
        "two lanes add to a row of the table": ("to % 32 == lane", "to % 16 == lane % 16"),
        "rows are read before they are there": (
            "cp_async_wait();\n  __syncwarp();  // all lanes' rows are there",
            "__syncwarp();  // all lanes' rows are there",
        ),
        "blocks of keys are read before they are written": (
            "cp_async_wait();\n    __syncthreads();  // the block",
            "__syncthreads();  // the block",
        ),
        "blocks of keys are overwritten while they are read": (
            "__syncthreads();  // the block is there, and nobody reads the one before any more",
            "__syncwarp();",
        ),
        "queries have the numbers of the block before": (
            "numbers[(2 * n + parity) * kBlock + column]",
            "numbers[(2 * n + 1 - parity) * kBlock + column]",
        ),
        "queries sum keys that they do not see": ("logit.key[i] >= limits[at] ||", ""),
        "queries beyond the last have weights": (
            "if (start + column < queries.count) block[i] += x;",
            "block[i] += x;",
        ),
        "delta is not subtracted": ("grad[i] - terms.number(2, parity, column)", "grad[i]"),
        "gradients leave the range of float16": (
            "const bool usual = exponent > 0 && exponent < 254;",
            "const bool usual = false;",
        ),
        "a query has the offset of another": (
            "Kind::kBiased && real ? offset_of(s.bias, row) : 0;",
            "Kind::kBiased && real ? offset_of(s.bias, 0) : 0;",
        ),
        "NaN reaches queries without keys": (
            "if (e / 2 % 2 == 0 ? first : second) sums",
            "if (false) sums",
        ),
        "a small part of a cosine is forgotten": (
            "multiply<fp16>(small, hi_rows.x[d], right);",
            "",
        ),
        "a maximum ignores NaN": ("wrong[i] += cosine - cosine;", ""),
        "odd keys lie among the even ones": ("keys.first + even.count", "keys.first"),
        "keys meet one odd key too many": (
            "if (column >= halves.odd.count) continue;",
            "if (column > halves.odd.count) continue;",
        ),
        "rows out of range are read": ("within(rows[first + i], total - 1)", "rows[first + i]"),
        "a group is longer than its bound": ("within(end - begin, longest)", "end - begin"),
    },
}
# Bugs that only a trace build detects.
TRACED_BUGS = {
    "a stage is fenced by other threads than those that copied it": (
        "fence_proxy_async();\n      __syncthreads();  // the stage",
        "__syncthreads();\n      fence_proxy_async();  // the stage",
    ),
    "gradients are fenced by other threads than those that wrote them": (
        "fence_proxy_async();\n      __syncthreads();  // the gradients",
        "__syncthreads();\n      fence_proxy_async();  // the gradients",
    ),
}
RACES = ["syncthreads", "syncwarp", "two_blocks", "two_warps"]


def run(program: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    # Leak detection needs ptrace, which containers forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"} | more
    command = [str(program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # Old versions of ThreadSanitizer do not support all randomised addresses.
    if "unexpected memory mapping" in done.stderr:
        setarch = shutil.which("setarch")
        if setarch is None:
            pytest.skip("ThreadSanitizer needs addresses without randomisation")
        command = [setarch, "--addr-no-randomize", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "Operation not permitted" in done.stderr:
            pytest.skip("ThreadSanitizer needs addresses without randomisation")
    return done


def assert_passes(program: Path, *arguments: str) -> None:
    done = run(program, *arguments)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize(
    "kind", ["plain", "ucontext", pytest.param("address", marks=pytest.mark.slow)]
)
def test_emulator(kind):
    assert_passes(emulated.program("emulator", kind))


@pytest.mark.parametrize("kind", ["plain", pytest.param("address", marks=pytest.mark.slow)])
def test_planted_bugs_are_detected(kind):
    assert_passes(emulated.program("bugs", kind))


@pytest.mark.parametrize(
    "kind", ["plain", *(pytest.param(x, marks=pytest.mark.slow) for x in ("trace", "address"))]
)
def test_bugs_with_products_of_warpgroups_are_detected(kind):
    assert_passes(emulated.program("warpgroups", kind))


@pytest.mark.slow
def test_a_read_past_a_shared_array_ends_the_program():
    done = run(emulated.program("bugs", "address"), "overrun")
    assert done.returncode != 0
    assert "out of bounds" in done.stderr or "AddressSanitizer" in done.stderr


def test_no_false_race():
    assert_passes(emulated.program("races", "thread"), "clean")


@pytest.mark.parametrize("bug", RACES)
def test_a_race_is_detected(bug):
    done = run(emulated.program("races", "thread"), bug)
    assert done.returncode == 66 and "data race" in done.stderr, done.stderr[-4000:]


def test_every_kernel_has_a_sanitizer_test():
    assert sorted(file.parent.name for file in emulated.ROOT.glob("csrc/*/cuda.cu")) == OPS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("op", OPS)
def test_kernels_under_sanitizers(op, kind):
    assert_passes(emulated.program(op, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread", "trace"])
def test_wgmma_under_sanitizers(kind):
    assert_passes(emulated.program("space_time_attention", kind, head_size=64))


@pytest.mark.slow
@pytest.mark.parametrize("op, bug", [(op, bug) for op, bugs in BUGS.items() for bug in bugs])
def test_a_bug_in_a_kernel_is_detected(op, bug):
    name, _, head_size = op.partition(" ")
    program = emulated.program(name, "quick", BUGS[op][bug], int(head_size or 32))
    done = run(program, STOP_AT_FAILURE="1")
    assert done.returncode != 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("bug", TRACED_BUGS)
def test_a_trace_detects_a_missing_fence(bug):
    done = run(emulated.program("space_time_attention", "trace", TRACED_BUGS[bug], head_size=64))
    assert done.returncode != 0 and "no fence.proxy.async" in done.stdout + done.stderr
