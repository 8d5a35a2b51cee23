// Convolution on the CPU, masked or not, of channels-last tensors: one matrix product over the visible taps, or over
// fewer terms where pixels are computed together (terms.h). A tile of the product reads the input's pixels in place,
// unless they must be converted or are differences of several; padding is read from a row of zeros. The rows of a tile
// are the same pixel of several images, so that at an image's edge whole tiles read only padding and skip the term.
#include <algorithm>
#include <array>
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

// Tiles of a block, which a task takes through all of its panels: their pixels and sums stay in the second-level cache.
constexpr int64_t kBlockTiles = 32;
// Depth that a tile processes at a time: that part of a panel stays in the cache while all tiles of a block use it.
constexpr int64_t kDepthBlock = 320;
// The most bytes of gathered pixels in a block, so that they stay in the cache, too.
constexpr int64_t kGatheredBytes = int64_t{512} << 10;
// The same with quads, whose tiles have more pixels and sums. Wider registers multiply a wider panel, so that blocks
// must be larger to be worth reading it.
constexpr int64_t kQuadsTiles = 16, kQuadsGatheredBytes = kRegisterBytes << 13;
// Channels that are transposed at a time: their part of a panel stays in the first-level cache.
constexpr int64_t kTransposed = 64;
// Estimated nanoseconds to pack a weight for a term, and to compute a value of an activation's gradient.
constexpr double kPackNanoseconds = 0.7, kGradNanoseconds = 0.3, kGatedGradNanoseconds = 2;

// Calls use(read), where read(at) returns a term's weight at an offset: one tap's weight, or a weighted sum of several.
template <class E, class Storage, class Use>
void with_weight(const Term& term, const Packing& problem, const Use& use) {
  const TensorView& weight = problem.weight;
  constexpr size_t kMostParts = 9;
  const Storage* taps[kMostParts] = {};
  for (size_t part = 0; part < term.weight.size(); ++part) {
    const int64_t index = term.weight[part].index, kw = weight.shape[3];
    taps[part] = weight.as<Storage>() + index / kw * weight.strides[2] + index % kw * weight.strides[3];
  }
  if constexpr (!std::is_same_v<Storage, double>) {
    const auto sum_of = [&](auto parts) {
      float factors[parts];
      for (int part = 0; part < parts; ++part) factors[part] = term.weight[part].factor;
      use([&](int64_t at) {
        float v = 0;
        for (int part = 0; part < parts; ++part) v += factors[part] * widen(taps[part][at]);
        return narrow<E>(v);
      });
    };
    switch (term.weight.size()) {  // Of rectangles of up to three by three taps.
      case 2: return sum_of(std::integral_constant<int, 2>{});
      case 3: return sum_of(std::integral_constant<int, 3>{});
      case 4: return sum_of(std::integral_constant<int, 4>{});
      case 6: return sum_of(std::integral_constant<int, 6>{});
      case 9: return sum_of(std::integral_constant<int, 9>{});
    }
  }
  use([tap = taps[0]](int64_t at) { return to_element<E>(tap[at]); });
}

template <class Storage>
void pack_as(const Packing& problem) {
  using E = Element<Storage>;
  constexpr int64_t kLanes = kLaneColumns<E>;
  const TensorView &weight = problem.weight, &mask = problem.mask;
  const Panels<E> panels(problem.outputs(), problem.gated);
  const std::vector<Term> terms = terms_of(problem.taps, problem.filtering).all;
  const int64_t inputs = problem.inputs(), terms_count = std::ssize(terms);
  const ProductDepth<E> product(inputs, terms_count);
  const int64_t out_dim = problem.transposed ? 1 : 0;
  const int64_t out_step = weight.strides[out_dim], in_step = weight.strides[1 - out_dim];
  const double nanoseconds = kPackNanoseconds * static_cast<double>(problem.outputs() * inputs) * terms_count;
  const auto pack_panel = [&](int64_t task, int) {
    const int64_t p = task / terms_count, t = task % terms_count;
    const Panel panel = panels[p];
    const int64_t columns = panel.vectors * kLanes;
    E* const out = problem.packed.as<E>() + panels.offset(p, product.total);
    // If terms are joined, the last one's depth includes the padding of them all.
    const int64_t start = t * product.of_term, depth = t + 1 < terms_count ? product.of_term : product.total - start;
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
          // Read in memory order.
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
        for (int64_t k = 0; k < rows; ++k) {
          const int64_t at = start + first + k, step = at / kDepthStep<E> * kDepthStep<E>;
          E* const to = out + step * columns + begin * kDepthStep<E> + at - step;
          for (int64_t c = 0; c < kLanes; ++c) to[c * kDepthStep<E>] = block[k][c];
        }
      }
  };
  parallel_for(panels.count() * terms_count, pack_panel, workers_for(nanoseconds));
}

