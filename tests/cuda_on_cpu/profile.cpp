// Counts what kernels ask of the memory: sectors of global memory, wavefronts of shared memory, mma
// and barriers, for every kernel and place in its source. See profile.h. Prints a JSON object for
// every launch; tests/counters.py reads them.
//
// A request is an access of a warp: those of its lanes at one place of the code, the k-th time
// since they last left a collective together. Lanes of a warp do not run in lockstep here, but
// between two collectives every lane passes a place as often as the others that take the same path.
#include "profile.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace cuda_on_cpu::profile {
namespace {

constexpr size_t kSector = 32, kWavefront = 128;
constexpr unsigned kLanes = 32;
enum Kind : uint8_t { kGlobalRead, kGlobalWrite, kSharedRead, kSharedWrite, kKinds };
const char* const kNames[] = {"global read", "global write", "shared read", "shared write"};

struct Place {  // in the code
  const void* site;
  Kind kind;
  bool operator==(const Place&) const = default;
  bool operator<(const Place& other) const {
    return site != other.site ? site < other.site : kind < other.kind;
  }
};
struct Hash {
  size_t operator()(const Place& p) const {
    return reinterpret_cast<size_t>(p.site) * 0x9E3779B97F4A7C15u + p.kind;
  }
};

struct Request {
  uint32_t lanes = 0;
  uint64_t at[kLanes];
  uint8_t bytes[kLanes];
};
struct Open {  // the requests of a warp at a place since its last collective
  std::array<uint32_t, kLanes> passed{};
  std::vector<Request> requests;
};

// What was counted at a place. A unit is a sector of global memory or a wavefront of shared memory;
// `ideal` is the number that the distinct bytes of every request need at least.
struct Counts {
  uint64_t requests = 0, lanes = 0, units = 0, ideal = 0;
  unsigned width = 0;  // bytes of a lane
};

struct Buffer {
  std::string name;
  uintptr_t begin;
  size_t bytes;
  std::array<std::vector<bool>, 2> sectors;  // read, written
};

struct Launch {
  const void* kernel = nullptr;
  size_t blocks = 0, ran = 0, shared = 0, static_shared = 0;
  unsigned threads = 0;
  std::map<Place, Counts> places;
  std::map<const void*, uint64_t> multiplications;  // mma of a warp, by place
  std::map<const void*, uint64_t> tiles;            // wgmma of a warp
  std::map<std::string, uint64_t> collectives;      // of a warp, by name
  uint64_t squares = 0;  // 16 x 8 x 16 multiplications of a warp's share of all wgmma
  uint64_t copying = 0;  // those of mma and wgmma while copies are under way
  uint64_t fetched = 0;  // distinct sectors of every block
  uint64_t slowest = 0;  // the most of a warp, summed over blocks, times the warps
};

std::vector<Buffer> buffers;
std::array<std::unordered_set<uint64_t>, 2> fetched;  // sectors that this block reads, writes
Launch launch;
const char* arena = nullptr;
size_t arena_bytes = 0;
unsigned warp = 0, lane = 0, warps = 0;
bool running = false;
std::array<std::unordered_map<Place, Open, Hash>, kLanes> open_requests;  // by warp
std::array<uint64_t, kLanes> multiplied;                                  // in this block, by warp
int host_ignores = 0;
int* ignores = &host_ignores;  // of the current fiber

size_t stride() {  // one of so many blocks runs
  static const size_t most = [] {
    const char* const text = std::getenv("CUDA_ON_CPU_BLOCKS");
    return text ? std::strtoull(text, nullptr, 10) : 0;
  }();
  return most == 0 || launch.blocks <= most ? 1 : launch.blocks / most;
}

Buffer* buffer_of(uintptr_t at) {
  for (Buffer& b : buffers) {
    if (at - b.begin < b.bytes) return &b;
  }
  return nullptr;
}

// The most distinct words of a bank, summed over the phases in which the hardware serves a request:
// eight lanes at a time with 16 bytes, sixteen with 8.
unsigned wavefronts_of(const Request& r, unsigned width) {
  const unsigned phase = width >= 16 ? 8 : width == 8 ? 16 : kLanes;
  unsigned total = 0;
  for (unsigned first = 0; first < kLanes; first += phase) {
    std::array<std::vector<uint64_t>, 32> words;
    size_t most = 0;
    for (unsigned l = first; l < first + phase; l++) {
      if (!(r.lanes >> l & 1)) continue;
      for (uint64_t word = r.at[l] / 4; word <= (r.at[l] + r.bytes[l] - 1) / 4; word++) {
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    }
    total += unsigned(most);
  }
  return total;
}

size_t distinct_bytes(const Request& r) {
  std::vector<std::pair<uint64_t, uint64_t>> parts;
  for (unsigned l = 0; l < kLanes; l++) {
    if (r.lanes >> l & 1) parts.emplace_back(r.at[l], r.at[l] + r.bytes[l]);
  }
  std::sort(parts.begin(), parts.end());
  uint64_t end = 0, sum = 0;
  for (const auto& [from, to] : parts) {
    sum += to > std::max(from, end) ? to - std::max(from, end) : 0;
    end = std::max(end, to);
  }
  return sum;
}

void count(const Place& place, const Request& r) {
  Counts& counts = launch.places[place];
  unsigned width = 0;
  std::vector<uint64_t> sectors;
  for (unsigned l = 0; l < kLanes; l++) {
    if (!(r.lanes >> l & 1)) continue;
    counts.lanes++;
    width = std::max<unsigned>(width, r.bytes[l]);
    for (uint64_t s = r.at[l] / kSector; s <= (r.at[l] + r.bytes[l] - 1) / kSector; s++) {
      sectors.push_back(s);
    }
  }
  counts.requests++;
  counts.width = std::max(counts.width, width);
  const size_t bytes = distinct_bytes(r);
  if (place.kind >= kSharedRead) {
    counts.units += wavefronts_of(r, width);
    counts.ideal += std::max<size_t>(1, (bytes + kWavefront - 1) / kWavefront);
    return;
  }
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  counts.units += sectors.size();
  counts.ideal += (bytes + kSector - 1) / kSector;
  for (const uint64_t s : sectors) {
    Buffer& b = *buffer_of(s * kSector);
    b.sectors[place.kind == kGlobalWrite][s - b.begin / kSector] = true;
    fetched[place.kind == kGlobalWrite].insert(s);
  }
}

void close_requests(unsigned of_warp) {
  for (const auto& [place, open] : open_requests[of_warp]) {
    for (const Request& r : open.requests) count(place, r);
  }
  open_requests[of_warp].clear();
}

void note(const void* p, unsigned bytes, Kind kind, const void* site) {
  Open& open = open_requests[warp][{site, kind}];
  const uint32_t k = open.passed[lane]++;
  if (open.requests.size() <= k) open.requests.resize(k + 1);
  Request& r = open.requests[k];
  r.lanes |= 1u << lane;
  r.at[lane] = kind >= kSharedRead ? static_cast<const char*>(p) - arena : uintptr_t(p);
  r.bytes[lane] = uint8_t(bytes);
}

bool in_arena(const void* p) { return size_t(static_cast<const char*>(p) - arena) < arena_bytes; }

void on_access(const void* p, unsigned bytes, bool write, const void* site) {
  if (!running || *ignores) return;
  if (in_arena(p)) {
    note(p, bytes, write ? kSharedWrite : kSharedRead, site);
  } else if (buffer_of(uintptr_t(p)) != nullptr) {
    note(p, bytes, write ? kGlobalWrite : kGlobalRead, site);
  }
}

size_t offset_of(const void* site, size_t back) {  // in the file of the program
  Dl_info info;
  dladdr(site, &info);
  return uintptr_t(site) - uintptr_t(info.dli_fbase) - back;
}

void print() {
  std::printf("{\"kernel\": %zu, \"blocks\": %zu, \"ran\": %zu, \"threads\": %u, ",
              offset_of(launch.kernel, 0), launch.blocks, launch.ran, launch.threads);
  std::printf("\"shared\": %zu, \"static_shared\": %zu, \"copying\": %lu, \"slowest\": %lu, ",
              launch.shared, launch.static_shared, launch.copying, launch.slowest);
  std::printf("\"fetched\": %lu, \"squares\": %lu, ", launch.fetched, launch.squares);
  const char* comma = "";
  std::printf("\"places\": [");
  for (const auto& [place, c] : launch.places) {
    std::printf("%s[\"%s\", %zu, %lu, %lu, %u, %lu, %lu]", comma, kNames[place.kind],
                offset_of(place.site, 1), c.requests, c.lanes, c.width, c.units, c.ideal);
    comma = ", ";
  }
  for (const auto& [name, counts] :
       {std::pair("mma", &launch.multiplications), std::pair("wgmma", &launch.tiles)}) {
    std::printf("], \"%s\": [", name);
    comma = "";
    for (const auto& [site, n] : *counts) {
      std::printf("%s[%zu, %lu]", comma, offset_of(site, 1), n);
      comma = ", ";
    }
  }
  std::printf("], \"collectives\": {");
  comma = "";
  for (const auto& [name, n] : launch.collectives) {
    std::printf("%s\"%s\": %lu", comma, name.c_str(), n);
    comma = ", ";
  }
  std::printf("}, \"buffers\": [");
  comma = "";
  for (const Buffer& b : buffers) {
    const auto sum = [](const std::vector<bool>& x) {
      return std::count(x.begin(), x.end(), true);
    };
    std::printf("%s[\"%s\", %zu, %td, %td]", comma, b.name.c_str(), b.bytes, sum(b.sectors[0]),
                sum(b.sectors[1]));
    comma = ", ";
  }
  std::printf("]}\n");
}

}  // namespace

void begin_launch(const void* kernel, size_t blocks, unsigned threads, size_t shared) {
  launch = {};
  launch.kernel = kernel, launch.blocks = blocks, launch.threads = threads, launch.shared = shared;
  for (Buffer& b : buffers) {
    for (auto& sectors : b.sectors) sectors.assign((b.bytes + kSector - 1) / kSector, false);
  }
}
bool takes_block(size_t block) { return block % stride() == 0; }
void end_launch() { print(); }

void begin_block(const char* shared, size_t bytes, unsigned threads) {
  arena = shared, arena_bytes = bytes, warps = (threads + kLanes - 1) / kLanes, running = true;
  multiplied = {};
}
void end_block(size_t static_shared) {
  running = false;
  for (unsigned w = 0; w < warps; w++) close_requests(w);
  launch.ran++;
  for (auto& sectors : fetched) launch.fetched += sectors.size(), sectors.clear();
  launch.static_shared = static_shared;
  launch.slowest += *std::max_element(multiplied.begin(), multiplied.end()) * warps;
}
void run_lane(unsigned of_warp, unsigned of_lane) { warp = of_warp, lane = of_lane; }

void join_lanes(const char* name, unsigned of_warp, uint32_t lanes, uint32_t all) {
  launch.collectives[name]++;
  if (lanes == all) return close_requests(of_warp);
  for (auto& [place, open] : open_requests[of_warp]) {  // these lanes go on together
    uint32_t most = 0;
    for (unsigned l = 0; l < kLanes; l++) {
      if (lanes >> l & 1) most = std::max(most, open.passed[l]);
    }
    for (unsigned l = 0; l < kLanes; l++) {
      if (lanes >> l & 1) open.passed[l] = most;
    }
  }
}

void copy(const void* to, const void* from, unsigned bytes, bool valid, const void* site) {
  note(to, bytes, kSharedWrite, site);
  if (valid && buffer_of(uintptr_t(from)) != nullptr) note(from, bytes, kGlobalRead, site);
}
void load_matrix(const void* row, const void* site) { note(row, 16, kSharedRead, site); }
void update(const void* p, unsigned bytes, const void* site) { on_access(p, bytes, true, site); }
void multiply(bool copying, const void* site) {
  if (lane != 0) return;
  launch.multiplications[site]++;
  launch.copying += copying;
  multiplied[warp]++;
}
// The operands of a warpgroup are read once for its four warps: a warp counts 16 rows of the left
// one and a quarter of the right one.
void multiply_tile(int n, bool shared, bool copying, const void* site) {
  if (lane != 0) return;
  constexpr unsigned kUnit = 16, kColumns = 8, kWarps = 4;
  const uint64_t squares = unsigned(n) / kColumns;
  launch.tiles[site]++;
  launch.squares += squares;
  launch.copying += copying ? squares : 0;
  multiplied[warp] += squares;
  Counts& counts = launch.places[{site, kSharedRead}];
  const uint64_t rows = (shared ? 16 : 0) + unsigned(n) / kWarps;
  const uint64_t units = rows * 2 * kUnit / kWavefront;
  counts.requests++, counts.lanes += kLanes, counts.width = kUnit;
  counts.units += units, counts.ideal += units;
}

void* buffer(const char* name, size_t bytes) {
  const size_t size = std::max<size_t>(bytes, 1);
  void* const p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  buffers.push_back({name, uintptr_t(p), size, {}});
  return p;
}

}  // namespace cuda_on_cpu::profile

using cuda_on_cpu::profile::ignores;
using cuda_on_cpu::profile::on_access;
#include "tsan.h"
