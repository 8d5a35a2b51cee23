// InfoNCE and related losses on the GPU, with all keys or sampled ones.
#include <type_traits>

#include "info_nce/all_keys.cuh"
#include "info_nce/sampled.cuh"

namespace cpc::info_nce::cuda {
namespace {

// Calls work with the class that contrasts all keys.
template <class Work>
void with_all_keys(const Problem& problem, const Work& work) {
  switch (problem.queries.dtype) {
    case DType::bf16: return work(AllKeys<BFloat16, WarpProducts<TensorCores<BFloat16>>>(problem));
    case DType::f16: return work(AllKeys<Half, WarpProducts<TensorCores<Half>>>(problem));
    case DType::f32:
      if (problem.tf32) return work(AllKeys<float, WarpProducts<TensorCores<float>>>(problem));
      return work(AllKeys<float, WarpProducts<SplitTf32>>(problem));
    default: return work(AllKeys<double, BlockProducts<double>>(problem));
  }
}

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  if (problem.sampled()) {
    const Parts counted(nullptr);
    return problem.queries.dtype == DType::f64 ? SampledWorkspace<double>(problem, counted).bytes()
                                               : SampledWorkspace<float>(problem, counted).bytes();
  }
  int64_t bytes = 0;
  with_all_keys(problem, [&](const auto& all) { bytes = all.workspace(); });
  return bytes;
}

void contrast(const Problem& problem, void* stream) {
  if (!problem.sampled()) return with_all_keys(problem, [&](const auto& all) { all.run(stream); });
  with_floating(problem.queries.dtype, [&](auto storage) {
    using T = decltype(storage);
    launch_sampled<T, SumOf<T>>(problem, stream);
  });
}

}  // namespace cpc::info_nce::cuda
