// InfoNCE on the CPU.
#include "core/huge_pages.h"
#include "info_nce/all_keys.h"
#include "info_nce/sampled.h"

namespace cpc::info_nce::cpu::CPC_ISA {
namespace {

// Whether a batch's entries go to workers one each, rather than all workers to one after another.
bool shares_entries(const Problem& problem) { return problem.batch() > 1 && problem.batch() >= workers(); }

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  int64_t bytes = 0;
  with_floating(problem.queries.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (problem.sampled())
      bytes = Sampled<Storage>(problem).workspace();
    else
      bytes = AllKeys<Storage>(problem).workspace() * (shares_entries(problem) ? workers() : 1);
  });
  return bytes;
}

void contrast(const Problem& problem) {
  for (const TensorView* written : {&problem.grad_queries, &problem.grad_keys, &problem.workspace})
    if (written->ndim != 0) advise_huge_pages(written->data, written->numel() * size_of(written->dtype));
  with_floating(problem.queries.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    char* const memory = problem.workspace.as<char>();
    if (problem.sampled()) return Sampled<Storage>(problem).run(memory);
    const AllKeys<Storage> all(problem);
    if (shares_entries(problem)) {
      const auto run = [&](int64_t entry, int worker) { all.run(entry, memory + worker * all.workspace(), false); };
      return parallel_for(problem.batch(), run, workers_for(static_cast<double>(problem.batch()) * all.nanoseconds()));
    }
    for (int64_t entry = 0; entry < problem.batch(); ++entry) all.run(entry, memory, true);
  });
}

}  // namespace cpc::info_nce::cpu::CPC_ISA
