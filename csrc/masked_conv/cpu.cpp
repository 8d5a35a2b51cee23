// Masked convolution on the CPU: from channels-last input to output through one matrix product over the visible taps,
// in pairs of pixels over fewer terms (terms.h). A tile of the product broadcasts straight from the input's pixels,
// wherever their taps lie, unless they must be converted or are differences of two; padding is a row of zeros. Pixels
// are taken position by position over the batch, so that at an image's edge whole tiles read only padding and skip the
// term.
#include <algorithm>
#include <vector>

#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/require.h"
#include "core/simd_math.h"
#include "masked_conv/masked_conv.h"
#include "masked_conv/panels.h"
#include "masked_conv/terms.h"
#include "masked_conv/weight_grad.h"

namespace cpc::masked_conv::cpu::CPC_ISA {
namespace {

// Rows of the product that a task takes through all of its panels: their pixels and sums stay in the second-level
// cache.
constexpr int64_t kBlockRows = 16 * kTileRows;
// Depth that a tile goes through at a time: the panel's part of it stays in the cache while all tiles of a block use
// it.
constexpr int64_t kDepthBlock = 320;
// Pixels of a block that had to be gathered.
constexpr int64_t kGatheredBytes = int64_t{512} << 10;
// Channels that are transposed at a time: their part of a panel stays in the first-level cache.
constexpr int64_t kTransposed = 64;
// Nanoseconds that a weight takes to be packed for a term, and a value of an activation's gradient.
constexpr double kPackNanoseconds = 0.7, kGradNanoseconds = 0.3, kGatedGradNanoseconds = 2;

// Calls use(read) with the function read(at) that gives a term's weight: of one tap, or of two or three, added up.
template <class E, class Storage, class Use>
void with_weight(const Term& term, const Packing& problem, const Use& use) {
  const TensorView& weight = problem.weight;
  const Storage* taps[3] = {};
  for (size_t part = 0; part < term.weight.size(); ++part) {
    const int64_t index = term.weight[part].index, kw = weight.shape[3];
    taps[part] = weight.as<Storage>() + index / kw * weight.strides[2] + index % kw * weight.strides[3];
  }
  if constexpr (std::is_same_v<Storage, float>) {
    const auto sum_of = [&](auto parts) {
      float factors[parts];
      for (int part = 0; part < parts; ++part) factors[part] = term.weight[part].factor;
      use([&](int64_t at) {
        float v = 0;
        for (int part = 0; part < parts; ++part) v += factors[part] * taps[part][at];
        return v;
      });
    };
    if (term.weight.size() == 2) return sum_of(std::integral_constant<int, 2>{});
    if (term.weight.size() == 3) return sum_of(std::integral_constant<int, 3>{});
  }
  use([tap = taps[0]](int64_t at) { return to_element<E>(tap[at]); });
}

template <class Storage>
void pack_as(const Packing& problem) {
  using E = Element<Storage>;
  constexpr int64_t kLanes = kLaneColumns<E>;
  const TensorView &weight = problem.weight, &mask = problem.mask;
  const Panels<E> panels(problem.outputs(), problem.gated);
  const std::vector<Term> terms = terms_of(problem.taps, problem.pairs);
  const int64_t inputs = problem.inputs(), depth = padded_depth<E>(inputs), terms_count = std::ssize(terms);
  const int64_t out_dim = problem.transposed ? 1 : 0;
  const int64_t out_step = weight.strides[out_dim], in_step = weight.strides[1 - out_dim];
  const double nanoseconds = kPackNanoseconds * static_cast<double>(problem.outputs() * inputs) * terms_count;
  const auto pack_panel = [&](int64_t task, int) {
    const int64_t p = task / terms_count, t = task % terms_count;
    const Panel panel = panels[p];
    const int64_t columns = panel.vectors * kLanes;
    E* const out = problem.packed.as<E>() + panels.offset(p, terms_count * depth) + t * depth * columns;
    E block[kTransposed][kLanes];
    for (int64_t first = 0; first < depth; first += kTransposed)
      for (int64_t begin = 0; begin < columns; begin += kLanes) {
        const int64_t rows = std::min(kTransposed, depth - first), given = std::min(rows, inputs - first);
        const int64_t n = panels.channel(panel, begin);
        int64_t channels = kLanes;
        while (panels.channel(panel, begin + channels - 1) < 0) --channels;
        if (given < rows || channels < kLanes) std::fill_n(block[0], kTransposed * kLanes, E{});
        with_weight<E, Storage>(terms[t], problem, [&](const auto& read) {
          const int64_t at = n * out_step + first * in_step;
          // In the order in which they lie in memory.
          if (in_step <= out_step)
            for (int64_t c = 0; c < channels; ++c)
              for (int64_t k = 0; k < given; ++k) block[k][c] = read(at + c * out_step + k * in_step);
          else
            for (int64_t k = 0; k < given; ++k)
              for (int64_t c = 0; c < channels; ++c) block[k][c] = read(at + c * out_step + k * in_step);
        });
        if (mask.ndim == 4) {  // Else it is the same for all channels.
          const int64_t index = terms[t].weight[0].index, kw = weight.shape[3];
          const bool* const visible = mask.as<bool>() + index / kw * mask.strides[2] + index % kw * mask.strides[3] +
                                      n * mask.strides[out_dim] + first * mask.strides[1 - out_dim];
          for (int64_t k = 0; k < given; ++k)
            for (int64_t c = 0; c < channels; ++c)
              if (!visible[c * mask.strides[out_dim] + k * mask.strides[1 - out_dim]]) block[k][c] = E{};
        }
        E* const to = out + first * columns + begin * kDepthStep<E>;
        for (int64_t k = 0; k < rows; ++k)
          for (int64_t c = 0; c < kLanes; ++c)
            to[k / kDepthStep<E> * kDepthStep<E> * columns + c * kDepthStep<E> + k % kDepthStep<E>] = block[k][c];
      }
  };
  parallel_for(panels.count() * terms_count, pack_panel, workers_for(nanoseconds));
}

// --- Forward ---

// A part of the product's depth: channels [first, first + depth) of a term.
struct Run {
  int64_t term, first, depth;
};

// Runs whose sum stays in registers from the first to the last. Groups of one sum follow one another.
struct Group {
  int sum;
  bool begins;  // It is the sum's first.
  std::vector<Run> runs;
};

template <class E>
std::vector<Group> groups_of(const std::vector<Term>& terms, int sums, int64_t inputs) {
  std::vector<Group> groups;
  for (int sum = 0; sum < sums; ++sum) {
    groups.push_back({sum, true, {}});
    int64_t in_group = 0;
    for (int64_t t = 0; t < std::ssize(terms); ++t)
      for (int64_t k = 0; terms[t].sum == sum && k < inputs; k += kDepthBlock) {
        const int64_t depth = padded_depth<E>(std::min(kDepthBlock, inputs - k));
        if (in_group > 0 && in_group + depth > kDepthBlock) {
          groups.push_back({sum, false, {}});
          in_group = 0;
        }
        in_group += depth;
        groups.back().runs.push_back({t, k, depth});
      }
  }
  return groups;
}

// The rows of the product: pixel by pixel over the batch, all pixels or a single one; of pairs, the left pixel.
class Rows {
 public:
  explicit Rows(const Convolution& problem)
      : problem_(problem), step_(problem.pairs ? 2 : 1), across_(divide_up(problem.width(), step_)) {
    if (problem.position.ndim != 0) {
      y_ = problem.position.as<int64_t>()[0];
      x_ = problem.position.as<int64_t>()[1];
      count_ = problem.batch();
    } else {
      count_ = problem.batch() * problem.height() * across_;
    }
  }
  struct Pixel {
    int64_t b, y, x;
    int64_t in(const TensorView& view) const { return b * view.strides[0] + y * view.strides[2] + x * view.strides[3]; }
  };
  int64_t count() const { return count_; }
  int64_t step() const { return step_; }
  Pixel operator[](int64_t m) const {
    const int64_t at = m / problem_.batch();
    return {m % problem_.batch(), y_ + at / across_, x_ + at % across_ * step_};
  }

