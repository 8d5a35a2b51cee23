// Per-patch augmentation on the GPU: from uint8 images to normalised patches, each transformed in its own way. A team
// of threads takes a patch: a warp if patches are small, else a block. It cuts the patch into shared memory as planes
// of bytes, carries out the transforms there one after another, in which a thread mostly works on four bytes at a time,
// and writes the normalised values in 16-byte stores. Patches too large for shared memory are transformed in a
// workspace instead, which the caches hold in part.
#include <algorithm>
#include <bit>
#include <stdexcept>
#include <type_traits>

#include "augment/augment.h"
#include "augment/transform.h"
#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/workspace.h"
#include "patches/window.h"

namespace cpc::augment::cuda {
namespace {

using namespace cpc::cuda;
using patches::Geometry;
using patches::Window;

// kTeams: teams of a block, if each is a warp. kTeamWarps: warps of a team that is a block. With more than kMaxWarpArea
// pixels, a patch would keep a warp busy for so long that few patches would leave multiprocessors idle.
constexpr int kTeams = 4, kTeamWarps = 8;
constexpr int64_t kMaxWarpArea = 32 * 32;
// Blocks per multiprocessor that transform patches in the workspace.
constexpr int64_t kWorkspaceBlocks = 2;
constexpr int kLevels = 256, kMaxColours = 3;
// Pixels of a plane that a thread works on at a time.
constexpr int kGroup = 4;

// A team's shared memory beside the pixels. levels: the new level for each level, or the number of pixels that have it.
struct Tables {
  union {
    int32_t levels[kLevels];
    int32_t nodes[2][kNodes][kNodes];
    Affine affine;
  };
  int32_t extremes[2][kTeamWarps];
};

struct Arguments {
  Geometry geometry;
  TensorView images, offsets, flip;
  const uint8_t* codes;
  const float* parameters;
  const int64_t* partners;     // Or null.
  const float* displacements;  // Or null.
  void* patches;
  DType patches_dtype;
  uint8_t* workspace;
  int64_t steps;
  int32_t count, stride;
  int32_t channels, out_channels, side, area, plane;  // Planes of bytes begin `plane` apart.
  int32_t values;                                     // Values of a finished patch.
  uint8_t fill;
  double scale[3], shift[3];
  float float_scale[3], float_shift[3];  // The same: converting costs more than multiplying.
  FastDivide by_side, by_groups, by_rows, by_cols;

  template <class Real>
  __device__ Real normalised(Real v, uint32_t k) const {
    if constexpr (std::is_same_v<Real, float>) return float_scale[k] * v + float_shift[k];
    return scale[k] * v + shift[k];
  }
  __device__ bool to_gray() const { return geometry.gray && channels == 3; }
  // Groups of a plane. The last may have fewer pixels, followed by unused bytes.
  CPC_HOST_DEVICE int32_t groups() const { return (area + kGroup - 1) / kGroup; }
};

// The threads that work on a patch together.
template <int kWarps>
struct Team {
  static constexpr int kSize = kWarps * kWarp;

  __device__ static int rank() { return static_cast<int>(threadIdx.x) % kSize; }
  // Makes what each thread has written visible to the team.
  __device__ static void sync() {
    if constexpr (kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  }
  template <class Real>
  __device__ static Real sum(Real v) {
    if constexpr (kWarps == 1)
      return warp_sum(v);
    else
      return block_sum<kSize>(v);
  }
};

// --- Groups of pixels, the first in the lowest byte ---

__device__ inline uint32_t group_at(const uint8_t* plane, int32_t i) {
  check_alignment<kGroup>(plane + i);
  return *reinterpret_cast<const uint32_t*>(plane + i);
}
__device__ inline void put_group(uint8_t* plane, int32_t i, uint32_t group) {
  check_alignment<kGroup>(plane + i);
  *reinterpret_cast<uint32_t*>(plane + i) = group;
}
__device__ inline int32_t pixel_of(uint32_t group, int j) { return static_cast<int32_t>(group >> (8 * j) & 0xff); }
__device__ inline uint32_t placed(int32_t pixel, int j) { return (static_cast<uint32_t>(pixel) & 0xff) << (8 * j); }

// Pixels of an image `step` bytes apart.
__device__ inline uint32_t load_group(const uint8_t* at, int64_t step) {
  if (step == 1 && reinterpret_cast<uintptr_t>(at) % kGroup == 0) return *reinterpret_cast<const uint32_t*>(at);
  uint32_t group = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) group |= placed(at[j * step], j);
  return group;
}

// --- Bytes of a patch ---

// A step of a patch's plan.
struct Step {
  Transform transform;
  float parameters[kParameters];
};

__device__ inline Step step_at(const Arguments& a, int64_t t) {
  const float* const from = a.parameters + t * kParameters;
  const auto transform = static_cast<Transform>(a.codes[t]);
  return {transform < Transform::count ? transform : Transform::none, {from[0], from[1], from[2]}};
}

// The share of a patch that is not mixed with another.
constexpr int32_t kWhole = 1 << kFactorBits;
// The first step of every plan: the patch is cut out of its image.
constexpr auto kCut = static_cast<Transform>(255);

// The pixels and a second buffer for what cannot be done in place. All threads of the team hold the same.
template <int kWarps>
class Patch {
  using Team = cuda::Team<kWarps>;

