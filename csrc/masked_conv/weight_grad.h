// The weight gradient on the CPU: for each term (terms.h), the product of the pixels that it reads and the output
// gradient, summed over all pixels. Slices of both operands are packed position by position, with the images of the
// batch innermost, so that a tap is only an offset into them. Pairs of pixels are packed as the sums and differences
// that terms multiply, and so are quads. With a stride, input columns that are a stride apart are packed together.
// Included only by cpu.cpp, once per instruction set level.
#pragma once

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "masked_conv/masked_conv.h"
#include "masked_conv/panels.h"
#include "masked_conv/terms.h"

namespace cpc::masked_conv::cpu::CPC_ISA {

// Bytes of a slice: the rows of some images that are packed at a time.
constexpr int64_t kSliceBytes = int64_t{1} << 20;
// The depth that a tile should process between being loaded and stored. It is also the most images of a slice.
constexpr int64_t kSliceDepth = 128;
// The same for quads.
constexpr int64_t kQuadsBytes = int64_t{1} << 19;
// Input channels per task when gradients are written.
constexpr int64_t kWritten = 16;
// Estimated nanoseconds to pack a value, and to write the gradient of a weight.
constexpr double kSliceNanoseconds = 0.5, kWriteNanoseconds = 1;
// The most tiles of the left operand that are stored side by side. They are the distance between steps of depth: with
// thousands of channels side by side, each step would be in a page of its own.
constexpr int64_t kLeftTiles = 24;
// The most tiles of a task, except of quads: enough to reuse a slice of the right operand, few enough to balance the
// load.
constexpr int64_t kTaskTiles = 8;

template <class Storage>
class WeightGradient {
  using E = Element<Storage>;
  using S = Sum<E>;

 public:
  explicit WeightGradient(const WeightGrad& problem)
      : problem_(problem),
        pairs_(problem.filtering == Filtering::pairs),
        quads_(problem.filtering == Filtering::quads),
        filtered_(terms_of(problem.taps, problem.filtering)),
        terms_(filtered_.all),
        panels_(problem.outputs(), false),
        tiles_(divide_up(problem.channels(), kTileRows)),
        step_(pairs_ || quads_ ? 2 : 1),
        across_(divide_up(problem.output_width(), step_)),
        down_(divide_up(problem.output_height(), quads_ ? 2 : 1)),
        read_step_(pairs_ || quads_ ? 2 : problem.stride),
        read_across_(pairs_ || quads_ ? across_ : divide_up(problem.width(), read_step_)),
        reads_line_(problem.stride),
        zeros_(std::max(problem.channels(), problem.outputs())),
        outside_(quads_ ? zeros_.size() : 0) {
    // Steps of depth that one instruction multiplies (kDepthStep) are of different images.
    const int64_t batch = padded_depth<E>(problem.batch());
    images_ = std::min(batch, padded_depth<E>(divide_up(kSliceDepth, quads_ ? across_ : problem.output_width())));
    of_grad_ = {{0}};
    if (pairs_) {
      of_grad_.clear();
      for (const Product& product : kGradientsOfSums) of_grad_.push_back(product.reading);
    }
    for (const Term& term : terms_) {
      above_ = std::max(above_, -term.rows.at);
      below_ = std::max(below_, term.rows.at);
      reads_line_[remainder(term.rows.at)] = true;
      // With pairs, a form is the pixels that a term reads; otherwise it is their column modulo the stride.
      const Reading form = pairs_ ? term.columns : Reading{remainder(term.columns.at)};
      const auto known = std::find(of_input_.begin(), of_input_.end(), form);
      form_of_.push_back(quads_ ? std::ssize(form_of_) : known - of_input_.begin());
      shift_of_.push_back(pairs_ || quads_ ? 0 : (term.columns.at - form.at) / problem.stride);
      if (known == of_input_.end()) of_input_.push_back(form);
    }
    const int64_t row_bytes = images_ * sizeof(E) *
                              (forms_of_input() * read_across_ * problem.stride * problem.channels() +
                               forms_of_grad() * across_ * problem.outputs());
    slice_rows_ = std::clamp<int64_t>((quads_ ? kQuadsBytes : (pairs_ ? 2 : 1) * kSliceBytes) / row_bytes, 1, down_);
    read_rows_ =
        quads_ ? slice_rows_ : std::min((slice_rows_ - 1) * problem.stride + above_ + below_ + 1, problem.height());
    if constexpr (std::is_same_v<E, float>)
      if (quads_) readers_ = readers_of<Storage>(filtered_, left_pitch());
    for (int64_t sum = 0; quads_ && sum < forms_of_grad(); ++sum)
      grad_places_.push_back(sum * panels_.count() * right_pitch());
  }

