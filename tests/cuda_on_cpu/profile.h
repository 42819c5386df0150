// What a profile build of the emulator counts. The kernels are compiled with -fsanitize=thread, so
// that the compiler calls __tsan_read4(address) and the like for every access; profile.cpp defines
// these functions in place of ThreadSanitizer. The calls below report what they cannot see.
//
// Neither profile.cpp nor this header includes the rest of the emulator, which profile.cpp is
// compiled without -fsanitize=thread: the same classes would have two definitions.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu::profile {

// A launch; `shared` counts dynamic bytes. Only blocks that are taken run.
void begin_launch(const void* kernel, size_t blocks, unsigned threads, size_t shared);
bool takes_block(size_t block);
void end_launch();

// A block, with its shared memory and, at the end, its static bytes.
void begin_block(const char* shared, size_t bytes, unsigned threads);
void end_block(size_t static_shared);
void run_lane(unsigned warp, unsigned lane);

// The lanes of a warp that leave a collective or a barrier together.
void join_lanes(const char* name, unsigned warp, uint32_t lanes, uint32_t all);

// The current lane starts a cp.async, gives a row to ldmatrix, and takes part in an mma; `site` is
// an address in the kernel. `copying`: it has copies that it has not waited for.
void copy(const void* to, const void* from, unsigned bytes, bool valid, const void* site);
void load_matrix(const void* row, const void* site);
void update(const void* p, unsigned bytes, const void* site);  // an atomic operation: a write
void multiply(bool copying, const void* site);
// A wgmma of the lane's warpgroup with n columns, and whether both operands are in shared memory.
void multiply_tile(int n, bool shared, bool copying, const void* site);

// The address of a buffer of global memory, filled with zeros as it is touched.
void* buffer(const char* name, size_t bytes);

}  // namespace cuda_on_cpu::profile