 public:
  __device__ Patch(const Arguments& a, Tables& tables, uint8_t* memory)
      : a_(a), tables_(tables), pixels_(memory), other_(memory + a.channels * a.plane) {}

  __device__ const uint8_t* pixels() const { return pixels_; }

  // Reads the patch from its image or, if its share is less than kWhole, mixes it into the pixels.
  __device__ void read(int32_t index, int32_t share) {
    each_source(index, [&](uint32_t group, int32_t i, int k) {
      if (share < kWhole) {
        const uint32_t here = group_at(plane(k), i);
        uint32_t mixed = 0;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) mixed |= placed(blend(pixel_of(here, j), pixel_of(group, j), share), j);
        group = mixed;
      }
      put_group(plane(k), i, group);
    });
    Team::sync();
  }

  // Each pixel comes from place m(y, x) where that is inside of an area of the patch, else it is the fill.
  __device__ void take(const Affine& m, const Cutout& area) {
    each_group([&](int32_t i) {
      uint32_t taken[kMaxColours] = {};
      each_place(i, [&](int j, int32_t y, int32_t x) {
        const int32_t from_x = (m.a * x + m.b * y + m.c) >> kPlaceBits;
        const int32_t from_y = (m.d * x + m.e * y + m.f) >> kPlaceBits;
        const bool inside = from_y >= area.top && from_y < area.bottom && from_x >= area.left && from_x < area.right;
        const int32_t from = from_y * a_.side + from_x;
#pragma unroll
        for (int k = 0; k < kMaxColours; ++k)
          if (k < a_.channels) taken[k] |= placed(inside ? plane(k)[from] : a_.fill, j);
      });
#pragma unroll
      for (int k = 0; k < kMaxColours; ++k)
        if (k < a_.channels) put_group(other_ + k * a_.plane, i, taken[k]);
    });
    swap();
  }

  // A crop moves by whole pixels, and takes nothing from beyond its square.
  __device__ void move(const Step& step) {
    const bool crops = step.transform == Transform::crop;
    if (!crops && Team::rank() == 0) tables_.affine = affine_of(step.transform, step.parameters[0], a_.side);
    Team::sync();
    Affine m;
    Cutout area{0, 0, a_.side, a_.side};
    if (crops) {
      constexpr int32_t kOne = 1 << kPlaceBits;
      const Crop crop = crop_of(step.parameters, a_.side);
      m = {kOne, 0, (crop.left - crop.at) * kOne, 0, kOne, (crop.top - crop.at) * kOne};
      area = {crop.top, crop.left, crop.top + crop.side, crop.left + crop.side};
    } else {
      m = tables_.affine;
    }
    take(m, area);
  }

  __device__ void cut_out(const Cutout& cut) {
    each_group([&](int32_t i) {
      uint32_t kept = 0;
      each_place(i, [&](int j, int32_t y, int32_t x) {
        const bool inside = y >= cut.top && y < cut.bottom && x >= cut.left && x < cut.right;
        kept |= placed(inside ? 0 : 0xff, j);
      });
      const uint32_t fill = a_.fill * 0x01010101u & ~kept;
      if (~kept == 0) return;
      for (int k = 0; k < a_.channels; ++k) put_group(plane(k), i, (group_at(plane(k), i) & kept) | fill);
    });
    Team::sync();
  }