  void run() const {
    const int64_t left_size = forms_of_input() * left_pitch(),
                  right_size = forms_of_grad() * panels_.count() * right_pitch(),
                  sums_size = panels_.count() * terms() * tiles_ * kTileRows * kTileColumns<E>;
    std::vector<S> sums(sums_size);
    Parts counted(nullptr);
    counted.take<E>(left_size), counted.take<E>(right_size);
    const Scratch scratch = Scratch::shared(counted.used());
    Parts parts(scratch.of<char>(0));
    E* const left = parts.take<E>(left_size);
    E* const right = parts.take<E>(right_size);
    // Work of one slice.
    const double slices = static_cast<double>(divide_up(problem_.batch(), images_) * divide_up(down_, slice_rows_)),
                 positions = static_cast<double>(problem_.batch() * down_ * across_) / slices,
                 packed = positions * static_cast<double>(forms_of_input() * problem_.stride * problem_.channels() +
                                                          forms_of_grad() * problem_.outputs()),
                 flops = 2 * positions * static_cast<double>(problem_.channels() * problem_.outputs()) *
                         static_cast<double>(terms());
    const int packers = workers_for(packed * kSliceNanoseconds), threads = workers_for(flops / kFlopsPerNanosecond);
    // Of quads, each term reads forms of its own, so that terms are taken one after another; other terms share theirs.
    const int64_t term_tasks = quads_ ? terms() : 1, products = term_tasks * panels_.count(),
                  most_tiles = quads_ ? tiles_ : kTaskTiles,
                  task_tiles = std::clamp<int64_t>(products * tiles_ / (4 * threads), 1, most_tiles),
                  tasks = divide_up(tiles_, task_tiles);
    std::vector<E> values(workers() * images_ * zeros_.size());
    for (int64_t b = 0; b < problem_.batch(); b += images_)
      for (int64_t y = 0; y < down_; y += slice_rows_) {
        const Slice slice = slice_at(b, y);
        const auto pack_position = [&](int64_t task, int worker) {
          if (quads_)
            pack_quads(slice, left, right, task);
          else
            pack(slice, left, right, values.data() + worker * images_ * zeros_.size(), task);
        };
        const int64_t rows = slice.end - slice.begin;
        parallel_for(quads_ ? 2 * rows * images_ : (slice.read_end - slice.read_begin) * read_across_ + rows * across_,
                     pack_position, packers);
        const auto multiply_tiles = [&](int64_t task, int) {
          const int64_t first = task % tasks * task_tiles, p = task / tasks % panels_.count();
          const int64_t term = task / tasks / panels_.count();
          for (int64_t t = term; t < (quads_ ? term + 1 : terms()); ++t)
            multiply(slice, left, right, sums.data(), t, p, first, std::min(first + task_tiles, tiles_));
        };
        // Tasks are of unequal size: the last panel may be narrow, and the last tiles few.
        parallel_tasks(products * tasks, multiply_tiles, threads);
      }
    write(sums.data());
  }

 private:
  // Rows [begin, end) of the output's gradient for images b, b + 1, …, and the input's rows that their taps read. Of
  // quads, both are rows of quads.
  struct Slice {
    int64_t b, begin, end, read_begin, read_end;
  };
  Slice slice_at(int64_t b, int64_t y) const {
    const int64_t end = std::min(y + slice_rows_, down_), stride = problem_.stride;
    if (quads_) return {b, y, end, y, end};
    return {b, y, end, std::clamp<int64_t>(y * stride - above_, 0, problem_.height() - 1),
            std::clamp<int64_t>((end - 1) * stride + below_ + 1, 1, problem_.height())};
  }
  int64_t terms() const { return std::ssize(terms_); }
  // Channels of a step of depth in a block of the left operand, in whole tiles.
  int64_t left_channels() const { return std::min(tiles_, kLeftTiles) * kTileRows; }
  // Elements of a block of the left operand, of one of its forms, and of a panel of the right operand.
  int64_t block_pitch() const { return read_rows_ * read_across_ * images_ * left_channels(); }
  int64_t left_pitch() const { return divide_up(tiles_, kLeftTiles) * block_pitch() + kApart<E>; }
  int64_t right_pitch() const { return slice_rows_ * across_ * images_ * kTileColumns<E> + kApart<E>; }
  // How many forms of the input and of the gradient are packed.
  int64_t forms_of_input() const { return quads_ ? terms() : std::ssize(of_input_); }
  int64_t forms_of_grad() const { return quads_ ? kSums * kSums : std::ssize(of_grad_); }
  // n modulo the stride, for n of either sign.
  int64_t remainder(int64_t n) const { return (n % problem_.stride + problem_.stride) % problem_.stride; }

