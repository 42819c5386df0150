// Products of warpgroups (wgmma) and the two views of shared memory, for cuda/wgmma.h.
//
// A product is only noted when it is issued: its operands are read then, and again by the wait that
// covers it, which computes. Both must be the same. Meanwhile its registers are poisoned.
//
// Wgmma reads shared memory through the async proxy, threads write it through the generic one. The
// async proxy's view is a second copy, brought up to date by fence_proxy_async() of any thread. A
// trace build (trace.cpp) knows the thread that wrote a byte, and asks for the fence of that
// thread.
#pragma once
#include <deque>
#include <list>

#include "cuda_on_cpu_intrinsics.h"

namespace cuda_on_cpu {

// A matrix descriptor. Bits 0-13: start / 16; 16-29: leading byte offset / 16; 32-45: stride byte
// offset / 16; 49-51: base offset; 62-63: swizzle of 0, 128, 64 or 32 bytes.
struct MatrixDescriptor {
  uint32_t start, leading, stride, base;
  uint32_t units;  // of 16 bytes, in a row of the swizzle
  bool mn_major;

  MatrixDescriptor(uint64_t d, bool mn_major)
      : start(uint32_t(d & 0x3FFF) << 4),
        leading(uint32_t(d >> 16 & 0x3FFF) << 4),
        stride(uint32_t(d >> 32 & 0x3FFF) << 4),
        base(uint32_t(d >> 49 & 7)),
        units(d >> 62 == 0 ? 1 : 16u >> (d >> 62)),
        mn_major(mn_major) {}
  // Of 8 numbers: k from 8 * unit on of row `line`, or MN-major, rows from 8 * unit on of k `line`.
  // The swizzle acts on the address: its lowest bits of a unit ^= those from bit 7 on.
  uint32_t address(uint32_t line, uint32_t unit) const {
    uint32_t at = start + line % 8 * 16 * units;
    if (units == 1) {
      at += line / 8 * (mn_major ? leading : stride) + unit * (mn_major ? stride : leading);
    } else {
      at += line / 8 * stride + unit % units * 16 + unit / units * leading;
    }
    return at ^ (at >> 7 & (units - 1)) << 4;
  }
};

// A product of a lane: d (+)= a b.
struct WgmmaCall {
  float* d;
  int n;  // columns
  bool accumulate, is_bf16;
  const uint32_t* a;  // the lane's fragment, or null: a_descriptor
  uint64_t a_descriptor, b_descriptor;
  bool a_mn_major, b_mn_major;
};

struct Registers {  // of a thread: an array in its frame
  const void* at;
  size_t bytes;
};

class Warpgroups final : public Beside {
 public:
  void begin() override { begun_ = false; }
  void leave() override {
    if (begun_ && !warps_[self->warp].products.empty())
      fail("thread exits with wgmma it never waited for");
  }
  void end() override {
    for (size_t g = 0; begun_ && g < groups_.size(); g++) {
      for (size_t w = 4 * g; w < 4 * g + 4 && w < warps_.size(); w++) {
        const size_t all = groups_[g].first + groups_[g].log.size();
        if (warps_[w].steps != all)
          throw Error("warpgroup " + std::to_string(g) + ": warp " + std::to_string(w) +
                      " has executed " + std::to_string(warps_[w].steps) +
                      " of its instructions, another warp " + std::to_string(all));
      }
    }
  }

  uint32_t address(const void* p) const {
    return uint32_t(static_cast<const char*>(p) - block->arena);
  }
  // What threads wrote becomes visible to the async proxy.
  void fence_proxy() {
    if (kCounts) return;
    TsanIgnore ignore;
    start();
    thread().epoch++;
    if (kTraces) return;
    for (const Block::Array& a : block->arrays)
      std::memcpy(&view_[address(a.data)], a.data, a.bytes);
  }

