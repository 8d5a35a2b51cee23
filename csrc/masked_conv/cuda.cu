// Masked convolution on the GPU, forward and backward. A convolution is a matrix product (core/cuda/product.cuh) of
// pixels and outputs whose depth is the visible taps times the channels. The left operand is what each pixel sees
// (visible_taps.cuh), the right operand the filters (filters.cuh); outputs.cuh has the epilogue. The rows of a tile are
// neighbouring pixels, or one pixel of many images, so that a tile can skip taps that lead all of its rows out of the
// image. The gradients of activation and weight are in headers of their own.
#include <algorithm>
#include <iterator>
#include <type_traits>

#include "masked_conv/activation_grad.cuh"
#include "masked_conv/filters.cuh"
#include "masked_conv/masked_conv.h"
#include "masked_conv/outputs.cuh"
#include "masked_conv/visible_taps.cuh"
#include "masked_conv/weight_grad.cuh"

namespace cpc::masked_conv::cuda {
namespace {

// The distance in values between the packed weights of two outputs: at least one slice, even if it is empty.
int64_t packed_stride(int64_t depth, int64_t size) {
  return std::max<int64_t>(divide_up(depth * size, kSliceBytes), 1) * kSliceBytes / size;
}

// The order of a convolution's pixels. Images are innermost where a pixel has at least the bytes of a memory sector: a
// tile at a border then holds one pixel of many images and skips the taps that miss the image, a sixth of all on a grid
// of 7 x 7.
Pixels order_of(const Convolution& problem, int64_t images) {
  constexpr int64_t kSector = 32;
  const int64_t height = problem.height(), width = problem.width();
  const int64_t bytes = std::min(problem.inputs(), problem.output.shape[1]) * size_of(problem.input.dtype);
  const bool images_innermost = problem.position.data != nullptr || bytes >= kSector;
  return {.position = problem.position.as<int64_t>(),
          .height = static_cast<int>(height),
          .width = static_cast<int>(width),
          .images_innermost = images_innermost,
          .by_inner = FastDivide(static_cast<uint32_t>(images_innermost ? images : height * width)),
          .by_width = FastDivide(static_cast<uint32_t>(width))};
}

// The centre tap, with offset (0, 0), of weights or mask, and the distances to its neighbours. sign: -1 where taps are
// negated.
template <class T>
WeightsInPlace<T> in_place(const TensorView& weight, int sign) {
  const int64_t above = (weight.shape[2] - 1) / 2, before = (weight.shape[3] - 1) / 2;
  return {.centre = weight.as<T>() + above * weight.strides[2] + before * weight.strides[3],
          .by_row = sign * static_cast<int>(weight.strides[2]),
          .by_column = sign * static_cast<int>(weight.strides[3])};
}
TapMask mask_in_place(const TensorView& mask, int sign) {
  const int64_t above = (mask.shape[0] - 1) / 2, before = (mask.shape[1] - 1) / 2;
  return {.centre = mask.as<bool>() + above * mask.strides[0] + before * mask.strides[1],
          .by_row = sign * static_cast<int>(mask.strides[0]),
          .by_column = sign * static_cast<int>(mask.strides[1])};
}

// The operands and the epilogue of the product that convolves some of the images.
template <class T, bool kWholeChunks, class FiltersOf = Filters<T>>
struct Operands {
  VisibleTaps<T, kWholeChunks> pixels;
  FiltersOf filters;
  SeenSlices<VisibleTaps<T, kWholeChunks>> depth;
  static constexpr bool kTransposed = std::is_same_v<FiltersOf, TransposedFilters<T>>;
  std::conditional_t<kTransposed, StorePixels<T>, FinishOutputs<T>> outputs;