 private:
  const Convolution& problem_;
  int64_t step_, across_;
  int64_t y_ = 0, x_ = 0, count_ = 0;
};

template <class Storage>
class Convolver {
  using E = Element<Storage>;
  using S = Sum<E>;
  using R = Register<S>;
  // Whether the input's values can be multiplied where they lie.
  static constexpr bool kInPlace = std::is_same_v<E, Storage>;

 public:
  explicit Convolver(const Convolution& problem)
      : problem_(problem),
        terms_(terms_of(problem.taps, problem.pairs)),
        depth_(padded_depth<E>(problem.inputs())),
        panels_(problem.outputs, problem.activation == Activation::gated),
        sums_(problem.pairs ? kPairSums : 1),
        groups_(groups_of<E>(terms_, sums_, problem.inputs())),
        rows_(problem),
        converts_(!kInPlace || depth_ != problem.inputs()) {
    block_rows_ = kBlockRows;
    if (gathers())  // Its pixels are to stay in the cache too.
      block_rows_ = std::clamp<int64_t>(
          kGatheredBytes / std::max<int64_t>(terms() * depth_ * sizeof(E), 1) / kTileRows * kTileRows, kTileRows,
          kBlockRows);
  }

  void run() const {
    for (const TensorView* result : {&problem_.output, &problem_.preactivation})
      if (result->ndim != 0 && problem_.position.ndim == 0 && is_dense(*result, {0, 2, 3, 1}))
        advise_huge_pages(result->data, result->numel() * static_cast<int64_t>(sizeof(Storage)));
    const int64_t blocks = divide_up(rows_.count(), block_rows_), panels = panels_.count();
    const double flops =
        2. * static_cast<double>(rows_.count() * depth_) * static_cast<double>(terms() * problem_.outputs);
    const int threads = workers_for(flops / kFlopsPerNanosecond);
    // Few blocks are shared out by panels as well, so that all workers end at about the same time; not too often where
    // each must gather the block again.
    const int64_t groups = std::clamp<int64_t>(divide_up((gathers() ? 16 : 32) * threads, blocks), 1, panels);
    const std::vector<E> zeros(depth_);
    const Scratch scratch(bytes());
    const auto body = [&](int64_t task, int worker) {
      const int64_t block = task / groups, group = task % groups;
      Parts parts(scratch.of<char>(worker));
      Buffers buffers(parts, *this);
      const int64_t first = block * block_rows_, count = std::min(block_rows_, rows_.count() - first);
      locate(buffers, zeros.data(), first, count);
      for (int64_t p = group * panels / groups; p < (group + 1) * panels / groups; ++p) {
        read_bias(buffers, p);
        multiply(buffers, p, count);
        if (problem_.pairs) separate(buffers, p, count);
        finish(buffers, p, first, count);
      }
    };
    parallel_tasks(blocks * groups, body, threads);  // At the images' edges there is less to do.
  }

