// Predicts and contrasts on the CPU, in blocks of contexts that go through all steps. A step multiplies its matrix with
// those contexts of the block that it uses, contrasts these predictions as info_nce does, and turns their gradients
// into those of contexts and matrix. Where many steps share their negatives, their predictions are contrasted together
// between these products (shared_negatives.h). Gradients are summed in the results from block to block, row by row, in
// an order that does not depend on the number of threads. Where the processor multiplies pairs of bfloat16, contexts
// and matrices of that type are multiplied without conversion, and the gradients of predictions are rounded to
// bfloat16. Predictions are not rounded, and are contrasted in float.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "core/huge_pages.h"
#include "core/parallel.h"
#include "info_nce/all_keys.h"
#include "info_nce/info_nce.h"
#include "predict_contrast/predict_contrast.h"
#include "predict_contrast/products.h"
#include "predict_contrast/shared_negatives.h"

namespace cpc::predict_contrast::cpu::CPC_ISA {
namespace {

using info_nce::cpu::CPC_ISA::each;
using info_nce::cpu::CPC_ISA::to_padded_elements;
using info_nce::cpu::CPC_ISA::widen_run;

// The contexts of a block, which fill a superblock of a contrast of all keys.
constexpr int64_t kBlockRows = info_nce::cpu::CPC_ISA::kMaxRows;
// The values of a task that packs, converts or copies, and the nanoseconds per value.
constexpr int64_t kTaskValues = 1 << 14;
constexpr double kCopyNanoseconds = 0.5;

template <class S>
constexpr DType kDTypeOf = std::is_same_v<S, double> ? DType::f64 : DType::f32;

template <class T>
TensorView view_of(T* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view{.data = data, .dtype = dtype};
  for (const int64_t size : shape) view.shape[view.ndim++] = size;
  for (int64_t d = view.ndim - 1, stride = 1; d >= 0; stride *= view.shape[d--]) view.strides[d] = stride;
  return view;
}

// Calls body(begin, end) for parts of [0, count).
template <class Body>
void in_parts(int64_t count, const Body& body) {
  each(workers_for(kCopyNanoseconds * static_cast<double>(count)), divide_up(count, kTaskValues),
       [&](int64_t task) { body(task * kTaskValues, std::min(count, (task + 1) * kTaskValues)); });
}

template <class Storage>
class PredictAndContrast {
  using E = Element<Storage>;
  using S = Sum<E>;
  static constexpr bool kInPlace = std::is_same_v<S, Storage>;
  static constexpr int64_t kLane = kLaneColumns<E>, kStep = kDepthStep<E>;

 public:
  explicit PredictAndContrast(const Problem& problem)
      : problem_(problem),
        d_(problem.dim()),
        e_(problem.channels()),
        n_(problem.keys_count()),
        shares_(SharedNegatives<S>::takes(problem)),
        block_(std::min(shares_ ? SharedNegatives<S>::most_rows(problem) : kBlockRows, problem.rows())) {}

  int64_t workspace() const {
    Parts parts(nullptr);
    Buffers(parts, *this);
    return parts.used();
  }

  void run(char* memory) const {
    Parts parts(memory);
    Buffers b(parts, *this);
    prepare(b);
    for (int64_t first = 0; first < problem_.rows(); first += block_) {
      const int64_t end = std::min(problem_.rows(), first + block_);
      if (shares_)
        all_steps(b, first, end);
      else
        for (int64_t step = 0; step < problem_.steps(); ++step) one_step(b, step, first, end);
    }
    finish(b.grad_contexts, problem_.grad_contexts);
    finish(b.grad_weights, problem_.grad_weights);
    finish(b.grad_keys, problem_.grad_keys);
  }

 private:
  bool wants_contexts() const { return problem_.grad_contexts.ndim != 0; }
  bool wants_weights() const { return problem_.grad_weights.ndim != 0; }
  bool wants_predictions() const { return wants_contexts() || wants_weights(); }

  struct Buffers {
    S *keys, *grad_contexts, *grad_weights, *grad_keys;  // The tensors, or copies in the type of sums.
    E *to_predict, *to_contexts;                         // [K] panels of the transposed matrices, and of the matrices.
    E *contexts, *context_panels;                        // The contexts of a block that a step uses: [rows, E].
    E *grad_rows, *grad_pairs;  // The gradients of predictions, in the layouts of products of pairs.
    int64_t* rows;              // The indices of the contexts that a step uses.
    // Where steps are contrasted one after another: the values of those rows, and the contrast's workspace.
    S *predictions, *grad_predictions, *row_weights, *losses;
    int64_t *targets, *negatives, *ranks;
    char* contrast;
    typename SharedNegatives<S>::Buffers shared;  // Where steps are contrasted together.