  // Packs one position of the slice for all of its images: the first tasks pack the input, the others the gradient. The
  // depth is ordered (y, x, image). The left operand is [form][block][depth][channels] and the right one
  // [form][panel][depth][columns], both with kDepthStep steps of depth interleaved.
  void pack(const Slice& slice, E* left, E* right, E* memory, int64_t task) const {
    const int64_t reads = (slice.read_end - slice.read_begin) * read_across_;
    const bool of_input = task < reads;
    const int64_t at = of_input ? task : task - reads, across = of_input ? read_across_ : across_;
    const int64_t x = at % across * (of_input ? read_step_ : step_);
    const int64_t y = (of_input ? slice.read_begin : slice.begin) + at / across;
    if (of_input && !reads_line_[y % problem_.stride]) return;
    const TensorView& from = of_input ? problem_.input : problem_.grad;
    const std::vector<Reading>& forms = of_input ? of_input_ : of_grad_;
    for (int64_t f = 0; f < std::ssize(forms); ++f) {
      const E* values[kSliceDepth];
      for (int64_t i = 0; i < images_; ++i)
        values[i] = values_of(from, slice.b + i, y, x, forms[f], of_input && problem_.relu_input,
                              memory + i * std::ssize(zeros_));
      // Interleaves the images of a step of depth, and zeroes the columns after the first `count`.
      const auto place = [&](E* to, int64_t first, int64_t count, auto columns) {
        constexpr int64_t kStep = kDepthStep<E>;
        for (int64_t i = 0; i < images_; i += kStep) {
          E* const __restrict out = to + i * columns;
          const E* given[kStep];
          for (int64_t j = 0; j < kStep; ++j) given[j] = values[i + j] + first;
          const auto copy = [&](auto n) {
            for (int64_t c = 0; c < n; ++c)
              for (int64_t j = 0; j < kStep; ++j) out[c * kStep + j] = given[j][c];
          };
          if (count == columns)
            copy(columns);  // A number that the compiler knows.
          else
            copy(count), std::fill(out + count * kStep, out + columns * kStep, E{});
        }
      };
      if (of_input) {
        for (int64_t first = 0; first < from.shape[1]; first += left_channels())
          place(left + f * left_pitch() + first / left_channels() * block_pitch() + at * images_ * left_channels(),
                first, std::min(left_channels(), from.shape[1] - first), left_channels());
      } else {
        for (int64_t p = 0; p < panels_.count(); ++p) {
          E* const panel = right + (f * panels_.count() + p) * right_pitch();
          with_tile(1, panels_[p].vectors, [&](auto, auto vectors) {
            constexpr int64_t kColumns = vectors * kLaneColumns<E>;
            place(panel + at * images_ * kColumns, panels_[p].first, panels_[p].count,
                  std::integral_constant<int64_t, kColumns>{});
          });
        }
      }
    }
  }