// --- Forward ---

// A part of the product's depth: channels [first, first + depth) of a term.
struct Run {
  int64_t term, first, depth;
};

// The order in which the sums of pixels that are computed together (terms.h) are computed, along each axis: m1 + m2 and
// m1 - m2 are in memory when m0 and m3, still in registers, complete the first and the second pixel.
constexpr std::array kSumsInOrder{1, 2, 0, 3};

// Whether there is an m2: for each sum of the rows, and then for the rows themselves.
using Differences = std::array<bool, kSums + 1>;
Differences differences_of(const std::vector<Term>& terms) {
  Differences there{};
  for (const Term& term : terms) {
    there[term.sum / kSums] |= term.sum % kSums == kDifferenceSum;
    there[kSums] |= term.sum / kSums == kDifferenceSum;
  }
  return there;
}

// Runs that are summed without leaving registers. The groups of one sum are consecutive.
struct Group {
  int sum;
  bool begins, ends;  // Whether it is the sum's first or last group.
  std::vector<Run> runs;
};

template <class E>
std::vector<Group> groups_of(const std::vector<Term>& terms, Filtering filtering, const Differences& differs,
                             const ProductDepth<E>& product) {
  // Joined terms count as one.
  const int64_t count = product.joined ? 1 : std::ssize(terms),
                inputs = product.joined ? product.total : product.of_term;
  std::vector<int> sums;
  for (const int row : kSumsInOrder)
    for (const int column : kSumsInOrder) {
      if (filtering != Filtering::quads && row > 0) continue;
      if (filtering == Filtering::direct && column > 0) continue;
      if ((row == kDifferenceSum && !differs[kSums]) || (column == kDifferenceSum && !differs[row])) continue;
      sums.push_back(kSums * row + column);
    }
  std::vector<Group> groups;
  for (const int sum : sums) {
    groups.push_back({sum, true, true, {}});
    int64_t in_group = 0;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t k = 0; terms[t].sum == sum && k < inputs; k += kDepthBlock) {
        const int64_t depth = std::min(kDepthBlock, inputs - k);
        if (in_group > 0 && in_group + depth > kDepthBlock) {
          groups.back().ends = false;
          groups.push_back({sum, false, true, {}});
          in_group = 0;
        }
        in_group += depth;
        groups.back().runs.push_back({t, k, depth});
      }
  }
  return groups;
}

// The rows of the product. The batch is split into groups of images. Within a group, rows go pixel by pixel, and for
// each pixel over the group's images, so that a block of rows reads from few images. The pixels are all of the output,
// or only the one at `position`; of pixels that are computed together, the first one.
class Rows {
 public:
  // tiles: the most tiles of a block.
  Rows(const Convolution& problem, int64_t tiles)
      : batch_(problem.batch()),
        step_down_(problem.filtering == Filtering::quads ? 2 : 1),
        step_(problem.filtering != Filtering::direct ? 2 : 1),
        across_(divide_up(problem.output_width(), step_)),
        positions_(divide_up(problem.output_height(), step_down_) * across_),
        tiles_(tiles) {
    if (problem.position.ndim != 0) {
      y_ = problem.position.as<int64_t>()[0];
      x_ = problem.position.as<int64_t>()[1];
      positions_ = 1;
    }
    images_ = std::min(batch_, kTileRows * std::max<int64_t>(1, tiles / positions_));
    blocks_ = blocks_of(images_);
  }

  struct Pixel {
    int64_t b, y, x;
    int64_t in(const TensorView& view) const { return b * view.strides[0] + y * view.strides[2] + x * view.strides[3]; }
  };
  // Rows [first, first + count) of the group of `images` images from `image` on.
  struct Block {
    int64_t image, images, first, count;
  };