  void fence(std::initializer_list<Registers> registers) {
    if (kCounts) return;
    TsanIgnore ignore;
    start();
    Thread& t = thread();
    t.fenced.clear(), t.has_fence = true;
    for (const Registers& r : registers) {
      const auto* p = static_cast<const unsigned char*>(r.at);
      t.fenced.push_back({p, {p, p + r.bytes}});
    }
    together("wgmma.fence", [] {});
  }
  void commit() {
    if (kCounts) return;
    TsanIgnore ignore;
    start();
    together("wgmma.commit_group", [&] { warps_[self->warp].committed++; });
  }
  void wait(unsigned pending, std::initializer_list<Registers> registers) {
    if (kCounts) return;
    TsanIgnore ignore;
    start();
    together("wgmma.wait_group", [&] {
      Warp& w = warps_[self->warp];
      while (!w.products.empty() && w.products.front().group + pending < w.committed) {
        compute(w.products.front());
        w.products.pop_front();
      }
    });
    thread().has_fence = false;
    for (const Registers& r : registers) take_back(r, pending);
  }
  void multiply(const WgmmaCall& call, Site site) {
#if defined(CUDA_ON_CPU_PROFILE)
    return profile::multiply_tile(call.n, call.a == nullptr, !self->copies.empty(),
                                  __builtin_return_address(0));
#endif
    TsanIgnore ignore;
    start();
    Thread& t = thread();
    if (!t.has_fence)
      fail("wgmma without wgmma.fence since the start or the last wgmma.wait_group");
    struct Operands {
      WgmmaCall call;
      Accumulator* sums;
      uint32_t a[4];
    } mine{call, accumulator(t, call, site), {}};
    if (call.a != nullptr) {
      const Named& named = require_fenced(t, call.a, 16, "A fragment");
      t.fragments[named.at] = {site, named.value};
      std::memcpy(mine.a, call.a, 16);
    }
    block->collective("wgmma", ~0u, mine, site, true, [&](uint32_t, Operands** all) {
      for (int lane = 0; lane < 32; lane++) {
        const WgmmaCall& other = all[lane]->call;
        if (other.a_descriptor != call.a_descriptor || other.b_descriptor != call.b_descriptor ||
            other.accumulate != call.accumulate)
          fail("wgmma: the descriptors or scale-d of the lanes differ");
      }
      step({"wgmma", site, call.a_descriptor, call.b_descriptor, call.n, call.accumulate});
      Warp& w = warps_[self->warp];
      w.products.push_back({call, site, self->warp, w.committed, {}, {}, {}, {}});
      Product& p = w.products.back();
      p.a.resize(16 * 16), p.b.resize(size_t(call.n) * 16);
      for (int lane = 0; lane < 32; lane++) {
        p.sums[lane] = all[lane]->sums;
        for (int i = 0; call.a != nullptr && i < 8; i++) {
          const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i / 4 * 8 + i % 2;
          p.a[row * 16 + k] = uint16_t(all[lane]->a[i / 2] >> 16 * (i % 2));
        }
      }
      if (call.a == nullptr)
        read(p, {call.a_descriptor, call.a_mn_major}, row_of(p), 16, p.a, 'A', true);
      read(p, {call.b_descriptor, call.b_mn_major}, 0, call.n, p.b, 'B', true);
    });
  }

  void wrote(const void* p, size_t bytes) override {
    if (!kTraces) return;
    TsanIgnore ignore;
    start();
    written(address(p), bytes);
  }
  // An access of the current thread to memory; in trace builds.
  void accessed(const void* p, size_t bytes, bool write) {
    TsanIgnore ignore;
    start();
    if (size_t(static_cast<const char*>(p) - block->arena) >= Block::arena_bytes) {
      for (const Accumulator& a : thread().accumulators) {
        if (p >= a.at && p < a.at + a.value.size())
          fail(std::string("an accumulator is ") + (write ? "written" : "read") +
               " between the wgmma (" + where(a.site) + ") and the wait that names it");
      }
    } else if (write) {
      written(address(p), bytes);
    }
  }