  __device__ void deform(const float* displacements) {
    if (Team::rank() < 2 * kNodes * kNodes)
      (&tables_.nodes[0][0][0])[Team::rank()] = displacement_of(displacements[Team::rank()]);
    Team::sync();
    each_pixel([&](int32_t i, int32_t y, int32_t x) {
      const Between down = between_nodes(y, a_.side), right = between_nodes(x, a_.side);
      const auto displacement = [&](int axis) {
        const auto& nodes = tables_.nodes[axis];
        const auto in_row = [&](int32_t column) {
          return mix(nodes[down.node][column], nodes[down.node + 1][column], down.weight);
        };
        return mix(in_row(right.node), in_row(right.node + 1), right.weight);
      };
      const Sample sample_y = sample_at(y, displacement(0), a_.side), sample_x = sample_at(x, displacement(1), a_.side);
      for (int k = 0; k < a_.channels; ++k) {
        const uint8_t* const upper = plane(k) + sample_y.low * a_.side;
        const uint8_t* const lower = plane(k) + sample_y.high * a_.side;
        other_[k * a_.plane + i] =
            static_cast<uint8_t>(mix_pixels(upper[sample_x.low], upper[sample_x.high], lower[sample_x.low],
                                            lower[sample_x.high], sample_x.weight, sample_y.weight));
      }
    });
    swap();
  }

  __device__ void sharpness(int32_t factor) {
    const int32_t side = a_.side;
    each_pixel([&](int32_t i, int32_t y, int32_t x) {
      const bool inside = x > 0 && x < side - 1 && y > 0 && y < side - 1;
      for (int k = 0; k < a_.channels; ++k) {
        const uint8_t* const at = plane(k) + i;
        int32_t v = *at;
        if (inside) {
          int32_t sum = 0;
          for (int row = -1; row <= 1; ++row)
            for (int column = -1; column <= 1; ++column) sum += at[row * side + column];
          v = blend(smooth(sum, v), v, factor);
        }
        other_[k * a_.plane + i] = static_cast<uint8_t>(v);
      }
    });
    swap();
  }

  // Maps the level of each pixel by a table, which is the same for all channels except for transforms that treat each
  // by itself.
  __device__ void change_levels(const Step& step) {
    const Transform transform = step.transform;
    const bool by_channel =
        transform == Transform::equalize || transform == Transform::autocontrast || transform == Transform::tone_curve;
    int32_t mean = 0;
    if (transform == Transform::contrast) mean = mean_luma();
#pragma unroll 1
    for (int k = 0; k < a_.channels; ++k) {
      if (transform == Transform::equalize) {
        count_levels(k);
        if (Team::rank() < kWarp) even_levels();
        Team::sync();
      } else if (k == 0 || by_channel) {
        make_levels(step, k, mean);
        Team::sync();
      }
      each_group([&](int32_t i) {
        const uint32_t group = group_at(plane(k), i);
        uint32_t changed = 0;
#pragma unroll
        for (int j = 0; j < kGroup; ++j) changed |= placed(tables_.levels[pixel_of(group, j)], j);
        put_group(plane(k), i, changed);
      });
      Team::sync();
    }
  }

  // Blends each pixel with its luma; a factor of 0 leaves only that.
  __device__ void color(int32_t factor) {
    each_colour([&](int32_t& red, int32_t& green, int32_t& blue) {
      const int32_t gray = luma(red, green, blue);
      red = blend(gray, red, factor);
      green = blend(gray, green, factor);
      blue = blend(gray, blue, factor);
    });
  }

  __device__ void hue(int32_t shift) {
    each_colour([&](int32_t& red, int32_t& green, int32_t& blue) {
      Color color = color_of(red, green, blue);
      if (color.unsure) color.hue = hue_as_pillow(red, green, blue);
      const int32_t turned = (color.hue + shift) & 255;
      red = channel_of(0, turned, color.saturation, color.value);
      green = channel_of(1, turned, color.saturation, color.value);
      blue = channel_of(2, turned, color.saturation, color.value);
    });
  }

 private:
  __device__ uint8_t* plane(int k) const { return pixels_ + k * a_.plane; }

