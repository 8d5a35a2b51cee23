// InfoNCE on the CPU.
#include <algorithm>

#include "core/huge_pages.h"
#include "core/workspace.h"
#include "info_nce/all_keys.h"
#include "info_nce/sampled.h"

namespace cpc::info_nce::cpu::CPC_ISA {
namespace {

// True if each worker takes whole entries of the batch; otherwise all workers share one entry after another.
bool shares_entries(const Problem& problem) { return problem.batch() > 1 && problem.batch() >= workers(); }

// Whether every index [B, M, C] that names n for m also names m for n.
bool mutual(const TensorView& indices) {
  if (indices.ndim == 0) return true;
  const int64_t rows = indices.shape[1], places = indices.shape[2];
  const auto* named = indices.as<const int64_t>();
  for (int64_t entry = 0; entry < indices.shape[0]; ++entry, named += rows * places)
    for (int64_t i = 0; i < rows * places; ++i) {
      if (named[i] < 0) continue;
      const int64_t* const back = named + named[i] * places;
      if (std::find(back, back + places, i / places) == back + places) return false;
    }
  return true;
}

// Whether a self-contrast's pairs are the same in both directions, which AllKeys requires.
bool mutual(const Problem& problem) {
  const TensorView &queries = problem.query_groups, &keys = problem.key_groups;
  return problem.measure != Measure::sigmoid && !problem.symmetric && !problem.sampled() &&
         problem.key_range.ndim == 0 && problem.key_bias.ndim == 0 &&
         (queries.ndim == 0 || queries.data == keys.data ||
          std::equal(queries.as<int64_t>(), queries.as<int64_t>() + queries.numel(), keys.as<int64_t>())) &&
         mutual(problem.targets) && mutual(problem.exclude);
}

bool in_one(const Problem& problem) { return !problem.self_contrast || mutual(problem); }

// Turns a self-contrast into a contrast of queries and keys, whose two gradients contrast_apart() adds up.
Problem apart(const Problem& problem, Parts& parts) {
  Problem two = problem;
  two.self_contrast = false;
  two.grad_keys = problem.grad_queries;
  const bool wanted = two.grad_keys.ndim != 0;
  two.grad_keys.data = parts.take<char>(wanted ? two.grad_keys.numel() * size_of(two.grad_keys.dtype) : 0);
  return two;
}

void contrast_apart(const Problem& problem) {
  Parts parts(problem.workspace.as<char>());
  Problem two = apart(problem, parts);
  two.workspace.data = problem.workspace.as<char>() + parts.used();
  two.workspace.shape[0] -= parts.used();
  contrast(two);
  with_floating_of_level(problem.queries.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    auto* const to = problem.grad_queries.as<Storage>();
    const auto* const from = two.grad_keys.as<Storage>();
    const int64_t count = problem.grad_queries.ndim == 0 ? 0 : problem.grad_queries.numel();
    for (int64_t i = 0; i < count; ++i) to[i] = narrow<Storage>(widen(to[i]) + widen(from[i]));
  });
}

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  if (!in_one(problem)) {
    Parts parts(nullptr);
    const int64_t rest = workspace_bytes(apart(problem, parts));
    return parts.used() + rest;
  }
  int64_t bytes = 0;
  with_floating_of_level(problem.queries.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (problem.sampled())
      bytes = Sampled<Storage>(problem).workspace();
    else
      bytes = AllKeys<Element<Storage>>(problem).workspace() * (shares_entries(problem) ? workers() : 1);
  });
  return bytes;
}

void contrast(const Problem& problem) {
  if (!in_one(problem)) return contrast_apart(problem);
  for (const TensorView* written : {&problem.grad_queries, &problem.grad_keys, &problem.workspace})
    if (written->ndim != 0) advise_huge_pages(written->data, written->numel() * size_of(written->dtype));
  with_floating_of_level(problem.queries.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    char* const memory = problem.workspace.as<char>();
    if (problem.sampled()) return Sampled<Storage>(problem).run(memory);
    const AllKeys<Element<Storage>> all(problem);
    if (shares_entries(problem)) {
      const auto run = [&](int64_t entry, int worker) { all.run(entry, memory + worker * all.workspace(), false); };
      return parallel_for(problem.batch(), run, workers_for(static_cast<double>(problem.batch()) * all.nanoseconds()));
    }
    for (int64_t entry = 0; entry < problem.batch(); ++entry) all.run(entry, memory, true);
  });
}

}  // namespace cpc::info_nce::cpu::CPC_ISA
