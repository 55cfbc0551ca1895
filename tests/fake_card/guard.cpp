// A CUDA device without a card, for tests on torch's CPU wheel: autograd, AOTAutograd and SDPA's choice of a backend ask
// for a guard, for hooks and for a stub before they take a CUDA tensor, fake ones too. Nothing can be computed on it.
#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kType = c10::DeviceType::CUDA;
const c10::Device kDevice{kType, 0};
const c10::Stream kStream{c10::Stream::DEFAULT, kDevice};

// The no-op guard of c10, which says that it has no device and no stream.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

// What an sm_80 picks, roughly (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): flash without a mask tensor in
// half precision, memory-efficient otherwise, the formula in fp64.
int64_t pick(const at::Tensor& q, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>& mask, double,
             bool, std::optional<double>, bool) {
  const bool half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const auto backend = half && !mask && q.sym_size(-1) <= 256 ? at::SDPBackend::flash_attention
      : half || q.scalar_type() == at::kFloat                 ? at::SDPBackend::efficient_attention
                                                              : at::SDPBackend::math;
  return static_cast<int64_t>(backend);
}

const int registered = (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&pick), 0);

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}