 private:
#if defined(CUDA_ON_CPU_PROFILE)
  static constexpr bool kCounts = true;  // products are counted, not computed
#else
  static constexpr bool kCounts = false;
#endif
#if defined(CUDA_ON_CPU_TRACE)
  static constexpr bool kTraces = true;  // every access is known
#else
  static constexpr bool kTraces = false;
#endif
  // Of registers in flight: a signalling NaN, with which arithmetic gives other bits.
  static constexpr uint32_t kPoison = 0xFFBFFFFF;

  struct Accumulator {
    float* at;
    std::vector<float> value;
    unsigned uses;  // by products in flight
    Site site;
  };
  struct Named {
    const void* at;
    std::vector<unsigned char> value;
  };
  struct Fragments {
    Site site;
    std::vector<unsigned char> value;
  };
  struct Thread {
    std::list<Accumulator> accumulators;  // in flight: their registers hold poison
    std::vector<Named> fenced;
    bool has_fence = false;
    std::map<const void*, Fragments> fragments;  // in flight, by array
    unsigned epoch = 0;                          // proxy fences so far
  };
  struct Product {
    WgmmaCall call;
    Site site;
    unsigned warp, group;
    std::vector<uint16_t> a, b;    // [rows or columns][16]
    std::vector<uint32_t> places;  // addresses of units of its operands
    Accumulator* sums[32];
  };
  struct Warp {
    std::deque<Product> products;
    unsigned committed = 0;
    size_t steps = 0;
  };
  struct Step {
    const char* name;
    Site site;
    uint64_t a, b;
    int n;
    bool accumulate;
  };
  struct Warpgroup {
    std::deque<Step> log;  // instructions that not all four warps have executed
    size_t first = 0;
  };

  // Blocks without these instructions spend nothing on them.
  void start() {
    if (std::exchange(begun_, true)) return;
    view_.assign(Block::arena_bytes, 0xFF);
    if (kTraces) author_.assign(Block::arena_bytes, {});
    threads_.assign(block->threads, {});
    warps_.clear(), warps_.resize((block->threads + 31) / 32);
    groups_.assign((block->threads + 127) / 128, {});
  }
  static unsigned me() { return unsigned(self - block->fibers.data()); }
  Thread& thread() { return threads_[me()]; }
  static int row_of(const Product& p) { return int(p.warp % 4 * 16); }

  // An instruction of the warp, the same in all warps of the warpgroup; they need not meet.
  template <class F>
  void together(const char* name, F finish) {
    int nothing = 0;
    const Site site = Site::current();
    block->collective(name, ~0u, nothing, site, true, [&](uint32_t, int**) {
      step({name, site, 0, 0, 0, false});
      finish();
    });
  }
  void step(const Step& s) {
    const unsigned warp = self->warp, g = warp / 4;
    Warpgroup& group = groups_[g];
    for (unsigned w = 4 * g; w < 4 * g + 4; w++)
      if (w >= warps_.size() || block->exists[w] != ~0u)
        fail(std::string(s.name) + ": the block has no whole warpgroup here");
    if (warps_[warp].steps == group.first + group.log.size()) {
      group.log.push_back(s);
    } else {
      const Step& other = group.log[warps_[warp].steps - group.first];
      if (!same(other.name, s.name) || !same(other.site, s.site))
        fail("the warps of warpgroup " + std::to_string(g) + " diverged: another warp executed " +
             other.name + " (" + where(other.site) + "), warp " + std::to_string(warp) + " " +
             s.name + " (" + where(s.site) + ")");
      if (other.a != s.a || other.b != s.b || other.n != s.n || other.accumulate != s.accumulate)
        fail(std::string(s.name) + ": the descriptors or scale-d of the warps differ");
    }
    warps_[warp].steps++;
    size_t least = SIZE_MAX;
    for (unsigned w = 4 * g; w < 4 * g + 4; w++) least = std::min(least, warps_[w].steps);
    while (group.first < least) group.log.pop_front(), group.first++;
  }

