// InfoNCE of all keys on the GPU: computes losses and all gradients in one call.
// The scores of a group of queries against all keys are kept as powers of e, relative to the score of the query's
// positive, or to the largest score of a tile where the two are far apart. Scores are thus multiplied only once, and
// tiles do not depend on each other. After the tiles' sums are combined, two further products turn powers into
// gradients: a weight is its power times a factor of the query. Scores are multiplied again and turned into the
// gradients' weights, chunk by chunk, where there are too many keys for this, where a power does not determine its
// weight (several positives), or where powers do not fit into float16. Contrasts that need more from their scores keep
// dot products instead (stored_dots.cuh). Positives are multiplied first, by the same product, so that ranks can be
// counted while a tile is in registers and equal keys have equal scores. No sum depends on the order in which blocks
// run.
#pragma once

#include "info_nce/block_tiles.cuh"
#include "info_nce/stored_dots.cuh"
#include "info_nce/warp_tiles.cuh"

namespace cpc::info_nce::cuda {

// The products with ordinary multiply-adds, a tile per block.
template <class T>
struct BlockProducts {
  static void score_positives(const Arguments<T>& a, void* stream) {
    launch("score_positives", &cuda::score_positives<T>,
           {a.entries * divide_up(a.rows, kTile) * a.places, dim3(kThreads), kSlices}, stream, a);
  }
  static void score(const Arguments<T>& a, Stage, void* stream) {
    launch("score", &cuda::score<T>,
           {a.entries * divide_up(a.rows, kTile) * divide_up(a.key_count, kTile), dim3(kThreads), kSlices}, stream, a);
  }
  static void add_to_queries(const Arguments<T>& a, void* stream) {
    launch("add_to_queries", &cuda::add_to_queries<T>,
           {a.entries * a.query_parts * divide_up(a.rows, kTile) * divide_up(a.d, kTile), dim3(kThreads), kSlices},
           stream, a);
  }
  static void add_to_keys(const Arguments<T>& a, void* stream) {
    launch("add_to_keys", &cuda::add_to_keys<T>,
           {a.entries * divide_up(a.key_count, kTile) * divide_up(a.d, kTile), dim3(kThreads), kSlices}, stream, a);
  }

 private:
  static constexpr int64_t kSlices = kStages * kStageBytes;
};

// The products, on tensor cores.
template <class Math>
struct WarpProducts {
  using T = typename Math::Value;
  using ByRow = cpc::cuda::Rows<T>;
  using ByColumn = cpc::cuda::Columns<T>;

  static void score_positives(const Arguments<T>& a, void* stream) {
    const bool gathers = a.targets != nullptr;
    const T* const keys = a.packs_keys ? a.packed_keys : a.keys + a.first_entry * a.n * a.d;
    if (gathers)
      launch("gather_positives", &gather_positives<T>,
             {divide_up(a.entries * a.places * a.rows * (a.pitch_d / kChunk<T>), kThreads), dim3(kThreads)}, stream, a,
             keys);
    const int d = static_cast<int>(a.d);
    const int64_t of_place = a.pitch_rows * a.pitch_d;
    for (int64_t j = 0; j < a.places; ++j) {
      const ByRow positives = gathers ? ByRow{a.positive_keys + j * of_place, a.pitch_d, a.rows, d, a.places * of_place}
                                      : ByRow{keys + a.first_row * a.pitch_d, a.pitch_d, a.rows, d, a.n * a.pitch_d};
      multiply("score_positives", queries_of(a), positives, d, TakeScores<T>{a, Stage::positives, j}, a.entries, stream,
               Tiles::diagonal);
    }
  }
  static void score(const Arguments<T>& a, Stage stage, void* stream) {
    const ByRow keys{a.key_matrix(), a.pitch_d, a.key_count, static_cast<int>(a.d), a.n * a.pitch_d};
    multiply("score", queries_of(a), keys, a.d, TakeScores<T>{a, a.fused ? stage : Stage::keep}, a.entries, stream);
  }
  static void add_to_queries(const Arguments<T>& a, void* stream) {
    const int depth = static_cast<int>(a.key_count);
    const DepthParts parts{static_cast<int>(a.query_parts), static_cast<int>(a.part_keys)};
    add("add_to_queries", a.wide, ByRow{a.powers, a.pitch_keys, a.rows, depth, a.pitch_rows * a.pitch_keys, parts},
        ByColumn{a.key_matrix(), a.pitch_d, a.d, depth, a.n * a.pitch_d, parts}, std::min(a.part_keys, a.key_count),
        AddToSums{a.query_sums, a.pitch_rows * a.pitch_d, a.rows, static_cast<int>(a.pitch_d), a.adds_queries},
        a.entries * a.query_parts, stream);
  }
  static void add_to_keys(const Arguments<T>& a, void* stream) {
    const int depth = static_cast<int>(a.rows);
    const DepthParts parts{static_cast<int>(a.key_parts), static_cast<int>(a.part_rows)};
    add("add_to_keys", a.wide, ByColumn{a.powers, a.pitch_keys, a.key_count, depth, a.pitch_rows * a.pitch_keys, parts},
        ByColumn{a.scaled_queries, a.pitch_d, a.d, depth, a.pitch_rows * a.pitch_d, parts},
        std::min(a.part_rows, a.rows),
        AddToSums{a.key_sums + a.first_key * a.pitch_d, a.n * a.pitch_d, a.key_count, static_cast<int>(a.pitch_d),
                  a.adds_keys},
        a.entries * a.key_parts, stream);
  }

