// The product of core/cuda/product.cuh by itself, for test_product.py.
//   product_check MATH TILE OPERANDS ROWS COLUMNS DEPTH
//       multiplies, and prints the largest error, against float64, as a share of the sum of the products' magnitudes;
//       where accesses are traced, prints the observers' results as JSON instead, and fails where the kernel races
//   product_check
//       prints the names of all products, as "MATH TILE OPERANDS"
// OPERANDS gives the layout of A and of B: "rows" have their depth innermost, like queries and keys, and "columns" have
// it outermost, like the operands of their gradients. With "taps" in place of OPERANDS, the program convolves ROWS
// images of 9 x 11 pixels and DEPTH channels with the visible taps of a filter of 3 x 3, for COLUMNS outputs.
// Environment variables: ENTRIES is the number of products of this size, BLOCKS the number of blocks that are traced,
// and REPEATS the number of multiplications on a GPU, whose median time in milliseconds is printed in place of the
// error. Compiled for the emulation, and by nvcc to examine the machine code and to run on a GPU.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "core/cuda/product.cuh"
#include "core/cuda/product_epilogues.cuh"
#include "core/cuda/product_loaders.cuh"
#include "core/cuda/warpgroup_product.cuh"
#include "masked_conv/filters.cuh"
#include "masked_conv/visible_taps.cuh"
#if defined(CPC_CUDA_TRACE)
#include "print_value.h"
#endif

namespace cpc::cuda {
namespace {

struct Size {
  int64_t rows, columns, depth;
};

// Returns the number in an environment variable.
int64_t variable(const char* name, int64_t otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr ? std::strtoll(text, nullptr, 10) : otherwise;
}

// --- Matrices that host and device share ---

template <class T>
class Matrix {
 public:
  // Rows are padded to whole chunks with NaN.
  Matrix(int64_t rows, int64_t columns)
      : stride((columns + kChunk<T> - 1) / kChunk<T> * kChunk<T>), rows(rows), columns(columns) {
#if defined(CPC_CUDA_EMULATION)
    values = new (std::align_val_t{64}) T[static_cast<size_t>(rows * stride)];
#else
    check(cudaMallocManaged(&values, rows * stride * sizeof(T)), "allocating");
#endif
    for (int64_t i = 0; i < rows * stride; ++i) values[i] = Narrow<T>::from(std::nanf(""));
  }
  ~Matrix() {
#if defined(CPC_CUDA_EMULATION)
    ::operator delete[](values, std::align_val_t{64});
#else
    cudaFree(values);
#endif
  }
  Matrix(const Matrix&) = delete;
  void fill(uint32_t seed, bool pad_with_zeros) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        seed = seed * 1664525u + 1013904223u;
        values[i * stride + j] = Narrow<T>::from(static_cast<float>(seed >> 8) / (1 << 24) - 0.5f);
      }
      for (int64_t j = columns; pad_with_zeros && j < stride; ++j) values[i * stride + j] = Narrow<T>::from(0.0f);
    }
  }
  double at(int64_t i, int64_t j) const { return static_cast<double>(widen<float>(values[i * stride + j])); }

  T* values;
  int64_t stride, rows, columns;
};

// --- A product ---

double error_of(double result, int64_t i, int64_t j, int64_t depth, const auto& a, const auto& b) {
  double sum = 0, magnitudes = 1e-30;
  for (int64_t k = 0; k < depth; ++k) {
    const double product = a(i, k) * b(j, k);
    sum += product;
    magnitudes += std::fabs(product);
  }
  return std::fabs(result - sum) / magnitudes;
}

#if !defined(CPC_CUDA_EMULATION)
// The median time.
double milliseconds_of(const auto& work, int64_t repeats) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "an event");
  check(cudaEventCreate(&end), "an event");
  std::vector<float> times(static_cast<size_t>(repeats));
  for (float& time : times) {
    check(cudaEventRecord(begin), "timing");
    work();
    check(cudaEventRecord(end), "timing");
    check(cudaEventSynchronize(end), "timing");
    check(cudaEventElapsedTime(&time, begin, end), "timing");
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return static_cast<double>(times[static_cast<size_t>(repeats / 2)]);
}
#endif