  __device__ void swap() {
    uint8_t* const taken = other_;
    other_ = pixels_;
    pixels_ = taken;
    Team::sync();
  }

  // Calls visit(i) with the first place of each of this thread's groups.
  template <class Visit>
  __device__ void each_group(const Visit& visit) const {
#pragma unroll 1
    for (int32_t group = Team::rank(); group < a_.groups(); group += Team::kSize) visit(group * kGroup);
  }

  // Calls visit(j, y, x) for the four places of a group.
  template <class Visit>
  __device__ void each_place(int32_t i, const Visit& visit) const {
    uint32_t column;
    auto y = static_cast<int32_t>(a_.by_side(i, column)), x = static_cast<int32_t>(column);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      visit(j, y, x);
      const bool ends = ++x == a_.side;
      x = ends ? 0 : x;
      y += ends ? 1 : 0;
    }
  }

  // Calls visit(i, y, x) for this thread's share of the places of a patch, one by one.
  template <class Visit>
  __device__ void each_pixel(const Visit& visit) const {
#pragma unroll 1
    for (int32_t i = Team::rank(); i < a_.area; i += Team::kSize) {
      uint32_t x;
      const uint32_t y = a_.by_side(i, x);
      visit(i, static_cast<int32_t>(y), static_cast<int32_t>(x));
    }
  }

  // Calls use(group, i, k) with this thread's groups of channel k of a patch of the batch, as it is in the image.
  template <class Use>
  __device__ void each_source(int32_t index, const Use& use) const {
    const TensorView& images = a_.images;
    uint32_t r, c;
    const uint32_t b = a_.by_rows(a_.by_cols(index, c), r);
    const Window window = patches::window_of(a_.geometry, images, a_.offsets, a_.flip, b);
    const int64_t left = static_cast<int32_t>(c) * a_.stride, top = static_cast<int32_t>(r) * a_.stride;
    const int64_t column = window.flip ? a_.geometry.width - 1 - left : left;
    const int64_t row_step = images.strides[2], step = window.flip ? -images.strides[3] : images.strides[3];
    const uint8_t* const first = images.as<uint8_t>() + b * images.strides[0] + (window.y + top) * row_step +
                                 (window.x + column) * images.strides[3];
    each_group([&](int32_t i) {
      uint32_t x;
      const uint32_t y = a_.by_side(i, x);
      const uint8_t* const at = first + y * row_step + x * step;
      const bool together = static_cast<int32_t>(x) + kGroup <= a_.side;
#pragma unroll 1
      for (int k = 0; k < a_.channels; ++k) {
        const uint8_t* const of_channel = at + k * images.strides[1];
        if (together) {
          use(load_group(of_channel, step), i, k);
          continue;
        }
        uint32_t group = 0;  // The rest of this row and the beginning of the next ones.
        each_place(i, [&](int j, int32_t there_y, int32_t there_x) {
          const bool exists = there_y < a_.side;
          const int64_t distance =
              (there_y - static_cast<int32_t>(y)) * row_step + (there_x - static_cast<int32_t>(x)) * step;
          if (exists) group |= placed(of_channel[distance], j);
        });
        use(group, i, k);
      }
    });
  }

  // Fills the table of new levels for channel k.
  __device__ void make_levels(const Step& step, int k, int32_t mean) const {
    const float parameter = step.parameters[0];
    switch (step.transform) {
      case Transform::invert: return each_level([](int32_t v) { return 255 - v; });
      case Transform::solarize: {
        const int32_t threshold = solarize_threshold(parameter);
        return each_level([=](int32_t v) { return v < threshold ? v : 255 - v; });
      }
      case Transform::posterize: {
        const int32_t mask = posterize_mask(parameter);
        return each_level([=](int32_t v) { return v & mask; });
      }
      case Transform::contrast:
      case Transform::brightness: {
        const int32_t factor = factor_of(parameter), base = step.transform == Transform::contrast ? mean : 0;
        return each_level([=](int32_t v) { return blend(base, v, factor); });
      }
      case Transform::tone_curve: {
        const int32_t curve = bend_of(k == 0 ? parameter : k == 1 ? step.parameters[1] : step.parameters[2]);
        return each_level([=](int32_t v) { return bend(v, curve); });
      }
      default: {  // Autocontrast.
        int32_t low, high;
        find_extremes(k, low, high);
        const float inverse = 1.0f / static_cast<float>(high - low);
        return each_level([=](int32_t v) { return high > low ? stretch(v, low, inverse) : v; });
      }
    }
  }