    Buffers(Parts& parts, const PredictAndContrast& a) {
      const Problem& p = a.problem_;
      keys = of_sums(parts, p.keys);
      grad_contexts = of_sums(parts, p.grad_contexts);
      grad_weights = of_sums(parts, p.grad_weights);
      grad_keys = of_sums(parts, p.grad_keys);
      to_predict = parts.take<E>(p.steps() * Panels<E>::size(a.e_, a.d_));
      to_contexts = parts.take<E>(a.wants_contexts() ? p.steps() * Panels<E>::size(a.d_, a.e_) : 0);
      contexts = parts.take<E>(a.block_ * a.context_pitch());
      context_panels = parts.take<E>(a.wants_weights() ? Panels<E>::size(a.block_, a.e_) : 0);
      const int64_t rounded = kStep > 1 && a.wants_predictions() ? padded_depth<E>(a.block_) * a.grad_pitch() : 0;
      for (E** part : {&grad_rows, &grad_pairs}) *part = parts.take<E>(rounded);
      rows = parts.take<int64_t>(a.block_);
      if (a.shares_) {
        shared = {parts, a.shared(), a.wants_predictions()};
        return;
      }
      predictions = parts.take<S>(a.block_ * a.d_);
      // One register more, because its last row is read in whole registers.
      grad_predictions = parts.take<S>(a.wants_predictions() ? a.block_ * a.d_ + kLane : 0);
      row_weights = parts.take<S>(a.block_);
      losses = parts.take<S>(a.block_);
      for (int64_t** part : {&targets, &ranks}) *part = parts.take<int64_t>(a.block_);
      negatives = parts.take<int64_t>(a.block_ * p.samples());
      contrast = parts.take<char>(info_nce::cpu::workspace_bytes(a.contrast_of(*this, a.block_)));
    }

    static S* of_sums(Parts& parts, const TensorView& tensor) {
      if (kInPlace) return tensor.template as<S>();
      return parts.take<S>(tensor.ndim == 0 ? 0 : tensor.numel());
    }
  };

  // The pitches of the rows of `contexts` and of `grad_rows`.
  int64_t context_pitch() const { return padded_depth<E>(e_); }
  int64_t grad_pitch() const { return kStep == 1 ? d_ : divide_up(d_, kLane) * kLane; }

  Panels<E> predict_panels(const Buffers& b, int64_t step) const {
    return {b.to_predict + step * Panels<E>::size(e_, d_), e_, d_};
  }
  Panels<E> context_gradient_panels(const Buffers& b, int64_t step) const {
    return {b.to_contexts + step * Panels<E>::size(d_, e_), d_, e_};
  }

  SharedNegatives<S> shared() const { return {problem_, block_}; }

  // Packs and converts what all blocks use, and initialises the results.
  void prepare(const Buffers& b) const {
    std::fill_n(problem_.losses.template as<S>(), problem_.losses.numel(), S{});
    std::fill_n(problem_.ranks.template as<int64_t>(), problem_.ranks.numel(), int64_t{-1});
    clear(b.grad_contexts, problem_.grad_contexts);
    clear(b.grad_weights, problem_.grad_weights);
    clear(b.grad_keys, problem_.grad_keys);
    if constexpr (!kInPlace)
      in_parts(n_ * d_, [&](int64_t begin, int64_t end) {
        widen_run(b.keys + begin, problem_.keys.template as<const Storage>() + begin, end - begin);
      });
    const auto* const weights = problem_.weights.template as<const Storage>();
    const int64_t panels = predict_panels(b, 0).count(), of_contexts = context_gradient_panels(b, 0).count(),
                  count = panels + (wants_contexts() ? of_contexts : 0);
    const auto values = static_cast<double>(problem_.steps() * d_ * e_) * (wants_contexts() ? 2 : 1);
    each(workers_for(kCopyNanoseconds * values), problem_.steps() * count, [&](int64_t task) {
      const int64_t step = task / count, i = task % count;
      const Storage* const matrix = weights + step * d_ * e_;
      if (i < panels)
        predict_panels(b, step).pack_transposed(i, matrix, e_);
      else
        context_gradient_panels(b, step).pack(i - panels, matrix, e_);
    });
  }