  // The same for a row of quads of one image, in memory order: quads are written directly.
  void pack_quads(const Slice& slice, E* left, E* right, int64_t task) const {
    if constexpr (std::is_same_v<E, float>) {
      const int64_t rows = slice.end - slice.begin, i = task / rows % images_, row = task % rows;
      const bool of_input = task < rows * images_;
      for (int64_t quad = 0; quad < across_; ++quad) {
        const int64_t depth = (row * across_ + quad) * images_ + i;
        if (of_input)
          pack_input(left, depth, slice.b + i, 2 * (slice.begin + row), 2 * quad);
        else
          pack_grad(right, depth, slice.b + i, 2 * (slice.begin + row), 2 * quad);
      }
    }
  }
  void pack_input(float* left, int64_t depth, int64_t b, int64_t y, int64_t x) const {
    for (const RectangleReader<Storage>& read : readers_)
      for (int64_t first = 0; first < problem_.channels(); first += left_channels()) {
        const int64_t count = std::min(left_channels(), problem_.channels() - first);
        float* const to = left + first / left_channels() * block_pitch() + depth * left_channels();
        read(problem_.input, b, y, x, outside_.data(), first, count, problem_.relu_input, to);
        for (const int64_t place : read.places) std::fill(to + place + count, to + place + left_channels(), 0.f);
      }
  }
  void pack_grad(float* right, int64_t depth, int64_t b, int64_t y, int64_t x) const {
    const auto square = square_of<Storage>(problem_.grad, b, y, x, kGradientsOfSums, kGradientsOfSums, outside_.data());
    for (int64_t p = 0; p < panels_.count(); ++p) {
      const Panel panel = panels_[p];
      const int64_t columns = panel.vectors * kLaneColumns<E>;
      float* const to = right + p * right_pitch() + depth * columns;
      read_square<kGradientsOfSums, kGradientsOfSums>(square, panel.first, panel.count, false, to, grad_places_.data());
      for (const int64_t place : grad_places_) std::fill(to + place + panel.count, to + place + columns, 0.f);
    }
  }

  // Returns a form's values at a pixel, in place if possible, else written to `memory`.
  const E* values_of(const TensorView& from, int64_t b, int64_t y, int64_t x, const Reading& form, bool through_relu,
                     E* memory) const {
    const auto read = [&](int64_t dx) -> const Storage* {
      if (b >= problem_.batch() || x + dx < 0 || x + dx >= from.shape[3]) return nullptr;
      return from.as<Storage>() + b * from.strides[0] + y * from.strides[2] + (x + dx) * from.strides[3];
    };
    const Storage* const one = read(form.at);
    const Storage* const other = form.sign == 0 ? nullptr : read(form.other);
    const int64_t channels = from.shape[1];
    if (!one && !other) return zeros_.data();
    if constexpr (!std::is_same_v<Storage, double>) {
      if (other) {
        add(memory, one, other, channels, form.sign, through_relu);
        return memory;
      }
    }
    if constexpr (std::is_same_v<E, Storage>)
      if (!through_relu) return one;
    to_elements(memory, one, channels, through_relu);
    return memory;
  }

  // Adds a slice's contribution to tiles [first, last) of a panel, for one term.
  void multiply(const Slice& slice, const E* left, const E* right, S* sums, int64_t t, int64_t p, int64_t first,
                int64_t last) const {
    const int64_t vectors = panels_[p].vectors, columns = vectors * kLaneColumns<E>;
    const Term& term = terms_[t];
    const int64_t stride = problem_.stride, shift = shift_of_[t];
    int64_t x_begin = std::max<int64_t>(0, -shift), x_end = std::min(across_, read_across_ - shift);
    // The last sum is the right pixel's alone, which an image of odd width ends without.
    if (step_ == 2 && term.sum % kSums == kSums - 1) x_end = problem_.output_width() / 2;
    const int64_t depth = (x_end - x_begin) * images_;
    // Rows y for which y * stride + dy is in the input. Division truncates, hence the case of a negative `beyond`.
    const int64_t dy = quads_ ? 0 : term.rows.at, beyond = problem_.height() - 1 - dy;
    int64_t y_begin = std::max(slice.begin, dy < 0 ? divide_up(-dy, stride) : 0),
            y_end = std::min(slice.end, beyond < 0 ? 0 : beyond / stride + 1);
    if (quads_)
      y_begin = slice.begin,
      y_end = std::min(slice.end, term.sum / kSums == kSums - 1 ? problem_.output_height() / 2 : down_);
    if (depth <= 0 || y_begin >= y_end) return;
    const E* const panel = right + (term.sum * panels_.count() + p) * right_pitch();
    for (int64_t i = first; i < last; ++i) {
      S* const tile_sums = sums + ((p * terms() + t) * tiles_ + i) * kTileRows * kTileColumns<E>;
      with_tile(kTileRows, vectors, [&](auto, auto tile_vectors) {
        Tile<E, kTileRows, tile_vectors> tile;
        tile.load(tile_sums, kTileColumns<E>);
        for (int64_t y = y_begin; y < y_end; ++y) {
          const int64_t line = y * stride + dy - slice.read_begin;
          const int64_t reads = (line * read_across_ + x_begin + shift) * images_;
          const int64_t gives = ((y - slice.begin) * across_ + x_begin) * images_;
          const E* const from = left + form_of_[t] * left_pitch() + i / kLeftTiles * block_pitch() +
                                reads * left_channels() + i % kLeftTiles * kTileRows * kDepthStep<E>;
          tile.multiply(
              [from, pitch = left_channels()](int r, int64_t k) { return from + k * pitch + r * kDepthStep<E>; },
              panel + gives * columns, depth);
        }
        tile.store(tile_sums, kTileColumns<E>);
      });
    }
  }