  template <class Become>
  __device__ void each_level(const Become& become) const {
#pragma unroll 1
    for (int32_t first = Team::rank() * kGroup; first < kLevels; first += Team::kSize * kGroup)
      pack_at<kGroup>(tables_.levels + first) =
          Pack<int32_t, kGroup>{become(first), become(first + 1), become(first + 2), become(first + 3)};
  }

  __device__ int32_t mean_luma() const {
    int32_t sum = 0;
    each_group([&](int32_t i) {
      const uint32_t red = group_at(plane(0), i), green = group_at(plane(a_.channels / 2), i);
      const uint32_t blue = group_at(plane(a_.channels - 1), i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (i + j < a_.area) sum += luma(pixel_of(red, j), pixel_of(green, j), pixel_of(blue, j));
    });
    return mean_level(Team::sum(sum), a_.area);
  }

  // Counts the pixels of a channel at each level.
  __device__ void count_levels(int k) const {
    for (int i = Team::rank(); i < kLevels; i += Team::kSize) tables_.levels[i] = 0;
    Team::sync();
    each_group([&](int32_t i) {
      const uint32_t group = group_at(plane(k), i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (i + j < a_.area) atomicAdd(&tables_.levels[pixel_of(group, j)], 1);
    });
    Team::sync();
  }

  // A channel's least and greatest level.
  __device__ void find_extremes(int k, int32_t& low, int32_t& high) const {
    low = 255;
    high = 0;
    each_group([&](int32_t i) {
      const uint32_t group = group_at(plane(k), i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (i + j >= a_.area) continue;
        const int32_t v = pixel_of(group, j);
        low = v < low ? v : low;
        high = v > high ? v : high;
      }
    });
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const int32_t other_low = __shfl_xor_sync(0xffffffffu, low, mask);
      const int32_t other_high = __shfl_xor_sync(0xffffffffu, high, mask);
      low = other_low < low ? other_low : low;
      high = other_high > high ? other_high : high;
    }
    if constexpr (kWarps > 1) {
      __syncthreads();  // The last extremes have been read.
      if (threadIdx.x % kWarp == 0) {
        tables_.extremes[0][threadIdx.x / kWarp] = low;
        tables_.extremes[1][threadIdx.x / kWarp] = high;
      }
      __syncthreads();
      for (int w = 0; w < kWarps; ++w) {
        low = tables_.extremes[0][w] < low ? tables_.extremes[0][w] : low;
        high = tables_.extremes[1][w] > high ? tables_.extremes[1][w] : high;
      }
    }
  }

  // One warp turns the histogram into the table that equalises it; each lane has kShare levels.
  __device__ void even_levels() const {
    constexpr int kShare = kLevels / kWarp;
    const int lane = threadIdx.x % kWarp;
    int32_t* const mine = tables_.levels + lane * kShare;
    int32_t levels[kShare];
#pragma unroll
    for (int j = 0; j < kShare; j += 4) {
      const auto four = pack_at<4>(mine + j);
#pragma unroll
      for (int s = 0; s < 4; ++s) levels[j + s] = four.v[s];
    }
    int32_t total = 0, last = 0;  // Pixels of this lane's levels, and of the largest level that has any.
#pragma unroll
    for (int j = 0; j < kShare; ++j) {
      total += levels[j];
      last = levels[j] > 0 ? levels[j] : last;
    }
    int32_t before = total;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int32_t lower = __shfl_up_sync(0xffffffffu, before, distance);
      before += lane >= distance ? lower : 0;
    }
    before -= total;
    const unsigned present = __ballot_sync(0xffffffffu, total > 0);
    last = __shfl_sync(0xffffffffu, last, kWarp - 1 - __clz(static_cast<int>(present)));
    const int32_t step = (a_.area - last) / 255;
#pragma unroll
    for (int j = 0; j < kShare; ++j) {
      const int32_t here = levels[j];
      levels[j] = step > 0 ? even_level(before, step) : lane * kShare + j;
      before += here;
    }
#pragma unroll
    for (int j = 0; j < kShare; j += 4)
      pack_at<4>(mine + j) = Pack<int32_t, 4>{levels[j], levels[j + 1], levels[j + 2], levels[j + 3]};
  }