  // Gathers those contexts of rows [begin, end) that a step uses, and returns their number.
  int64_t take_rows(const Buffers& b, int64_t step, int64_t begin, int64_t end) const {
    const auto* const targets = problem_.targets.template as<const int64_t>() + step * problem_.rows();
    int64_t count = 0;
    for (int64_t row = begin; row < end; ++row)
      if (targets[row] >= 0) b.rows[count++] = row;
    const auto* const contexts = problem_.contexts.template as<const Storage>();
    each(workers_for(kCopyNanoseconds * static_cast<double>(count * e_)), count,
         [&](int64_t i) { to_padded_elements(b.contexts + i * context_pitch(), contexts + b.rows[i] * e_, e_); });
    return count;
  }

  // The contrast of `count` predictions.
  info_nce::Problem contrast_of(const Buffers& b, int64_t count) const {
    constexpr DType sums = kDTypeOf<S>;
    info_nce::Problem c;
    c.queries = view_of(b.predictions, sums, {1, count, d_});
    c.keys = view_of(b.keys, sums, {1, n_, d_});
    c.targets = view_of(b.targets, DType::i64, {1, count, 1});
    if (problem_.sampled()) c.negatives = view_of(b.negatives, DType::i64, {1, count, problem_.samples()});
    c.row_weights = view_of(b.row_weights, sums, {1, count});
    c.losses = view_of(b.losses, sums, {1, count});
    c.ranks = view_of(b.ranks, DType::i64, {1, count});
    if (wants_predictions()) c.grad_queries = view_of(b.grad_predictions, sums, {1, count, d_});
    if (problem_.grad_keys.ndim != 0) c.grad_keys = view_of(b.grad_keys, sums, {1, n_, d_});
    c.adds_to_keys = true;
    c.scale = problem_.scale;
    return c;
  }

  // Predicts, contrasts and differentiates rows [first, end) of a step.
  void one_step(const Buffers& b, int64_t step, int64_t first, int64_t end) const {
    const int64_t count = take_rows(b, step, first, end);
    if (count == 0) return;
    predict_rows(b, step, count, {b.predictions, d_});
    contrast(b, step, count);
    if (wants_predictions()) differentiate(b, step, count, b.grad_predictions);
  }

  // The same for all steps, whose predictions are contrasted together.
  void all_steps(const Buffers& b, int64_t first, int64_t end) const {
    const SharedNegatives<S> shared = this->shared();
    for (int64_t step = 0; step < problem_.steps(); ++step) {
      const int64_t count = take_rows(b, step, first, end);
      predict_rows(b, step, count, shared.predictions(b.shared, step, b.rows, first));
      for (int64_t i = 0; i < count; ++i) shared.place(b.shared, b.rows[i] - first, step) = i;
    }
    S* const grad_keys = problem_.grad_keys.ndim != 0 ? b.grad_keys : nullptr;
    shared.run(b.shared, b.keys, grad_keys, wants_predictions(), first, end);
    for (int64_t step = 0; wants_predictions() && step < problem_.steps(); ++step)
      differentiate(b, step, take_rows(b, step, first, end), shared.gradients(b.shared, step));
  }

  int product_threads(int64_t count) const {
    return workers_for(2. * static_cast<double>(count * d_ * e_) / kFlopsPerNanosecond);
  }

  void predict_rows(const Buffers& b, int64_t step, int64_t count, const Rows<S>& predictions) const {
    product(product_threads(count), Left<E, false>{b.contexts, context_pitch()}, predict_panels(b, step), count,
            predictions, false);
  }

  // Adds to the gradients of contexts and of a step's matrix, from the gradients of `count` predictions.
  void differentiate(const Buffers& b, int64_t step, int64_t count, const S* gradients) const {
    const int threads = product_threads(count);
    const E *grad_rows = b.grad_rows, *grad_pairs = b.grad_pairs;
    if constexpr (kStep > 1)
      round_gradients(b, count, gradients);
    else
      grad_rows = grad_pairs = gradients;
    if (wants_contexts())
      product(threads, Left<E, false>{grad_rows, grad_pitch()}, context_gradient_panels(b, step), count,
              {b.grad_contexts, e_, b.rows}, true);
    if (!wants_weights()) return;
    const Panels<E> contexts{b.context_panels, count, e_};
    each(workers_for(kCopyNanoseconds * static_cast<double>(count * e_)), contexts.count(),
         [&](int64_t panel) { contexts.pack(panel, b.contexts, context_pitch()); });
    S* const of_step = b.grad_weights + step * d_ * e_;
    product(threads, Left<E, true>{grad_pairs, grad_pitch()}, contexts, d_, {of_step, e_}, true);
  }

