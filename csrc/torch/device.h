// The parts of torch that csrc/ uses beyond the C++ headers of the stable ABI, as C functions of
// libtorch: the current CUDA stream, the matmul of a device, and new tensors and views. The headers
// have the last too, but look the operation up by its name in every call, which costs a
// microsecond.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name up to torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// The namespace of the ops. A kernel of the Hugging Face Hub has its own (hub/pack.py).
#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME vidl
#endif

extern "C" {
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                        AtenTensorHandle mat1, AtenTensorHandle mat2, double beta,
                                        double alpha);
#ifdef VIDL_CUDA
// Weak, so that the same library loads under a torch without CUDA. There they are null, and never
// called since no CUDA tensor can exist.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                        void** stream);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out,
                                                               AtenTensorHandle self,
                                                               AtenTensorHandle mat1,
                                                               AtenTensorHandle mat2, double beta,
                                                               double alpha);
const char* cudaGetErrorString(int error);
#endif
}

namespace vidl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An uninitialised contiguous tensor on the device of x, by default in its dtype.
inline Tensor new_tensor(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  int32_t type = 0;
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      x.get(), sizes.data(), static_cast<int64_t>(sizes.size()), dtype ? &type : nullptr,
      /*layout=*/nullptr, /*device=*/nullptr, /*device_index=*/0, /*pin_memory=*/nullptr, &result));
  return Tensor(result);
}

// x itself, or a contiguous copy.
inline Tensor contiguous_of(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// A view of a contiguous x as a matrix: `rows` x `columns` of its elements, from `first` on.
inline Tensor matrix_of(const Tensor& x, int64_t rows, int64_t columns, int64_t first = 0,
                        bool transposed = false) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {transposed ? 1 : columns, transposed ? rows : 1};
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, first, &result));
  return Tensor(result);
}

inline void* pointer(const OptionalTensor& x) { return x ? x->data_ptr() : nullptr; }

inline bool is_16bit(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

#ifdef VIDL_EMULATED
// Test builds: CUDA code on CPU tensors (tests/cuda_on_cpu).
inline void* current_stream(const Tensor&) { return nullptr; }
inline void check_cuda(int error) { STD_TORCH_CHECK(error == 0, "vidl: CUDA error ", error); }
#elif defined(VIDL_CUDA)
inline void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}
inline void check_cuda(int error) {
  STD_TORCH_CHECK(error == 0, "vidl: CUDA error: ", cudaGetErrorString(error));
}
#endif

// Makes the device of a tensor the current one during its lifetime.
class DeviceScope {
 public:
#if defined(VIDL_CUDA)
  explicit DeviceScope(const Tensor& x) {
    if (x.is_cuda()) guard_.emplace(x.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#else
  explicit DeviceScope(const Tensor&) {}
#endif
};

// out = beta * out + a @ b, on the device of `out`. With beta = 0 the old `out` is ignored.
inline void addmm(Tensor& out, const Tensor& a, const Tensor& b, double beta) {
#ifdef VIDL_CUDA
  if (out.is_cuda()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
    return;
  }
#endif
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace vidl