  // Writes the taps' gradients: each is the sum over the terms whose weight contains the tap, times its factor.
  void write(const S* sums) const {
    const TensorView &out = problem_.weight_grad, &mask = problem_.mask;
    const int64_t kh = out.shape[2], kw = out.shape[3], channels = problem_.channels();
    struct Share {
      int64_t term;
      float factor;
    };
    std::vector<std::vector<Share>> shares(kh * kw);  // By tap.
    for (int64_t t = 0; t < terms(); ++t)
      for (const Term::Part& part : terms_[t].weight) shares[part.index].push_back({t, part.factor});
    const int64_t parts = divide_up(channels, kWritten);
    const auto write_part = [&](int64_t task, int) {
      const int64_t p = task / parts, first = task % parts * kWritten, end = std::min(channels, first + kWritten);
      const Panel panel = panels_[p];
      for (int64_t index = 0; index < kh * kw; ++index) {
        S totals[kWritten * kTileColumns<E>];
        const int64_t count = (end - first) * kTileColumns<E>;
        std::fill_n(totals, count, S{});
        for (const Share& share : shares[index]) {
          const S* const from = sums + ((p * terms() + share.term) * tiles_ * kTileRows + first) * kTileColumns<E>;
          const S factor = share.factor;
          for (int64_t k = 0; k < count; ++k) totals[k] += factor * from[k];
        }
        for (int64_t column = 0; column < panel.count; ++column) {
          const int64_t o = panel.first + column, i = index / kw, j = index % kw;
          Storage* const to = out.as<Storage>() + o * out.strides[0] + i * out.strides[2] + j * out.strides[3];
          for (int64_t c = first; c < end; ++c)
            to[c * out.strides[1]] = narrow<Storage>(totals[(c - first) * kTileColumns<E> + column]);
          if (mask.ndim != 4 || shares[index].empty()) continue;  // The tap is visible to all channels, or to none.
          const bool* const visible = mask.as<bool>() + o * mask.strides[0] + i * mask.strides[2] + j * mask.strides[3];
          for (int64_t c = first; c < end; ++c)
            if (!visible[c * mask.strides[1]]) to[c * out.strides[1]] = Storage{};
        }
      }
    };
    parallel_for(panels_.count() * parts, write_part,
                 workers_for(kWriteNanoseconds * static_cast<double>(out.numel())));
  }

  const WeightGrad& problem_;
  bool pairs_, quads_;
  Terms filtered_;
  const std::vector<Term>& terms_;
  Panels<E> panels_;
  int64_t tiles_;  // Tiles of input channels.
  // Pixels from one position of a gradient row to the next, and the number of positions; the same for the input.
  int64_t step_, across_, down_, read_step_, read_across_;
  std::vector<char> reads_line_;  // Whether rows of the input are read, by row modulo the stride.
  std::vector<E> zeros_;
  // Of quads: what is read outside of images, the readers of rectangles into the left operand, and the places of the
  // sums' gradients in the right operand.
  std::vector<Storage> outside_;
  std::vector<RectangleReader<Storage>> readers_;
  std::vector<int64_t> grad_places_;
  // Not of quads: what is packed. The latter has one form per sum.
  std::vector<Reading> of_input_, of_grad_;
  // By term: its form of the input, and the offset in positions at which it reads that.
  std::vector<int64_t> form_of_, shift_of_;
  int64_t above_ = 0, below_ = 0;  // Rows that taps reach above and below a row.
  int64_t images_, slice_rows_, read_rows_;
};

}  // namespace cpc::masked_conv::cpu::CPC_ISA
