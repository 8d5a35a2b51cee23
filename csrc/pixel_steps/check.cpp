// Checks a network of steps against the contract in pixel_steps.h before a kernel touches memory.
#include <new>
#include <string>

#include "core/require.h"
#include "pixel_steps/pixel_steps.h"

namespace cpc::pixel_steps {
namespace {

// A map of the network's images whose sides are multiplied by scale / 2^level, or of one pixel where scale is 0.
void require_map(const char* name, const TensorView& map, const Network& network, int64_t level, int64_t scale,
                 int64_t channels) {
  require(map.dtype == network.dtype, std::string(name) + " must have the type of the other tensors");
  const int64_t height = scale == 0 ? 1 : (network.height >> level) * scale,
                width = scale == 0 ? 1 : (network.width >> level) * scale;
  require_shape(name, map, {network.batch, kAbove + height, kBeside + width + kBeside, channels});
  require(channels == 1 || map.strides[3] == 1, std::string(name) + " must have dense channels");
}

void require_dense(const char* name, const TensorView& view, const Network& network,
                   std::initializer_list<int64_t> shape) {
  require(view.dtype == network.dtype, std::string(name) + " must have the type of the other tensors");
  require_shape(name, view, shape);
  require(shape.size() == 1 ? is_dense(view, {0}) : is_dense(view, {0, 1}), std::string(name) + " must be dense");
}

void check_step(const Network& network, const Step& step) {
  require(step.level >= 0 && step.level < 32 && network.height % (int64_t{1} << step.level) == 0 &&
              network.width % (int64_t{1} << step.level) == 0,
          "level must be one that the images' sides can be halved to, got " + std::to_string(step.level));
  require(step.weight.ndim == 2 && step.weight.numel() > 0, "weight must be [K, N], got " + shape_of(step.weight));
  int64_t depth = 0;
  for (const Source& source : step.sources) {
    require(source.scale == 1 || source.scale == 2, "a source's scale must be 1 or 2");
    require(source.map.ndim == 4, "a source's map must be [B, H, W, C], got " + shape_of(source.map));
    require_map("a source's map", source.map, network, step.level, source.scale, source.channels());
    for (const Tap& tap : source.taps)
      require(
          tap.dy >= -kAbove && tap.dy <= 0 && tap.dx >= -kBeside && tap.dx <= kBeside,
          "taps must be within the map's border, got (" + std::to_string(tap.dy) + ", " + std::to_string(tap.dx) + ")");
    depth += source.channels() * static_cast<int64_t>(source.taps.size());
  }
  const int64_t outputs = step.outputs();
  require_dense("weight", step.weight, network, {depth, outputs});
  require_dense("bias", step.bias, network, {outputs});
  if (step.image_bias.ndim != 0) require_dense("image_bias", step.image_bias, network, {network.batch, outputs});
  if (step.residual.ndim != 0) {
    require(outputs % 2 == 0, "gated outputs must be even in number, got " + std::to_string(outputs));
    require_map("residual", step.residual, network, step.level, 1, step.features());
  }
  const int64_t scale = step.output_scale;
  require(scale >= 0 && scale <= 2, "output_scale must be 0, 1 or 2, got " + std::to_string(scale));
  const int64_t last = scale == 2 ? 1 : 0;
  require(step.row_offset >= 0 && step.row_offset <= last && step.col_offset >= 0 && step.col_offset <= last,
          "offset must be within the output_scale x output_scale pixels");
  if (step.raw.ndim != 0) require_map("raw", step.raw, network, step.level, scale, step.features());
  if (step.elu.ndim != 0) require_map("elu", step.elu, network, step.level, scale, 2 * step.features());
}

}  // namespace

void AlignedDelete::operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }

AlignedMemory aligned_memory(int64_t bytes) { return AlignedMemory(new (std::align_val_t{64}) char[bytes]); }

void check(const Network& network) {
  require(network.dtype == DType::f32 || network.dtype == DType::f64, "maps must be float32 or float64");
  constexpr int64_t kMost = int64_t{1} << 31;  // The kernel multiplies sides by scales, and adds borders.
  require(network.batch >= 0 && network.height > 0 && network.width > 0, "images must have rows and columns");
  require(network.height <= kMost && network.width <= kMost,
          "images must have at most " + std::to_string(kMost) + " rows and columns, got " +
              std::to_string(network.height) + "x" + std::to_string(network.width));
  for (const Step& step : network.steps) check_step(network, step);
}

void check(const Place& place) {
  const auto within = [](const char* name, int64_t at, int64_t size) {
    require(at >= 0 && at < size,
            std::string(name) + " must be in 0.." + std::to_string(size - 1) + ", got " + std::to_string(at));
  };
  within("row", place.row, place.network.height);
  within("col", place.col, place.network.width);
}

}  // namespace cpc::pixel_steps