  // Calls change(red, green, blue) with the three pixels at a place; nothing for one channel.
  template <class Change>
  __device__ void each_colour(const Change& change) {
    if (a_.channels != 3) return;
    each_group([&](int32_t i) {
      const uint32_t from[kMaxColours] = {group_at(plane(0), i), group_at(plane(1), i), group_at(plane(2), i)};
      uint32_t red_group = 0, green_group = 0, blue_group = 0;
#pragma unroll 1
      for (int j = 0; j < kGroup; ++j) {
        int32_t red = pixel_of(from[0], j), green = pixel_of(from[1], j), blue = pixel_of(from[2], j);
        change(red, green, blue);
        red_group |= placed(red, j);
        green_group |= placed(green, j);
        blue_group |= placed(blue, j);
      }
      put_group(plane(0), i, red_group);
      put_group(plane(1), i, green_group);
      put_group(plane(2), i, blue_group);
    });
    Team::sync();
  }

  const Arguments& a_;
  Tables& tables_;
  uint8_t *pixels_, *other_;
};

// All threads of the team take the same branch.
template <int kWarps>
__device__ void apply(Patch<kWarps>& patch, const Arguments& a, int32_t index, const Step& step) {
  const bool pairs = step.transform == Transform::sample_pairing;
  if (pairs || step.transform == kCut) {
    if (pairs && a.partners == nullptr) return;
    const int64_t from = pairs ? patches::clamp(a.partners[index], a.count - 1) : index;
    return patch.read(static_cast<int32_t>(from), pairs ? factor_of(step.parameters[0], 1) : kWhole);
  }
  switch (step.transform) {
    case Transform::shear_x:
    case Transform::shear_y:
    case Transform::translate_x:
    case Transform::translate_y:
    case Transform::rotate:
    case Transform::crop: return patch.move(step);
    case Transform::autocontrast:
    case Transform::invert:
    case Transform::equalize:
    case Transform::solarize:
    case Transform::posterize:
    case Transform::contrast:
    case Transform::brightness:
    case Transform::tone_curve: return patch.change_levels(step);
    case Transform::color:
    case Transform::gray: return patch.color(step.transform == Transform::gray ? 0 : factor_of(step.parameters[0]));
    case Transform::hue: return patch.hue(hue_shift(step.parameters[0]));
    case Transform::sharpness: return patch.sharpness(factor_of(step.parameters[0]));
    case Transform::cutout: return patch.cut_out(cutout_of(step.parameters, a.side));
    case Transform::elastic:
      if (a.displacements != nullptr) patch.deform(a.displacements + int64_t{index} * 2 * kNodes * kNodes);
      return;
    default: return;
  }
}

// --- Bytes to values ---

// Pixels of output channel k, as extraction computes them.
template <class Real>
__device__ void values_of(const Arguments& a, const uint8_t* pixels, int32_t i, int k, Real (&v)[kGroup]) {
  const bool gray = a.to_gray();
  Real sum[kGroup] = {};
#pragma unroll 1
  for (int c = 0; c < (gray ? kMaxColours : 1); ++c) {
    const Real share = gray ? Real(patches::luma(c)) : Real(1);
    const uint32_t group = group_at(pixels + (gray ? c : k) * a.plane, i);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum[j] += share * static_cast<Real>(pixel_of(group, j));
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) v[j] = a.normalised(sum[j], k);
}

// The mean, and the inverse of the contrast, that patch_norm normalises with.
template <class Real>
struct Moments {
  Real mean, inverse;
};

template <class Team, class Real>
__device__ Moments<Real> moments_of(const Arguments& a, const uint8_t* pixels) {
  if (!a.geometry.patch_norm) return {0, 1};
  const auto visit = [&](const auto& use) {
#pragma unroll 1
    for (int k = 0; k < a.out_channels; ++k)
#pragma unroll 1
      for (int32_t group = Team::rank(); group < a.groups(); group += Team::kSize) {
        Real v[kGroup];
        values_of(a, pixels, group * kGroup, k, v);
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          if (group * kGroup + j < a.area) use(v[j]);
      }
  };
  const auto values = static_cast<Real>(a.values);
  Real total = 0, squares = 0;
  visit([&](Real v) { total += v; });
  const Real mean = Team::sum(total) / values;
  visit([&](Real v) { squares += (v - mean) * (v - mean); });
  return {mean, 1 / (sqrt(Team::sum(squares) / values) + static_cast<Real>(patches::kContrastFloor))};
}