  int64_t count() const { return batch_ * positions_; }
  // The rows and columns of pixels that are computed together.
  int64_t step_down() const { return step_down_; }
  int64_t step() const { return step_; }
  int64_t most_rows() const { return tiles_ * kTileRows; }
  // The number of images in a group, and in the last group.
  std::array<int64_t, 2> group_images() const {
    const int64_t rest = batch_ % images_;
    return {images_, rest ? rest : images_};
  }
  // The most pixels, and the most rows of pixels, that a block covers in a group of `images` images.
  int64_t most_pixels(int64_t images) const { return (most_rows() - 1) / images + 2; }
  int64_t most_lines(int64_t images) const { return (most_pixels(images) + across_ - 2) / across_ + 1; }

  int64_t blocks() const {
    const int64_t rest = batch_ % images_;
    return batch_ / images_ * blocks_ + (rest ? blocks_of(rest) : 0);
  }
  Block operator[](int64_t i) const {
    const int64_t image = i / blocks_ * images_, images = std::min(images_, batch_ - image);
    const int64_t rows = positions_ * images, tiles = divide_up(rows, kTileRows), count = blocks_of(images);
    const int64_t at = i % blocks_;  // The last group, if smaller, has no more blocks.
    const int64_t first = at * tiles / count * kTileRows, end = (at + 1) * tiles / count * kTileRows;
    return {image, images, first, std::min(rows, end) - first};
  }
  // Calls use(row, count, pixel) for each run of rows [row, row + count) of a block that are one pixel of successive
  // images.
  template <class Use>
  void each_pixel(const Block& block, const Use& use) const {
    const int64_t at = block.first / block.images;
    int64_t b = block.first % block.images, y = at / across_, x = at % across_;
    for (int64_t r = 0; r < block.count;) {
      const int64_t count = std::min(block.images - b, block.count - r);
      use(r, count, Pixel{block.image + b, y_ + y * step_down_, x_ + x * step_});
      r += count;
      b = 0;
      if (++x == across_) x = 0, ++y;
    }
  }

 private:
  int64_t blocks_of(int64_t images) const { return divide_up(divide_up(positions_ * images, kTileRows), tiles_); }

  int64_t batch_, step_down_, step_, across_, positions_, tiles_, images_, blocks_;
  int64_t y_ = 0, x_ = 0;
};

template <class Storage>
class Convolver {
  using E = Element<Storage>;
  using S = Sum<E>;
  using R = Register<S>;
  // Whether the input's values can be multiplied without conversion.
  static constexpr bool kInPlace = std::is_same_v<E, Storage>;

 public:
  explicit Convolver(const Convolution& problem)
      : problem_(problem),
        pairs_(problem.filtering == Filtering::pairs),
        quads_(problem.filtering == Filtering::quads),
        filtered_(terms_of(problem.taps, problem.filtering)),
        terms_(filtered_.all),
        forms_(forms_of(terms_)),
        differs_(differences_of(terms_)),
        depth_(problem.inputs(), terms()),
        panels_(problem.outputs, problem.activation == Activation::gated),
        groups_(groups_of<E>(terms_, problem.filtering, differs_, depth_)),
        copies_(!kInPlace || depth_.of_term != problem.inputs() || problem.relu_input),
        rows_(problem, quads_ ? kQuadsTiles : kBlockTiles),
        zeros_(quads_ ? problem.inputs() : 0) {
    if constexpr (std::is_same_v<E, float>)
      if (quads_) readers_ = readers_of<Storage>(filtered_, depth_.of_term);
    for (const Term& term : terms_) {
      above_ = std::min(above_, term.rows.at);
      below_ = std::max(below_, term.rows.at);
    }
    const int64_t most_gathered = quads_ ? kQuadsGatheredBytes : kGatheredBytes;
    for (int64_t tiles = quads_ ? kQuadsTiles : kBlockTiles;
         tiles > 1 && gathered_size() * int64_t{sizeof(E)} > most_gathered;)
      rows_ = Rows(problem, --tiles);  // Gathered pixels must stay in the cache, too.
    block_rows_ = rows_.most_rows();
    const auto innermost = [](const TensorView& view) { return view.ndim == 0 || view.strides[1] == 1; };
    finishes_tiles_ = problem.activation != Activation::gated && problem.preactivation.ndim == 0 &&
                      innermost(problem.condition) && innermost(problem.positive);
  }