 private:
  int64_t terms() const { return std::ssize(terms_); }
  bool gathers() const { return converts_ || problem_.pairs; }

  // A worker's memory.
  struct Buffers {
    S* sums;           // [sums, block rows, kTileColumns]
    S* bias;           // [kTileColumns] of the panel
    S* condition;      // [kTileColumns] of a row
    const E** pixels;  // [terms, block rows]: where the term's values of a row lie.
    bool* reaches;     // [terms, tiles]: whether a row of the tile reads more than padding.
    E* gathered;       // [terms, block rows, depth], if they must be computed.

    Buffers(Parts& parts, const Convolver& c)
        : sums(parts.take<S>(c.sums_ * c.block_rows_ * kTileColumns<E>)),
          bias(parts.take<S>(kTileColumns<E>)),
          condition(parts.take<S>(kTileColumns<E>)),
          pixels(parts.take<const E*>(c.terms() * c.block_rows_)),
          reaches(parts.take<bool>(c.terms() * c.block_rows_ / kTileRows)),
          gathered(parts.take<E>(c.gathers() ? c.terms() * c.block_rows_ * c.depth_ : 0)) {}
  };
  int64_t bytes() const {
    Parts parts(nullptr);
    Buffers(parts, *this);
    return parts.used();
  }

  // Finds the pixels that a block's rows read for each term.
  void locate(Buffers& buffers, const E* zeros, int64_t first, int64_t count) const {
    std::fill_n(buffers.reaches, terms() * block_rows_ / kTileRows, false);
    for (int64_t r = 0; r < count; ++r) {
      const Rows::Pixel pixel = rows_[first + r];
      for (int64_t t = 0; t < terms(); ++t) {
        const Term& term = terms_[t];
        const int64_t y = pixel.y + term.dy;
        const Storage* from = read({pixel.b, y, pixel.x + term.dx});
        const Storage* other = term.sign == 0 ? nullptr : read({pixel.b, y, pixel.x + term.other_dx});
        // The last sum is the right pixel's alone, which an image of odd width ends without.
        if (problem_.pairs && term.sum == kPairSums - 1 && pixel.x + 1 == problem_.width()) from = other = nullptr;
        const E*& at = buffers.pixels[t * block_rows_ + r];
        at = zeros;
        if (!from && !other) continue;
        buffers.reaches[(t * block_rows_ + r) / kTileRows] = true;
        E* const gathered = buffers.gathered + (t * block_rows_ + r) * depth_;
        if constexpr (kInPlace) {
          if (!converts_ && !other) {
            at = from;
            continue;
          }
        }
        at = gathered;
        if constexpr (std::is_same_v<Storage, float>) {
          if (other) {
            if (!from) from = zeros;
            add(gathered, from, other, term.sign);
            continue;
          }
        }
        for (int64_t k = 0; k < problem_.inputs(); ++k) gathered[k] = to_element<E>(from[k]);
        std::fill(gathered + problem_.inputs(), gathered + depth_, E{});
      }
    }
  }