  Operands(const Convolution& problem, int64_t first_image, int64_t images) {
    constexpr int64_t kSmallMap = 256, kManyImages = 32;  // Where taps may miss all pixels of a tile.
    const auto from = [&](TensorView view) {
      if (view.data != nullptr)
        view.data = static_cast<char*>(view.data) + first_image * view.strides[0] * size_of(view.dtype);
      return view;
    };
    const int64_t in_image = problem.height() * problem.width();
    const int values = depth_of(static_cast<int64_t>(problem.taps.size()), problem.inputs());
    const bool packed = problem.packed.data != nullptr;
    const int sign = problem.transposed ? -1 : 1;
    pixels = {.input = from(problem.input).template as<T>(),
              .count = images * (problem.position.data != nullptr ? 1 : in_image),
              .channels = static_cast<int>(problem.inputs()),
              .pixels = order_of(problem, images),
              .taps = offsets_of(problem.taps)};
    depth = {.slices = static_cast<int>(slices_of<T>(values)),
             .looks = pixels.pixels.images_innermost && in_image <= kSmallMap && images >= kManyImages,
             .mask = packed ? TapMask{} : mask_in_place(problem.mask, sign)};
    const OutputOrder order{static_cast<int>(problem.outputs), problem.activation == Activation::gated};
    if constexpr (kTransposed)
      outputs = {from(problem.output), pixels.count, pixels.pixels, order.outputs};
    else
      outputs = {.bias = problem.bias.as<T>(),
                 .condition = from(problem.condition),
                 .output = from(problem.output),
                 .preactivation = from(problem.preactivation),
                 .rows = pixels.count,
                 .pixels = pixels.pixels,
                 .outputs = order,
                 .activation = problem.activation};
    filters.count = order.columns();
    filters.stride = packed ? packed_stride(values, sizeof(T)) : problem.weight.strides[0];
    if (!packed) filters.in_place = in_place<T>(problem.weight, sign);
    if constexpr (!kTransposed) {
      filters.packed = problem.packed.as<T>();
      filters.outputs = order;
    }
  }
};

template <class Math, class Tile, bool kWholeChunks, class FiltersOf>
void launch_convolve(const Operands<typename Math::Value, kWholeChunks, FiltersOf>& a, void* stream) {
  launch_product<Math, Tile>("convolve", a.pixels, a.filters, a.depth, a.outputs, 1, stream);
}

// The estimated time of all tiles, in results that one multiprocessor computes.
template <class Tile>
double cost(int64_t rows, int64_t columns) {
  const int64_t tiles = divide_up(rows, Tile::kRows) * divide_up(columns, Tile::kColumns);
  constexpr double kFactor = Tile::kRows == LowTile::kRows     ? kLowCost
                             : Tile::kRows < SquareTile::kRows ? kMiddleCost
                                                               : 1;
  return kFactor * static_cast<double>(divide_up(tiles, multiprocessors()) * Tile::kRows * Tile::kColumns);
}

// Launches the product with the cheapest of the tiles, the first of equals.
template <class Math, class... Tiles, bool kWholeChunks, class FiltersOf>
void launch_cheapest(const Operands<typename Math::Value, kWholeChunks, FiltersOf>& a, void* stream) {
  const double costs[] = {cost<Tiles>(a.pixels.count, a.filters.count)...};
  const auto best = std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs);
  int tile = 0;
  ((tile++ == best ? launch_convolve<Math, Tiles>(a, stream) : void()), ...);
}

// Whether two teams of warps share the depth of each output, for 16-bit values: on small maps, which have few tiles. As
// results depend on it, the choice depends neither on the number of images nor on whether a pixel is computed alone.
bool halves_depth(const Convolution& problem) {
  constexpr int64_t kFewPixels = 64;
  return problem.height() * problem.width() <= kFewPixels && has_pairs_of_slices(problem.input, problem.inputs());
}

// Results do not depend on the chosen tile, and so not on the GPU.
template <class Math>
void choose_convolve(const Convolution& problem, int64_t first_image, int64_t images, void* stream) {
  using T = typename Math::Value;
  const bool alone = problem.position.data != nullptr;
  if constexpr (!Math::kTensorCores) {
    launch_convolve<Math, DoubleTile>(Operands<T, false>(problem, first_image, images), stream);
  } else if (!has_whole_chunks(problem.input, problem.inputs())) {
    launch_convolve<Math, LowTile>(Operands<T, false>(problem, first_image, images), stream);
  } else {
    if constexpr (sizeof(T) == 2) {
      if (problem.transposed) {
        const Operands<T, true, TransposedFilters<T>> a(problem, first_image, images);
        return launch_cheapest<Math, MiddleTeams, LowTeams, FifthTeams>(a, stream);
      }
      if (halves_depth(problem)) {
        const Operands<T, true> a(problem, first_image, images);
        return alone ? launch_convolve<Math, PixelTeams>(a, stream) : launch_convolve<Math, MiddleTeams>(a, stream);
      }
    }
    const Operands<T, true> a(problem, first_image, images);
    if (alone)
      launch_convolve<Math, PixelTile>(a, stream);
    else if constexpr (std::is_same_v<Math, SplitTf32>)  // FifthTile would need too many registers.
      launch_cheapest<Math, SquareTile, LowTile>(a, stream);
    else
      launch_cheapest<Math, SquareTile, LowTile, FifthTile>(a, stream);
  }
}

template <class T>
void launch_convolve_of(const Convolution& problem, void* stream) {
  require_image_size(problem.batch(), problem.height(), problem.width());
  const int64_t at_once = images_at_once(problem.height() * problem.width(), problem.inputs());
  for (int64_t first = 0; first < problem.batch(); first += at_once) {
    const int64_t images = std::min(at_once, problem.batch() - first);
    if constexpr (std::is_same_v<T, double>)
      choose_convolve<MultiplyAdds<double>>(problem, first, images, stream);
    else if constexpr (std::is_same_v<T, float>)
      problem.tf32 ? choose_convolve<TensorCores<float>>(problem, first, images, stream)
                   : choose_convolve<SplitTf32>(problem, first, images, stream);
    else
      choose_convolve<TensorCores<T>>(problem, first, images, stream);
  }
}

// Whether weights can be read in place: not for double or dilated kernels; with channels innermost, strides of whole
// chunks, offsets of 32 bits, and a mask of few taps that is the same for all channels.
bool lies_in_place(const TensorView& weight, const TensorView& mask, int64_t dilation) {
  const int64_t size = size_of(weight.dtype), most = std::numeric_limits<int32_t>::max();
  // Whether a stride is whole chunks, and `count` strides fit 32 bits.
  const auto whole = [&](int64_t stride, int64_t count) {
    return stride % (kChunkBytes / size) == 0 && stride <= most / std::max<int64_t>(count, 1);
  };
  return weight.dtype != DType::f64 && mask.ndim == 2 && mask.shape[0] * mask.shape[1] <= TapMask::kMost &&
         dilation == 1 && weight.strides[1] == 1 && reinterpret_cast<uintptr_t>(weight.data) % kChunkBytes == 0 &&
         whole(weight.strides[0], weight.shape[0]) && whole(weight.strides[2], weight.shape[2]) &&
         whole(weight.strides[3], weight.shape[3]) &&
         std::max(mask.strides[0], mask.strides[1]) <= most / TapMask::kMost;
}

}  // namespace

