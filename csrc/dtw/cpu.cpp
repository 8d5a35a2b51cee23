// Dynamic time warping on the CPU. A pair's frames are multiplied in tiles of rows. The angles of a tile go through the
// recurrence while they are in the cache, and only the last row of costs is kept.
#include <algorithm>
#include <cmath>

#include "core/gemm.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "dtw/dtw.h"

namespace cpc::dtw::cpu::CPC_ISA {
namespace {

using namespace cpc::CPC_ISA;

// Pairs of a task: enough that packing a second item again costs little.
constexpr int64_t kTaskPairs = 64;

int64_t padded(int64_t columns) { return divide_up(columns, kLaneColumns<float>) * kLaneColumns<float>; }

// arccos(c) / pi, to 1e-7: Abramowitz and Stegun 4.4.46. A call of the C library would cost more than the product.
inline float angle(float c) {
  constexpr float kOfHalfTurn = 0.318309886f;
  const float a = std::min(std::fabs(c), 1.f);
  float p = -0.0012624911f;
  p = p * a + 0.0066700901f;
  p = p * a - 0.0170881256f;
  p = p * a + 0.0308918810f;
  p = p * a - 0.0501743046f;
  p = p * a + 0.0889789874f;
  p = p * a - 0.2145988016f;
  p = p * a + 1.5707963050f;
  const float of_size = p * std::sqrt(1.f - a) * kOfHalfTurn;
  return c < 0.f ? 1.f - of_size : of_size;
}

// A path's cost, and how many cells it has.
struct Path {
  float cost;
  int32_t cells;
};

// The cheapest predecessor of a cell, the first of equals.
inline Path best_of(Path diagonal, Path left, Path up) {
  if (diagonal.cost <= left.cost && diagonal.cost <= up.cost) return diagonal;
  return left.cost <= up.cost ? left : up;
}

// A thread's memory.
struct Buffers {
  float* panels;  // The second item's frames, packed for the product: core/gemm.h.
  float* angles;  // [kTileRows, columns]
  Path* paths;    // [columns], to the cells of the last row.

  Buffers(Parts& parts, int64_t longest, int64_t dim) {
    panels = parts.take<float>(padded(longest) * dim);
    angles = parts.take<float>(kTileRows * padded(longest));
    paths = parts.take<Path>(longest);
  }
};

struct Item {
  const float* frames;
  int64_t count;
};

class Warper {
 public:
  Warper(Buffers buffers, int64_t dim) : buffers_(buffers), dim_(dim) {}

  void set_second(Item item) {
    second_ = item;
    const int64_t columns = padded(item.count);
    float* out = buffers_.panels;
    for (int64_t first = 0; first < columns; first += kTileColumns<float>)
      for (int64_t k = 0; k < dim_; ++k)
        for (int64_t n = first; n < std::min(columns, first + kTileColumns<float>); ++n)
          *out++ = n < item.count ? item.frames[n * dim_ + k] : 0.f;
  }

  float distance(Item item) const {
    Path last{};
    for (int64_t row = 0; row < item.count; row += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, item.count - row);
      fill_angles(item.frames + row * dim_, rows);
      for (int64_t r = 0; r < rows; ++r) last = go_along(buffers_.angles + r * padded(second_.count), row + r == 0);
    }
    return last.cost / static_cast<float>(last.cells);
  }

 private:
  void fill_angles(const float* frames, int64_t row_count) const {
    const int64_t pitch = padded(second_.count);
    for (int64_t column = 0; column < pitch; column += kTileColumns<float>) {
      const int64_t width = std::min(kTileColumns<float>, pitch - column);
      with_tile(row_count, width / kLaneColumns<float>, [&](auto rows, auto vectors) {
        Tile<float, rows, vectors> tile;
        tile.clear();
        tile.multiply([&](int r, int64_t k) { return frames + r * dim_ + k; }, buffers_.panels + column * dim_, dim_);
        tile.store(buffers_.angles + column, pitch);
      });
    }
    for (int64_t i = 0; i < row_count * pitch; ++i) buffers_.angles[i] = angle(buffers_.angles[i]);
  }

  // Advances the paths from the cells of one row to those of the next. Returns the path to the last cell.
  Path go_along(const float* angles, bool first_row) const {
    Path* const paths = buffers_.paths;
    Path left{}, diagonal{};
    for (int64_t j = 0; j < second_.count; ++j) {
      const Path up = paths[j];
      const Path before = first_row ? left : j == 0 ? up : best_of(diagonal, left, up);
      left = {before.cost + angles[j], before.cells + 1};
      diagonal = up;
      paths[j] = left;
    }
    return left;
  }

  Buffers buffers_;
  int64_t dim_;
  Item second_{};
};

}  // namespace

void distances(const Problem& problem) {
  const int64_t pairs = problem.pairs.shape[0], dim = problem.frames.shape[1];
  if (pairs == 0) return;
  const int64_t* const counts = problem.count.as<int64_t>();
  const int64_t longest = *std::max_element(counts, counts + problem.count.shape[0]);
  const auto item = [&](int64_t k) {
    return Item{problem.frames.as<float>() + problem.first.as<int64_t>()[k] * dim, counts[k]};
  };
  Parts counted(nullptr);
  Buffers(counted, longest, dim);
  const Scratch scratch(counted.used());
  const double flops = 2. * static_cast<double>(pairs * longest) * static_cast<double>(longest * dim);
  const int threads = workers_for(flops / kFlopsPerNanosecond);
  parallel_tasks(
      divide_up(pairs, kTaskPairs),
      [&](int64_t task, int worker) {
        Parts parts(scratch.of<char>(worker));
        Warper warper(Buffers(parts, longest, dim), dim);
        int64_t prepared = -1;
        for (int64_t p = task * kTaskPairs; p < std::min(pairs, (task + 1) * kTaskPairs); ++p) {
          const int64_t* const pair = problem.pairs.as<int64_t>() + 2 * p;
          if (pair[1] != prepared) warper.set_second(item(prepared = pair[1]));
          problem.distances.as<float>()[p] = warper.distance(item(pair[0]));
        }
      },
      threads);
}

}  // namespace cpc::dtw::cpu::CPC_ISA