  Accumulator* accumulator(Thread& t, const WgmmaCall& call, Site site) {
    const size_t count = size_t(call.n) / 2;
    for (Accumulator& a : t.accumulators) {
      if (call.d + count <= a.at || call.d >= a.at + a.value.size()) continue;
      if (a.at != call.d || a.value.size() != count)
        fail("an accumulator in flight is used by a wgmma of another shape");
      check_untouched(a);
      a.uses++;
      return &a;
    }
    require_fenced(t, call.d, count * sizeof(float), "accumulator");
    t.accumulators.push_back({call.d, {call.d, call.d + count}, 1, site});
    std::fill_n(reinterpret_cast<uint32_t*>(call.d), count, kPoison);
    return &t.accumulators.back();
  }
  void check_untouched(const Accumulator& a) {
    for (size_t i = 0; i < a.value.size(); i++)
      if (reinterpret_cast<const uint32_t*>(a.at)[i] != kPoison)
        fail("register " + std::to_string(i) +
             " of an accumulator was written between the wgmma (" + where(a.site) +
             ") and the wait that names it");
  }
  const Named& require_fenced(Thread& t, const void* p, size_t bytes, const char* what) {
    for (const Named& n : t.fenced) {
      const auto* at = static_cast<const unsigned char*>(n.at);
      const auto* q = static_cast<const unsigned char*>(p);
      if (q < at || q + bytes > at + n.value.size()) continue;
      if (std::memcmp(q, n.value.data() + (q - at), bytes))
        fail(std::string("wgmma: the ") + what + " was written after the wgmma.fence");
      return n;
    }
    fail(std::string("wgmma: the ") + what + " is not named by the last wgmma.fence");
  }
  void take_back(const Registers& r, unsigned pending) {
    Thread& t = thread();
    if (const auto f = t.fragments.find(r.at); f != t.fragments.end()) {
      if (std::memcmp(f->first, f->second.value.data(), f->second.value.size()))
        fail("fragments of the A of a wgmma (" + where(f->second.site) +
             ") were written before the wait");
      t.fragments.erase(f);
    }
    const auto* first = static_cast<const float*>(r.at);
    for (auto a = t.accumulators.begin(); a != t.accumulators.end();) {
      if (a->at < first || a->at >= first + r.bytes / sizeof(float)) {
        ++a;
        continue;
      }
      if (a->uses > 0)
        fail("wgmma.wait_group<" + std::to_string(pending) +
             "> names an accumulator that a group in flight still writes");
      check_untouched(*a);
      std::memcpy(a->at, a->value.data(), a->value.size() * sizeof(float));
      a = t.accumulators.erase(a);
    }
  }