int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t taps, DType dtype) {
  return outputs * packed_stride(taps * inputs, size_of(dtype)) * size_of(dtype);
}

bool reads_in_place(const TensorView& weight, const TensorView& mask, int64_t dilation) {
  return lies_in_place(weight, mask, dilation) && weight.shape[1] * size_of(weight.dtype) % kSliceBytes == 0;
}

bool reads_transposed(const TensorView& weight, const TensorView& mask, int64_t dilation, const TensorView& grad) {
  const int64_t size = size_of(weight.dtype);
  return size == 2 && lies_in_place(weight, mask, dilation) && weight.shape[1] * size % kChunkBytes == 0 &&
         has_pairs_of_slices(grad, weight.shape[0]);
}

int64_t weight_grad_workspace(const WeightGrad& problem) {
  const GradPlan plan(problem);
  const int64_t sum_bytes = problem.input.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return plan.parts * problem.outputs() * plan.depth * sum_bytes;
}

void pack(const Packing& problem, void* stream) {
  if (problem.taps.empty()) return;
  with_floating(problem.weight.dtype, [&](auto type) {
    using T = decltype(type);
    using Strides = typename PackArguments<T>::Strides;
    const auto strides = [&](const int64_t* s) {
      return problem.transposed ? Strides{s[1], s[0], s[2], s[3]} : Strides{s[0], s[1], s[2], s[3]};
    };
    int64_t mask_strides[4];
    strides_of_mask(problem.mask, mask_strides);
    const int depth = depth_of(problem.taps_count(), problem.inputs());
    const PackArguments<T> a{.weight = problem.weight.as<T>(),
                             .mask = problem.mask.as<bool>(),
                             .packed = problem.packed.as<T>(),
                             .weight_strides = strides(problem.weight.strides),
                             .mask_strides = strides(mask_strides),
                             .outputs = problem.outputs(),
                             .taps = static_cast<int>(problem.taps_count()),
                             .stride = static_cast<int>(packed_stride(depth, sizeof(T))),
                             .kernel_width = kernel_width_of(problem.weight),
                             .by_inputs = FastDivide(static_cast<uint32_t>(problem.inputs())),
                             .indices = indices_of(problem.taps)};
    launch("pack_weights", &pack_weights<T>,
           {divide_up(a.outputs, kPacked) * divide_up(a.stride, kPacked), dim3(kThreads), sizeof(PackedTile<T>)},
           stream, a);
  });
}

void convolve(const Convolution& problem, void* stream) {
  if (problem.output.numel() == 0) return;
  with_floating(problem.input.dtype, [&](auto type) { launch_convolve_of<decltype(type)>(problem, stream); });
}

void activation_grad(const ActivationGrad& problem, void* stream) {
  with_floating(problem.grad.dtype, [&](auto type) { launch_activation_grad<decltype(type)>(problem, stream); });
}

void weight_grad(const WeightGrad& problem, void* stream) {
  const TensorView& result = problem.weight_grad;
  if (problem.grad.numel() == 0)  // activation_grad() has zeroed the bias gradient.
    return fill_with_zeros(result.data, result.numel() * size_of(result.dtype), stream);
  const GradPlan plan(problem);
  with_floating(problem.input.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, double>)
      launch_weight_grad<MultiplyAdds<double>>(problem, plan, stream);
    else if constexpr (std::is_same_v<T, float>)
      problem.tf32 ? launch_weight_grad<TensorCores<float>>(problem, plan, stream)
                   : launch_weight_grad<SplitTf32>(problem, plan, stream);
    else
      launch_weight_grad<TensorCores<T>>(problem, plan, stream);
  });
}

}  // namespace cpc::masked_conv::cuda