// Stores neighbouring values from `to` on, of which `count` exist.
template <class Real>
__device__ void store_group(const Arguments& a, int64_t to, const Real (&v)[kGroup], int count) {
  switch (a.patches_dtype) {
    case DType::f16: return store_run(static_cast<Half*>(a.patches) + to, v, count);
    case DType::bf16: return store_run(static_cast<BFloat16*>(a.patches) + to, v, count);
    case DType::f32: return store_run(static_cast<float*>(a.patches) + to, v, count);
    default:
      if constexpr (std::is_same_v<Real, double>) store_run(static_cast<double*>(a.patches) + to, v, count);
  }
}

template <class Team, class Real>
__device__ void finish(const Arguments& a, const uint8_t* pixels, int32_t index) {
  const Moments<Real> m = moments_of<Team, Real>(a, pixels);
  const int64_t out = int64_t{index} * a.values;
  const bool whole = a.area % kGroup == 0;
  if (!a.geometry.channels_last || a.out_channels == 1) {
    const int32_t groups = a.out_channels * a.groups();
#pragma unroll 1
    for (int32_t group = Team::rank(); group < groups; group += Team::kSize) {
      uint32_t within;
      const auto k = static_cast<int32_t>(a.by_groups(group, within)), i = static_cast<int32_t>(within) * kGroup;
      Real v[kGroup];
      values_of(a, pixels, i, k, v);
      if (a.geometry.patch_norm) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) v[j] = (v[j] - m.mean) * m.inverse;
      }
      store_group(a, out + k * a.area + i, v, whole ? kGroup : a.area - i);
    }
    return;
  }
#pragma unroll 1
  for (int32_t group = Team::rank(); group < a.groups(); group += Team::kSize) {
    const int32_t i = group * kGroup, count = kMaxColours * (a.area - i);
    Real v[kMaxColours][kGroup];
#pragma unroll
    for (int k = 0; k < kMaxColours; ++k) values_of(a, pixels, i, k, v[k]);
#pragma unroll
    for (int part = 0; part < kMaxColours; ++part) {
      Real four[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int e = part * kGroup + j;
        four[j] = (v[e % kMaxColours][e / kMaxColours] - m.mean) * m.inverse;
      }
      store_group(a, out + i * kMaxColours + part * kGroup, four, whole ? kGroup : count - part * kGroup);
    }
  }
}

// --- Kernels ---

// kShared: whether patches are transformed in shared memory. It decides what instructions access them.
template <int kWarps, bool kShared>
__global__ void __launch_bounds__(kWarps == 1 ? kTeams * kWarp : kWarps * kWarp)
    augment_patches(const __grid_constant__ Arguments a) {
  using Team = cuda::Team<kWarps>;
  constexpr int kTeamsOfBlock = kWarps == 1 ? kTeams : 1;
  const int team = static_cast<int>(threadIdx.x) / Team::kSize;
  Tables& tables = reinterpret_cast<Tables*>(dynamic_shared())[team];
  const int32_t bytes = 2 * a.channels * a.plane;
  uint8_t* const memory = kShared ? dynamic_shared() + kTeamsOfBlock * sizeof(Tables) + team * bytes
                                  : a.workspace + int64_t{blockIdx.x} * bytes;
  for (int64_t at = int64_t{blockIdx.x} * kTeamsOfBlock + team; at < a.count;
       at += int64_t{gridDim.x} * kTeamsOfBlock) {
    const auto index = static_cast<int32_t>(at);
    Patch<kWarps> patch(a, tables, memory);
    const int64_t first = at * a.steps, end = first + a.steps;
    Step next{kCut, {}};
#pragma unroll 1
    for (int64_t t = first; t <= end; ++t) {
      const Step step = next;
      if (t < end) next = step_at(a, t);  // Loaded while this one is carried out.
      apply(patch, a, index, step);
    }
    if (a.patches_dtype == DType::f64)
      finish<Team, double>(a, patch.pixels(), index);
    else
      finish<Team, float>(a, patch.pixels(), index);
    Team::sync();  // The next patch overwrites the memory.
  }
}