template <class Math, class Tile, template <class> class A, template <class> class B>
double run(const Size& size) {
  using T = typename Math::Value;
  constexpr bool kRowsOfA = std::is_same_v<A<T>, Rows<T>>, kRowsOfB = std::is_same_v<B<T>, Rows<T>>;
  using Out = std::conditional_t<std::is_same_v<Tile, SquareTile>, T, float>;
  const int64_t m = size.rows, n = size.columns, depth = size.depth, entries = variable("ENTRIES", 1);
  const int64_t lines_of_a = kRowsOfA ? m : depth, lines_of_b = kRowsOfB ? n : depth;
  Matrix<T> a(entries * lines_of_a, kRowsOfA ? depth : m), b(entries * lines_of_b, kRowsOfB ? depth : n);
  constexpr bool kTransposed = std::is_same_v<Tile, masked_conv::cuda::FifthTile>;
  Matrix<Out> d(kTransposed ? entries * n : entries * m, kTransposed ? m : n);
  a.fill(1, kRowsOfA);
  b.fill(2, kRowsOfB);
  using Store = std::conditional_t<kTransposed, StoreColumns<float>, StoreRows<Out>>;
  const auto multiply = [&] {
    launch_product<Math, Tile>("multiply", A<T>{a.values, a.stride, m, static_cast<int>(depth), lines_of_a * a.stride},
                               B<T>{b.values, b.stride, n, static_cast<int>(depth), lines_of_b * b.stride},
                               WholeDepth(slices_of<T>(depth)),
                               Store{d.values, d.stride, m, n, (kTransposed ? n : m) * d.stride}, entries, nullptr);
  };
  multiply();
  check(cudaDeviceSynchronize(), "multiplying");
#if !defined(CPC_CUDA_EMULATION)
  if (const int64_t repeats = variable("REPEATS", 0); repeats > 0) return milliseconds_of(multiply, repeats);
#endif
#if defined(CPC_CUDA_TRACE)
  return 0;  // Not all blocks may have run.
#endif
  double worst = 0;
  for (int64_t i = 0; i < entries * m; ++i) {
    const int64_t entry = i / m, in_a = entry * lines_of_a, in_b = entry * lines_of_b;
    const auto of_a = [&](int64_t, int64_t k) { return kRowsOfA ? a.at(i, k) : a.at(in_a + k, i - entry * m); };
    const auto of_b = [&](int64_t j, int64_t k) { return kRowsOfB ? b.at(in_b + j, k) : b.at(in_b + k, j); };
    for (int64_t j = 0; j < n; ++j) {
      const double result = kTransposed ? d.at(entry * n + j, i - entry * m) : d.at(i, j);
      const double error = error_of(result, i, j, depth, of_a, of_b);
      if (!(error <= worst)) worst = error;
    }
  }
  for (int64_t i = 0; i < d.rows; ++i)
    for (int64_t j = d.columns; j < d.stride; ++j)
      if (!std::isnan(d.at(i, j))) throw std::runtime_error("a result beyond the columns");
  return worst;
}

// --- A convolution ---