 private:
  template <class A, class B, class Epilogue>
  static void multiply(const char* name, const A& a, const B& b, int64_t depth, const Epilogue& epilogue,
                       int64_t entries, void* stream, Tiles tiles = Tiles::all) {
    launch_product<Math, SquareTile>(name, a, b, WholeDepth(slices_of<T>(depth)), epilogue, entries, stream, tiles);
  }
  template <class A>
  static void add(const char* name, bool wide, const A& a, const ByColumn& b, int64_t depth, const AddToSums& sums,
                  int64_t entries, void* stream) {
    // Both tiles give the same sums. Wide ones are for GPUs whose L2 cache is slower than their tensor cores, which are
    // those with much shared memory.
    constexpr int64_t kMuchShared = int64_t{128} << 10;
    if constexpr (sizeof(T) == 2)
      if (wide && attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kMuchShared)
        return launch_product<Math, WideTile>(name, a, b, WholeDepth(slices_of<T>(depth)), sums, entries, stream);
    multiply(name, a, b, depth, sums, entries, stream);
  }
  static ByRow queries_of(const Arguments<T>& a) {
    return {a.query_matrix(), a.pitch_d, a.rows, static_cast<int>(a.d), a.m * a.pitch_d};
  }
};

template <class T, class Products>
class AllKeys {
 public:
  explicit AllKeys(const Problem& problem) : problem_(problem), cuts_(problem) {}

  int64_t workspace() const {
    Parts parts(nullptr);
    Arguments<T>(problem_, cuts_, parts);
    return parts.used();
  }

  void run(void* stream) const {
    const Problem& p = problem_;
    if (p.rows() == 0) {  // No kernel would write these.
      for (const TensorView* of_keys : {&p.grad_keys, &p.grad_bias})
        fill_with_zeros(of_keys->data, of_keys->ndim == 0 ? 0 : of_keys->numel() * size_of(of_keys->dtype), stream);
      return;
    }
    Parts parts(p.workspace.as<char>());
    Arguments<T> a(p, cuts_, parts);
    if constexpr (std::is_same_v<T, Half>)
      if (a.gradients)
        launch("find_largest_weight", &find_largest_weight<float>, {1, dim3(kUnitThreads)}, stream, a.row_weights,
               p.batch() * a.m, a.factor, a.largest_weight);
    for (a.first_entry = 0; a.first_entry < p.batch(); a.first_entry += cuts_.entries) {
      a.entries = std::min(cuts_.entries, p.batch() - a.first_entry);
      pack(a.packs_queries, a.queries, a.packed_queries, a, a.m, stream);
      pack(a.packs_keys, a.keys, a.packed_keys, a, a.n, stream);
      if (a.symmetric) {  // Columns are complete only after all rows.
        each_group(a, [&] { measure(a, stream); });
        finish(a, stream);
        each_group(a, [&] { form_gradients(a, stream); });
      } else {
        each_group(a, [&] {
          measure(a, stream);
          form_gradients(a, stream);
        });
      }
    }
  }

 private:
  // Calls work for one group of queries after another.
  template <class Work>
  void each_group(Arguments<T>& a, const Work& work) const {
    for (a.first_row = 0; a.first_row < a.m; a.first_row += cuts_.rows) {
      a.rows = std::min(cuts_.rows, a.m - a.first_row);
      work();
    }
  }
  // Calls work for one chunk of keys after another.
  template <class Work>
  void each_chunk(Arguments<T>& a, const Work& work) const {
    for (a.first_key = 0; a.first_key < a.n; a.first_key += cuts_.keys) {
      a.key_count = std::min(cuts_.keys, a.n - a.first_key);
      work();
    }
  }