  void run() const {
    for (const TensorView* result : {&problem_.output, &problem_.preactivation})
      if (result->ndim != 0 && problem_.position.ndim == 0 && is_dense(*result, {0, 2, 3, 1}))
        advise_huge_pages(result->data, result->numel() * static_cast<int64_t>(sizeof(Storage)));
    const int64_t blocks = rows_.blocks(), panels = panels_.count();
    const double flops = 2. * static_cast<double>(rows_.count() * depth_.total) * static_cast<double>(problem_.outputs);
    const int threads = workers_for(flops / kFlopsPerNanosecond);
    // If there are few blocks, tasks are split by panels as well, so that all workers end at about the same time. They
    // are split less if each must gather the block again.
    const int64_t groups = std::clamp<int64_t>(divide_up((gathers() ? 16 : 32) * threads, blocks), 1, panels);
    const std::vector<E> zeros(depth_.total);
    const Scratch scratch(bytes());
    const auto body = [&](int64_t task, int worker) {
      const int64_t group = task % groups;
      const Rows::Block block = rows_[task / groups];
      Parts parts(scratch.of<char>(worker));
      Buffers buffers(parts, *this);
      locate(buffers, zeros.data(), block);
      for (int64_t p = group * panels / groups; p < (group + 1) * panels / groups; ++p) {
        read_bias(buffers, p);
        multiply(buffers, p, block.count);
        if (!finishes_tiles(panels_[p])) finish(buffers, p, block);
      }
    };
    parallel_tasks(blocks * groups, body, threads);  // Tasks at the images' edges have less to do.
  }

 private:
  int64_t terms() const { return std::ssize(terms_); }
  // Whether what a block's terms read is copied once: each pixel, or each form of a pair.
  bool copies() const { return (copies_ || pairs_) && !depth_.joined && !quads_; }
  // Copies of a row of the input.
  int64_t copies_across() const {
    return pairs_ ? divide_up(problem_.output_width(), 2) * std::ssize(forms_.forms) : problem_.width();
  }
  bool gathers() const { return copies_ || depth_.joined || pairs_ || quads_; }
  // The most rows of the input that a block reads.
  int64_t read_lines(int64_t images) const {
    return std::min(problem_.height(), (rows_.most_lines(images) - 1) * problem_.stride + below_ - above_ + 1);
  }
  int64_t read_lines() const {
    const auto [images, last] = rows_.group_images();
    return std::max(read_lines(images), read_lines(last));
  }
  int64_t gathered_size() const {
    if (!gathers()) return 0;
    if (!copies()) return rows_.most_rows() * (depth_.total + (quads_ ? kApart<E> : 0));
    int64_t pixels = 0;
    for (const int64_t images : rows_.group_images())
      pixels = std::max(pixels,
                        images * std::min(read_lines(images) * copies_across(), rows_.most_pixels(images) * terms()));
    return pixels * depth_.of_term;
  }

  struct Beside {
    Storage* output;
    const Storage *condition, *positive;
  };

  // A worker's memory.
  struct Buffers {
    S* sums;           // [buffers(), block rows, kTileColumns]
    S* bias;           // [kTileColumns] of the panel
    S* beside;         // [kTileColumns]: a row's values of `condition` or `positive`.
    const E** pixels;  // [terms, block rows]: the values that a term reads for a row.
    Beside* besides;   // [rows_.step_down(), rows_.step(), block rows]: a row's output, condition and positive.
    bool* reaches;     // [terms, tiles]: whether a row of the tile reads more than padding.
    E* gathered;       // If copies(), pixels of [images, depth] each; else, if gathers(), [block rows, total depth].
    E** copied;        // [read lines, copies_across()]: a copy for all images, or null if there is none yet.