  // Rounds the gradients of predictions for products of pairs, in two layouts: row by row, and in interleaved pairs of
  // rows.
  void round_gradients(const Buffers& b, int64_t count, const S* gradients) const {
    each(workers_for(kCopyNanoseconds * static_cast<double>(count * d_)), divide_up(count, kStep), [&](int64_t pair) {
      const int64_t row = kStep * pair;
      const S* const first = gradients + row * d_;
      for (int64_t k = 0; k < d_; k += kLane) {
        const auto second = row + 1 < count ? load_register(first + d_ + k) : Register<S>{};
        E* const to = b.grad_rows + row * grad_pitch() + k;
        round_pair(load_register(first + k), second, d_ - k, to, grad_pitch(),
                   b.grad_pairs + row * grad_pitch() + kStep * k);
      }
    });
  }

  template <bool kTransposed>
  static void product(int threads, const Left<E, kTransposed>& left, const Panels<E>& right, int64_t rows,
                      const Rows<S>& result, bool adds) {
    const int64_t panels = right.count();
    each(threads, panels * divide_up(rows, kTaskRows), [&](int64_t task) {
      const int64_t first = task / panels * kTaskRows;
      multiply(left, right, task % panels, first, std::min(rows, first + kTaskRows), result, adds);
    });
  }

  void contrast(const Buffers& b, int64_t step, int64_t count) const {
    const int64_t samples = problem_.samples(), of_step = step * problem_.rows();
    for (int64_t i = 0; i < count; ++i) {
      b.targets[i] = problem_.targets.template as<const int64_t>()[of_step + b.rows[i]];
      b.row_weights[i] = problem_.row_weights.template as<const S>()[of_step + b.rows[i]];
      if (samples > 0) std::copy_n(problem_.negatives_of(step, b.rows[i]), samples, b.negatives + i * samples);
    }
    info_nce::Problem problem = contrast_of(b, count);
    problem.workspace.data = b.contrast;
    info_nce::cpu::contrast(problem);
    S* const losses = problem_.losses.template as<S>() + step * problem_.rows();
    auto* const ranks = problem_.ranks.template as<int64_t>() + step * problem_.rows();
    for (int64_t i = 0; i < count; ++i) {
      losses[b.rows[i]] = b.losses[i];
      ranks[b.rows[i]] = b.ranks[i];
    }
  }

  static void clear(S* sums, const TensorView& gradient) {
    if (gradient.ndim == 0) return;
    in_parts(gradient.numel(), [&](int64_t begin, int64_t end) { std::fill(sums + begin, sums + end, S{}); });
  }

  // Converts sums to a gradient of another type.
  static void finish(const S* sums, const TensorView& gradient) {
    if (kInPlace || gradient.ndim == 0) return;
    in_parts(gradient.numel(), [&](int64_t begin, int64_t end) {
      narrow(gradient.template as<Storage>() + begin, sums + begin, end - begin);
    });
  }

  const Problem& problem_;
  int64_t d_, e_, n_;
  bool shares_;  // Whether steps share their negatives and are contrasted together.
  int64_t block_;
};

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  int64_t bytes = 0;
  with_floating_of_level(problem.contexts.dtype,
                         [&](auto storage) { bytes = PredictAndContrast<decltype(storage)>(problem).workspace(); });
  return bytes;
}

void predict_and_contrast(const Problem& problem) {
  for (const TensorView* written :
       {&problem.grad_contexts, &problem.grad_weights, &problem.grad_keys, &problem.workspace})
    if (written->ndim != 0) advise_huge_pages(written->data, written->numel() * size_of(written->dtype));
  with_floating_of_level(problem.contexts.dtype, [&](auto storage) {
    PredictAndContrast<decltype(storage)>(problem).run(problem.workspace.as<char>());
  });
}

}  // namespace cpc::predict_contrast::cpu::CPC_ISA
