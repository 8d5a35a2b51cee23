// The parallel CPU kernels under ThreadSanitizer, with threads that it understands instead of OpenMP's
// (core/parallel.h).
//   race_check NAME    prints "done"; a race is reported by ThreadSanitizer, which then exits with 66.
// The parallel structure does not depend on the instruction set, so one level stands for all.
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "patches/cpu.cpp"

namespace cpc {
namespace {

TensorView dense(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  for (const int64_t size : shape) view.shape[view.ndim++] = size;
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; stride *= view.shape[d--]) view.strides[d] = stride;
  return view;
}

// Patches of a batch, forward and backward, with every way that the kernels share work and scratch memory.
void patches() {
  constexpr int64_t kBatch = 5, kChannels = 3, kSize = 32, kPatch = 8, kStride = 4,
                    kGrid = (kSize - kPatch) / kStride + 1;
  std::vector<uint8_t> bytes(kBatch * kChannels * kSize * kSize);
  std::iota(bytes.begin(), bytes.end(), uint8_t{0});
  std::vector<float> pixels(bytes.begin(), bytes.end()), grad(pixels.size());
  for (const bool patch_norm : {false, true})
    for (const bool gray : {false, true})
      for (const DType dtype : {DType::f32, DType::bf16}) {
        const int64_t channels = gray ? 1 : kChannels;
        std::vector<float> memory(kBatch * kGrid * kGrid * channels * kPatch * kPatch);
        patches::Problem problem;
        problem.geometry = {kPatch, kStride, kSize, kSize, gray, patch_norm, false};
        problem.images = dense(bytes.data(), DType::u8, {kBatch, kChannels, kSize, kSize});
        problem.patches = dense(memory.data(), dtype, {kBatch, kGrid, kGrid, channels, kPatch, kPatch});
        problem.scale.assign(channels, 0.5);
        problem.shift.assign(channels, 0.25);
        patches::cpu::CPC_ISA::extract(problem);
        problem.images = dense(pixels.data(), DType::f32, {kBatch, kChannels, kSize, kSize});
        problem.images_grad = dense(grad.data(), DType::f32, {kBatch, kChannels, kSize, kSize});
        patches::cpu::CPC_ISA::extract_backward(problem);
      }
}

// What a race looks like: all iterations add to one number.
void planted_race() {
  int64_t total = 0;
  parallel_for(1000, [&](int64_t i, int) { total += i; });
  std::printf("%ld\n", static_cast<long>(total));
}

const std::map<std::string, std::function<void()>> checks = {{"patches", patches}, {"planted_race", planted_race}};

}  // namespace
}  // namespace cpc

int main(int argc, char** argv) {
  const auto found = cpc::checks.find(argc == 2 ? argv[1] : "");
  if (found == cpc::checks.end()) return 2;
  found->second();
  std::puts("done");
  return 0;
}
