// Built with -fsanitize=thread. `test_races NAME` runs one kernel; TSan ends the process with
// status 66 if it detects a race. It does so in any order of threads, and although most of the
// results are right on the CPU.
#include "check.h"

__global__ void kernel(float* out, int bug) {
  SHARED(float, s, [64]);
  const int t = threadIdx.x, lane = t % 32;
  s[t] = float(t);
  if (bug != 1) __syncthreads();
  out[blockIdx.x * 64 + t] = s[63 - t];
  if (bug == 3 && t == 0)
    out[(blockIdx.x + 1) % gridDim.x * 64] = 63.0f;  // the value the other block writes, too
  __syncthreads();
  s[t] = 1.0f;
  if (bug != 2) __syncwarp();  // a shuffle would line the lanes up, but does not order memory
  const float x = __shfl_xor_sync(~0u, s[t ^ 1], 1);
  out[blockIdx.x * 64 + t] += x;
  if (bug == 4) out[gridDim.x * 64 + lane] = 0.0f;  // both warps, every block
  if (bug == 0) atomicAdd(out + gridDim.x * 64, 1.0f);
}

int main(int argc, char** argv) {
  const char* names[] = {"clean", "syncthreads", "syncwarp", "two_blocks", "two_warps"};
  std::vector<float> out(64 * 6 + 32);
  for (int bug = 0; bug < 5; bug++)
    if (argc > 1 && !std::strcmp(argv[1], names[bug]))
      for (int again = 0; again < 2; again++)
        launch(kernel, bug == 4 ? 1 : 6, 64, 0, nullptr, out.data(), bug);
  for (float& x : out) x = 0.0f;  // the host may touch the buffer after the launch
  return 0;
}