    Buffers(Parts& parts, const Convolver& c)
        : sums(parts.take<S>(c.buffers() * c.block_rows_ * kTileColumns<E>)),
          bias(parts.take<S>(kTileColumns<E>)),
          beside(parts.take<S>(kTileColumns<E>)),
          pixels(parts.take<const E*>(c.terms() * c.block_rows_)),
          besides(parts.take<Beside>(c.rows_.step_down() * c.rows_.step() * c.block_rows_)),
          reaches(parts.take<bool>(c.terms() * c.block_rows_ / kTileRows)),
          gathered(parts.take<E>(c.gathered_size())),
          copied(parts.take<E*>(c.copies() ? c.read_lines() * c.copies_across() : 0)) {}
  };
  int64_t bytes() const {
    Parts parts(nullptr);
    Buffers(parts, *this);
    return parts.used();
  }

  // Finds the pixels that a block's rows read for each term.
  void locate(Buffers& buffers, const E* zeros, const Rows::Block& block) const {
    std::fill_n(buffers.reaches, terms() * block_rows_ / kTileRows, false);
    if (copies()) std::fill_n(buffers.copied, read_lines() * copies_across(), nullptr);
    E* free = buffers.gathered;
    int64_t first_line = -1;
    rows_.each_pixel(block, [&](int64_t r, int64_t count, const Rows::Pixel& pixel) {
      const int64_t line = pixel.y * problem_.stride, column = pixel.x * problem_.stride;
      for (int64_t part = 0; finishes_tiles_ && part < rows_.step_down() * rows_.step(); ++part)
        for (int64_t i = 0; i < count; ++i) {
          const Rows::Pixel to{pixel.b + i, pixel.y + part / 2, pixel.x + part % 2};
          const bool there = to.y < problem_.output_height() && to.x < problem_.output_width();
          const auto at = [&](const TensorView& view) {
            return view.ndim != 0 && there ? view.as<Storage>() + to.in(view) : nullptr;
          };
          buffers.besides[part * block_rows_ + r + i] = {at(problem_.output), at(problem_.condition),
                                                         at(problem_.positive)};
        }
      if (quads_) return;
      if (first_line < 0) first_line = std::max<int64_t>(0, line + above_);
      for (int64_t t = 0; t < terms(); ++t) {
        const Term& term = terms_[t];
        const Reading& reading = term.columns;
        const int64_t y = line + term.rows.at, x = column + reading.at;
        bool one = inside(y, x), other = reading.sign != 0 && inside(y, column + reading.other);
        // The last sum is only for right pixels, and an image of odd width ends with a left one.
        if (pairs_ && term.sum == kSums - 1 && pixel.x + 1 == problem_.output_width()) one = other = false;
        const E** const at = buffers.pixels + t * block_rows_ + r;
        if (one || other)
          for (int64_t tile = r / kTileRows; tile <= (r + count - 1) / kTileRows; ++tile)
            buffers.reaches[t * block_rows_ / kTileRows + tile] = true;
        else if (!depth_.joined)
          for (int64_t i = 0; i < count; ++i) at[i] = zeros;
        if (!depth_.joined && !one && !other) continue;
        const Storage* const from = one ? read({pixel.b, y, x}) : nullptr;
        if (copies() && (copies_ || reading.sign != 0)) {
          const int64_t place = pairs_ ? pixel.x / 2 * std::ssize(forms_.forms) + forms_.of_term[t] : x;
          E*& copy = buffers.copied[(y - first_line) * copies_across() + place];
          if (!copy) {
            copy = free;
            free +=
                copy_form(free, one ? read({block.image, y, x}) : nullptr,
                          other ? read({block.image, y, column + reading.other}) : nullptr, reading.sign, block.images);
          }
          for (int64_t i = 0; i < count; ++i) at[i] = copy + (pixel.b - block.image + i) * depth_.of_term;
        } else if (depth_.joined) {
          E* const to = buffers.gathered + r * depth_.total;
          for (int64_t i = 0; i < count; ++i)
            if (one)
              to_elements(to + i * depth_.total + t * depth_.of_term, from + i * problem_.input.strides[0],
                          problem_.inputs(), problem_.relu_input);
            else
              std::fill_n(to + i * depth_.total + t * depth_.of_term, depth_.of_term, E{});
        } else if constexpr (kInPlace) {
          for (int64_t i = 0; i < count; ++i) at[i] = from + i * problem_.input.strides[0];
        }
      }
      if (depth_.joined)
        for (int64_t i = 0; i < count; ++i) {
          E* const row = buffers.gathered + (r + i) * depth_.total;
          std::fill(row + terms() * depth_.of_term, row + depth_.total, E{});
          buffers.pixels[r + i] = row;
        }
    });
    if (quads_) read_quads(buffers, block);
    // Joined terms are stored as the first one.
    if (depth_.joined) std::fill_n(buffers.reaches, divide_up(block.count, kTileRows), true);
  }