  static void pack(bool packs, const T* from, T* to, const Arguments<T>& a, int64_t rows, void* stream) {
    if constexpr (kOnTensorCores<T>) {
      const int64_t all = a.entries * rows;
      if (packs)
        launch("pack_rows", &pack_rows<T>, {divide_up(all * (a.pitch_d / kChunk<T>), kThreads), dim3(kThreads)}, stream,
               from + a.first_entry * rows * a.d, to, all, a.d);
    }
  }

  // Computes a group's results, and the factors of the gradients' weights.
  void measure(Arguments<T>& a, void* stream) const {
    if (a.places > 0 && a.n > 0) Products::score_positives(a, stream);
    if constexpr (kOnTensorCores<T>)
      if (a.places != 1 || a.n == 0) launch_each("find_limits", &find_limits<SumOf<T>>, a.entries * a.rows, a, stream);
    each_chunk(a, [&] {
      Products::score(a, Stage::measure, stream);
      if (!a.fused) launch_tiles("measure_tiles", &measure_tiles<SumOf<T>>, a, stream);
      if (a.symmetric) launch_each("merge_columns", &merge_columns<SumOf<T>>, a.entries * a.key_count, a, stream);
    });
    launch("finish_rows", &finish_rows<T>, {a.entries * divide_up(a.rows, kFinishedRows), dim3(kFinishThreads)}, stream,
           a);
  }

  // Adds the other direction of a symmetric contrast, once all groups are measured.
  void finish(Arguments<T>& a, void* stream) const {
    a.first_row = 0;
    a.rows = a.m;
    launch_each("finish_columns", &finish_columns<SumOf<T>>, a.entries * a.rows, a, stream);
  }

  // Puts a group's weights into `powers`, unless the powers of measure() serve as they are.
  void weigh(const Arguments<T>& a, void* stream) const {
    if (a.keeps_powers()) return;
    const bool kept = !a.fused && cuts_.keys >= a.n && (!a.symmetric || cuts_.rows >= a.m);
    if (!kept) Products::score(a, Stage::weigh, stream);
    if (!a.fused)
      launch_tiles("weigh_tiles", &weigh_tiles<T>, a, stream);
    else if (a.places > 0)
      launch_each("put_positives", &put_positives<T>, a.entries * a.places * a.rows, a, stream);
  }

  void form_gradients(Arguments<T>& a, void* stream) const {
    if (!a.gradients) return;
    if constexpr (kOnTensorCores<T>)
      if (a.symmetric && a.grad_keys != nullptr)
        launch_each("scale_queries", &scale_queries<T>, a.entries * a.rows * kScaleSharers, a, stream);
    a.adds_keys = a.first_row > 0;
    each_chunk(a, [&] {
      weigh(a, stream);
      a.adds_queries = a.first_key > 0;
      if (a.grad_queries != nullptr) Products::add_to_queries(a, stream);
      if (a.grad_keys != nullptr) Products::add_to_keys(a, stream);
      if (a.grad_bias != nullptr)
        launch_each("add_to_bias", &add_to_bias<SumOf<T>>, a.entries * a.key_count, a, stream);
    });
    const int64_t across = a.entries * divide_up(a.d, kFinishedValues<T>);
    const int64_t of_queries = a.grad_queries != nullptr ? across * a.rows : 0;
    const int64_t of_keys = a.grad_keys != nullptr && a.first_row + a.rows == a.m ? across * a.n : 0;
    launch("finish_gradients", &finish_gradients<T>, {divide_up(of_queries + of_keys, kThreads), dim3(kThreads)},
           stream, a, of_queries, of_keys);
  }

  template <class A>
  static void launch_tiles(const char* name, void (*kernel)(A), const std::type_identity_t<A>& a, void* stream) {
    launch(
        name, kernel,
        {a.entries * divide_up(a.rows, kTile) * divide_up(a.key_count, kTile), dim3(kThreads), Tile<SumOf<T>>::kBytes},
        stream, a);
  }
  // Launches a kernel with one thread for each of `count` items.
  template <class A>
  static void launch_each(const char* name, void (*kernel)(A), int64_t count, const std::type_identity_t<A>& a,
                          void* stream) {
    launch(name, kernel, {divide_up(count, kThreads), dim3(kThreads)}, stream, a);
  }

  const Problem& problem_;
  Cuts cuts_;
};

}  // namespace cpc::info_nce::cuda