// Bytes from one plane to the next, and of the two buffers of a patch.
int64_t plane_bytes(int64_t side) { return divide_up(side * side, 16) * 16; }
int64_t patch_bytes(const patches::Problem& extraction) {
  return 2 * extraction.images.shape[1] * plane_bytes(extraction.geometry.patch);
}

bool fits_shared(const patches::Problem& extraction) {
  return static_cast<int64_t>(sizeof(Tables)) + patch_bytes(extraction) <=
         dynamic_shared_limit(&augment_patches<kTeamWarps, true>);
}

int64_t workspace_blocks(int64_t count) { return std::min(count, kWorkspaceBlocks * multiprocessors()); }

int64_t count_of(const patches::Problem& extraction) {
  return extraction.batch() * extraction.rows() * extraction.cols();
}

}  // namespace

int64_t workspace_bytes(const patches::Problem& extraction) {
  return fits_shared(extraction) ? 0 : workspace_blocks(count_of(extraction)) * patch_bytes(extraction);
}

void augment(const Problem& problem, void* stream) {
  const patches::Problem& extraction = problem.extraction;
  if (extraction.patches.numel() == 0) return;
  Arguments a;
  a.geometry = extraction.geometry;
  a.images = extraction.images;
  a.offsets = extraction.offsets;
  a.flip = extraction.flip;
  a.codes = problem.codes.as<uint8_t>();
  a.parameters = problem.parameters.as<float>();
  a.partners = problem.partners.ndim != 0 ? problem.partners.as<int64_t>() : nullptr;
  a.displacements = problem.displacements.ndim != 0 ? problem.displacements.as<float>() : nullptr;
  a.patches = extraction.patches.data;
  a.patches_dtype = extraction.patches.dtype;
  if (problem.count() > INT32_MAX)
    throw std::invalid_argument("the CUDA kernel takes at most 2^31 - 1 patches, got " +
                                std::to_string(problem.count()));
  a.count = static_cast<int32_t>(problem.count());
  a.stride = static_cast<int32_t>(extraction.geometry.stride);
  a.steps = problem.steps();
  a.channels = static_cast<int32_t>(extraction.images.shape[1]);
  a.out_channels = static_cast<int32_t>(extraction.channels());
  a.side = static_cast<int32_t>(extraction.geometry.patch);
  a.area = a.side * a.side;
  a.plane = static_cast<int32_t>(plane_bytes(a.side));
  a.values = a.out_channels * a.area;
  a.fill = static_cast<uint8_t>(problem.fill);
  std::copy(extraction.scale.begin(), extraction.scale.end(), a.scale);
  std::copy(extraction.shift.begin(), extraction.shift.end(), a.shift);
  for (int32_t k = 0; k < a.out_channels; ++k) {
    a.float_scale[k] = static_cast<float>(a.scale[k]);
    a.float_shift[k] = static_cast<float>(a.shift[k]);
  }
  a.by_side = FastDivide(a.side);
  a.by_groups = FastDivide(a.groups());
  a.by_rows = FastDivide(static_cast<uint32_t>(extraction.rows()));
  a.by_cols = FastDivide(static_cast<uint32_t>(extraction.cols()));
  const int64_t tables = sizeof(Tables), bytes = patch_bytes(extraction);
  if (!fits_shared(extraction)) {
    a.workspace = problem.workspace.as<uint8_t>();
    return launch("augment_patches", &augment_patches<kTeamWarps, false>,
                  {workspace_blocks(a.count), kTeamWarps * kWarp, tables}, stream, a);
  }
  a.workspace = nullptr;
  const auto small = &augment_patches<1, true>;
  if (a.area <= kMaxWarpArea && kTeams * (tables + bytes) <= dynamic_shared_limit(small))
    return launch("augment_patches", small, {divide_up(a.count, kTeams), kTeams * kWarp, kTeams * (tables + bytes)},
                  stream, a);
  launch("augment_patches", &augment_patches<kTeamWarps, true>, {a.count, kTeamWarps * kWarp, tables + bytes}, stream,
         a);
}

}  // namespace cpc::augment::cuda