  bool inside(int64_t y, int64_t x) const { return y >= 0 && y < problem_.height() && x >= 0 && x < problem_.width(); }
  const Storage* read(const Rows::Pixel& pixel) const {
    return problem_.input.template as<Storage>() + pixel.in(problem_.input);
  }

  // Copies what a term reads, from one pixel or two, for several images. A pixel outside of the image is null, but not
  // both. Returns the number of values written.
  int64_t copy_form(E* to, const Storage* one, const Storage* other, int sign, int64_t images) const {
    for (int64_t i = 0; i < images; ++i) {
      E* const copy = to + i * depth_.of_term;
      const int64_t image = i * problem_.input.strides[0];
      if (other)
        add(copy, one ? one + image : nullptr, other + image, problem_.inputs(), sign, problem_.relu_input);
      else
        to_elements(copy, one + image, problem_.inputs(), problem_.relu_input);
      std::fill(copy + problem_.inputs(), copy + depth_.of_term, E{});
    }
    return images * depth_.of_term;
  }

  // Locates the values of a block's quads, and writes them. Images are read one after another, in memory order.
  void read_quads(Buffers& buffers, const Rows::Block& block) const {
    if constexpr (std::is_same_v<E, float>) {
      rows_.each_pixel(block, [&](int64_t r, int64_t count, const Rows::Pixel& pixel) {
        const bool last_row = pixel.y + 1 == problem_.output_height(), last = pixel.x + 1 == problem_.output_width();
        for (int64_t t = 0; t < terms(); ++t) {
          for (int64_t i = r; i < r + count; ++i)
            buffers.pixels[t * block_rows_ + i] = quad_at(buffers, i) + t * depth_.of_term;
          // The last sums are only for pixels below or to the right of the first one.
          if ((last_row && terms_[t].sum / kSums == kSums - 1) || (last && terms_[t].sum % kSums == kSums - 1))
            continue;
          for (int64_t tile = r / kTileRows; tile <= (r + count - 1) / kTileRows; ++tile)
            buffers.reaches[t * block_rows_ / kTileRows + tile] = true;
        }
      });
      for (int64_t image = block.image; image < block.image + block.images; ++image)
        rows_.each_pixel(block, [&](int64_t r, int64_t count, const Rows::Pixel& pixel) {
          const int64_t i = image - pixel.b;
          if (i < 0 || i >= count) return;
          for (const RectangleReader<Storage>& read : readers_)
            read(problem_.input, image, pixel.y, pixel.x, zeros_.data(), 0, problem_.inputs(), problem_.relu_input,
                 quad_at(buffers, r + i));
        });
    }
  }
  E* quad_at(const Buffers& buffers, int64_t r) const { return buffers.gathered + r * (depth_.total + kApart<E>); }

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

  // Buffers of sums: of the pixels that are computed together, of quads another two for one of the sums of their rows,
  // and with either one for a sum between its groups.
  int64_t buffers() const { return quads_ ? 7 : pairs_ ? 3 : 1; }
  int64_t partial() const { return buffers() - 1; }

