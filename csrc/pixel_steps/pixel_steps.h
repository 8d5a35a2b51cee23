// A network of several resolutions that is run one pixel, or one row of pixels, at a time: the contract of the kernels.
//
// The network is a list of steps, which run in order. It keeps feature maps from pixel to pixel; each step is a matrix
// product that reads from such maps and writes its result to such maps. A map [B, kAbove + h, kBeside + w + kBeside, C]
// has zeros around its h x w pixels, so that taps need no bounds checks. A step of level l works at sides that are
// halved l times: it is due at pixels (row, col) of the image that 2^l divides, and its own pixel is (row, col) / 2^l.
// For image b and the step's own pixel (y, x):
//   a[n] = bias[n] + image_bias[b, n] + sum over sources s, their taps (dy, dx) and channels k, in this order, of
//          weight[.., n] * s.map[b, y * s.scale + dy, x * s.scale + dx, k]
//   v[n] = a[n], or with a residual: residual[b, y, x, n] + a[n] * sigmoid(a[n + N / 2]) for n < N / 2
//   raw[b, y', x', n] = v[n]; elu[b, y', x'] = ELU(v) followed by ELU(-v);
//   with y' = y * output_scale + row_offset, x' likewise.
// Sums are in the tensors' type. They are the same whether a pixel or a row is run, and for any number of threads or
// blocks; on the CPU they are one chain of additions.
//
// The caller owns all memory except the weights that the CPU kernel packs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::pixel_steps {

constexpr int64_t kAbove = 2, kBeside = 1;

struct Tap {
  int64_t dy, dx;  // -kAbove to 0, -kBeside to kBeside.
};

struct Source {
  TensorView map;     // [B, kAbove + h, kBeside + w + kBeside, C], f32 or f64, channels dense.
  int64_t scale = 1;  // 1, or 2 for a map of twice the resolution.
  std::vector<Tap> taps;

  int64_t channels() const { return map.shape[3]; }
};

struct AlignedDelete {
  void operator()(char* p) const;
};
using AlignedMemory = std::unique_ptr<char[], AlignedDelete>;
AlignedMemory aligned_memory(int64_t bytes);

struct Step {
  int64_t level = 0;
  std::vector<Source> sources;
  TensorView weight;         // [K, N], dense.
  TensorView bias;           // [N], dense.
  TensorView image_bias;     // [B, N], dense, or absent.
  TensorView residual;       // A map of N / 2 channels of the step's own resolution, or absent.
  TensorView raw;            // A map of N (N / 2 with a residual) channels, or absent.
  TensorView elu;            // A map of the size of raw with twice the channels, or absent.
  int64_t output_scale = 1;  // 1; 2 for maps of twice the resolution; 0 for maps of one pixel, always the same.
  int64_t row_offset = 0, col_offset = 0;
  AlignedMemory packed;  // Weight and bias, set by pack().

  int64_t outputs() const { return weight.shape[1]; }
  int64_t depth() const { return weight.shape[0]; }
  int64_t features() const { return residual.ndim != 0 ? outputs() / 2 : outputs(); }
};

struct Network {
  int64_t batch = 0, height = 0, width = 0;
  DType dtype = DType::f32;
  std::vector<Step> steps;
};

// Where to run the steps that are due.
struct Place {
  const Network& network;
  int64_t row = 0, col = 0;
  bool whole_row = false;  // At all pixels of the row, step by step; col is 0.
};

// Throw std::invalid_argument that names the argument, where a shape, type or layout is not as above, or a place is
// outside of the image.
void check(const Network& network);
void check(const Place& place);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void pack(Network& network); void run(const Place& place))
inline void pack(Network& network) { CPC_CALL_AT_ISA(pack, network) }
inline void run(const Place& place) { CPC_CALL_AT_ISA(run, place) }
}  // namespace cpu

namespace cuda {
// A Place whose plan and position are in a device's memory. A plan may be run only once at a time.
struct DevicePlace {
  char* plan;               // A copy of what fill_plan() has written.
  const int64_t* position;  // Row and column.
  bool whole_row;
};
#if defined(CPC_WITH_CUDA)
int64_t plan_bytes(const Network& network);
void fill_plan(const Network& network, char* plan);
void run(const Network& network, const DevicePlace& place, void* stream);
#endif
}  // namespace cuda

}  // namespace cpc::pixel_steps