  void written(uint32_t at, size_t bytes) {
    for (const Warp& w : warps_)
      for (const Product& p : w.products)
        for (const uint32_t place : p.places)
          if (at < place + 16 && place < at + bytes)
            fail("write to shared memory that a wgmma in flight reads (" + where(p.site) + ")");
    for (size_t i = 0; i < bytes; i++) author_[at + i] = {me() + 1, thread().epoch};
  }
  void check_published(uint32_t at, const std::string& what) {
    const std::string text = what + ": shared memory was written through the generic proxy";
    if (!kTraces) {
      if (std::memcmp(&view_[at], block->arena + at, 16))
        fail(text + " and no fence.proxy.async follows the write");
      return;
    }
    for (uint32_t i = at; i < at + 16; i++) {
      const auto [writer, epoch] = author_[i];
      if (writer > 0 && threads_[writer - 1].epoch == epoch)
        fail(text + " by thread " + std::to_string(writer - 1) +
             ", which has executed no fence.proxy.async since");
    }
  }
  // Rows first ... first + count - 1 of an operand, 16 k each, to out[row][16].
  void read(Product& p, const MatrixDescriptor& d, int first, int count, std::vector<uint16_t>& out,
            char name, bool issue) {
    const std::string what = std::string("wgmma, operand ") + name;
    if (issue && d.base != 0) fail(what + ": base offsets are not emulated; align the tile");
    if (issue && (d.start >> 7 & (d.units - 1)) != 0)
      fail(what + ": the tile does not start where the swizzle's pattern does");
    const int lines = d.mn_major ? 16 : count, units = d.mn_major ? count / 8 : 2;
    for (int line = 0; line < lines; line++) {
      for (int unit = 0; unit < units; unit++) {
        const uint32_t at = d.mn_major ? d.address(uint32_t(line), uint32_t(first / 8 + unit))
                                       : d.address(uint32_t(first + line), uint32_t(unit));
        if (issue) {
          if (at + 16 > Block::arena_bytes) fail(what + ": the address is outside shared memory");
          check_shared(block->arena + at, 16, what.c_str());
          check_published(at, what);
          p.places.push_back(at);
        }
        uint16_t x[8];
        std::memcpy(x, block->arena + at, 16);
        for (int i = 0; i < 8; i++)
          out[d.mn_major ? (8 * unit + i) * 16 + line : line * 16 + 8 * unit + i] = x[i];
      }
    }
  }
  void read_again(Product& p, const MatrixDescriptor& d, int first, int count,
                  const std::vector<uint16_t>& before, char name) {
    std::vector<uint16_t> now(before.size());
    read(p, d, first, count, now, name, false);
    if (now != before)
      fail(std::string("operand ") + name + " of a wgmma (" + where(p.site) +
           ") was overwritten before the wait that covers it");
  }
  void compute(Product& p) {
    const WgmmaCall& call = p.call;
    if (call.a == nullptr)
      read_again(p, {call.a_descriptor, call.a_mn_major}, row_of(p), 16, p.a, 'A');
    read_again(p, {call.b_descriptor, call.b_mn_major}, 0, call.n, p.b, 'B');
    const auto number = [&](uint16_t x) {
      return double(call.is_bf16 ? bf16_to_float(x) : half_to_float(x));
    };
    // The products are exact in double, and the sum is rounded once.
    std::vector<double> a(p.a.size()), b(p.b.size());
    for (size_t i = 0; i < a.size(); i++) a[i] = number(p.a[i]);
    for (size_t i = 0; i < b.size(); i++) b[i] = number(p.b[i]);
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < call.n / 2; i++) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float& d = p.sums[lane]->value[size_t(i)];
        double sum = call.accumulate ? double(d) : 0.0;
        for (int k = 0; k < 16; k++) sum += a[size_t(row * 16 + k)] * b[size_t(column * 16 + k)];
        d = float(sum);
      }
      p.sums[lane]->uses--;
    }
  }

  bool begun_ = false;               // in this block
  std::vector<unsigned char> view_;  // shared memory as the async proxy sees it
  struct Author {
    unsigned writer, epoch;  // thread + 1, or 0
  };
  std::vector<Author> author_;  // by byte; in trace builds
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Warpgroup> groups_;
};

inline const bool has_warpgroups = [] {
  make_beside = [] { return std::unique_ptr<Beside>(new Warpgroups); };
  return true;
}();
inline Warpgroups& warpgroups() {
  TsanIgnore ignore;
  return static_cast<Warpgroups&>(*block->beside);
}

}  // namespace cuda_on_cpu

#if defined(CUDA_ON_CPU_TRACE)
// What trace.cpp calls for every access. The compiler does not expect an exception from there: the
// error ends the block when a thread returns.
extern "C" __attribute__((used)) inline void cuda_on_cpu_accessed(const void* p, size_t bytes,
                                                                  bool write) {
  using cuda_on_cpu::block;
  if (block == nullptr || cuda_on_cpu::self == nullptr || !block->beside) return;
  try {
    cuda_on_cpu::warpgroups().accessed(p, bytes, write);
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
}
#endif