  // Sums over all terms, beginning with the bias.
  void multiply(Buffers& buffers, int64_t p, int64_t count) const {
    const int64_t vectors = panels_[p].vectors, columns = vectors * kLaneColumns<E>;
    const E* const panel = problem_.packed.template as<E>() + panels_.offset(p, depth_.total);
    const int first_sum = groups_[0].sum;
    for (const Group& group : groups_)
      for (int64_t r = 0; r < count; r += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, count - r), vectors, [&](auto tile_rows, auto tile_vectors) {
          Tile<E, tile_rows, tile_vectors> tile;
          if (!group.begins)
            tile.load(row_of(buffers, partial(), r), kTileColumns<E>);
          else if (group.sum == first_sum)
            tile.load(buffers.bias, 0);
          else
            tile.clear();
          for (const Run& run : group.runs) {
            if (!buffers.reaches[(run.term * block_rows_ + r) / kTileRows]) continue;
            const E* left[tile_rows];
            for (int j = 0; j < tile_rows; ++j) left[j] = buffers.pixels[run.term * block_rows_ + r + j] + run.first;
            tile.multiply([&left](int j, int64_t k) { return left[j] + k; },
                          panel + (run.term * depth_.of_term + run.first) * columns, run.depth);
          }
          if (!group.ends) return tile.store(row_of(buffers, partial(), r), kTileColumns<E>);
          const int64_t column = group.sum % kSums;
          int64_t part = 0;
          if (quads_) {
            constexpr int64_t kOfRows = 4;  // The buffers of the left and the right sum of a row.
            const int64_t row = group.sum / kSums, right = column / 2;
            if (!complete(tile, column, differs_[row], row_of(buffers, kOfRows, r), row_of(buffers, kOfRows + 1, r)))
              return;
            if (!complete(tile, row, differs_[kSums], row_of(buffers, right, r), row_of(buffers, 2 + right, r))) return;
            part = row / 2 * 2 + right;
          } else if (pairs_) {
            if (!complete(tile, column, differs_[0], row_of(buffers, 0, r), row_of(buffers, 1, r))) return;
            part = column / 2;
          }
          if (finishes_tiles(panels_[p]))
            finish_tile(tile, buffers.besides + part * block_rows_ + r, panels_[p].first);
          else
            tile.store(row_of(buffers, part, r), kTileColumns<E>);
        });
  }

  // Adds one of the sums m0 to m3 to those before it. Returns whether a tile then is complete: the first result after
  // m0, the second one after m3. differs: whether there is an m2.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] static bool complete(Tile<E, Rows, Vectors>& tile, int64_t sum, bool differs, S* first,
                                              S* second) {
    switch (sum) {
      case kSharedSum:
        tile.store(first, kTileColumns<E>);
        if (!differs) tile.store(second, kTileColumns<E>);
        return false;
      case kDifferenceSum: separate(tile, first, second); return false;
      default: tile.add(sum == 0 ? first : second, kTileColumns<E>); return true;
    }
  }

  // Whether sums are written to the output directly from registers.
  bool finishes_tiles(const Panel& panel) const {
    return finishes_tiles_ && panel.count == panel.vectors * kLaneColumns<E>;
  }
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void finish_tile(const Tile<E, Rows, Vectors>& tile, const Beside* besides,
                                          int64_t channel) const {
    const bool relu = problem_.activation == Activation::relu;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Beside& beside = besides[r];
      if (!beside.output) continue;  // Right of the image.
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = channel + v * kLaneColumns<E>;
        R sum = tile.sums[r][v];
        if (beside.positive) sum = load_widened<S>(beside.positive + at) <= S{0} ? R{} : sum;
        if (beside.condition) sum += load_widened<S>(beside.condition + at);
        if (relu) sum = sum < S{0} ? R{} : sum;  // NaN stays.
        store_narrowed<S>(beside.output + at, sum);
      }
    }
  }

  // Given m1 in `first` and m2 in a tile, writes m1 + m2 and m1 - m2.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] static void separate(const Tile<E, Rows, Vectors>& m2, S* first, S* second) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = r * kTileColumns<E> + v * kLaneColumns<E>;
        const R m1 = load_register(first + at);
        store_register(first + at, m1 + m2.sums[r][v]);
        store_register(second + at, m1 - m2.sums[r][v]);
      }
  }

  // Applies condition and activation to a panel's sums and writes them to the output.
  void finish(Buffers& buffers, int64_t p, const Rows::Block& block) const {
    rows_.each_pixel(block, [&](int64_t r, int64_t count, Rows::Pixel pixel) {
      for (int64_t i = 0; i < count; ++i, ++pixel.b)
        for (int64_t part = 0; part < rows_.step_down() * rows_.step(); ++part) {
          const int64_t y = pixel.y + part / 2, x = pixel.x + part % 2;
          if (y < problem_.output_height() && x < problem_.output_width())
            finish_pixel(buffers, panels_[p], row_of(buffers, part, r + i), {pixel.b, y, x});
        }
    });
  }
  void finish_pixel(Buffers& buffers, const Panel& panel, S* sums, const Rows::Pixel& pixel) const {
    const bool gated = problem_.activation == Activation::gated;
    const int64_t columns = panel.vectors * kLaneColumns<E>, half = columns / 2, gates = problem_.outputs / 2;
    const TensorView &condition = problem_.condition, &positive = problem_.positive, &kept = problem_.preactivation;
    const auto read = [&](const TensorView& view) {
      const auto read_half = [&](S* to, int64_t channel) {
        const Storage* const from = view.as<Storage>() + pixel.in(view) + channel * view.strides[1];
        if (view.strides[1] == 1)  // A stride that the compiler knows.
          for (int64_t i = 0; i < panel.count; ++i) to[i] = widen(from[i]);
        else
          for (int64_t i = 0; i < panel.count; ++i) to[i] = widen(from[i * view.strides[1]]);
      };
      std::fill_n(buffers.beside, columns, S{});
      read_half(buffers.beside, panel.first);
      if (gated) read_half(buffers.beside + half, gates + panel.first);
    };
    const auto write = [&](const TensorView& to, int64_t channel, const S* from) {
      narrow(to.as<Storage>() + pixel.in(to) + channel, from, panel.count);
    };
    if (positive.ndim != 0) {
      read(positive);
      each_register(columns, [&](int64_t i) {
        store_register(sums + i, load_register(buffers.beside + i) <= S{0} ? R{} : load_register(sums + i));
      });
    }
    if (condition.ndim != 0) {
      read(condition);
      each_register(columns, [&](int64_t i) {
        store_register(sums + i, load_register(sums + i) + load_register(buffers.beside + i));
      });
    }
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

  template <class Work>
  static void each_register(int64_t columns, const Work& work) {
    for (int64_t i = 0; i < columns; i += kLaneColumns<E>) work(i);
  }

  const Convolution& problem_;
  bool pairs_, quads_;
  Terms filtered_;
  const std::vector<Term>& terms_;
  Forms forms_;
  Differences differs_;
  ProductDepth<E> depth_;
  Panels<E> panels_;
  std::vector<Group> groups_;
  bool copies_, finishes_tiles_;
  Rows rows_;
  int64_t block_rows_;
  // Of quads: what is read outside of images, and the readers of rectangles.
  std::vector<Storage> zeros_;
  std::vector<RectangleReader<Storage>> readers_;
  int64_t above_ = 0, below_ = 0;  // Offsets of the first and last input rows that terms reach.
};