template <class Math, class Tile>
double convolve(const Size& size, bool images_innermost) {
  namespace conv = masked_conv::cuda;
  using T = typename Math::Value;
  using A = conv::VisibleTaps<T, true>;
  constexpr int kHeight = 9, kWidth = 11;
  const std::vector<conv::Taps::Offset> taps = {{-1, -1}, {-1, 0}, {-1, 1}, {0, -1}, {0, 0}};
  const auto count = static_cast<int64_t>(taps.size());
  const int64_t pixels = size.rows * kHeight * kWidth, depth = count * size.depth, slices = slices_of<T>(depth);
  // Tiles of two teams read filters [channels, 3, 3, columns] in place.
  constexpr bool kInPlace = Tile::kTeams == 2;
  constexpr int kKernel = 3;
  Matrix<T> input(pixels, size.depth);
  Matrix<T> weight(kInPlace ? size.depth * kKernel * kKernel : size.columns,
                   kInPlace ? size.columns : slices * kDepth<T>);
  Matrix<float> d(pixels, size.columns);
  input.fill(1, true);
  weight.fill(2, true);
  const conv::Pixels order = {nullptr,
                              kHeight,
                              kWidth,
                              images_innermost,
                              FastDivide(static_cast<uint32_t>(images_innermost ? size.rows : kHeight * kWidth)),
                              FastDivide(kWidth)};
  A a = {input.values, pixels, static_cast<int>(size.depth), order, {static_cast<int>(count), {}}};
  std::copy(taps.begin(), taps.end(), a.taps.at);
  const auto row_of = [&](const conv::Taps::Offset& by) { return (by.dy + 1) * kKernel + by.dx + 1; };
  const auto by_column = static_cast<int>(weight.stride);
  const auto filters = [&] {
    if constexpr (kInPlace)
      return conv::TransposedFilters<T>{
          .count = size.columns,
          .stride = kKernel * kKernel * weight.stride,
          .in_place = {weight.values + row_of({0, 0}) * weight.stride, kKernel * by_column, by_column}};
    else
      return conv::Filters<T>{.packed = weight.values,
                              .count = size.columns,
                              .stride = weight.stride,
                              .outputs = {static_cast<int>(size.columns), false}};
  };
  launch_product<Math, Tile>("convolve", a, filters(),
                             conv::SeenSlices<A>{static_cast<int>(slices), images_innermost, {}},
                             StoreRows<float>{d.values, d.stride, pixels, size.columns}, 1, nullptr);
  check(cudaDeviceSynchronize(), "convolving");
#if defined(CPC_CUDA_TRACE)
  return 0;
#endif
  const auto seen = [&](int64_t pixel, int64_t k) {
    const conv::Taps::Offset by = taps[static_cast<size_t>(k / size.depth)];
    const int64_t y = pixel / kWidth % kHeight + by.dy, x = pixel % kWidth + by.dx;
    const bool inside = y >= 0 && y < kHeight && x >= 0 && x < kWidth;
    return inside ? input.at(pixel + by.dy * kWidth + by.dx, k % size.depth) : 0.0;
  };
  double worst = 0;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t j = 0; j < size.columns; ++j) {
      const int64_t row = images_innermost ? i % (kHeight * kWidth) * size.rows + i / (kHeight * kWidth) : i;
      const double error = error_of(
          d.at(row, j), row, j, depth, [&](int64_t, int64_t k) { return seen(i, k); },
          [&](int64_t o, int64_t k) {
            if (!kInPlace) return weight.at(o, k);
            const int64_t channel = k % size.depth, tap = k / size.depth;
            return weight.at(channel * kKernel * kKernel + row_of(taps[static_cast<size_t>(tap)]), o);
          });
      if (!(error <= worst)) worst = error;
    }
  return worst;
}

#if !defined(CPC_ONE_PRODUCT)
double low_teams(const Size& size) { return convolve<TensorCores<BFloat16>, masked_conv::cuda::LowTeams>(size, true); }
#endif

// --- The program ---

using Run = double (*)(const Size&);
using Runs = std::map<std::string, Run>;