  // A pixel of the input, or null outside.
  const Storage* read(const Rows::Pixel& pixel) const {
    if (pixel.y < 0 || pixel.y >= problem_.height() || pixel.x < 0 || pixel.x >= problem_.width()) return nullptr;
    return problem_.input.template as<Storage>() + pixel.in(problem_.input);
  }

  void add(E* __restrict to, const E* one, const E* other, int sign) const {
    if (sign > 0)
      for (int64_t k = 0; k < depth_; ++k) to[k] = one[k] + other[k];
    else
      for (int64_t k = 0; k < depth_; ++k) to[k] = one[k] - other[k];
  }

  void read_bias(Buffers& buffers, int64_t p) const {
    const Panel panel = panels_[p];
    for (int64_t column = 0; column < panel.vectors * kLaneColumns<E>; ++column) {
      const int64_t n = panels_.channel(panel, column);
      buffers.bias[column] = n >= 0 && problem_.bias.ndim != 0 ? widen(problem_.bias.template as<Storage>()[n]) : S{};
    }
  }

  S* row_of(const Buffers& buffers, int64_t sum, int64_t r) const {
    return buffers.sums + (sum * block_rows_ + r) * kTileColumns<E>;
  }

  // Sums over all terms, beginning with the bias.
  void multiply(Buffers& buffers, int64_t p, int64_t count) const {
    const int64_t vectors = panels_[p].vectors, columns = vectors * kLaneColumns<E>;
    const E* const panel = problem_.packed.template as<E>() + panels_.offset(p, terms() * depth_);
    for (const Group& group : groups_)
      for (int64_t r = 0; r < count; r += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, count - r), vectors, [&](auto tile_rows, auto tile_vectors) {
          Tile<E, tile_rows, tile_vectors> tile;
          S* const sums = row_of(buffers, group.sum, r);
          if (!group.begins)
            tile.load(sums, kTileColumns<E>);
          else if (group.sum == (problem_.pairs ? kSharedSum : 0))
            tile.load(buffers.bias, 0);
          else
            tile.clear();
          for (const Run& run : group.runs) {
            if (!buffers.reaches[(run.term * block_rows_ + r) / kTileRows]) continue;
            const E* left[tile_rows];
            for (int j = 0; j < tile_rows; ++j) left[j] = buffers.pixels[run.term * block_rows_ + r + j] + run.first;
            tile.multiply([&left](int j, int64_t k) { return left[j] + k; },
                          panel + (run.term * depth_ + run.first) * columns, run.depth);
          }
          tile.store(sums, kTileColumns<E>);
        });
  }