// --- Gradients ---

// Pixels per partial sum of the bias gradient. It does not depend on the number of threads, so neither do results.
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
    // A pixel's output gradients, its saved values, and the gradients of a. The latter two have a second half for
    // gates.
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
          store_register(result + i, load_register(saved + i) <= S{0} ? R{} : load_register(in + i));
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
  with_floating_of_level(dtype, [&](auto storage) {
    using E = Element<decltype(storage)>;
    const Panels<E> panels(outputs, gated);
    bytes = panels.offset(panels.count(), ProductDepth<E>(inputs, terms).total) * sizeof(E);
  });
  return bytes;
}

bool multiplies_floats(DType dtype) {
  bool result = false;
  with_floating_of_level(dtype, [&](auto storage) { result = std::is_same_v<Element<decltype(storage)>, float>; });
  return result;
}

void pack(const Packing& problem) {
  with_floating_of_level(problem.weight.dtype, [&](auto storage) { pack_as<decltype(storage)>(problem); });
}

void convolve(const Convolution& problem) {
  if (problem.output.numel() == 0) return;
  with_floating_of_level(problem.input.dtype, [&](auto storage) { Convolver<decltype(storage)>(problem).run(); });
}

void activation_grad(const ActivationGrad& problem) {
  with_floating_of_level(problem.grad.dtype, [&](auto storage) { activation_grad_as<decltype(storage)>(problem); });
}

void weight_grad(const WeightGrad& problem) {
  if (problem.weight_grad.numel() == 0) return;
  with_floating_of_level(problem.input.dtype, [&](auto storage) {
    if (problem.grad.numel() == 0) return fill_with_zeros<decltype(storage)>(problem.weight_grad);
    WeightGradient<decltype(storage)>(problem).run();
  });
}

}  // namespace cpc::masked_conv::cpu::CPC_ISA