// CPC_ONE_PRODUCT selects a single product by its arguments: "TensorCores<BFloat16>, SquareTile, Rows, Rows".
#if defined(CPC_ONE_PRODUCT)
Runs all_runs() { return {{"one of them", &run<CPC_ONE_PRODUCT>}}; }
#elif defined(CPC_TWO_TEAMS)
Runs all_runs() { return {{"one of them", &low_teams}}; }
#else
// Returns how many invalid operands are accepted: rows that do not begin at multiples of 16 bytes, or are too far
// apart.
double refuse(const Size& size) {
  using T = BFloat16;
  Matrix<T> a(size.rows, size.depth + 8), d(size.rows, size.rows);
  const Rows<T> right = {a.values, a.stride, size.rows, static_cast<int>(size.depth)};
  Rows<T> shifted = right, narrow = right, far = right;
  shifted.values += 1;
  narrow.stride -= 1;
  far.stride = int64_t{1} << 23;
  int taken = 0;
  for (const auto& wrong : {shifted, narrow, far})
    for (const bool first : {true, false}) try {
        launch_product<TensorCores<T>, SquareTile>("multiply", first ? wrong : right, first ? right : wrong,
                                                   WholeDepth(slices_of<T>(size.depth)),
                                                   StoreRows<T>{d.values, d.stride, size.rows, size.rows}, 1, nullptr);
        ++taken;
      } catch (const std::invalid_argument&) {
      }
  return taken;
}

template <class Math, class Tile>
void add(Runs& runs, const std::string& name) {
  runs[name + " rows-rows"] = &run<Math, Tile, Rows, Rows>;
  runs[name + " rows-columns"] = &run<Math, Tile, Rows, Columns>;
  runs[name + " columns-columns"] = &run<Math, Tile, Columns, Columns>;
}
// How threads copy and read depends only on the size of values, so not every type needs every tile.
Runs all_runs() {
  Runs runs;
  add<TensorCores<BFloat16>, SquareTile>(runs, "bfloat16 square");
  add<TensorCores<BFloat16>, WideTile>(runs, "bfloat16 wide");
  add<TensorCores<BFloat16>, LowTile>(runs, "bfloat16 low");
  add<TensorCores<BFloat16>, masked_conv::cuda::FifthTile>(runs, "bfloat16 fifth");
  add<TensorCores<Half>, SquareTile>(runs, "float16 square");
  add<TensorCores<float>, SquareTile>(runs, "tf32 square");
  add<TensorCores<float>, WideTile>(runs, "tf32 wide");
  add<TensorCores<float>, LowTile>(runs, "tf32 low");
  add<SplitTf32, SquareTile>(runs, "split_tf32 square");
  add<TensorCores<BFloat16>, SquareGroups>(runs, "bfloat16 square_groups");
  add<TensorCores<BFloat16>, WideGroups>(runs, "bfloat16 wide_groups");
  add<TensorCores<BFloat16>, WarpgroupTile<128, 160, 4, 2>>(runs, "bfloat16 fifth_groups");
  add<TensorCores<Half>, WideGroups>(runs, "float16 wide_groups");
  runs["bfloat16 square refused"] = &refuse;
  runs["bfloat16 square taps"] = [](const Size& size) {
    return convolve<TensorCores<BFloat16>, SquareTile>(size, false);
  };
  runs["bfloat16 middle_teams taps"] = [](const Size& size) {
    return convolve<TensorCores<BFloat16>, masked_conv::cuda::MiddleTeams>(size, false);
  };
  runs["bfloat16 low_teams taps"] = &low_teams;
  runs["tf32 low taps"] = [](const Size& size) { return convolve<TensorCores<float>, LowTile>(size, true); };
  return runs;
}
#endif

void print_run(Run run, const Size& size) {
#if defined(CPC_CUDA_TRACE)
  emulation::begin_trace({{"races", {}}, {"traffic", {}}}, static_cast<uint64_t>(variable("BLOCKS", 0)));
  run(size);
  print(emulation::end_trace());
#else
  std::printf("%.9g\n", run(size));
#endif
}

}  // namespace
}  // namespace cpc::cuda

int main(int argc, char** argv) {
  using namespace cpc::cuda;
  const Runs runs = all_runs();
  const auto found = runs.find(argc == 7 ? std::string(argv[1]) + " " + argv[2] + " " + argv[3] : "");
  if (found == runs.end()) {
    for (const auto& [name, run] : runs) std::printf("%s\n", name.c_str());
    return 2;
  }
  const auto number = [&](int i) { return static_cast<int64_t>(std::strtoll(argv[i], nullptr, 10)); };
  try {
    print_run(found->second, {number(4), number(5), number(6)});
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