  // From the sums of pairs to those of their left and right pixels, the first two.
  void separate(Buffers& buffers, int64_t p, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) {
      S* m[kPairSums];
      for (int sum = 0; sum < kPairSums; ++sum) m[sum] = row_of(buffers, sum, r);
      each_register(panels_[p].vectors * kLaneColumns<E>, [&](int64_t i) {
        const R m1 = load_register(m[1] + i), m2 = load_register(m[2] + i);
        store_register(m[0] + i, load_register(m[0] + i) + m1 + m2);
        store_register(m[1] + i, m1 - m2 + load_register(m[3] + i));
      });
    }
  }

  // From a panel's sums to output: condition, activation.
  void finish(Buffers& buffers, int64_t p, int64_t first, int64_t count) const {
    const Panel panel = panels_[p];
    const bool gated = problem_.activation == Activation::gated;
    const int64_t columns = panel.vectors * kLaneColumns<E>, half = columns / 2, gates = problem_.outputs / 2;
    const TensorView &condition = problem_.condition, &kept = problem_.preactivation;
    std::fill_n(buffers.condition, columns, S{});
    for (int64_t at = 0; at < count * rows_.step(); ++at) {
      const int64_t r = at / rows_.step(), right = at % rows_.step();
      Rows::Pixel pixel = rows_[first + r];
      pixel.x += right;
      if (pixel.x == problem_.width()) continue;
      S* const sums = row_of(buffers, right, r);
      if (condition.ndim != 0) {
        const auto read = [&](S* to, int64_t channel) {
          const Storage* from = condition.as<Storage>() + pixel.in(condition) + channel * condition.strides[1];
          for (int64_t i = 0; i < panel.count; ++i) to[i] = widen(from[i * condition.strides[1]]);
        };
        read(buffers.condition, panel.first);
        if (gated) read(buffers.condition + half, gates + panel.first);
        each_register(columns, [&](int64_t i) {
          store_register(sums + i, load_register(sums + i) + load_register(buffers.condition + i));
        });
      }
      const auto write = [&](const TensorView& to, int64_t channel, const S* from) {
        narrow(to.as<Storage>() + pixel.in(to) + channel, from, panel.count);
      };
      if (kept.ndim != 0) {
        write(kept, panel.first, sums);
        if (gated) write(kept, gates + panel.first, sums + half);
      }
      if (gated)
        each_register(half, [&](int64_t i) {
          store_register(sums + i, tanh(load_register(sums + i)) * sigmoid(load_register(sums + half + i)));
        });
      else if (problem_.activation == Activation::relu)
        each_register(columns, [&](int64_t i) {
          const R a = load_register(sums + i);
          store_register(sums + i, a < S{0} ? R{} : a);  // NaN stays.
        });
      write(problem_.output, panel.first, sums);
    }
  }

  template <class Work>
  static void each_register(int64_t columns, const Work& work) {
    for (int64_t i = 0; i < columns; i += kLaneColumns<E>) work(i);
  }

  const Convolution& problem_;
  std::vector<Term> terms_;
  int64_t depth_, block_rows_;
  Panels<E> panels_;
  int sums_;
  std::vector<Group> groups_;
  Rows rows_;
  bool converts_;
};

// --- Gradients ---

// Pixels that activation_grad sums a bias's gradient over before the sums are added up: the same for any number of
// threads.
constexpr int64_t kBiasPixels = 256;

template <class Storage>
void activation_grad_as(const ActivationGrad& problem) {
  using E = Element<Storage>;
  using S = Sum<E>;
  using R = Register<S>;
  constexpr int64_t kLanes = kLaneColumns<E>;
  const TensorView& grad = problem.grad;
  const int64_t n = problem.outputs(), gates = n / 2, given = grad.shape[1];
  const int64_t pixels = grad.shape[0] * grad.shape[2] * grad.shape[3], parts = divide_up(pixels, kBiasPixels);
  const bool sums_bias = problem.bias_grad.ndim != 0;
  const int64_t padded = divide_up(given, kLanes) * kLanes;
  std::vector<S> partial(sums_bias ? parts * n : 0);
  const Scratch scratch(5 * padded * sizeof(S));
  const double each_value = problem.activation == Activation::gated ? kGatedGradNanoseconds : kGradNanoseconds;
  const auto differentiate = [&](int64_t part, int worker) {
    // A pixel's gradients and saved values, and the gradients in a: two of each where gated.
    S* const in = scratch.of<S>(worker);
    S *const saved = in + padded, *const result = saved + 2 * padded;
    const auto each = [&](const auto& work) {
      for (int64_t i = 0; i < padded; i += kLanes) work(i);
    };
    const auto read = [&](S* to, const TensorView& from, int64_t offset) {
      const Storage* values = from.as<Storage>() + offset;
      for (int64_t i = 0; i < given; ++i) to[i] = widen(values[i]);
    };
    std::fill_n(in, 5 * padded, S{});
    for (int64_t at = part * kBiasPixels; at < std::min(pixels, (part + 1) * kBiasPixels); ++at) {
      read(in, grad, at * given);
      const S* a = in;
      if (problem.activation == Activation::relu) {
        read(saved, problem.saved, at * n);
        each([&](int64_t i) {
          store_register(result + i, load_register(saved + i) > S{0} ? load_register(in + i) : R{});
        });
        a = result;
      } else if (problem.activation == Activation::gated) {
        read(saved, problem.saved, at * n);
        read(saved + padded, problem.saved, at * n + gates);
        each([&](int64_t i) {
          const R t = tanh(load_register(saved + i)), s = sigmoid(load_register(saved + padded + i)),
                  g = load_register(in + i);
          store_register(result + i, g * s * (1 - t * t));
          store_register(result + padded + i, g * t * s * (1 - s));
        });
        a = result;
      }
      const auto finish = [&](const S* from, int64_t channel) {
        if (problem.activation != Activation::none)
          narrow(problem.result.as<Storage>() + at * n + channel, from, given);
        if (sums_bias)
          for (int64_t i = 0; i < given; ++i) partial[part * n + channel + i] += from[i];
      };
      finish(a, 0);
      if (problem.activation == Activation::gated) finish(a + padded, gates);
    }
  };
  parallel_for(parts, differentiate, workers_for(each_value * static_cast<double>(grad.numel())));
  for (int64_t i = 0; sums_bias && i < n; ++i) {
    S total = 0;
    for (int64_t part = 0; part < parts; ++part) total += partial[part * n + i];
    problem.bias_grad.as<Storage>()[i] = narrow<Storage>(total);
  }
}

// Fills a view of four dimensions.
template <class Storage>
void fill_with_zeros(const TensorView& view) {
  const int64_t *const n = view.shape, *const step = view.strides;
  for (int64_t i = 0; i < n[0]; ++i)
    for (int64_t j = 0; j < n[1]; ++j)
      for (int64_t k = 0; k < n[2]; ++k)
        for (int64_t l = 0; l < n[3]; ++l)
          view.as<Storage>()[i * step[0] + j * step[1] + k * step[2] + l * step[3]] = Storage{};
}

}  // namespace

int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t terms, DType dtype, bool gated) {
  int64_t bytes = 0;
  with_floating(dtype, [&](auto storage) {
    using E = Element<decltype(storage)>;
    const Panels<E> panels(outputs, gated);
    bytes = panels.offset(panels.count(), terms * padded_depth<E>(inputs)) * sizeof(E);
  });
  return bytes;
}

void pack(const Packing& problem) {
  with_floating(problem.weight.dtype, [&](auto storage) { pack_as<decltype(storage)>(problem); });
}

void convolve(const Convolution& problem) {
  if (problem.output.numel() == 0) return;
  with_floating(problem.input.dtype, [&](auto storage) { Convolver<decltype(storage)>(problem).run(); });
}

void activation_grad(const ActivationGrad& problem) {
  with_floating(problem.grad.dtype, [&](auto storage) { activation_grad_as<decltype(storage)>(problem); });
}

void weight_grad(const WeightGrad& problem) {
  if (problem.weight_grad.numel() == 0) return;
  with_floating(problem.input.dtype, [&](auto storage) {
    if (problem.grad.numel() == 0) return fill_with_zeros<decltype(storage)>(problem.weight_grad);
    WeightGradient<decltype(storage)>(problem).run();
  });
}

}  // namespace cpc::masked_conv::cpu::CPC_ISA
